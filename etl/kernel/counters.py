"""Counts of past events (contract 5, counters): the sums of a chunk's days, in the pass.

An impression, an attributed click and a credited order line count once each, on the UTC day on which they were known.
What the rows have of the sums is in usr_ray/daily_sums.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from etl.kernel.events import Events, Ints, codes_and_values, owned_column
from etl.kernel.histories import HistoryEvents
from etl.kernel.packs import CELL_PREFIX, COUNT, DAY_SUMS, emitted
from usr_ray.config import DAY_US
from usr_ray.daily_sums import ALL_ROWS, key_parts_joined
from usr_ray.schema import ACTION_CLICK

_MAX_DAYS = 1 << 22
"""More than there are days in the years 1 to 9999."""


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
        places, parts = np.zeros(len(shown), np.int64), list[pa.Array]()
        for column in columns:
            of_rows, values = encoded.get(column) or codes_and_values(rows[column])
            own, width = of_rows[shown], max(len(values), 1)
            joined = np.where((places < 0) | (own < 0), -1, places * width + own)
            distinct, inverse = np.unique(joined, return_inverse=True)
            none = int(len(distinct) > 0 and distinct[0] < 0)
            places, distinct = inverse.astype(np.int64) - none, distinct[none:]
            parts = [part.take(pa.array(distinct // width)) for part in parts]
            parts.append(values.take(pa.array(distinct % width)))
        codes[shown] = places
        found[name] = (codes, key_parts_joined(parts))
    return found


def count_rows(
    events: Events,
    histories: Sequence[HistoryEvents],
    shown: Ints,
    counted: Mapping[str, tuple[Ints, pa.Array]],
    since: int,
) -> Iterator[pa.RecordBatch]:
    """`count` rows of the pass: each value with its sums by scenario, day of the event and day on which it was known.

    Args:
        histories: its attributed clicks and credited orders, one entry a scenario.
        shown: places of its impressions that count.
        counted: feature -> code of every row, and the texts; nothing is emitted where there are none.
        since: microseconds; clicks and orders before it were counted by an earlier build.
    """
    if not counted:
        return
    fresh = [np.flatnonzero(history.time >= since) for history in histories]
    pairs = list(zip(histories, fresh, strict=True))
    # The row whose item and query count; of a click or an order the impression that it belongs to.
    row = np.concatenate([shown, *(history.impression[some] for history, some in pairs)])
    time = np.concatenate([events.time[shown], *(history.time[some] for history, some in pairs)])
    known = np.concatenate([events.known[shown], *(history.known[some] for history, some in pairs)])
    clicks = [np.where(history.action[some] == ACTION_CLICK, 1, 2) for history, some in pairs]
    what = np.concatenate([np.zeros(len(shown), np.int64), *clicks])
    scenario = np.concatenate([events.scenario[shown], *(np.full(len(some), k) for k, some in enumerate(fresh))])
    first = int(time.min(initial=0)) // DAY_US
    of_days = time // DAY_US - first
    days, day = np.unique(of_days * _MAX_DAYS + np.maximum(known, time) // DAY_US - first, return_inverse=True)
    of_all = {ALL_ROWS: (np.zeros(len(events.time), np.int64), pa.array([ALL_ROWS]))}
    for name, (codes, of_code) in (dict(counted) | of_all).items():
        there = codes[row] >= 0
        place = (codes[row[there]] * len(histories) + scenario[there]) * len(days) + day[there]
        cells, cell = np.unique(place, return_inverse=True)
        if not len(cells):
            continue
        sums = np.bincount(cell * 3 + what[there], minlength=3 * len(cells))
        both = days[cells % len(days)]
        columns = [cells // len(days) % len(histories), both // _MAX_DAYS + first, both % _MAX_DAYS + first]
        columns += list(sums.reshape(-1, 3).T)
        entries = [pa.array(column).cast(field.type) for column, field in zip(columns, DAY_SUMS, strict=True)]
        found, start = np.unique(cells // len(days) // len(histories), return_index=True)
        edges = pa.array(np.append(start, len(cells)).astype(np.int32))
        listed = pa.ListArray.from_arrays(edges, pa.StructArray.from_arrays(entries, fields=list(DAY_SUMS)))
        yield emitted(COUNT, feature=name, value=of_code.take(pa.array(found)), sums=listed)
