"""Packs to rows of the samples table: codes become ids, spans become lists. In Spark's Python workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.kernel.attribution import NO_TIME, LabelRules, mature
from etl.kernel.chunks import REQUEST_KEY, USER_KEY
from etl.kernel.events import Ints, context_column
from etl.kernel.features import bucket_ids, lists_by_code, standardised
from etl.kernel.packs import CELL_PREFIX, EVENT_COLUMNS, unpack
from usr_ray.config import DAY_US
from usr_ray.daily_sums import SUMS, CounterPlan, DailySums, counter_values
from usr_ray.schema import (
    ALL_LABELS,
    FIRST_ID,
    PADDING_ID,
    PARTITION_COLUMN,
    STANDARD,
    FeatureSpec,
    index_column,
    scaled_column,
)

EVENT_HOUR = "event_hour"
NUM_HOURS = 24
_HOUR_US = DAY_US // NUM_HOURS
_OUTPUT_ROWS = 16_384
"""Rows that are written out at once: bounds memory."""
_TIMESTAMP = pa.timestamp("us", tz="UTC")
KEPT_KEY = ("impression_id", "user_id", "item_id", PARTITION_COLUMN)
"""What a row has in common with the one whose columns it keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlan:
    """What the rows need beside the packs."""

    rules: LabelRules
    spec: FeatureSpec
    watermark: int
    """Microseconds."""
    days: tuple[int, ...]
    """Impressions of these days (since 1970, UTC) are written."""
    features: tuple[str, ...]
    """Feature of each number in a lookup: user_id, item_id, query, then the context categories, those of counters."""
    owned_categories: dict[str, tuple[str, ...]]
    """`user_id` and `item_id` -> categories that come with them, in the order of a lookup's `ids` behind the first."""
    owned_numbers: dict[str, tuple[str, ...]]
    """`user_id` and `item_id` -> numbers that come with them, in the order of a lookup's `numbers`."""
    counters: CounterPlan = field(default_factory=CounterPlan)
    kept: tuple[str, ...] = ()
    """Columns that rows of the table before keep (etl/features/encoding.py, `kept_columns`)."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the codes of one feature of a chunk stand for: position is code + 1, position 0 is null."""

    text: pa.Array
    ids: np.ndarray
    """(codes + 1, 1 + categories)."""
    numbers: np.ndarray
    """(codes + 1, numbers)."""
    sums: DailySums | None
    """Sums by code + 1; None where no counter counts by the feature."""
    lists: dict[int, pa.ListArray]
    """Place in FeatureSpec.lists -> ids (codes + 1)."""


def sample_rows(batches: Iterable[pa.RecordBatch], plan: RowPlan, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows of the planned days, in the order of the packs.

    Args:
        batches: rows with `targets` and `events` (a pack) and `lookups`: a list of (feature, code, value, ids, numbers)
            structures with every code of the pack's chunk; with tags or terms `lists` too: place, id, place, id ..
            Where there are counters, also `user_sums` of the pack and `sums` of the chunk, each null or a table of
            feature, code and daily_sums.SUMS as an Arrow stream. Where rows keep columns, `kept`: a list of (KEPT_KEY,
            the columns).
    """
    more = (["user_sums", "sums"] if plan.counters.columns else []) + (["kept"] if plan.kept else [])
    for batch in batches:
        for targets, events, lookups, *others in zip(
            *map(batch.column, ("targets", "events", "lookups", *more)), strict=True
        ):
            of_chunk = dict(zip(more, others, strict=True))
            rows = unpack(targets)
            if plan.days:
                rows = rows.filter(pa.array(np.isin(rows["event_time"].to_numpy() // DAY_US, plan.days)))
            if not rows.num_rows:
                continue
            found = _lookups(lookups.values, _sums(of_chunk, plan), plan)
            before = _before(rows, found, of_chunk["kept"].values) if plan.kept else None
            flat = {name: column.to_numpy() for name, column in zip(EVENT_COLUMNS, unpack(events).columns, strict=True)}
            flat["item_id"] = found["item_id"].ids[flat["item_id"] + 1, 0]
            flat["query"] = found["query"].ids[flat["query"] + 1, 0]
            for start in range(0, rows.num_rows, _OUTPUT_ROWS):
                some = rows.slice(start, _OUTPUT_ROWS).combine_chunks()
                output = _own_columns(some, found, plan) | _history_columns(some, flat, plan.spec)
                arrays = [output[field.name].cast(field.type) for field in schema]
                if before is not None:
                    places = before.slice(start, len(some))
                    of_before = {name: of_chunk["kept"].values.field(name) for name in plan.kept}
                    arrays = [
                        _kept(of_before[field.name], places, array) if field.name in of_before else array
                        for field, array in zip(schema, arrays, strict=True)
                    ]
                yield pa.RecordBatch.from_arrays(
                    [a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in arrays], schema=schema
                )


def _before(rows: pa.Table, found: Mapping[str, Lookup], kept: pa.StructArray) -> pa.Array:
    """Place in `kept` of each row that is there; null of any other."""
    texts = {name: found[name].text.take(pa.array(rows[name].to_numpy() + 1)) for name in ("user_id", "item_id")}
    dates = pa.array((rows["event_time"].to_numpy() // DAY_US).astype(np.int32)).cast(pa.date32())
    now = texts | {"impression_id": rows["impression_id"].combine_chunks(), PARTITION_COLUMN: dates}
    return pc.index_in(_keys(now), value_set=_keys({name: kept.field(name) for name in KEPT_KEY}))


def _keys(columns: Mapping[str, pa.Array]) -> pa.Array:
    return pc.binary_join_element_wise(*(columns[name].cast(pa.string()) for name in KEPT_KEY), "\0")


def _kept(before: pa.Array, places: pa.Array, now: pa.Array) -> pa.Array:
    return pc.if_else(places.is_valid(), before.take(places).cast(now.type), now)


def _sums(of_chunk: Mapping[str, pa.Scalar], plan: RowPlan) -> dict[str, DailySums]:
    """Feature -> sums by code + 1, of those that counters count by: of `user_sums` and `sums`; none of neither."""
    if "sums" not in of_chunk:
        return {}
    parts = []
    for table in (unpack(packed) for packed in (of_chunk["sums"], of_chunk["user_sums"]) if packed.is_valid):
        feature = table["feature"].combine_chunks()
        number = np.array([plan.features.index(name) for name in feature.dictionary.to_pylist()])
        parts.append([number[feature.indices.to_numpy()], *(table[name].to_numpy() for name in ("code", *SUMS))])
    columns = [np.concatenate(column) for column in zip([np.empty(0, np.int64)] * (2 + len(SUMS)), *parts, strict=True)]
    found = {}
    for name in {counter.feature for counter in plan.counters.columns}:
        rows = np.flatnonzero(columns[0] == plan.features.index(name))
        code, *sums = (column[rows].astype(np.int64) for column in columns[1:])
        found[name] = DailySums.of(code + 1, np.column_stack(sums), plan.counters.num_scenarios).indexed()
    return found


def _lookups(entries: pa.StructArray, sums: dict[str, DailySums], plan: RowPlan) -> dict[str, Lookup]:
    feature, code = (entries.field(name).to_numpy(zero_copy_only=False) for name in ("feature", "code"))
    result = {}
    for number, name in enumerate(plan.features):
        rows = np.flatnonzero(feature == number)
        size = int(code[rows].max(initial=-1)) + 2
        place = np.zeros(size, dtype=np.int64)
        place[code[rows] + 1] = rows
        there = np.zeros(size, dtype=np.bool_)
        there[code[rows] + 1] = True
        picked = pa.array(place, mask=~there)
        width = 1 + len(plan.owned_categories.get(name, ()))
        ids = np.full((size, width), PADDING_ID, dtype=np.int64)
        numbers = np.zeros((size, len(plan.owned_numbers.get(name, ()))), dtype=np.float32)
        some = entries.take(pa.array(rows))
        ids[code[rows] + 1] = some.field("ids").flatten().to_numpy().reshape(-1, width)
        if numbers.shape[1]:
            numbers[code[rows] + 1] = some.field("numbers").flatten().to_numpy().reshape(-1, numbers.shape[1])
        text = entries.field("value").take(picked)
        places = [n for n, feature in enumerate(plan.spec.lists) if feature.key == name]
        lists = lists_by_code(code[rows], some.field("lists"), places, size) if places else {}
        result[name] = Lookup(text, ids, numbers, sums.get(name), lists)
    return result


def _own_columns(rows: pa.Table, found: dict[str, Lookup], plan: RowPlan) -> dict[str, pa.Array]:
    time = rows["event_time"].to_numpy()
    columns = {name: rows[name] for name in ("impression_id", "request_id", "position", *ALL_LABELS)}
    for of in plan.spec.dense:
        if of.owner == "context" and of.column == scaled_column(of.name):
            value = rows[context_column(of.name)]
            is_raw = of.scale == STANDARD
            columns[of.column] = pa.array(standardised(value.to_numpy(), of.mean, of.deviation)) if is_raw else value
    for in_buckets in plan.spec.sparse:
        if in_buckets.owner == "context" and in_buckets.edges is not None:
            raw = rows[context_column(in_buckets.name)].to_numpy()
            columns[in_buckets.column] = pa.array(bucket_ids(raw, in_buckets.edges))
    columns["event_time"] = _times(time)
    columns["is_mature"] = pa.array(mature(time, plan.watermark, plan.rules))
    columns["click_time"], columns["order_time"] = (
        _times(rows[name].to_numpy()) for name in ("click_time", "order_time")
    )
    columns |= {name: rows[name] for name in (USER_KEY, REQUEST_KEY)}
    columns[PARTITION_COLUMN] = pa.array((time // DAY_US).astype(np.int32)).cast(pa.date32())
    columns["scenario"] = pa.array(plan.spec.scenarios).take(rows["scenario"])
    columns[index_column("scenario")] = rows["scenario"]
    columns[index_column(EVENT_HOUR)] = pa.array(time // _HOUR_US % NUM_HOURS + FIRST_ID)
    codes: dict[str, Ints] = {}
    for name, lookup in found.items():
        is_own = name in ("user_id", "item_id", "query")
        is_cell = name.startswith(CELL_PREFIX)
        places = rows[name if is_own or is_cell else context_column(name)].to_numpy() + 1
        codes[name] = places.astype(np.int64)
        if is_cell:
            continue
        if is_own:
            columns[name] = lookup.text.take(pa.array(places))
        ids = lookup.ids[places]
        for n, column in enumerate((name, *plan.owned_categories.get(name, ()))):
            columns[index_column(column)] = pa.array(ids[:, n])
        for n, column in enumerate(plan.owned_numbers.get(name, ())):
            columns[scaled_column(column)] = pa.array(lookup.numbers[places, n])
        columns |= {plan.spec.lists[n].column: found.take(pa.array(places)) for n, found in lookup.lists.items()}
    sums = {name: lookup.sums for name, lookup in found.items() if lookup.sums is not None}
    scenarios = rows["scenario"].to_numpy()
    counters = counter_values(plan.counters, plan.counters.totals(), sums, codes, scenarios, time // DAY_US)
    return columns | {name: pa.array(values) for name, values in counters.items()}


def _history_columns(rows: pa.Table, flat: dict[str, Ints], spec: FeatureSpec) -> dict[str, pa.Array]:
    times = rows["event_time"].to_numpy()
    columns: dict[str, pa.Array] = {}
    for k, names in enumerate(spec.histories):
        first, count = rows[f"first_{k}"].to_numpy(), rows[f"count_{k}"].to_numpy()
        offsets = np.concatenate([[0], np.cumsum(count)])
        places = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], count)
        ages = np.repeat(times, count) - flat["time"][places]
        lists: dict[str, np.ndarray] = {
            names.item_ids: flat["item_id"][places],
            names.actions: flat["action"][places],
            names.ages_s: (ages / 1e6).astype(np.float32),
        }
        if names.query_ids is not None:
            lists[names.query_ids] = flat["query"][places]
        edges = pa.array(offsets.astype(np.int32))
        for name, numbers in lists.items():
            columns[name] = pa.ListArray.from_arrays(edges, pa.array(numbers), type=list_type(numbers.dtype))
    return columns


def list_type(kind: np.dtype) -> pa.ListType:
    """Arrow type of a history column: a list of non-null numbers."""
    return pa.list_(pa.field("element", pa.from_numpy_dtype(kind), nullable=False))


def _times(times: Ints) -> pa.Array:
    return pa.array(times, mask=times == NO_TIME).cast(_TIMESTAMP)
