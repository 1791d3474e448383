"""Numbers of the report beyond the metrics: calibration bins, ROC points, slices, gaps to the baseline. numpy only.

Shape letters: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from usr_ray.evaluation import metrics
from usr_ray.evaluation.baseline import paired_auc_gap
from usr_ray.evaluation.metrics import ALL, GLOBAL, Predictions
from usr_ray.schema import TASKS, UNKNOWN_ID

HISTORY_BUCKETS = ((0, 0), (1, 5), (6, 20), (21, None))
"""Numbers of past events (first, last) that the slices put together; None: no upper end."""
MIN_ROWS = 30
"""Rows of the rarer label below which no verdict is given."""
RESAMPLED_ROWS = 100_000_000
"""Rows times resamples of one bootstrap: an interval must not take longer than the evaluation."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of neighbouring probabilities."""

    num_rows: int
    num_positives: int
    mean_prob: float
    rate: float
    """num_positives / num_rows."""
    low: float
    high: float
    """95 % Wilson interval of the rate."""


@dataclass(frozen=True, slots=True)
class Gap:
    """AUC of the model minus AUC of the popularity baseline, with its 95 % interval."""

    value: float
    low: float
    high: float
    num_rarer: int
    """Rows of the rarer label, which limit what the interval can say."""

    @property
    def verdict(self) -> str:
        """'beats', 'loses', 'even' (the interval holds 0), or 'few': a bootstrap of so few rows says nothing."""
        if self.num_rarer < MIN_ROWS:
            return "few"
        return "beats" if self.low > 0 else "loses" if self.high < 0 else "even"


@dataclass(frozen=True, slots=True)
class Slice:
    """AUC of CTR on a part of the rows; None where it is undefined."""

    group: str
    name: str
    num_rows: int
    num_positives: int
    auc: float | None
    baseline_auc: float | None


def cell_rows(
    rows: Predictions, cell: str, task: int, scenarios: Sequence[str]
) -> tuple[NDArray, NDArray, NDArray] | None:
    """(labels, probs, user keys) of one cell of metrics.json and one task, of the rows whose label is known.

    None when the model has no global heads.
    """
    probs_NT = rows.global_probs_NT if cell == GLOBAL else rows.probs_NT
    if probs_NT is None:
        return None
    labels_N = rows.labels_NT[:, task + (len(TASKS) if cell == GLOBAL else 0)]
    mask = ~np.isnan(labels_N)
    if cell not in (ALL, GLOBAL):
        mask &= rows.scenario_N == list(scenarios).index(cell)
    return labels_N[mask], probs_NT[mask, task], rows.user_key_N[mask]


def calibration_bins(labels: NDArray, probs: NDArray, num_bins: int = 10) -> list[Bin]:
    """Up to `num_bins` bins of nearly equal size; equal probabilities are never parted, so ties make fewer bins."""
    if len(labels) == 0:
        return []
    edges = np.unique(np.quantile(probs, np.linspace(0, 1, num_bins + 1)[1:-1], method="lower"))
    bins = []
    place_N = np.searchsorted(edges, probs, side="left")
    for place in np.unique(place_N):
        inside = place_N == place
        num_rows, num_positives = int(inside.sum()), int(labels[inside].sum())
        low, high = wilson_interval(num_positives, num_rows)
        bins.append(Bin(num_rows, num_positives, float(probs[inside].mean()), num_positives / num_rows, low, high))
    return bins


def wilson_interval(num_positives: int, num_rows: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of a rate; sound for few rows and for rates near 0."""
    rate, square = num_positives / num_rows, z * z / num_rows
    centre = (rate + square / 2) / (1 + square)
    half = z * np.sqrt(rate * (1 - rate) / num_rows + square / (4 * num_rows)) / (1 + square)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def roc_points(labels: NDArray, probs: NDArray, num_points: int = 160) -> tuple[NDArray, NDArray] | None:
    """(false positive rate, true positive rate), thinned to about `num_points`; None when a class is missing."""
    num_positives = int(np.count_nonzero(labels))
    if num_positives in (0, len(labels)):
        return None
    order = np.argsort(-probs, kind="stable")
    last_of_tie = np.append(probs[order][1:] != probs[order][:-1], True)
    positives = np.cumsum(labels[order] > 0)[last_of_tie]
    negatives = (np.flatnonzero(last_of_tie) + 1) - positives
    x, y = negatives / (len(labels) - num_positives), positives / num_positives
    x, y = np.concatenate(([0.0], x)), np.concatenate(([0.0], y))
    # Even steps along the curve's length keep its corners.
    length = x + y
    keep = np.unique(np.searchsorted(length, np.linspace(0, length[-1], num_points)))
    return x[keep], y[keep]


def auc_gap(rows: Predictions, baseline: Predictions, cell: str, task: int, scenarios: Sequence[str]) -> Gap | None:
    """Gap of one cell and task; None where an AUC is undefined."""
    of_model, of_baseline = (cell_rows(r, cell, task, scenarios) for r in (rows, baseline))
    if of_model is None or of_baseline is None:
        return None
    labels, probs, user_keys = of_model
    num_resamples = int(np.clip(RESAMPLED_ROWS / max(1, len(labels)), 40, 200))
    gap = paired_auc_gap(labels, probs, of_baseline[1], user_keys, num_resamples=num_resamples)
    num_positives = int(np.count_nonzero(labels))
    return None if gap is None else Gap(*gap, min(num_positives, len(labels) - num_positives))


def ctr_slices(rows: Predictions, baseline: Predictions | None, scenario: int) -> list[Slice]:
    """AUC of CTR in one scenario by length of the history and by known or cold item; no entry without rows."""
    own = rows.scenario_N == scenario
    parts: list[tuple[str, str, NDArray]] = []
    for first, last in HISTORY_BUCKETS:
        name = str(first) if first == last else f"{first}-{last}" if last is not None else f"{first} or more"
        inside = (rows.history_length_N >= first) & (rows.history_length_N <= (last if last is not None else np.inf))
        parts.append(("past events of the user", name, inside))
    is_cold = rows.item_id_N <= UNKNOWN_ID
    parts += [("item", "in the vocabulary", ~is_cold), ("item", "cold: not in the vocabulary", is_cold)]
    slices = []
    for group, name, part in parts:
        inside = part & own
        if not inside.any():
            continue
        labels = rows.labels_NT[inside, 0]
        of_baseline = None if baseline is None else metrics.auc(labels, baseline.probs_NT[inside, 0])
        of_model = metrics.auc(labels, rows.probs_NT[inside, 0])
        slices.append(Slice(group, name, len(labels), int(labels.sum()), of_model, of_baseline))
    return slices
