"""Is one model better than another: the AUC gap over seeds, its interval over seeds and users, Holm's correction.

Two things could have come out otherwise: the seeds (another start, another order of the rows) and the users (other
customers on those days). Both are in every interval; rows are never taken for independent, since a user has many.

Shape letters: N rows, R seeds, U users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from usr_ray.evaluation.metrics import auc

CONFIDENCE = 0.95


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
    num_users: int
    num_rarer: int
    """Rows of the rarer label."""


def paired_auc_gap(labels_N: NDArray, ours_RN: NDArray, theirs_RN: NDArray, users_N: NDArray) -> PairedGap | None:
    """The gap and its interval; None when a label is missing.

    variance = s^2 / R + v. s^2: sample variance of the R gaps, which share the users and differ by their seed. v:
    variance by the sample of users, of the mean gap, from DeLong's placements summed by user (Obuchowski, Biometrics
    1997: AUC of clustered data). Degrees of freedom after Welch and Satterthwaite: two seeds give a wide interval.

    Args:
        labels_N: 0 or 1.
        ours_RN: probabilities of one model, one row a seed.
        theirs_RN: of the other, in the same order of seeds.
        users_N: equal for rows of one user.
    """
    if len(labels_N) == 0 or labels_N.min() == labels_N.max():
        return None
    areas_MR = [[auc(labels_N, probs_N) or 0.0 for probs_N in model_RN] for model_RN in (ours_RN, theirs_RN)]
    gaps_R = np.array(areas_MR[0]) - np.array(areas_MR[1])
    rows_N = np.mean(
        [_influence(labels_N, a) - _influence(labels_N, b) for a, b in zip(ours_RN, theirs_RN, strict=True)], axis=0
    )
    _, user_N = np.unique(users_N, return_inverse=True)
    by_user_U = np.bincount(user_N, weights=rows_N)
    num_users, num_seeds = len(by_user_U), len(gaps_R)
    of_users = float((by_user_U**2).sum()) * num_users / max(1, num_users - 1)
    sd = float(gaps_R.std(ddof=1)) if num_seeds > 1 else 0.0
    of_seeds = sd**2 / num_seeds
    value, variance = float(gaps_R.mean()), of_users + of_seeds
    parts = of_users**2 / max(1, num_users - 1) + of_seeds**2 / max(1, num_seeds - 1)
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


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction (1979), in the order given: each holds in the company of all."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
