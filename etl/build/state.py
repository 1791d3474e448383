"""What the builds of later dates need of earlier ones: attributed history events, and impressions per value and date.

A build of date D reads it instead of attributing all logs since the beginning: histories before D come from here, and
the logs are read from D on, with the margin that decides about the first clicks, orders and duplicates of D. One Delta
table holds both, so that one commit changes both; the commit says until when the state is complete. It depends on the
logs alone: a build that is killed between this table and the samples leaves two tables that are each right.
"""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl.kernel.attribution import LabelRules
from etl.kernel.chunks import FOREIGN
from etl.kernel.packs import EVENT, VALUE
from etl.lake.tables import Lake, content_hash, create_table, replace_dates
from etl.session import kept
from usr_ray.config import DAY_US, Config, day_number
from usr_ray.schema import STATE

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
_HARMLESS = ("OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES")
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
    if not lake.has(spark, STATE):
        return State()
    for commit in DeltaTable.forPath(spark, lake.path(STATE)).history().collect():  # newest first
        mark = json.loads(commit["userMetadata"] or "{}")
        if mark.get("complete_until"):
            if mark["meaning"] != config.row_meaning():
                return State()
            until = dt.date.fromisoformat(mark["complete_until"])
            return State(min(first, until + dt.timedelta(days=1)), commit["version"], until, mark.get("content", ""))
        if commit["operation"] not in _HARMLESS:
            return State()
    return State()


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
        spark: the session.
        config: its row meaning is part of the mark.
        lake: where the table is.
        state: what this build has read.
        events: `event` rows of the pass.
        values: `value` rows of the pass.
        last: newest date that was built.
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
    condition = f"date <= DATE'{last}'"
    if state.since is not None:
        condition += f" AND date >= DATE'{state.since}'"
    elif state.complete_until is None:
        condition = "date IS NOT NULL"  # nothing of an untrusted state stays
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
    mark = {"complete_until": until.isoformat(), "meaning": config.row_meaning(), "content": content}
    replace_dates(frame, path, condition, metadata=json.dumps(mark, sort_keys=True))


def _earlier(spark: SparkSession, lake: Lake, state: State, part: str) -> DataFrame:
    table = spark.read.format("delta").option("versionAsOf", state.version).load(lake.path(STATE))
    return table.filter((F.col("part") == part) & (F.col("date") < F.lit(state.since)))


def _date(day: Column) -> Column:
    return F.date_from_unix_date(day.cast("int"))
