"""What can be told of the simulated world's labels on the held-out days: four AUCs a scenario and task.

- `truth`: ranked by the true probabilities.
- `joint`: everything is known but the needs and each pair's interest of the moment; of the needs only what the past of
  all scenarios' logs shows.
- `own`: likewise, from the past of the row's own scenario alone.
- `no_needs`: likewise, from nothing.

What the past shows is how many there were in the two days before the row and since the user's last order in its
category, and how old the newest is: queries that name the row's category, or its brand; impressions of that category,
and of that brand; clicks of that category, brand and side of the price; each in each scenario. All three estimates know
whether the row's own query names them. A logistic regression on this, with the known log odds as its offset, is fitted
on the days before the held-out ones. It tells no more than the logs do: `joint` and `own` are estimates from below,
made the same way, and `joint - own` is what the other scenarios' events add. They are measured on drawn labels, so they
have a sampling error: some .003 in a scenario of 10,000 held-out rows.

Shape letters: N impressions of all days, F features, E events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from etl.sources.simulated_world import BRANDS_PER_CATEGORY, Columns, sigmoid

CEILINGS = ("truth", "joint", "own", "no_needs")
WINDOW_S = 2 * 86_400
AGES_S = (600, 3 * 3_600, 12 * 3_600, 86_400)
"""Bounds between the ages of the newest event that the regression tells apart."""
RIDGE = 30.0


@dataclass(frozen=True, slots=True)
class Rows(Columns):
    """Impressions of one day or of all, in the order of the days, users and times."""

    user_N: np.ndarray
    category_N: np.ndarray
    brand_N: np.ndarray
    scenario_N: np.ndarray
    time_s_N: np.ndarray
    asked_N: np.ndarray
    """The category that the request's query names; -1: no query."""
    asked_brand_N: np.ndarray
    """The brand that it names; -1: none."""
    is_cheap_N: np.ndarray
    day_N: np.ndarray
    is_click_N: np.ndarray
    is_order_N: np.ndarray
    click_time_s_N: np.ndarray
    p_click_N: np.ndarray
    p_order_N: np.ndarray
    known_click_N: np.ndarray
    """Log odds of a click without needs and without the pair's interest of the moment."""
    known_order_N: np.ndarray


def ceilings(rows: Rows, num_scenarios: int, num_categories: int, first_held_out: int) -> list[dict[str, object]]:
    """The four AUCs of each scenario (by number) and task on the days from `first_held_out` on; NaN: undefined."""
    every = range(num_scenarios)
    joint_NF = seen_before(rows, every, num_categories)
    now_NF = np.stack(
        [np.ones(len(rows.asked_N)), rows.asked_N == rows.category_N, rows.asked_brand_N == rows.brand_N], axis=1
    )
    is_held_out_N = rows.day_N >= first_held_out
    found: list[dict[str, object]] = []
    for k in every:
        mine_N = rows.scenario_N == k
        fit, test = mine_N & ~is_held_out_N, mine_N & is_held_out_N
        probs = {"truth": (rows.p_click_N[test], rows.p_order_N[test])}
        for name, past in (("joint", [joint_NF]), ("own", [seen_before(rows, [k], num_categories)]), ("no_needs", [])):
            features_NF = np.concatenate([now_NF, *past], axis=1)
            click = _fitted(features_NF, rows.known_click_N, rows.is_click_N, fit)
            order = _fitted(features_NF, rows.known_order_N, rows.is_order_N, fit & rows.is_click_N)
            probs[name] = (click[test], click[test] * order[test])
        for task, labels in enumerate((rows.is_click_N[test], rows.is_order_N[test])):
            aucs = {name: area(labels, by_task[task]) for name, by_task in probs.items()}
            found.append({"scenario": k, "task": ("ctr", "ctcvr")[task], **aucs})
    return found


def seen_before(rows: Rows, scenarios: Sequence[int], num_categories: int) -> np.ndarray:
    """(N, F) what the logs of these scenarios show, before each row, of its user's interest in its category.

    Nothing before the user's last order in the category counts: the need of that time is over.
    """
    category_N = rows.user_N * num_categories + rows.category_N
    brand_N = rows.user_N * num_categories * BRANDS_PER_CATEGORY + rows.brand_N
    side_N = category_N * 2 + rows.is_cheap_N
    asked_N = rows.user_N * num_categories + rows.asked_N
    asked_brand_N = rows.user_N * num_categories * BRANDS_PER_CATEGORY + rows.asked_brand_N
    shown_s_N, click_s_N = rows.time_s_N, rows.click_time_s_N
    is_first_N = np.diff(rows.time_s_N, prepend=-1) != 0  # one row a request is enough for its query
    here_N = np.isin(rows.scenario_N, scenarios)
    # An order is known some minutes later than its click; here from the click on.
    ordered = here_N & rows.is_order_N
    num_ordered_N, since_order_s_N = recent(category_N[ordered], click_s_N[ordered], category_N, shown_s_N)
    window_s_N = np.where(num_ordered_N > 0, np.minimum(since_order_s_N, WINDOW_S), WINDOW_S)
    columns: list[np.ndarray] = [num_ordered_N > 0]
    for k in scenarios:
        here_N = rows.scenario_N == k
        asked, named = (here_N & is_first_N & (ids_N >= 0) for ids_N in (rows.asked_N, rows.asked_brand_N))
        clicked = here_N & rows.is_click_N
        kinds = [(asked_N[asked], shown_s_N[asked], category_N), (asked_brand_N[named], shown_s_N[named], brand_N)]
        kinds += [(key_N[here_N], shown_s_N[here_N], key_N) for key_N in (category_N, brand_N)]
        kinds += [(key_N[clicked], click_s_N[clicked], key_N) for key_N in (category_N, brand_N, side_N)]
        for key_E, time_s_E, key_N in kinds:
            count_N, age_s_N = recent(key_E, time_s_E, key_N, shown_s_N, window_s_N)
            bucket_N = np.where(count_N > 0, 1 + np.searchsorted(AGES_S, age_s_N), 0)
            columns += [np.log1p(count_N), *(bucket_N == b for b in range(1, len(AGES_S) + 2))]
    return np.stack(columns, axis=1).astype(np.float64)


def recent(
    key_E: np.ndarray,
    time_s_E: np.ndarray,
    key_N: np.ndarray,
    time_s_N: np.ndarray,
    window_s_N: np.ndarray | int = WINDOW_S,
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) events of a row's key less than a window before it and before its own second; seconds since the newest.

    The second is of no meaning where the first is 0.
    """
    if not len(key_E):
        return np.zeros(len(key_N), np.int64), np.zeros(len(key_N), np.int64)
    span = int(max(time_s_E.max(), time_s_N.max())) + 1
    place_E = np.sort(key_E * span + time_s_E)
    stop_N = np.searchsorted(place_E, key_N * span + time_s_N)
    start_N = np.searchsorted(place_E, key_N * span + np.maximum(time_s_N - window_s_N + 1, 0))
    newest_N = place_E[np.maximum(stop_N - 1, 0)]
    return np.maximum(stop_N - start_N, 0), key_N * span + time_s_N - newest_N


def _fitted(features_NF: np.ndarray, offset_N: np.ndarray, label_N: np.ndarray, fit_N: np.ndarray) -> np.ndarray:
    """(N,) probabilities of a logistic regression with an offset, fitted by Newton's method on the rows of `fit_N`."""
    x, offset, y = features_NF[fit_N], offset_N[fit_N], label_N[fit_N].astype(np.float64)
    weight_F = np.zeros(x.shape[1])
    for _ in range(4):
        p = sigmoid(x @ weight_F + offset)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(weight_F))
        weight_F += np.linalg.solve(hessian, x.T @ (y - p) - RIDGE * weight_F)
    return sigmoid(features_NF @ weight_F + offset_N)


def area(label_N: np.ndarray, score_N: np.ndarray) -> float:
    """AUC, ties counted half; NaN where a class is missing."""
    num_positive = int(label_N.sum())
    num_negative = len(label_N) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    wins = rankdata(score_N)[label_N].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / num_positive / num_negative)


def lines(found: Iterable[dict[str, object]]) -> list[str]:
    """The ceilings as a table for people."""
    head = f"{'held-out AUC that can be reached':<34}" + "".join(f"{name:>10}" for name in (*CEILINGS, "joint-own"))
    rows = [head]
    for row in found:
        values = [float(str(row[name])) for name in CEILINGS]
        cells = "".join(f"{value:10.4f}" for value in values)
        rows.append(f"{row['scenario']!s:<26}{row['task']!s:<8}{cells}{values[1] - values[2]:+10.4f}")
    return rows
