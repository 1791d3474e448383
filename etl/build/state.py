"""What the builds of later dates need of earlier ones: attributed history events, and impressions per value and date.

A build of date D reads it instead of attributing all logs since the beginning: histories before D come from here, and
the logs are read from D on, with the margin that decides about the first clicks, orders and duplicates of D. One Delta
table holds both, so that one commit changes both; the commit says until when the state is complete. It depends on the
logs alone: a build that is killed between this table and the samples leaves two tables that are each right.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl.features.counters import counter_rows
from etl.jvm import table_version
from etl.kernel.attribution import LabelRules
from etl.kernel.chunks import FOREIGN
from etl.kernel.packs import EVENT, VALUE
from etl.lake.tables import COUNTERS_SCHEMA, Lake, content_hash, create_table, dates_condition, replace_dates
from etl.session import kept
from usr_ray.config import DAY_US, Config, day_number
from usr_ray.config.stored import DATE, misfit
from usr_ray.schema import COUNTERS, STATE

STATE_SCHEMA = T.StructType(
    [
        T.StructField("part", T.StringType(), nullable=False),
        T.StructField("date", T.DateType(), nullable=False),
        T.StructField("user_id", T.StringType()),
        T.StructField("scenario", T.IntegerType()),
        T.StructField("kind", T.IntegerType()),
        T.StructField("id", T.StringType()),
        T.StructField("item_id", T.StringType()),
        T.StructField("query", T.StringType()),
        T.StructField("event_time", T.TimestampType()),
        T.StructField("known_time", T.TimestampType()),
        T.StructField("feature", T.StringType()),
        T.StructField("value", T.StringType()),
        T.StructField("count", T.LongType()),
    ]
)
DUPLICATE_SPAN = DAY_US
"""Rows of one key that are further apart are not seen as duplicates by a build that reads the state."""
_HARMLESS = (
    *("OPTIMIZE", "REORG", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "UNSET TBLPROPERTIES"),
    *("ADD CONSTRAINT", "DROP CONSTRAINT", "UPGRADE PROTOCOL", "COMPUTE STATS"),
)
"""Operations that leave the rows as they are."""


@dataclass(frozen=True, slots=True)
class State:
    """What earlier builds left for a build of dates from `first` on."""

    since: dt.date | None = None
    """Events and counts before this date are read from `version` of the table; None: from the logs, all of them."""
    version: int | None = None
    complete_until: dt.date | None = None
    content: str = ""
    """Hash of all rows, where one build made them all."""

    @property
    def since_us(self) -> int | None:
        """`since` in microseconds since 1970."""
        return None if self.since is None else day_number(self.since) * DAY_US

    def first_row(self, rules: LabelRules, *, whole_days: bool) -> int | None:
        """Microseconds since 1970 from which the logs are needed; None: all."""
        if self.since_us is None:
            return None
        first = self.since_us - rules.reach - DUPLICATE_SPAN
        return first // DAY_US * DAY_US if whole_days else first


def find_state(spark: SparkSession, config: Config, lake: Lake, first: dt.date) -> State:
    """The newest state, where it can be trusted: of this configuration, and nobody has changed its rows since."""
    found = _trusted(spark, config, lake, STATE)
    if found is None:
        return State()
    version, mark = found
    until = dt.date.fromisoformat(mark["complete_until"])
    if config.every_counter:  # committed before the state: never complete for less
        sums = _trusted(spark, config, lake, COUNTERS)
        if sums is None or sums[1]["complete_until"] < mark["complete_until"]:
            return State()
    return State(min(first, until + dt.timedelta(days=1)), version, until, mark.get("content", ""))


def _trusted(spark: SparkSession, config: Config, lake: Lake, table: str) -> tuple[int, dict[str, str]] | None:
    """The newest version, and the mark of the build that left its rows; None where others changed them since."""
    if not lake.has(spark, table):
        return None
    columns = ("version", "operation", "operationParameters", "userMetadata")
    history = DeltaTable.forPath(spark, lake.path(table)).history().select(*columns)
    commits = [row.asDict() for row in history.collect()]
    mark = mark_of(commits)
    return (commits[0]["version"], mark) if mark and mark["meaning"] == config.row_meaning() else None


def mark_of(commits: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The mark of the build that left the rows as they are; empty where somebody changed them since.

    Args:
        commits: a Delta table's history, newest first. What a RESTORE went back over does not count.
    """
    newest = commits[0]["version"] if commits else 0
    for commit in commits:
        if commit["version"] > newest:
            continue
        if mark := _mark_in(commit["userMetadata"] or ""):
            return mark
        restored = (commit["operationParameters"] or {}).get("version") if commit["operation"] == "RESTORE" else None
        if restored is not None and restored.isdecimal():
            newest = int(restored)
        elif commit["operation"] not in _HARMLESS:
            return {}
    return {}


def _mark_in(text: str) -> dict[str, str]:
    """The mark that a commit carries; empty where it has none, or somebody's own text."""
    try:
        mark = json.loads(text)
    except ValueError:
        return {}
    return {} if misfit(mark, {"complete_until": DATE, "meaning": object, "content?": str}) else mark


def past_events(spark: SparkSession, lake: Lake, state: State) -> DataFrame:
    """History events before `state.since`, as event rows of the pass; columns that they lack are missing."""
    rows = _earlier(spark, lake, state, EVENT)
    columns = ("user_id", "scenario", "kind", "id", "item_id", "query", "event_time", "known_time")
    return rows.select(*columns, F.lit(False).alias(FOREIGN))


def value_counts(spark: SparkSession, lake: Lake, state: State, values: DataFrame) -> DataFrame:
    """Impressions per feature, value and date: of `value` rows of the pass, and before `state.since` of the state."""
    both = F.explode(F.arrays_zip("days", "counts")).alias("day")
    fresh = values.select("feature", "value", both).select(
        "feature", "value", _date(F.col("day.days")).alias("date"), F.col("day.counts").alias("count")
    )
    if state.since is None:
        return fresh
    return fresh.unionByName(_earlier(spark, lake, state, VALUE).select("feature", "value", "date", "count"))


def write_state(
    spark: SparkSession, config: Config, lake: Lake, state: State, events: DataFrame, values: DataFrame, last: dt.date
) -> None:
    """Replace the state from `state.since` to `last`; in one commit, which says until when it is complete now.

    A state that would stay as it is is left alone, where it was made whole or this replaces a part that is there.

    Args:
        config: its row meaning is part of the mark.
        events: `event` rows of the pass.
        values: `value` rows of the pass.
    """
    path = lake.path(STATE)
    if not lake.has(spark, STATE):
        create_table(spark, lake, STATE, STATE_SCHEMA, "date")
    per_date = value_counts(spark, lake, State(), values).groupBy("feature", "value", "date")
    counts = kept(per_date.agg(F.sum("count").alias("count")))  # read twice: to compare, and to write
    parts = [
        events.select("*", _date(F.col("day")).alias("date"))
        .drop("query", "part")
        .withColumnRenamed("value", "query")
        .select(
            F.lit(EVENT).alias("part"),
            "date",
            "user_id",
            "scenario",
            "kind",
            "id",
            "item_id",
            "query",
            "event_time",
            "known_time",
        ),
        counts.select(F.lit(VALUE).alias("part"), "*"),
    ]
    frame = parts[0].unionByName(parts[1], allowMissingColumns=True)
    condition = _replaced(state, last, "date")
    frame = frame.filter(F.col("date") <= F.lit(last)).select(STATE_SCHEMA.names)
    until = max(last, state.complete_until or last)
    content = ""
    if state.since is None and until == last:
        content = content_hash(frame)
        if (content, until) == (state.content, state.complete_until):
            return
    elif state.since is not None and until == state.complete_until:
        there = spark.read.format("delta").option("versionAsOf", state.version).load(path).filter(condition)
        if content_hash(there.select(STATE_SCHEMA.names)) == content_hash(frame):
            return
    replace_dates(frame, path, condition, metadata=_mark(config, until, content))


def write_sums(
    spark: SparkSession,
    config: Config,
    lake: Lake,
    state: State,
    counted: DataFrame,
    tables: Mapping[str, DataFrame],
    last: dt.date,
) -> DataFrame | None:
    """Replace the counters' daily sums as write_state does the state, before it; the whole table, None without any.

    Args:
        config: its row meaning is part of the mark.
        counted: `count` rows of the pass.
        tables: "user" and "item" -> one row a key.
    """
    if not config.every_counter:
        return None
    mark = _mark(config, max(last, state.complete_until or last), "")
    replaced = _replaced(state, last, "event_date")
    path = lake.path(COUNTERS)
    if not lake.has(spark, COUNTERS):
        create_table(spark, lake, COUNTERS, COUNTERS_SCHEMA, "event_date")
    rows = counter_rows(config, counted, tables).filter(replaced).filter(F.col("event_date") <= F.lit(last))
    replace_dates(rows, path, replaced, metadata=mark)
    return spark.read.format("delta").option("versionAsOf", table_version(spark, path)).load(path)


def _mark(config: Config, until: dt.date, content: str) -> str:
    mark = {"complete_until": until.isoformat(), "meaning": config.row_meaning(), "content": content}
    return json.dumps(mark, sort_keys=True)


def _replaced(state: State, last: dt.date, column: str) -> str:
    """SQL condition: the dates whose rows a build replaces, as far as `last`."""
    if state.since is not None:
        return dates_condition(column, state.since, last)
    # Nothing of an untrusted state stays.
    return f"{column} <= DATE'{last}'" if state.complete_until else f"{column} IS NOT NULL"


def _earlier(spark: SparkSession, lake: Lake, state: State, part: str) -> DataFrame:
    table = spark.read.format("delta").option("versionAsOf", state.version).load(lake.path(STATE))
    return table.filter((F.col("part") == part) & (F.col("date") < F.lit(state.since)))


def _date(day: Column) -> Column:
    return F.date_from_unix_date(day.cast("int"))
