"""Late events: find the dates whose rows they change, and build those again; the others stay as they are.

Each report keeps a fingerprint of the rows of its date. The pass over the current logs gives new ones; dates whose
fingerprints differ are touched, and what the pass has staged of them is written. The vocabularies stay as they are, so
that the restated dates equal those of a full rebuild over the same vocabularies, row for row.

Where the users or items have changed since, the rows that are there keep what these were when their date was built: the
tables of a later day may know how an impression ended. Only impressions that come late take those of now.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict, dataclass, replace
from typing import Any

from pyspark.sql import SparkSession

from etl.build.account import Account
from etl.build.held import check_restated, not_built
from etl.build.inputs import day_of, make_plan
from etl.build.report import read_reports
from etl.build.samples import BuildRequest, Job, Progress, build_samples, passed_logs, row_plan, write_dates
from etl.build.state import write_state, write_sums
from etl.checks import DataCheckError
from etl.features.by_id import update_tables_by_id
from etl.features.counters import counter_fingerprints
from etl.features.vocabulary import existing_vocabularies, feature_spec
from etl.kernel.attribution import LabelRules
from etl.kernel.fingerprint import date_fingerprint
from etl.kernel.packs import COUNT, EVENT, VALUE
from etl.lake.tables import Lake, check_tables, prepare_samples, sample_dates
from usr_ray.config import SHOWN_RANGES, Config, date_ranges, dates_there


@dataclass(frozen=True, kw_only=True, slots=True)
class RestateRequest:
    """Which dates of which lake to look at again."""

    logs: str
    lake: Lake
    first: dt.date | None = None
    """None restates every date built so far. With a date the logs are read from it on only, and what lies before is
    taken from the state, so that they need not reach back to the beginning."""
    last: dt.date | None = None
    watermark: dt.datetime | None = None


def restate_samples(
    spark: SparkSession, config: Config, request: RestateRequest, progress: Progress
) -> dict[str, list[str]]:
    """Build the dates again that late events have changed.

    Returns:
        Restated date -> what has changed of it (`impressions`, `labels`, `histories`, `final_until`).

    Raises:
        DataCheckError: nothing was built yet, the configuration has changed, a log cannot be used, or it holds a date
            no longer that the lake was built from.
    """
    lake = request.lake
    check_tables(spark, lake, config, feature_spec(config))
    asked = (str(request.first or dt.date.min), str(request.last or dt.date.max))
    every = read_reports(spark, lake)
    reports = {date: found for date, found in every.items() if asked[0] <= date <= asked[1]}
    if not reports:
        raise DataCheckError(f"--restate: {lake.root} has no reports of the dates asked for; build them with --dates")
    if request.first is not None and request.last is not None:
        span, source = (request.first, request.last), f"{lake.root} has reports of"
        _, warning = dates_there(span, set(reports), where="--dates", source=source, allow_missing=True)
        if warning:  # a scheduled restatement looks back further than a young lake goes
            progress.write(f"warning: {warning}")
    if gone := _deleted(reports, sample_dates(spark, lake)):
        progress.write(f"{date_ranges(gone, most=SHOWN_RANGES)}: no longer in the samples, so not restated")
        reports = {date: found for date, found in reports.items() if date not in gone}
        if not reports:
            return {}
    days, rules = tuple(map(day_of, reports)), LabelRules.from_config(config.labels)
    with passed_logs(spark, config, request.logs, lake, request.first, days, progress) as (state, inputs):
        notes = check_restated(lake, every, inputs.account, state, make_plan(config, days), reports)
        for note in (*notes, *not_built(lake, every, inputs.account)):
            progress.write(f"warning: {note}")
        # Events may have changed that only dates yet to come show.
        last = max(dt.date.fromisoformat(max(reports)), state.complete_until or dt.date.min)
        whole = replace(state, complete_until=last if state.complete_until else None)
        sums = write_sums(spark, config, lake, whole, inputs.staged(COUNT), inputs.tables, last)
        write_state(spark, config, lake, whole, inputs.staged(EVENT), inputs.staged(VALUE), last)
        known = existing_vocabularies(spark, config, lake)
        spec = feature_spec(config, known)
        rows = row_plan(config, spec, inputs.account, request.watermark, days)
        seen = counter_fingerprints(sums, config, days)
        touched = touched_dates(reports, inputs.account, rules, rows.watermark, seen)
        recounted = [
            date for date, report in reports.items() if date in touched or _recounted(date, report, inputs.account)
        ]
        for date, reasons in touched.items():
            progress(f"{date}: changed {', '.join(reasons)}")
        if not recounted:
            progress(f"nothing to restate in {len(reports)} dates")
            return {}
        rows = replace(rows, days=tuple(map(day_of, touched)))
        versions = update_tables_by_id(spark, config, lake, inputs.tables, known, spec)
        prepare_samples(spark, lake, spec, config, versions)
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
            seen=seen,
            **_tables_of(reports, touched, inputs.account.tables),
        )
        write_dates(job, _dates(touched), _dates(recounted))
    return touched


def add_samples(spark: SparkSession, config: Config, request: BuildRequest, progress: Progress) -> None:
    """Build the requested dates behind the last one that the lake has a report of, and restate those up to it.

    Raises:
        DataCheckError: as `build_samples` and `restate_samples`.
    """
    reports = read_reports(spark, request.lake)
    there = [date for date in request.dates if date.isoformat() in reports]
    last = max(there, default=None)
    first_new = request.first if last is None else last + dt.timedelta(days=1)
    if first_new <= request.last:
        build_samples(spark, config, replace(request, first=first_new), progress)
    if last is not None:
        before = RestateRequest(
            logs=request.logs, lake=request.lake, first=request.first, last=last, watermark=request.watermark
        )
        restate_samples(spark, config, before, progress)


def touched_dates(
    reports: dict[str, dict[str, Any]], account: Account, rules: LabelRules, watermark: int, counters: dict[str, str]
) -> dict[str, list[str]]:
    """Date -> names of its fingerprints that differ from the report's; a report without any differs in all.

    `counters` has the fingerprint of each date's counters, where there are any.
    """
    touched = {}
    for date, report in reports.items():
        before = report.get("fingerprint", {})
        now = date_fingerprint(day_of(date), account.cells, rules, watermark)
        if date in counters:
            now["counters"] = counters[date]
        changed = [name for name, value in now.items() if before.get(name) != value]
        if changed:
            touched[date] = changed
    return touched


def _tables_of(
    reports: dict[str, dict[str, Any]], touched: dict[str, list[str]], now: dict[str, str]
) -> dict[str, Any]:
    """`keeping` and `owned` of the job: which rows keep what they were, and what tables a date is then made with."""
    before = {date: report.get("fingerprint", {}).get("tables") for date, report in reports.items()}
    keeping = [date for date in touched if now and before[date] != now]
    # Rows that come late have other tables than the rest, so that no table alone makes this date's rows again.
    mixed = {date: None for date in keeping if "impressions" in touched[date]}
    return {"keeping": _dates(keeping), "owned": before | mixed}


def _recounted(date: str, report: dict[str, Any], account: Account) -> bool:
    """True where rejects or duplicates of the date have changed, so that its report and rejects are stale.

    Not where rows without a date have: users and items are more every day, and all dates would be counted anew.
    """
    now = {log: asdict(count) for (log, day), count in account.counts.items() if day == date and count.rows_in}
    before = {log: count for log, count in report["rows"].items() if count["rows_in"]}
    reasons = {log: found for (log, day), found in account.reasons.items() if day == date}
    return now != before or reasons != report["rejects"]


def _deleted(reports: dict[str, dict[str, Any]], there: set[str]) -> set[str]:
    """Dates whose rows somebody has deleted from the samples; their reports stay."""
    held = {date for date, report in reports.items() if any(s["impressions"] for s in report["scenarios"].values())}
    return held - there


def _dates(names: Any) -> list[dt.date]:
    return [dt.date.fromisoformat(name) for name in names]
