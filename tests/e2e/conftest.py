"""Whole jobs, run as a user runs them: sub-processes, the commands of the README, small data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REAL_LOGS = ROOT.parent / "shared" / "data"
Run = Callable[..., subprocess.CompletedProcess[str]]


def run_command(*command: str | Path, timeout_s: int = 420) -> subprocess.CompletedProcess[str]:
    """Run a job from the project's root with this Python's tools first on PATH."""
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["SPARK_LOCAL_IP"] = "127.0.0.1"
    environment["SPARK_CONF_DIR"] = str(ROOT / "cluster" / "spark" / "conf")
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture(scope="session")
def run() -> Run:
    return run_command


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo on the smoke configuration, run once; its work folder (logs, lake, run)."""
    work = tmp_path_factory.mktemp("smoke") / "work"
    done = run_command(sys.executable, "jobs/demo.py", "--config", "jobs/configs/smoke.toml", "--work", work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (work / "stdout.txt").write_text(done.stdout)
    return work


@pytest.fixture(scope="session")
def real_logs() -> Path:
    if not REAL_LOGS.is_dir():
        pytest.skip(f"the real logs are not beside the project ({REAL_LOGS.name}/ is absent)")
    return REAL_LOGS
