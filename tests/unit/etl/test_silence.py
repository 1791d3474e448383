"""Hours without a click or an order where many are usual, by hand."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

from etl.build.silence import MOST, NEVER, Hour, silence

pytestmark = pytest.mark.unit


LATER = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)


def hour(day: int, number: int) -> dt.datetime:
    return dt.datetime(2026, 1, day, number, tzinfo=dt.UTC)


def two_days(**silent: tuple[int, int]) -> dict[tuple[dt.datetime, str], Hour]:
    """Two days of 100 impressions an hour with 10 clicks and 1 order each, but for spans of hours of day 2."""
    hours = {}
    for day in (1, 2):
        for number in range(24):
            has = {
                label: day == 1 or not (label in silent and silent[label][0] <= number < silent[label][1])
                for label in ("clicks", "orders")
            }
            hours[hour(day, number), "search"] = Hour(100, 10 * has["clicks"], 100, 1 * has["orders"])
    return hours


def test_a_clicks_log_that_ends_before_the_impressions_is_told_with_its_hours() -> None:
    (line,) = silence(two_days(clicks=(12, 24)), ["search"], LATER, ["search"])
    assert line == (
        "search: none of the 1,200 impressions from 2026-01-02 12:00 to 2026-01-03 00:00 was clicked, where 120 are "
        "usual; do the clicks logs hold these hours?"
    )


def test_hours_that_chance_may_leave_empty_and_whole_logs_are_not_told() -> None:
    assert silence(two_days(), ["search"], LATER, []) == []
    assert silence(two_days(clicks=(12, 14)), ["search"], LATER, []) == []  # 20 clicks are usual, fewer than 25
    assert len(silence(two_days(clicks=(12, 15)), ["search"], LATER, [])) == 1


@pytest.mark.parametrize(("days", "rows", "rate"), [(14, 20, 0.005), (14, 50, 0.002), (14, 5, 0.02), (30, 100, 0.0005)])
def test_a_whole_log_of_few_orders_is_not_told(days: int, rows: int, rate: float) -> None:
    """Most hours have none, and a span of them is as long as chance makes it."""
    for seed in range(5):
        draws = np.random.default_rng(seed).binomial(rows, rate, (days, 24))
        hours = {
            (hour(1 + day, number), "feed"): Hour(rows, 1, rows, int(draws[day, number]))
            for day in range(days)
            for number in range(24)
        }
        assert silence(hours, ["feed"], LATER, []) == []


def test_clicks_that_may_still_come_are_not_missed() -> None:
    lost = two_days(clicks=(20, 24))
    assert len(silence(lost, ["search"], hour(3, 0), [])) == 1
    assert silence(lost, ["search"], hour(2, 22), []) == []  # two hours are final: 20 clicks
    assert silence(lost, ["search"], hour(2, 22) + dt.timedelta(minutes=59), []) == []


def test_orders_count_on_mature_rows_and_where_somebody_logs_them() -> None:
    lost = two_days(orders=(0, 24))  # 24 orders are usual
    assert silence(lost, ["search"], LATER, []) == []
    lost[hour(3, 0), "search"] = Hour(1_000, 100, 100, 0)  # of its rows 100 are mature
    (line,) = silence(lost, ["search"], LATER, [])
    assert line.startswith(
        "search: none of the 2,500 impressions from 2026-01-02 00:00 to 2026-01-03 01:00 was ordered"
    )
    assert line.endswith("where 25 are usual; do the orders logs hold these hours?")
    assert silence(lost, ["search"], LATER, ["search"]) == []


def test_what_is_not_clicked_is_not_told_again_as_not_ordered() -> None:
    hours = {(hour(1, n), "feed"): Hour(1_000, 100 * (n < 12), 1_000, 30 * (n < 6)) for n in range(24)}
    clicks, orders = silence(hours, ["feed"], LATER, [])
    assert "the 12,000 impressions from 2026-01-01 12:00 to 2026-01-02 00:00 was clicked, where 1,200 are" in clicks
    assert "the 6,000 impressions from 2026-01-01 06:00 to 2026-01-01 12:00 was ordered, where 180 are" in orders


def test_a_night_without_impressions_ends_no_span_and_scenarios_are_judged_apart() -> None:
    hours = {(hour(1, number), "feed"): Hour(50, 10, 0, 0) for number in range(12)}
    hours |= {(hour(1, 22), "feed"): Hour(70, 0, 0, 0), (hour(2, 6), "feed"): Hour(60, 0, 0, 0)}
    hours |= {(hour(2, 3), "feed"): Hour(0, 0, 0, 0), (hour(2, 3), "search"): Hour(50, 10, 0, 0)}
    (line,) = silence(hours, ["search", "feed"], LATER, [])
    assert line.startswith("feed: none of the 130 impressions from 2026-01-01 22:00 to 2026-01-02 07:00")
    assert "where 26 are usual" in line


def test_dates_without_any_click_are_told_where_the_impressions_are_many() -> None:
    few = {(hour(1, 0), "feed"): Hour(NEVER - 1, 0, 0, 0)}
    assert silence(few, ["feed"], LATER, []) == []
    many = {(hour(1, 0), "feed"): Hour(NEVER, 0, 0, 0)}
    (line,) = silence(many, ["feed"], LATER, [])
    assert line == (
        "feed: none of the 1,000 impressions from 2026-01-01 00:00 to 2026-01-01 01:00 was clicked; do the clicks logs "
        "hold these hours?"
    )


def test_of_many_spans_the_first_are_told() -> None:
    hours = {(hour(1 + number // 24, number % 24), "feed"): Hour(600, 60 * (number % 2), 0, 0) for number in range(12)}
    lines = silence(hours, ["feed"], LATER, [])
    assert len(lines) == MOST
    assert lines[-1].endswith("do the clicks logs hold these hours? 3 more such spans follow")
