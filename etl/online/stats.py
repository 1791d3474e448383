"""Statistics of an experiment on counts per user: estimates, intervals, sample ratio, Holm. numpy and scipy, no Spark.

The user is the unit that was put into a bucket, so the user is the unit of every variance and of the bootstrap. Users
of equal counts are alike to all of it: a `Cell` holds each combination of counts once with its number of users, which
is exact and stays small however many users there are.

Shape letters: K combinations of counts, R resamples.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

METRICS = ("uctr", "ucvr", "ctr", "ctcvr")
PER_USER = ("uctr", "ucvr")
"""Shares of users; the others are ratios of sums."""
MIN_USERS = 10
"""Users with, and users without, the event in a bucket, below which a normal interval is not to be trusted."""
RATIO_ALARM = 0.001
"""p-value of the sample-ratio test below which the buckets are not what was planned."""
_DRAWN_AT_ONCE = 4_000_000
"""Numbers of one chunk of resamples: 32 MB."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Users of one bucket in one scenario, users of equal counts together; every user has an impression."""

    impressions_K: NDArray[np.int64]
    clicks_K: NDArray[np.int64]
    """Clicked impressions."""
    orders_K: NDArray[np.int64]
    """Ordered impressions."""
    users_K: NDArray[np.int64]
    """How many users have these counts."""

    @property
    def num_users(self) -> int:
        """Users exposed."""
        return int(self.users_K.sum())

    def sum_of(self, counts_K: NDArray[np.int64]) -> int:
        """Sum of a count over the users."""
        return int(counts_K @ self.users_K)

    def metric(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(numerator, denominator) of a metric, per user; KeyError for a name not in METRICS."""
        one = np.ones_like(self.users_K)
        return {
            "uctr": ((self.clicks_K > 0).astype(np.int64), one),
            "ucvr": ((self.orders_K > 0).astype(np.int64), one),
            "ctr": (self.clicks_K, self.impressions_K),
            "ctcvr": (self.orders_K, self.impressions_K),
        }[name]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Estimate of sum(numerator) / sum(denominator)."""

    value: float
    variance: float
    """Of the estimate, by the delta method; 0 for fewer than two users."""
    num_users: int
    num_positives: int
    """Users with a numerator above 0."""

    @property
    def is_sound(self) -> bool:
        """Enough users with and without the event for a normal interval."""
        return min(self.num_positives, self.num_users - self.num_positives) >= MIN_USERS


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and its interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Users found against users planned."""

    observed: dict[str, int]
    expected: dict[str, float]
    chi_square: float
    p_value: float

    @property
    def is_ok(self) -> bool:
        """False: the buckets differ from the plan by more than chance, so no comparison can be believed."""
        return self.p_value >= RATIO_ALARM


def ratio(cell: Cell, metric: str) -> Ratio:
    """A metric of a cell with at least one user.

    Delta method (Deng, Knoblich, Lu 2018, section 2): with R = mean(x) / mean(y) and e = x - R y per user,
    var(R) = var(e) / (n mean(y)^2), the sample variance with n - 1. Of a share of users (y = 1): p (1 - p) / (n - 1).
    """
    x_K, y_K = cell.metric(metric)
    n = cell.num_users
    total_y = cell.sum_of(y_K)
    value = cell.sum_of(x_K) / total_y
    errors_K = x_K - value * y_K
    variance = float((errors_K**2) @ cell.users_K) / max(1, n - 1) * n / total_y**2 if n > 1 else 0.0
    return Ratio(value, variance, n, int(cell.users_K[x_K > 0].sum()))


def value_interval(estimate: Ratio, metric: str, confidence: float) -> Interval:
    """Wilson's score interval of a share of users; the delta method's, cut off at 0, of a ratio of sums."""
    z, p, n = _z(confidence), estimate.value, estimate.num_users
    if metric in PER_USER:
        square = z * z / n
        centre = (p + square / 2) / (1 + square)
        half = z * np.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
        return Interval(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)))
    half = z * np.sqrt(estimate.variance)
    return Interval(p, max(0.0, float(p - half)), float(p + half))


def difference(treated: Ratio, control: Ratio, confidence: float) -> Interval:
    """`treated` - `control`; the buckets share no user, so the variances add."""
    value = treated.value - control.value
    half = _z(confidence) * float(np.sqrt(treated.variance + control.variance))
    return Interval(value, value - half, value + half)


def lift(treated: Ratio, control: Ratio, confidence: float) -> Interval:
    """`treated` / `control` - 1; the delta method on the log of the ratio, so that no interval reaches below -100 %."""
    if control.value == 0:
        return Interval(None, None, None)
    value = treated.value / control.value - 1
    if treated.value == 0:
        return Interval(value, None, None)
    spread = np.sqrt(treated.variance / treated.value**2 + control.variance / control.value**2)
    factor = float(np.exp(_z(confidence) * spread))
    return Interval(value, (1 + value) / factor - 1, (1 + value) * factor - 1)


def p_value(treated: Ratio, control: Ratio) -> float | None:
    """Two-sided p-value of no difference; None where neither bucket varies."""
    variance = treated.variance + control.variance
    if variance == 0:
        return None
    return 2 * NormalDist().cdf(-abs(treated.value - control.value) / float(np.sqrt(variance)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted by Holm (1979) over those there are: below alpha, with a family-wise error of alpha."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[place] = largest
    return adjusted


def sample_ratio(observed: Mapping[str, int], shares: Mapping[str, float]) -> SampleRatio:
    """Pearson's chi-square of users per bucket against the planned shares; `shares` in any unit, above 0."""
    num_users, whole = sum(observed.get(bucket, 0) for bucket in shares), sum(shares.values())
    expected = {bucket: num_users * share / whole for bucket, share in shares.items()}
    found = {bucket: observed.get(bucket, 0) for bucket in shares}
    statistic = sum((found[b] - expected[b]) ** 2 / expected[b] for b in shares) if num_users else 0.0
    return SampleRatio(found, expected, statistic, float(chi2.sf(statistic, len(shares) - 1)))


def bootstrap(cell: Cell, *, bucket: str, scenario: str, num_resamples: int, seed: int) -> dict[str, NDArray]:
    """Values of every metric in `num_resamples` resamples of the cell's users, with replacement: metric -> float[R].

    A resample of n users is a multinomial draw over the K combinations of counts, with the probabilities users_K / n.
    The draws depend on the seed, the cell and its names alone. Memory: chunks of R of at most 4 million numbers.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{bucket}\n{scenario}".encode())])
    # A fixed order: Spark returns the combinations in any.
    order = np.lexsort((cell.orders_K, cell.clicks_K, cell.impressions_K))
    sides = [cell.metric(name) for name in METRICS]
    counts = np.stack([side[order] for pair in sides for side in pair], axis=1).astype(np.float64)
    users_K = cell.users_K[order]
    sums = np.concatenate([draws @ counts for draws in _resamples(rng, users_K, num_resamples)])
    return {name: sums[:, 2 * n] / sums[:, 2 * n + 1] for n, name in enumerate(METRICS)}


def percentile_interval(values_R: NDArray, confidence: float) -> tuple[float | None, float | None]:
    """Percentile interval of a bootstrap; (None, None) where a resample was undefined."""
    if not np.isfinite(values_R).all():
        return None, None
    low, high = np.quantile(values_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resamples(rng: np.random.Generator, users_K: NDArray[np.int64], num_resamples: int) -> Iterator[NDArray]:
    num_users = int(users_K.sum())
    size = max(1, _DRAWN_AT_ONCE // len(users_K))
    for first in range(0, num_resamples, size):
        yield rng.multinomial(num_users, users_K / num_users, size=min(size, num_resamples - first)).astype(np.float64)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
