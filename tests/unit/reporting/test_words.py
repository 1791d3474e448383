"""Sentences and words of the run's report."""

from __future__ import annotations

import pytest

from usr_ray.evaluation.statistics import Judged, PairedGap
from usr_ray.reporting.page import duration, p_value, span
from usr_ray.reporting.run import verdict, why_undefined

pytestmark = pytest.mark.unit


def judged(value, half, adjusted_p):
    return Judged(
        gap=PairedGap(value, value - half, value + half, adjusted_p, (value,), 0.0, half / 2, 50, 100),
        adjusted_p=adjusted_p,
    )


def task(auc, pcoc=1.0, positives=10_000):
    return {"auc": auc, "gauc": auc, "log_loss": 0.1, "pcoc": pcoc, "num_samples": 100_000, "num_positives": positives}


def test_the_verdict_says_where_it_loses_and_what_is_unknown():
    cells = {
        "search": {"ctr": task(0.7, 1.1), "ctcvr": task(None, positives=0)},
        "live_feed": {"ctr": task(0.6, 0.998), "ctcvr": task(0.8)},
    }
    gaps = {
        ("search", "ctr"): judged(0.1, 0.05, 0.001),
        ("search", "ctcvr"): Judged(gap=None),
        ("live_feed", "ctr"): judged(-0.1, 0.05, 0.001),
        ("live_feed", "ctcvr"): judged(0.01, 0.02, 0.3),
    }
    pcocs = {"search": (1.02, 1.18), "live_feed": (0.9, 1.1)}
    assert verdict(cells, gaps, ("search", "live_feed"), pcocs) == [
        "The model ranks held-out clicks with an AUC of 0.7000 in search and 0.6000 in live feed.",
        "Against the popularity baseline it wins on search CTR, shows no clear difference on live feed CTCVR and "
        "loses on live feed CTR (at 5%, corrected for all comparisons).",
        "Predicted clicks are 10% too high in search and within 0.5% of those observed in live feed.",
        "Undefined: CTCVR in search (no positive row).",
    ]


@pytest.mark.parametrize(
    ("pcoc", "interval", "says"),
    [
        (1.31, (0.98, 1.64), "31% above those observed, which may be chance, in search"),
        (1.31, (1.01, 1.61), "31% too high in search"),
        (0.75, (0.4, 1.1), "25% below those observed, which may be chance, in search"),
        (0.75, (0.6, 0.9), "25% too low in search"),
        (0.75, None, "25% below those observed in search"),
        (1.004, (1.001, 1.007), "within 0.5% of those observed in search"),
    ],
)
def test_predicted_clicks_are_too_high_only_beyond_chance(pcoc, interval, says):
    intervals = {"search": interval} if interval else {}
    assert (
        verdict({"search": {"ctr": task(0.7, pcoc)}}, {}, ("search",), intervals)[-1] == f"Predicted clicks are {says}."
    )


def test_it_beats_popularity_everywhere_only_where_everything_was_compared():
    cells = {"search": {"ctr": task(0.7), "ctcvr": task(0.7)}}
    gaps = {("search", "ctr"): judged(0.1, 0.05, 0.001), ("search", "ctcvr"): judged(0.1, 0.05, 0.001)}
    beats = "It beats the popularity baseline in every scenario and task"
    assert verdict(cells, gaps, ("search",), {})[1] == f"{beats}, after correction for all of them."
    gaps["search", "ctcvr"] = Judged(gap=None)
    assert (
        verdict(cells, gaps, ("search",), {})[1] == f"{beats} that can be compared, after correction for all of them."
    )
    assert not any(
        "popularity" in text for text in verdict(cells, dict.fromkeys(gaps, Judged(gap=None)), ("search",), {})
    )


@pytest.mark.parametrize(
    ("key", "changes", "reason"),
    [
        ("auc", {"num_samples": 0, "log_loss": None}, "no rows"),
        ("auc", {"log_loss": None}, "the model has no global heads"),
        ("pcoc", {"num_positives": 0}, "no positive row"),
        ("auc", {"num_positives": 100_000}, "no negative row"),
        ("gauc", {}, "no user with both labels"),
        ("ndcg_at_10", {}, "not computed in this evaluation"),
        ("ndcg_at_10", {"ndcg_at_10": None}, "no request with both labels"),
    ],
)
def test_every_dash_has_a_reason(key, changes, reason):
    assert why_undefined(key, task(None) | changes) == reason


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (0.4, 59.6, 200, 7500)] == ["0 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]


def test_dates_and_p_values_are_read_at_a_glance():
    assert [span(d) for d in ("2026-01-01:2026-01-02", "2026-01-02:2026-01-02", "2026-01-02", None)] == [
        "2026-01-01 to 2026-01-02",
        "2026-01-02",
        "2026-01-02",
        "",
    ]
    assert [p_value(p) for p in (0.04999, 0.00009, 0.0, None)] == ["0.0500", "<0.0001", "<0.0001", "\N{EN DASH}"]
