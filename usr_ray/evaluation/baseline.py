"""The popularity baseline: a counter per user and per item, without a model.

A ranking model that does not beat it has learnt nothing from queries, histories and scenarios, so every evaluation
shows the two side by side, with an interval of the gap.

Shape letters: N rows, T tasks (schema.TASKS).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from usr_ray.evaluation.metrics import Predictions
from usr_ray.schema import TASKS

SMOOTHING = 20.0
"""Impressions at the mean rate that every user and item starts with."""


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Training rows of the baseline, one entry per row; keys and ids as in Predictions."""

    scenario_N: NDArray[np.int64]
    user_key_N: NDArray[np.int64]
    item_id_N: NDArray[np.int64]
    labels_NT: NDArray[np.float32]
    """(N, 4), 0, 1, or NaN where the logs do not record it, in the order of schema.ALL_LABELS."""


def popularity_baseline(train: TrainingRows, rows: Predictions, num_scenarios: int) -> Predictions:
    """`rows` with the baseline's probabilities in place of the model's.

    Per scenario k and task: logit p = logit rate(user) + logit rate(item) - logit rate, that is, naive Bayes on two
    counters over the training rows of k; a user or item without training rows has the mean rate. Items without an id
    of their own share one counter (UNKNOWN_ID). The global probabilities use every training row and the global labels.
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


def _popularity(labels: NDArray, users: tuple[NDArray, NDArray], items: tuple[NDArray, NDArray]) -> NDArray[np.float64]:
    """Probabilities of the rows to score; `users` and `items` are (keys of the training rows, keys of those rows)."""
    known = ~np.isnan(labels)
    labels, users, items = labels[known], (users[0][known], users[1]), (items[0][known], items[1])
    # Half a positive and half a negative row keep the rate inside (0, 1) for labels of one class.
    rate = (float(labels.sum()) + 0.5) / (len(labels) + 1)
    logits = logit(_smoothed_rates(labels, *users, rate)) + logit(_smoothed_rates(labels, *items, rate)) - logit(rate)
    return expit(logits)


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
