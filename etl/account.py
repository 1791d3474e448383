"""Where every row of the logs went: rows in, duplicates, rejects by reason, rows used; per log and date."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from etl.checks import DataCheckError, LogCount
from etl.events import KIND_CLICK, KIND_IMPRESSION
from etl.fingerprint import Cell
from etl.logs import EventLog
from etl.session import kept
from etl.user_pass import AUDIT_SCHEMA, CELL_DAYS, SORT_COLUMNS, PassPlan, audit

UNDATED = "undated"
"""Stands for the date of a row whose time is missing or cannot be read, and of the users and items tables."""
_SLIM = (*SORT_COLUMNS, "known_time", "impression_id")
_NO_CONTENT = ("log", "known_time", "reason", "row_json")
"""Columns that an impression's content hash leaves out; for clicks and orders, known_time decides about histories."""


@dataclass(slots=True)
class Account:
    """Counts per (log, date); dates as YYYY-MM-DD or UNDATED."""

    counts: dict[tuple[str, str], LogCount] = field(default_factory=lambda: defaultdict(LogCount))
    reasons: dict[tuple[str, str], dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    newest: dt.datetime | None = None
    """Newest usable event_time of all logs."""
    impression_dates: set[str] = field(default_factory=set)
    cells: list[Cell] = field(default_factory=list)
    """Fingerprints of what was used, to find the dates that late events change."""
    num_unusable: int = 0
    """Rows without a key or a time that can be read."""

    def add_rejects(self, log: str, date: str, reason: str, num_rows: int) -> None:
        """Count rows that were rejected."""
        place = (log, date)
        self.counts[place] += LogCount(rejects=num_rows)
        self.reasons[place][reason] = self.reasons[place].get(reason, 0) + num_rows

    @property
    def dates_without_impressions(self) -> list[dt.date]:
        """Dates on which the logs hold clicks or orders only: no build could ever name them."""
        dates = {date for _, date in self.counts if date != UNDATED} - self.impression_dates
        return sorted(dt.date.fromisoformat(date) for date in dates)


def account_of(events: DataFrame, duplicates: DataFrame, logs: Sequence[EventLog]) -> Account:
    """Count the rows that came in, the unusable ones and the duplicates: two small aggregations."""
    account = Account()
    shown = {log.name for log in logs if log.kind == KIND_IMPRESSION}
    day = F.to_date("event_time").alias("date")
    intake = events.groupBy("log", day, "reason").agg(F.count("*").alias("rows"), F.max("event_time").alias("newest"))
    for row in intake.collect():
        place = (row["log"], _name(row["date"]))
        account.counts[place] += LogCount(rows_in=row["rows"])
        if row["reason"] is not None:
            account.add_rejects(*place, row["reason"], row["rows"])
            account.num_unusable += row["rows"]
            continue
        newest = row["newest"].replace(tzinfo=dt.UTC)
        account.newest = newest if account.newest is None else max(account.newest, newest)
        if row["log"] in shown:
            account.impression_dates.add(place[1])
    for row in duplicates.groupBy("log", day).count().collect():
        account.counts[row["log"], _name(row["date"])] += LogCount(duplicates=row["count"])
    return account


def audit_events(unique: DataFrame, logs: Sequence[EventLog], plan: PassPlan, num_partitions: int) -> DataFrame:
    """Attribute every click and order line once, before anything is written.

    Returns:
        Rows (log, date, reason, num_rows, row): a rejected row each with `row` as JSON, and one row per chunk, log and
        date with the number of rows used (`reason` null); and the fingerprint's cells (`hash` not null).
    """

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return audit(batches, plan)

    names = F.create_map(*(c for log in logs for c in (F.lit(f"{log.kind} {log.scenario}"), F.lit(log.name))))
    return kept(
        unique.select(*_SLIM, _row_hash(unique).alias("row_hash"))
        .repartition(num_partitions, "user_id")
        .sortWithinPartitions(*SORT_COLUMNS)
        .mapInArrow(run, from_arrow_schema(AUDIT_SCHEMA))
        .select(
            F.element_at(names, F.concat_ws(" ", "kind", "scenario")).alias("log"),
            F.date_from_unix_date(F.col("day").cast("int")).alias("date"),
            "reason",
            "num_rows",
            *CELL_DAYS,
            "hash",
            F.when(F.col("reason").isNotNull(), _row_json()).alias("row"),
        )
    )


def add_audit(account: Account, audited: DataFrame) -> None:
    """Add the used and the rejected rows and the cells of `audit_events` to the account."""
    sums = [F.sum("num_rows").alias("rows"), F.bit_xor("hash").alias("hash")]
    for row in audited.groupBy("log", "date", "reason", *CELL_DAYS).agg(*sums).collect():
        if row["hash"] is not None:
            shown, first, last, visible = (row[name] for name in CELL_DAYS)
            account.cells.append(Cell(shown, first, last, None if visible < 0 else visible, row["hash"] % (1 << 64)))
        elif row["reason"] is None:
            account.counts[row["log"], _name(row["date"])] += LogCount(used=row["rows"])
        else:
            account.add_rejects(row["log"], _name(row["date"]), row["reason"], row["rows"])


def _row_hash(unique: DataFrame) -> Column:
    """Hash of what a row says; of an impression, without the time at which it became known."""
    content = sorted(set(unique.columns) - set(_NO_CONTENT))
    known = F.when(F.col("kind") != KIND_IMPRESSION, F.col("known_time"))
    # A null leaves xxhash64 as it was: each column's place is hashed with it, so that values cannot change places.
    return F.xxhash64(known, *(F.struct(F.lit(n), F.col(name)) for n, name in enumerate(content)))


def unique_features(table: DataFrame, log: str, key: str, account: Account) -> DataFrame:
    """One row per key of a users or items table, and its rows in the account. Of unequal rows the smallest stays.

    Raises:
        DataCheckError: no row has a key.
    """
    values = [c for c in table.columns if c != key]
    unique = kept(
        table.filter(F.col(key).isNotNull())
        .groupBy(key)
        .agg(F.min(F.struct(*values)).alias("_values"), F.count("*").alias("_rows"))
        .select(key, "_values.*", "_rows")
    )
    num_rows = table.count()
    counted = unique.agg(F.count("*").alias("keys"), F.coalesce(F.sum("_rows"), F.lit(0)).alias("rows")).collect()[0]
    if not counted["keys"]:
        raise DataCheckError(f"log {log}: column '{key}' is null on all {num_rows} rows; needed one row per key")
    account.counts[log, UNDATED] += LogCount(
        rows_in=num_rows, duplicates=counted["rows"] - counted["keys"], used=counted["keys"]
    )
    if num_rows > counted["rows"]:
        account.add_rejects(log, UNDATED, f"null_{key}", num_rows - counted["rows"])
    return unique.drop("_rows")


def _row_json() -> Column:
    """A rejected click or order line as it is named in its log."""
    rest = ["user_id", "item_id", "event_time", "nullif(known_time, event_time) as ingest_time"]
    click = ["id as click_id", "impression_id", *rest]
    order = ["id as order_id", *rest]

    def as_json(columns: list[str]) -> Column:
        return F.to_json(F.struct(*(F.expr(c) for c in columns)))

    return F.when(F.col("kind") == KIND_CLICK, as_json(click)).otherwise(as_json(order))


def _name(date: dt.date | None) -> str:
    return UNDATED if date is None else date.isoformat()
