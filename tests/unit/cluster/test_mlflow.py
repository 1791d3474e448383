"""A run directory in MLflow's own file store; skipped where usr-ray[mlflow] is not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.log_mlflow import main
from usr_ray.cli import run_job
from usr_ray.operations.mlflow import param_key, run_tag

pytestmark = pytest.mark.unit

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="usr-ray[mlflow] is not installed")


def train_row(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "time": 1_000.5 + step, "loss": loss, "loss/search/ctr": loss / 2}


EVALUATION = {"kind": "eval", "step": 20, "time": 1_021.0, "search/ctr/auc": 0.75, "search/ctcvr/auc": None}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run in progress, of two log steps and the evaluation of the second."""
    run = tmp_path / "runs" / "monday"
    run.mkdir(parents=True)
    table, config = {"uri": "/lake/samples", "version": 3}, {"scenarios": ["search"], "train": {"seed": 7}}
    record = {"created": "2026-01-08T00:00:00+00:00", "status": "running", "table": table, "config": config}
    (run / "config.json").write_text(json.dumps(record))
    write_history(run, [train_row(10, 2.0), train_row(20, 1.0), EVALUATION])
    return run


def write_history(run: Path, rows: list[dict[str, Any]]) -> None:
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@needs_mlflow
def test_a_run_is_logged_once_and_brought_up_to_date(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.tracking import MlflowClient

    assert run_job(main, ["--run-dir", str(run_dir)]) == 0
    assert ": 5 numbers added" in capsys.readouterr().out, "two losses twice and one AUC; the undefined one is left out"
    tracking = MlflowClient(tracking_uri=(run_dir.parent / "mlruns").as_uri())
    experiment = tracking.get_experiment_by_name("usr-ray")
    (run,) = tracking.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("monday", "RUNNING")
    assert run.data.params["train.seed"] == "7"
    assert run.data.params["table.version"] == "3"
    points = tracking.get_metric_history(run.info.run_id, "train/loss")
    assert [(p.step, p.value, p.timestamp) for p in points] == [(10, 2.0, 1_010_500), (20, 1.0, 1_020_500)]
    assert run.data.metrics["eval/search/ctr/auc"] == 0.75
    assert run.data.metrics["loss/search/ctr"] == 0.5
    assert "eval/search/ctcvr/auc" not in run.data.metrics

    write_history(run_dir, [train_row(10, 2.0), train_row(20, 1.0), EVALUATION, train_row(30, 0.5)])
    record = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(record | {"status": "finished"}))
    assert run_job(main, ["--run-dir", str(run_dir)]) == 0
    assert ": 2 numbers added" in capsys.readouterr().out
    (run,) = tracking.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [p.step for p in tracking.get_metric_history(run.info.run_id, "train/loss")] == [10, 20, 30]
    assert {a.path for a in tracking.list_artifacts(run.info.run_id)} == {"config.json", "history.jsonl"}
    assert run_job(main, ["--run-dir", str(run_dir)]) == 0
    assert ": 0 numbers added" in capsys.readouterr().out


@needs_mlflow
def test_more_numbers_than_one_call_takes_all_arrive(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_history(run_dir, [train_row(step, 1.0) for step in range(1, 1_501)])
    assert run_job(main, ["--run-dir", str(run_dir)]) == 0
    assert ": 3,000 numbers added" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run-dir", "nothing"], "config.json: is not readable JSON"),
        (
            ["--run-dir", "nothing", "--tracking-uri", "https://me:hush@mlflow.example"],
            "must hold no key and no option",
        ),
    ],
)
@needs_mlflow
def test_what_cannot_be_logged_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_job(main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hush" not in error


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed")
def test_without_mlflow_one_line_says_what_to_install(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(main, ["--run-dir", str(run_dir)]) == 2
    assert "error: mlflow is not installed here; install usr-ray[mlflow]" in capsys.readouterr().err
    assert not (run_dir.parent / "mlruns").exists()


def test_names_become_what_mlflow_takes() -> None:
    assert run_tag(Path("/runs/monday 1"), "2026-01-08T00:00:00+00:00") == "/runs/monday 1 2026-01-08T00:00:00+00:00"
    odd = run_tag(Path("/runs/für-dich 北\"'`\\"), "x")
    assert odd == "/runs/f%C3%BCr-dich %E5%8C%97%22%27%60%5C x"
    assert [param_key(key) for key in ("train.seed", "logs.a.where.Größe (cm)", "x%")] == [
        "train.seed",
        "logs.a.where.Größe -x28-cm-x29-",
        "x-x25-",
    ]
