"""Mistakes of the user's: one clear line on stderr, exit code 2, nothing half-written.

One of each kind of command, as a process; tests/spark and tests/unit have every message.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import Run

pytestmark = pytest.mark.e2e

SMOKE = "jobs/configs/smoke.toml"
BUILD = ("spark-submit", "jobs/build_samples.py", "--config", SMOKE)
DATES = ("--dates", "2026-01-01:2026-01-04")


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def refused(run: Run, lake: Path, *command: str | Path) -> str:
    done = run(*command)
    lines = error_lines(done.stderr)
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(lines) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not lake.exists() or not any(lake.iterdir())
    return lines[0]


def test_a_wrong_type_in_a_log(run: Run, smoke: Path, tmp_path: Path) -> None:
    """Under spark-submit, whose driver has a JVM between it and the terminal."""
    logs, log = tmp_path / "logs", tmp_path / "logs" / "search_impressions"
    shutil.copytree(smoke / "logs", logs, ignore=shutil.ignore_patterns(log.name))
    table = pq.read_table(smoke / "logs" / log.name)
    place = table.schema.get_field_index("event_time")
    log.mkdir()
    pq.write_table(table.set_column(place, "event_time", pa.array([1.5] * table.num_rows)), log / "part.parquet")
    line = refused(run, tmp_path / "lake", *BUILD, "--logs", logs, "--lake", tmp_path / "lake", *DATES)
    assert "search_impressions" in line
    assert "event_time" in line


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        ("build_samples", ("--logs", "LOGS", "--dates", "2026-01-01:2026-01-02", "--lake")),
        ("train", ("--run-dir", "RUN", "--lake")),
    ],
)
def test_an_unknown_config_key(run: Run, tmp_path: Path, job: str, flags: tuple[str, ...]) -> None:
    lake, run_dir = tmp_path / "lake", tmp_path / "run"
    lake.mkdir()
    words = [{"RUN": str(run_dir), "LOGS": str(tmp_path)}.get(flag, flag) for flag in flags]
    line = refused(run, lake, sys.executable, f"jobs/{job}.py", *words, lake, "--set", "train.learning_rat=1")
    assert "unknown key 'train.learning_rat'" in line
    assert "learning_rate" in line
    assert not run_dir.exists()
