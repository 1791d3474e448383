"""cluster/spark/standalone.py as a user has it: a master and two workers, a job by spark-submit on their executors."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import deltalake
import pytest

from cluster.daemons import session_processes
from tests.e2e.conftest import run_command
from tests.spark.test_logs_as_they_come import DAY, PLAIN, clicks, csv, impressions
from usr_ray.launch.environment import free_port

pytestmark = pytest.mark.spark

QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
INTERPRETED = (
    "spark.sql.shuffle.partitions=2",
    "spark.sql.codegen.wholeStage=false",
    "spark.sql.codegen.factoryMode=NO_CODEGEN",
    "spark.sql.adaptive.enabled=false",
)
"""As in tests/spark/conftest.py: what is shown is where the tasks run and how a job ends."""


@dataclass
class Standalone:
    """The script on ports of the test's own."""

    state: Path
    port: int
    page: int
    is_up: bool = False

    def call(self, action: str) -> CompletedProcess[str]:
        own = ["--state-dir", self.state, "--port", str(self.port), "--ui-port", str(self.page)]
        ended = run_command(
            sys.executable, "cluster/spark/standalone.py", action, "--workers", "2", "--executor-memory", "700m", *own
        )
        if action in ("start", "stop") and ended.returncode == 0:
            self.is_up = action == "start"
        return ended

    def build(self, logs: Path, lake: Path, *settings: str, executors: int) -> CompletedProcess[str]:
        """The command that `start` prints, with a small driver, for one day of one scenario without features."""
        return run_command(
            "spark-submit",
            "--master",
            f"spark://127.0.0.1:{self.port}",
            "--properties-file",
            self.state / "submit.conf",
            "--driver-memory",
            "1g",
            "--driver-java-options",
            QUICK,
            "--conf",
            f"spark.executor.extraJavaOptions={QUICK}",
            *(word for option in INTERPRETED for word in ("--conf", option)),
            "--conf",
            f"spark.dynamicAllocation.minExecutors={executors}",
            "jobs/build_samples.py",
            "--logs",
            logs,
            "--lake",
            lake,
            "--dates",
            str(DAY),
            *(word for setting in (*PLAIN, *settings) for word in ("--set", setting)),
        )

    def applications(self) -> list[dict[str, Any]]:
        """What the master knows of those that have ended."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.page}/json/", timeout=5) as response:
            return json.load(response)["completedapps"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    cluster = Standalone(tmp_path_factory.mktemp("standalone"), free_port(17077), free_port(18081))
    yield cluster
    cluster.call("stop")


@pytest.fixture
def cluster(shared: Standalone) -> Standalone:
    """Started, whatever the test before has stopped."""
    if not shared.is_up:
        started = shared.call("start")
        assert started.returncode == 0, started.stdout + started.stderr
        assert "2 alive, 2 cores" in started.stdout
    return shared


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder and the hash of what it holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 impressions, each fourth of them clicked."""
    folder, shown = tmp_path_factory.mktemp("logs"), impressions()
    csv(folder / "feed_impressions.csv", shown)
    csv(folder / "feed_clicks.csv", clicks(shown))
    return folder


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lake") / "lake"


def test_a_job_runs_on_the_executors(cluster: Standalone, logs: Path, lake: Path) -> None:
    built = cluster.build(logs, lake, executors=2)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    samples = deltalake.DeltaTable(lake / "samples").to_pyarrow_table(columns=["is_click"])
    assert (samples.num_rows, sum(samples["is_click"].to_pylist())) == (40, 10)
    ended = [(job["state"], job["cores"]) for job in cluster.applications()]
    assert ("FINISHED", 2) in ended, "an executor on each worker"


def test_a_job_ends_with_its_own_exit_code(cluster: Standalone, logs: Path, lake: Path) -> None:
    if not lake.exists():
        cluster.build(logs, lake, executors=1)
    whole = content(lake)
    wrong = cluster.build(logs, lake, "histories.length=7", executors=1)
    assert wrong.returncode == 2, wrong.stdout[-2000:] + wrong.stderr[-2000:]
    (line,) = re.findall(r"^error: (.*)$", wrong.stderr, re.M)
    assert re.match(r"\S+samples: built with histories.length = \d+, the configuration has 7; ", line), line
    assert "Traceback" not in wrong.stderr + wrong.stdout
    assert content(lake) == whole

    # The mistake was found by looking at the table, on the workers as well.
    assert {job["state"] for job in cluster.applications()} == {"FINISHED"}


def test_stop_leaves_nothing_behind(cluster: Standalone) -> None:
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", cluster.call("status").stdout)]
    assert len(pids) == 3
    assert cluster.call("stop").stdout == "worker-1: stopped\nworker-2: stopped\nmaster: stopped\n"
    assert [process for pid in pids for process in session_processes(pid)] == []
    again = cluster.call("status")
    assert again.returncode == 2
    assert re.fullmatch(r"error: no Spark daemon of \S+ runs here; start it: standalone.py start\n", again.stderr)
