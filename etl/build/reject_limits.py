"""Too many rejected rows stop a build before it writes anything, in one line that names the likely cause.

Clicks on another clock would all be rejected and every label be 0; times in another unit lose half a log. Both are
mistakes of the configuration, which the times themselves give away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.build.account import Account, as_text, most_by_chance
from etl.checks import DataCheckError
from etl.kernel.events import KIND_CLICK, KIND_IMPRESSION, NO_SCENARIO
from etl.kernel.user_pass import OVER_LIMIT
from etl.logs.events import EventLog
from etl.logs.mapping import as_written
from usr_ray.config import SHOWN_RANGES, Config, date_ranges
from usr_ray.config.logs import TIME_UNITS_NS

_SAMPLE = 2000
"""Rejected rows that are looked at for the cause."""
_HOUR_US = 3_600_000_000
_SENSIBLE_S = (946_684_800, 4_102_444_800)
"""The years 2000 to 2099 in seconds since 1970."""


def check_rejects(
    account: Account, config: Config, logs: Sequence[EventLog], rejected: DataFrame, events: DataFrame
) -> None:
    """Every log keeps within limits.max_reject_share for each reason, and no log of clicks is without any.

    Args:
        config: the limits, and the windows that a shifted clock is looked for with.
        rejected: `reject` rows of the pass.
        events: all event rows; read again where clicks or orders miss their impressions.

    Raises:
        DataCheckError: a share is too large; or no click is used, so that every label would be 0.
    """
    by_name = {log.name: log for log in logs}
    found = beyond_limit(account, config, logs)
    if found is not None:
        log, reason, rows, rows_in = found
        cause = ""
        if log in by_name:
            cause = _missing(by_name[log], account, logs) or _cause(by_name[log], reason, rejected, events, config)
        limit = config.limits.reject_share(log, reason)
        raise DataCheckError(
            f"log {log}: {rows:,} of {rows_in:,} rows ({rows / rows_in:.1%}) are rejected as {reason}, more than "
            f"limits.max_reject_share ({limit:g}); {cause}if that is right, set limits.max_reject_shares.{log}.{reason}"
        )
    impressions = {log.scenario: log.name for log in logs if log.kind == KIND_IMPRESSION}
    for clicks in (log for log in logs if log.kind == KIND_CLICK):
        total, reasons = account.total(clicks.name), account.rejects_of(clicks.name)
        if total.used or clicks.name in config.limits.max_reject_shares:
            continue
        shown = account.total(impressions[clicks.scenario]).used
        # Of a few days a small shop may have none: those that earlier builds knew of are missed in etl/build/held.py.
        if not total.rows_in and shown and account.judged_from is None:
            raise DataCheckError(
                f"log {clicks.name}: holds no row ({account.sources.get(clicks.name) or 'no file'}), so every label of "
                f"{shown:,} impressions would be 0; look at what writes it; if that is right, set a share under "
                f"limits.max_reject_shares.{clicks.name}"
            )
        if not reasons.keys() <= {OVER_LIMIT}:
            told = ", ".join(f"{rows:,} {reason}" for reason, rows in sorted(reasons.items()))
            cause = _cause(clicks, max(reasons, key=lambda r: reasons[r]), rejected, events, config)
            raise DataCheckError(
                f"log {clicks.name}: none of its {total.rows_in:,} clicks is kept, so every label would be 0 ({told}); "
                f"{cause}if that is right, set a share under limits.max_reject_shares.{clicks.name}"
            )


def beyond_limit(account: Account, config: Config, logs: Sequence[EventLog]) -> tuple[str, str, int, int] | None:
    """(log, reason, rows rejected for it, rows of the log) where these are more than the limit allows; None: nowhere.

    Of several it is the first on the way from an impression to an order, and there the largest share: where impressions
    or clicks are on a wrong clock orders are without a click, and nothing is wrong with them.
    """
    kinds = {log.name: log.kind for log in logs}
    worst: tuple[int, float, str, str, int, int] | None = None
    for log in sorted({name for name, _ in account.counts}):
        rows_in = account.total(log).rows_in
        for reason, rows in sorted(account.rejects_of(log).items()):
            most = most_by_chance(config.limits.reject_share(log, reason), rows_in)
            # The user's own limit on machines is no accident.
            if reason != OVER_LIMIT and rows > most:
                found = (-kinds.get(log, 0), rows / rows_in, log, reason, rows, rows_in)
                worst = max(worst, found) if worst else found
    return worst[2:] if worst else None


def _missing(log: EventLog, account: Account, logs: Sequence[EventLog]) -> str:
    """Words on a log that lacks a date, whose impressions (of orders: clicks) these rows would belong to; or ''."""
    if log.kind == KIND_IMPRESSION:
        return ""
    first = as_text(account.judged_from)
    silent = account.silent({date for date in account.impression_dates if date >= first})
    for other in logs:
        is_earlier = other.kind == (KIND_IMPRESSION if log.kind == KIND_CLICK else KIND_CLICK)
        if is_earlier and log.scenario in (NO_SCENARIO, other.scenario) and other.name in silent:
            dates = date_ranges(silent[other.name], most=SHOWN_RANGES)
            return f"log {other.name} has no row of {dates}: look whether a file of it is to come yet; "
    return ""


def _cause(log: EventLog, reason: str, rejected: DataFrame, events: DataFrame, config: Config) -> str:
    """Words on the likely cause, with a semicolon behind them; '' where the rows tell nothing."""
    mine = rejected.filter(
        (F.col("kind") == log.kind) & (F.col("scenario") == log.scenario) & (F.col("reason") == reason)
    )
    if reason.endswith("_time") or reason in ("malformed_line", "undecodable_text"):
        return _of_texts(log, reason, [row[0] for row in mine.select("row").limit(_SAMPLE).collect()])
    if reason == "imprecise_value":
        row = mine.select("row").limit(1).collect()
        return (
            f"such as {row[0][0][:200]}: a float of that size has lost the last digits of the integer that was meant; "
            "write the column as text, or as integers throughout; "
        )
    if reason == "unparsable_number":
        row = mine.select("row").limit(1).collect()
        return (
            f"such as {row[0][0][:200]}; write 1234.50, or name the column in logs.{log.name}.decimal_comma, or what "
            f"stands for no value in logs.{log.name}.null_values; "
        )
    if log.kind == KIND_IMPRESSION or reason.startswith("null_"):
        row = mine.select("row").limit(1).collect()
        return f"such as {row[0][0][:200]}; " if row and row[0][0] else ""
    return _of_clock(log, mine, events, config)


def _of_texts(log: EventLog, reason: str, rows: Sequence[str]) -> str:
    found = [json.loads(row) for row in rows if row]
    if reason == "malformed_line":
        return (
            "they have more or fewer fields than the header, or a quote that does not end, or are no JSON: look at "
            f"logs.{log.name}.separator and quote; "
        )
    if reason == "undecodable_text":
        return f"their bytes are not the encoding: set logs.{log.name}.encoding, for example to 'windows-1252'; "
    column = reason.partition("_")[2]
    texts = [str(row.get(as_written(column), row.get(column, ""))) for row in found]
    texts = [text for text in texts if text and text != "None"]
    if not texts:
        return f"the column holds nothing there: look at logs.{log.name}.columns.{column}; "
    numbers = [float(text) for text in texts if re.fullmatch(r"\s*-?\d{1,30}(?:\.\d*)?\s*", text)]
    units = [
        unit
        for unit, unit_ns in TIME_UNITS_NS.items()
        if numbers and _SENSIBLE_S[0] <= sorted(numbers)[len(numbers) // 2] * unit_ns / 1e9 < _SENSIBLE_S[1]
    ]
    if units and 2 * len(numbers) > len(texts):
        return (
            f"such as {texts[0]!r}: numbers that are times in '{units[0]}', a factor of 1000 or more from what is "
            f'read; set logs.{log.name}.time_format = "{units[0]}", or write all files of the log in one unit; '
        )
    return f"such as {texts[0]!r}: look at logs.{log.name}.time_format; "


def _of_clock(log: EventLog, mine: DataFrame, events: DataFrame, config: Config) -> str:
    """Whether the rows lie whole hours from the impressions (orders: clicks) of their user and item."""
    earlier = KIND_IMPRESSION if log.kind == KIND_CLICK else KIND_CLICK
    window = config.labels.click_window_us if log.kind == KIND_CLICK else config.labels.order_window_us
    keys = ("user_id", "item_id")
    some = mine.select("id", "impression_id", *keys, F.unix_micros("event_time").alias("late")).limit(_SAMPLE)
    of_item = events.filter((F.col("kind") == earlier) & F.col("reason").isNull()).select(
        *keys, F.col("id").alias("shown"), F.unix_micros("event_time").alias("early")
    )
    pairs = (
        some.join(of_item, on=list(keys))
        .filter(F.col("impression_id").isNull() | (F.col("impression_id") == F.col("shown")))
        .select("id", (F.col("late") - F.col("early")).alias("gap"))
    )
    gaps: dict[str, list[int]] = {}
    for row in pairs.limit(50 * _SAMPLE).collect():
        gaps.setdefault(row["id"], []).append(row["gap"])
    num_rejected = some.count()
    if not gaps:
        where = "impression" if log.kind == KIND_CLICK else "click"
        other = some.join(of_item, on=list(keys)).select("impression_id", "shown").limit(1).collect()
        if other:  # users and items are right: 7.0 for 7, say
            return (
                f"no {where} has their impression_id, such as {other[0]['impression_id']!r}, where those of their user "
                f"and item have ids such as {other[0]['shown']!r}: look at impression_id in logs.{log.name}.columns; "
            )
        return f"no {where} is of their user and item: look at the ids that both logs are given; "
    earlier_log = "impression" if log.kind == KIND_CLICK else "click"
    shift = clock_shift(list(gaps.values()), window)
    if shift and 2 * shift[1] > num_rejected:
        return (
            f"their times are {abs(shift[0])} whole hours {'late' if shift[0] > 0 else 'early'}, as of another time "
            f"zone: look at logs.{log.name}.time_zone, and at that of the {earlier_log}s; "
        )
    window_text = "labels.click_window" if log.kind == KIND_CLICK else "labels.order_window"
    return (
        f"at the median they are {usual_gap(list(gaps.values()))} their {earlier_log}: look at {window_text}, "
        "labels.clock_skew, and the clocks, time zones and time formats of both logs; "
    )


def usual_gap(gaps: Sequence[Sequence[int]]) -> str:
    """How far most rows lie from the nearest that they could belong to, in words: 54 years tell of a wrong unit.

    Args:
        gaps: for each row the microseconds since each impression (of an order: click) that it could belong to.
    """
    nearest = sorted(min(row, key=abs) for row in gaps)
    gap = nearest[len(nearest) // 2]
    units = (("days", 24 * _HOUR_US), ("hours", _HOUR_US), ("minutes", _HOUR_US // 60))
    unit, size = next((one for one in units if abs(gap) >= 2 * one[1]), ("seconds", 1_000_000))
    return f"{abs(gap) / size:,.1f} {unit} {'after' if gap >= 0 else 'before'}"


def clock_shift(gaps: Sequence[Sequence[int]], window: int) -> tuple[int, int] | None:
    """Whole hours by which the rows are late (early: negative), and how many rows that explains; None: none does.

    Args:
        gaps: for each row the microseconds since each impression that it could belong to.
        window: how late a row may be, in microseconds.
    """
    near = min(window, _HOUR_US // 2)  # most clicks come soon; a whole hour would fit two shifts
    found = []
    for hours in (h for h in range(-14, 15) if h):
        explained = sum(any(0 <= gap - hours * _HOUR_US <= near for gap in row) for row in gaps)
        found.append((explained, -abs(hours), hours))
    explained, _, hours = max(found)
    return (hours, explained) if explained else None
