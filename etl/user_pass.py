"""The one pass over the shuffled events: whole users in, labelled samples or an account of every row out.

Runs in Spark's Python workers through mapInArrow; needs numpy and pyarrow only. Memory is bounded by `chunk_rows` (or
by the largest user, who is never split) on the way in and by `_OUTPUT_ROWS` rows with their histories on the way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.attribution import REASONS, Attribution, LabelRules, attribute
from etl.events import KIND_IMPRESSION, KIND_PROFILE, Events, Ints
from etl.fingerprint import cells
from etl.histories import HistoryEvents, history_events, last_events
from etl.labels import NO_TIME, label, mature
from usr_ray.config import DAY_US
from usr_ray.schema import UNKNOWN_ID, FeatureSpec, index_column

_OUTPUT_ROWS = 16_384
_TIMESTAMP = pa.timestamp("us", tz="UTC")
SORT_COLUMNS = ("user_id", "event_time", "kind", "id", "item_id", "scenario")
"""Order of the rows of a partition; chunks are cut where user_id changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassPlan:
    """What the pass has to know; travels with the task."""

    rules: LabelRules
    spec: FeatureSpec
    watermark: int
    """Microseconds."""
    days: tuple[int, ...]
    """Impressions of these days (since 1970, UTC) become samples; the others are context."""
    own_columns: tuple[str, ...] = ()
    """Columns of an impression's row that go through unchanged."""
    profile_columns: tuple[str, ...] = ()
    """Columns that the user's profile row carries for all impressions of the user."""
    chunk_rows: int = 200_000


def whole_users(batches: Iterable[pa.RecordBatch], chunk_rows: int) -> Iterator[pa.Table]:
    """Cut a stream sorted by user_id into tables of at least `chunk_rows` rows (the last: fewer) that split no user."""
    held: list[pa.RecordBatch] = []
    num_rows = cut = 0  # the newest user's first row
    newest: pa.Scalar | None = None
    for batch in batches:
        if not batch.num_rows:
            continue
        users = batch.column("user_id")
        others = pc.sum(pc.not_equal(users, users[-1])).as_py()
        if others or newest is None or users[-1] != newest:
            cut = num_rows + others
        newest = users[-1]
        held.append(batch)
        num_rows += batch.num_rows
        if num_rows >= chunk_rows and cut:
            table = pa.Table.from_batches(held)
            yield table.slice(0, cut)
            held = table.slice(cut).to_batches()
            num_rows, cut = num_rows - cut, 0
    if held:
        yield pa.Table.from_batches(held)


def samples(batches: Iterable[pa.RecordBatch], plan: PassPlan, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """One row per impression of the plan's days, in the order of (user_id, event_time, id)."""
    for rows in whole_users(batches, plan.chunk_rows):
        events = Events.from_arrow(rows, ranked=plan.rules.clock_skew > 0)
        shown = events.kind == KIND_IMPRESSION
        targets = np.flatnonzero(shown & np.isin(events.time // DAY_US, plan.days))
        if not len(targets):
            continue
        attribution = attribute(events, plan.rules, num_scenarios=len(plan.spec.scenarios))
        columns = _sample_columns(rows, events, attribution, targets, plan)
        histories = [history_events(events, attribution, k) for k in range(len(plan.spec.scenarios))]
        values = {name: pc.fill_null(rows[index_column(name)], 0).to_numpy() for name in ("item_id", "query")}
        for start in range(0, len(targets), _OUTPUT_ROWS):
            part = slice(start, start + _OUTPUT_ROWS)
            output = {name: column[part] for name, column in columns.items()}
            output |= _history_columns(events, histories, targets[part], values, plan.spec)
            arrays = [output[field.name] for field in schema]
            yield pa.RecordBatch.from_arrays(
                [a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in arrays], schema=schema
            )


def _sample_columns(
    rows: pa.Table, events: Events, attribution: Attribution, targets: Ints, plan: PassPlan
) -> dict[str, pa.Array]:
    labels = label(events, attribution, targets, plan.rules)
    picked = pa.array(targets)
    columns = {name: rows[name].take(picked).combine_chunks() for name in plan.own_columns}
    columns |= {
        name: pa.array(getattr(labels, name)) for name in ("is_click", "is_order", "is_click_global", "is_order_global")
    }
    columns["impression_id"] = rows["id"].take(picked).combine_chunks()
    columns[index_column("scenario")] = pa.array(events.scenario[targets])
    columns["is_mature"] = pa.array(mature(events.time[targets], plan.watermark, plan.rules))
    columns["click_time"] = _times(labels.click_time)
    columns["order_time"] = _times(labels.order_time)
    if plan.profile_columns:
        profiles = np.full(int(events.user[-1]) + 1, -1, dtype=np.int64)
        profile_rows = events.rows(KIND_PROFILE)
        profiles[events.user[profile_rows]] = profile_rows
        owner = profiles[events.user[targets]]
        owner_rows = pa.array(owner, mask=owner < 0)
        for name in plan.profile_columns:
            # A user without a profile row is in neither the vocabulary nor the users table.
            default = UNKNOWN_ID if name == index_column("user_id") else 0
            columns[name] = pc.fill_null(rows[name].take(owner_rows), default).combine_chunks()
    return columns


def _history_columns(
    events: Events, histories: list[HistoryEvents], targets: Ints, values: dict[str, Ints], spec: FeatureSpec
) -> dict[str, pa.Array]:
    users, times = events.user[targets], events.time[targets]
    columns: dict[str, pa.Array] = {}
    for names, history in zip(spec.histories, histories, strict=True):
        ranges = last_events(history, users, times, spec.history_length)
        impressions = history.impression[ranges.positions]
        ages = np.repeat(times, np.diff(ranges.offsets)) - history.time[ranges.positions]
        offsets = pa.array(ranges.offsets.astype(np.int32))
        flat: dict[str, np.ndarray] = {
            names.item_ids: values["item_id"][impressions].astype(np.int64, copy=False),
            names.actions: history.action[ranges.positions],
            names.ages_s: (ages / 1e6).astype(np.float32),
        }
        if names.query_ids is not None:
            flat[names.query_ids] = values["query"][impressions].astype(np.int64, copy=False)
        for name, numbers in flat.items():
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(numbers), type=list_type(numbers.dtype))
    return columns


def list_type(kind: np.dtype) -> pa.ListType:
    """Arrow type of a history column: a list of non-null numbers."""
    return pa.list_(pa.field("element", pa.from_numpy_dtype(kind), nullable=False))


CELL_DAYS = ("impression_day", "first_label_day", "last_label_day", "visible_day")
"""Days of a fingerprint's cell, in the order of `fingerprint.Cell`."""
AUDIT_FIELDS = (
    ("kind", pa.int32()), ("scenario", pa.int32()), ("day", pa.int64()), ("reason", pa.string()),
    ("num_rows", pa.int64()), ("id", pa.string()), ("item_id", pa.string()), ("user_id", pa.string()),
    ("impression_id", pa.string()), ("event_time", _TIMESTAMP), ("known_time", _TIMESTAMP),
    *((name, pa.int64()) for name in (*CELL_DAYS, "hash")),
)  # fmt: skip
AUDIT_SCHEMA = pa.schema(AUDIT_FIELDS)


def audit(batches: Iterable[pa.RecordBatch], plan: PassPlan) -> Iterator[pa.RecordBatch]:
    """An account of every row: rejected ones each with its reason, used ones counted per (kind, scenario, day).

    Rows with a `hash` are the fingerprint's cells (etl/fingerprint.py).
    """
    for rows in whole_users(batches, plan.chunk_rows):
        events = Events.from_arrow(rows, ranked=plan.rules.clock_skew > 0)
        attribution = attribute(events, plan.rules, num_scenarios=len(plan.spec.scenarios))
        used = np.concatenate([events.rows(KIND_IMPRESSION), attribution.click_rows, attribution.order_rows])
        places = np.stack([events.kind[used], events.scenario[used], events.time[used] // DAY_US])
        groups, counts = np.unique(places, axis=1, return_counts=True)
        yield _audit_batch({
            "kind": pa.array(groups[0], pa.int32()), "scenario": pa.array(groups[1], pa.int32()),
            "day": pa.array(groups[2]), "num_rows": pa.array(counts, pa.int64()),
        }, len(counts))  # fmt: skip
        days, combined = cells(events, attribution, rows["row_hash"].to_numpy(), plan.rules)
        named = {name: pa.array(column) for name, column in zip(CELL_DAYS, days, strict=True)}
        yield _audit_batch(named | {"hash": pa.array(combined)}, len(combined))
        rejected = attribution.reject_rows
        if len(rejected):
            picked = pa.array(rejected)
            names = ("id", "item_id", "user_id", "impression_id", "event_time", "known_time")
            yield _audit_batch({
                "kind": pa.array(events.kind[rejected]), "scenario": pa.array(events.scenario[rejected]),
                "day": pa.array(events.time[rejected] // DAY_US),
                "num_rows": pa.array(np.ones(len(rejected), np.int64)),
                "reason": pa.array(REASONS).take(pa.array(attribution.reject_codes)),
                **{name: rows[name].take(picked).combine_chunks() for name in names},
            }, len(rejected))  # fmt: skip


def _audit_batch(columns: dict[str, pa.Array], size: int) -> pa.RecordBatch:
    arrays = [
        columns[field.name].cast(field.type) if field.name in columns else pa.nulls(size, field.type)
        for field in AUDIT_SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=AUDIT_SCHEMA)


def _times(micros: Ints) -> pa.Array:
    return pa.array(micros, mask=micros == NO_TIME).cast(_TIMESTAMP)
