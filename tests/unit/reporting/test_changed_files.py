"""Files of a run and of a lake that somebody changed by hand, or that are torn: one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.unit.changed_json import refusals
from tests.unit.reporting.test_run import SCENARIOS, etl_report, make_predictions, write_record
from usr_ray.config import UserError
from usr_ray.evaluation.files import read_predictions, write_predictions
from usr_ray.evaluation.metrics import metrics_by_scenario
from usr_ray.reporting import run as report
from usr_ray.runs.evaluations import check_earlier, write_evaluation
from usr_ray.runs.plan import result_text
from usr_ray.runs.read import read_history

pytestmark = pytest.mark.integration

LEAD = {"value": 0.1, "low": 0.05, "high": 0.15, "verdict": "better"}
ABOUT = {
    "dates": "2026-01-07:2026-01-08",
    "step": 1000,
    "checkpoint": "best-00001000",
    "table_uri": "/data/lake/samples",
    "table_version": 42,
    "manifest_sha256": "f00d",
    "evaluated_at": "2026-01-09T11:05:00Z",
    "usr_ray": "9.8.7",
    "comparison": {
        "ours": "USR",
        "cells": [{"cell": "search", "task": "ctr", "auc": {"plain": 0.6, "USR": 0.7}, "leads": {"plain": LEAD}}],
        "notes": ["on the 10 of 20 rows that both runs evaluate"],
    },
    "importance": {
        "num_rows": 600,
        "parts": [
            {"scenario": "search", "rows": "all", "num_rows": 300, "num_positives": 90, "auc": 0.7}
            | {"drops": {"user_id": {"drop": 0.1, "low": 0.05, "high": 0.15}}}
        ],
    },
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated with everything, at `run`; a lake's reports, at `lake`."""
    folder = tmp_path_factory.mktemp("whole")
    run, reports = folder / "run", folder / "lake" / "reports"
    run.mkdir()
    reports.mkdir(parents=True)
    write_record(run, trained_dates="2026-01-01:2026-01-06", outcome="finished")
    model, baseline = make_predictions(), make_predictions(seed=1)
    names = [key for key in model.__dataclass_fields__ if key != "probs_NT"]
    baseline = type(model)(**{key: getattr(model, key) for key in names}, probs_NT=baseline.probs_NT)
    cells = metrics_by_scenario(model, SCENARIOS)
    splits: dict[str, Any] = {"metrics": cells, "baseline": baseline, "about": ABOUT, "seen": {"2026-01-06"}}
    write_evaluation(run, "2026-01-07_2026-01-08", model, SCENARIOS, **splits)
    path = run / "evaluation-2026-01-07_2026-01-08.json"
    small = json.loads(path.read_text())
    for split in ("eval", "eval_popularity"):  # two cells say all there is to say of the shape
        small[split] = {cell: small[split][cell] for cell in ("search", "all")}
    path.write_text(json.dumps(small))
    (run / "metrics.json").write_text(json.dumps({"eval": small["eval"]}))
    cold = {"search": {"impressions": 10, "no_history": 5, "share": {"no_history": 0.5, "unknown_query": None}}}
    more = {"cold_start": cold, "vocabulary_coverage": {"user_id": 0.9}, "watermark": "2026-01-09T00:00:00Z"}
    (reports / "2026-01-07.json").write_text(json.dumps(etl_report("2026-01-07", **more)))
    return folder


@pytest.fixture
def reads(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Callable[[], object]]:
    """A copy of `whole`, and all that a report does with it but to draw and to compute."""
    folder = Path(shutil.copytree(whole, tmp_path / "whole"))
    for name in ("forest_plot", "step_plot", "calibration_plot", "roc_plot"):
        monkeypatch.setattr(report, name, lambda *_, **__: "")
    monkeypatch.setattr("usr_ray.reporting.lake.date_plot", lambda *_, **__: "")
    for name in ("auc_gaps", "_slices"):
        monkeypatch.setattr(report, name, lambda *_: {})
    for name in ("calibration_bins", "roc_points"):
        monkeypatch.setattr(report, name, lambda *_: None)
    monkeypatch.setattr(report, "check_lake", lambda *_: None)
    return folder, lambda: report.write_report(folder / "run", folder / "lake", folder / "report.html")


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("run/config.json", 100),
        ("run/metrics.json", 60),
        ("run/evaluation-2026-01-07_2026-01-08.json", 250),
        ("lake/reports/2026-01-07.json", 100),
    ],
)
def test_a_report_names_each_file_that_was_changed(
    reads: tuple[Path, Callable[[], object]], name: str, least: int
) -> None:
    folder, read = reads
    read()
    lines = refusals(folder / name, read)
    assert len(lines) >= least
    assert all(line.startswith(f"{folder / name}: ") and "; " in line for line in lines)


def test_the_line_says_what_was_found_and_what_is_needed(reads: tuple[Path, Callable[[], object]]) -> None:
    folder, read = reads
    path = folder / "run" / "metrics.json"
    content = json.loads(path.read_text())
    content["eval"]["search"]["ctr"]["auc"] = "0.71"
    path.write_text(json.dumps(content))
    line = f'{path}: is damaged (eval.search.ctr.auc is "0.71", needed a number); run jobs/evaluate.py again'
    for reader in (read, lambda: result_text(folder / "run")):
        with pytest.raises(UserError) as raised:
            reader()
        assert str(raised.value) == line


def test_an_evaluation_names_the_earlier_file_that_was_changed(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    path = run / "evaluation-2026-01-07_2026-01-08.json"
    lines = refusals(path, lambda: check_earlier(run, "2026-01-07_2026-01-08"))
    assert len(lines) > 250
    assert all(line.startswith(f"{path}: is ") and line.endswith("; remove it") for line in lines)


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    write_predictions(path, make_predictions(), SCENARIOS, about={"dates": "2026-01-07"})
    table = pq.read_table(path)
    strange = table.replace_schema_metadata({"usr_ray.evaluation": '{"dates": 7}'})
    for changed, problem in (
        (table.drop_columns("is_click"), "cannot be read ("),
        (strange, "is damaged (dates is 7, needed dates such as 2026-01-01:2026-01-07); run jobs/evaluate.py again"),
    ):
        pq.write_table(changed, path)
        with pytest.raises(UserError) as raised:
            read_predictions(path, SCENARIOS)
        assert str(raised.value).startswith(f"{path}: {problem}")


def test_a_line_of_the_history_that_was_changed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for line, problem in (
        ('{"kind": "train", "step": "20"}', 'step is "20", needed a whole number'),
        ('{"kind": "train"}', "step is missing"),
        ("[20]", "it is a list, needed an object"),
        ('{"kind": "train", "step": 20, "loss": "1"}', 'loss is "1", needed a number'),
    ):
        path.write_text(f'{{"kind": "train", "step": 10, "loss": 2}}\n{line}\n')
        with pytest.raises(UserError) as raised:
            read_history(path)
        assert str(raised.value) == f"{path}: line 2 is damaged ({problem}); remove the line"
