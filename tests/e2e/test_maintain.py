"""jobs/maintain_tables.py under spark-submit, on a lake on which a real run was trained.

Slow: tests/spark/test_table_care.py has the job and its line in the folder's own session.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import deltalake
import pytest

from tests.e2e.conftest import Run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_vacuum_is_refused_in_one_line_that_names_the_run_and_its_version(
    run: Run, smoke: Path, tmp_path: Path
) -> None:
    lake = Path(shutil.copytree(smoke / "lake", tmp_path / "lake"))
    assert not list((lake / "pins").iterdir()), "the run is finished and has taken back its pin"
    deltalake.DeltaTable(lake / "samples").delete("impression_date = '2026-01-02'")
    files = set(lake.rglob("*.parquet"))
    done = run(
        "spark-submit", "jobs/maintain_tables.py", "--lake", lake, "--runs", smoke / "run", "--vacuum", "--keep", "0 s"
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    version = json.loads((smoke / "run" / "config.json").read_text())["table"]["version"]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(errors) == 1
    assert f"of version {version}, to which the run {smoke / 'run'} (finished) is pinned" in errors[0]
    assert set(lake.rglob("*.parquet")) == files
    assert "rows a row group" in done.stdout
