"""Whole jobs, run as a user runs them: sub-processes, the commands of the README, small data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REAL_LOGS = ROOT.parent / "shared" / "data"
Run = Callable[..., subprocess.CompletedProcess[str]]
Usr = Run
"""`usr-ray` of the installed wheel."""


def run_command(*command: str | Path, timeout_s: int = 420) -> subprocess.CompletedProcess[str]:
    """Run a job from the project's root with this Python's tools first on PATH."""
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["SPARK_LOCAL_IP"] = "127.0.0.1"
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
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, built of a copy: a build leaves folders beside the sources."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    for name in ("etl", "usr_ray", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.glob("usr_ray-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


@pytest.fixture(scope="session")
def usr(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Usr:
    """`usr-ray ...` in an empty folder, without anything that an activated environment or the Makefile sets."""
    work = tmp_path_factory.mktemp("elsewhere")
    unset = {
        "SPARK_HOME",
        "SPARK_CONF_DIR",
        "SPARK_SUBMIT_OPTS",
        "SPARK_DRIVER_MEMORY",
        "SPARK_LOCAL_IP",
        "RAY_ADDRESS",
        "VIRTUAL_ENV",
    }
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(installed), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    if "JAVA_HOME" not in environment and (java := shutil.which("java")):
        environment["PATH"] = f"{environment['PATH']}:{Path(java).parent}"

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(installed / "bin" / "usr-ray"), *map(str, words)]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def smoke(installed: Path, usr: Usr, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed wheel's demo on the smoke configuration, run once; its work folder (logs, lake, run)."""
    work = tmp_path_factory.mktemp("smoke") / "work"
    done = usr("demo", "--config", installed / "jobs" / "configs" / "smoke.toml", "--work", work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (work / "stdout.txt").write_text(done.stdout)
    return work


@pytest.fixture(scope="session")
def real_logs() -> Path:
    if not REAL_LOGS.is_dir():
        pytest.skip(f"the real logs are not beside the project ({REAL_LOGS.name}/ is absent)")
    return REAL_LOGS
