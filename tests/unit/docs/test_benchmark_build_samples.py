"""What compares the systems of benchmarks/build_samples.py finds what differs, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))

from build_samples_check import RowsDifferError, check_equal
from build_samples_measure import RunFailedError, measure
from build_samples_report import fit, medians, plan

pytestmark = pytest.mark.unit


def write(folder: Path, rows: pa.Table) -> Path:
    target = folder / "impression_date=2026-01-01"
    target.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, target / "rows.parquet")
    return folder


def test_the_comparison_names_the_column_and_row_that_differ(tmp_path: Path) -> None:
    rows = pa.table({"impression_id": ["a", "b", "c"], "is_click": [0.0, 1.0, 0.0], "history": [[1], [], [2, 3]]})
    one, three = write(tmp_path / "one", rows), write(tmp_path / "three", rows.take([2, 0, 1]))
    assert check_equal({"one": one, "three": three}, {})["three"]["rows"] == 3  # the order of rows says nothing
    two = write(tmp_path / "two", rows.set_column(1, "is_click", pa.array([0.0, 0.0, 0.0])))
    with pytest.raises(RowsDifferError, match=r"is_click: 1 rows; impression_id b: \[\(1.0,\)\] and \[\(0.0,\)\]"):
        check_equal({"one": one, "two": two}, {})
    assert check_equal({"one": one, "two": two}, {"two": {"is_click"}})["two"]["left_out"] == ["is_click"]
    with pytest.raises(RowsDifferError, match="one has 3 rows, three 2"):
        check_equal({"one": one, "three": write(three, rows.slice(0, 2))}, {})
    with pytest.raises(RowsDifferError, match=r"differ in the columns \['history'\]"):
        check_equal({"one": one, "two": write(two, rows.drop(["history"]))}, {})


@pytest.mark.integration
def test_a_process_and_its_children_are_measured_together(tmp_path: Path) -> None:
    child = "x = bytearray(60 << 20); import time; time.sleep(0.8)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True); print('done')"
    usage = measure([sys.executable, "-c", parent], cwd=tmp_path, env={}, timeout_s=60)
    assert usage.lines == ["done"]
    assert 0.8 < usage.wall_s < 30
    assert usage.peak_python_bytes > 60 << 20
    assert usage.peak_jvm_bytes == 0
    with pytest.raises(RunFailedError, match="exit code 3"):
        measure([sys.executable, "-c", "raise SystemExit(3)"], cwd=tmp_path, env={}, timeout_s=60)


def run(size: float, wall_s: float, cpu_s: float) -> dict:
    spark = {"shuffle_write_bytes": int(size * 100), "spilled_disk_bytes": 0}
    return {
        "system": "ours",
        "impressions": int(size),
        "bot": False,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "output_bytes": int(size * 50),
        "spark": spark,
    }


def test_the_plan_is_arithmetic_on_the_fitted_line() -> None:
    cells = medians([run(1e6, 30, 40), run(1e6, 90, 60), run(1e6, 20, 50), run(3e6, 50, 90)])
    assert cells["ours", 1_000_000, False]["wall_s"] == 30
    start, slope = fit(cells, "ours", "cpu_s") or (0, 0)
    assert (round(start, 6), round(slope, 6)) == (30, 20)  # 50 at one million, 90 at three
    text = "\n".join(plan(cells))
    assert "56 core-hours" in text  # 20 s x 10,000 / 3600
    assert "shuffled | 1.00 TB" in text
    assert "1,863 of 256 MB" in text  # 0.5 TB / 256 MB
    assert "done in 1 h | 20 executors" in text  # 55.6 / 0.7 / 4, up
