"""build_samples(): logs -> samples, vocabularies, rejects and reports; all of a user in one shuffle and one pass."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pyspark.sql import DataFrame, SparkSession

from etl.build.account import UNDATED, Account, keys_in_other_forms
from etl.build.held import check_earlier, silent_logs
from etl.build.inputs import Inputs, day_of, iso_time, make_plan, open_logs, run_pass, watermark_of
from etl.build.report import (
    SampleCounts,
    count_samples,
    date_report,
    funnel_lines,
    mark_new,
    owners_with_gaps,
    read_reports,
    warnings_of,
    write_report,
)
from etl.build.staging import staging_folder
from etl.build.state import State, find_state, past_events, value_counts, write_state, write_sums
from etl.checks import AccountingError, DataCheckError
from etl.features.by_id import update_tables_by_id
from etl.features.counters import counter_fingerprints, counter_plan, sums_of_chunks, sums_of_values
from etl.features.encoding import (
    encoded_packs,
    kept_columns,
    owned_categories,
    owned_numbers,
    pack_features,
    sample_frame,
)
from etl.features.lists import cut_values, list_values
from etl.features.vocabulary import Vocabularies, feature_spec, grow_vocabularies
from etl.jvm import table_version
from etl.kernel.attribution import LabelRules
from etl.kernel.fingerprint import date_fingerprint
from etl.kernel.packs import COUNT, EVENT, PACK, PAIRS, VALUE
from etl.kernel.rows import KEPT_KEY, RowPlan
from etl.lake.tables import Lake, any_date_condition, check_tables, prepare_samples, replace_dates, write_rejects
from usr_ray.config import SHOWN_RANGES, Config, date_ranges, dates_there, day_number
from usr_ray.schema import FIRST_ID, PARTITION_COLUMN, SAMPLES, FeatureSpec

Tables = Mapping[str, str] | None
"""Account.tables of the users and items that all rows of a date are made with; None: of several, or unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRequest:
    """What to build from where."""

    logs: str
    lake: Lake
    first: dt.date
    last: dt.date
    watermark: dt.datetime | None = None
    """None stands for the newest event_time that is used (docs/tables.md, labels 6)."""

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
    plan: RowPlan
    known: Vocabularies
    progress: Progress
    sums: DataFrame | None = None
    """The counters' daily sums (etl/features/counters.py); None: there are no counters."""
    since: dt.date | None = None
    """The packs have the users' sums of events from here on; None: of all."""
    seen: Mapping[str, str] = field(default_factory=dict)
    """Date -> fingerprint of what its counters see."""
    owned: Mapping[str, Tables] = field(default_factory=dict)
    """Date -> the users and items tables that its rows are made with, where not all are made with today's."""
    keeping: Sequence[dt.date] = ()
    """Dates whose rows keep what their users and items were when they were built (restate.py)."""


def build_samples(spark: SparkSession, config: Config, request: BuildRequest, progress: Progress) -> SampleCounts:
    """Build the samples of the requested dates; a rerun replaces them by equal rows.

    Raises:
        DataCheckError: a log is missing or unusable, has lost earlier dates, or the table was built with another
            configuration; UserError: the dates, or one of them without data.allow_missing_dates, hold no impression.
            Nothing has been written then.
    """
    lake = request.lake
    check_tables(spark, lake, config, feature_spec(config))
    days = [day_number(date) for date in request.dates]
    with passed_logs(spark, config, request.logs, lake, request.first, days, progress) as (state, inputs):
        built = _dates_there(request, inputs, config, progress)
        notes = check_earlier(lake, read_reports(spark, lake), inputs.account, state, built)
        for note in (*notes, *silent_logs(inputs.account, built)):
            progress.write(f"warning: {note}")
        dates = [date.isoformat() for date in built]
        counts = value_counts(spark, lake, state, inputs.staged(VALUE))
        known, spec = grow_vocabularies(spark, config, lake, counts, inputs.tables, dates, inputs.staged(PACK))
        sums = write_sums(spark, config, lake, state, inputs.staged(COUNT), inputs.tables, built[-1])
        with ThreadPoolExecutor(1) as beside:  # a small query plans for longer than its tasks run: two at a time
            done = beside.submit(
                write_state, spark, config, lake, state, inputs.staged(EVENT), inputs.staged(VALUE), built[-1]
            )
            versions = update_tables_by_id(spark, config, lake, inputs.tables, known, spec)
            prepare_samples(spark, lake, spec, config, {**versions, **known.fitted})
            progress(_vocabularies_line(known, spec))
            rows = row_plan(config, spec, inputs.account, request.watermark, [day_number(date) for date in built])
            job = Job(
                spark=spark,
                config=config,
                lake=lake,
                inputs=inputs,
                plan=rows,
                known=known,
                progress=progress,
                sums=sums,
                since=state.since,
                seen=counter_fingerprints(sums, config, rows.days),
            )
            found = write_dates(job, built, built)
        done.result()
        return found


def _vocabularies_line(known: Vocabularies, spec: FeatureSpec) -> str:
    """How many values have an id, and how many of them for their vector alone."""
    rows = [] if known.cold is None else known.cold.groupBy("feature").count().collect()
    cold = {row["feature"]: f" ({row['count']:,} of them by their vector alone)" for row in rows}
    sizes = (f"{n} {f.num_embeddings - FIRST_ID:,}{cold.get(n, '')}" for n, f in spec.vocabularies.items())
    return "vocabularies: " + ", ".join(sizes)


def row_plan(
    config: Config, spec: FeatureSpec, account: Account, watermark: dt.datetime | None, days: Sequence[int]
) -> RowPlan:
    """How the rows of some days are written; the watermark is by default the newest event that is used."""
    return RowPlan(
        rules=LabelRules.from_config(config.labels),
        spec=spec,
        watermark=watermark_of(account, watermark, days, LabelRules.from_config(config.labels)),
        days=tuple(days),
        features=pack_features(config),
        owned_categories=owned_categories(config),
        owned_numbers=owned_numbers(config),
    )


def write_dates(job: Job, dates: Sequence[dt.date], reported: Sequence[dt.date]) -> SampleCounts:
    """Replace the samples of `dates`, and the rejects and reports of `reported` (which holds them all).

    Raises:
        AccountingError: rows in and rows out do not add up.
    """
    spark, lake, account = job.spark, job.lake, job.inputs.account
    path = lake.path(SAMPLES)
    names = {date.isoformat() for date in dates}
    with ThreadPoolExecutor(1) as beside:
        done = beside.submit(_write_rejects, job, reported)
        version, counts, cut = _write_samples(job, dates, reported)
    done.result()
    for date, needed in job.inputs.num_impressions(names).items():
        if counts.date(date).impressions != needed:
            raise AccountingError(f"samples of {date}: {counts.date(date).impressions} rows written, {needed} came in")
    job.progress(
        f"samples: {sum(counts.date(n).impressions for n in names):,} rows of {len(names)} dates, "
        f"table version {version}"
    )
    build = {
        "watermark": iso_time(job.plan.watermark),
        "table_version": version,
        **({"cut_values": cut} if cut else {}),
    }
    known_dates = account.impression_dates | {date for date, _ in counts.funnels}
    shown = sorted(date.isoformat() for date in reported if date.isoformat() in known_dates)
    for date in shown:
        fingerprint = date_fingerprint(day_of(date), account.cells, job.plan.rules, job.plan.watermark)
        if date in job.seen:
            fingerprint["counters"] = job.seen[date]
        fingerprint["tables"] = job.owned.get(date, account.tables)
        report = date_report(
            date,
            account=account,
            counts=counts,
            config=job.config,
            spec=job.plan.spec,
            build=build | {"fingerprint": fingerprint},
        )
        write_report(spark, lake, date, report)
    job.progress(f"rejects and {len(shown)} reports written")
    for line in funnel_lines(counts, job.plan.spec):
        job.progress.write(line)
    settled = dt.datetime.fromisoformat(iso_time(job.plan.watermark - job.plan.rules.click_window))
    warnings = warnings_of(counts, job.plan.spec, [log.name for log in job.inputs.logs], settled)
    doubted = {o: table for o, table in job.inputs.tables.items() if o in owners_with_gaps(counts, job.plan.spec)}
    for warning in (*warnings, *keys_in_other_forms(job.inputs.staged(VALUE), doubted)):
        job.progress.write(f"warning: {warning}")
    job.progress.write(f"{path}: version {version}")
    return counts


def _write_samples(
    job: Job, dates: Sequence[dt.date], reported: Sequence[dt.date]
) -> tuple[int, SampleCounts, dict[str, int]]:
    """Replace the rows of `dates`; the table's version, what it holds on the `reported` ones, and what was cut."""
    path, inputs = job.lake.path(SAMPLES), job.inputs
    cut: dict[str, int] = {}
    if dates:
        packs, values = inputs.staged(PACK), inputs.staged(VALUE)
        plan, sums = job.plan, None
        if job.sums is not None:
            plan = replace(plan, counters=counter_plan(job.sums, job.config, plan.days))
            seen = sums_of_values(job.sums, job.config, plan.days, job.since)
            sums = sums_of_chunks(values, inputs.staged(PAIRS), seen)
        tables, features = inputs.tables, job.config.features.lists
        lists = list_values(values, tables, features)
        if lists is not None:
            cut = cut_values(lists, features)
        before, num_before = _rows_before(job)
        if before is not None:
            plan = replace(plan, kept=kept_columns(job.config, plan.spec))
        encoded = encoded_packs(
            packs,
            values,
            tables,
            job.known,
            job.config,
            inputs.num_values,
            sums,
            lists,
            len(plan.days),
            before,
            num_before,
        )
        replace_dates(sample_frame(encoded, plan), path, any_date_condition(PARTITION_COLUMN, dates))
    version = table_version(job.spark, path)
    table = job.spark.read.format("delta").option("versionAsOf", version).load(path)
    rows = mark_new(table.filter(any_date_condition(PARTITION_COLUMN, reported)), table, job.config, reported)
    hashed = job.config.vocabulary.kind == "hash"
    return version, count_samples(rows, job.plan.spec, hashed=hashed, cold_ids=job.known.cold), cut


def _rows_before(job: Job) -> tuple[DataFrame | None, int]:
    """What rows of the table keep (`kept_columns`), and of about how many; None where none keeps anything."""
    columns = kept_columns(job.config, job.plan.spec)
    if not (columns and job.keeping):
        return None, 0
    path = job.lake.path(SAMPLES)
    # Pinned: these rows are read while they are replaced.
    there = job.spark.read.format("delta").option("versionAsOf", table_version(job.spark, path)).load(path)
    rows = there.filter(any_date_condition(PARTITION_COLUMN, job.keeping)).select(*KEPT_KEY, *columns)
    return rows, sum(job.inputs.num_impressions({date.isoformat() for date in job.keeping}).values())


@contextmanager
def passed_logs(
    spark: SparkSession,
    config: Config,
    logs_dir: str,
    lake: Lake,
    first: dt.date | None,
    days: Sequence[int],
    progress: Progress,
) -> Iterator[tuple[State, Inputs]]:
    """The state of earlier dates and what one pass over the logs finds, staged inside the block, with progress lines.

    Args:
        first: what lies before is taken from the state; None: all logs are read and attributed again.
        days: the days to make rows of, since 1970.
    """
    logs = open_logs(spark, config, logs_dir)
    progress(f"reading {len({log.name for log in logs.logs})} event logs")
    state = find_state(spark, config, lake, first or dt.date.max)
    if first is None:
        state = replace(state, since=None)
    plan = make_plan(config, tuple(days), state.since_us)
    first_row = state.first_row(plan.rules, whole_days=bool(plan.max_user_day_rows))
    if first_row is None:
        past = None
        progress("no state of earlier dates: all logs are read")
    else:
        past = past_events(spark, lake, state)
        progress(f"events before {state.since} are known; the logs are read from {iso_time(first_row)} on")
    with staging_folder(spark, lake) as folder:
        inputs = run_pass(spark, logs, plan, folder, first_row=first_row, past=past)
        _show_inputs(inputs, progress)
        yield state, inputs


def _show_inputs(inputs: Inputs, progress: Progress) -> None:
    """Progress lines about the rows that came in and where they went, and warnings."""
    counts = inputs.account.counts
    rows_in = sum(count.rows_in for count in counts.values())
    used = sum(count.used for (_, date), count in counts.items() if date != UNDATED)
    rejects, duplicates = (sum(getattr(count, name) for count in counts.values()) for name in ("rejects", "duplicates"))
    progress(f"read {rows_in:,} rows of {len({log for log, _ in counts})} logs")
    progress(f"attributed: {used:,} events used, {rejects:,} rejected, {duplicates:,} duplicates")
    for line in inputs.account.lines():
        progress.write(line)
    for note in inputs.notes:
        progress.write(f"warning: {note}")


def _dates_there(request: BuildRequest, inputs: Inputs, config: Config, progress: Progress) -> list[dt.date]:
    """The dates to build: those asked for that have an impression. What the lake holds of the others stays."""
    account = inputs.account
    there = {date for date, rows in inputs.num_impressions(account.impression_dates).items() if rows}
    if not there & {date.isoformat() for date in request.dates}:
        reasons = sorted({reason for by_reason in account.reasons.values() for reason in by_reason})
        hint = f" (rows were rejected as: {', '.join(reasons)})" if reasons and not there else ""
        raise DataCheckError(
            f"--dates {request.first}:{request.last}: the logs hold no impression on these dates; "
            f"they hold impressions on {date_ranges(there, most=SHOWN_RANGES) or 'none'}{hint}; name dates of those"
        )
    dates, warning = dates_there(
        (request.first, request.last),
        there,
        where="--dates",
        source="the logs hold impressions on",
        allow_missing=config.data.allow_missing_dates,
    )
    if warning:
        progress.write(f"warning: {warning}")
    return dates


def _write_rejects(job: Job, dates: Sequence[dt.date]) -> None:
    """Rejects of the given dates, of rows without a date, and of dates that have no impressions and so no build."""
    every = sorted({*dates, *job.inputs.account.dates_without_impressions})
    condition = " OR ".join(["date IS NULL", *([any_date_condition("date", every)] if every else [])])
    write_rejects(job.spark, job.lake, job.inputs.rejects.filter(condition), condition)
