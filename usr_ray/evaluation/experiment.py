"""An experiment that another system ran: from counts per user to estimates, intervals, verdicts and warnings. No Spark.

The user is the unit that was put into a bucket, so the user is the unit of every variance and of the bootstrap. Users
of equal counts are alike to all of it: a `Cell` holds each combination of counts once with its number of users, which
is exact and stays small however many users there are.

Shape letters: K combinations of counts, R resamples.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.stats import chi2

from usr_ray.config import OnlineConfig, UserError
from usr_ray.evaluation.metrics import ALL
from usr_ray.evaluation.statistics import holm, normal_p_value, normal_quantile, wilson_interval
from usr_ray.schema import EXPERIMENT_ORDERS, EXPERIMENT_USERS, NO_BUCKET, SEVERAL_BUCKETS, UNPLANNED_BUCKET

NOTICE = (
    "This reports an experiment that another system has run: it read the buckets from the logs. It does not run an "
    "experiment: it assigns no user, changes no traffic and stops nothing."
)
HIGHER, LOWER, OPEN, FEW, INVALID = "higher", "lower", "no difference shown", "too few users", "not valid: sample ratio"
_SEVERAL_ALARM = 0.01
"""Share of users seen in several buckets above which leaving them out needs a warning."""
METRICS = ("uctr", "ucvr", "ctr", "ctcvr")
PER_USER = ("uctr", "ucvr")
"""Shares of users; the others are ratios of sums."""
ORDER_METRICS = ("ucvr", "ctcvr")
"""Not known where nobody logs orders: such rows have none, which is not 0."""
MIN_USERS = 10
"""Users with the event in a bucket, and of a share those without it, below which a normal interval is not trusted."""
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
    """Variance of the estimate, by the delta method; 0 for fewer than two users."""
    num_users: int
    num_positives: int
    """Users with a numerator above 0."""
    is_share: bool = True
    """Of users; False: a ratio of sums, which may vary where every user has the event."""

    @property
    def is_sound(self) -> bool:
        """Enough users with the event, and of a share without it, for a normal interval."""
        rest = self.num_users - self.num_positives if self.is_share else self.num_positives
        return min(self.num_positives, rest) >= MIN_USERS


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


@dataclass(slots=True)
class ExperimentCounts:
    """What the statistics need, and where everything else went."""

    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    """scenario, ALL or EXPERIMENT_ORDERS -> bucket -> its exposed users."""
    num_users: int = 0
    """Users of the planned buckets, exposed in these dates."""
    several_buckets: int = 0
    """Users seen in more than one bucket: left out."""
    no_bucket: int = 0
    """Users none of whose impressions has a bucket: outside the experiment."""
    unplanned: dict[str, int] = field(default_factory=dict)
    """Bucket that online.shares does not name -> its users: left out."""
    num_impressions: int = 0
    impressions_without_bucket: int = 0
    """Impressions of users of the experiment, shown before they were in it or by another surface."""
    impressions_not_mature: int = 0
    """Their labels can still change: left out."""
    without_column: tuple[str, ...] = ()
    """Scenarios whose impressions log has no bucket column: left out."""
    without_orders: tuple[str, ...] = ()
    """Scenarios whose orders nobody logs (labels.no_order_scenarios)."""

    @property
    def buckets(self) -> list[str]:
        """Every bucket that has users, by name."""
        return sorted(self.cells.get(ALL, {}))

    def cell_of(self, metric: str, scenario: str, bucket: str) -> Cell | None:
        """The users that a metric of a scenario or of ALL is about; None where it is not known."""
        if metric in ORDER_METRICS:
            without = [name for name in self.cells if name in self.without_orders]
            if scenario in without:
                return None
            if scenario == ALL and without:
                scenario = EXPERIMENT_ORDERS
        return self.cells.get(scenario, {}).get(bucket)


def counts_of(
    rows: pa.Table, without_column: tuple[str, ...] = (), without_orders: tuple[str, ...] = ()
) -> ExperimentCounts:
    """The counts of the table that etl/build/experiment.py collects (its `combinations`)."""
    counts = ExperimentCounts(without_column=without_column, without_orders=without_orders)
    is_tally = pc.equal(rows["scenario"], EXPERIMENT_USERS)
    for row in rows.filter(is_tally).to_pylist():
        if row["status"] == NO_BUCKET:
            counts.no_bucket += row["users"]
        elif row["status"] == SEVERAL_BUCKETS:
            counts.several_buckets += row["users"]
        elif row["status"] == UNPLANNED_BUCKET:
            counts.unplanned[row["bucket"]] = row["users"]
        else:
            counts.impressions_not_mature += row["not_mature"]
            counts.impressions_without_bucket += row["without_bucket"]
    cells = rows.filter(pc.invert(is_tally))
    for place in cells.group_by(["scenario", "bucket"]).aggregate([]).to_pylist():
        same = pc.and_(pc.equal(cells["scenario"], place["scenario"]), pc.equal(cells["bucket"], place["bucket"]))
        part = cells.filter(same)
        columns = (part[name].to_numpy().astype(np.int64) for name in ("impressions", "clicks", "orders", "users"))
        counts.cells.setdefault(place["scenario"], {})[place["bucket"]] = Cell(*columns)
    everyone = counts.cells.get(ALL, {})
    counts.num_users = sum(cell.num_users for cell in everyone.values())
    counts.num_impressions = sum(cell.sum_of(cell.impressions_K) for cell in everyone.values())
    return counts


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
    return Ratio(value, variance, n, int(cell.users_K[x_K > 0].sum()), metric in PER_USER)


def value_interval(estimate: Ratio, metric: str, confidence: float) -> Interval:
    """Wilson's score interval of a share of users; the delta method's, cut off at 0, of a ratio of sums."""
    quantile = normal_quantile(confidence)
    if metric in PER_USER:
        return Interval(estimate.value, *wilson_interval(estimate.num_positives, estimate.num_users, quantile))
    half = quantile * float(np.sqrt(estimate.variance))
    return Interval(estimate.value, max(0.0, estimate.value - half), estimate.value + half)


def difference(treated: Ratio, control: Ratio, confidence: float) -> Interval:
    """`treated` - `control`; the buckets share no user, so the variances add."""
    value = treated.value - control.value
    half = normal_quantile(confidence) * float(np.sqrt(treated.variance + control.variance))
    return Interval(value, value - half, value + half)


def lift(treated: Ratio, control: Ratio, confidence: float) -> Interval:
    """`treated` / `control` - 1; the delta method on the log of the ratio, so that no interval reaches below -100 %."""
    if control.value == 0:
        return Interval(None, None, None)
    value = treated.value / control.value - 1
    if treated.value == 0:
        return Interval(value, None, None)
    spread = np.sqrt(treated.variance / treated.value**2 + control.variance / control.value**2)
    factor = float(np.exp(normal_quantile(confidence) * spread))
    return Interval(value, (1 + value) / factor - 1, (1 + value) * factor - 1)


def p_value(treated: Ratio, control: Ratio) -> float | None:
    """Two-sided p-value of no difference; None where neither bucket varies."""
    variance = treated.variance + control.variance
    return normal_p_value((treated.value - control.value) / float(np.sqrt(variance))) if variance else None


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
    num_users, size = int(users_K.sum()), max(1, _DRAWN_AT_ONCE // len(users_K))
    for first in range(0, num_resamples, size):
        yield rng.multinomial(num_users, users_K / num_users, size=min(size, num_resamples - first)).astype(np.float64)


def experiment_report(counts: ExperimentCounts, config: OnlineConfig, *, dates: str) -> dict[str, Any]:
    """Everything the report says, of plain values; undefined numbers are None.

    Keys: notice, warnings, dates, bucket_column, control, confidence, num_resamples, seed, planned_shares (None:
    equal), users, impressions, sample_ratio, buckets ({bucket: {scenario: {num_..., metric: interval}}}),
    comparisons.

    Raises:
        UserError: nobody has a bucket, fewer than two buckets have users, or the control has none.
    """
    _check_users(counts, config, dates)
    control = _control(counts, config)
    found = _estimates(counts, config)
    shares = dict(config.shares) or dict.fromkeys(counts.buckets, 1.0)
    ratios = {
        scenario: sample_ratio({bucket: cell.num_users for bucket, cell in counts.cells[scenario].items()}, shares)
        for scenario in (*found, EXPERIMENT_ORDERS)
        if scenario in counts.cells
    }
    ratio_of_orders = ratios.pop(EXPERIMENT_ORDERS, ratios[ALL])
    return {
        "kind": "online_report",
        "notice": NOTICE,
        "warnings": _warnings(counts, config, ratios),
        "dates": dates,
        "bucket_column": config.bucket_column,
        "control": control,
        "confidence": config.confidence,
        "num_resamples": config.num_resamples,
        "seed": config.seed,
        "planned_shares": dict(config.shares) or None,
        "users": {
            "in_experiment": counts.num_users,
            "several_buckets": counts.several_buckets,
            "no_bucket": counts.no_bucket,
            "unplanned_buckets": dict(sorted(counts.unplanned.items())),
        },
        "impressions": {
            "counted": counts.num_impressions,
            "without_bucket": counts.impressions_without_bucket,
            "not_mature": counts.impressions_not_mature,
        },
        "sample_ratio": {scenario: asdict(one) | {"is_ok": one.is_ok} for scenario, one in ratios.items()},
        "buckets": {
            bucket: {s: _bucket(cells[bucket], config.confidence) for s, cells in found.items() if bucket in cells}
            for bucket in counts.buckets
        },
        "comparisons": _comparisons(found, config, control, ratios, ratio_of_orders),
    }


@dataclass(frozen=True, slots=True)
class _Estimates:
    """What is known of each metric in one bucket and scenario; of METRICS, those that are known."""

    cell: Cell
    values: dict[str, Ratio]
    draws: dict[str, NDArray]


def _check_users(counts: ExperimentCounts, config: OnlineConfig, dates: str) -> None:
    if not counts.cells:
        raise UserError(
            f"--dates {dates}: no usable impression has a bucket in '{config.bucket_column}' "
            f"({counts.no_bucket:,} users have none, {counts.several_buckets:,} several; unplanned buckets: "
            f"{counts.unplanned or 'none'}; {counts.impressions_not_mature:,} impressions are not mature); "
            "check the dates, the column and online.shares"
        )


def _control(counts: ExperimentCounts, config: OnlineConfig) -> str:
    found = counts.buckets
    if len(found) < 2:
        raise UserError(
            f"--bucket-column {config.bucket_column}: users are in one bucket only, {''.join(found)}; a "
            "comparison needs two: check the column and the dates"
        )
    control = config.control or (min(config.shares) if config.shares else found[0])
    if control not in found:
        raise UserError(f"--control {control}: no user is in this bucket; there are: {', '.join(found)}")
    return control


def _estimates(counts: ExperimentCounts, config: OnlineConfig) -> dict[str, dict[str, _Estimates]]:
    """Scenario -> bucket -> estimates; all scenarios together first, then by name."""
    found: dict[str, dict[str, _Estimates]] = {}
    for scenario in sorted(counts.cells.keys() - {EXPERIMENT_ORDERS}, key=lambda s: (s != ALL, s)):
        found[scenario] = {}
        for bucket, cell in counts.cells[scenario].items():
            cells = {m: c for m in METRICS if (c := counts.cell_of(m, scenario, bucket)) is not None}
            draws = {
                id(c): bootstrap(
                    c, bucket=bucket, scenario=scenario, num_resamples=config.num_resamples, seed=config.seed
                )
                for c in cells.values()
            }
            values = {metric: ratio(c, metric) for metric, c in cells.items()}
            found[scenario][bucket] = _Estimates(cell, values, {m: draws[id(c)][m] for m, c in cells.items()})
    return found


def _bucket(found: _Estimates, confidence: float) -> dict[str, Any]:
    cell = found.cell
    entry: dict[str, Any] = {
        "num_users": cell.num_users,
        "num_impressions": cell.sum_of(cell.impressions_K),
        "num_clicks": cell.sum_of(cell.clicks_K),
        "num_orders": cell.sum_of(cell.orders_K) if "ctcvr" in found.values else None,
    }
    for metric in METRICS:
        estimate = found.values.get(metric)
        if estimate is None:
            keys = ("value", "low", "high", "bootstrap_low", "bootstrap_high", "num_users_with_event")
            entry[metric] = dict.fromkeys(keys)
            continue
        interval = value_interval(estimate, metric, confidence)
        entry[metric] = _with_bootstrap(interval, found.draws[metric], confidence)
        entry[metric]["num_users_with_event"] = estimate.num_positives
    return entry


def _comparisons(
    found: Mapping[str, Mapping[str, _Estimates]],
    config: OnlineConfig,
    control: str,
    ratios: Mapping[str, SampleRatio],
    ratio_of_orders: SampleRatio,
) -> list[dict[str, Any]]:
    """One entry per known (scenario, metric, bucket other than the control); Holm's family: those with a verdict.

    Args:
        ratio_of_orders: of the users that the orders of all scenarios together are about.
    """
    level = config.confidence
    rows: list[dict[str, Any]] = []
    for scenario, cells in found.items():
        others = sorted(set(cells) - {control}) if control in cells else []
        for metric, bucket in itertools.product(METRICS, others):
            if metric not in cells[bucket].values or metric not in cells[control].values:
                continue
            treated, base = cells[bucket].values[metric], cells[control].values[metric]
            drawn, drawn_base = cells[bucket].draws[metric], cells[control].draws[metric]
            # A resample without any event of the control has no lift.
            lifts = drawn / drawn_base - 1 if (drawn_base > 0).all() else drawn * float("nan")
            rows.append(
                {
                    "scenario": scenario,
                    "metric": metric,
                    "bucket": bucket,
                    "difference": _with_bootstrap(difference(treated, base, level), drawn - drawn_base, level),
                    "lift": _with_bootstrap(lift(treated, base, level), lifts, level),
                    "p_value": p_value(treated, base),
                    "is_sound": treated.is_sound and base.is_sound,
                }
            )
    for row in rows:
        own = ratio_of_orders if row["scenario"] == ALL and row["metric"] in ORDER_METRICS else ratios[row["scenario"]]
        row |= {"verdict": FEW if ratios[ALL].is_ok and own.is_ok else INVALID, "p_value_holm": None}
    judged = [row for row in rows if row["is_sound"] and row["verdict"] != INVALID]
    # Of one scenario, all of them together are the same test, which counts once.
    tests = dict.fromkeys((row["metric"], row["bucket"], row["p_value"]) for row in judged)
    adjusted = dict(zip(tests, holm([p for *_, p in tests]), strict=True))
    for row in judged:
        row["p_value_holm"] = adjusted[row["metric"], row["bucket"], row["p_value"]]
        row["verdict"] = _verdict(row, 1 - level)
    return rows


def _verdict(row: Mapping[str, Any], alpha: float) -> str:
    if row["p_value_holm"] is None or row["p_value_holm"] >= alpha:
        return OPEN
    return HIGHER if row["difference"]["value"] > 0 else LOWER


def _with_bootstrap(interval: Interval, values_R: NDArray, confidence: float) -> dict[str, float | int | None]:
    low, high = percentile_interval(values_R, confidence)
    return asdict(interval) | {"bootstrap_low": low, "bootstrap_high": high}


def _warnings(counts: ExperimentCounts, config: OnlineConfig, ratios: Mapping[str, SampleRatio]) -> list[str]:
    """What a reader must know before any number; a sample-ratio mismatch first."""
    warnings = []
    planned = "planned shares" if config.shares else "equal shares (online.shares is not set)"
    for scenario, found in ratios.items():
        if found.is_ok:
            continue
        numbers = ", ".join(f"{b} {n:,} for {found.expected[b]:,.0f}" for b, n in found.observed.items())
        if scenario == ALL:
            warnings.append(
                f"SAMPLE RATIO MISMATCH: users per bucket do not fit the {planned}: {numbers}; p = "
                f"{found.p_value:.1e}. Assignment, logging or a filter treats the buckets differently: no comparison "
                "below can be trusted."
            )
        elif ratios[ALL].is_ok:
            warnings.append(
                f"SAMPLE RATIO MISMATCH in {scenario}: users exposed there do not fit the {planned}: {numbers}; "
                f"p = {found.p_value:.1e}. Its buckets hold different users, through a fault or because the treatment "
                f"changes who gets there: the comparisons of {scenario} are not valid."
            )
    everyone = counts.num_users + counts.several_buckets
    if counts.several_buckets > _SEVERAL_ALARM * everyone:
        warnings.append(
            f"{counts.several_buckets:,} users ({counts.several_buckets / everyone:.1%}) were seen in several buckets "
            "and are left out: check how users are assigned and whether their ids are stable."
        )
    if counts.unplanned:
        numbers = ", ".join(f"{bucket} {n:,}" for bucket, n in sorted(counts.unplanned.items()))
        warnings.append(f"Users in buckets that online.shares does not name are left out: {numbers}.")
    if without := sorted(counts.cells.keys() & set(counts.without_orders)):
        warnings.append(
            f"Nobody logs the orders of {', '.join(without)} (labels.no_order_scenarios): UCVR and CTCVR are not known "
            f"there, and those of '{ALL}' are of the users and impressions of the other scenarios."
        )
    if counts.without_column:
        warnings.append(
            f"Left out, since their impressions logs have no column '{config.bucket_column}': "
            f"{', '.join(counts.without_column)}."
        )
    return warnings
