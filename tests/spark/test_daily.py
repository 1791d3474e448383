"""A day of jobs/daily.py on real jobs, from logs to scores: each in this process, in the tests' own Spark session.

tests/e2e/test_daily.py has them as processes; the driver's other ways, and how it calls a process, are in
tests/unit/operations/test_daily.py.
"""

from __future__ import annotations

import importlib
import json
import signal
from pathlib import Path

import deltalake
import pytest
from pyspark.sql import SparkSession

from jobs import daily, ingest_logs
from tests.e2e.conftest import ROOT
from usr_ray.cli import run_job
from usr_ray.operations.daily import DayState

pytestmark = pytest.mark.spark

CONFIG = str(ROOT / "jobs" / "configs" / "smoke.toml")
FEWER = ("simulated.num_impressions=1500",)
SMALL = (
    "train.global_batch_size=128",
    "train.num_epochs=1",
    "train.reader_threads=1",
    "ray.num_workers=0",
    "data.eval_dates=",
    "data.train_dates=2026-01-01",
)


def words_of(*sets: str) -> list[str]:
    return ["--config", CONFIG, *(word for line in sets for word in ("--set", line))]


def call_job(state: DayState, step: str, command: list[str], lock: int) -> None:
    """What the driver would start as a process."""
    (place,) = (n for n, word in enumerate(command) if word.startswith("jobs/"))
    job = importlib.import_module(f"jobs.{Path(command[place]).stem}")
    assert run_job(job.main, command[place + 1 :]) == 0, command


@pytest.fixture
def in_this_process(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daily, "call_job", call_job)
    monkeypatch.setattr("etl.session.build_spark", lambda *_: spark)
    monkeypatch.setattr(spark, "stop", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own


@pytest.mark.usefixtures("in_this_process")
def test_a_first_day_ends_with_a_model_in_use_and_its_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, lake, work = tmp_path / "logs", tmp_path / "lake", tmp_path / "work"
    ingest = ["--source", "simulated", *words_of(*FEWER), "--logs", str(logs)]
    assert run_job(ingest_logs.main, ingest) == 0
    places = [word for name, path in (("logs", logs), ("lake", lake), ("work", work)) for word in (f"--{name}", path)]
    day = [*words_of(*SMALL), *map(str, places), "--date", "2026-01-04"]
    assert run_job(daily.main, day) == 0
    assert "restate: skipped, all dates are of this day's build" in capsys.readouterr().out
    # Labels are final after 5 hours, so the 3rd is held out; those of the 1st closed on the 2nd, before it began.
    record = json.loads((work / "runs" / "2026-01-04" / "config.json").read_text())
    assert record["status"] == "finished"
    assert record["config"]["data"]["train_dates"] == "2026-01-01:2026-01-01"
    assert record["manifests"]["eval"]["first_date"] == record["manifests"]["eval"]["last_date"] == "2026-01-03"
    samples = deltalake.DeltaTable(lake / "samples").to_pyarrow_table(columns=["impression_date"])
    days = [str(day) for day in samples["impression_date"].to_pylist()]
    assert set(days) == {f"2026-01-0{n}" for n in range(1, 5)}
    scores = deltalake.DeltaTable(work / "scores" / "2026-01-04").to_pyarrow_table(columns=["p_ctr"])
    assert scores.num_rows == days.count("2026-01-04") > 0
    assert (work / "exports" / "2026-01-04" / "model.onnx").exists()
    assert run_job(daily.main, day) == 0
    assert capsys.readouterr().out.count(" before\n") == 7, "nothing is left to do"
    assert run_job(daily.main, ["--work", str(work), "--status"]) == 0
    status = capsys.readouterr().out
    assert "promoted  first model, AUC of clicks 0." in status
    assert "in use: runs/2026-01-04" in status
