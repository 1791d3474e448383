"""Files of an evaluation: predictions.parquet (a row each) and evaluation-<dates>.json (metrics). No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from usr_ray.config import UserError
from usr_ray.config.stored import DATES, NUMBER, TIME, Shape, one_of, parse_json, read_json
from usr_ray.evaluation.metrics import ALL, CellMetrics, Predictions
from usr_ray.files import one_line, write_whole
from usr_ray.schema import ALL_LABELS, TASKS

PREDICTIONS_FILE = "predictions.parquet"
SPLIT, TRAINED_SPLIT = "eval", "train"
"""Split of an evaluation on held-out dates; of one on dates that were trained on, or lie before such."""
_ABOUT = b"usr_ray.evaluation"
_AGAIN = "run jobs/evaluate.py again"
_TASK: Shape = {
    **dict.fromkeys(("num_samples", "num_positives"), int),
    **dict.fromkeys(("auc", "gauc", "log_loss", "pcoc", "*"), NUMBER),
}
_CELL: Shape = dict.fromkeys(TASKS, _TASK)
_SPLIT_SHAPE: Shape = {ALL: _CELL, "*": _CELL}
_VERDICTS = ("better", "worse", "unsure", "even", "few", "none")
_LEAD: Shape = {"value": float, "low": float, "high": float, "verdict": one_of(*_VERDICTS)}
_COMPARED: Shape = {"cell": str, "task": one_of(*TASKS), "auc": {"*": NUMBER}, "leads": {"*": (_LEAD, None)}}
_PART: Shape = {
    "scenario": str,
    "rows": str,
    "auc": NUMBER,
    "num_rows": int,
    "num_positives": int,
    "drops": {"*": {"drop": float, "low": float, "high": float}},
}
_ABOUT_SHAPE: Shape = {
    "dates?": DATES,
    "evaluated_at?": TIME,
    "step?": int,
    "table_version?": int,
    "comparison?": {"cells": [_COMPARED], "notes?": [str]},
    "importance?": {"num_rows": int, "parts": [_PART]},
    **dict.fromkeys(("checkpoint?", "table_uri?", "manifest_sha256?", "usr_ray?", "trained_on?"), str),
}
_METRICS: Shape = {"about?": _ABOUT_SHAPE, "*": _SPLIT_SHAPE}


def baseline_split(split: str) -> str:
    """Split of the popularity baseline on the rows of another one."""
    return f"{split}_popularity"


def write_metrics(path: Path, splits: Mapping[str, CellMetrics], *, about: Mapping[str, Any] | None = None) -> None:
    """Write splits in the shape of metrics.json; undefined is null. The file appears whole or not at all.

    An evaluation has one key more, 'about': what was evaluated on which dates.
    """
    whole = {**({"about": about} if about else {}), **splits}
    write_whole(path, json.dumps(whole, indent=2, allow_nan=False) + "\n")


def read_metrics(path: Path, *splits: str, way_out: str = _AGAIN) -> dict[str, Any]:
    """What `write_metrics` wrote, with an entry for each of `splits`. UserError: it is torn, or was changed by hand."""
    return read_json(path, {**_METRICS, **dict.fromkeys(splits, _SPLIT_SHAPE)}, way_out=way_out)


def aligned(lines: Sequence[Sequence[str]], num_left: int | None = None) -> list[str]:
    """Lines of a table for people: the first `num_left` columns (None: all) to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if num_left is None or place < num_left else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def metrics_text(splits: Mapping[str, CellMetrics]) -> str:
    """A table for the terminal: a line for each scenario, task and split; '-' where a metric is undefined.

    The first split is the model's. Below the table, a line for each scenario and task whose labels are not known.
    """
    model = next(iter(splits))
    lines: list[tuple[str, ...]] = [
        ("scenario", "task", "scorer", "AUC", "GAUC", "log loss", "PCOC", "samples", "positives")
    ]
    for cell, tasks in splits[model].items():
        for task in tasks:
            for split, cells in splits.items():
                m = cells[cell][task]
                values = ["-" if m[key] is None else f"{m[key]:.4f}" for key in ("auc", "gauc", "log_loss", "pcoc")]
                counts = [f"{m[key]:,}" for key in ("num_samples", "num_positives")]
                lines.append((cell, task, "model" if split == model else "popularity", *values, *counts))
    unknown = [
        f"{cell} {task}: the logs know no orders of these {m['num_unknown']:,} rows"
        for cell, tasks in splits[model].items()
        for task, m in tasks.items()
        if m["num_samples"] == 0 and m.get("num_unknown")
    ]
    return "\n".join([*aligned(lines, num_left=3), *unknown])


def write_predictions(
    path: Path,
    predictions: Predictions,
    scenarios: Sequence[str],
    *,
    baseline: Predictions | None = None,
    about: Mapping[str, Any],
) -> None:
    """One Parquet row per evaluated row; `about` (dates, checkpoint, table version) goes into the file's metadata.

    Columns: row_number, scenario, the four labels (null where not known), prob_ctr, prob_ctcvr, prob_ctr_global,
    prob_ctcvr_global (null without global heads), popularity_ctr and so on (only with `baseline`), user_key,
    request_key, item_id (encoded), history_length.
    """
    columns: dict[str, Any] = {
        "row_number": predictions.row_number_N,
        "scenario": pa.DictionaryArray.from_arrays(predictions.scenario_N.astype(np.int32), list(scenarios)),
    }
    columns |= {
        label: pa.array(predictions.labels_NT[:, place], from_pandas=True) for place, label in enumerate(ALL_LABELS)
    }
    columns |= _prob_columns("prob", predictions)
    if baseline is not None:
        columns |= _prob_columns("popularity", baseline)
    columns |= {
        "user_key": predictions.user_key_N,
        "request_key": predictions.request_key_N,
        "item_id": predictions.item_id_N,
        "history_length": predictions.history_length_N,
    }
    metadata = {_ABOUT: json.dumps(dict(about)).encode()}
    write_table(path, pa.table(columns).replace_schema_metadata(metadata))


def write_table(path: Path, table: pa.Table) -> Path:
    """Write a Parquet file, whole or not at all; its path."""
    partial = path.with_name(f"{path.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    return partial.replace(path)


def _prob_columns(prefix: str, predictions: Predictions) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for place, task in enumerate(TASKS):
        columns[f"{prefix}_{task}"] = predictions.probs_NT[:, place]
        probs_NT = predictions.global_probs_NT
        columns[f"{prefix}_{task}_global"] = (
            pa.nulls(len(predictions), pa.float64()) if probs_NT is None else probs_NT[:, place]
        )
    return columns


def read_predictions(path: Path, scenarios: Sequence[str]) -> tuple[Predictions, Predictions | None, dict[str, Any]]:
    """Inverse of `write_predictions`: (model, baseline or None, about). UserError: the file cannot be read."""
    with _reading(path, _AGAIN):
        return _predictions_of(pq.read_table(path), path, scenarios)


def _predictions_of(
    table: pa.Table, path: Path, scenarios: Sequence[str]
) -> tuple[Predictions, Predictions | None, dict[str, Any]]:
    names = np.array(table["scenario"].cast(pa.string()).to_pylist(), dtype=object)
    scenario_N = np.full(table.num_rows, -1, dtype=np.int64)
    for index, scenario in enumerate(scenarios):
        scenario_N[names == scenario] = index

    def column(name: str) -> NDArray:
        return table[name].to_numpy()

    def predictions(prefix: str) -> Predictions:
        has_global = table[f"{prefix}_{TASKS[0]}_global"].null_count == 0
        return Predictions(
            row_number_N=column("row_number"),
            scenario_N=scenario_N,
            labels_NT=np.stack([column(label) for label in ALL_LABELS], axis=1),
            probs_NT=np.stack([column(f"{prefix}_{task}") for task in TASKS], axis=1),
            global_probs_NT=np.stack([column(f"{prefix}_{task}_global") for task in TASKS], axis=1)
            if has_global
            else None,
            user_key_N=column("user_key"),
            request_key_N=column("request_key"),
            item_id_N=column("item_id"),
            history_length_N=column("history_length"),
        )

    about = _about(table.schema, path, _AGAIN)
    baseline = predictions("popularity") if f"popularity_{TASKS[0]}" in table.column_names else None
    return predictions("prob"), baseline, about


def read_about(path: Path, *, way_out: str = _AGAIN) -> dict[str, Any]:
    """What a file of predictions says of itself, without its rows. UserError: the file cannot be read."""
    with _reading(path, way_out):
        return _about(pq.read_schema(path), path, way_out)


@contextlib.contextmanager
def _reading(path: Path, way_out: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {way_out}") from error


def _about(schema: pa.Schema, path: Path, way_out: str) -> dict[str, Any]:
    return parse_json((schema.metadata or {}).get(_ABOUT, b"{}"), _ABOUT_SHAPE, where=path, way_out=way_out)
