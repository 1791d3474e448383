"""The one pass over the shuffled events: whole users in; packs of labelled impressions and an account of every row out.

Runs in Spark's Python workers through mapInArrow; needs numpy and pyarrow only. Memory is bounded by `chunk_rows` (or
by the largest user, who is never split) and by `_PACK_ROWS` impressions on the way out. Nothing is encoded here: a pack
holds codes of its chunk (etl/kernel/packs.py), and `value` rows say what they stand for and how often, so that
vocabularies can be fitted on what the pass found before any row is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.kernel.attribution import REASONS, Attribution, LabelRules, Labels, attribute, label
from etl.kernel.chunks import REQUEST_KEY, USER_KEY, Cleaned, cleaned, days_of, whole_users
from etl.kernel.counters import cell_name, chunk_sums, count_rows, counter_cells, sums_of_users
from etl.kernel.events import KIND_IMPRESSION, KIND_ORDER, Events, Ints, codes_and_values
from etl.kernel.fingerprint import combined, label_hashes
from etl.kernel.histories import HistoryEvents, history_events
from etl.kernel.packs import (
    ACCOUNT,
    CELL,
    EVENT,
    PACK,
    REJECT,
    Dictionaries,
    emitted,
    pack_histories,
    stream_of,
)
from usr_ray.config import DAY_US

BEGINNING = int(np.iinfo(np.int64).min)
"""`PassPlan.since` where no earlier build left anything."""
_PACK_ROWS = 262_144
"""Impressions of one pack; a chunk of small users makes one, so that its lookups travel once."""
OVER_LIMIT = "over_user_limit"
"""Reason of the rows of a user's day beyond limits.max_user_events_per_day; one reject stands for all of a log."""
UNUSABLE = "unusable"
"""Account rows of rows without a key or a time; the others are named as in LogCount."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassPlan:
    """Parameters of the pass; sent with the task."""

    rules: LabelRules
    num_scenarios: int
    history_length: int
    days: tuple[int, ...]
    """Impressions of these days (since 1970, UTC) become samples; the others are context."""
    since: int = BEGINNING
    """Microseconds. History events before it come from an earlier build; impressions before it are not counted."""
    categories: tuple[str, ...] = ()
    """Context features that get a vocabulary."""
    numbers: tuple[str, ...] = ()
    """Context features that are numbers: scaled already, or raw where the scale is fitted."""
    counted: tuple[tuple[str, ...], ...] = ()
    """Columns by whose values together past events are counted (etl/kernel/counters.py)."""
    told: tuple[str, ...] = ()
    """Ids by which they are counted too, though no row needs it."""
    max_user_day_rows: int = 0
    """limits.max_user_events_per_day; 0: no limit."""
    chunk_rows: int = 200_000


def first_pass(batches: Iterable[pa.RecordBatch], plan: PassPlan, partition: int = 0) -> Iterator[pa.RecordBatch]:
    """The outcome of every row, as rows of `packs.EMITTED`.

    Args:
        batches: event rows grouped by `user_key`, in any order inside a user.
        partition: makes the names of the chunks unique.
    """
    chunks = whole_users(batches, plan.chunk_rows)
    number = 0
    while (rows := next(chunks, None)) is not None:  # a for over enumerate() would keep the chunk's raw rows alive
        number += 1
        parts = cleaned(rows, plan.max_user_day_rows)
        del rows
        yield from _unusable(parts.unusable)
        yield from _capped(parts.capped)
        events = Events.from_arrow(parts.rows, ranked=plan.rules.clock_skew > 0)
        attribution = attribute(events, plan.rules, num_scenarios=plan.num_scenarios)
        yield from _account(parts, events, attribution)
        yield from _rejects(parts.rows, attribution)
        yield from _samples(parts.rows, events, attribution, plan, f"{partition}-{number}")


def _account(parts: Cleaned, events: Events, attribution: Attribution) -> Iterator[pa.RecordBatch]:
    """Rows in, duplicates and rows used, by kind, scenario and day."""
    logged = parts.rows.filter(pc.less_equal(parts.rows["kind"], KIND_ORDER))
    used = np.concatenate([events.rows(KIND_IMPRESSION), attribution.click_rows, attribution.order_rows])
    for table in (logged, parts.capped, parts.duplicates):
        yield from _counted("rows_in", table)
    yield from _counted("duplicates", parts.duplicates)
    yield from _counted("used", parts.rows.select(["kind", "scenario", "event_time"]).take(pa.array(used)))


def _counted(what: str, table: pa.Table) -> Iterator[pa.RecordBatch]:
    if not table.num_rows:
        return
    time = table["event_time"].cast(pa.int64())
    undated = time.is_null().to_numpy()
    day = pa.array(pc.fill_null(time, 0).to_numpy() // DAY_US, mask=undated)
    grouped = pa.table({"kind": table["kind"], "scenario": table["scenario"], "day": day, "time": time})
    sums = grouped.group_by(["kind", "scenario", "day"]).aggregate([([], "count_all"), ("time", "max")])
    columns = {name: sums[name] for name in ("kind", "scenario", "day")}
    yield emitted(ACCOUNT, what=what, num_rows=sums["count_all"], event_time=sums["time_max"], **columns)


def _unusable(rows: pa.Table) -> Iterator[pa.RecordBatch]:
    yield from _counted(UNUSABLE, rows)
    if rows.num_rows:
        columns = {name: rows[name] for name in ("kind", "scenario", "reason", "event_time")}
        yield emitted(REJECT, row=rows["row_json"], **columns)


def _capped(rows: pa.Table) -> Iterator[pa.RecordBatch]:
    """One reject for a user's day and log that is beyond the limit, with the number of its rows."""
    if not rows.num_rows:
        return
    grouped = rows.select(["user_id", "kind", "scenario"]).append_column("day", pa.array(days_of(rows)))
    sums = grouped.group_by(["user_id", "kind", "scenario", "day"]).aggregate([([], "count_all")])
    columns = {name: sums[name] for name in ("user_id", "kind", "scenario")}
    day_us = sums["day"].to_numpy() * DAY_US
    yield emitted(REJECT, reason=OVER_LIMIT, event_time=day_us, num_rows=sums["count_all"], **columns)


def _rejects(rows: pa.Table, attribution: Attribution) -> Iterator[pa.RecordBatch]:
    rejected = attribution.reject_rows
    if len(rejected):
        names = ("kind", "scenario", "id", "item_id", "user_id", "impression_id", "event_time", "known_time")
        picked = rows.select(list(names)).take(pa.array(rejected))
        reason = pa.array(REASONS).take(pa.array(attribution.reject_codes))
        yield emitted(REJECT, reason=reason, **{name: picked[name] for name in names})


def _samples(
    rows: pa.Table, events: Events, attribution: Attribution, plan: PassPlan, chunk: str
) -> Iterator[pa.RecordBatch]:
    """Packs of the impressions of the plan's days, what their codes stand for, and the fingerprints of the days."""
    shown = events.rows(KIND_IMPRESSION)
    days = events.time[shown] // DAY_US
    is_target, is_counted = np.isin(days, plan.days), events.time[shown] >= plan.since
    targets = shown[is_target]
    labels = label(events, attribution, targets, plan.rules)
    histories = [history_events(events, attribution, k, plan.since) for k in range(plan.num_scenarios)]
    for k, history in enumerate(histories):
        yield from _history_rows(rows, history, k, plan.since)
    names = ("user_id", "item_id", "query", *plan.categories)
    encoded = {name: codes_and_values(rows[name]) for name in names}
    values = Dictionaries(encoded | counter_cells(rows, shown, encoded, plan.counted))
    counted = dict.fromkeys((*map(cell_name, plan.counted), *plan.told))
    codes = {name: values.features[name][0] for name in counted}
    sums = chunk_sums(events, histories, shown[is_counted], codes, plan.since)
    by_user = [cell_name(columns) for columns in plan.counted if "user_id" in columns]
    more = {"table": stream_of(sums_of_users(sums, by_user, max(plan.days, default=0)))} if by_user else {}
    row_hash, value_hash = (rows[name].to_numpy().view(np.uint64) for name in ("row_hash", "value_hash"))
    cells = {"impressions": row_hash[targets], "labels": label_hashes(row_hash[targets], labels)}
    history_hash = [np.empty(0, np.uint64)]
    for start in range(0, len(targets), _PACK_ROWS):
        part = slice(start, start + _PACK_ROWS)
        packed = pack_histories(events, histories, targets[part], values, value_hash, plan.history_length)
        history_hash.append(packed.hashes(row_hash[targets[part]]))
        columns = _target_columns(rows, events, labels, targets, part, values, plan)
        tables = {"targets": stream_of(columns | packed.spans), "events": stream_of(packed.events)}
        yield emitted(PACK, chunk=chunk, **tables, **more)
    cells["histories"] = np.concatenate(history_hash)
    for what, hashes in cells.items():
        by_day = combined(days[is_target], hashes)
        yield emitted(
            CELL, what=what, day=pa.array(list(by_day), pa.int64()), hash=pa.array(list(by_day.values()), pa.int64())
        )
    yield from values.rows(chunk, shown[is_counted], days[is_counted])
    # Of what counts by users there is nothing to look up where no earlier build has counted.
    yield from values.pairs(chunk, without=by_user if plan.since == BEGINNING else ())
    yield from count_rows(sums, {name: values.features[name][1] for name in counted})


def _history_rows(rows: pa.Table, history: HistoryEvents, scenario: int, since: int) -> Iterator[pa.RecordBatch]:
    """The events that this pass attributed, for the builds of later dates."""
    fresh = history.time >= since
    if not fresh.any():
        return
    own = rows.select(["user_id", "id"]).take(pa.array(history.row[fresh]))
    of_impression = rows.select(["item_id", "query"]).take(pa.array(history.impression[fresh]))
    yield emitted(
        EVENT,
        kind=history.action[fresh] + KIND_ORDER,
        scenario=scenario,
        day=history.time[fresh] // DAY_US,
        user_id=own["user_id"],
        id=own["id"],
        item_id=of_impression["item_id"],
        value=of_impression["query"],
        event_time=history.time[fresh],
        known_time=history.known[fresh],
    )


def _target_columns(
    rows: pa.Table, events: Events, labels: Labels, targets: Ints, part: slice, values: Dictionaries, plan: PassPlan
) -> dict[str, pa.Array | np.ndarray]:
    picked = pa.array(targets[part])
    names = ("request_id", "position", USER_KEY, REQUEST_KEY, *plan.numbers)
    columns: dict[str, pa.Array | np.ndarray] = {name: rows[name].take(picked).combine_chunks() for name in names}
    columns["impression_id"] = rows["id"].take(picked).combine_chunks()
    columns |= values.used(targets[part])
    for name in ("is_click", "is_order", "is_click_global", "is_order_global", "click_time", "order_time"):
        columns[name] = getattr(labels, name)[part]
    return columns | {"event_time": events.time[targets[part]], "scenario": events.scenario[targets[part]]}
