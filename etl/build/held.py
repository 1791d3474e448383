"""Do the logs still hold what the lake was built from? A pass takes out of the lake, state included, what they lost."""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from etl.build.account import Account, as_text
from etl.build.state import State
from etl.checks import DataCheckError
from etl.kernel.user_pass import PassPlan
from etl.lake.tables import Lake
from usr_ray.config import DAY_US, SHOWN_RANGES, date_of, date_ranges
from usr_ray.schema import STATE

Reports = Mapping[str, Mapping[str, Any]]
"""Date -> its report."""


def check_restated(
    lake: Lake, reports: Reports, account: Account, state: State, plan: PassPlan, asked: Collection[str]
) -> list[str]:
    """What a restatement is made of and what it replaces of the state is there; warnings of what is there in part.

    Args:
        reports: of every date of the lake.
        state: as found; without a version nothing of earlier dates can be taken from it.
        plan: of the pass that has made the account.
        asked: dates to restate.

    Raises:
        DataCheckError: a log has no row of a date any more that it had some of.
    """
    lost, fewer = _lost(reports, account)
    if lost:
        last = dt.date.fromisoformat(max(map(max, lost.values())))
        cut = last + dt.timedelta(days=1)  # logs may be cleared in the middle of a day
        last = cut if any(cut.isoformat() in dates for dates in fewer.values()) else last
        whole = sorted(date for date in asked if (read_whole(dt.date.fromisoformat(date), plan)) > last)
        way_out = "name logs that have them"
        if state.version is None:
            way_out = _without_state(lake)
        elif whole:
            span = (dt.date.fromisoformat(whole[-1]) - dt.date.fromisoformat(whole[0])).days + 1
            way_out = (
                f"name the dates whose logs are whole: --dates {whole[0]}:{whole[-1]} (of jobs/daily.py "
                f"--restate-days {span})"
            )
        raise DataCheckError(
            f"--restate: {_named(lost)}, which {lake.root} was built from and would lose; {way_out}; a date whose logs "
            "are right as they are is built anew without --restate"
        )
    return _notes(fewer)


def read_whole(first: dt.date, plan: PassPlan) -> dt.date:
    """The first date that a pass reads whole which takes from the state what lies before `first`."""
    row = State(since=first).first_row(plan.rules, whole_days=bool(plan.max_user_day_rows))
    return date_of(-(-(row or 0) // DAY_US))


def check_earlier(
    lake: Lake, reports: Reports, account: Account, state: State, built: Collection[dt.date]
) -> list[str]:
    """What a build's dates are made of besides their own logs is there; warnings of what is there in part.

    Args:
        reports: of every date of the lake.
        state: what the build takes from earlier builds.
        built: the dates whose rows it makes; they may have other logs than before.

    Raises:
        DataCheckError: a log has no row of an earlier date any more that it had some of.
    """
    last = max(built).isoformat()
    names = {date.isoformat() for date in built}
    lost, fewer = _lost({d: r for d, r in reports.items() if d <= last and d not in names}, account)
    if lost:
        dates = sorted(names)
        first = min(map(min, lost.values()))
        way_out = (
            f"{_without_state(lake)}, or a new --lake"
            if state.since is None
            else f"name logs that reach back to {account.whole_from}; where they are right, build from {first} on"
        )
        raise DataCheckError(
            f"--dates {dates[0]}:{dates[-1]}: {_named(lost)}, which {lake.root} was built from and these dates need "
            f"again{' without a state' if state.since is None else ''}; {way_out}"
        )
    return _notes(fewer)


def not_built(lake: Lake, reports: Reports, account: Account) -> list[str]:
    """A warning of dates that had no impression when the lake was built past them, and have some now.

    Args:
        reports: of every date of the lake.
    """
    whole = as_text(account.whole_from)
    rows: Counter[str] = Counter()
    for (log, date), count in account.counts.items():
        if log.endswith("_impressions") and date not in reports and max(min(reports), whole) <= date < max(reports):
            rows[date] += count.used
    missed = sorted(date for date, used in rows.items() if used)
    if not missed:
        return []
    return [
        f"the logs hold {rows.total():,} impressions on {date_ranges(missed, most=SHOWN_RANGES)}, of which {lake.root} "
        f"has no row; what came that late is built by --dates {missed[0]} (of jobs/daily.py --date {missed[0]})"
    ]


def silent_logs(account: Account, built: Collection[dt.date]) -> list[str]:
    """Warnings of logs without a row at all, or on a date to be built, as where a file has not come yet."""
    whole = as_text(account.whole_from)
    rows: Counter[str] = Counter()
    for (log, _), count in account.counts.items():
        rows[log] += count.rows_in
    silent = account.silent({str(date) for date in built})
    notes = []
    for log in sorted(rows):
        if not rows[log] and not log.endswith("_impressions"):
            notes.append(
                f"log {log}: no row{f' from {whole} on' if whole else ''} ({account.sources.get(log) or 'no file'}), "
                "so what it would label is 0 and called final; if that is not so, build again with its rows"
            )
        if log in silent:
            notes.append(
                f"log {log}: no row on {date_ranges(silent[log], most=SHOWN_RANGES)}, where other logs have some; if a "
                "file is to come yet, its rows are missing and labels are called final without it until --restate"
            )
    return notes


def _lost(reports: Reports, account: Account) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Log -> dates read whole of which it had used rows and has none now; and those of which it has fewer."""
    lost: dict[str, list[str]] = defaultdict(list)
    fewer: dict[str, list[str]] = defaultdict(list)
    whole = as_text(account.whole_from)
    for date, report in sorted(reports.items()):
        for log, before in report["rows"].items() if date >= whole else ():
            now = _rows_in(account, log, date, {name for name, rows in report["rows"].items() if rows["rows_in"]})
            if now < before["used"]:
                (fewer if now else lost)[log].append(date)
    return lost, fewer


def _rows_in(account: Account, log: str, date: str, known: Collection[str]) -> int:
    """Rows of a log on a date; of a log that no longer exists (`orders`, say) those of new ones of its kind."""
    names = [log]
    if log not in account.sources:
        kind = log.rpartition("_")[2]
        names = [name for name in account.sources if name.rpartition("_")[2] == kind and name not in known]
    return sum(account.counts[name, date].rows_in for name in names if (name, date) in account.counts)


def _notes(fewer: Mapping[str, Collection[str]]) -> list[str]:
    return [
        f"log {log}: has fewer rows of {date_ranges(dates, most=SHOWN_RANGES)} than the lake was built from; it loses "
        "what is gone"
        for log, dates in fewer.items()
    ]


def _without_state(lake: Lake) -> str:
    return f"name logs that have them, or bring {lake.path(STATE)} back as its last build left it (RESTORE)"


def _named(lost: Mapping[str, Collection[str]]) -> str:
    log = max(lost, key=lambda log: len(lost[log]))
    others = f" (and {len(lost) - 1} more {'logs' if len(lost) > 2 else 'log'})" if len(lost) > 1 else ""
    return f"log {log} has no row any more of {date_ranges(lost[log], most=SHOWN_RANGES)}{others}"
