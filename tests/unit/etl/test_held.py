"""What the logs have lost since the lake was built from them is never taken out of it without a word. No JVM."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest

from etl.build.account import UNDATED, Account
from etl.build.held import check_earlier, check_restated, not_built, silent_logs
from etl.build.restate import _recounted
from etl.build.state import State, mark_of
from etl.checks import DataCheckError, LogCount
from etl.kernel.attribution import LabelRules
from etl.kernel.user_pass import PassPlan
from etl.lake.tables import Lake

pytestmark = pytest.mark.unit

LAKE = Lake("/lake")
HOUR = 3_600_000_000
RULES = LabelRules(click_window=HOUR, order_window=24 * HOUR, global_window=HOUR)
PLAN = PassPlan(rules=RULES, num_scenarios=2, history_length=5, days=(), since=0)
LOGS = ("search_impressions", "search_clicks", "feed_impressions", "feed_clicks", "orders")
READ = "2026-01-{:02}"
STATE = State(version=3, complete_until=dt.date(2026, 1, 8))


def day(number: int) -> dt.date:
    return dt.date(2026, 1, number)


def account(
    first: int, last: int, *, whole_from: int | None = None, without: tuple[tuple[str, int], ...] = ()
) -> Account:
    """30 rows a log on each of the days first..last, but of `without`; of the day before `whole_from` a part."""
    made = Account(whole_from=whole_from and day(whole_from), sources=dict.fromkeys(LOGS, "1 csv file"))
    for number in range(first, last + 1):
        for log in LOGS:
            if (log, number) not in without:
                made.counts[log, READ.format(number)] += LogCount(rows_in=30, used=30)
        made.impression_dates.add(READ.format(number))
    return made


def reports(first: int, last: int, used: int = 30) -> dict[str, dict[str, Any]]:
    rows = {log: {"rows_in": used, "used": used} for log in LOGS}
    return {READ.format(number): {"rows": rows} for number in range(first, last + 1)}


def restated(found: Account, first: int, last: int, built: int = 8, state: State = STATE) -> list[str]:
    return check_restated(LAKE, reports(1, built), found, state, PLAN, reports(first, last))


def test_a_restatement_whose_logs_are_whole_passes() -> None:
    assert restated(account(1, 8), 1, 8) == []
    # The margin of day 6 begins within day 3.
    assert restated(account(3, 8, whole_from=4), 6, 8) == []


def test_a_restatement_names_the_dates_whose_logs_are_whole() -> None:
    """Of the margin too: clicks of the first restated day belong to impressions of the day before."""
    for found, gone in ((account(4, 8), "2026-01-01:2026-01-03"), (account(4, 8, whole_from=3), "2026-01-03")):
        with pytest.raises(DataCheckError) as error:
            restated(found, 1, 8)
        assert str(error.value) == (
            f"--restate: log search_impressions has no row any more of {gone} (and 4 more logs), which /lake was built "
            "from and would lose; name the dates whose logs are whole: --dates 2026-01-06:2026-01-08 (of "
            "jobs/daily.py --restate-days 3); a date whose logs are right as they are is built anew without --restate"
        )


def test_logs_that_were_cleared_in_the_middle_of_a_day_are_not_whole_on_it() -> None:
    found = account(4, 8)
    found.counts["orders", "2026-01-04"] = LogCount(rows_in=5, used=5)
    with pytest.raises(
        DataCheckError, match=r"are whole: --dates 2026-01-07:2026-01-08 \(of jobs/daily.py --restate-days 2\); "
    ):
        restated(found, 1, 8)


@pytest.mark.parametrize("log", LOGS)
def test_no_log_can_be_lost_alone(log: str) -> None:
    with pytest.raises(DataCheckError, match=rf"^--restate: log {log} has no row any more of 2026-01-02, which"):
        restated(account(1, 8, without=((log, 2),)), 1, 8)
    # A later date too: the state behind the restated dates is replaced with them.
    with pytest.raises(
        DataCheckError, match=rf"{log} has no row any more of 2026-01-08, .*; name logs that have them; "
    ):
        restated(account(1, 8, without=((log, 8),)), 1, 4)
    with pytest.raises(
        DataCheckError, match=r"name logs that have them, or bring /lake/state back as .* \(RESTORE\); "
    ):
        restated(account(1, 8, without=((log, 2),)), 5, 8, state=State())


def test_a_log_may_have_become_several_of_its_kind() -> None:
    found = account(1, 3, without=tuple(("orders", number) for number in (1, 2, 3)))
    del found.sources["orders"]
    with pytest.raises(DataCheckError, match=r"log orders has no row any more of 2026-01-01:2026-01-03"):
        restated(found, 1, 3, built=3)
    found.sources |= dict.fromkeys(("search_orders", "feed_orders"), "1 csv file")
    for number in (1, 2, 3):
        for log in ("search_orders", "feed_orders"):
            found.counts[log, READ.format(number)] += LogCount(rows_in=15, used=15)
    assert restated(found, 1, 3, built=3) == []


def test_rows_that_are_partly_gone_are_told() -> None:
    found = account(1, 3)
    found.counts["orders", "2026-01-02"] = LogCount(rows_in=29, used=29)
    assert restated(found, 1, 3, built=3) == [
        "log orders: has fewer rows of 2026-01-02 than the lake was built from; it loses what is gone"
    ]


def test_a_build_needs_its_margin_and_not_the_old_rows_of_its_own_dates() -> None:
    state = State(since=day(6), version=3, complete_until=day(5))
    assert check_earlier(LAKE, reports(1, 5), account(3, 6, whole_from=4), state, [day(6)]) == []
    own = account(3, 6, whole_from=4, without=(("feed_clicks", 6),))
    assert check_earlier(LAKE, reports(1, 8), own, state, [day(6)]) == []
    with pytest.raises(DataCheckError) as error:
        check_earlier(LAKE, reports(1, 5), account(5, 6, whole_from=4), state, [day(6)])
    assert str(error.value) == (
        "--dates 2026-01-06:2026-01-06: log search_impressions has no row any more of 2026-01-04 (and 4 more logs), "
        "which /lake was built from and these dates need again; name logs that reach back to 2026-01-04; where they "
        "are right, build from 2026-01-04 on"
    )


def test_a_build_without_a_state_needs_all_that_the_lake_was_built_from() -> None:
    assert check_earlier(LAKE, {}, account(3, 6), State(), [day(6)]) == []
    assert check_earlier(LAKE, reports(3, 5), account(3, 6), State(), [day(6)]) == []
    with pytest.raises(DataCheckError) as error:
        check_earlier(LAKE, reports(1, 5), account(3, 6), State(), [day(6)])
    assert str(error.value) == (
        "--dates 2026-01-06:2026-01-06: log search_impressions has no row any more of 2026-01-01:2026-01-02 (and 4 "
        "more logs), which /lake was built from and these dates need again without a state; name logs that have them, "
        "or bring /lake/state back as its last build left it (RESTORE), or a new --lake"
    )


def test_a_date_that_is_left_out_of_the_build_keeps_its_state() -> None:
    """With data.allow_missing_dates: the state from the first date asked for on is replaced."""
    state = State(since=day(4), version=3, complete_until=day(6))
    with pytest.raises(DataCheckError, match=r"has no row any more of 2026-01-04 "):
        check_earlier(LAKE, reports(1, 6), account(5, 6, whole_from=4), state, [day(5), day(6)])


def test_dates_that_came_after_the_lake_was_built_past_them_are_told() -> None:
    """Nothing of the 3rd and the 4th had come when the 5th was built; the 1st lies before the lake, the 9th behind."""
    lake = {date: report for date, report in reports(2, 8).items() if date not in ("2026-01-03", "2026-01-04")}
    late = account(1, 9)
    late.counts["search_impressions", UNDATED] += LogCount(rows_in=5, used=5)
    assert not_built(LAKE, lake, late) == [
        "the logs hold 120 impressions on 2026-01-03:2026-01-04, of which /lake has no row; what came that late is "
        "built by --dates 2026-01-03 (of jobs/daily.py --date 2026-01-03)"
    ]
    assert not_built(LAKE, lake, account(2, 8, without=(("search_impressions", 3), ("feed_impressions", 3)))) == [
        "the logs hold 60 impressions on 2026-01-04, of which /lake has no row; what came that late is built by "
        "--dates 2026-01-04 (of jobs/daily.py --date 2026-01-04)"
    ]
    assert not_built(LAKE, reports(2, 8), late) == []
    assert not_built(LAKE, lake, account(4, 8, whole_from=5)) == []  # of the 4th a part is read, as a margin


def test_users_and_items_that_are_more_every_day_count_no_old_date_anew() -> None:
    """Only its own rows make a date's report stale: else each restatement would read the whole lake."""
    date = READ.format(3)
    report = {"rows": {log: {"rows_in": 30, "used": 30, "duplicates": 0, "rejects": 0} for log in LOGS}, "rejects": {}}
    report["undated"] = {"rows": {"items": {"rows_in": 7, "used": 7, "duplicates": 0, "rejects": 0}}}
    found = account(1, 8)
    found.counts["items", UNDATED] += LogCount(rows_in=8, used=8)
    assert not _recounted(date, report, found)
    found.add_rejects("feed_clicks", date, "unknown_impression", 1)
    assert _recounted(date, report, found)


def test_a_log_that_is_silent_on_a_date_is_told() -> None:
    late = account(1, 3, without=(("feed_impressions", 3), ("feed_clicks", 3)))
    assert silent_logs(late, [day(2), day(3)]) == [
        f"log {log}: no row on 2026-01-03, where other logs have some; if a file is to come yet, its rows are missing "
        "and labels are called final without it until --restate"
        for log in ("feed_clicks", "feed_impressions")
    ]
    assert silent_logs(late, [day(1), day(2)]) == []
    late.counts["orders", "2026-01-02"] = late.counts["orders", "2026-01-03"] = LogCount()
    assert len(silent_logs(late, [day(3)])) == 2, "a log of ten rows a day may have none"
    # A day's build reads two days whole: the log has 30 rows on the other one.
    assert len(silent_logs(account(2, 3, without=(("feed_clicks", 3),)), [day(3)])) == 1


def test_a_log_of_labels_without_any_row_is_told_however_small_the_shop() -> None:
    empty = account(1, 3, without=tuple(("orders", number) for number in (1, 2, 3)))
    told = "orders: no row{} (1 csv file), so what it would label is 0 and called final; if that is not so, build again"
    for number in (1, 2, 3):
        empty.counts["orders", READ.format(number)] += LogCount()
    assert silent_logs(empty, [day(3)]) == [f"log {told.format('')} with its rows"]
    empty.whole_from = day(2)
    assert silent_logs(empty, [day(3)]) == [f"log {told.format(' from 2026-01-02 on')} with its rows"]


def test_a_log_without_a_row_in_a_report_is_no_log_that_it_knew() -> None:
    """`orders` became those of two scenarios, whose empty logs were there already."""
    before = reports(1, 1)
    before[READ.format(1)]["rows"]["feed_orders"] = {"rows_in": 0, "used": 0}
    now = account(1, 1, without=(("orders", 1),))
    del now.sources["orders"]
    now.sources["feed_orders"] = "1 csv file"
    now.counts["feed_orders", READ.format(1)] += LogCount(rows_in=30, used=30)
    assert check_restated(LAKE, before, now, STATE, PLAN, before) == []


MARK = {"complete_until": "2026-01-05", "meaning": "m"}


def commits(*operations: tuple[str, Any]) -> list[dict[str, Any]]:
    """Newest first: an operation with its mark, or with the version it restores."""
    return [
        {
            "version": len(operations) - 1 - n,
            "operation": operation,
            "operationParameters": {"version": more} if isinstance(more, str) else {},
            "userMetadata": json.dumps(more) if isinstance(more, dict) else None,
        }
        for n, (operation, more) in enumerate(operations)
    ]


@pytest.mark.parametrize(
    "operation", ["OPTIMIZE", "REORG", "VACUUM END", "UNSET TBLPROPERTIES", "DROP CONSTRAINT", "COMPUTE STATS"]
)
def test_what_leaves_the_rows_as_they_are_leaves_the_trust(operation: str) -> None:
    assert mark_of(commits((operation, None), ("WRITE", MARK), ("CREATE TABLE", None))) == MARK


@pytest.mark.parametrize(
    "theirs",
    ["fixed by hand", "[]", "5", '{"complete_until": "soon", "meaning": "m"}', '{"complete_until": "2026-01-05"}'],
)
def test_another_job_s_note_on_a_commit_is_no_mark(theirs: str) -> None:
    """Whoever writes to a Delta table may note what he likes on his commit."""
    (newest, *older) = commits(("DELETE", None), ("WRITE", MARK), ("CREATE TABLE", None))
    assert mark_of([newest | {"userMetadata": theirs}, *older]) == {}
    assert mark_of([newest | {"userMetadata": theirs, "operation": "OPTIMIZE"}, *older]) == MARK


def test_rows_that_somebody_changed_are_not_trusted_and_restored_ones_are() -> None:
    older = MARK | {"complete_until": "2026-01-04"}
    changed = (("DELETE", None), ("WRITE", MARK), ("WRITE", older), ("CREATE TABLE", None))
    assert mark_of(commits(*changed)) == {}
    assert mark_of(commits(("RESTORE", "2"), *changed)) == MARK
    assert mark_of(commits(("RESTORE", "1"), *changed)) == older
    assert mark_of(commits(("RESTORE", "3"), *changed)) == {}
    assert mark_of(commits(("RESTORE", None), *changed)) == {}, "by time: nobody knows which version"
    assert mark_of(commits(("RESTORE", "4"), ("RESTORE", "2"), *changed)) == MARK
    assert mark_of([]) == {}
