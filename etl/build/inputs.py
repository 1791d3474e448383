"""The inputs of a build: logs opened and checked, and every row attributed or rejected once, in one shuffle."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from etl.build.account import Account, add_pass, null_like_values, unique_features
from etl.build.reject_limits import check_rejects
from etl.build.staging import stage, staged
from etl.features.counters import counted_columns, told_categories
from etl.features.vocabulary import scale
from etl.kernel.attribution import LabelRules
from etl.kernel.chunks import KEY_HASH, REQUEST_KEY, USER_KEY
from etl.kernel.events import KIND_CLICK, KIND_IMPRESSION, KIND_ORDER, context_column, owned_column
from etl.kernel.packs import EMITTED, REJECT, VALUE
from etl.kernel.user_pass import BEGINNING, PassPlan, first_pass
from etl.logs.duplicates import key_hash, mark_foreign
from etl.logs.events import EventLog, context_tags, event_logs, read_events, read_features
from etl.logs.files import ANY_LOG, LogFolder, readable
from etl.logs.names import has_table
from usr_ray.config import DAY_US, Config, day_number
from usr_ray.schema import FITTED_SCALES

MAX_ROWS_PER_TASK = 1 << 22
"""Approximate event rows of one task of the pass; every core has at least one task."""
MIN_BEYOND = 1000
"""Of this many used events more than one must be later than all built days need; fewer are taken for wrong clocks."""
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_OF_PASS = (
    "user_id",
    "event_time",
    "known_time",
    "kind",
    "scenario",
    "id",
    "item_id",
    "impression_id",
    "request_id",
    "position",
    "query",
    "reason",
    "row_json",
)


@dataclass(frozen=True, slots=True)
class Logs:
    """Opened and checked logs; only the feature tables are computed yet."""

    config: Config
    folder: LogFolder
    logs: tuple[EventLog, ...]
    events: DataFrame
    tables: Mapping[str, DataFrame]
    """Owner ("user", "item") -> one row a key, where the configuration names features of theirs."""
    account: Account
    """What became of the rows of the feature tables; the pass adds the events."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the pass found, staged, and the account of every row."""

    spark: SparkSession
    folder: str
    logs: tuple[EventLog, ...]
    tables: Mapping[str, DataFrame]
    """The tables of users and items, as Logs has them."""
    account: Account
    num_values: int
    """Rows of VALUE, and values of PAIRS, of all chunks together."""
    notes: tuple[str, ...] = ()
    """What the user should know of the logs."""

    def staged(self, part: str) -> DataFrame:
        """Rows of one part of what the pass emitted (etl/kernel/packs.py)."""
        return _staged(self.spark, self.folder, part)

    @property
    def rejects(self) -> DataFrame:
        """Rows that could not be used, in the columns of the rejects table."""
        names = F.create_map(*(c for log in self.logs for c in (F.lit(f"{log.kind} {log.scenario}"), F.lit(log.name))))
        return self.staged(REJECT).select(
            F.element_at(names, F.concat_ws(" ", "kind", "scenario")).alias("log"),
            "reason",
            F.coalesce("row", _row_json()).alias("row"),
            F.to_date("event_time").alias("date"),
        )

    def num_impressions(self, dates: set[str]) -> dict[str, int]:
        """Impressions that came in on each of the dates."""
        shown = dict.fromkeys(dates, 0)
        for (log, date), count in self.account.counts.items():
            if date in dates and log.endswith("_impressions"):
                shown[date] += count.used
        return shown


def open_logs(spark: SparkSession, config: Config, logs_dir: str) -> Logs:
    """Open, check and cast all logs.

    Raises:
        DataCheckError: a log or a column is missing or has the wrong type.
    """
    folder = LogFolder(spark, logs_dir, config.logs)
    logs = event_logs(config, folder)
    events = read_events(config, folder, logs)
    features = config.features
    account = Account()
    tables: dict[str, DataFrame] = {}
    for owner, numbers in (("user", features.user_numbers), ("item", features.item_numbers)):
        log, key, categories = f"{owner}s", f"{owner}_id", features.categories_of(owner)
        lists = tuple(feature for feature in features.lists if feature.key == key)
        vectors = tuple(feature for feature in features.vectors if feature.key == key)
        if has_table(config, owner):
            tables[owner] = read_features(folder, log, key, categories, numbers, lists, vectors)
    for owner, table in tables.items():  # only when both can be read
        with readable(f"{owner}s"):
            tables[owner] = unique_features(table, f"{owner}s", f"{owner}_id", account)
    names = (*(log.name for log in logs), *(f"{owner}s" for owner in tables))
    account.sources = {log: folder.source(log) for log in names}
    return Logs(config, folder, logs, events, tables, account)


def make_plan(config: Config, days: tuple[int, ...], since_us: int | None = None) -> PassPlan:
    """The plan of a pass over the logs of a configuration; `since_us` as in `PassPlan.since`, None: all."""
    return PassPlan(
        rules=LabelRules.from_config(config.labels),
        num_scenarios=len(config.scenarios),
        history_length=config.histories.length,
        days=days,
        since=BEGINNING if since_us is None else since_us,
        categories=tuple(
            map(context_column, (*config.features.context_categories, *context_tags(config.features.lists)))
        ),
        numbers=tuple(map(context_column, config.features.context_numbers)),
        counted=tuple(dict.fromkeys(counted_columns(config, counter) for counter in config.every_counter.values())),
        told=tuple(f"{owner}_id" for owner in told_categories(config)),
        max_user_day_rows=config.limits.max_user_events_per_day,
    )


def run_pass(
    spark: SparkSession,
    logs: Logs,
    plan: PassPlan,
    folder: str,
    *,
    first_row: int | None = None,
    past: DataFrame | None = None,
) -> Inputs:
    """Attribute every row once and stage the result, before anything else is written; the account adds up.

    Args:
        first_row: microseconds; earlier rows of the logs are not read. None: all are read.
        past: history events before `plan.since` (etl/build/state.py).

    Raises:
        AccountingError: rows were lost or invented on the way.
        DataCheckError: a file cannot be read, or too many rows of a log are rejected (limits.max_reject_share).
    """
    kinds = map(logs.config.features.scale_of, logs.config.features.context_numbers)
    # What is fitted is not known yet: the raw values go into the packs, and sample_rows scales them.
    scaled = [
        (F.col(name) if kind in FITTED_SCALES else scale(F.col(name), kind)).alias(name)
        for name, kind in zip(plan.numbers, kinds, strict=True)
    ]
    # Rows without a user are spread by their content.
    key = F.when(F.col("reason").isNull(), F.xxhash64("user_id")).otherwise(F.xxhash64("row_json"))
    time = F.col("event_time")
    read = logs.events
    if first_row is not None:
        read = read.filter(time.isNull() | (time >= F.timestamp_micros(F.lit(first_row))))
        logs.account.read_from(first_row, plan.since)
    with readable(ANY_LOG):
        rows, num_usable = mark_foreign(read.select(*_OF_PASS, *plan.categories, *scaled, key.alias(USER_KEY)))
    rows = _with_owned(rows, logs, plan)
    if past is not None:
        past = past.withColumn(USER_KEY, F.xxhash64("user_id"))
        rows = rows.unionByName(past, allowMissingColumns=True)

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        context = TaskContext.get()
        return first_pass(batches, plan, context.partitionId() if context else 0)

    num_tasks = max(spark.sparkContext.defaultParallelism, -(-num_usable // MAX_ROWS_PER_TASK))
    grouped = rows.repartition(num_tasks, USER_KEY).sortWithinPartitions(USER_KEY)
    hashed = grouped.withColumns(
        {
            KEY_HASH: key_hash(),
            REQUEST_KEY: F.xxhash64(F.coalesce("request_id", "id")),
            "row_hash": _row_hash(plan),
            "value_hash": _hash_of(["item_id", "query"]),
        }
    )
    with readable(ANY_LOG):
        stage(hashed.mapInArrow(run, from_arrow_schema(EMITTED)), folder)
    num_values = add_pass(logs.account, spark, folder, logs.logs, num_usable)
    check_rejects(logs.account, logs.config, logs.logs, staged(spark, folder, REJECT), logs.events)
    keys = {log.name: "order_id and item_id" if log.kind == KIND_ORDER else log.key for log in logs.logs}
    notes = (
        *logs.folder.notes(),
        *logs.account.duplicate_notes({"users": "user_id", "items": "item_id"} | keys),
        *null_like_values(_staged(spark, folder, VALUE), logs.tables, logs.config),
    )
    return Inputs(spark, folder, logs.logs, logs.tables, logs.account, num_values, notes)


def _with_owned(rows: DataFrame, logs: Logs, plan: PassPlan) -> DataFrame:
    """Event rows with the categories of their users and items that counters count by."""
    columns = {column for keys in plan.counted for column in keys}
    for owner, table in logs.tables.items():
        names = [name for name in logs.config.features.categories_of(owner) if owned_column(name) in columns]
        if names:
            wanted = table.select(f"{owner}_id", *(F.col(name).alias(owned_column(name)) for name in names))
            rows = rows.join(wanted, on=f"{owner}_id", how="left")
    return rows


def watermark_of(account: Account, asked: dt.datetime | None, days: Sequence[int], rules: LabelRules) -> int:
    """Microseconds since 1970: as asked, else the newest event that is used, as far as the built days need one.

    Labels of the days are final when the last one's windows have closed, so what is later says no more. One event
    alone beyond that, such as one stamped 9999, says nothing at all: it would make every label final.
    """
    if asked is not None:
        return (asked - _EPOCH) // dt.timedelta(microseconds=1)
    final = (max(days, default=0) + 1) * DAY_US + rules.global_window + rules.order_window
    last_day = (final - 1) // DAY_US
    beyond = sum(count for day, (_, count) in account.used_days.items() if day > last_day)
    is_believed = beyond * MIN_BEYOND > sum(count for _, count in account.used_days.values()) and beyond > 1
    times = [newest for day, (newest, _) in account.used_days.items() if is_believed or day <= last_day]
    return min(max(times, default=0), final)


def day_of(date: str) -> int:
    """Days since 1970 of YYYY-MM-DD."""
    return day_number(dt.date.fromisoformat(date))


def iso_time(micros: int) -> str:
    """ISO 8601 of microseconds since 1970."""
    return (_EPOCH + dt.timedelta(microseconds=micros)).isoformat()


def _staged(spark: SparkSession, folder: str, part: str) -> DataFrame:
    """Rows of one part; values under the names of their features, which the pass knows by their columns."""
    rows = staged(spark, folder, part)
    if part != VALUE:
        return rows
    return rows.withColumn("feature", F.regexp_replace("feature", f"^{context_column('')}", ""))


def _row_hash(plan: PassPlan) -> Column:
    """Hash of an impression's content except the time at which it became known; 0 for clicks and orders."""
    names = {*_OF_PASS, *plan.categories, *plan.numbers} - {"known_time", "reason", "row_json"}
    # By the features' own names: the hashes of earlier builds stand in the reports.
    content = sorted(names, key=lambda name: (name.removeprefix(context_column("")), name))
    return F.when(F.col("kind") == KIND_IMPRESSION, _hash_of(content)).otherwise(F.lit(0).cast("bigint"))


def _hash_of(columns: list[str]) -> Column:
    # A null does not change xxhash64: each column's place is hashed with it, so that values cannot change places.
    return F.xxhash64(*(F.struct(F.lit(n), F.col(name)) for n, name in enumerate(columns)))


def _row_json() -> Column:
    """A rejected click or order line as it is named in its log; of a user's day beyond the limit: who and how many."""
    rest = ["user_id", "item_id", "event_time", "nullif(known_time, event_time) as ingest_time"]
    click = ["id as click_id", "impression_id", *rest]
    order = ["id as order_id", *rest]

    def as_json(columns: list[str]) -> Column:
        return F.to_json(F.struct(*(F.expr(c) for c in columns)))

    capped = as_json(["user_id", "num_rows as rows"])
    of_kind = F.when(F.col("kind") == KIND_CLICK, as_json(click)).otherwise(as_json(order))
    return F.when(F.col("num_rows").isNotNull(), capped).otherwise(of_kind)
