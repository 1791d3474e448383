"""Where every row of the logs went: rows in, duplicates, rejects by reason, rows used; per log and date."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.build.staging import staged
from etl.checks import AccountingError, DataCheckError, LogCount, check_accounting
from etl.kernel.events import KIND_IMPRESSION
from etl.kernel.packs import ACCOUNT, CELL, REJECT
from etl.kernel.user_pass import UNUSABLE
from etl.logs.events import EventLog
from etl.session import kept
from usr_ray.config import date_of

UNDATED = "undated"
"""Stands for the date of a row whose time is missing or cannot be read, and of the users and items tables."""


@dataclass(slots=True)
class Account:
    """Counts per (log, date); dates as YYYY-MM-DD or UNDATED."""

    counts: dict[tuple[str, str], LogCount] = field(default_factory=lambda: defaultdict(LogCount))
    reasons: dict[tuple[str, str], dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    newest: dt.datetime | None = None
    """Newest usable event_time of all logs."""
    impression_dates: set[str] = field(default_factory=set)
    cells: dict[tuple[str, int], int] = field(default_factory=dict)
    """(fingerprint, day since 1970) -> hash of the samples of the day (etl/kernel/fingerprint.py)."""
    whole_from: dt.date | None = None
    """Of earlier dates only some rows were read, as a margin. None: of none."""
    num_unusable: int = 0
    """Rows without a key or a time that can be read."""

    def add_rejects(self, log: str, date: str, reason: str, num_rows: int) -> None:
        """Count rows that were rejected."""
        place = (log, date)
        self.counts[place] += LogCount(rejects=num_rows)
        self.reasons[place][reason] = self.reasons[place].get(reason, 0) + num_rows

    @property
    def dates_without_impressions(self) -> list[dt.date]:
        """Dates on which the logs hold only clicks or orders: no build can name them."""
        dates = {date for _, date in self.counts if date != UNDATED} - self.impression_dates
        found = sorted(dt.date.fromisoformat(date) for date in dates)
        return [date for date in found if self.whole_from is None or date >= self.whole_from]


def add_pass(account: Account, spark: SparkSession, folder: str, logs: Sequence[EventLog], num_usable: int) -> None:
    """Add what the pass found to the account: one small aggregation of what it staged.

    Args:
        account: grows.
        spark: the session.
        folder: where the pass staged its rows.
        logs: the event logs.
        num_usable: usable rows that another count found.

    Raises:
        AccountingError: rows were lost or invented on the way.
    """
    names = {(log.kind, log.scenario): log.name for log in logs}
    usable = 0
    small = staged(spark, folder, ACCOUNT, REJECT, CELL)
    day = F.when(F.col("part") == REJECT, _day()).otherwise(F.col("day"))
    sums = small.groupBy("part", "what", "kind", "scenario", "reason", day.alias("day")).agg(
        F.sum(F.coalesce("num_rows", F.lit(1))).alias("rows"),
        F.max("event_time").alias("newest"),
        F.bit_xor("hash").alias("hash"),
    )
    for row in sums.collect():
        if row["part"] == CELL:
            account.cells[row["what"], row["day"]] = row["hash"]
            continue
        place = (names[row["kind"], row["scenario"]], _name(row["day"]))
        if row["part"] == REJECT:
            account.add_rejects(*place, row["reason"], row["rows"])
        elif row["what"] == UNUSABLE:
            account.counts[place] += LogCount(rows_in=row["rows"])
            account.num_unusable += row["rows"]
        else:
            account.counts[place] += LogCount(**{row["what"]: row["rows"]})
            if row["what"] == "rows_in":
                usable += row["rows"]
                newest = row["newest"].replace(tzinfo=dt.UTC)
                account.newest = newest if account.newest is None else max(account.newest, newest)
                if row["kind"] == KIND_IMPRESSION:
                    account.impression_dates.add(place[1])
    if usable != num_usable:
        raise AccountingError(f"{usable} usable rows reached the pass, {num_usable} were read; please report this")
    check_accounting(account.counts)


def unique_features(table: DataFrame, log: str, key: str, account: Account) -> DataFrame:
    """One row per key of a users or items table, and its rows in the account. Of unequal rows the smallest stays.

    Raises:
        DataCheckError: no row has a key.
    """
    values = [c for c in table.columns if c != key]
    unique = kept(
        table.groupBy(key)
        .agg(F.min(F.struct(*values)).alias("_values"), F.count("*").alias("_rows"))
        .select(key, "_values.*", "_rows")
    )
    is_null = F.col(key).isNull()
    counted = unique.agg(
        F.count(key).alias("keys"),
        F.coalesce(F.sum(F.when(~is_null, F.col("_rows"))), F.lit(0)).alias("rows"),
        F.coalesce(F.sum("_rows"), F.lit(0)).alias("all_rows"),
    ).collect()[0]
    num_rows = counted["all_rows"]
    if not counted["keys"]:
        raise DataCheckError(f"log {log}: column '{key}' is null on all {num_rows} rows; needed one row per key")
    account.counts[log, UNDATED] += LogCount(
        rows_in=num_rows, duplicates=counted["rows"] - counted["keys"], used=counted["keys"]
    )
    if num_rows > counted["rows"]:
        account.add_rejects(log, UNDATED, f"null_{key}", num_rows - counted["rows"])
    return unique.filter(~is_null).drop("_rows")


def _day() -> Column:
    return F.unix_date(F.to_date("event_time")).cast("bigint")


def _name(day: int | None) -> str:
    return UNDATED if day is None else date_of(day).isoformat()
