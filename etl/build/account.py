"""Where every row of the logs went: rows in, duplicates, rejects by reason, rows used; per log and date."""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl.build.staging import staged
from etl.checks import AccountingError, DataCheckError, LogCount, check_accounting
from etl.kernel.events import KIND_IMPRESSION
from etl.kernel.packs import ACCOUNT, CELL, PAIRS, REJECT, VALUE
from etl.kernel.user_pass import UNUSABLE
from etl.lake.tables import row_hash
from etl.logs.events import REASON, EventLog
from etl.session import kept
from usr_ray.config import DAY_US, Config, date_of

UNDATED = "undated"
"""Stands for the date of a row whose time is missing or cannot be read, and of the users and items tables."""
MAX_DUPLICATE_SHARE = 0.05
"""Share of a log's rows; one delivered twice has more, and so has one whose id is that of a page or a session."""
MIN_DAILY_ROWS = 20
"""A log with this many rows a day has some on every day; one with fewer may have none."""
_SAME_NUMBER = r"^0*(\d+)(?:\.0+)?$"
"""007 and 7.0 are 7."""
_FEW_FORMS, _FORMS_SHARE = 3, 0.1
"""Ids in another form that are told of: so many, and such a share of those without a row. Fewer may be chance."""


@dataclass(slots=True)
class Account:
    """Counts per (log, date); dates as YYYY-MM-DD or UNDATED."""

    counts: dict[tuple[str, str], LogCount] = field(default_factory=lambda: defaultdict(LogCount))
    reasons: dict[tuple[str, str], dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    used_days: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Day since 1970 -> newest event_time (microseconds since 1970) and number of the rows that are used."""
    unlike: dict[str, int] = field(default_factory=dict)
    """Log of users or items -> keys of which it has several rows that differ."""
    sources: dict[str, str] = field(default_factory=dict)
    """Log -> what it was read from, such as '3 csv files'."""
    impression_dates: set[str] = field(default_factory=set)
    cells: dict[tuple[str, int], int] = field(default_factory=dict)
    """(fingerprint, day since 1970) -> hash of the samples of the day (etl/kernel/fingerprint.py)."""
    tables: dict[str, str] = field(default_factory=dict)
    """`users` and `items`, where they are read -> number and hash of the rows that are used."""
    whole_from: dt.date | None = None
    """Only some rows of earlier dates were read, as a margin; None: every date was read whole."""
    judged_from: dt.date | None = None
    """What rows of earlier dates belong to may lie before the margin, so that they are no rejects; None: no margin."""

    def read_from(self, first_row: int, since: int) -> None:
        """Rows from `first_row` on were read, to attribute those from `since` on; microseconds since 1970."""
        self.whole_from, self.judged_from = date_of(-(-first_row // DAY_US)), date_of(since // DAY_US)

    def add_rejects(self, log: str, date: str, reason: str, num_rows: int) -> None:
        """Count rows that were rejected."""
        place = (log, date)
        self.counts[place] += LogCount(rejects=num_rows)
        self.reasons[place][reason] = self.reasons[place].get(reason, 0) + num_rows

    def total(self, log: str) -> LogCount:
        """Over the dates that are judged, and without one."""
        first = as_text(self.judged_from)
        return sum((count for (name, date), count in self.counts.items() if name == log and date >= first), LogCount())

    def rejects_of(self, log: str) -> dict[str, int]:
        """Reason -> rows, over the same dates."""
        first = as_text(self.judged_from)
        found: Counter[str] = Counter()
        for (name, date), reasons in self.reasons.items():
            if name == log and date >= first:
                found.update(reasons)
        return dict(found)

    def lines(self) -> list[str]:
        """What was read of each log and where its rows went, for the job's output."""
        result = []
        for log in sorted({*self.sources, *(log for log, _ in self.counts)}):
            count = sum((c for (name, _), c in self.counts.items() if name == log), LogCount())
            result.append(
                f"  {log}: {self.sources.get(log) or 'no file'}, {count.rows_in:,} rows: {count.used:,} used, "
                f"{count.rejects:,} rejected, {count.duplicates:,} duplicates"
            )
        return result

    def duplicate_notes(self, keys: Mapping[str, str]) -> list[str]:
        """Warnings of logs that lose many rows to an id that is perhaps none; `keys`: log -> the columns of its id.

        Of users and items, which have no time that would order them, also of a single key whose rows differ.
        """
        found = []
        for log, key in keys.items():
            count = self.total(log)
            if unlike := self.unlike.get(log):
                found.append(
                    f"log {log}: {unlike:,} values of {key} have several rows that differ; of each the row with the "
                    "fewest nulls stays, of those the smallest, not the newest; write one row a key"
                )
            if count.duplicates > most_by_chance(MAX_DUPLICATE_SHARE, count.rows_in):
                found.append(
                    f"log {log}: {count.duplicates:,} of {count.rows_in:,} rows have the {key} of another row and are "
                    f"left out; where they are no copies, the id is not unique: join columns in logs.{log}.columns"
                )
        return found

    def silent(self, asked: Collection[str]) -> dict[str, list[str]]:
        """Log -> those of the dates on which it has no row, though MIN_DAILY_ROWS and more on the others read whole."""
        whole = as_text(self.whole_from)
        days = sorted(date for date in self.impression_dates if date >= whole)
        found = {}
        for log in {log for log, _ in self.counts}:
            rows = {date: self.counts[log, date].rows_in if (log, date) in self.counts else 0 for date in days}
            silent = [date for date in days if date in asked and not rows[date]]
            others = len(days) - len(silent)
            if silent and others and sum(rows.values()) >= MIN_DAILY_ROWS * others:
                found[log] = silent
        return found

    @property
    def dates_without_impressions(self) -> list[dt.date]:
        """Dates on which the logs hold only clicks or orders: no build can name them."""
        dates = {date for _, date in self.counts if date != UNDATED} - self.impression_dates
        found = sorted(dt.date.fromisoformat(date) for date in dates)
        return [date for date in found if self.judged_from is None or date >= self.judged_from]


def most_by_chance(share: float, num_rows: int) -> float:
    """Rows of `num_rows` that a share leaves in peace, with two standard deviations of chance.

    Of a log of few rows chance may take more than the share, and a sparse scenario's daily build would be told of it,
    or stop, every other night: with 5 %, of 10 rows 1 may go, of 100 rows 9, of 10,000 rows 543.
    """
    return share * num_rows + 2 * math.sqrt(share * (1 - share) * num_rows)


def as_text(first: dt.date | None) -> str:
    """A first date as the dates of an account are written; what is before all of them for None."""
    return "" if first is None else first.isoformat()


def add_pass(account: Account, spark: SparkSession, folder: str, logs: Sequence[EventLog], num_usable: int) -> int:
    """Add what the pass found to the account: one small aggregation of what it staged.

    Returns:
        The number of values: `value` rows, and those of `pairs`.

    Raises:
        AccountingError: rows were lost or invented on the way.
    """
    names = {(log.kind, log.scenario): log.name for log in logs}
    usable = num_values = 0
    small = staged(spark, folder, ACCOUNT, REJECT, CELL, VALUE, PAIRS)
    day = F.when(F.col("part") == REJECT, _day()).otherwise(F.col("day"))
    sums = small.groupBy("part", "what", "kind", "scenario", "reason", day.alias("day")).agg(
        F.sum(F.coalesce("num_rows", F.lit(1))).alias("rows"),
        F.unix_micros(F.max("event_time")).alias("newest"),  # collected as a time it would be of the machine's zone
        F.bit_xor("hash").alias("hash"),
    )
    for row in sums.collect():
        if row["part"] == CELL:
            account.cells[row["what"], row["day"]] = row["hash"]
            continue
        if row["part"] in (VALUE, PAIRS):
            num_values += row["rows"]
            continue
        place = (names[row["kind"], row["scenario"]], _name(row["day"]))
        if row["part"] == REJECT:
            account.add_rejects(*place, row["reason"], row["rows"])
        elif row["what"] == UNUSABLE:
            account.counts[place] += LogCount(rows_in=row["rows"])
        else:
            account.counts[place] += LogCount(**{row["what"]: row["rows"]})
            if row["what"] == "rows_in":
                usable += row["rows"]
                if row["kind"] == KIND_IMPRESSION:
                    account.impression_dates.add(place[1])
            elif row["what"] == "used":
                before, number = account.used_days.get(row["day"], (row["newest"], 0))
                account.used_days[row["day"]] = (max(before, row["newest"]), number + row["rows"])
    if usable != num_usable:
        raise AccountingError(f"{usable} usable rows reached the pass, {num_usable} were read; please report this")
    for log in logs:
        for date in account.impression_dates:
            account.counts[log.name, date] += LogCount()  # a log without a row of a date is told of, too
    check_accounting(account.counts)
    return num_values


def unique_features(table: DataFrame, log: str, key: str, account: Account) -> DataFrame:
    """One row per key of a users or items table, and its rows in the account. Of rows that differ the one
    with the fewest nulls stays, and of those the smallest by the columns in their order.

    Raises:
        DataCheckError: no row has a key.
    """
    values = [c for c in table.columns if c not in (key, REASON)]
    num_nulls = reduce(add, (_num_nulls(table, name) for name in values), F.lit(0))
    content = row_hash(values)
    unique = kept(
        table.groupBy(key, REASON)
        .agg(
            F.min(F.struct(num_nulls.alias("nulls:"), *values)).alias("values:"),
            (F.min(content) != F.max(content)).alias("unlike:"),
            F.count("*").alias("rows:"),
        )
        .select(key, REASON, *(f"`values:`.`{name}`" for name in values), "unlike:", "rows:")
    )
    sums = (
        F.count("*").alias("keys"),
        F.sum("rows:").alias("rows"),
        F.count_if("unlike:").alias("unlike"),
        F.bit_xor(row_hash((key, *values))).alias("hash"),
    )
    counted = unique.groupBy(REASON).agg(*sums).collect()
    usable = next((row for row in counted if row[0] is None), None)
    num_rows = sum(row["rows"] for row in counted)
    rejects = {row[0]: row["rows"] for row in counted if row[0] is not None}
    if usable is None:
        told = "" if set(rejects) == {f"null_{key}"} else f" ({', '.join(sorted(rejects))})"
        raise DataCheckError(f"log {log}: column '{key}' is null on all {num_rows} rows{told}; needed one row per key")
    account.counts[log, UNDATED] += LogCount(
        rows_in=num_rows, duplicates=usable["rows"] - usable["keys"], used=usable["keys"]
    )
    account.unlike[log] = usable["unlike"]
    account.tables[log] = f"{usable['keys']} {usable['hash']}"
    for reason, rows in rejects.items():
        account.add_rejects(log, UNDATED, reason, rows)
    return unique.filter(F.col(REASON).isNull()).drop("rows:", "unlike:", REASON)


def _num_nulls(table: DataFrame, name: str) -> Column:
    """Of tags and terms, an array of the texts of their sources, how many of these are null: it never is itself."""
    value, kind = F.col(f"`{name}`"), table.schema[name].dataType
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.StringType):
        return F.size(F.filter(value, lambda text: text.isNull()))
    return value.isNull().cast("int")


_NULL_LIKE = r"(?i)^ *(?:null|none|nan|na|n/a|nil|\\n|--?|\?|undefined|\(null\)|<null>) *\z"
"""What programs write where they mean no value.

Not by `lower`: its first use in a JVM costs a second, in which Spark asks ICU for the title case of every letter.
"""
_COMMON = 10
"""A value with fewer values before it is among the commonest."""


def null_like_values(values: DataFrame, tables: Mapping[str, DataFrame], config: Config) -> list[str]:
    """Warnings of values that look like no value and are among the commonest of their feature."""
    owners = {"user_id": "<s>_impressions", "item_id": "<s>_impressions", "query": "<s>_impressions"}
    counts = values.select("feature", "value", F.explode("counts").alias("rows"))
    for owner, table in tables.items():
        if not (names := config.features.categories_of(owner)):
            continue
        owners |= dict.fromkeys(names, f"{owner}s")
        long = table.select(*names).unpivot([], [F.col(name) for name in names], "feature", "value")
        counts = counts.unionByName(long.withColumn("rows", F.lit(1).cast("bigint")))
    is_null_like = F.col("value").rlike(_NULL_LIKE)
    if counts.filter(is_null_like).isEmpty():
        return []
    sums = counts.filter(F.col("value").isNotNull()).groupBy("feature", "value").agg(F.sum("rows").alias("rows"))
    place = F.row_number().over(Window.partitionBy("feature").orderBy(F.desc("rows"), "value"))
    common = sums.withColumn("place", place).filter(F.col("place") <= _COMMON)
    found = common.filter(is_null_like).orderBy("feature", "place").collect()
    return [
        f"{row['feature']}: {row['value']!r} is among its commonest values ({row['rows']:,} rows) and taken for one; "
        f"if it means that there is none, set logs.{owners.get(row['feature'], '<s>_impressions')}.null_values"
        for row in found
    ]


def keys_in_other_forms(values: DataFrame, tables: Mapping[str, DataFrame]) -> list[str]:
    """Warnings of users and items of the impressions that would have a row in their table but for the form of their id.

    pandas writes 7 as 7.0 on the day on which one is missing, an export pads with zeros or blanks, and a database may
    write its UUIDs in capitals.
    """
    pairs = [
        frame.select(F.lit(owner).alias("owner"), F.col(key).alias("value"), F.lit(is_there).alias("is_there"))
        for owner, table in tables.items()
        for frame, key, is_there in (
            (values.filter(F.col("feature") == f"{owner}_id"), "value", False),
            (table, f"{owner}_id", True),
        )
    ]
    if not pairs:
        return []
    form = F.regexp_replace(F.lower(F.trim("value")), _SAME_NUMBER, "$1")
    forms = reduce(DataFrame.unionByName, pairs).groupBy("owner", "value").agg(F.bool_or("is_there").alias("is_there"))
    is_lost, a_key = ~F.col("is_there"), F.min(F.when(F.col("is_there"), F.col("value")))
    alike = forms.groupBy("owner", form.alias("form")).agg(
        F.count_if(is_lost).alias("lost"), F.min(F.when(is_lost, F.col("value"))).alias("value"), a_key.alias("key")
    )
    would = F.when(F.col("key").isNotNull(), F.col("lost"))
    sums = alike.groupBy("owner").agg(
        F.sum("lost").alias("lost"),
        F.sum(would).alias("would"),
        F.min(F.when(would > 0, F.struct("value", "key"))).alias("one"),
    )
    return [
        f"{row['owner']}_id: {row['would']:,} of {row['lost']:,} values in impressions without a row in "
        f"{row['owner']}s would have one but for their form, such as {row['one']['value']!r} for "
        f"{row['one']['key']!r}; write them alike (7 and 7.0, 007, blanks, capitals)"
        for row in sums.orderBy("owner").collect()
        if (row["would"] or 0) >= max(_FEW_FORMS, _FORMS_SHARE * row["lost"])
    ]


def _day() -> Column:
    return F.unix_date(F.to_date("event_time")).cast("bigint")


def _name(day: int | None) -> str:
    return UNDATED if day is None else date_of(day).isoformat()
