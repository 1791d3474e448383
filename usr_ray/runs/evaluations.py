"""The evaluations of a run, each in files of its own, and whether the run has seen their dates. No torch.

    <run-dir>/metrics.json, predictions.parquet              of the held-out rows of the training, written at its end
    <run-dir>/evaluation-A_B.json, predictions-A_B.parquet   of jobs/evaluate.py --dates A:B, the newest of these dates
    <run-dir>/evaluation-A_B-<hash>.json ...                 an earlier one, of other rows or other weights

A date is held out where it comes after all dates that the run, and those that it began with (train.warm_start), were
trained on: histories of a row hold what happened on the dates before it. That is read from the runs' own records, never
from today's configuration.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from usr_ray import __version__
from usr_ray.config import Config, ConfigError, UserError, date_ranges, dates_in
from usr_ray.config.stored import DATES, TIME, Shape, read_json, requiring
from usr_ray.data.manifest import Manifest
from usr_ray.evaluation.files import (
    PREDICTIONS_FILE,
    SPLIT,
    TRAINED_SPLIT,
    baseline_split,
    read_about,
    read_metrics,
    write_metrics,
    write_predictions,
)
from usr_ray.evaluation.metrics import CellMetrics, Predictions, metrics_by_scenario

CONFIG_FILE, METRICS_FILE, HISTORY_FILE = "config.json", "metrics.json", "history.jsonl"
_CHECKPOINTS, _STATE = "checkpoints", "state.json"
"""As training.checkpoint has them, which needs torch."""
_CONFIG: Shape = {
    "scenarios?": [str],
    "data?": {"train_dates?": DATES, "eval_dates?": DATES, "only_scenario?": str},
    "train?": {"warm_start?": str, "early_stopping?": bool},
    "model?": {"backbone?": str, **{part: {"enabled?": bool} for part in ("interest?", "generator?", "multitask?")}},
    "ray?": {"num_workers?": int},
}
_MANIFEST: Shape = {"dates?": DATES, "num_rows?": int, "sha256?": str}
_RECORD: Shape = _CONFIG | {
    "config?": _CONFIG,
    "status?": str,
    "outcome?": str,
    "step?": int,
    "created?": (TIME, None),
    "ended?": (TIME, None),
    "trained_dates?": DATES,
    "attempts?": [{"started?": TIME, "command?": [str], "changed?": {"*": [object]}}],
    "table?": {"uri": str, "version": int},
    "manifests?": {"*": _MANIFEST},
    "packages?": {"*": str},
    "shuffle?": {"order": str, "neighbour_distance": float, "correlation": float},
}
"""config.json; in runs of the first versions it is the configuration alone."""
_WAY_OUT = "put it back as it was, or use another --run-dir"
_NAME = re.compile(r"evaluation-(\d{4}-\d\d-\d\d)_(\d{4}-\d\d-\d\d)")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation of a run, as its files say."""

    file: str
    """Name of the file with the metrics."""
    metrics: CellMetrics
    baseline_metrics: CellMetrics | None
    predictions: Path | None
    """File of its rows; None where they are gone."""
    about: Mapping[str, Any]
    """Dates, checkpoint, table version; empty where the files are of an older version and the rows are gone."""
    dates: frozenset[str]
    """ISO dates that have rows in it."""
    seen: frozenset[str]
    """All dates that the run was trained on."""

    @property
    def trained_on(self) -> str:
        """What keeps its dates from being held out, as the function of this name has it; '' where nothing does."""
        return trained_on(self.dates, self.seen)

    @property
    def is_held_out(self) -> bool:
        """All dates come after those that the run was trained on."""
        return not self.trained_on


def manifest_path(run_dir: Path, split: str) -> Path:
    """File of the rows of a split, 'train' or 'eval'."""
    return run_dir / f"manifest-{split}.json"


def read_record(run_dir: Path, *needed: str, way_out: str = _WAY_OUT) -> dict[str, Any]:
    """config.json of a run, with an entry for each of `needed`. UserError: it is torn, or was changed by hand."""
    return read_json(run_dir / CONFIG_FILE, requiring(_RECORD, needed), way_out=way_out)


def read_config(run_dir: Path) -> Config:
    """The configuration in config.json of a run. UserError: as `read_record`, or it is none of this version."""
    saved = read_record(run_dir, "config")["config"]
    try:
        return Config.from_dict(Config.completed(saved))
    except ConfigError as error:
        raise UserError(f"{run_dir / CONFIG_FILE}: is damaged ({error}); {_WAY_OUT}") from error


def trained_dates(folder: Path) -> frozenset[str]:
    """ISO dates that weights have seen, those of the runs that they began with among them; none where nothing says it.

    `folder`: a run directory, or a checkpoint wherever it lies. The run's config.json says it, or where that is missing
    a checkpoint's state; of an older version's run, the manifests and the configuration in them.
    """
    record = _record_of(folder)
    if "trained_dates" in record:
        return dates_in(record["trained_dates"])
    config = record.get("config", record)
    manifest = (record.get("manifests") or {}).get("train") or {}
    own = manifest.get("dates") or (config.get("data") or {}).get("train_dates") or ""
    return dates_in(own) | warm_start_dates(str((config.get("train") or {}).get("warm_start") or ""))


def warm_start_dates(warm_start: str) -> frozenset[str]:
    """ISO dates that the weights of train.warm_start have seen; none without one, and where it is gone."""
    return trained_dates(Path(warm_start)) if warm_start else frozenset()


def _record_of(folder: Path) -> Mapping[str, Any]:
    """What describes the weights in a folder: config.json of their run, else the state of a checkpoint."""
    is_checkpoint = (folder / _STATE).is_file()
    run_dir = folder.parent.parent if is_checkpoint and folder.parent.name == _CHECKPOINTS else folder
    if (run_dir / CONFIG_FILE).is_file():
        return read_record(run_dir)
    states = [folder / _STATE] if is_checkpoint else sorted(run_dir.glob(f"{_CHECKPOINTS}/*-*/{_STATE}"))
    for path in states:
        with contextlib.suppress(UserError):  # torn: another one of the same run says the same
            return read_json(path, _RECORD)
    return {}


def evaluations(run_dir: Path, record: Mapping[str, Any]) -> list[Evaluated]:
    """Every evaluation that a run directory holds, the newest first; `record`: its config.json.

    Their own times count, as a copied run's files have others; a file that says none goes by its file's.

    Raises:
        UserError: a file cannot be read.
    """
    seen = trained_dates(run_dir)
    found = []
    for path in [*run_dir.glob(METRICS_FILE), *sorted(run_dir.glob("evaluation-*.json"))]:
        splits = read_metrics(path)
        split = next((name for name in (SPLIT, TRAINED_SPLIT) if splits.get(name)), None)
        if split is None:
            continue
        dates = _dates_of(path, splits, record)
        rows, about = _rows_of(path, dates)
        about = splits.get("about") or about
        dates = dates_in(str(about.get("dates") or "")) or dates
        baseline = splits.get(baseline_split(split))
        if baseline is not None and baseline.keys() != splits[split].keys():
            raise UserError(f"{path}: is damaged (the cells of its splits differ); run jobs/evaluate.py again")
        one = Evaluated(path.name, splits[split], baseline, rows, about, dates, seen)
        written_ns = path.stat().st_mtime_ns
        found.append((about.get("evaluated_at") or _text_of(written_ns / 1e9), written_ns, one))
    return [one for *_, one in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def _text_of(seconds: float) -> str:
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"


def dates_heading(dates: Collection[str], seen: Collection[str]) -> str:
    """What an evaluation's dates are, in words: 'held-out dates A:B', or why they are not."""
    if why := trained_on(dates, seen):
        return f"dates {date_ranges(dates)}, not held out: the run was trained on {why}"
    return f"held-out dates {date_ranges(dates)}"


def trained_on(dates: Collection[str], seen: Collection[str]) -> str:
    """Which of `seen`, the dates trained on, keep `dates` from being held out: "A:B, C", or words; '' where none do."""
    if overlap := set(dates) & set(seen):
        return date_ranges(overlap)
    last = max(seen, default="")
    return f"dates after these (to {last})" if min(dates, default=last) < last else ""


def newest(found: list[Evaluated]) -> Evaluated | None:
    """The newest on held-out dates; where there is none, the newest."""
    return next((one for one in found if one.is_held_out), found[0] if found else None)


def dates_of(manifest: Manifest, row_number_N: NDArray[np.int64]) -> tuple[str, ...]:
    """Dates of some rows of a manifest, ascending."""
    ends = np.cumsum([sum(group.num_rows for group in file.row_groups) for file in manifest.files])
    places = np.unique(np.searchsorted(ends, row_number_N, side="right"))
    return tuple(sorted({manifest.files[place].date for place in places}))


def caveats(config: Config, manifest: Manifest, dates: Collection[str], num_rows: int) -> list[str]:
    """Which rows of a manifest are not among the evaluated ones, and which dates chose the weights: a line each.

    Args:
        config: that of the run.
        dates: of the rows that are evaluated, `num_rows` of them.
    """
    only, found = config.data.only_scenario, []
    if left_out := set(manifest.dates) - set(dates):
        of_scenario = f" of {only}" if only else ""
        found.append(f"without {date_ranges(left_out)}, of which no row{of_scenario} has final labels")
    if num_rows < manifest.num_rows:
        found.append(rows_left_out(num_rows, manifest.num_rows, only))
    if chose := chosen_on(config, dates):
        found.append(f"{date_ranges(chose)} also chose the epoch (train.early_stopping), which flatters")
    return found


def chosen_on(config: Config, dates: Collection[str]) -> frozenset[str]:
    """Those of some ISO dates that chose a run's epoch (train.early_stopping)."""
    return dates_in(config.data.eval_dates) & frozenset(dates) if config.train.early_stopping else frozenset()


def rows_left_out(num_rows: int, whole: int, only_scenario: str) -> str:
    """Why an evaluation is of `num_rows` of the `whole` rows of the dates that it was asked for."""
    other = f", or they are not of {only_scenario}" if only_scenario else ""
    return f"{num_rows:,} of {whole:,} rows are evaluated: labels of the others may still change{other}"


def about_rows(manifest: Manifest, dates: Collection[str], **weights: Any) -> dict[str, Any]:
    """Where the rows of an evaluation come from, as its files say it; `weights`: the step and the checkpoint.

    "table_rows": rows of the dates asked for, those that are not evaluated among them.
    """
    return {
        "dates": date_ranges(dates),
        **weights,
        "table_uri": manifest.table_uri,
        "table_version": manifest.version,
        "table_rows": manifest.num_rows,
        "manifest_sha256": manifest.sha256,
        "evaluated_at": _text_of(time.time()),
        "usr_ray": __version__,
    }


def write_evaluation(
    run_dir: Path,
    name: str,
    predictions: Predictions,
    scenarios: tuple[str, ...],
    *,
    metrics: CellMetrics,
    baseline: Predictions | None,
    about: Mapping[str, Any],
    seen: Collection[str],
    output: Path | None = None,
) -> dict[str, CellMetrics]:
    """Write an evaluation into the run directory, beside the earlier ones, and its metrics to `output` too.

    Args:
        name: the dates as 'A_B'.
        scenarios: in the order of the table.
        metrics: those of `predictions`.
        baseline: popularity's predictions for the same rows; None: none are written.
        about: what was evaluated: 'dates', 'checkpoint', 'manifest_sha256' and more.
        output: a second file for the metrics; None: none.

    Returns:
        The splits: 'eval', or 'train' where the dates are not held out; and the baseline's.
    """
    why = trained_on(dates_in(about["dates"]), seen)
    about = {**about, "held_out": not why, "trained_on": why}
    split = TRAINED_SPLIT if why else SPLIT
    splits = {split: metrics}
    if baseline is not None:
        splits[baseline_split(split)] = metrics_by_scenario(baseline, scenarios)
    rows, file = run_dir / f"predictions-{name}.parquet", run_dir / f"evaluation-{name}.json"
    for path, there in check_earlier(run_dir, name).items():
        if (identity := _identity(there)) != _identity(about):  # another evaluation's; it keeps its time
            path.replace(path.with_name(f"{path.stem}-{identity}{path.suffix}"))
    write_predictions(rows, predictions, scenarios, baseline=baseline, about=about)
    for path in dict.fromkeys((file, output or file)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_metrics(path, splits, about=about)
    return splits


def check_earlier(run_dir: Path, name: str) -> dict[Path, Mapping[str, Any]]:
    """What the files of an earlier evaluation of these dates say of themselves, by path; those that are there.

    Raises:
        UserError: one of them cannot be read.
    """
    found: dict[Path, Mapping[str, Any]] = {}
    rows, metrics = run_dir / f"predictions-{name}.parquet", run_dir / f"evaluation-{name}.json"
    if rows.is_file():
        found[rows] = read_about(rows, way_out="remove it")
    if metrics.is_file():
        found[metrics] = read_metrics(metrics, way_out="remove it").get("about", {})
    return found


def _identity(about: Mapping[str, Any]) -> str:
    meant = [about.get(key) for key in ("dates", "checkpoint", "step", "manifest_sha256")]
    return hashlib.sha256(json.dumps(meant).encode()).hexdigest()[:8]


def _dates_of(path: Path, splits: Mapping[str, Any], record: Mapping[str, Any]) -> frozenset[str]:
    """Dates of a file of metrics without those of its rows: as it says, else as it was asked for."""
    if dates := (splits.get("about") or {}).get("dates"):
        return dates_in(dates)
    if match := _NAME.match(path.name):
        return dates_in(f"{match[1]}:{match[2]}")
    manifest = (record.get("manifests") or {}).get("eval") or {}
    return dates_in(str(manifest.get("dates") or record.get("config", record).get("data", {}).get("eval_dates") or ""))


def _rows_of(path: Path, dates: Collection[str]) -> tuple[Path | None, Mapping[str, Any]]:
    """The rows that belong to a file of metrics, and what they say of themselves.

    Before evaluations had rows of their own, all wrote predictions.parquet: those of these dates alone are taken.
    """
    own = path.with_name(path.name.replace("evaluation-", "predictions-", 1)).with_suffix(".parquet")
    shared = path.with_name(PREDICTIONS_FILE)
    for rows in (own, shared):
        if not rows.is_file():
            continue
        about = read_about(rows)
        of_rows = dates_in(str(about.get("dates") or ""))
        if rows == own or not of_rows or of_rows <= frozenset(dates):
            return rows, about
    return None, {}
