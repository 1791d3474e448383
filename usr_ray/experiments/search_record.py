"""A search in its run directory: its record, and its trials read from their own folders, whatever Ray kept. No Ray.

<run-dir>/search.json                configuration, lake, table version, seed; at the end every trial and the choice
<run-dir>/trials/<id>/trial.json     the drawn values and the epochs to train
<run-dir>/trials/<id>/history.jsonl  an evaluation on the choosing dates after each epoch (launch/monitor.py)
<run-dir>/trials/<id>/failure.json   why it failed
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from usr_ray.config import Config
from usr_ray.config.stored import Shape, read_json
from usr_ray.evaluation.metrics import CellMetrics
from usr_ray.experiments.record import Base, failure_of, resumed
from usr_ray.experiments.space import TriedPoint, TuneError, trial_config
from usr_ray.experiments.worlds import table_version
from usr_ray.files import now, write_whole
from usr_ray.runs.evaluations import HISTORY_FILE
from usr_ray.runs.plan import plan_run
from usr_ray.runs.read import read_history
from usr_ray.training.monitor import summarise

TRIAL_FILE, SEARCH_FILE, FINAL_DIR = "trial.json", "search.json", "final"
_SEARCH: Shape = {"table_version": int, "train_seed": int}


def write_values(folder: Path, values: Mapping[str, Any], *, num_epochs: int) -> None:
    """Record what a trial tries, before it trains."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TRIAL_FILE, json.dumps({"values": dict(values), "num_epochs": num_epochs}) + "\n")


def read_points(trials_dir: Path, config: Config, lost: Mapping[str, str] | None = None) -> list[TriedPoint]:
    """Every trial that was started, in the order drawn.

    Args:
        trials_dir: Ray's ids, which name the folders in it, end in a running number.
        config: names the metric.
        lost: trial id -> why, for trials whose process ended before it could say so.
    """
    drawn = {key: object if space.values else float for key, space in config.tune.space.items()}
    shape, way_out = {"values": drawn, "num_epochs": int}, "remove the trial's folder"
    points = []
    for path in sorted(trials_dir.glob(f"*/{TRIAL_FILE}"), key=lambda p: (p.parent.name[-5:], p.parent.name)):
        folder, raw = path.parent, read_json(path, shape, way_out=way_out, error=TuneError)
        error = failure_of(folder) or (lost or {}).get(folder.name, "")
        curve = read_curve(folder / HISTORY_FILE, config.tune.metric)
        points.append(TriedPoint(folder.name, raw["values"], curve, raw["num_epochs"], error))
    return points


def read_curve(history: Path, metric: str) -> tuple[float, ...]:
    """`metric` (config/training.METRICS) after each epoch, by history.jsonl; NaN where undefined, or where full storage
    has lost the evaluation.
    """
    rows, values = read_history(history), dict[int, float]()
    ended = {row["step"]: int(row["epoch"]) + 1 for row in rows if "epoch" in row}  # an epoch's last step is logged
    for row in rows:
        if row.get("kind") == "eval":
            value = _summary(row, history)[metric]
            values[ended.get(row["step"], max(values, default=0) + 1)] = math.nan if value is None else value
    return tuple(values.get(epoch, math.nan) for epoch in range(1, max(values, default=0) + 1))


def _summary(row: Mapping[str, Any], history: Path) -> Mapping[str, float | None]:
    try:
        return summarise(_cells(row))
    except KeyError as error:
        raise TuneError(
            f"{history}: is damaged (the evaluation of step {row['step']} lacks {error}); remove the trial's folder"
        ) from error


def _cells(row: Mapping[str, Any]) -> CellMetrics:
    """The metrics that launch/monitor.FileMonitor wrote as '<cell>/<task>/<metric>'."""
    cells: CellMetrics = {}
    for key, value in row.items():
        cell, _, rest = key.partition("/")
        task, _, name = rest.partition("/")
        if name:
            cells.setdefault(cell, {}).setdefault(task, {})[name] = value
    return cells


def open_search(config: Config, lake: str, run_dir: Path, base: Base, command: Sequence[str]) -> dict[str, Any]:
    """search.json of a new search, written, or of the one to resume.

    A new one's configuration as given is planned first, on the dates of the trials: else each of them would fail.

    Raises:
        UserError: the directory holds something else, or another search; the table cannot be read; a trial of the
            configuration as given could not be trained.
    """
    meaning, may_differ = config.to_dict(), ("ray", "data.allow_missing_dates")
    path = run_dir / SEARCH_FILE
    if record := resumed(path, "search", meaning, lake, but=may_differ, needs=_SEARCH, error=TuneError):
        return record
    record = {
        "created": now(),
        "command": list(command),
        "config": meaning,
        "lake": lake,
        "table_version": table_version(lake, base),
        "train_seed": config.train.seed,
    }
    plan_run(trial_config(config, {}, table_version=record["table_version"]), lake, run_dir / "given")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_search(run_dir, record)
    return record


def write_search(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Write search.json, whole."""
    write_whole(run_dir / SEARCH_FILE, json.dumps(record, indent=2) + "\n")


def as_row(point: TriedPoint) -> dict[str, Any]:
    """A trial as search.json has it; undefined is null."""
    return {
        "trial_id": point.trial_id,
        "status": point.status,
        "values": dict(point.values),
        "error": point.error,
        "curve": [None if math.isnan(value) else value for value in point.curve],
        "num_epochs": point.num_epochs,
    }
