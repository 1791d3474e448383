"""What the pass emits: one flat schema, and packs, the labelled impressions of a chunk.

A pack is two small Arrow tables as bytes: its impressions, and the events of its histories once each, of which every
impression has a span per scenario; where counters count by users, a third has the sums of the chunk's users. Ids in a
pack are codes of its chunk. So Spark moves a chunk as one value, and a history of fifty events costs two numbers until
the row is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from etl.kernel.events import Events, Ints
from etl.kernel.fingerprint import Hashes, event_hashes, mix, span_hashes
from etl.kernel.histories import HistoryEvents, last_events, last_spans, num_visible

ACCOUNT, REJECT, CELL, VALUE, EVENT, COUNT, PACK = "account", "reject", "cell", "value", "event", "count", "pack"
PAIRS = "pairs"
"""Parts of what the pass emits."""
_TIMESTAMP = pa.timestamp("us", tz="UTC")
EMITTED = pa.schema(
    [
        ("part", pa.string()),
        # account (`what`: rows_in, used, duplicates), rejects, and cells (`what`: the fingerprint)
        ("what", pa.string()),
        ("kind", pa.int32()),
        ("scenario", pa.int32()),
        ("day", pa.int64()),
        ("num_rows", pa.int64()),
        ("hash", pa.int64()),
        ("reason", pa.string()),
        ("row", pa.string()),
        ("id", pa.string()),
        ("item_id", pa.string()),
        ("user_id", pa.string()),
        ("impression_id", pa.string()),
        ("event_time", _TIMESTAMP),
        ("known_time", _TIMESTAMP),
        # values: what a code of a chunk stands for, and how many impressions have it on which days; events: `value` is
        # the query, `kind` the one of a past event
        ("chunk", pa.string()),
        ("feature", pa.string()),
        ("code", pa.int32()),
        ("value", pa.string()),
        ("days", pa.list_(pa.int64())),
        ("counts", pa.list_(pa.int64())),
        # packs; `table` has the sums by users, null where nothing is counted by them
        ("targets", pa.binary()),
        ("events", pa.binary()),
        # counts: the sums of a `feature` (etl/kernel/counters.py); pairs: codes of a `feature` made for counters, as
        # many as `num_rows`, and what they stand for
        ("table", pa.binary()),
    ]
)
EVENT_COLUMNS = ("time", "action", "item_id", "query")
"""Columns of a pack's events; item_id and query are codes of the chunk."""
CELL_PREFIX = "cell:"
"""How names of features begin that are made for counters alone and have no vocabulary (etl/kernel/counters.py)."""
_LATE_ROWS = 4_096
"""Rows whose late events are looked up at once: bounds memory."""


def emitted(part: str, **columns: pa.Array | pa.ChunkedArray | np.ndarray | str | int) -> pa.RecordBatch:
    """Rows of one part, of columns and of values that all its rows have; columns that it lacks are null."""
    size = next(len(column) for column in columns.values() if not isinstance(column, str | int))
    arrays = []
    for column in EMITTED:
        found = part if column.name == "part" else columns.get(column.name)
        if found is None:
            found = pa.nulls(size, column.type)
        elif isinstance(found, str | int):
            found = pa.repeat(found, size)
        array = (pa.array(found) if isinstance(found, np.ndarray) else found).cast(column.type)
        arrays.append(array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array)
    return pa.RecordBatch.from_arrays(arrays, schema=EMITTED)


@dataclass(frozen=True, slots=True)
class Dictionaries:
    """Feature -> (code of every row, -1 where null; the values)."""

    features: Mapping[str, tuple[Ints, pa.Array]]
    _used: dict[str, list[Ints]] = field(default_factory=dict)

    def used(self, rows: Ints) -> dict[str, np.ndarray]:
        """Codes of some rows, which must be explained."""
        return {name: self.of(name, rows) for name in self.features}

    def of(self, name: str, rows: Ints) -> np.ndarray:
        """Codes of one feature for some rows, which must be explained."""
        codes = self.features[name][0][rows].astype(np.int32)
        self._used.setdefault(name, []).append(np.unique(codes))
        return codes

    def rows(self, chunk: str, counted: Ints, days: Ints) -> Iterator[pa.RecordBatch]:
        """`value` rows of all codes that are used in packs or that occur in the counted rows, which have these days.

        None of features that are made for counters, which have no vocabulary.
        """
        first = int(days.min(initial=0))
        width = int(days.max(initial=0)) - first + 1
        for name, (codes, values) in self.features.items():
            if name.startswith(CELL_PREFIX):
                continue
            there = codes[counted] >= 0
            places, counts = np.unique(codes[counted][there] * width + (days[there] - first), return_counts=True)
            num_days = np.bincount(places // width, minlength=len(values))
            needed = num_days > 0
            for some in self._used.get(name, []):
                needed[some[some >= 0]] = True
            picked = np.flatnonzero(needed)
            if len(picked):
                edges = pa.array(np.concatenate([[0], np.cumsum(num_days[picked])]).astype(np.int32))
                yield emitted(
                    VALUE,
                    chunk=chunk,
                    feature=name,
                    code=picked,
                    value=values.take(pa.array(picked)),
                    days=pa.ListArray.from_arrays(edges, pa.array(places % width + first)),
                    counts=pa.ListArray.from_arrays(edges, pa.array(counts)),
                )

    def pairs(self, chunk: str, without: Collection[str]) -> Iterator[pa.RecordBatch]:
        """`pairs` rows of the codes that are used in packs, one a feature that is made for counters, but for some."""
        for name, some in self._used.items():
            if name.startswith(CELL_PREFIX) and name not in without:
                codes = np.unique(np.concatenate(some))
                codes = codes[codes >= 0]
                table = stream_of({"code": codes, "value": self.features[name][1].take(pa.array(codes))})
                yield emitted(PAIRS, chunk=chunk, feature=name, num_rows=np.array([len(codes)]), table=table)


def pair_values(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows (chunk, feature, code, value) of `pairs` rows (chunk, feature, table)."""
    for batch in batches:
        for chunk, feature, table in zip(*map(batch.column, ("chunk", "feature", "table")), strict=True):
            rows = unpack(table)
            columns = [pa.repeat(chunk, len(rows)), pa.repeat(feature, len(rows)), rows["code"], rows["value"]]
            yield from pa.table(columns, schema=schema).to_batches()


@dataclass(frozen=True, slots=True)
class PackedHistories:
    """The events of a pack's histories, and each impression's spans of them: `first_<k>`, `count_<k>`."""

    events: dict[str, np.ndarray]
    """EVENT_COLUMNS."""
    spans: dict[str, np.ndarray]
    value_hash: Hashes

    def hashes(self, row_hash: Hashes) -> Hashes:
        """Hash of each impression's histories."""
        events = event_hashes(self.value_hash, self.events["action"], self.events["time"])
        for k in range(len(self.spans) // 2):
            row_hash = mix(row_hash, span_hashes(events, self.spans[f"first_{k}"], self.spans[f"count_{k}"]))
        return row_hash


def pack_histories(
    events: Events, histories: list[HistoryEvents], targets: Ints, values: Dictionaries, value_hash: Hashes, length: int
) -> PackedHistories:
    """The histories of some impressions, every event once.

    Events that were not known in time break a history out of the flat array; what such impressions saw is appended
    once for all impressions of a user that saw the same.
    """
    users, times = events.user[targets], events.time[targets]
    spans: dict[str, np.ndarray] = {}
    taken: list[tuple[HistoryEvents, Ints]] = []
    base = 0
    for k, history in enumerate(histories):
        first, count, late = last_spans(history, users, times, length)
        plain = ~late & (count > 0)
        low = int(first[plain].min()) if plain.any() else 0
        high = int((first + count)[plain].max()) if plain.any() else 0
        positions = [np.arange(low, high)]
        first = np.where(plain, first - low, 0)
        count = np.where(plain, count, 0)
        rows = np.flatnonzero(late)
        if len(rows):
            tail, first[rows], count[rows] = _late_spans(history, users[rows], times[rows], length)
            first[rows] += high - low
            positions.append(tail)
        spans[f"first_{k}"], spans[f"count_{k}"] = first + base, count
        taken.append((history, np.concatenate(positions)))
        base += sum(map(len, positions))
    impressions = np.concatenate([history.impression[some] for history, some in taken])
    packed = {
        "time": np.concatenate([history.time[some] for history, some in taken]),
        "action": np.concatenate([history.action[some] for history, some in taken]),
        "item_id": values.of("item_id", impressions),
        "query": values.of("query", impressions),
    }
    return PackedHistories(packed, spans, value_hash[impressions])


def _late_spans(history: HistoryEvents, users: Ints, times: Ints, length: int) -> tuple[Ints, Ints, Ints]:
    """Positions of the events seen, each distinct history once, and the first and count of each row in them."""
    seen = num_visible(history, users, times)
    _, rows, owner = np.unique(users * (len(history.user) + 1) + seen, return_index=True, return_inverse=True)
    positions, counts = [], []
    for start in range(0, len(rows), _LATE_ROWS):
        some = rows[start : start + _LATE_ROWS]
        ranges = last_events(history, users[some], times[some], length)
        positions.append(ranges.positions)
        counts.append(np.diff(ranges.offsets))
    count = np.concatenate(counts)
    first = np.cumsum(count) - count
    return np.concatenate(positions), first[owner], count[owner]


def unpack(payload: pa.Scalar) -> pa.Table:
    """The table of such a value."""
    return pa.ipc.open_stream(payload.as_buffer()).read_all()


def stream_of(columns: Mapping[str, pa.Array | np.ndarray]) -> pa.Array:
    """One value: a table as an Arrow stream."""
    arrays = {name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()}
    batch = pa.RecordBatch.from_pydict(arrays)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as stream:
        stream.write_batch(batch)
    payload = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, len(payload)], dtype=np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, payload])
