"""Does Ray's TorchTrainer slow the training loop down beside torchrun and a plain process?

    python benchmarks/launchers.py [--rows 196608] [--rounds 5] [--workers 1 2] [--append]

The same function, usr_ray.training.loop.train, on the same table and configuration, started three ways: `plain` (one
process),
`torchrun` and `TorchTrainer` (usr_ray.launch.trainer.run, as jobs/train.py does, with a Ray of its own). Each run is a
process of its own; the ways take turns. Samples a second are the run's own (history.jsonl), over the global batch,
of the log windows after the first: steady state, without start and stop. Writes benchmarks/results/launchers.json and
the table in docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.doc_tables import markdown
from benchmarks.interleaved import header, interval, publish, ratio, spread, take_turns, verdict
from usr_ray.config import Config

TABLE_ROWS = 50_000
RESULTS = Path(__file__).parent / "results" / "launchers.json"
AIM = 0.95
PLAIN, TORCHRUN, RAY = "plain", "torchrun", "TorchTrainer"
_SKIPPED_WINDOWS = 1
_LONGEST_RUN_S = 240


def config_of(workers: int, batch_rows: int) -> Config:
    """One epoch, a log window of 4 steps, no evaluation and one checkpoint."""
    train = {
        "global_batch_size": batch_rows,
        "num_epochs": 1,
        "log_every_steps": 4,
        "checkpoint_every_steps": 10**6,
        "reader_threads": 1,
    }
    data = {"train_dates": "2026-01-01:2026-01-03", "eval_dates": "2026-01-04:2026-01-04"}
    return Config.from_dict({"data": data, "train": train, "ray": {"num_workers": workers, "dashboard": False}})


def run_here(way: str, folder: Path, run_dir: Path, workers: int, batch_rows: int) -> None:
    """What a started process does: one run."""
    config = config_of(workers, batch_rows)
    if way == RAY:
        from usr_ray.launch.environment import prepare_environment

        cluster = prepare_environment(dashboard=False)
        from usr_ray.launch.trainer import run

        run(config, folder, run_dir, cluster=cluster)
        return
    import torch

    from benchmarks.reader import DATES
    from usr_ray.data.manifest import build_manifest
    from usr_ray.launch.monitor import FileMonitor
    from usr_ray.training.loop import train
    from usr_ray.training.monitor import Monitor
    from usr_ray.training.worker import LocalWorker

    # As the trainer's workers do (usr_ray/launch/trainer.py).
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    worker = LocalWorker("cuda" if torch.cuda.is_available() else "cpu")
    run_dir.mkdir(parents=True, exist_ok=True)
    monitor = FileMonitor(run_dir) if worker.is_main else Monitor()
    manifest = build_manifest(folder, dates=(DATES[0], DATES[1].replace(day=DATES[1].day - 1)))
    train(config, worker, train_manifest=manifest, run_dir=run_dir, monitor=monitor)
    worker.close()


def steady_rate(run_dir: Path) -> float:
    """Median of the samples a second of a run's log windows after the first."""
    lines = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    rates = [line["samples_per_s"] for line in lines if line["kind"] == "train"]
    if len(rates) <= _SKIPPED_WINDOWS:
        raise SystemExit(f"{run_dir}: {len(rates)} log windows are too few; give more --rows")
    return statistics.median(rates[_SKIPPED_WINDOWS:])


def launch(way: str, workers: int, folder: Path, arguments: argparse.Namespace) -> float:
    """One run in processes of its own; its steady samples a second."""
    run_dir = folder / f"run-{uuid.uuid4().hex[:8]}"
    own = [
        __file__,
        "--as",
        way,
        "--folder",
        str(folder),
        "--run-dir",
        str(run_dir),
        "--workers",
        str(workers),
        "--batch-rows",
        str(arguments.batch_rows),
    ]
    start = [sys.executable]
    if way == TORCHRUN:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    # Into a file: a pipe stays open, and would be waited for, as long as any process that Ray left behind.
    with (folder / "output.txt").open("w+") as output:
        ended = ""
        try:
            done = subprocess.run([*start, *own], stdout=output, stderr=output, check=False, timeout=_LONGEST_RUN_S)
            ended = f"failed with {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"was not done after {_LONGEST_RUN_S} s (give fewer --rows?)"
        if ended:
            output.seek(0)
            raise SystemExit(f"{way} with {workers} workers {ended}:\n{output.read()[-5000:]}")
    return steady_rate(run_dir)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.reader import benchmark_spec, write_table

    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder, benchmark_spec(TABLE_ROWS), arguments.rows)
        for workers in arguments.workers:
            names = [PLAIN, TORCHRUN, RAY] if workers == 1 else [TORCHRUN, RAY]
            ways: dict[str, Callable[[], float]] = {
                way: lambda w=way, n=workers: launch(w, n, folder, arguments)  # type: ignore[misc]
                for way in names
            }
            found = take_turns(ways, arguments.rounds, warm=0)
            base = found[names[0]]
            results += [
                {"workers": workers, "way": way, "samples_per_s": interval(rates), "ratio": ratio(rates, base)}
                for way, rates in found.items()
            ]
            print(results[-1], flush=True)
    return results


def table(report: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{r['workers']} worker{'s' * (r['workers'] > 1)}: {r['way']}",
            spread(r["samples_per_s"], 0),
            spread(r["ratio"]) + "x",
            verdict(r["ratio"]["median"], at_least=AIM) if r["way"] == RAY else "",
        ]
        for r in report["results"]
    ]
    return markdown(["started by", "samples/s, steady", "times the first", "aim"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=196_608, help="of the table; three quarters are trained on")
    parser.add_argument("--batch-rows", type=int, default=1024, help="of a step over all workers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--append", action="store_true", help="what was recorded of other numbers of workers stays")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--as", dest="way", choices=[PLAIN, TORCHRUN, RAY], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_here(arguments.way, arguments.folder, arguments.run_dir, arguments.workers[0], arguments.batch_rows)
        return
    settings = {k: getattr(arguments, k) for k in ("rows", "batch_rows", "rounds")}
    results = measure(arguments)
    if arguments.append and arguments.output.exists():
        old = json.loads(arguments.output.read_text())["results"]
        results = sorted(
            [r for r in old if r["workers"] not in arguments.workers] + results, key=lambda r: r["workers"]
        )
    report = header("steady samples a second of one function started three ways", settings, ("torch", "ray"))
    publish(report, results, table, output=arguments.output, place=RESULTS)


if __name__ == "__main__":
    main()
