"""build_samples(): logs -> samples, vocabularies, rejects and reports; all of a user in one shuffle and one pass."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

from etl.account import UNDATED, Account, account_of, add_audit, audit_events, unique_features
from etl.attribution import LabelRules
from etl.checks import AccountingError, DataCheckError, check_accounting
from etl.duplicates import split_duplicates
from etl.encoding import encoded_events, own_columns, profile_columns
from etl.events import KIND_IMPRESSION
from etl.log_files import LogFolder
from etl.logs import EventLog, event_logs, read_events, read_features
from etl.report import SampleCounts, count_samples, date_report, funnel_lines, warnings_of
from etl.session import kept
from etl.tables import (
    Lake,
    append_vocabularies,
    check_same_meaning,
    dates_condition,
    prepare_samples,
    replace_dates,
    samples_schema,
    table_version,
    write_rejects,
    write_report,
)
from etl.user_pass import SORT_COLUMNS, PassPlan, samples
from etl.vocabulary import EVENT_HOUR, Vocabularies, count_values, feature_spec, new_entries, read_vocabularies
from usr_ray.config import Config, parse_dates
from usr_ray.schema import FIRST_ID, PARTITION_COLUMN, SAMPLES, VOCABULARIES, FeatureSpec, index_column

MAX_ROWS_PER_FILE = 1 << 20
"""Impressions of one date in one file, at most; sets the number of tasks together with the number of cores."""
_AFTER_PASS = ("scenario", PARTITION_COLUMN, "user_key", "request_key", index_column(EVENT_HOUR))
"""Columns that Spark adds behind the pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRequest:
    """What to build from where."""

    logs: str
    lake: Lake
    first: dt.date
    last: dt.date
    watermark: dt.datetime | None = None
    """None: the newest event_time of all logs."""


@dataclass(slots=True)
class Progress:
    """Prints a line per stage with the seconds since the start."""

    write: Callable[[str], None] = print
    started: float = field(default_factory=time.monotonic)

    def __call__(self, text: str) -> None:
        """Print one line."""
        self.write(f"[{time.monotonic() - self.started:6.1f} s] {text}")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Checked logs, nothing computed twice: unique event rows, feature tables and the account so far."""

    logs: tuple[EventLog, ...]
    events: DataFrame
    unique: DataFrame
    users: DataFrame | None
    items: DataFrame | None
    account: Account


def build_samples(spark: SparkSession, config: Config, request: BuildRequest, progress: Progress) -> SampleCounts:
    """Build the samples of the requested dates; a rerun replaces them by equal rows.

    Raises:
        DataCheckError: a log is missing or unusable, the dates hold no impression, or the table was built with another
            configuration. Nothing has been written then.
    """
    lake = request.lake
    check_same_meaning(spark, lake, config)
    inputs = read_inputs(spark, config, request.logs)
    account = inputs.account
    rows_in = sum(count.rows_in for count in account.counts.values())
    progress(f"read {rows_in:,} rows of {len({log for log, _ in account.counts})} logs")
    dates = _dates_to_build(request, account)
    plan = _plan(config, request, account)
    num_partitions = _num_partitions(spark, account, dates)

    audited = audit_events(inputs.unique, inputs.logs, plan, num_partitions)
    add_audit(account, audited)
    check_accounting(account.counts)
    used = sum(count.used for (_, date), count in account.counts.items() if date != UNDATED)
    progress(f"attributed: {used:,} events used, {_total(account, 'rejects'):,} rejected, "
             f"{_total(account, 'duplicates'):,} duplicates")  # fmt: skip

    known, spec = grow_vocabularies(spark, config, lake, inputs, dates)
    plan = replace(plan, spec=spec)
    prepare_samples(spark, lake, spec, config)
    progress("vocabularies: " + ", ".join(f"{f.name} {f.num_embeddings - FIRST_ID:,}" for f in spec.sparse))

    condition = dates_condition(PARTITION_COLUMN, request.first, request.last)
    replace_dates(sample_frame(inputs, config, known, plan, num_partitions), lake.path(SAMPLES), condition)
    version = table_version(spark, lake.path(SAMPLES))
    written = spark.read.format("delta").option("versionAsOf", version).load(lake.path(SAMPLES)).filter(condition)
    counts = count_samples(written, spec)
    _check_written(counts, account, dates)
    progress(f"samples: {sum(f.impressions for f in counts.funnels.values()):,} rows of {len(dates)} dates, "
             f"table version {version}")  # fmt: skip

    _write_rejects(spark, request, inputs, audited)
    build = {
        "dates_built": f"{request.first}:{request.last}",
        "watermark": _iso(plan.watermark),
        "table_version": version,
    }
    for date in dates:
        report = date_report(date, account=account, counts=counts, config=config, spec=spec, build=build)
        write_report(spark, lake, date, report)
    progress(f"rejects and {len(dates)} reports written")
    for line in funnel_lines(counts, config.scenarios):
        progress.write(line)
    for warning in warnings_of(counts, config.scenarios):
        progress.write(f"warning: {warning}")
    progress.write(f"{lake.path(SAMPLES)}: version {version}")
    return counts


def read_inputs(spark: SparkSession, config: Config, logs_dir: str) -> Inputs:
    """Open, check and cast all logs, and set duplicates aside.

    Raises:
        DataCheckError: a log or a column is missing or has the wrong type.
    """
    folder = LogFolder(spark, logs_dir, config.logs)
    logs = event_logs(config, folder)
    events = read_events(config, folder, logs)
    features = config.features
    tables = {}
    for log, key, categories, numbers in (
        ("users", "user_id", features.user_categories, features.user_numbers),
        ("items", "item_id", features.item_categories, features.item_numbers),
    ):
        if categories or numbers:
            tables[log] = (read_features(folder, log, key, categories, numbers), key)
    unique, duplicates = split_duplicates(events.filter(F.col("reason").isNull()).drop("reason", "row_json"))
    # Three passes read it, and clean rows are smaller than the logs.
    unique = kept(unique)
    account = account_of(events, duplicates, logs)
    unique_tables = {log: unique_features(table, log, key, account) for log, (table, key) in tables.items()}
    return Inputs(logs, events, unique, unique_tables.get("users"), unique_tables.get("items"), account)


def grow_vocabularies(
    spark: SparkSession, config: Config, lake: Lake, inputs: Inputs, dates: list[str]
) -> tuple[Vocabularies, FeatureSpec]:
    """Admit the values of the fitting dates, and say what the table offers: before the samples need the ids."""
    if config.vocabulary.kind == "hash":
        return Vocabularies(inputs.events, {}), feature_spec(config, {})
    path = lake.path(VOCABULARIES)
    known = read_vocabularies(spark, path, table_version(spark, path) if lake.has(spark, VOCABULARIES) else None)
    fitting = set(dates)
    if lake.has(spark, SAMPLES):
        rows = spark.read.format("delta").load(lake.path(SAMPLES)).select(PARTITION_COLUMN).distinct().collect()
        fitting |= {row[0].isoformat() for row in rows}
    if config.data.train_dates:
        first, last = parse_dates(config.data.train_dates, where="data.train_dates")
        fitting = {date for date in fitting if first.isoformat() <= date <= last.isoformat()}
    shown = inputs.unique.filter(F.col("kind") == KIND_IMPRESSION)
    shown = shown.filter(F.to_date("event_time").isin([dt.date.fromisoformat(date) for date in sorted(fitting)]))
    counts = count_values(shown, inputs.users, inputs.items, config)
    fresh, max_ids = new_entries(counts, known, config.vocabulary.min_count)
    if max_ids != known.max_ids:
        append_vocabularies(spark, lake, fresh)
        known = Vocabularies(kept(spark.read.format("delta").load(path)), max_ids)
    return known, feature_spec(config, max_ids)


def sample_frame(inputs: Inputs, config: Config, known: Vocabularies, plan: PassPlan, num_partitions: int) -> DataFrame:
    """The samples of the planned time range, in the columns of the table."""
    schema = samples_schema(plan.spec)
    inner = T.StructType([column for column in schema if column.name not in _AFTER_PASS])
    arrow_schema = to_arrow_schema(inner, timezone="UTC")
    plan = replace(
        plan, own_columns=own_columns(config, inner.names), profile_columns=profile_columns(config, inner.names)
    )

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return samples(batches, plan, arrow_schema)

    events = encoded_events(inputs.unique, inputs.users, inputs.items, known, config, plan)
    rows = events.repartition(num_partitions, "user_id").sortWithinPartitions(*SORT_COLUMNS).mapInArrow(run, inner)
    names = F.array(*(F.lit(s) for s in config.scenarios))
    added = {
        "scenario": F.element_at(names, (F.col(index_column("scenario")) + 1).cast("int")),
        PARTITION_COLUMN: F.to_date("event_time"),
        "user_key": F.xxhash64("user_id"),
        # A row without a request is a request of its own: null must not throw all such rows together.
        "request_key": F.xxhash64(F.coalesce("request_id", "impression_id")),
        index_column(EVENT_HOUR): (F.hour("event_time") + FIRST_ID).cast("bigint"),
    }
    return rows.select(*(added[name].alias(name) if name in added else F.col(name) for name in schema.names))


def _dates_to_build(request: BuildRequest, account: Account) -> list[str]:
    dates = sorted(d for d in account.impression_dates if request.first.isoformat() <= d <= request.last.isoformat())
    if not dates:
        there = (
            f"{min(account.impression_dates)}:{max(account.impression_dates)}" if account.impression_dates else "none"
        )
        reasons = {reason for found in account.reasons.values() for reason in found}
        hint = f" (rows were rejected as: {', '.join(sorted(reasons))})" if reasons and there == "none" else ""
        raise DataCheckError(
            f"--dates {request.first}:{request.last}: the logs hold no impression on these dates; "
            f"they hold impressions on {there}{hint}; name dates of those"
        )
    return dates


def _plan(config: Config, request: BuildRequest, account: Account) -> PassPlan:
    watermark = request.watermark or account.newest
    assert watermark is not None  # there are impressions, so there is a newest time
    end = dt.datetime.combine(request.last, dt.time(), dt.UTC) + dt.timedelta(days=1)
    return PassPlan(
        rules=LabelRules.from_config(config.labels),
        spec=feature_spec(config, {}),
        watermark=micros(watermark),
        first=micros(dt.datetime.combine(request.first, dt.time(), dt.UTC)),
        end=micros(end),
    )


def _num_partitions(spark: SparkSession, account: Account, dates: list[str]) -> int:
    """Tasks of the pass: each core has one, and no file gets more than MAX_ROWS_PER_FILE rows of a date."""
    shown: dict[str, int] = {}
    for (log, date), count in account.counts.items():
        if date in dates and log.endswith("_impressions"):
            shown[date] = shown.get(date, 0) + count.rows_in
    return max(spark.sparkContext.defaultParallelism, -(-max(shown.values()) // MAX_ROWS_PER_FILE))


def _write_rejects(spark: SparkSession, request: BuildRequest, inputs: Inputs, audited: DataFrame) -> None:
    """Rejects of the built dates, of rows without a date, and of dates that have no impressions and so no build."""
    unusable = inputs.events.filter(F.col("reason").isNotNull()).select(
        "log", "reason", F.col("row_json").alias("row"), F.to_date("event_time").alias("date")
    )
    rejected = audited.filter(F.col("reason").isNotNull()).select("log", "reason", "row", "date")
    if inputs.account.num_unusable:
        rejected = rejected.unionByName(unusable)
    conditions = [dates_condition("date", request.first, request.last), "date IS NULL"]
    others = inputs.account.dates_without_impressions
    if others:
        conditions.append(f"date IN ({', '.join(f'DATE{str(day)!r}' for day in others)})")
    condition = " OR ".join(conditions)
    write_rejects(spark, request.lake, rejected.filter(condition), condition)


def _check_written(counts: SampleCounts, account: Account, dates: list[str]) -> None:
    for date in dates:
        needed = sum(c.used for (log, day), c in account.counts.items() if day == date and log.endswith("_impressions"))
        found = counts.date(date).impressions
        if found != needed:
            raise AccountingError(
                f"samples of {date}: {found} rows written, {needed} impressions came in; please report"
            )


def _total(account: Account, what: str) -> int:
    return sum(getattr(count, what) for count in account.counts.values())


def micros(moment: dt.datetime) -> int:
    """Microseconds since 1970 of an aware datetime."""
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


def _iso(moment: int) -> str:
    return (dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=moment)).isoformat()
