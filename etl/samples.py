"""build_samples(): logs -> samples, vocabularies, rejects and reports; all of a user in one shuffle and one pass."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

from etl.account import UNDATED, Account
from etl.checks import AccountingError, DataCheckError
from etl.cold_start import mark_new
from etl.encoding import encoded_events, own_columns, profile_columns
from etl.fingerprint import date_fingerprint
from etl.inputs import Inputs, audited, day_of, iso_time, make_plan, num_tasks, read_inputs
from etl.report import SampleCounts, count_samples, date_report, funnel_lines, warnings_of
from etl.report_files import write_report
from etl.table_checks import check_tables
from etl.tables import (
    Lake,
    any_date_condition,
    prepare_samples,
    replace_dates,
    samples_schema,
    table_version,
    write_rejects,
)
from etl.user_pass import SORT_COLUMNS, PassPlan, samples
from etl.vocabulary import EVENT_HOUR, Vocabularies, grow_vocabularies
from usr_ray.config import Config
from usr_ray.schema import FIRST_ID, PARTITION_COLUMN, SAMPLES, index_column

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

    @property
    def dates(self) -> list[dt.date]:
        """All dates from first to last."""
        return [self.first + dt.timedelta(days=n) for n in range((self.last - self.first).days + 1)]


@dataclass(slots=True)
class Progress:
    """Prints a line per stage with the seconds since the start."""

    write: Callable[[str], None] = print
    started: float = field(default_factory=time.monotonic)

    def __call__(self, text: str) -> None:
        """Print one line."""
        self.write(f"[{time.monotonic() - self.started:6.1f} s] {text}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every step of a build needs."""

    spark: SparkSession
    config: Config
    lake: Lake
    inputs: Inputs
    audited: DataFrame
    plan: PassPlan
    known: Vocabularies
    progress: Progress


def build_samples(spark: SparkSession, config: Config, request: BuildRequest, progress: Progress) -> SampleCounts:
    """Build the samples of the requested dates; a rerun replaces them by equal rows.

    Raises:
        DataCheckError: a log is missing or unusable, the dates hold no impression, or the table was built with another
            configuration. Nothing has been written then.
    """
    lake = request.lake
    check_tables(spark, lake, config)
    inputs = read_inputs(spark, config, request.logs)
    progress(described(inputs.account))
    shown = _dates_with_impressions(request, inputs.account)
    plan = make_plan(config, inputs, request.watermark)
    rows = audited(spark, inputs, plan)
    progress(accounted(inputs.account))

    known, spec = grow_vocabularies(spark, config, lake, inputs.impressions, (inputs.users, inputs.items), shown)
    prepare_samples(spark, lake, spec, config)
    progress("vocabularies: " + ", ".join(f"{f.name} {f.num_embeddings - FIRST_ID:,}" for f in spec.sparse))
    plan = replace(plan, spec=spec, days=tuple(day_of(date.isoformat()) for date in request.dates))
    job = Job(spark=spark, config=config, lake=lake, inputs=inputs, audited=rows, plan=plan, known=known,
              progress=progress)  # fmt: skip
    return write_dates(job, request.dates, request.dates)


def write_dates(job: Job, dates: Sequence[dt.date], reported: Sequence[dt.date]) -> SampleCounts:
    """Replace the samples of `dates`, and the rejects and reports of `reported` (which holds them all)."""
    spark, lake, account = job.spark, job.lake, job.inputs.account
    path = lake.path(SAMPLES)
    names = {date.isoformat() for date in dates}
    if dates:
        frame = sample_frame(job.inputs, job.config, job.known, job.plan, num_tasks(spark, job.inputs, names))
        replace_dates(frame, path, any_date_condition(PARTITION_COLUMN, dates))
    version = table_version(spark, path)
    written = spark.read.format("delta").option("versionAsOf", version).load(path)
    rows = mark_new(written.filter(any_date_condition(PARTITION_COLUMN, reported)), written, job.config, reported)
    counts = count_samples(rows, job.plan.spec, hashed=job.config.vocabulary.kind == "hash")
    for date, needed in job.inputs.num_impressions(names).items():
        if counts.date(date).impressions != needed:
            raise AccountingError(f"samples of {date}: {counts.date(date).impressions} rows written, {needed} came in")
    job.progress(f"samples: {sum(counts.date(n).impressions for n in names):,} rows of {len(names)} dates, "
                 f"table version {version}")  # fmt: skip
    _write_rejects(job, reported)
    build = {"watermark": iso_time(job.plan.watermark), "table_version": version}
    known_dates = account.impression_dates | {date for date, _ in counts.funnels}
    shown = sorted(date.isoformat() for date in reported if date.isoformat() in known_dates)
    for date in shown:
        fingerprint = date_fingerprint(day_of(date), account.cells, job.plan.rules, job.plan.watermark)
        report = date_report(date, account=account, counts=counts, config=job.config, spec=job.plan.spec,
                             build=build | {"fingerprint": fingerprint})  # fmt: skip
        write_report(spark, lake, date, report)
    job.progress(f"rejects and {len(shown)} reports written")
    for line in funnel_lines(counts, job.plan.spec):
        job.progress.write(line)
    for warning in warnings_of(counts, job.plan.spec, [log.name for log in job.inputs.logs]):
        job.progress.write(f"warning: {warning}")
    job.progress.write(f"{path}: version {version}")
    return counts


def sample_frame(inputs: Inputs, config: Config, known: Vocabularies, plan: PassPlan, num_partitions: int) -> DataFrame:
    """The samples of the planned days, in the columns of the table."""
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


def described(account: Account) -> str:
    """A progress line about the rows that came in."""
    rows_in = sum(count.rows_in for count in account.counts.values())
    return f"read {rows_in:,} rows of {len({log for log, _ in account.counts})} logs"


def accounted(account: Account) -> str:
    """A progress line about where the rows went."""
    used = sum(count.used for (_, date), count in account.counts.items() if date != UNDATED)
    rejects = sum(count.rejects for count in account.counts.values())
    duplicates = sum(count.duplicates for count in account.counts.values())
    return f"attributed: {used:,} events used, {rejects:,} rejected, {duplicates:,} duplicates"


def _dates_with_impressions(request: BuildRequest, account: Account) -> list[str]:
    found = sorted(d for d in account.impression_dates if request.first.isoformat() <= d <= request.last.isoformat())
    if found:
        return found
    dates = account.impression_dates
    there = f"{min(dates)}:{max(dates)}" if dates else "none"
    reasons = sorted({reason for by_reason in account.reasons.values() for reason in by_reason})
    hint = f" (rows were rejected as: {', '.join(reasons)})" if reasons and not dates else ""
    raise DataCheckError(
        f"--dates {request.first}:{request.last}: the logs hold no impression on these dates; "
        f"they hold impressions on {there}{hint}; name dates of those"
    )


def _write_rejects(job: Job, dates: Sequence[dt.date]) -> None:
    """Rejects of the given dates, of rows without a date, and of dates that have no impressions and so no build."""
    rejected = job.audited.filter(F.col("reason").isNotNull()).select("log", "reason", "row", "date")
    if job.inputs.account.num_unusable:
        rejected = rejected.unionByName(job.inputs.unusable)
    every = sorted({*dates, *job.inputs.account.dates_without_impressions})
    condition = " OR ".join(["date IS NULL", *([any_date_condition("date", every)] if every else [])])
    write_rejects(job.spark, job.lake, rejected.filter(condition), condition)
