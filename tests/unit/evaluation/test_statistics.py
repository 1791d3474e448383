"""Gaps, corrections, bins, ROC points and slices against values worked out by hand, and the gap against a bootstrap."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from tests.unit.reporting.test_run import make_predictions
from usr_ray.evaluation import metrics
from usr_ray.evaluation.statistics import (
    Judged,
    PairedGap,
    auc_gaps,
    calibration_bins,
    corrected,
    ctr_slices,
    effective_users,
    far_off,
    holm,
    normal_quantile,
    paired_auc_gap,
    pcoc_interval,
    roc_points,
    wilson_interval,
)

pytestmark = pytest.mark.unit


def test_the_gap_of_two_seeds_by_hand() -> None:
    # Users a, b, c, d with a row each; positives are the rows of a and b.
    labels = np.array([1, 1, 0, 0])
    users = np.array([1, 2, 3, 4])
    perfect, half, worst = [0.9, 0.8, 0.2, 0.1], [0.9, 0.1, 0.5, 0.5], [0.1, 0.2, 0.8, 0.9]
    gap = paired_auc_gap(labels, np.array([perfect, perfect]), np.array([half, worst]), users)
    assert gap is not None
    assert gap.by_seed == (0.5, 1.0)  # AUC 1 - 1/2 (one positive above both, one below both), 1 - 0
    assert gap.value == 0.75
    assert gap.seed_sd == pytest.approx(math.sqrt(0.125))
    # Influence: `perfect` and `worst` place every row alike, so 0. `half`: positives at 1 and 0, AUC 1/2, so +1/4 and
    # -1/4; negatives both at 1/2, so 0. Mean over the seeds of (ours - theirs): a -1/8, b +1/8.
    # Two users have each label, so 2 / (2 - 1).
    assert gap.user_se == pytest.approx(math.sqrt(2 * (1 / 64 + 1 / 64)))
    # Variance 1/16 of the users + 0.125 / 2 of the seeds; degrees (1/8)^2 / ((1/16)^2 / 1 + (1/16)^2 / 1) = 2, whose
    # 97.5 % point is 4.30265 in tables of Student's t.
    assert gap.high - gap.value == pytest.approx(4.30265 * math.sqrt(1 / 8), rel=1e-5)
    assert gap.high - gap.value == pytest.approx(gap.value - gap.low)
    assert (gap.num_users, gap.num_rarer) == (2, 2)


def test_the_users_part_agrees_with_a_bootstrap_over_users() -> None:
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(300), 8)
    taste = rng.normal(size=300)[users]  # rows of a user go together
    labels = (rng.random(2400) < 1 / (1 + np.exp(1 - taste))).astype(float)
    ours, theirs = taste + rng.normal(size=2400), taste + 2 * rng.normal(size=2400)
    gap = paired_auc_gap(labels, ours[None], theirs[None], users)
    assert gap is not None
    assert gap.value == pytest.approx(metrics.auc(labels, ours) - metrics.auc(labels, theirs))
    rows_of = [np.flatnonzero(users == user) for user in range(300)]
    drawn = []
    for _ in range(800):  # users are drawn whole, the same for both models
        rows = np.concatenate([rows_of[user] for user in rng.integers(300, size=300)])
        drawn.append(metrics.auc(labels[rows], ours[rows]) - metrics.auc(labels[rows], theirs[rows]))
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert gap.seed_sd == 0.0
    assert gap.high - gap.low == pytest.approx(high - low, rel=0.12)


def test_rows_of_one_user_do_not_count_as_many_users() -> None:
    rng = np.random.default_rng(0)
    labels, ours, theirs = (rng.random(100) < 0.3).astype(float), rng.random(100), rng.random(100)
    apart = paired_auc_gap(labels, ours[None], theirs[None], np.arange(100))
    # The same rows ten times over, for the same hundred users: nothing new was seen.
    repeated = [np.tile(x, 10) for x in (labels, ours, theirs)]
    again = paired_auc_gap(repeated[0], repeated[1][None], repeated[2][None], np.tile(np.arange(100), 10))
    assert apart is not None
    assert again is not None
    assert (again.low, again.high, again.p_value) == pytest.approx((apart.low, apart.high, apart.p_value))


@pytest.mark.parametrize(("num_users", "has_gap", "verdicts"), [(1, False, {"none"}), (9, True, {"few"})])
def test_few_users_give_no_verdict_however_many_rows_they_have(
    num_users: int, has_gap: bool, verdicts: set[str]
) -> None:
    """The influences of one user's rows sum to 0: of pure noise every gap would be certain."""
    rng = np.random.default_rng(4)
    found = []
    for _ in range(20):
        labels, ours, theirs = (rng.random(300) < 0.4).astype(float), rng.random(300), rng.random(300)
        found.append(Judged(gap=paired_auc_gap(labels, ours[None], theirs[None], np.arange(300) % num_users)))
    assert [one.gap is not None for one in found] == [has_gap] * 20
    assert {one.verdict for one in corrected(found)} == verdicts


def test_ten_users_of_each_label_give_a_verdict() -> None:
    labels = np.tile([0.0, 1.0], 300)
    rng = np.random.default_rng(4)
    for users, verdict in ((np.arange(600) // 2 % 10, "better"), (np.arange(600) % 10, "few")):  # five have orders
        gap = paired_auc_gap(labels, labels[None], rng.random((1, 600)), users)
        assert corrected([Judged(gap=gap)])[0].verdict == verdict


@pytest.mark.parametrize(
    ("orders", "users"),
    [
        ([1] * 40, 40),
        ([10] * 4, 4),
        ([31] + [1] * 9, 1600 / 970),  # 40^2 / (31^2 + 9)
        ([40], 1),
        ([], 0),
    ],
)
def test_users_of_a_label_count_by_their_share_of_its_rows(orders: list[int], users: float) -> None:
    labels, keys = buyers(orders, rows_of_each=50)
    assert effective_users(labels, keys) == pytest.approx(users)
    assert effective_users(1 - labels, keys) == pytest.approx(users), "the other label with fewer"


@pytest.mark.integration
def test_a_heavy_buyer_and_a_few_buyers_do_not_make_verdicts_of_nothing() -> None:
    """Two models of equal worth whose errors are the user's; intervals that leave out 0 are false, 5 % of them."""
    rng = np.random.default_rng(7)
    for orders in ([20, 20], [20] + [1] * 20):  # 38 % and 29 % of them were, when the 200 users had counted
        labels, users = buyers(orders, rows_of_each=20)
        num_false = 0
        for _ in range(100):
            ours, theirs = (rng.normal(size=200)[users] + 0.3 * rng.normal(size=len(users)) for _ in range(2))
            gap = paired_auc_gap(labels, ours[None], theirs[None], users)
            assert gap is not None
            num_false += gap.low > 0 or gap.high < 0
        assert num_false <= 10
    alone, users = buyers([40], rows_of_each=50)
    assert paired_auc_gap(alone, rng.random((1, len(users))), rng.random((1, len(users))), users) is None


def buyers(orders: list[int], *, rows_of_each: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels, users) of 200 users with so many rows each, of whom the first have these orders."""
    labels = np.zeros((200, rows_of_each))
    for user, number in enumerate(orders):
        labels[user, :number] = 1
    return labels.ravel(), np.repeat(np.arange(200), rows_of_each)


def test_a_model_against_itself_has_no_gap_and_a_missing_label_none() -> None:
    labels, probs = np.array([1.0, 0.0, 1.0, 0.0]), np.array([[0.2, 0.4, 0.9, 0.3]])
    gap = paired_auc_gap(labels, probs, probs, np.array([1, 2, 3, 4]))
    assert gap is not None
    assert (gap.value, gap.low, gap.high, gap.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert paired_auc_gap(np.ones(4), probs, probs, np.array([1, 2, 3, 4])) is None
    assert paired_auc_gap(np.zeros(0), np.zeros((1, 0)), np.zeros((1, 0)), np.zeros(0)) is None


def test_holm_by_hand() -> None:
    # Sorted: 0.01 x 4, 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.8 x 1.
    assert holm([0.03, 0.01, 0.8, 0.02]) == pytest.approx([0.06, 0.04, 0.8, 0.06])
    # Never below an earlier one, never above 1.
    assert holm([0.01, 0.011]) == pytest.approx([0.02, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    # Numbers that there are not are no tests.
    assert holm([0.03, None, 0.02]) == pytest.approx([0.04, None, 0.04])


def test_all_rows_of_one_scenario_are_no_second_test():
    """Two tasks of a shop that has a search alone: pooled they are the same, and Holm's factor is 2, not 4."""
    one = PairedGap(0.02, 0.01, 0.03, 0.02, (0.02,), 0.0, 0.005, 50.0, 100)
    other = replace(one, value=0.03, p_value=0.6)
    few = replace(one, num_rarer=7)
    found = corrected([Judged(gap=gap) for gap in (one, other, one, other, few, None)])
    assert [judged.adjusted_p for judged in found] == pytest.approx([0.04, 0.6, 0.04, 0.6, 1, 1])
    assert [judged.verdict for judged in found] == ["better", "unsure", "better", "unsure", "few", "none"]


def test_bins_are_quantiles_that_add_up():
    probs = np.linspace(0.01, 1, 100)
    labels = (np.arange(100) % 4 == 0).astype(float)
    bins = calibration_bins(labels, probs, np.arange(100))
    assert [b.num_rows for b in bins] == [10] * 10
    assert sum(b.num_positives for b in bins) == 25
    assert bins[0].mean_prob == pytest.approx(0.055)
    assert bins[0].rate == pytest.approx(0.3)  # rows 0, 4 and 8


def test_equal_probabilities_share_a_bin():
    bins = calibration_bins(np.array([1, 0, 0, 1]), np.array([0.2, 0.2, 0.2, 0.9]), np.arange(4))
    assert [(b.num_rows, b.num_positives) for b in bins] == [(3, 1), (1, 1)]
    assert calibration_bins(np.array([]), np.array([]), np.array([])) == []


def test_wilson_interval_of_a_worked_case():
    # Ten of a hundred: the textbook interval is 0.0552 to 0.1744.
    assert wilson_interval(10, 100, 1.959964) == pytest.approx((0.0552, 0.1744), abs=5e-5)
    assert wilson_interval(0, 10, 1.959964)[0] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(10, 10, 1.959964)[1] == pytest.approx(1, abs=1e-12)
    known = binomtest(7, 40).proportion_ci(0.9, method="wilson")
    assert wilson_interval(7, 40, normal_quantile(0.9)) == pytest.approx(tuple(known), rel=1e-9)


def test_bars_of_a_bin_take_the_rows_of_a_user_together():
    labels = (np.arange(250) % 5 == 0).astype(float)
    (alone,) = calibration_bins(labels, np.full(250, 0.2), np.arange(250))
    # As many users as that have a Student quantile of nearly the normal one, and a design effect of n / (n - 1).
    known = binomtest(50, 250).proportion_ci(0.95, method="wilson")
    assert (alone.low, alone.high) == pytest.approx(tuple(known), abs=1e-3)
    # Three copies of each user's row tell nothing more.
    (copied,) = calibration_bins(np.tile(labels, 4), np.full(1000, 0.2), np.tile(np.arange(250), 4))
    assert (copied.num_rows, copied.num_positives, copied.rate) == (1000, 200, 0.2)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), rel=1e-12)
    (of_one,) = calibration_bins(labels, np.full(250, 0.2), np.zeros(250))
    assert (of_one.low, of_one.high) == (0, 1)


def test_the_interval_of_pcoc_by_hand():
    labels, probs = np.array([1, 1, 0, 0]), np.array([0.9, 0.5, 0.3, 0.1])
    # 1.8 / 2 = 0.9; p - 0.9 y is 0, -0.4, 0.3, 0.1, squares 0.26. Two users of each label: 2 / (2 - 1), and Student's
    # 97.5 % point of one degree is 12.7062.
    half = 12.7062 * math.sqrt(2 * 0.26) / 2
    assert pcoc_interval(labels, probs, np.arange(4)) == pytest.approx((0.9 - half, 0.9 + half), rel=1e-5)
    # Two users, a row of each label: 0 + 0.3 and -0.4 + 0.1, squares 0.18.
    half = 12.7062 * math.sqrt(2 * 0.18) / 2
    assert pcoc_interval(labels, probs, np.array([0, 1, 0, 1])) == pytest.approx((0.9 - half, 0.9 + half), rel=1e-5)
    assert pcoc_interval(labels, probs, np.array([0, 0, 1, 1])) is None, "one user has all clicks"


@pytest.mark.parametrize("sizes", ["equal", "uneven"])
def test_intervals_of_calibration_hold_where_users_differ(sizes):
    """A calibrated model that does not know how fond of clicking each user is: 95 % of the intervals hold the truth."""
    rng, held, bars = np.random.default_rng(0), [], []
    rows = np.full(200, 40) if sizes == "equal" else np.maximum(1, rng.lognormal(3, 1.2, 200).astype(int))
    users = np.repeat(np.arange(200), rows)
    for _ in range(200):
        rates = rng.beta(2, 6, 200)  # mean 1/4
        labels = (rng.random(len(users)) < rates[users]).astype(float)
        low, high = pcoc_interval(labels, np.full(len(users), 0.25), users)
        (found,) = calibration_bins(labels, np.full(len(users), 0.25), users)
        held.append(low <= 1 <= high)
        bars.append(found.low <= 0.25 <= found.high)
    assert np.mean(held) >= 0.91  # a Poisson interval of the clicks: 0.5 to 0.7
    assert np.mean(bars) >= 0.91


def test_the_area_under_the_roc_points_is_the_auc():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    probs = np.round(rng.random(80) + 0.2 * labels, 1)
    x, y = roc_points(labels, probs, num_points=1000)
    assert np.trapezoid(y, x) == pytest.approx(metrics.auc(labels, probs))
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert roc_points(np.ones(3), np.ones(3)) is None


def test_thinned_roc_keeps_its_ends_and_area():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20_000)
    probs = rng.random(20_000) + 0.5 * labels
    x, y = roc_points(labels, probs)
    assert len(x) <= 160
    assert (x[-1], y[-1]) == (1, 1)
    assert np.trapezoid(y, x) == pytest.approx(metrics.auc(labels, probs), abs=2e-3)


def test_slices_part_the_rows_of_the_scenario():
    rows = make_predictions()
    slices = ctr_slices(rows, None, 1)
    own = rows.scenario_N == 1
    by_group = {}
    for part in slices:
        by_group[part.group] = by_group.get(part.group, 0) + part.num_rows
    assert list(by_group.values()) == [own.sum()] * 2
    long = own & (rows.history_length_N >= 21)
    assert slices[3].auc == metrics.auc(rows.labels_NT[long, 0], rows.probs_NT[long, 0])
    assert slices[-1].num_rows == (own & (rows.item_id_N == 1)).sum()


def test_the_gaps_of_a_report_are_judged_together():
    rows = make_predictions()
    gaps = auc_gaps(rows, rows, ("search", "recommendation"))
    assert list(gaps)[:3] == [("search", "ctr"), ("search", "ctcvr"), ("recommendation", "ctr")]
    assert gaps["global", "ctr"].gap is None, "no global heads"
    assert gaps["search", "ctcvr"].gap is None, "no order in search"
    own = gaps["search", "ctr"]
    assert (own.gap.value, own.gap.low, own.gap.high, own.adjusted_p) == (0.0, 0.0, 0.0, 1.0)
    assert own.gap.num_rarer == rows.labels_NT[rows.scenario_N == 0, 0].sum()
    assert own.verdict == "even"


def cells_of(**pcoc: tuple[float | None, int]) -> metrics.CellMetrics:
    return {
        name: {"ctr": {"pcoc": of, "num_positives": seen, "num_samples": 10**8}} for name, (of, seen) in pcoc.items()
    }


def test_probabilities_that_are_surely_no_rates_are_named() -> None:
    # Wilson's 95 % intervals of so rare labels: of 10 5.43 to 18.41, of 100 82.22 to 121.62, of 1,000 939.9 to 1,063.9.
    assert far_off(cells_of(search=(1.24, 10**6), feed=(0.81, 10**6), none=(None, 0))) == []
    assert far_off(cells_of(search=(1.5, 100), feed=(2.29, 10))) == [], "150 / 121.6 and 22.9 / 18.4 are below 1.25"
    assert far_off(cells_of(search=(0.66, 100))) == [], "66 / 82.2 is 0.803"
    assert far_off(cells_of(all=(3.0, 1000))) == []
    assert far_off(cells_of(search=(0.1, 1), feed=(0.04, 2), shop=(3.0, 3))) == [], "too few to say"
    assert len(far_off(cells_of(search=(20.0, 1)))) == 1
    (line,) = far_off(cells_of(search=(1.0, 1000), **{"global": (1.54, 100)}))
    assert line.startswith("global ctr: the probabilities add up to 154, seen were 100; they may rank well but are no ")
    assert [line.split(",")[0] for line in far_off(cells_of(low=(0.64, 100), few=(2.31, 10), one=(1.34, 1000)))] == [
        "low ctr: the probabilities add up to 64",
        "few ctr: the probabilities add up to 23",
        "one ctr: the probabilities add up to 1",
    ]
