"""The statistics of all reports: AUC gaps with intervals and verdicts, Holm, Wilson, calibration bins, ROC, slices,
scorers of the same rows beside one another.

Two things could have come out otherwise: the seeds (another start, another order of the rows) and the users (other
customers on those days). Both are in every interval; rows are never taken for independent, since a user has many.

Shape letters: N rows, R seeds, U users.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from usr_ray.evaluation.files import aligned
from usr_ray.evaluation.metrics import ALL, GLOBAL, CellMetrics, Predictions, auc
from usr_ray.schema import TASKS, UNKNOWN_ID

CONFIDENCE = 0.95
CALIBRATED = (0.8, 1.25)
"""PCOC of probabilities that may be read as rates: the bounds of the alert ModelMiscalibrated."""
MIN_EVENTS = 10
"""Wilson's interval begins too high at one or two positives, where a tenth of calibrated models would be warned of."""
MIN_ROWS = 30
"""Rows of the rarer label below which no verdict is given."""
MIN_USERS = 10
"""Users of a label (`effective_users`) below which no verdict is given."""
HISTORY_BUCKETS = ((0, 0), (1, 5), (6, 20), (21, None))
"""Numbers of past events (first, last) that the slices put together; None: no upper end."""


@dataclass(frozen=True, slots=True)
class PairedGap:
    """AUC of one model minus AUC of another on the same rows, mean over pairs of equal seed."""

    value: float
    low: float
    high: float
    """95 % interval."""
    p_value: float
    """Two-sided, of no gap at all."""
    by_seed: tuple[float, ...]
    seed_sd: float
    """Standard deviation of `by_seed`; 0 for one seed, whose interval knows the users only."""
    user_se: float
    """Standard error that the sample of users brings."""
    num_users: float
    """`effective_users`."""
    num_rarer: int
    """Rows of the rarer label."""

    @property
    def can_tell(self) -> bool:
        """Whether there are rows enough of the rarer label, and users enough of each, for a verdict."""
        return self.num_rarer >= MIN_ROWS and self.num_users >= MIN_USERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A gap among the others of its report."""

    gap: PairedGap | None
    """None where it is undefined, or where there is no seed that both sides finished."""
    adjusted_p: float = 1.0
    """Holm's, over the family that `corrected` was given."""

    @property
    def verdict(self) -> str:
        """'better' or 'worse' (after correction), 'unsure' (the interval alone leaves out 0), 'even', 'few', 'none'."""
        if self.gap is None:
            return "none"
        if not self.gap.can_tell:
            return "few"
        if self.adjusted_p < 1 - CONFIDENCE:
            return "better" if self.gap.value > 0 else "worse"
        return "unsure" if self.gap.low > 0 or self.gap.high < 0 else "even"


AnyJudged = TypeVar("AnyJudged", bound=Judged)


def corrected(family: Sequence[AnyJudged]) -> list[AnyJudged]:
    """The same with Holm's p-values; gaps that are undefined, or that cannot tell (`can_tell`), are no tests.

    Equal gaps are one test: where there is one scenario alone, all rows together are its rows.
    """
    tests = list(dict.fromkeys(one.gap for one in family if one.gap and one.gap.can_tell))
    adjusted = dict(zip(tests, holm([gap.p_value for gap in tests]), strict=True))
    found = [adjusted.get(one.gap) if one.gap else None for one in family]
    return [replace(one, adjusted_p=1.0 if p is None else p) for one, p in zip(family, found, strict=True)]


def auc_gaps(rows: Predictions, baseline: Predictions, scenarios: Sequence[str]) -> dict[tuple[str, str], Judged]:
    """(cell of metrics.json, task) -> gap between two scorers of the same rows, judged as one family."""
    places = [(cell, place) for cell in (*scenarios, GLOBAL, ALL) for place in range(len(TASKS))]
    family = []
    for cell, place in places:
        ours, theirs = (cell_rows(scored, cell, place, scenarios) for scored in (rows, baseline))
        is_defined = ours is not None and theirs is not None
        gap = paired_auc_gap(ours[0], ours[1][None], theirs[1][None], ours[2]) if is_defined else None  # type: ignore[index]
        family.append(Judged(gap=gap))
    names = [(cell, TASKS[place]) for cell, place in places]
    return dict(zip(names, corrected(family), strict=True))


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


def paired_auc_gap(labels_N: NDArray, ours_RN: NDArray, theirs_RN: NDArray, users_N: NDArray) -> PairedGap | None:
    """The gap and its interval; None when a label is missing, or all its rows are of one user, who does not say how
    far others would be.

    variance = s^2 / R + v. s^2: sample variance of the R gaps, which share the users and differ by their seed. v:
    variance by the sample of users, of the mean gap, from DeLong's placements summed by user (Obuchowski, Biometrics
    1997: AUC of clustered data), times n / (n - 1), n being `effective_users`: the placements of a label sum to 0, so
    a user who has most of its rows is compared with little but himself. Degrees of freedom after Welch and
    Satterthwaite, R - 1 and n - 1: two seeds, or orders of two users, give a wide interval.

    Args:
        labels_N: 0 or 1.
        ours_RN: probabilities of one model, one row a seed.
        theirs_RN: those of the other, in the same order of seeds.
        users_N: equal for rows of one user.
    """
    num_users = effective_users(labels_N, users_N)
    if num_users <= 1:
        return None
    _, user_N = np.unique(users_N, return_inverse=True)
    areas_MR = [[auc(labels_N, probs_N) or 0.0 for probs_N in model_RN] for model_RN in (ours_RN, theirs_RN)]
    gaps_R = np.array(areas_MR[0]) - np.array(areas_MR[1])
    rows_N = np.mean(
        [_influence(labels_N, a) - _influence(labels_N, b) for a, b in zip(ours_RN, theirs_RN, strict=True)], axis=0
    )
    by_user_U = np.bincount(user_N, weights=rows_N)
    num_seeds = len(gaps_R)
    of_users = float((by_user_U**2).sum()) * num_users / (num_users - 1)
    sd = float(gaps_R.std(ddof=1)) if num_seeds > 1 else 0.0
    of_seeds = sd**2 / num_seeds
    value, variance = float(gaps_R.mean()), of_users + of_seeds
    parts = of_users**2 / (num_users - 1) + of_seeds**2 / max(1, num_seeds - 1)
    freedom = variance**2 / parts if parts > 0 else math.inf
    half = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    p_value = float(2 * student.sf(abs(value) / math.sqrt(variance), freedom)) if variance > 0 else float(value == 0)
    num_positives = int(np.count_nonzero(labels_N))
    return PairedGap(
        value=value,
        low=value - half,
        high=value + half,
        p_value=p_value,
        by_seed=tuple(float(g) for g in gaps_R),
        seed_sd=sd,
        user_se=math.sqrt(of_users),
        num_users=num_users,
        num_rarer=min(num_positives, len(labels_N) - num_positives),
    )


def effective_users(labels_N: NDArray, users_N: NDArray) -> float:
    """How many users of equal weight a label's rows amount to, (sum of m)^2 / sum of m^2 over its users' numbers of
    rows m (Kish, Survey Sampling, 1965); of the label with fewer. 0 where a label is missing.

    40 orders of 40 users are 40, of four users with ten each 4, of ten users of whom one has 31 only 1.6.
    """
    rows_LU = [np.unique(users_N[is_label_N], return_counts=True)[1] for is_label_N in (labels_N > 0, labels_N <= 0)]
    return min(float(m_U.sum()) ** 2 / float((m_U**2).sum()) if len(m_U) else 0.0 for m_U in rows_LU)


def _influence(labels_N: NDArray, probs_N: NDArray) -> NDArray[np.float64]:
    """What each row moves the AUC by: (its placement among the other label's rows - AUC) / rows of its label."""
    is_positive_N = labels_N > 0
    positives, negatives = np.sort(probs_N[is_positive_N]), np.sort(probs_N[~is_positive_N])
    moved_N = np.empty(len(labels_N))
    below = np.searchsorted(negatives, probs_N[is_positive_N], "left")
    up_to = np.searchsorted(negatives, probs_N[is_positive_N], "right")
    placed = (below + up_to) / (2 * len(negatives))
    area = placed.mean()
    moved_N[is_positive_N] = (placed - area) / len(positives)
    below = np.searchsorted(positives, probs_N[~is_positive_N], "left")
    up_to = np.searchsorted(positives, probs_N[~is_positive_N], "right")
    moved_N[~is_positive_N] = (1 - (below + up_to) / (2 * len(positives)) - area) / len(negatives)
    return moved_N


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values after Holm's step-down correction (1979) over those there are, in the order given: each holds in the
    company of all.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[place] = largest
    return adjusted


def normal_quantile(confidence: float) -> float:
    """Half the width, in standard errors, of a two-sided normal interval."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def normal_p_value(z: float) -> float:
    """Two-sided p-value of a standard normal deviate."""
    return 2 * NormalDist().cdf(-abs(z))


def wilson_interval(num_positives: int, num_rows: int, quantile: float) -> tuple[float, float]:
    """Wilson score interval of a rate, `quantile` standard errors of independent rows to each side; sound for few rows
    and for rates near 0.
    """
    rate, spread = num_positives / num_rows, quantile**2 / num_rows
    centre, half = rate + spread / 2, math.sqrt(spread * (rate * (1 - rate) + spread / 4))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def pcoc_interval(labels_N: NDArray, probs_N: NDArray, users_N: NDArray) -> tuple[float, float] | None:
    """95 % interval of PCOC, sum of probabilities / sum of labels, over users; None where one user has all positives.

    A user's rows are as good as they are because of that user, so clicks of 300 users with 60 rows each vary by more
    than a Poisson count. Variance by linearisation, as of any ratio of sums; n and degrees as in `paired_auc_gap`.
    """
    num_users = effective_users(labels_N, users_N)
    if num_users <= 1:
        return None
    value, num_positives = float(probs_N.sum() / labels_N.sum()), float(labels_N.sum())
    _, user_N = np.unique(users_N, return_inverse=True)
    errors_U = np.bincount(user_N, weights=probs_N - value * labels_N)
    variance = float((errors_U**2).sum()) * num_users / (num_users - 1)
    half = float(student.ppf((1 + CONFIDENCE) / 2, num_users - 1)) * math.sqrt(variance) / num_positives
    return value - half, value + half


def far_off(cells: CellMetrics) -> list[str]:
    """A line for each cell and task whose probabilities are no rates: PCOC outside CALIBRATED, whatever the number of
    positives may be by chance where rows are independent. Nothing of fewer than MIN_EVENTS, seen or predicted. The
    pooled cell says nothing that its scenarios do not.
    """
    lines = []
    for cell, task, m in ((c, t, m) for c, tasks in cells.items() if c != ALL for t, m in tasks.items()):
        if m["pcoc"] is None:
            continue
        seen, rows = int(m["num_positives"] or 0), int(m["num_samples"] or 0)
        predicted, (low, high) = m["pcoc"] * seen, wilson_interval(seen, rows, normal_quantile(CONFIDENCE))
        if max(predicted, seen) < MIN_EVENTS:
            continue
        if predicted / (rows * high) > CALIBRATED[1] or predicted / (rows * low) < CALIBRATED[0]:
            lines.append(
                f"{cell} {task}: the probabilities add up to {predicted:,.0f}, seen were {seen:,}; they may "
                "rank well but are no rates; train for more steps, or see whether the dates differ"
            )
    return lines


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
    """95 % interval of the rate, which takes the rows of a user together (`_rate_interval`)."""


def calibration_bins(labels: NDArray, probs: NDArray, users: NDArray, num_bins: int = 10) -> list[Bin]:
    """Up to `num_bins` bins of nearly equal size; equal probabilities are never parted, so ties make fewer bins."""
    if len(labels) == 0:
        return []
    edges = np.unique(np.quantile(probs, np.linspace(0, 1, num_bins + 1)[1:-1], method="lower"))
    bins = []
    place_N = np.searchsorted(edges, probs, side="left")
    for place in np.unique(place_N):
        inside = place_N == place
        num_rows, num_positives = int(inside.sum()), int(labels[inside].sum())
        low, high = _rate_interval(labels[inside], users[inside])
        bins.append(Bin(num_rows, num_positives, float(probs[inside].mean()), num_positives / num_rows, low, high))
    return bins


def _rate_interval(labels_N: NDArray, users_N: NDArray) -> tuple[float, float]:
    """Wilson's interval, widened by the design effect (Kish, Survey Sampling, 1965): how many times as much the rate
    varies as that of as many independent rows, at least once. One user does not tell: 0 to 1.
    """
    _, user_N, sizes_U = np.unique(users_N, return_inverse=True, return_counts=True)
    num_rows, rate = len(labels_N), float(labels_N.mean())
    num_users = num_rows**2 / float((sizes_U**2).sum())
    if num_users <= 1:
        return 0.0, 1.0
    of_users = float((np.bincount(user_N, weights=labels_N - rate) ** 2).sum()) * num_users / (num_users - 1)
    of_rows = num_rows * rate * (1 - rate)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, num_users - 1))
    quantile *= math.sqrt(max(1.0, of_users / of_rows)) if of_rows else 1.0
    return wilson_interval(int(labels_N.sum()), num_rows, quantile)


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


@dataclass(frozen=True, slots=True)
class Slice:
    """AUC of CTR on a part of the rows; None where it is undefined."""

    group: str
    name: str
    num_rows: int
    num_positives: int
    auc: float | None
    baseline_auc: float | None


def ctr_slices(rows: Predictions, baseline: Predictions | None, scenario: int) -> list[Slice]:
    """AUC of CTR in one scenario by length of the history and by known or cold item; no entry without rows."""
    is_cold = rows.item_id_N <= UNKNOWN_ID
    parts = [("past events of the user", name, inside) for name, inside in history_parts(rows.history_length_N)]
    parts += [("item", "shown often enough", ~is_cold), ("item", "cold: no id, or for its vector alone", is_cold)]
    slices = []
    for group, name, part in parts:
        inside = part & (rows.scenario_N == scenario)
        if not inside.any():
            continue
        labels = rows.labels_NT[inside, 0]
        of_model, of_baseline = (s and auc(labels, s.probs_NT[inside, 0]) for s in (rows, baseline))
        slices.append(Slice(group, name, len(labels), int(labels.sum()), of_model, of_baseline))  # type: ignore[arg-type]
    return slices


def history_parts(history_length_N: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """(name, rows) of each of HISTORY_BUCKETS."""
    for first, last in HISTORY_BUCKETS:
        name = str(first) if first == last else f"{first}-{last}" if last is not None else f"{first} or more"
        yield name, (history_length_N >= first) & (history_length_N <= (np.inf if last is None else last))


def on_common_rows(scored: Mapping[str, Predictions]) -> dict[str, Predictions]:
    """The rows that every scorer has, in the order of the manifest: runs may know a scenario alone, or immature rows.

    Args:
        scored: name -> rows of one manifest, sorted by row_number.
    """
    common_M = functools.reduce(np.intersect1d, [rows.row_number_N for rows in scored.values()])
    return {name: rows.take(np.searchsorted(rows.row_number_N, common_M)) for name, rows in scored.items()}


def compare(scored: Mapping[str, Predictions], ours: str, scenarios: Sequence[str]) -> dict[str, Any]:
    """A comparison as an evaluation's file holds it.

    Args:
        scored: name -> the same rows in one order; `ours` among them.
        ours: whose lead over each of the others is judged.
        scenarios: in the order of the table.

    Returns:
        {"ours": name, "cells": [{"cell", "task", "auc": {name: AUC or null}, "leads": {other: {"value", "low", "high",
        "verdict"}}}]}, a lead with a paired 95 % interval over users; verdicts after Holm over all leads. A cell
        without both labels, each of two users or more, has no leads.
    """
    cells: list[dict[str, Any]] = []
    family = []
    for cell in (*scenarios, ALL):
        for place, task in enumerate(TASKS):
            parts = {name: cell_rows(rows, cell, place, scenarios) for name, rows in scored.items()}
            known = {name: part for name, part in parts.items() if part is not None}
            areas = {name: auc(labels, probs) for name, (labels, probs, _) in known.items()}
            cells.append({"cell": cell, "task": task, "auc": areas, "leads": {}})
            labels, probs, users = known[ours]
            for other in [name for name in known if name != ours]:
                gap = paired_auc_gap(labels, probs[None], known[other][1][None], users)
                family.append((cells[-1]["leads"], other, Judged(gap=gap)))
    for (leads, other, _), judged in zip(family, corrected([one for _, _, one in family]), strict=True):
        if judged.gap is not None:
            ends = {"value": judged.gap.value, "low": judged.gap.low, "high": judged.gap.high}
            leads[other] = ends | {"verdict": judged.verdict}
    return {"ours": ours, "cells": cells}


def comparison_text(found: Mapping[str, Any]) -> str:
    """Text for the terminal: a line for each cell, task and scorer, with the lead of ours over it."""
    ours = found["ours"]
    lines = [("scenario", "task", "scorer", "AUC", f"{ours} is ahead by", "95% interval", "verdict")]
    for entry in found["cells"]:
        for name, area in entry["auc"].items():
            lead = entry["leads"].get(name)
            texts = ("", "", "")
            if lead:
                texts = (f"{lead['value']:+.4f}", f"{lead['low']:+.4f} to {lead['high']:+.4f}", lead["verdict"])
            lines.append((entry["cell"], entry["task"], name, "-" if area is None else f"{area:.4f}", *texts))
    return "\n".join(aligned(lines))
