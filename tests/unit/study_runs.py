"""Finished trials as run_study leaves them, written without training: what a model would have said is made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from usr_ray.evaluation.files import PREDICTIONS_FILE, SPLIT, write_metrics, write_predictions
from usr_ray.evaluation.metrics import Predictions, metrics_by_scenario
from usr_ray.experiments.grid import Study, Trial, expand
from usr_ray.experiments.record import Base, open_study, trial_dir, write_record

SETS = ("data.train_dates='2026-01-01:2026-01-03'", "data.eval_dates='2026-01-04'")
BASE = Base(None, SETS)
SCENARIOS = ("search", "recommendation")
NUM_ROWS, NUM_USERS = 1200, 150


def rows(noise: float, seed: int) -> Predictions:
    """The same rows each time; probabilities that are further from the truth the more noise."""
    rng = np.random.default_rng(0)
    user_N = rng.integers(0, NUM_USERS, NUM_ROWS)
    truth_N = 1 / (1 + np.exp(1 - rng.normal(size=NUM_ROWS) - rng.normal(size=NUM_USERS)[user_N]))
    click_N = rng.random(NUM_ROWS) < truth_N
    order_N = click_N & (rng.random(NUM_ROWS) < 0.4)
    labels_NT = np.stack([click_N, order_N, click_N, order_N], axis=1).astype(np.float32)
    blurred = np.random.default_rng(seed + 1).normal(size=NUM_ROWS) * noise
    probs_N = 1 / (1 + np.exp(-(np.log(truth_N / (1 - truth_N)) + blurred)))
    return Predictions(
        row_number_N=np.arange(NUM_ROWS),
        scenario_N=np.arange(NUM_ROWS) % 2,
        labels_NT=labels_NT,
        probs_NT=np.stack([probs_N, probs_N * 0.4], axis=1),
        global_probs_NT=None,
        user_key_N=user_N,
        request_key_N=np.arange(NUM_ROWS) // 4,
        item_id_N=rng.integers(1, 60, NUM_ROWS),
        history_length_N=rng.integers(0, 30, NUM_ROWS),
    )


def finish(run_dir: Path, study: Study, trial: Trial, predictions: Predictions, *, rows_hash: str = "f00d") -> Path:
    """What a trained trial leaves, evaluated on files of that hash; its folder."""
    folder = trial_dir(run_dir, trial)
    folder.mkdir(parents=True)
    write_predictions(folder / PREDICTIONS_FILE, predictions, SCENARIOS, about={})
    write_metrics(folder / "metrics.json", {SPLIT: metrics_by_scenario(predictions, SCENARIOS)})
    config = BASE.config(study.resources, trial, table_version=4).to_dict()
    record = {
        "status": "finished",
        "step": 12,
        "config": config,
        "table": {"uri": "/lake/samples", "version": 4},
        "manifests": {"eval": {"sha256": rows_hash}},
        "attempts": [{"started": "2026-01-09T10:00:00+00:00"}],
        "ended": "2026-01-09T10:00:42+00:00",
        "packages": {"torch": "2"},
    }
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    spread = {"kind": "train", "step": 12, "variance/interest/search": 0.02, "variance/feature/search": 0.0}
    (folder / "history.jsonl").write_text(json.dumps(spread) + "\n", encoding="utf-8")
    return folder


def write_study(run_dir: Path, study: Study, noises: dict[str, float], axis: str) -> None:
    """Every trial of a study finished; `noises`: label on `axis` -> noise."""
    record = open_study(run_dir, study, BASE, lake="/lake", command=["jobs/study.py", "--study", study.name])
    write_record(run_dir, record | {"tables": {"": {"lake": "/lake", "version": 4}}})
    for trial in expand(study):
        finish(run_dir, study, trial, rows(noises[trial.point[axis]], trial.seed))
