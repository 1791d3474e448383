"""Late events: find the dates whose rows they change, and build those again; the others stay as they are.

Each report keeps a fingerprint of the rows of its date. The pass over the current logs gives new ones; dates whose
fingerprints differ are touched, and what the pass has staged of them is written. The vocabularies stay as they are, so
that the restated dates equal those of a full rebuild over the same vocabularies, row for row.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict, dataclass, replace
from typing import Any

from pyspark.sql import SparkSession

from etl.build.account import UNDATED, Account
from etl.build.inputs import Inputs, day_of
from etl.build.report import read_reports
from etl.build.samples import Job, Progress, passed_logs, row_plan, write_dates
from etl.build.state import DUPLICATE_SPAN, write_state, write_sums
from etl.checks import DataCheckError
from etl.features.by_id import update_tables_by_id
from etl.features.counters import counter_fingerprints
from etl.features.vocabulary import existing_vocabularies, feature_spec
from etl.kernel.attribution import LabelRules
from etl.kernel.fingerprint import date_fingerprint
from etl.kernel.packs import COUNT, EVENT, VALUE
from etl.lake.tables import Lake, check_tables, prepare_samples
from usr_ray.config import Config, dates_there
from usr_ray.schema import SAMPLES


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
        DataCheckError: nothing was built yet, the configuration has changed, a log cannot be used, or the logs hold a
            date no longer that would be built again.
    """
    lake = request.lake
    check_tables(spark, lake, config, feature_spec(config))
    asked = (str(request.first or dt.date.min), str(request.last or dt.date.max))
    reports = {date: found for date, found in read_reports(spark, lake).items() if asked[0] <= date <= asked[1]}
    if not reports:
        raise DataCheckError(f"--restate: {lake.root} has no reports of the dates asked for; build them with --dates")
    if request.first is not None and request.last is not None:
        span, source = (request.first, request.last), f"{lake.root} has reports of"
        _, warning = dates_there(span, set(reports), where="--dates", source=source, allow_missing=True)
        if warning:  # a scheduled restatement looks back further than a young lake goes
            progress.write(f"warning: {warning}")
    days, rules = tuple(map(day_of, reports)), LabelRules.from_config(config.labels)
    with passed_logs(spark, config, request.logs, lake, request.first, days, progress) as (state, inputs):
        _check_logs(lake, reports, inputs, rules)
        # Events may have changed that only dates yet to come show.
        last = max(dt.date.fromisoformat(max(reports)), state.complete_until or dt.date.min)
        whole = replace(state, complete_until=last if state.complete_until else None)
        sums = write_sums(spark, config, lake, whole, inputs.staged(COUNT), last)
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
            seen=seen,
        )
        write_dates(job, _dates(touched), _dates(recounted))
    return touched


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


def _recounted(date: str, report: dict[str, Any], account: Account) -> bool:
    """True where rejects or duplicates of the date have changed, so that its report and rejects are stale."""
    logs = {log for log, day in account.counts if day == date} | set(report["rows"])
    now = {log: asdict(account.counts[log, date]) for log in logs if (log, date) in account.counts}
    reasons = {log: found for (log, day), found in account.reasons.items() if day == date}
    undated = {log: asdict(count) for (log, day), count in account.counts.items() if day == UNDATED}
    return now != report["rows"] or reasons != report["rejects"] or undated != report["undated"]["rows"]


def _check_logs(lake: Lake, reports: dict[str, dict[str, Any]], inputs: Inputs, rules: LabelRules) -> None:
    """Refuse to replace a date by nothing because its logs have been cleared away."""
    held = {date for date, report in reports.items() if any(s["impressions"] for s in report["scenarios"].values())}
    shown = inputs.num_impressions(held)
    gone = sorted(date for date in held if not shown[date])
    if gone:
        # The first dates that the logs still hold have lost what went before their own clicks and orders.
        margin = dt.timedelta(days=1, microseconds=rules.reach + DUPLICATE_SPAN)
        last_cut = (dt.datetime.fromisoformat(gone[-1]) + margin).date().isoformat()
        whole = sorted(date for date in held if date > last_cut)
        way_out = (
            f"name the dates whose logs are whole: --dates {whole[0]}:{whole[-1]}" if whole else "name other --logs"
        )
        raise DataCheckError(
            f"--restate: the logs hold no impression of {', '.join(gone[:3])}{' ...' if len(gone) > 3 else ''}, which "
            f"{lake.path(SAMPLES)} holds and would lose; {way_out}"
        )


def _dates(names: Any) -> list[dt.date]:
    return [dt.date.fromisoformat(name) for name in names]
