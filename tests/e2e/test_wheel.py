"""The wheel where no checkout is: built, installed into a folder, and used from logs to scores by `usr-ray`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from deltalake import DeltaTable

from tests.e2e.conftest import ROOT

pytestmark = pytest.mark.e2e
Usr = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def usr(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Usr:
    """`usr-ray ...` in an empty folder, without anything that an activated environment or the Makefile sets."""
    work = tmp_path_factory.mktemp("elsewhere")
    unset = {"SPARK_HOME", "SPARK_CONF_DIR", "SPARK_LOCAL_IP", "RAY_ADDRESS", "VIRTUAL_ENV"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(installed), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    if "JAVA_HOME" not in environment and (java := shutil.which("java")):
        environment["PATH"] = f"{environment['PATH']}:{Path(java).parent}"

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(installed / "bin" / "usr-ray"), *map(str, words)]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)

    return run


def test_the_wheel_holds_configurations_studies_and_templates(installed: Path) -> None:
    there = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    for folder, pattern in (
        ("jobs", "configs/*.toml"),
        ("jobs", "studies/*.toml"),
        ("jobs", "*.py"),
        ("etl", "**/*.py"),
        ("etl", "spark_conf/*"),
        ("usr_ray", "**/*.py"),
        ("usr_ray", "reporting/templates/*"),
    ):
        wanted = {f"{folder}/{p.relative_to(ROOT / folder).as_posix()}" for p in (ROOT / folder).glob(pattern)}
        assert wanted
        assert wanted <= there, sorted(wanted - there)
    assert not [name for name in there if name.startswith(("tests", "cluster", "benchmarks"))]


def test_help_lists_every_job_and_each_has_its_own(usr: Usr, installed: Path) -> None:
    done = usr("--help")
    assert done.returncode == 0
    for path in sorted((installed / "jobs").glob("[a-z]*.py")):
        name = path.stem.replace("_", "-")
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {name} ")]
        assert len(line) > 30, line
    assert usr("build-samples", "--help").stdout.startswith("usage: usr-ray build-samples")


def test_a_mistake_is_one_line_before_a_jvm_starts(usr: Usr, tmp_path: Path) -> None:
    done = usr("build-samples", "--logs", tmp_path / "no", "--lake", tmp_path / "lake", "--dates", "2026-01-01")
    assert (done.returncode, done.stderr) == (2, f"error: --logs {tmp_path / 'no'}: there is no such folder\n")
    assert usr("trian").stderr == "error: usr-ray: there is no job 'trian'; did you mean train?\n"


def test_logs_become_samples_a_model_and_scores(usr: Usr, installed: Path, tmp_path: Path) -> None:
    work, config = tmp_path / "my demo", installed / "jobs" / "configs" / "smoke.toml"
    done = usr("demo", "--config", config, "--work", work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (work / "run" / "report.html").is_file()
    scores = work / "scores"
    done = usr("score", "--run-dir", work / "run", "--lake", work / "lake", "--dates", "2026-01-04", "--output", scores)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert DeltaTable(scores).to_pyarrow_table().num_rows > 100
