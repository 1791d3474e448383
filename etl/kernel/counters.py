"""Counts of past events (docs/tables.md, counters): the sums of a chunk's days, in the pass.

An impression, an attributed click and a credited order line count once each, on the UTC day on which they were known.
What the rows have of the sums is in usr_ray/daily_sums.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.kernel.events import Events, Ints, codes_and_values, context_column, owned_column
from etl.kernel.histories import HistoryEvents
from etl.kernel.packs import CELL_PREFIX, COUNT, emitted, stream_of, unpack
from usr_ray.config import DAY_US
from usr_ray.config.counters import COUNTED
from usr_ray.daily_sums import ALL_ROWS, SUMS, key_parts_joined
from usr_ray.schema import ACTION_CLICK

_DENSE = 8
"""Numbers are marked in an array of at most this many places a number, which is faster than sorting them."""
_OUTPUT_ROWS = 32_768
"""Rows of the table that are given out at once: bounds memory."""


def cell_name(columns: Sequence[str]) -> str:
    """Feature whose values are those of some columns of the pass together; of one that has a vocabulary, itself."""
    if len(columns) == 1 and not columns[0].startswith(owned_column("")):
        return columns[0]
    return CELL_PREFIX + ":".join(column.rpartition(":")[2] for column in columns)


def counter_cells(
    rows: pa.Table, shown: Ints, encoded: Mapping[str, tuple[Ints, pa.Array]], counted: Iterable[Sequence[str]]
) -> dict[str, tuple[Ints, pa.Array]]:
    """The features that are made for counters: of every row a code, -1 where a value is null, and what it stands for.

    Args:
        shown: places of its impressions; no other row has a code.
        encoded: codes and values of the features with a vocabulary.
        counted: the columns that make up each feature.
    """
    found = {}
    for columns in counted:
        name = cell_name(columns)
        if not name.startswith(CELL_PREFIX):
            continue
        codes = np.full(rows.num_rows, -1, dtype=np.int64)
        there, places, num_places = shown, np.zeros(len(shown), np.int64), 1
        parts = list[pa.Array]()
        for column in columns:
            of_rows, values = encoded.get(column) or codes_and_values(rows[column])
            own, width = of_rows[there], len(values)
            has_value = own >= 0
            there, joined = there[has_value], places[has_value] * width + own[has_value]
            distinct, places = _numbered(joined, num_places * width)
            num_places = len(distinct)
            parts = [part.take(pa.array(distinct // width)) for part in parts]
            parts.append(values.take(pa.array(distinct % width)))
        codes[there] = places
        found[name] = (codes, key_parts_joined(parts))
    return found


def _numbered(values: Ints, size: int) -> tuple[Ints, Ints]:
    """The distinct ones of values in [0, size), ascending, and of each value its place among them."""
    if size > _DENSE * len(values):
        distinct, places = np.unique(values, return_inverse=True)
        return distinct, places.astype(np.int64, copy=False)
    is_there = np.zeros(size, dtype=np.bool_)
    is_there[values] = True
    return np.flatnonzero(is_there), (np.cumsum(is_there) - 1)[values]


@dataclass(frozen=True, slots=True)
class Sums:
    """A chunk's sums by code, scenario and days, each once and in this order."""

    code: Ints
    scenario: Ints
    event_day: Ints
    day: Ints
    """On which the events of `event_day` were known."""
    counts: Ints
    """(entries, 3): impressions, clicks and orders."""


def chunk_sums(
    events: Events,
    histories: Sequence[HistoryEvents],
    shown: Ints,
    counted: Mapping[str, Ints],
    since: int,
) -> dict[str, Sums]:
    """Sums of each feature, and of all rows.

    Args:
        histories: its attributed clicks and credited orders, one entry a scenario.
        shown: places of its impressions that count.
        counted: feature -> code of every row, -1: it has no value; nothing is summed where there is no feature.
        since: microseconds; clicks and orders before it were counted by an earlier build.
    """
    if not counted:
        return {}
    fresh = [np.flatnonzero(history.time >= since) for history in histories]
    pairs = list(zip(histories, fresh, strict=True))
    # The row whose item and query count; of a click or an order the impression that it belongs to.
    row = np.concatenate([shown, *(history.impression[some] for history, some in pairs)])
    time = np.concatenate([events.time[shown], *(history.time[some] for history, some in pairs)])
    known = np.concatenate([events.known[shown], *(history.known[some] for history, some in pairs)])
    clicks = [np.where(history.action[some] == ACTION_CLICK, 1, 2) for history, some in pairs]
    what = np.concatenate([np.zeros(len(shown), np.int64), *clicks])
    scenario = np.concatenate([events.scenario[shown], *(np.full(len(some), k) for k, some in enumerate(fresh))])
    of_day = time // DAY_US
    first, later = int(of_day.min(initial=0)), np.maximum(known, time) // DAY_US - of_day
    width = int(later.max(initial=0)) + 1
    days, day = _numbered((of_day - first) * width + later, (int(of_day.max(initial=0)) - first + 1) * width)
    found = {}
    for name, codes in (dict(counted) | {ALL_ROWS: np.zeros(len(events.time), np.int64)}).items():
        there = codes[row] >= 0
        place = (codes[row[there]] * len(histories) + scenario[there]) * len(days) + day[there]
        cells, cell = _numbered(place, int(place.max(initial=-1)) + 1)
        counts = np.bincount(cell * 3 + what[there], minlength=3 * len(cells)).reshape(-1, 3)
        codes_and_scenarios, both = cells // len(days), days[cells % len(days)]
        found[name] = Sums(
            code=codes_and_scenarios // len(histories),
            scenario=codes_and_scenarios % len(histories),
            event_day=both // width + first,
            day=both // width + first + both % width,
            counts=counts,
        )
    return found


def count_rows(found: Mapping[str, Sums], values: Mapping[str, pa.Array]) -> Iterator[pa.RecordBatch]:
    """`count` rows of the pass: one a feature, with all its sums.

    Args:
        values: feature -> the texts of its codes.
    """
    for name, sums in found.items():
        if len(sums.code):
            texts = pa.array([ALL_ROWS]) if name == ALL_ROWS else values[name]
            codes, place = np.unique(sums.code, return_inverse=True)
            key = pa.DictionaryArray.from_arrays(pa.array(place.astype(np.int32)), texts.take(pa.array(codes)))
            days = {"date": sums.day, "event_date": sums.event_day, "scenario": sums.scenario}
            counts = dict(zip(COUNTED, sums.counts.T, strict=True))
            columns = {column: numbers.astype(np.int32) for column, numbers in (days | counts).items()}
            yield emitted(COUNT, feature=name, table=stream_of({"key": key, **columns}))


def table_rows(
    batches: Iterable[pa.RecordBatch], scenarios: Sequence[str], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Rows of `<lake>/counters` from `count` rows of the pass (feature, table)."""
    for batch in batches:
        for feature, table in zip(batch.column("feature"), batch.column("table"), strict=True):
            rows = unpack(table)
            name = feature.as_py().removeprefix(CELL_PREFIX).removeprefix(context_column(""))
            columns = {column: rows[column] for column in rows.column_names}
            columns |= {"name": pa.repeat(name, len(rows)), "scenario": pa.array(scenarios).take(rows["scenario"])}
            cast = pa.table([columns[field.name].cast(field.type) for field in schema], schema=schema)
            yield from cast.to_batches(max_chunksize=_OUTPUT_ROWS)


def packed_sums(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """One row a chunk: `sums`, a table of `feature`, `code` and daily_sums.SUMS as an Arrow stream.

    Args:
        batches: rows (chunk, feature, code, sums: the SUMS of each day one after the other); a chunk's come together.
    """
    chunk, parts = None, list[pa.RecordBatch]()
    for batch in batches:
        runs = pc.run_end_encode(batch.column("chunk"))
        starts = [0, *runs.run_ends.to_pylist()]
        for name, start, end in zip(runs.values.to_pylist(), starts, starts[1:], strict=False):
            if parts and name != chunk:
                yield _packed(chunk, parts)
                parts = []
            chunk = name
            parts.append(batch.slice(start, end - start))
    if parts:
        yield _packed(chunk, parts)


def _packed(chunk: str | None, parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    rows = pa.Table.from_batches(parts).combine_chunks()
    sums = rows["sums"].chunk(0)
    of_row = pa.array(np.repeat(np.arange(len(rows)), sums.value_lengths().to_numpy() // len(SUMS)))
    columns = dict(zip(SUMS, sums.flatten().to_numpy().reshape(-1, len(SUMS)).T, strict=True))
    feature = rows["feature"].chunk(0).dictionary_encode().take(of_row)
    stream = stream_of({"feature": feature, "code": rows["code"].chunk(0).take(of_row), **columns})
    return pa.RecordBatch.from_pydict({"chunk": pa.array([chunk]), "sums": stream})


def sums_of_users(found: Mapping[str, Sums], names: Sequence[str], before: int) -> dict[str, pa.Array | np.ndarray]:
    """What a pack holds of the sums by users, who are in one chunk: `feature`, `code` and daily_sums.SUMS.

    Args:
        names: the features.
        before: rows of this day are the newest, which see nothing of it.
    """
    parts = []
    for n, name in enumerate(names):
        sums = found[name]
        seen = sums.day < before
        columns = [sums.code, sums.day, sums.scenario, *sums.counts.T]
        parts.append(np.column_stack([np.full(seen.sum(), n), *(column[seen] for column in columns)]))
    every = np.concatenate(parts)
    feature = pa.DictionaryArray.from_arrays(pa.array(every[:, 0].astype(np.int32)), pa.array(names, pa.string()))
    return {"feature": feature, **dict(zip(("code", *SUMS), every[:, 1:].T.astype(np.int32), strict=True))}
