"""The wheel where no checkout is: built, installed into a folder, and used by `usr-ray`.

From logs to a served model it is the demo of tests/e2e/test_demo.py, to scores tests/e2e/test_score.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Run, Usr

pytestmark = pytest.mark.e2e


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


@pytest.mark.slow  # the installed wheel's demo is the same program, and tests/e2e runs most jobs from the checkout
def test_the_demo_of_a_checkout_in_a_folder_with_a_blank(run: Run, tmp_path: Path) -> None:
    work = tmp_path / "my demo"
    done = run(sys.executable, "jobs/demo.py", "--no-serve", "--config", "jobs/configs/smoke.toml", "--work", work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (work / "run" / "report.html").is_file()
