"""jobs/daily.py on real jobs, each a process: one day from logs to scores. Its other ways are in
tests/unit/operations/test_daily.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deltalake
import pytest

from tests.e2e.conftest import ROOT, Run

pytestmark = pytest.mark.e2e

SMALL = (
    "train.global_batch_size=128",
    "train.num_epochs=4",
    "ray.num_workers=0",
    "data.eval_dates=",
    "data.train_dates=2026-01-01",
)


@pytest.mark.slow  # tests/spark/test_daily.py has the same day in one process
def test_a_first_day_ends_with_a_model_in_use_and_its_scores(smoke: Path, run: Run, tmp_path: Path) -> None:
    settings = [word for line in SMALL for word in ("--set", line)]
    work = ["--work", tmp_path / "work"]
    daily = [
        sys.executable,
        "jobs/daily.py",
        "--config",
        ROOT / "jobs" / "configs" / "smoke.toml",
        *settings,
        "--logs",
        smoke / "logs",
        "--lake",
        tmp_path / "lake",
        *work,
        "--date",
        "2026-01-04",
    ]
    done = run(*daily)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "restate: skipped, all dates are of this day's build" in done.stdout
    # Labels are final after 5 hours, so the 3rd is held out; those of the 1st closed on the 2nd, before it began.
    record = json.loads((tmp_path / "work" / "runs" / "2026-01-04" / "config.json").read_text())
    assert record["status"] == "finished"
    assert record["config"]["data"]["train_dates"] == "2026-01-01:2026-01-01"
    assert record["manifests"]["eval"]["first_date"] == record["manifests"]["eval"]["last_date"] == "2026-01-03"
    samples = deltalake.DeltaTable(tmp_path / "lake" / "samples").to_pyarrow_table(columns=["impression_date"])
    days = [str(day) for day in samples["impression_date"].to_pylist()]
    assert set(days) == {f"2026-01-0{n}" for n in range(1, 5)}
    scores = deltalake.DeltaTable(tmp_path / "work" / "scores" / "2026-01-04").to_pyarrow_table(columns=["p_ctr"])
    assert scores.num_rows == days.count("2026-01-04")
    assert (tmp_path / "work" / "exports" / "2026-01-04" / "model.onnx").exists()
    again = run(*daily)
    assert again.returncode == 0
    assert again.stdout.count(" before\n") == 7, "nothing is left to do"
    status = run(sys.executable, "jobs/daily.py", *work, "--status").stdout
    assert "promoted  first model, AUC of clicks 0." in status
    assert "in use: runs/2026-01-04" in status
