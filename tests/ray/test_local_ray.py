"""cluster/local_ray.py as a user has it: start, submit a training, watch it, stop; on ports of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.daemons import session_processes
from cluster.local_ray import api, train_runs
from tests.ray.conftest import OVERRIDES, newest_step, small_config, wait_for
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.launch.environment import ensure_token
from usr_ray.runs.plan import load_manifest
from usr_ray.training.rows import training_reader

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for open_socket in sockets:
        open_socket.bind(("127.0.0.1", 0))
    ports = [open_socket.getsockname()[1] for open_socket in sockets]
    for open_socket in sockets:
        open_socket.close()
    return ports


LOOPBACK_HEX = {"0100007F", "0000000000000000FFFF00000100007F"}
"""127.0.0.1 and ::ffff:127.0.0.1 as the kernel writes them."""


def listening_addresses(pid: int) -> list[str]:
    """Addresses, as in /proc/net/tcp, of the sockets on which a process accepts connections."""
    inodes = set()
    for link in (Path("/proc") / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [fields[1].split(":")[0] for fields in lines if fields[3] == "0A" and fields[9] in inodes]


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_text()
    return ""


class Head:
    """The script on ports of the test's own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.port, self.dashboard, self.metrics = free_ports(3)
        # The metrics of a node are refreshed every ten seconds by default, longer than this training takes.
        self.environment = {**os.environ, "RAY_metrics_report_interval_ms": "500"}
        self.is_up = False

    def call(self, action: str, *more: str) -> subprocess.CompletedProcess[str]:
        flags = {"--port": self.port, "--dashboard-port": self.dashboard, "--metrics-port": self.metrics}
        flags |= {"--num-cpus": 2, "--state-dir": self.state}
        command = [sys.executable, "cluster/local_ray.py", action, *(str(w) for pair in flags.items() for w in pair)]
        command += more
        ended = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        if action in ("start", "stop") and ended.returncode == 0:
            self.is_up = action == "start"
        return ended

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5) as response:
            return response.read().decode()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(tmp_path_factory.mktemp("head"))
    yield head
    head.call("stop")


@pytest.fixture
def head(shared: Head) -> Head:
    """Started, whatever the test before has stopped."""
    if not shared.is_up:
        started = shared.call("start")
        assert started.returncode == 0, started.stdout + started.stderr
    return shared


def leader(head: Head) -> int:
    match = re.search(r"pid (\d+)", head.call("status").stdout)
    assert match
    return int(match[1])


def test_everything_listens_on_the_loopback_alone(head: Head) -> None:
    listening = [address for pid in session_processes(leader(head)) for address in listening_addresses(pid)]
    assert len(listening) > 5
    assert set(listening) == LOOPBACK_HEX


def test_the_dashboard_wants_the_token_and_nothing_prints_it(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match="403"):
        api(head.dashboard, "/api/version", "0" * 64)
    assert api(head.dashboard, "/api/version", ensure_token())["ray_version"]
    printed = head.call("start").stdout + head.call("status").stdout + (head.state / "head.log").read_text()
    assert ensure_token() not in printed


def test_a_second_start_finds_the_first(head: Head) -> None:
    first = leader(head)
    assert head.call("start").returncode == 0
    assert leader(head) == first


def test_a_port_in_use_is_one_line(head: Head, tmp_path: Path) -> None:
    other = Head(tmp_path)
    other.dashboard = head.dashboard
    refused = other.call("start")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: --dashboard-port {head.dashboard}: in use by another program; end it or choose another"
    ]


def submit(head: Head, folder: Path, name: str, *overrides: str) -> subprocess.Popen[bytes]:
    """`ray job submit` of a training in `folder`; what it prints goes to <folder>/<name>."""
    settings = [w for o in (*OVERRIDES, *overrides) for w in ("--set", o)]
    words = [
        "submit",
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
    for _ in range(20):
        with (folder / name).open("w") as log:
            job = subprocess.Popen(ray_job(head, *words), cwd=ROOT, env=TOKEN_MODE, stdout=log, stderr=log)
        if is_taken(job, folder / name):
            break
    return job


def is_taken(job: subprocess.Popen[bytes], log: Path) -> bool:
    """False when the head, just started, takes no jobs yet."""
    wait_for(lambda: "submitted successfully" in log.read_text() or job.poll() is not None)
    return "No available agent" not in log.read_text()


TOKEN_MODE = {**os.environ, "RAY_AUTH_MODE": "token"}


def ray_job(head: Head, action: str, *words: object) -> list[str]:
    address = ["--address", f"http://127.0.0.1:{head.dashboard}"]
    return [str(w) for w in (Path(sys.executable).parent / "ray", "job", action, *address, *words)]


def stop_job(head: Head, name: str) -> Any:
    """What `ray job stop` sends, without the seconds in which it loads Ray and the training goes on."""
    address = f"http://127.0.0.1:{head.dashboard}/api/jobs/{name}/stop"
    token = {"Authorization": f"Bearer {ensure_token()}"}
    with urllib.request.urlopen(urllib.request.Request(address, method="POST", headers=token), timeout=30) as response:
        return json.load(response)


def steps_logged(run_dir: Path) -> int:
    path = run_dir / "history.jsonl"
    return max((json.loads(line)["step"] for line in path.read_text().splitlines()), default=0) if path.exists() else 0


def steps_of_an_epoch(folder: Path) -> int:
    manifest = load_manifest(folder / "run", "train")
    with training_reader(small_config(), manifest) as reader:
        return reader.num_steps


LONG_RUN = ("train.num_epochs=2", "train.checkpoint_every_steps=1000")
LOOK_EVERY_S = 0.5
"""How often a running job is looked at: each look takes the dashboard more time than a step takes the workers."""


def test_a_submitted_training_can_be_stopped_gone_on_with_and_watched(head: Head, tmp_path: Path) -> None:
    """That it ends with an unbroken run's weights: tests/ray/test_trainer.py, with a worker that is asked to end."""
    write_samples(tmp_path / "lake", samples_spec(), num_rows=24_000, num_days=6)
    job = submit(head, tmp_path, "first", *LONG_RUN)
    wait_for(lambda: steps_logged(tmp_path / "run") >= 10 or job.poll() is not None)
    assert stop_job(head, "first") == {"stopped": True}
    job.wait(timeout=60)
    assert api(head.dashboard, "/api/jobs/first", ensure_token())["status"] == "STOPPED"
    step = newest_step(tmp_path / "run")
    printed = (tmp_path / "first").read_text()
    assert f"stopped at step {step:,}" in printed, printed[-3000:]
    assert steps_logged(tmp_path / "run") <= step + 5
    assert step % steps_of_an_epoch(tmp_path) != 0, "the stop came with an epoch's own checkpoint; choose other sizes"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["status"] == "running"

    job = submit(head, tmp_path, "second", *LONG_RUN)
    try:
        seen: dict[str, Any] = {}

        def watched() -> bool:
            for run in train_runs(head.dashboard, ensure_token()):
                if run["status"] == "RUNNING" and run["attempts"][-1]["workers"]:
                    seen["ranks"] = sorted(w["world_rank"] for w in run["attempts"][-1]["workers"])
            found = set(re.findall(r'^ray_(usr_ray_\w+){.*rank="(\d)"', head.scrape(), re.MULTILINE))
            seen["metrics"] = seen.get("metrics", set()) | found
            time.sleep(LOOK_EVERY_S)
            return job.poll() is not None

        wait_for(watched, timeout_s=240)
    finally:
        job.kill()
    printed = (tmp_path / "second").read_text()
    assert job.returncode == 0, printed[-3000:]
    assert f"resumed at step {step} " in printed
    assert "finished at step" in printed
    assert seen["ranks"] == [0, 1]
    for rank in "01":
        assert {("usr_ray_step", rank), ("usr_ray_samples_per_s", rank)} <= seen["metrics"]
    assert {("usr_ray_loss", "0"), ("usr_ray_auc", "0"), ("usr_ray_checkpoint_age_s", "0")} <= seen["metrics"]
    assert re.search(r"run: +run-\S+ FINISHED, attempt 1: rank 0", head.call("status").stdout)


def test_a_further_node_that_is_lost_comes_back_with_start(head: Head) -> None:
    started = head.call("start", "--nodes", "2")
    first = re.search(r"node-1: +pid (\d+)", started.stdout)
    assert first, started.stdout + started.stderr
    listening = [address for pid in session_processes(int(first[1])) for address in listening_addresses(pid)]
    assert set(listening) == LOOPBACK_HEX
    raylet = next(pid for pid in session_processes(int(first[1])) if "raylet/raylet" in command_of(pid))
    os.kill(raylet, signal.SIGKILL)
    wait_for(lambda: not session_processes(int(first[1])))
    again = re.search(r"node-1: +pid (\d+)", head.call("start", "--nodes", "2").stdout)
    assert again
    assert again[1] != first[1]
    assert leader(head)


def test_stop_leaves_nothing_behind(head: Head) -> None:
    head.call("start", "--nodes", "2")
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", head.call("status").stdout)]
    assert len(pids) >= 2, "the head and a further node"
    assert head.call("stop").stdout == "Ray stopped\n"
    assert [process for pid in pids for process in session_processes(pid)] == []
    again = head.call("status")
    assert again.returncode == 2
    assert again.stderr == "error: Ray is not running; start it: python cluster/local_ray.py start\n"
