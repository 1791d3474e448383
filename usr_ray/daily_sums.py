"""Daily sums of past events, and the counters that a row of a day has of them (docs/tables.md, counters).

A row of day D sees whole days before D and nothing of D. The ETL writes a row's counters with this code, the service
computes those of a request with it: both get the same numbers, bit for bit. Numpy and Arrow only.

Shape letters: N rows, S scenarios, W windows, K windows of all counters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from usr_ray.config.counters import COUNTED, CounterConfig, counter_columns

Ints = NDArray[np.int64]
ALL_ROWS = "*"
"""Name and key of the sums over all rows of a scenario: the rates that counters are compared with."""
SUMS = ("day", "scenario", *COUNTED)
"""One day's sums of a value: days since 1970, position of the scenario, then the counts."""
_MAX_INDEX = 1 << 22
"""Places of an index, at most: 16 MB."""
_KINDS = (*COUNTED, "ctr", "cvr")


# ---- keys


def key_parts_joined(parts: Sequence[pa.Array]) -> pa.Array:
    """One text for several values: joined by "|"; what is "|" or a backslash in a value has a backslash before it.

    A single value is its own text. Null where one of the values is.
    """
    if len(parts) == 1:
        return parts[0]
    escaped = [pc.replace_substring(pc.replace_substring(part, "\\", "\\\\"), "|", "\\|") for part in parts]
    return pc.binary_join_element_wise(*escaped, "|")


def key_parts(keys: pa.Array, num_parts: int) -> list[pa.Array]:
    """Inverse of `key_parts_joined`, of texts without nulls."""
    if num_parts == 1:
        return [keys]
    # Two characters for two: a backslash is "\0" and a "|" of a value is "\1", so that every other "|" separates.
    marked = pc.replace_substring(pc.replace_substring(keys, "\\\\", "\\0"), "\\|", "\\1")
    flat = pc.list_flatten(pc.split_pattern(marked, "|"))
    plain = pc.replace_substring(pc.replace_substring(flat, "\\1", "|"), "\\0", "\\")
    return [plain.take(pa.array(np.arange(n, len(plain), num_parts))) for n in range(num_parts)]


# ---- sums


@dataclass(frozen=True, slots=True)
class DailySums:
    """Sums by (code, scenario, day), of which the sums over any days before one are two look-ups."""

    places: NDArray[np.integer[Any]]
    """(entries), ascending: code, scenario and day as one number."""
    until: NDArray[np.integer[Any]]
    """(entries + 1, 3): sums of COUNTED over all entries before each. Unsigned ones may wrap: differences do not."""
    first: int
    """Day; earlier ones are taken for it."""
    width: int
    """Days from the first on that are kept apart; later ones count as the last."""
    num_scenarios: int
    index: NDArray[np.int32] | None = None
    """Number of entries before each place; None: it is searched for."""

    @classmethod
    def of(cls, codes: Ints, sums_N5: Ints, num_scenarios: int) -> DailySums:
        """Sums of codes from 0 on, a row of SUMS each; several rows of one code, scenario and day add up."""
        days = sums_N5[:, 0]
        first = int(days.min()) if len(days) else 0
        width = int(days.max(initial=first)) - first + 2  # one more: the day after all others
        place = (codes * num_scenarios + sums_N5[:, 1]) * width + days - first
        order = np.argsort(place, kind="stable")
        until = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(sums_N5[order, 2:], axis=0)])
        return cls(place[order], until, first, width, num_scenarios)

    def before(self, codes_N: Ints, days_N: Ints, windows: Sequence[int | None]) -> Ints:
        """(S, W, N, 3): COUNTED of each scenario over the days of each window, which ends before a row's own day.

        Args:
            codes_N: all sums of a code without entries, -1 among them, are 0.
            days_N: one a row, or one for all of them.
            windows: days that each looks back; None: to the beginning.
        """
        back_W1 = np.array([days or 0 for days in windows], dtype=np.int64)[:, None]
        is_bounded_W1 = np.array([days is not None for days in windows])[:, None]
        start_WN = np.where(is_bounded_W1, np.clip(days_N - back_W1 - self.first, 0, self.width - 1), 0)
        end_N = np.clip(days_N - self.first, 0, self.width - 1)
        base_SN = (codes_N * self.num_scenarios + np.arange(self.num_scenarios)[:, None]) * self.width
        low_SWN, high_SN = self._find(base_SN[:, None] + start_WN), self._find(base_SN + end_N)
        return (self.until[high_SN][:, None] - self.until[low_SWN]).astype(np.int64, copy=False)

    def _find(self, places: Ints) -> NDArray[np.integer[Any]]:
        """How many entries lie before each place."""
        if self.index is None:
            return np.searchsorted(self.places, places)
        return self.index[np.clip(places, 0, len(self.index) - 1)]

    def indexed(self) -> DailySums:
        """The same with an index, for many rows; without one where it would be large."""
        size = int(self.places.max(initial=0)) + 2
        if size > _MAX_INDEX:
            return self
        to_next = np.diff(self.places, prepend=-1, append=size - 1)
        return replace(self, index=np.repeat(np.arange(len(self.places) + 1, dtype=np.int32), to_next))


# ---- counters


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterColumns:
    """Columns of one counter."""

    feature: str
    """What it counts by."""
    per_scenario: bool
    windows: tuple[tuple[int | None, tuple[tuple[str, str], ...]], ...]
    """(days, None: all before; (column, what it is: an event or a rate) ..)."""

    @classmethod
    def of(cls, name: str, counter: CounterConfig, feature: str) -> CounterColumns:
        """The columns of a configured counter."""
        named = iter(counter_columns(name, counter))
        windows = tuple(
            (counter.days(window), tuple((next(named), what) for what in counter.columns)) for window in counter.windows
        )
        return cls(feature=feature, per_scenario=counter.per_scenario, windows=windows)


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterPlan:
    """What rows need for their counters beside the sums of their own values; sent with the task."""

    columns: tuple[CounterColumns, ...] = ()
    prior: float = 0.0
    num_scenarios: int = 0
    of_scenarios: tuple[int, ...] = ()
    """SUMS of each day and scenario, one after the other."""
    cvr_without: tuple[int, ...] = ()
    """Positions of scenarios whose orders no log records: their clicks are no trials of an order."""

    def totals(self) -> DailySums:
        """Sums of whole scenarios, under code 0."""
        totals_N5 = np.array(self.of_scenarios, dtype=np.int64).reshape(-1, len(SUMS))
        return DailySums.of(np.zeros(len(totals_N5), np.int64), totals_N5, self.num_scenarios)


def counter_values(
    plan: CounterPlan,
    totals: DailySums,
    sums: Mapping[str, DailySums],
    codes: Mapping[str, Ints],
    scenarios_N: Ints,
    days_N: Ints,
) -> dict[str, NDArray[np.float32]]:
    """Column -> counters of some rows: logarithms of 1 + the counts, and log odds less those of the scenario.

    Args:
        totals: `plan.totals()`, which a caller makes once.
        sums: feature -> sums by code.
        codes: feature -> one for each row, which `sums` lacks where the row has no value; one for all rows where it is
            the same, and then a column has one number.
        scenarios_N: position of each row's scenario, or one for all rows.
        days_N: days since 1970, one a row or one for all rows.
    """
    if not plan.columns:
        return {}
    spans = list(dict.fromkeys(days for counter in plan.columns for days, _ in counter.windows))
    every_4SWN = _with_trials(totals.before(np.zeros_like(days_N), days_N, spans), plan)
    own_4SWN = {
        name: _with_trials(sums[name].before(codes[name], days_N, spans), plan)
        for name in {c.feature for c in plan.columns}
    }
    groups: dict[tuple[int, bool], tuple[list[Ints], list[int], list[tuple[tuple[str, str], ...]]]] = {}
    for counter in plan.columns:
        picked = [spans.index(days) for days, _ in counter.windows]
        own_4WN = _of_rows(own_4SWN[counter.feature], scenarios_N, per_scenario=counter.per_scenario)
        group = groups.setdefault((own_4WN.shape[2], counter.per_scenario), ([], [], []))
        group[0].append(own_4WN[:, picked])
        group[1].extend(picked)
        group[2].extend(columns for _, columns in counter.windows)
    found: dict[str, NDArray[np.float32]] = {}
    hits, trials = np.s_[1:3], np.s_[::3]  # clicks and orders, of impressions and of known clicks
    for (_, per_scenario), (owns, picked, names) in groups.items():  # few calls for many counters: a request is one row
        own_4KN = np.concatenate(owns, axis=1)
        every_4WN = _of_rows(every_4SWN, scenarios_N, per_scenario=per_scenario)
        defined, rate, log_rate = _rates(every_4WN[hits], every_4WN[trials])
        if len(spans) > 1:
            defined, rate, log_rate = defined[:, picked], rate[:, picked], log_rate[:, picked]
        odds_2KN = _smoothed(own_4KN[hits], own_4KN[trials], defined, rate, log_rate, plan.prior)
        values_5KN = np.concatenate([np.log1p(own_4KN[:3]), odds_2KN]).astype(np.float32)
        for k, columns in enumerate(names):
            found |= {column: values_5KN[_KINDS.index(what), k] for column, what in columns}
    return found


def _with_trials(sums_SWN3: Ints, plan: CounterPlan) -> Ints:
    """(4, S, W, N): COUNTED, and the clicks whose orders are known."""
    found_4SWN = np.ascontiguousarray(np.moveaxis(sums_SWN3, 3, 0)[[0, 1, 2, 1]])
    for scenario in plan.cvr_without:
        found_4SWN[3, scenario] = 0
    return found_4SWN


def _of_rows(sums_4SWN: Ints, scenarios_N: Ints, *, per_scenario: bool) -> Ints:
    """(4, W, N): of each row's scenario, or of all."""
    if not per_scenario:
        return sums_4SWN.sum(axis=1)
    if len(scenarios_N) == 1:
        return sums_4SWN[:, scenarios_N[0]]
    found_4WN = sums_4SWN[:, 0].copy()
    for scenario in range(1, sums_4SWN.shape[1]):
        np.copyto(found_4WN, sums_4SWN[:, scenario], where=scenarios_N == scenario)
    return found_4WN


def log_odds(hits: Ints, trials: Ints, all_hits: Ints, all_trials: Ints, prior: float) -> NDArray[np.float64]:
    """Log odds of hits out of trials, smoothed by `prior` trials at the rate of all, less the log odds of that rate.

    0 without a trial, and where none or every one of all trials is a hit. Several clicks of an impression, or one on a
    later day than the impression, can be more than the impressions: trials then are as many as hits.
    """
    return _smoothed(hits, trials, *_rates(all_hits, all_trials), prior)


def _rates(hits: Ints, trials: Ints) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Whether there is a rate to compare with, the rate, and its log odds."""
    trials = np.maximum(trials, hits)
    defined = (hits > 0) & (hits < trials)
    rate = np.where(defined, hits / np.maximum(trials, 1), 0.5)
    return defined, rate, np.log(rate / (1 - rate))


def _smoothed(
    hits: Ints,
    trials: Ints,
    defined: NDArray[np.bool_],
    rate: NDArray[np.float64],
    log_rate: NDArray[np.float64],
    prior: float,
) -> NDArray[np.float64]:
    trials = np.maximum(trials, hits)
    odds = (hits + prior * rate) / (trials - hits + prior * (1 - rate))
    return np.where(defined & (trials > 0), np.log(odds) - log_rate, 0.0)
