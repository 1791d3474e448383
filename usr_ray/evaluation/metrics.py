"""Exact metrics of probabilities against 0/1 labels (method, section 6). numpy only; no averages of averages.

Every function looks at all rows at once, so a value depends on the rows alone, never on batches, workers or the
order of the rows. What is undefined (one class missing, no rows) is None, null in JSON; NaN never leaves this module.

Shape letters: N rows, T tasks (schema.TASKS), G groups (users or requests).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from usr_ray.schema import TASKS

NDCG_K = 10
"""Cut-off of the NDCG in metrics.json; its key is f"ndcg_at_{NDCG_K}"."""
GLOBAL, ALL = "global", "all"
"""Cells of metrics.json beside the scenarios: global labels with global heads; all rows on their scenario labels."""

TaskMetrics = dict[str, float | int | None]
"""Metrics of one cell and task: the keys of `compute_metrics`."""
CellMetrics = dict[str, dict[str, TaskMetrics]]
"""{"<scenario>|global|all": {"ctr"|"ctcvr": TaskMetrics}}: one split of metrics.json."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Rows with weight, one entry per row: what was known of them and a model's probabilities."""

    row_number_N: NDArray[np.int64]
    """Position of the row in the manifest; unique."""
    scenario_N: NDArray[np.int64]
    """Position in FeatureSpec.scenarios."""
    labels_NT: NDArray[np.float32]
    """(N, 4), 0, 1, or NaN where the logs do not record it (labels.no_order_scenarios), in the order of ALL_LABELS."""
    probs_NT: NDArray[np.float64]
    """(N, 2) CTR and CTCVR in the row's own scenario, in [0, 1]."""
    global_probs_NT: NDArray[np.float64] | None
    """(N, 2) global CTR and CTCVR; None when the model has no global heads."""
    user_key_N: NDArray[np.int64]
    request_key_N: NDArray[np.int64]
    item_id_N: NDArray[np.int64]
    """Encoded item id; schema.UNKNOWN_ID for a cold item: without an id, or with one for its vector alone."""
    history_length_N: NDArray[np.int64]
    """Events in all of the row's histories."""

    def __len__(self) -> int:
        return len(self.row_number_N)

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Predictions:
        """Some of the rows: those of a mask, or of places, in their order."""
        columns = {key.name: getattr(self, key.name) for key in fields(self)}
        taken: dict[str, Any] = {name: None if of is None else of[chosen] for name, of in columns.items()}
        return Predictions(**taken)


def known_labels_only(
    labels_NT: NDArray[np.float32], scenario_N: NDArray[np.int64], known_labels: Sequence[Sequence[bool]]
) -> NDArray[np.float32]:
    """The labels with NaN for those that the row's scenario does not record: an unobserved 0 is no label.

    Args:
        labels_NT: (N, 4), in the order of schema.ALL_LABELS.
        scenario_N: position in FeatureSpec.scenarios.
        known_labels: FeatureSpec.known_labels, (S, T): of a task's own label and of its global one.
    """
    is_unknown_ST = ~np.array(known_labels)
    return np.where(np.concatenate([is_unknown_ST, is_unknown_ST], axis=1)[scenario_N], np.float32(np.nan), labels_NT)


def auc(labels: NDArray, probs: NDArray) -> float | None:
    """P(score of a positive > score of a negative), ties counting one half; None when a class is missing.

    Rank sums are kept as doubled whole numbers, so the only rounding is the last division.
    """
    num_rows = len(labels)
    num_positives = int(np.count_nonzero(labels))
    if num_positives in (0, num_rows):
        return None
    order = np.argsort(probs)
    doubled_ranks = _doubled_ranks(_starts(probs[order]), num_rows)
    doubled_sum = int(doubled_ranks[labels[order] > 0].sum())
    wins_doubled = doubled_sum - num_positives * (num_positives + 1)
    return wins_doubled / (2 * num_positives * (num_rows - num_positives))


def gauc(labels: NDArray, probs: NDArray, user_keys: NDArray) -> float | None:
    """AUC inside each user, averaged over users with both labels, weighted by impressions (the user's rows given here).

    A user with one label only has no AUC: neither it nor its impressions take part. None when no user has both labels.
    """
    if len(labels) == 0:
        return None
    order = np.lexsort((probs, user_keys))
    labels_N, probs_N, users_N = labels[order] > 0, probs[order], user_keys[order]
    user_starts = _starts(users_N)
    sizes_G = _sizes(user_starts, len(labels))
    positives_G = np.add.reduceat(labels_N.astype(np.int64), user_starts)
    both_G = (positives_G > 0) & (positives_G < sizes_G)
    if not both_G.any():
        return None
    # Ranks run through all rows; a user's own ranks start at the row the user starts at.
    doubled_ranks_N = _doubled_ranks(_starts(users_N, probs_N), len(labels)) - 2 * np.repeat(user_starts, sizes_G)
    doubled_sum_G = np.add.reduceat(np.where(labels_N, doubled_ranks_N, 0), user_starts)
    wins_doubled_G = (doubled_sum_G - positives_G * (positives_G + 1))[both_G]
    pairs_G = (positives_G * (sizes_G - positives_G))[both_G]
    weights_G = sizes_G[both_G]
    return float((wins_doubled_G / (2 * pairs_G) * weights_G).sum() / weights_G.sum())


def log_loss(labels: NDArray, probs: NDArray) -> float | None:
    """Mean of -log P(label) in nats; None without rows. Probabilities are kept one float64 step away from 0 and 1."""
    if len(labels) == 0:
        return None
    step = np.finfo(np.float64).eps
    probs_N = np.clip(probs.astype(np.float64), step, 1 - step)
    return float(-np.where(labels > 0, np.log(probs_N), np.log1p(-probs_N)).mean())


def pcoc(labels: NDArray, probs: NDArray) -> float | None:
    """Predicted over observed: sum of probabilities / sum of labels; 1 is calibrated, None without positives."""
    num_positives = int(np.count_nonzero(labels))
    return float(probs.astype(np.float64).sum() / num_positives) if num_positives else None


def normalised_entropy(labels: NDArray, probs: NDArray) -> float | None:
    """Log loss over the log loss of always saying the mean label (He et al., ADKDD 2014); None for one class."""
    num_rows, num_positives = len(labels), int(np.count_nonzero(labels))
    loss = log_loss(labels, probs)
    if loss is None or num_positives in (0, num_rows):
        return None
    rate = num_positives / num_rows
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def ndcg_at_k(labels: NDArray, probs: NDArray, request_keys: NDArray, k: int = NDCG_K) -> float | None:
    """Mean over requests with both labels of DCG@k / best DCG@k, gain = label, discount 1 / log2(place + 1).

    A request without a negative has 1 in any order: a row whose log knows no request is one of its own. Rows of equal
    probability share the mean discount of the places they take (McSherry and Najork, ECIR 2008), so the value does not
    depend on the order of ties. None when no request has both labels.
    """
    if len(labels) == 0:
        return None
    order = np.lexsort((-probs, request_keys))
    labels_N, probs_N, requests_N = labels[order].astype(np.float64), probs[order], request_keys[order]
    request_starts = _starts(requests_N)
    sizes_G = _sizes(request_starts, len(labels))
    places_N = np.arange(len(labels)) - np.repeat(request_starts, sizes_G)
    discounts_N = np.where(places_N < k, 1 / np.log2(places_N + 2.0), 0.0)
    tie_starts = _starts(requests_N, probs_N)
    tie_sizes = _sizes(tie_starts, len(labels))
    shared_N = np.repeat(np.add.reduceat(discounts_N, tie_starts) / tie_sizes, tie_sizes)
    dcg_G = np.add.reduceat(labels_N * shared_N, request_starts)
    positives_G = np.add.reduceat(labels_N, request_starts).astype(np.int64)
    best_dcg = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(k) + 2.0))))
    both_G = (positives_G > 0) & (positives_G < sizes_G)
    return float((dcg_G[both_G] / best_dcg[np.minimum(positives_G[both_G], k)]).mean()) if both_G.any() else None


def compute_metrics(labels_N: NDArray, probs_N: NDArray, user_keys_N: NDArray, request_keys_N: NDArray) -> TaskMetrics:
    """All metrics of one task on one set of rows.

    Args:
        labels_N: 0 or 1, as the decoder has checked.
        probs_N: in [0, 1], as the evaluation has checked.
        user_keys_N: integers, equal for rows of one user.
        request_keys_N: integers, equal for rows of one request.

    Returns:
        auc, gauc, log_loss, pcoc, normalised_entropy, ndcg_at_10 (float, None when undefined), num_samples and
        num_positives (int).
    """
    return {
        "auc": auc(labels_N, probs_N),
        "gauc": gauc(labels_N, probs_N, user_keys_N),
        "log_loss": log_loss(labels_N, probs_N),
        "pcoc": pcoc(labels_N, probs_N),
        "normalised_entropy": normalised_entropy(labels_N, probs_N),
        f"ndcg_at_{NDCG_K}": ndcg_at_k(labels_N, probs_N, request_keys_N),
        "num_samples": len(labels_N),
        "num_positives": int(np.count_nonzero(labels_N)),
    }


def metrics_by_scenario(predictions: Predictions, scenarios: Sequence[str]) -> CellMetrics:
    """One split of metrics.json.

    A scenario's cell: its rows, its labels, the row's own probabilities. "all": every row, the same labels and
    probabilities, pooled. "global": every row, the global labels with the global heads; metrics are None and the counts
    stay when the model has no global heads. Rows whose label is not known take no part; `num_unknown` counts them.
    """
    # A scenario ranks a list of its own, also where another's log has a request of the same id. The keys are hashes:
    # the product may wrap around.
    requests_N = predictions.request_key_N * len(scenarios) + predictions.scenario_N
    predictions = replace(predictions, request_key_N=requests_N)
    cells: CellMetrics = {}
    for index, scenario in enumerate(scenarios):
        rows = predictions.scenario_N == index
        cells[scenario] = _cell(predictions, predictions.probs_NT[rows], label_offset=0, rows=rows)
    every_row = np.ones(len(predictions), dtype=bool)
    cells[GLOBAL] = _cell(predictions, predictions.global_probs_NT, label_offset=len(TASKS), rows=every_row)
    cells[ALL] = _cell(predictions, predictions.probs_NT, label_offset=0, rows=every_row)
    return cells


def _cell(
    predictions: Predictions, probs_NT: NDArray | None, *, label_offset: int, rows: NDArray[np.bool_]
) -> dict[str, TaskMetrics]:
    cell: dict[str, TaskMetrics] = {}
    for task, name in enumerate(TASKS):
        labels = predictions.labels_NT[rows, label_offset + task]
        known = ~np.isnan(labels)
        # A model without global heads has no probabilities; the labels are still counted.
        probs = np.zeros(len(labels)) if probs_NT is None else probs_NT[:, task]
        users, requests = predictions.user_key_N[rows], predictions.request_key_N[rows]
        metrics = compute_metrics(labels[known], probs[known], users[known], requests[known])
        metrics["num_unknown"] = int(np.count_nonzero(~known))
        if probs_NT is None:
            metrics = {key: value if key.startswith("num_") else None for key, value in metrics.items()}
        cell[name] = metrics
    return cell


def _starts(*sorted_columns: NDArray) -> NDArray[np.int64]:
    """First row of every run of equal values (of equal tuples, for several columns)."""
    is_start = np.zeros(len(sorted_columns[0]), dtype=bool)
    is_start[:1] = True
    for column in sorted_columns:
        is_start[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(is_start)


def _sizes(starts: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    return np.diff(np.append(starts, num_rows))


def _doubled_ranks(tie_starts: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """Twice the rank (from 1) of every sorted row, rows of a tie sharing the mean of their ranks."""
    sizes = _sizes(tie_starts, num_rows)
    return np.repeat(2 * tie_starts + sizes + 1, sizes)
