"""The result of a run in its directory: metrics.json and predictions.parquet on the held-out rows. No Ray."""

from __future__ import annotations

import json
from pathlib import Path

from usr_ray.data.manifest import Manifest
from usr_ray.evaluation.files import PREDICTIONS_FILE, SPLIT, metrics_text, write_metrics, write_predictions
from usr_ray.evaluation.metrics import CellMetrics
from usr_ray.runs.evaluations import (
    CONFIG_FILE,
    METRICS_FILE,
    about_rows,
    dates_heading,
    dates_of,
    evaluations,
    read_json,
)
from usr_ray.training.loop import TrainResult


def write_result(run_dir: Path, result: TrainResult, held_out: Manifest) -> None:
    """metrics.json and predictions.parquet of the trained weights on the held-out rows; nothing when stopped.

    Called by rank 0; the metrics come last, so where they are the predictions are too.
    """
    evaluation = result.evaluation
    if evaluation is None or evaluation.metrics is None or evaluation.predictions is None:
        return
    dates = dates_of(held_out, evaluation.predictions.row_number_N)
    about = about_rows(held_out, dates, step=result.state.step)
    write_predictions(run_dir / PREDICTIONS_FILE, evaluation.predictions, held_out.spec.scenarios, about=about)
    write_metrics(run_dir / METRICS_FILE, {SPLIT: evaluation.metrics})


def print_result(run_dir: Path) -> CellMetrics:
    """Print the metrics of a finished run and return them."""
    splits = json.loads((run_dir / METRICS_FILE).read_text(encoding="utf-8"))
    found = evaluations(run_dir, read_json(run_dir / CONFIG_FILE))
    for one in found:
        if one.file == METRICS_FILE:
            print(f"{dates_heading(one.dates, one.trained_on)}:")
    print(metrics_text(splits))
    return splits[SPLIT]
