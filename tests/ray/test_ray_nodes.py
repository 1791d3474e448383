"""cluster/ray_nodes.py on two machines (network namespaces): submit, how each job's end arrives, stop, go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import OVERRIDES, newest_step, wait_for
from tests.ray.network_namespaces import Machines
from tests.ray.test_local_ray import steps_logged
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.launch.environment import ensure_token

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "token"}
LONG = ("train.num_epochs=4", "train.checkpoint_every_steps=1000", "ray.num_workers=2")


LOOK_EVERY_S = 2


class Cluster:
    """Two nodes with one CPU each, and what is asked of the first."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        self.machines, self.folder = machines, folder

    def on(self, number: int, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.machines.command(number, words), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )

    def nodes(self, number: int, action: str, *more: str) -> subprocess.CompletedProcess[str]:
        return self.on(
            number,
            sys.executable,
            "cluster/ray_nodes.py",
            action,
            "--num-cpus",
            "1",
            "--object-store-gb",
            "0.1",
            "--state-dir",
            self.folder / f"node-{number}",
            *more,
        )

    def job(self, name: str, *overrides: str, folder: Path | None = None) -> subprocess.Popen[bytes]:
        """`ray job submit` on the head's machine, of a training in `folder`; it prints to <self.folder>/<name>."""
        folder = folder or self.folder
        settings = [w for o in (*OVERRIDES, *overrides) for w in ("--set", o)]
        words = [
            Path(sys.executable).parent / "ray",
            "job",
            "submit",
            "--address",
            "http://127.0.0.1:8265",
            "--submission-id",
            name,
            "--working-dir",
            ".",
            "--",
            "python",
            "jobs/train.py",
            "--lake",
            folder / "lake",
            "--run-dir",
            folder / "run",
            *settings,
        ]
        with (self.folder / name).open("w") as log:
            return subprocess.Popen(self.machines.command(0, words), cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)

    def record(self, name: str) -> dict[str, Any]:
        """What the job server keeps of a job."""
        script = (
            "import json, sys; sys.path.insert(0, '.'); from cluster.local_ray import api; "
            "from usr_ray.launch.environment import ensure_token; "
            "print(json.dumps(api(8265, f'/api/jobs/{sys.argv[1]}', ensure_token())))"
        )
        done = self.on(0, sys.executable, "-c", script, name)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def printed(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("nodes")
    machines = Machines(2, folder)
    refused = machines.up()
    if refused:
        pytest.skip(refused)
    cluster = Cluster(machines, folder)
    ensure_token()
    try:
        head = cluster.nodes(0, "head", "--host", machines.address(0))
        assert head.returncode == 0, head.stdout + head.stderr
        joined = cluster.nodes(1, "worker", "--host", machines.address(1), "--head", f"{machines.address(0)}:6379")
        assert joined.returncode == 0, joined.stdout + joined.stderr
        yield cluster
    finally:
        for number in (1, 0):
            cluster.nodes(number, "stop")
        machines.down()


def both_are_alive(cluster: Cluster) -> None:
    """Wait for the head to know of both machines: its dashboard hears of a node some seconds after it has joined."""
    expected = [cluster.machines.address(n) for n in range(2)]

    def are_told() -> bool:
        time.sleep(LOOK_EVERY_S)  # to ask takes two processor seconds
        return sorted(re.findall(r"node: +(\S+) ALIVE", cluster.nodes(0, "status").stdout)) == expected

    wait_for(are_told)


def test_a_job_on_two_machines_streams_and_its_end_arrives(cluster: Cluster) -> None:
    both_are_alive(cluster)
    write_samples(cluster.folder / "lake", samples_spec(), num_rows=12_000, num_days=6)

    whole = cluster.job("whole", *LONG, "train.num_epochs=2")
    wait_for(lambda: steps_logged(cluster.folder / "run") >= 10 or whole.poll() is not None, timeout_s=400)
    assert whole.poll() is None, cluster.printed("whole")[-3000:]
    assert re.search(r"epoch|step", cluster.printed("whole")), "the log arrives while the job runs"
    assert whole.wait(timeout=480) == 0, cluster.printed("whole")[-3000:]
    assert "finished at step" in cluster.printed("whole")
    assert cluster.record("whole")["driver_exit_code"] == 0
    ranks = set(re.findall(r"ip=(10\.83\.47\.\d)", cluster.printed("whole")))
    # A machine has one CPU, so a worker is on each; Ray leaves the address out for the head's own.
    assert cluster.machines.address(1) in ranks, "a worker on another machine"


@pytest.mark.slow  # the job above has its exit code in the record, tests/e2e/test_bad_input.py the same mistake
def test_a_mistake_is_the_jobs_own_exit_code(cluster: Cluster) -> None:
    both_are_alive(cluster)
    wrong = cluster.job("wrong", "train.epochs=3")
    assert wrong.wait(timeout=240) == 1, cluster.printed("wrong")
    assert "error: unknown key 'train.epochs'; train has:" in cluster.printed("wrong")
    record = cluster.record("wrong")
    assert (record["status"], record["driver_exit_code"]) == ("FAILED", 2)


@pytest.mark.slow  # tests/ray/test_local_ray.py has a submitted training that is stopped and gone on with
def test_a_job_on_two_machines_is_stopped_and_gone_on_with(cluster: Cluster, tmp_path: Path) -> None:
    both_are_alive(cluster)
    write_samples(tmp_path / "lake", samples_spec(), num_rows=12_000, num_days=6)
    first = cluster.job("first", *LONG, folder=tmp_path)
    wait_for(lambda: steps_logged(tmp_path / "run") >= 10 or first.poll() is not None, timeout_s=400)
    assert first.poll() is None, cluster.printed("first")[-3000:]
    stopped = cluster.on(
        0, Path(sys.executable).parent / "ray", "job", "stop", "--address", "http://127.0.0.1:8265", "first"
    )
    assert stopped.returncode == 0, stopped.stderr
    first.wait(timeout=120)
    step = newest_step(tmp_path / "run")
    assert f"stopped at step {step:,}" in cluster.printed("first")
    assert cluster.record("first")["status"] == "STOPPED"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["status"] == "running"

    second = cluster.job("second", *LONG, folder=tmp_path)
    assert second.wait(timeout=480) == 0, cluster.printed("second")[-3000:]
    assert f"resumed at step {step} " in cluster.printed("second")
    assert "finished at step" in cluster.printed("second")
    assert cluster.record("second")["driver_exit_code"] == 0
