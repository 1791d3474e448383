"""Mistakes of the user's: one clear line on stderr, exit code 2, nothing half-written."""

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


@pytest.fixture
def logs(smoke: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smoke / "logs", tmp_path / "logs"))


def rewrite(folder: Path, change: object) -> None:
    """Replace a log by one file with `change` applied to its whole table."""
    table = pq.read_table(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    pq.write_table(change(table), folder / "part.parquet")  # type: ignore[operator]


def refused(run: Run, lake: Path, *command: str | Path) -> str:
    done = run(*command)
    lines = error_lines(done.stderr)
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(lines) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not lake.exists() or not any(lake.iterdir())
    return lines[0]


def test_a_missing_log(run: Run, logs: Path, tmp_path: Path) -> None:
    shutil.rmtree(logs / "search_clicks")
    line = refused(run, tmp_path / "lake", *BUILD, "--logs", logs, "--lake", tmp_path / "lake", *DATES)
    assert "search_clicks" in line


def test_a_missing_column(run: Run, logs: Path, tmp_path: Path) -> None:
    rewrite(logs / "orders", lambda table: table.drop_columns(["item_id"]))
    line = refused(run, tmp_path / "lake", *BUILD, "--logs", logs, "--lake", tmp_path / "lake", *DATES)
    assert "orders" in line
    assert "item_id" in line


def test_a_wrong_type(run: Run, logs: Path, tmp_path: Path) -> None:
    def to_float(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index("event_time")
        return table.set_column(place, "event_time", pa.array([1.5] * table.num_rows))

    rewrite(logs / "search_impressions", to_float)
    line = refused(run, tmp_path / "lake", *BUILD, "--logs", logs, "--lake", tmp_path / "lake", *DATES)
    assert "search_impressions" in line
    assert "event_time" in line


def test_an_empty_date_range(run: Run, logs: Path, tmp_path: Path) -> None:
    line = refused(
        run, tmp_path / "lake", *BUILD, "--logs", logs, "--lake", tmp_path / "lake", "--dates", "2031-01-01:2031-01-02"
    )
    assert "2031-01-01" in line


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        ("build_samples", ("--logs", "x", "--dates", "2026-01-01:2026-01-02", "--lake")),
        ("train", ("--run-dir", "RUN", "--lake")),
    ],
)
def test_an_unknown_config_key(run: Run, tmp_path: Path, job: str, flags: tuple[str, ...]) -> None:
    lake, run_dir = tmp_path / "lake", tmp_path / "run"
    words = [str(run_dir) if flag == "RUN" else flag for flag in flags]
    line = refused(run, lake, sys.executable, f"jobs/{job}.py", *words, lake, "--set", "train.learning_rat=1")
    assert "unknown key 'train.learning_rat'" in line
    assert "learning_rate" in line
    assert not run_dir.exists()


def test_a_table_without_mature_rows(run: Run, logs: Path, tmp_path: Path) -> None:
    lake, run_dir = tmp_path / "lake", tmp_path / "run"
    built = run(*BUILD, "--logs", logs, "--lake", lake, *DATES, "--watermark", "2026-01-01T00:00:01Z")
    assert built.returncode == 0, built.stderr[-2000:]
    done = run(sys.executable, "jobs/train.py", "--config", SMOKE, "--lake", lake, "--run-dir", run_dir)
    lines = error_lines(done.stderr)
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(lines) == 1
    assert "mature" in lines[0]
    assert not run_dir.exists()
