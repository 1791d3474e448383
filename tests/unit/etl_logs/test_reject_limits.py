"""The likely cause of many rejects, the account's totals, and what makes the default watermark. No JVM is started."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest

from etl.build.account import UNDATED, Account
from etl.build.inputs import watermark_of
from etl.build.reject_limits import _of_texts, beyond_limit, check_rejects, clock_shift, usual_gap
from etl.checks import DataCheckError, LogCount
from etl.kernel.attribution import LabelRules
from etl.kernel.events import KIND_CLICK, KIND_IMPRESSION, KIND_ORDER, NO_SCENARIO
from etl.logs.events import EventLog
from usr_ray.config import ConfigError, load_config

pytestmark = pytest.mark.unit

HOUR = 3_600_000_000
DAY = 24 * HOUR
MINUTE = 60_000_000
CLICKS = EventLog(name="feed_clicks", kind=KIND_CLICK, scenario=NO_SCENARIO, key="click_id", required=())


@pytest.mark.parametrize("hours", [-14, -2, -1, 1, 5, 14])
def test_a_clock_in_another_zone_is_recognised(hours: int) -> None:
    gaps = [[hours * HOUR + delay * MINUTE] for delay in (0, 1, 5, 20)]
    assert clock_shift(gaps, HOUR) == (hours, 4)


def test_clicks_that_are_merely_late_are_no_shift_of_most() -> None:
    assert clock_shift([[40 * HOUR], [50 * HOUR]], HOUR) is None
    found = clock_shift([[61 * MINUTE], [95 * MINUTE], [170 * MINUTE], [12345 * MINUTE]], HOUR)
    assert found is not None
    assert found[1] < 3


@pytest.mark.parametrize(
    ("gaps", "told"),
    [
        ([[20_469 * DAY + 12 * HOUR]] * 3, "20,469.5 days after"),  # seconds read as milliseconds: 1970
        ([[-33 * DAY], [-33 * DAY, 40 * DAY], [-32 * DAY]], "33.0 days before"),
        ([[90 * MINUTE], [125 * MINUTE], [600 * MINUTE]], "2.1 hours after"),
        ([[-61 * MINUTE]], "61.0 minutes before"),
        ([[1_500_000]], "1.5 seconds after"),
    ],
)
def test_how_far_the_rows_lie_is_told(gaps: list[list[int]], told: str) -> None:
    assert usual_gap(gaps) == told


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("1767225600", "s"),
        ("1767225600.25", "s"),
        ("1767225600000", "ms"),
        ("1767225600000000", "us"),
        ("1767225600000000000", "ns"),
    ],
)
def test_numbers_in_another_unit_are_recognised(text: str, unit: str) -> None:
    rows = [json.dumps({"event_time": "x", "event_time_as_written": text})] * 3
    told = _of_texts(CLICKS, "unparsable_event_time", rows)
    assert f"times in '{unit}'" in told
    assert f'logs.feed_clicks.time_format = "{unit}"' in told


def test_other_texts_are_shown() -> None:
    assert "such as '3 o''clock'".replace("''", "'") in _of_texts(
        CLICKS, "unparsable_event_time", [json.dumps({"event_time": "3 o'clock"})]
    ).replace('"', "'")
    assert "holds nothing" in _of_texts(CLICKS, "null_event_time", [json.dumps({"user_id": "u"})])


def test_an_account_judges_no_date_of_the_margin() -> None:
    """The click of an order of the 2nd may lie before 18:30 of the 1st; those of the 3rd lie behind it."""
    account = Account()
    account.read_from(micros("2026-01-01T18:30"), micros("2026-01-03T00:00"))
    assert (account.whole_from, account.judged_from) == (dt.date(2026, 1, 2), dt.date(2026, 1, 3))
    account.counts["orders", "2026-01-02"] += LogCount(rows_in=1, rejects=1)
    assert account.dates_without_impressions == []
    for date, rows in (("2026-01-02", 5), ("2026-01-03", 7), (UNDATED, 1)):
        account.counts["feed_clicks", date] += LogCount(rows_in=rows, rejects=rows)
        account.reasons["feed_clicks", date]["no_impression"] = rows
    assert account.total("feed_clicks") == LogCount(rows_in=8, rejects=8)
    assert account.rejects_of("feed_clicks") == {"no_impression": 8}


def test_an_id_that_many_rows_share_is_told() -> None:
    """As where impression_id is that of a page: all but one of its rows would be lost as duplicates.

    Collectors write some rows twice, and of a sparse log's 15 rows of a day chance makes two of them.
    """
    account = Account()
    logs = (("feed_impressions", 1000, 64), ("feed_clicks", 1000, 63), ("users", 10, 9), ("orders", 15, 2))
    for log, rows, duplicates in logs:
        account.counts[log, UNDATED] += LogCount(rows_in=rows, duplicates=duplicates, used=rows - duplicates)
    keys = {"feed_impressions": "impression_id", "feed_clicks": "click_id", "users": "user_id", "orders": "order_id"}
    assert account.duplicate_notes(keys) == [
        f"log {log}: {numbers} rows have the {key} of another row and are left out; where they are no copies, the id "
        f"is not unique: join columns in logs.{log}.columns"
        for log, numbers, key in (
            ("feed_impressions", "64 of 1,000", "impression_id"),
            ("users", "9 of 10", "user_id"),
        )
    ]


BOTH = [
    EventLog(name=name, kind=kind, scenario=0, key=key, required=())
    for name, kind, key in (
        ("feed_impressions", KIND_IMPRESSION, "impression_id"),
        ("feed_clicks", KIND_CLICK, "click_id"),
    )
]
NO_ROWS: Any = None
"""Rows that are looked at for the cause of rejects, of which there are none here."""


def checked(account: Account, *overrides: str) -> None:
    check_rejects(account, load_config(None, ['scenarios=["feed"]', *overrides]), BOTH, NO_ROWS, NO_ROWS)


def rejecting(**logs: dict[str, int] | int) -> Account:
    """Rejects of each log by reason, `<log>_in` its rows."""
    account = Account()
    for log, reasons in logs.items():
        if isinstance(reasons, dict):
            account.counts[log, "2026-01-02"] += LogCount(rows_in=int(str(logs[f"{log}_in"])))
            account.reasons[log, "2026-01-02"] = reasons
    return account


def test_the_line_is_about_the_first_log_on_the_way_to_an_order() -> None:
    """With clicks eight hours late all orders are without a click; the line sent people to the clock of the orders."""
    config = load_config(None, ['scenarios=["feed"]'])
    orders = EventLog(name="orders", kind=KIND_ORDER, scenario=NO_SCENARIO, key="order_id", required=())
    account = rejecting(
        orders={"no_click": 40}, orders_in=40, feed_clicks={"after_window": 90, "no_impression": 7}, feed_clicks_in=100
    )
    assert beyond_limit(account, config, [*BOTH, orders]) == ("feed_clicks", "after_window", 90, 100)
    account.counts["feed_impressions", "2026-01-02"] += LogCount(rows_in=50)
    account.reasons["feed_impressions", "2026-01-02"] = {"unparsable_event_time": 20}
    assert beyond_limit(account, config, [*BOTH, orders]) == ("feed_impressions", "unparsable_event_time", 20, 50)


def test_a_file_that_has_not_come_is_named_before_any_clock() -> None:
    """Without the day's clicks its orders have none: the line sent people to windows, clocks and time zones."""
    orders = EventLog(name="orders", kind=KIND_ORDER, scenario=NO_SCENARIO, key="order_id", required=())
    account = rejecting(orders={"no_click": 5}, orders_in=22)
    account.impression_dates = {"2026-01-01", "2026-01-02"}
    for log, rows in (("feed_impressions", (200, 210)), ("feed_clicks", (27, 0)), ("orders", (20, 0))):
        for date, number in zip(sorted(account.impression_dates), rows, strict=True):
            account.counts[log, date] += LogCount(rows_in=number)
    config = load_config(None, ['scenarios=["feed"]'])
    with pytest.raises(DataCheckError) as error:
        check_rejects(account, config, [*BOTH, orders], NO_ROWS, NO_ROWS)
    assert str(error.value) == (
        "log orders: 5 of 42 rows (11.9%) are rejected as no_click, more than limits.max_reject_share (0.05); log "
        "feed_clicks has no row of 2026-01-02: look whether a file of it is to come yet; if that is right, set "
        "limits.max_reject_shares.orders.no_click"
    )
    # Clicks are at home in their own scenario's impressions.
    account = rejecting(feed_clicks={"unknown_impression": 30}, feed_clicks_in=30)
    account.impression_dates = {"2026-01-01", "2026-01-02"}
    account.counts["feed_impressions", "2026-01-01"] += LogCount(rows_in=200)
    with pytest.raises(DataCheckError, match="log feed_impressions has no row of 2026-01-02: look whether"):
        check_rejects(account, config, [*BOTH, orders], NO_ROWS, NO_ROWS)


@pytest.mark.parametrize(
    ("rows_in", "allowed"),  # by hand: n / 20 + 2 sqrt(19 n / 400)
    [(1, 0), (5, 1), (10, 1), (68, 6), (100, 9), (10_000, 543), (1_000_000, 50_435)],
)
def test_chance_may_reject_a_few_of_few_rows(rows_in: int, allowed: int) -> None:
    """4 of 68 orders without a click stopped the build of a sparse scenario."""
    config = load_config(None, ['scenarios=["feed"]'])
    assert beyond_limit(rejecting(orders={"no_click": allowed}, orders_in=rows_in), config, BOTH) is None
    beyond = rejecting(orders={"no_click": allowed + 1}, orders_in=rows_in)
    assert beyond_limit(beyond, config, BOTH) == ("orders", "no_click", allowed + 1, rows_in)
    strict = load_config(None, ['scenarios=["feed"]', "limits.max_reject_share=0"])
    assert beyond_limit(rejecting(orders={"no_click": 1}, orders_in=rows_in), strict, BOTH) is not None
    lax = load_config(None, ['scenarios=["feed"]', "limits.max_reject_shares.orders.no_click=1.0"])
    assert beyond_limit(rejecting(orders={"no_click": rows_in}, orders_in=rows_in), lax, BOTH) is None


def test_a_clicks_log_without_a_row_is_refused() -> None:
    """A failed export: nothing is rejected, and every label would be 0."""
    account = Account(sources={"feed_clicks": "1 csv file"})
    account.counts["feed_impressions", "2026-01-02"] += LogCount(rows_in=1201, duplicates=1, used=1200)
    with pytest.raises(DataCheckError) as error:
        checked(account)
    assert str(error.value) == (
        "log feed_clicks: holds no row (1 csv file), so every label of 1,200 impressions would be 0; look at what "
        "writes it; if that is right, set a share under limits.max_reject_shares.feed_clicks"
    )
    checked(account, "limits.max_reject_shares.feed_clicks.no_impression=1.0")
    checked(Account())  # no impression, no label


def test_of_the_days_behind_a_margin_a_clicks_log_may_have_no_row() -> None:
    """A small shop's day; that other days are lost is told by etl/build/held.py."""
    account = Account()
    account.read_from(micros("2026-01-01T18:30"), micros("2026-01-03T00:00"))
    account.counts["feed_impressions", "2026-01-03"] += LogCount(rows_in=12, used=12)
    checked(account)


def micros(time: str) -> int:
    return round(dt.datetime.fromisoformat(f"{time}+00:00").timestamp() * 1e6)


def used(**days: tuple[int, int]) -> Account:
    return Account(used_days={int(day[1:]): found for day, found in days.items()})


RULES = LabelRules(click_window=HOUR, order_window=24 * HOUR, global_window=HOUR)
FINAL = 11 * DAY + 25 * HOUR
"""When the labels of day 10 are final."""


def test_the_watermark_is_the_newest_used_event_of_the_dates_that_decide() -> None:
    assert watermark_of(used(d10=(10 * DAY + HOUR, 9)), None, [9, 10], RULES) == 10 * DAY + HOUR
    assert watermark_of(used(d10=(10 * DAY, 9), d11=(11 * DAY + HOUR, 2)), None, [10], RULES) == 11 * DAY + HOUR


def test_the_watermark_is_never_later_than_what_the_last_built_date_needs() -> None:
    later = used(d10=(10 * DAY, 900), d20=(20 * DAY, 900))
    assert watermark_of(later, None, [9, 10], RULES) == FINAL


@pytest.mark.parametrize("stray", [(2_932_896 * DAY, 1)])
def test_one_event_of_the_year_9999_makes_nothing_final(stray: tuple[int, int]) -> None:
    assert watermark_of(used(d10=(10 * DAY + HOUR, 500), d2932896=stray), None, [10], RULES) == 10 * DAY + HOUR


def test_a_watermark_that_is_asked_for_stays_and_no_event_makes_none() -> None:
    asked = dt.datetime(1970, 1, 3, tzinfo=dt.UTC)
    assert watermark_of(used(d10=(10 * DAY, 9)), asked, [10], RULES) == 2 * DAY
    assert watermark_of(Account(), None, [10], RULES) == 0


def test_a_share_of_one_reason_of_one_log_goes_before_the_share_of_all() -> None:
    limits = load_config(None, ["limits.max_reject_shares.orders.no_click=0.6"]).limits
    assert limits.reject_share("orders", "no_click") == 0.6
    with pytest.raises(
        ConfigError, match=r"^limits.max_reject_shares.orders.noclick: no such reason; choose from: null_"
    ):
        load_config(None, ["limits.max_reject_shares.orders.noclick=0.6"])
    assert limits.reject_share("orders", "before_click") == limits.reject_share("search_clicks", "no_click") == 0.05
