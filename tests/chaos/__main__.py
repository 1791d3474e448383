"""Faults on purpose: kill, tear, fill and slow down a small training in every known way, and compare what comes of it.

    make chaos      # every fault, on a cluster of three nodes that it starts on this machine
    make chaos FAULT="worker-killed slow-rank"   # some of them; `python -m tests.chaos --list` names all
    make chaos ADDRESS=http://127.0.0.1:8265 WORK=/shared/chaos      # on a Ray cluster of your own (docs/faults.md)

After each fault the run must have drawn the unbroken run's global batches, each row once an epoch, and have its final
weights; no job may take longer than --timeout. The table (fault, expected, seen) is printed and written to <work> as
chaos.md and chaos.json. Exit code 1 if a verdict is bad.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from usr_ray.cli import JobParser, run_job
from usr_ray.config import load_config
from usr_ray.launch.environment import LOCAL_ENVIRONMENT, LOOPBACK, SUBMITTED, free_port, prepare_environment

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "jobs" / "configs" / "smoke.toml"
NUM_NODES = 3
FIRST_PORT = 26379
"""Above the ports that Ray gives to its workers, and away from those of a Ray in use."""


class ChaosFailed(SystemExit):
    """A fault had another outcome than expected; the table says which."""


def prepare_lake(work: Path) -> Path:
    """The small simulated lake in `work`, built by the jobs once; a lake that is there is used as it is."""
    lake = work / "lake"
    if (lake / "samples" / "_delta_log").exists():
        print(f"lake: {lake} (there already)", flush=True)
        return lake
    data = load_config(CONFIG).data
    dates = f"{data.train_dates.split(':')[0]}:{data.eval_dates.split(':')[-1]}"
    settings = ["--config", str(CONFIG)]
    for command in (
        ["jobs/ingest_logs.py", "--source", "simulated", "--logs", str(work / "logs"), *settings],
        ["jobs/build_samples.py", "--logs", str(work / "logs"), "--lake", str(lake), "--dates", dates, *settings],
    ):
        print(f"$ spark-submit {shlex.join(command)}", flush=True)
        done = subprocess.run(["spark-submit", *command], cwd=ROOT, check=False)
        if done.returncode != 0:
            raise ChaosFailed(done.returncode)
    return lake


@contextlib.contextmanager
def local_cluster(work: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Three nodes of one logical CPU as processes; (environment of jobs on it, the command that starts lost nodes)."""
    from cluster import local_ray

    ports = {"--port": free_port(FIRST_PORT), "--dashboard-port": free_port(FIRST_PORT + 100)}
    ports["--metrics-port"] = free_port(FIRST_PORT + 200)
    state = work / "ray"
    start = ["start", "--nodes", str(NUM_NODES), "--num-cpus", "1", "--state-dir", str(state)]
    start += [str(word) for pair in ports.items() for word in pair]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A job that is done does not keep the next one waiting for as long as a busy cluster's would.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    try:
        local_ray.main(start)
        yield {**LOCAL_ENVIRONMENT, "RAY_ADDRESS": f"{LOOPBACK}:{ports['--port']}"}, start
    finally:
        local_ray.main(["stop", "--state-dir", str(state)])


def submit(address: str, work: Path, arguments: argparse.Namespace) -> None:
    """Run this job inside the cluster at `address`, on the lake in `work`."""
    words = ["python", "-m", "tests.chaos", "--work", str(work), "--timeout", str(arguments.timeout)]
    words += [word for name in arguments.fault for word in ("--fault", name)]
    command = [
        str(Path(sys.executable).parent / "ray"),
        "job",
        "submit",
        "--address",
        address,
        "--working-dir",
        str(ROOT),
        "--",
        *words,
    ]
    print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, env={"RAY_AUTH_MODE": "token", **os.environ}, check=False)
    if done.returncode != 0:
        raise ChaosFailed(1)


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "chaos", help="lake, runs and table go here")
    parser.add_argument("--fault", action="append", default=[], metavar="NAME", help="repeatable; default: all")
    parser.add_argument("--address", default="", help="job server of an existing cluster; --work must be shared by it")
    parser.add_argument("--timeout", type=float, default=240.0, metavar="S", help="seconds that a job may take")
    parser.add_argument("--list", action="store_true", help="name the faults")
    arguments = parser.parse_args(argv)
    work = arguments.work.absolute()
    is_submitted = prepare_environment(dashboard=False) == SUBMITTED
    if arguments.address and not is_submitted:
        prepare_lake(work)
        submit(arguments.address, work, arguments)
        return
    from tests.chaos import report
    from tests.chaos.bench import Bench

    faults = report.choose(arguments.fault)
    if arguments.list:
        print("\n".join(f"{fault.name:30} {fault.what}" for fault in faults))
        return
    work.mkdir(parents=True, exist_ok=True)
    lake = prepare_lake(work)
    settings = ("--config", str(CONFIG))
    if is_submitted:
        bench = Bench(work, lake, settings, {}, timeout_s=arguments.timeout, is_local=False)
        rows = report.run_all(faults, bench)
    else:
        from cluster import local_ray

        with local_cluster(work) as (environment, start):
            bench = Bench(work, lake, settings, environment, timeout_s=arguments.timeout)
            rows = report.run_all(faults, bench, heal=lambda: local_ray.main(start))
    report.write(rows, work)
    if any(row["verdict"] == "bad" for row in rows):
        raise ChaosFailed(1)


if __name__ == "__main__":
    sys.exit(run_job(main))
