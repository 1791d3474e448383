"""Bins, ROC points, slices and sentences of the report against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.reporting.test_run import make_predictions
from usr_ray.evaluation import metrics
from usr_ray.evaluation.report_stats import Gap, auc_gap, calibration_bins, ctr_slices, roc_points, wilson_interval
from usr_ray.reporting.page import duration, verdict, why_undefined

pytestmark = pytest.mark.unit


def test_bins_are_quantiles_that_add_up():
    probs = np.linspace(0.01, 1, 100)
    labels = (np.arange(100) % 4 == 0).astype(float)
    bins = calibration_bins(labels, probs)
    assert [b.num_rows for b in bins] == [10] * 10
    assert sum(b.num_positives for b in bins) == 25
    assert bins[0].mean_prob == pytest.approx(0.055)
    assert bins[0].rate == pytest.approx(0.3)  # rows 0, 4 and 8


def test_equal_probabilities_share_a_bin():
    bins = calibration_bins(np.array([1, 0, 0, 1]), np.array([0.2, 0.2, 0.2, 0.9]))
    assert [(b.num_rows, b.num_positives) for b in bins] == [(3, 1), (1, 1)]
    assert calibration_bins(np.array([]), np.array([])) == []


def test_wilson_interval_of_a_worked_case():
    # Ten of a hundred: the textbook interval is 0.0552 to 0.1744.
    assert wilson_interval(10, 100) == pytest.approx((0.0552, 0.1744), abs=5e-5)
    assert wilson_interval(0, 10)[0] == 0.0


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


def test_gap_is_undefined_without_global_heads_or_with_one_class():
    rows = make_predictions()
    assert auc_gap(rows, rows, "global", 0, ("search", "recommendation")) is None
    assert auc_gap(rows, rows, "search", 1, ("search", "recommendation")) is None
    rarer = int(rows.labels_NT[rows.scenario_N == 0, 0].sum())
    assert auc_gap(rows, rows, "search", 0, ("search", "recommendation")) == Gap(0.0, 0.0, 0.0, num_rarer=rarer)


def test_a_gap_of_few_rows_gives_no_verdict():
    assert Gap(0.2, 0.1, 0.3, 29).verdict == "few"
    assert Gap(0.2, 0.1, 0.3, 30).verdict == "beats"
    assert Gap(-0.2, -0.3, -0.1, 30).verdict == "loses"
    assert Gap(0.2, -0.1, 0.3, 30).verdict == "even"


def task(auc, pcoc=1.0, positives=5):
    return {"auc": auc, "gauc": auc, "log_loss": 0.1, "pcoc": pcoc, "num_samples": 10, "num_positives": positives}


def test_the_verdict_says_where_it_loses_and_what_is_unknown():
    cells = {
        "search": {"ctr": task(0.7, 1.1), "ctcvr": task(None, positives=0)},
        "live_feed": {"ctr": task(0.6, 0.998), "ctcvr": task(0.8)},
    }
    gaps = {
        ("search", "ctr"): Gap(0.1, 0.05, 0.15, 30),
        ("search", "ctcvr"): None,
        ("live_feed", "ctr"): Gap(-0.1, -0.15, -0.05, 30),
        ("live_feed", "ctcvr"): Gap(0.01, -0.02, 0.03, 30),
    }
    assert verdict(cells, gaps, ("search", "live_feed")) == [
        "The model ranks held-out clicks with an AUC of 0.7000 in search and 0.6000 in live feed.",
        "Against the popularity baseline it wins on search CTR, is level on live feed CTCVR and loses on live feed CTR "
        "(95% intervals).",
        "Predicted clicks are 10% too high in search and within 0.5% of those observed in live feed.",
        "Undefined: CTCVR in search (no positive row).",
    ]


@pytest.mark.parametrize(
    ("key", "changes", "reason"),
    [
        ("auc", {"num_samples": 0, "log_loss": None}, "no rows"),
        ("auc", {"log_loss": None}, "the model has no global heads"),
        ("pcoc", {"num_positives": 0}, "no positive row"),
        ("auc", {"num_positives": 10}, "no negative row"),
        ("gauc", {}, "no user with both labels"),
        ("ndcg_at_10", {}, "not computed in this evaluation"),
    ],
)
def test_every_dash_has_a_reason(key, changes, reason):
    assert why_undefined(key, task(None) | changes) == reason


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (0.4, 59.6, 200, 7500)] == ["0 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
