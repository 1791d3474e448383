"""The popularity baseline: what a counter per user and per item already knows. No model.

A ranking model that does not beat it has learnt nothing from queries, histories and scenarios, so every evaluation
shows the two side by side, with an interval of the gap.

Shape letters: N rows, T tasks (schema.TASKS), G tie groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.manifest import Manifest, labels_close_us, usable_row_groups
from usr_ray.evaluation.metrics import Predictions, known_labels_only
from usr_ray.schema import ALL_LABELS, TASKS

SMOOTHING = 20.0
"""Impressions at the mean rate that every user and item starts with."""


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Training rows of the baseline, one entry a row; keys and ids as in Predictions."""

    scenario_N: NDArray[np.int64]
    user_key_N: NDArray[np.int64]
    item_id_N: NDArray[np.int64]
    labels_NT: NDArray[np.float32]
    """(N, 4), 0, 1, or NaN where the logs do not know, in the order of schema.ALL_LABELS."""


def read_training_rows(manifest: Manifest, *, ready_before_us: int | None, mature_only: bool) -> TrainingRows:
    """The rows of a manifest that training would count, by the same rules (see SampleReader), four columns of them.

    Raises:
        DataError: no row counts, or a file cannot be read.
    """
    decoder = RowGroupDecoder(manifest, ready_before_us=ready_before_us, mature_only=mature_only)
    item_column = manifest.spec.sparse_feature("item_id").column
    decoder.columns = [*ALL_LABELS, "scenario_index", "user_key", item_column, "is_mature", "event_time"]
    parts = []
    for ref in usable_row_groups(manifest, ready_before_us=ready_before_us, mature_only=mature_only):
        table = decoder.read(ref)
        counts_N = np.ones(table.num_rows, dtype=bool)
        if mature_only:
            counts_N &= table["is_mature"].to_numpy()
        if ready_before_us is not None:
            time_us_N = table["event_time"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
            counts_N &= labels_close_us(time_us_N, manifest.spec) <= ready_before_us
        parts.append(table.drop_columns(["is_mature", "event_time"]).filter(pa.array(counts_N)))
    rows = pa.concat_tables(parts)
    scenario_N = rows["scenario_index"].to_numpy()
    labels_NT = np.stack([rows[label].to_numpy() for label in ALL_LABELS], axis=1)
    return TrainingRows(
        scenario_N=scenario_N,
        user_key_N=rows["user_key"].to_numpy(),
        item_id_N=rows[item_column].to_numpy(),
        labels_NT=known_labels_only(labels_NT, scenario_N, manifest.spec.known_labels),
    )


def popularity_baseline(train: TrainingRows, rows: Predictions, num_scenarios: int) -> Predictions:
    """`rows` with the baseline's probabilities in place of the model's.

    Per scenario k and task: logit p = logit rate(user) + logit rate(item) - logit rate, that is, naive Bayes on two
    counters over the training rows of k; a user or item without training rows has the mean rate. The global
    probabilities use every training row and the global labels.
    """
    num_tasks = len(TASKS)
    probs_NT = np.full((len(rows), num_tasks), 0.5)
    global_probs_NT = np.empty((len(rows), num_tasks))
    for task in range(num_tasks):
        for scenario in range(num_scenarios):
            fit, use = train.scenario_N == scenario, rows.scenario_N == scenario
            probs_NT[use, task] = _popularity(
                train.labels_NT[fit, task],
                (train.user_key_N[fit], rows.user_key_N[use]),
                (train.item_id_N[fit], rows.item_id_N[use]),
            )
        global_probs_NT[:, task] = _popularity(
            train.labels_NT[:, num_tasks + task], (train.user_key_N, rows.user_key_N), (train.item_id_N, rows.item_id_N)
        )
    return replace(rows, probs_NT=probs_NT, global_probs_NT=global_probs_NT)


def paired_auc_gap(
    labels: NDArray,
    probs: NDArray,
    baseline_probs: NDArray,
    user_keys: NDArray,
    *,
    num_resamples: int = 200,
    seed: int = 0,
) -> tuple[float, float, float] | None:
    """AUC of `probs` minus AUC of `baseline_probs` on the same rows, with a 95 % interval.

    The interval is the percentile bootstrap over users (rows of one user are not independent), the same resample for
    both models.

    Returns:
        (gap, low, high), or None when a class is missing.
    """
    if len(labels) == 0 or np.min(labels) == np.max(labels):
        return None
    generator = np.random.default_rng(seed)
    _, user_N = np.unique(user_keys, return_inverse=True)
    num_users = int(user_N.max()) + 1
    ranked = [_Ranked.of(labels, p) for p in (probs, baseline_probs)]

    def gap(counts_N: NDArray) -> float:
        return ranked[0].auc(counts_N) - ranked[1].auc(counts_N)

    gaps = []
    for _ in range(num_resamples):
        counts_U = np.bincount(generator.integers(num_users, size=num_users), minlength=num_users)
        value = gap(counts_U[user_N].astype(np.float64))
        if np.isfinite(value):  # a resample may lack a class
            gaps.append(value)
    whole = gap(np.ones(len(labels)))
    low, high = np.quantile(gaps, (0.025, 0.975)) if gaps else (whole, whole)
    return float(whole), float(low), float(high)


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Rows sorted by probability once, so that the AUC of a resample needs no sort."""

    order_N: NDArray[np.int64]
    is_positive_N: NDArray[np.bool_]
    tie_starts_G: NDArray[np.int64]

    @classmethod
    def of(cls, labels: NDArray, probs: NDArray) -> _Ranked:
        order_N = np.argsort(probs)
        sorted_N = probs[order_N]
        starts_G = np.flatnonzero(np.concatenate(([True], sorted_N[1:] != sorted_N[:-1])))
        return cls(order_N, labels[order_N] > 0, starts_G)

    def auc(self, counts_N: NDArray[np.float64]) -> float:
        """AUC when row n stands counts_N[n] times; NaN when a class is missing."""
        counts_N = counts_N[self.order_N]
        positives_G = np.add.reduceat(np.where(self.is_positive_N, counts_N, 0.0), self.tie_starts_G)
        negatives_G = np.add.reduceat(np.where(self.is_positive_N, 0.0, counts_N), self.tie_starts_G)
        below_G = np.cumsum(negatives_G) - negatives_G
        pairs = positives_G.sum() * negatives_G.sum()
        return float((positives_G * (below_G + negatives_G / 2)).sum() / pairs) if pairs else float("nan")


def _popularity(labels: NDArray, users: tuple[NDArray, NDArray], items: tuple[NDArray, NDArray]) -> NDArray[np.float64]:
    """Probabilities of the rows to score; `users` and `items` are (keys of the training rows, keys of those rows)."""
    known = ~np.isnan(labels)
    labels, users, items = labels[known], (users[0][known], users[1]), (items[0][known], items[1])
    # Half a positive and half a negative row keep the rate inside (0, 1) for labels of one class.
    rate = (float(labels.sum()) + 0.5) / (len(labels) + 1)
    logits = (
        _logit(_smoothed_rates(labels, *users, rate)) + _logit(_smoothed_rates(labels, *items, rate)) - _logit(rate)
    )
    return 1 / (1 + np.exp(-logits))


def _smoothed_rates(labels: NDArray, keys: NDArray, wanted: NDArray, rate: float) -> NDArray[np.float64]:
    if len(keys) == 0:
        return np.full(len(wanted), rate)
    known, index_N = np.unique(keys, return_inverse=True)
    rows = np.bincount(index_N, minlength=len(known))
    positives = np.bincount(index_N, weights=labels, minlength=len(known))
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    is_known = known[place] == wanted
    return (np.where(is_known, positives[place], 0.0) + SMOOTHING * rate) / (
        np.where(is_known, rows[place], 0) + SMOOTHING
    )


def _logit(p: NDArray | float) -> NDArray:
    return np.log(p) - np.log1p(-np.asarray(p))
