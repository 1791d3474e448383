"""From the trials of a study to its numbers: means over seeds, compared points, slices. No Ray.

Shape letters: N rows, R seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from usr_ray.config import Config
from usr_ray.evaluation.baseline import TrainingRows
from usr_ray.evaluation.files import PREDICTIONS_FILE, SPLIT, read_metrics, read_predictions
from usr_ray.evaluation.metrics import ALL, GLOBAL, CellMetrics, Predictions
from usr_ray.evaluation.statistics import (
    Judged,
    PairedGap,
    cell_rows,
    corrected,
    history_parts,
    on_common_rows,
    paired_auc_gap,
)
from usr_ray.experiments.grid import Study, StudyError, Trial, compared_labels, expand
from usr_ray.experiments.record import is_finished, trial_dir
from usr_ray.runs.evaluations import METRICS_FILE, read_config, read_record
from usr_ray.runs.plan import load_manifest
from usr_ray.schema import TASKS, UNKNOWN_ID
from usr_ray.training.rows import baseline_rows

WHOLE = "all rows"
Point = tuple[tuple[str, str], ...]
"""(axis, label) of each axis, in the order of the study."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric of a point, over its seeds."""

    value: float
    sd: float
    """Sample standard deviation over the seeds; 0 for one."""
    num_seeds: int


@dataclass(frozen=True, slots=True)
class Contrast(Judged):
    """One value of an axis against another, in one cell and one part of the rows."""

    axis: str
    label: str
    against: str
    at: Point
    """The other axes."""
    scenario: str
    task: str
    part: str


class Trials:
    """The finished trials of a study in its directory."""

    def __init__(self, run_dir: Path, study: Study) -> None:
        self.run_dir, self.study = run_dir, study
        self.all = expand(study)
        self.finished = [trial for trial in self.all if is_finished(trial_dir(run_dir, trial))]
        if not self.finished:
            raise StudyError(f"--run-dir {run_dir}: no trial of study {study.name} is finished; run jobs/study.py")
        self.by_point: dict[Point, dict[int, Trial]] = {}
        for trial in self.finished:
            self.by_point.setdefault(tuple(trial.point.items()), {})[trial.seed] = trial
        self.predictions: Callable[[str], Predictions] = functools.lru_cache(maxsize=24)(self._predictions)

    def config(self, trial: Trial) -> Config:
        """The configuration that the trial was run with."""
        return read_config(trial_dir(self.run_dir, trial))

    def dates(self) -> dict[str, str]:
        """Split -> dates that had rows, as "A:B"; of a study of several worlds those of the first trial."""
        record = read_record(trial_dir(self.run_dir, self.finished[0]))
        return {split: about["dates"] for split, about in record.get("manifests", {}).items() if "dates" in about}

    def scenarios(self, point: Point) -> tuple[str, ...]:
        """Scenarios of the point's table."""
        return self.config(next(iter(self.by_point[point].values()))).scenarios

    def rows_hash(self, trial: Trial) -> str | None:
        """SHA-256 of the held-out files that the trial was evaluated on; None where its record does not say."""
        record = read_record(trial_dir(self.run_dir, trial))
        return record.get("manifests", {}).get("eval", {}).get("sha256")

    def metrics(self, trial: Trial) -> CellMetrics:
        """metrics.json of a finished trial."""
        return read_metrics(trial_dir(self.run_dir, trial) / METRICS_FILE, SPLIT)[SPLIT]

    def _predictions(self, trial_id: str) -> Predictions:
        trial = next(t for t in self.finished if t.trial_id == trial_id)
        path = trial_dir(self.run_dir, trial) / PREDICTIONS_FILE
        return read_predictions(path, self.config(trial).scenarios)[0]

    def training_rows(self, trial: Trial) -> TrainingRows:
        """What the trial was trained on, four columns of it."""
        config, manifest = self.config(trial), load_manifest(trial_dir(self.run_dir, trial), "train")
        return baseline_rows(config, manifest)


def means(trials: Trials) -> dict[Point, dict[tuple[str, str, str], Mean]]:
    """Point -> (scenario or total, task, metric) -> mean over its seeds; metrics defined with every seed.

    A model of one scenario alone has no totals: they would stand beside those of other rows.
    """
    found = {}
    for point, by_seed in trials.by_point.items():
        cells = [trials.metrics(trial) for trial in by_seed.values()]
        is_alone = bool(trials.config(next(iter(by_seed.values()))).data.only_scenario)
        entries = {}
        for scenario, tasks in cells[0].items():
            if is_alone and scenario in TOTALS:
                continue
            for task, metrics in tasks.items():
                for name in metrics:
                    values = [c[scenario][task].get(name) for c in cells]
                    known = [float(v) for v in values if v is not None]
                    if known and len(known) == len(values):
                        entries[scenario, task, name] = mean_of(known)
        found[point] = entries
    return found


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and sample standard deviation."""
    return Mean(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values))


def contrasts(trials: Trials) -> list[Contrast]:
    """Every comparison that the study declares, on all rows; then, with `slices`, on parts: two corrected families."""
    whole: list[Contrast] = []
    parts: list[Contrast] = []
    for comparison in trials.study.comparisons:
        for label, against in compared_labels(trials.study, comparison):
            for at in _others(trials.study, comparison.axis):
                ours = trials.by_point.get(_with(trials.study, at, comparison.axis, label), {})
                theirs = trials.by_point.get(_with(trials.study, at, comparison.axis, against), {})
                shared = [seed for seed in ours if seed in theirs]
                names = (comparison.axis, label, against, at)
                pair = [(ours[seed], theirs[seed]) for seed in shared]
                whole += _compare(trials, names, pair, sliced=False)
                if trials.study.slices:
                    parts += _compare(trials, names, pair, sliced=True)
    return corrected(whole) + corrected(parts)


def _compare(
    trials: Trials, names: tuple[str, str, str, Point], pairs: Sequence[tuple[Trial, Trial]], *, sliced: bool
) -> Iterator[Contrast]:
    if not pairs:
        return
    _check_same_rows(trials, pairs)
    scenarios = trials.config(pairs[0][0]).scenarios
    # A model of one scenario alone (data.only_scenario) was evaluated on its rows only.
    scored = on_common_rows({t.trial_id: trials.predictions(t.trial_id) for pair in pairs for t in pair})
    first = scored[pairs[0][0].trial_id]
    masks = rows_by_part(first, trials.training_rows(pairs[0][0])) if sliced else {WHOLE: np.ones(len(first), bool)}
    for part, mask in masks.items():
        sides = [[scored[t.trial_id].take(mask) for t in side] for side in zip(*pairs, strict=True)]
        for scenario in scenarios:
            for place, task in enumerate(TASKS):
                yield Contrast(*names, scenario, task, part, gap=_gap(sides, scenario, place, scenarios))


def _gap(
    sides: Sequence[Sequence[Predictions]], scenario: str, task: int, scenarios: Sequence[str]
) -> PairedGap | None:
    cells = [[cell_rows(rows, scenario, task, scenarios) for rows in side] for side in sides]
    ours, theirs = ([cell for cell in side if cell is not None] for side in cells)  # None is for global cells alone
    labels, _, users = ours[0]
    return paired_auc_gap(labels, np.stack([c[1] for c in ours]), np.stack([c[1] for c in theirs]), users)


def _check_same_rows(trials: Trials, pairs: Sequence[tuple[Trial, Trial]]) -> None:
    """A row is known by its place in the held-out files, so these must be the same; StudyError where they are not."""
    first, *others = (trial for pair in pairs for trial in pair)
    for other in others:
        if trials.rows_hash(other) != trials.rows_hash(first):
            raise StudyError(
                f"trial {other.trial_id}: was evaluated on other rows than trial {first.trial_id}, with which it is "
                "compared; run the study again, in another --run-dir"
            )


def rows_by_part(rows: Predictions, trained: TrainingRows) -> dict[str, NDArray[np.bool_]]:
    """Name -> rows: by events in the user's histories, and by whether the training rows have the user and the item.

    Items without an id of their own share UNKNOWN_ID, which tells none of them apart: they are new.
    """
    parts = {f"{name} past events": inside for name, inside in history_parts(rows.history_length_N)}
    knows_user_N = np.isin(rows.user_key_N, trained.user_key_N)
    knows_item_N = np.isin(rows.item_id_N, trained.item_id_N) & (rows.item_id_N > UNKNOWN_ID)
    parts["user seen in training"], parts["user new"] = knows_user_N, ~knows_user_N
    parts["item seen in training"], parts["item new"] = knows_item_N, ~knows_item_N
    return {name: mask for name, mask in parts.items() if mask.any()}


def _others(study: Study, axis: str) -> list[Point]:
    """The combinations of the other axes that the grid has."""
    points = [tuple((name, label) for name, label in trial.point.items() if name != axis) for trial in expand(study)]
    return list(dict.fromkeys(points))


def _with(study: Study, at: Point, axis: str, label: str) -> Point:
    labels = {**dict(at), axis: label}
    return tuple((a.name, labels[a.name]) for a in study.axes)


def point_name(study: Study, point: Point) -> str:
    """'mmoe, d 16': the labels of a point, each as `value_name` has it."""
    return ", ".join(value_name(study, axis, label) for axis, label in point)


def value_name(study: Study, axis: str, label: str) -> str:
    """'usr', or with its axis ('d 16', 'interest on') a label that is a number or a switch, or that two axes have."""
    is_shared = sum(label in other.values for other in study.axes) > 1
    return f"{axis} {label}" if is_shared or label in ("True", "False") or _is_number(label) else label


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


TOTALS = (GLOBAL, ALL)
