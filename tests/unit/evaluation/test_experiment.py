"""Estimates, intervals, sample ratio and Holm against numbers by hand, scipy and seeded worlds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from usr_ray.config import OnlineConfig
from usr_ray.evaluation.experiment import (
    METRICS,
    Cell,
    ExperimentCounts,
    Ratio,
    bootstrap,
    difference,
    experiment_report,
    lift,
    p_value,
    percentile_interval,
    ratio,
    sample_ratio,
    value_interval,
)

pytestmark = pytest.mark.integration


def cell_of(users: list[tuple[int, int, int]]) -> Cell:
    """A cell of users given one by one as (impressions, clicks, orders)."""
    counts, num_users = np.unique(np.array(users, dtype=np.int64), axis=0, return_counts=True)
    return Cell(*counts.T, num_users.astype(np.int64))


USERS = [(10, 2, 1), (4, 0, 0), (4, 0, 0), (1, 1, 0), (7, 3, 2), (2, 0, 0)]


def test_metrics_are_the_definitions_of_the_method() -> None:
    values = {metric: ratio(cell_of(USERS), metric).value for metric in METRICS}
    assert values == {"uctr": 3 / 6, "ucvr": 2 / 6, "ctr": 6 / 28, "ctcvr": 3 / 28}


def test_variance_of_a_share_is_p_times_q_over_n_minus_1() -> None:
    estimate = ratio(cell_of(USERS), "ucvr")
    assert estimate.variance == pytest.approx((1 / 3) * (2 / 3) / 5, rel=1e-12)
    assert (estimate.num_users, estimate.num_positives) == (6, 2)


def test_variance_of_a_ratio_is_the_delta_method_of_the_textbook() -> None:
    impressions, clicks = (np.array([row[n] for row in USERS], dtype=float) for n in (0, 1))
    n, mean_x, mean_y = len(USERS), clicks.mean(), impressions.mean()
    covariance = np.cov(clicks, impressions)
    expected = (
        covariance[0, 0] / mean_y**2
        - 2 * mean_x * covariance[0, 1] / mean_y**3
        + mean_x**2 * covariance[1, 1] / mean_y**4
    ) / n
    assert ratio(cell_of(USERS), "ctr").variance == pytest.approx(expected, rel=1e-12)


def test_one_user_has_no_variance() -> None:
    assert ratio(cell_of([(3, 1, 0)]), "ctr").variance == 0.0


def test_shares_of_users_have_wilson_intervals() -> None:
    estimate = Ratio(0.03, 0.0, 1000, 30)
    expected = stats.binomtest(30, 1000).proportion_ci(0.9, method="wilson")
    found = value_interval(estimate, "uctr", 0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_ratios_have_normal_intervals_that_end_at_0() -> None:
    found = value_interval(Ratio(0.1, 0.0004, 100, 20), "ctr", 0.95)
    assert (found.low, found.high) == pytest.approx((0.1 - 1.959964 * 0.02, 0.1 + 1.959964 * 0.02), rel=1e-6)
    assert value_interval(Ratio(0.01, 0.0004, 100, 20), "ctr", 0.95).low == 0.0


def test_difference_and_p_value_are_those_of_two_independent_estimates() -> None:
    treated, control = Ratio(0.12, 9e-6, 10_000, 1200), Ratio(0.10, 16e-6, 10_000, 1000)
    found = difference(treated, control, 0.95)
    assert found.value == pytest.approx(0.02)
    assert found.high - found.value == pytest.approx(1.959964 * 0.005, rel=1e-6)
    assert p_value(treated, control) == pytest.approx(2 * stats.norm.sf(4.0), rel=1e-9)


def test_p_value_is_undefined_where_nothing_varies() -> None:
    assert p_value(Ratio(0.0, 0.0, 10, 0), Ratio(0.0, 0.0, 10, 0)) is None


def test_lift_interval_is_that_of_the_log_ratio() -> None:
    treated, control = Ratio(0.12, 9e-6, 10_000, 1200), Ratio(0.10, 16e-6, 10_000, 1000)
    spread = 1.959964 * np.sqrt(9e-6 / 0.12**2 + 16e-6 / 0.10**2)
    found = lift(treated, control, 0.95)
    assert found.value == pytest.approx(0.2)
    assert np.log([found.low + 1, found.high + 1]) == pytest.approx(np.log(1.2) + np.array([-spread, spread]), rel=1e-6)


def test_lift_without_events_has_no_interval() -> None:
    some, nothing = Ratio(0.1, 1e-5, 100, 10), Ratio(0.0, 0.0, 100, 0)
    assert lift(some, nothing, 0.95).value is None
    assert (lift(nothing, some, 0.95).value, lift(nothing, some, 0.95).low) == (-1.0, None)


@pytest.mark.parametrize(
    ("observed", "shares"),
    [({"A": 5_100, "B": 4_900}, {"A": 1, "B": 1}), ({"A": 30, "B": 61, "C": 9}, {"A": 0.3, "B": 0.6, "C": 0.1})],
)
def test_sample_ratio_is_pearsons_chi_square(observed: dict[str, int], shares: dict[str, float]) -> None:
    planned = np.array(list(shares.values())) / sum(shares.values()) * sum(observed.values())
    expected = stats.chisquare(list(observed.values()), planned)
    found = sample_ratio(observed, shares)
    assert (found.chi_square, found.p_value) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


def test_sample_ratio_alarms_on_a_lost_bucket_and_not_on_chance() -> None:
    assert sample_ratio({"A": 50_300, "B": 49_700}, {"A": 1, "B": 1}).is_ok  # p = 0.058
    assert not sample_ratio({"A": 51_000, "B": 49_000}, {"A": 1, "B": 1}).is_ok  # p = 2.5e-10
    assert not sample_ratio({"A": 100}, {"A": 1, "B": 1}).is_ok


def world(rng: np.random.Generator, num_users: int, factor: float = 1.0) -> Cell:
    """Users of very different activity and taste: impressions of one user are far from independent."""
    impressions = 1 + rng.negative_binomial(1, 0.1, num_users)
    rates = factor * rng.beta(1, 9, num_users)
    clicks = rng.binomial(impressions, rates)
    orders = rng.binomial(clicks, 0.3)
    return cell_of(np.stack([impressions, clicks, orders], axis=1).tolist())


def test_bootstrap_is_the_resampling_of_single_users() -> None:
    """Standard errors of the grouped draw against resampling the users one by one."""
    rng = np.random.default_rng(5)
    users = np.stack([rng.integers(1, 6, 300), rng.integers(0, 2, 300), np.zeros(300, int)], axis=1)
    draws = bootstrap(cell_of(users.tolist()), bucket="A", scenario="all", num_resamples=4000, seed=1)
    picks = rng.integers(0, 300, (4000, 300))
    plain = users[picks, 1].sum(1) / users[picks, 0].sum(1)
    assert draws["ctr"].mean() == pytest.approx(plain.mean(), abs=3 * plain.std() / np.sqrt(4000) * 2)
    assert draws["ctr"].std() == pytest.approx(plain.std(), rel=0.06)
    assert draws["uctr"].std() == pytest.approx((users[picks, 1] > 0).mean(1).std(), rel=0.06)


def test_bootstrap_depends_on_the_seed_and_not_on_the_order_of_the_rows() -> None:
    cell = world(np.random.default_rng(1), 200)
    turned = Cell(*(column[::-1] for column in (cell.impressions_K, cell.clicks_K, cell.orders_K, cell.users_K)))
    first, second, third = (
        bootstrap(c, bucket="A", scenario="search", num_resamples=100, seed=seed)["ctr"]
        for c, seed in ((cell, 1), (turned, 1), (cell, 2))
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_bootstrap_is_drawn_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = world(np.random.default_rng(1), 200)
    whole = bootstrap(cell, bucket="A", scenario="all", num_resamples=101, seed=1)
    monkeypatch.setattr("usr_ray.evaluation.experiment._DRAWN_AT_ONCE", 7 * len(cell.users_K))
    parts = bootstrap(cell, bucket="A", scenario="all", num_resamples=101, seed=1)
    assert all(np.array_equal(whole[name], parts[name]) for name in METRICS)


def test_percentile_interval_is_undefined_with_an_undefined_resample() -> None:
    values = np.arange(101.0)
    assert percentile_interval(values, 0.9) == pytest.approx((5.0, 95.0))
    assert percentile_interval(np.append(values, np.inf), 0.9) == (None, None)


def test_intervals_of_an_experiment_without_effect_cover_zero_as_often_as_they_say() -> None:
    """A/A: 400 seeded worlds. 95 % +- 3 standard errors of 400 trials is 91.7 % to 98.3 %."""
    rng = np.random.default_rng(11)
    covered = dict.fromkeys(METRICS, 0)
    covered_rows = 0
    for _ in range(400):
        a, b = world(rng, 400), world(rng, 400)
        for metric in METRICS:
            found = difference(ratio(a, metric), ratio(b, metric), 0.95)
            covered[metric] += found.low <= 0 <= found.high
        # The mistake the delta method avoids: impressions taken as independent.
        rates = [ratio(c, "ctr").value for c in (a, b)]
        rows = [c.sum_of(c.impressions_K) for c in (a, b)]
        spread = np.sqrt(sum(p * (1 - p) / n for p, n in zip(rates, rows, strict=True)))
        covered_rows += abs(rates[0] - rates[1]) <= 1.96 * spread
    assert all(0.917 <= count / 400 <= 0.983 for count in covered.values()), covered
    assert covered_rows / 400 < 0.85


def test_lift_and_bootstrap_intervals_cover_a_true_lift() -> None:
    """B's click rate is 1.3 times A's: 120 seeded worlds, 95 % +- 3 standard errors is 89 % to 100 %."""
    rng = np.random.default_rng(12)
    by_delta = by_bootstrap = 0
    for trial in range(120):
        a, b = world(rng, 300), world(rng, 300, factor=1.3)
        found = lift(ratio(b, "ctr"), ratio(a, "ctr"), 0.95)
        by_delta += found.low <= 0.3 <= found.high
        draws = [
            bootstrap(c, bucket=n, scenario="all", num_resamples=200, seed=trial)["ctr"]
            for c, n in ((a, "A"), (b, "B"))
        ]
        low, high = percentile_interval(draws[1] / draws[0] - 1, 0.95)
        by_bootstrap += low <= 0.3 <= high
    assert by_delta / 120 >= 0.89
    assert by_bootstrap / 120 >= 0.87  # 200 resamples make a percentile interval a little too narrow


def test_one_scenario_and_all_together_are_one_test_a_metric() -> None:
    """Four metrics are Holm's family, not eight: each number by hand from the p-values in order of size."""
    rng = np.random.default_rng(5)
    buckets = {"A": world(rng, 800), "B": world(rng, 800, factor=1.3)}
    counts = ExperimentCounts(cells={"search": buckets, "all": buckets}, num_users=1600)
    rows = experiment_report(counts, OnlineConfig(num_resamples=20), dates="2026-01-01")["comparisons"]
    assert len(rows) == 8
    by_metric = {row["metric"]: row["p_value"] for row in rows}
    expected, largest = {}, 0.0
    for place, (metric, p) in enumerate(sorted(by_metric.items(), key=lambda entry: entry[1])):
        largest = expected[metric] = max(largest, min(1.0, p * (4 - place)))
    assert all(row["is_sound"] for row in rows)
    assert [row["p_value_holm"] for row in rows] == pytest.approx([expected[row["metric"]] for row in rows])
