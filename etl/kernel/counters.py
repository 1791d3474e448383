"""Counts of past events (contract 5, counters): sums of a chunk's days in the pass, windows' columns in the rows.

An impression, an attributed click and a credited order line count once each, on the UTC day on which they were known. A
row of day D sees whole days before D and nothing of D, so that its labels and what came after it change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from etl.kernel.events import Events, Ints, codes_and_values, owned_column
from etl.kernel.histories import HistoryEvents
from etl.kernel.packs import CELL_PREFIX, COUNT, Dictionaries, emitted
from usr_ray.config import DAY_US
from usr_ray.schema import ACTION_CLICK

ALL_ROWS = "*"
"""Feature and value of the sums over all rows of a scenario: the rates that counters are compared with."""
_MAX_DAYS = 1 << 22
"""More than there are days in the years 1 to 9999."""
SUMS = ("day", "scenario", "impressions", "clicks", "orders")
"""What a value's daily sums are, one after the other, in a lookup's `sums` and in CounterPlan.of_scenarios."""


def cell_name(columns: Sequence[str]) -> str:
    """Feature whose values are those of some columns of the pass together; of one that has a vocabulary, itself."""
    if len(columns) == 1 and not columns[0].startswith(owned_column("")):
        return columns[0]
    return CELL_PREFIX + ":".join(column.rpartition(":")[2] for column in columns)


def counter_cells(
    rows: pa.Table, shown: Ints, encoded: Mapping[str, tuple[Ints, pa.Array]], counted: Iterable[Sequence[str]]
) -> dict[str, tuple[Ints, pa.Array]]:
    """The features that are made for counters: of every row a code, -1 where a value is null, and what it stands for.

    The text of several values joins them by "|"; what is "|" or a backslash in a value has a backslash before it.

    Args:
        rows: the chunk.
        shown: its impressions; no other row has a code.
        encoded: codes and values of the features with a vocabulary.
        counted: columns of each feature.
    """
    found = {}
    for columns in counted:
        name = cell_name(columns)
        if not name.startswith(CELL_PREFIX):
            continue
        codes = np.full(rows.num_rows, -1, dtype=np.int64)
        places, texts = np.zeros(len(shown), np.int64), None
        for column in columns:
            of_rows, values = encoded.get(column) or codes_and_values(rows[column])
            escaped = values
            if len(columns) > 1:
                escaped = pc.replace_substring(pc.replace_substring(values, "\\", "\\\\"), "|", "\\|")
            own, width = of_rows[shown], max(len(values), 1)
            joined = np.where((places < 0) | (own < 0), -1, places * width + own)
            distinct, inverse = np.unique(joined, return_inverse=True)
            none = int(len(distinct) > 0 and distinct[0] < 0)
            places, distinct = inverse.astype(np.int64) - none, distinct[none:]
            right = escaped.take(pa.array(distinct % width))
            if texts is not None:
                right = pc.binary_join_element_wise(texts.take(pa.array(distinct // width)), right, "|")
            texts = right
        codes[shown] = places
        found[name] = (codes, texts)
    return found


def count_rows(
    events: Events,
    histories: Sequence[HistoryEvents],
    shown: Ints,
    values: Dictionaries,
    counted: Iterable[str],
    since: int,
) -> Iterator[pa.RecordBatch]:
    """`count` rows of the pass: the sums of each value, scenario, day of the event and day on which it was known.

    Args:
        events: one chunk.
        histories: its attributed clicks and credited orders, of every scenario.
        shown: its impressions that count.
        values: the texts of the chunk.
        counted: features of `values`; nothing is emitted where there are none.
        since: microseconds; clicks and orders before it were counted by an earlier build.
    """
    texts = {name: values.features[name] for name in counted}
    if not texts:
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
    texts[ALL_ROWS] = (np.zeros(len(events.time), np.int64), pa.array([ALL_ROWS]))
    for name, (codes, of_code) in texts.items():
        there = codes[row] >= 0
        place = (codes[row[there]] * len(histories) + scenario[there]) * len(days) + day[there]
        cells, cell = np.unique(place, return_inverse=True)
        if not len(cells):
            continue
        sums = np.zeros((len(cells), 3), np.int64)
        np.add.at(sums, (cell, what[there]), 1)
        both = days[cells % len(days)]
        yield emitted(
            COUNT,
            len(cells),
            {
                "feature": pa.repeat(name, len(cells)),
                "value": of_code.take(pa.array(cells // len(days) // len(histories))),
                "scenario": pa.array(cells // len(days) % len(histories)),
                "day": pa.array(both // _MAX_DAYS + first),
                "days": _lists(both % _MAX_DAYS + first, 1),
                "counts": _lists(sums.reshape(-1), 3),
            },
        )


def _lists(numbers: Ints, width: int) -> pa.Array:
    edges = pa.array(np.arange(0, len(numbers) + 1, width, dtype=np.int32))
    return pa.ListArray.from_arrays(edges, pa.array(numbers))


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterColumns:
    """Columns of one counter."""

    feature: str
    """What it counts by."""
    per_scenario: bool
    windows: tuple[tuple[int | None, tuple[tuple[str, str], ...]], ...]
    """(days, None: all before; (column, what it is: an event or a rate) ..)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterPlan:
    """What the rows need for their counters beside the packs; sent with the task."""

    columns: tuple[CounterColumns, ...] = ()
    prior: float = 0.0
    num_scenarios: int = 0
    of_scenarios: tuple[int, ...] = ()
    """SUMS of each day and scenario, one after the other."""


class DailySums:
    """Sums by (code, scenario, day), and over any days before one.

    Args:
        codes: int64 (N,), from 0.
        sums_N5: SUMS.
        num_scenarios: of the configuration.
    """

    def __init__(self, codes: Ints, sums_N5: Ints, num_scenarios: int) -> None:
        self.num_scenarios = num_scenarios
        days = sums_N5[:, 0]
        self._first = int(days.min()) if len(days) else 0
        self._width = int(days.max(initial=self._first)) - self._first + 2  # one more: the day after all others
        place = self._place(codes, sums_N5[:, 1], days)
        order = np.argsort(place, kind="stable")
        self._places = place[order]
        self._until = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(sums_N5[order, 2:], axis=0)])

    def within(self, codes: Ints, scenarios: Ints | None, first: Ints | None, end: Ints) -> Ints:
        """(M, 3): impressions, clicks and orders of the days in [first, end).

        Args:
            codes: (M,); of a code without sums all are 0.
            scenarios: (M,); None: of all scenarios together.
            first: (M,); None: from the beginning.
            end: (M,).
        """
        if scenarios is None:
            each = (np.full(len(codes), s) for s in range(self.num_scenarios))
            return np.sum([self.within(codes, scenario, first, end) for scenario in each], axis=0)
        start = np.full(len(codes), self._first) if first is None else first
        low, high = (np.searchsorted(self._places, self._place(codes, scenarios, days)) for days in (start, end))
        return self._until[high] - self._until[low]

    def _place(self, codes: Ints, scenarios: Ints, days: Ints) -> Ints:
        return (codes * self.num_scenarios + scenarios) * self._width + np.clip(days - self._first, 0, self._width - 1)


def counter_columns(
    plan: CounterPlan, sums: dict[str, DailySums], codes: dict[str, Ints], scenarios: Ints, days: Ints
) -> dict[str, NDArray[np.float32]]:
    """The counters of some rows: logarithms of 1 + the counts, and log odds less those of the scenario.

    Args:
        plan: the columns.
        sums: feature -> sums by code.
        codes: feature -> of each row, one that `sums` lacks where the row has no value.
        scenarios: of each row.
        days: of each row, since 1970.
    """
    totals_N5 = np.array(plan.of_scenarios, dtype=np.int64).reshape(-1, len(SUMS))
    totals = DailySums(np.zeros(len(totals_N5), np.int64), totals_N5, plan.num_scenarios)
    found: dict[str, NDArray[np.float32]] = {}
    for counter in plan.columns:
        scenario = scenarios if counter.per_scenario else None
        for num_days, columns in counter.windows:
            first = None if num_days is None else days - num_days
            own = sums[counter.feature].within(codes[counter.feature], scenario, first, days)
            every = totals.within(np.zeros_like(days), scenario, first, days)
            values = {name: np.log1p(own[:, n]) for n, name in enumerate(SUMS[2:])}
            values["ctr"] = log_odds(own[:, 1], own[:, 0], every[:, 1], every[:, 0], plan.prior)
            values["cvr"] = log_odds(own[:, 2], own[:, 1], every[:, 2], every[:, 1], plan.prior)
            found |= {column: values[what].astype(np.float32) for column, what in columns}
    return found


def log_odds(hits: Ints, trials: Ints, all_hits: Ints, all_trials: Ints, prior: float) -> NDArray[np.float64]:
    """Log odds of hits out of trials, smoothed by `prior` trials at the rate of all, less the log odds of that rate.

    0 without a trial, and where none or every one of all trials is a hit. Several clicks of an impression, or one on a
    later day than the impression, can be more than the impressions: trials then are as many as hits.
    """
    trials, all_trials = np.maximum(trials, hits), np.maximum(all_trials, all_hits)
    defined = (trials > 0) & (all_hits > 0) & (all_hits < all_trials)
    rate = np.where(defined, all_hits / np.maximum(all_trials, 1), 0.5)
    odds = (hits + prior * rate) / (trials - hits + prior * (1 - rate))
    return np.where(defined, np.log(odds) - np.log(rate / (1 - rate)), 0.0)
