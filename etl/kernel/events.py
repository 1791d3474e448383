"""One chunk of event rows as numbers: the numpy the kernel (attribution, labels, histories) works on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from usr_ray.schema import PAST_CLICK, PAST_ORDER

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

KIND_IMPRESSION, KIND_CLICK, KIND_ORDER = 1, 2, 3
KIND_PAST_CLICK, KIND_PAST_ORDER = PAST_CLICK, PAST_ORDER
"""Kinds of rows, in the order of equal times: a click precedes an order, as ACTION_CLICK precedes ACTION_ORDER.

Past clicks and orders are history events that an earlier build attributed (etl/build/state.py), not rows of the logs.
"""
NO_SCENARIO = -1
"""Scenario of an order line whose shop does not know the scenario."""


def context_column(feature: str) -> str:
    """Column of a context feature beside the pass's own columns, none of which has a colon in its name."""
    return f"context:{feature}"


def owned_column(feature: str) -> str:
    """Column of a category of the row's user or item beside the pass's own; only where counters count by it."""
    return f"owned:{feature}"


def texts_column(feature: str) -> str:
    """Column of the users or items table with the texts (array<string>) that tags or terms are made of."""
    return f"texts:{feature}"


@dataclass(frozen=True, slots=True)
class Events:
    """One chunk of N rows as numbers. Rows of a user are adjacent and sorted by (time, kind, id, item)."""

    user: Ints
    """Ordinal of the user in the chunk, non-decreasing."""
    time: Ints
    """Microseconds since 1970, UTC."""
    known: Ints
    """Microseconds at which the row became known (ingest_time, or event_time where there is none)."""
    kind: Ints
    scenario: Ints
    """Position in the config's scenarios; NO_SCENARIO for shop-wide orders."""
    item: Ints
    """Equal exactly where the item is equal."""
    named: Ints
    """Click: row of the impression it names, -1 where the chunk has none of that id."""
    has_name: Bools
    """Click: it names an impression."""
    id_rank: Ints | None
    """Order of (id, item_id) among all rows, as strings; needed only where a clock correction makes new ties."""

    @classmethod
    def from_arrow(cls, rows: pa.Table, *, ranked: bool) -> Events:
        """Number a chunk with columns user_id, event_time, known_time, kind, scenario, id, item_id, impression_id.

        `impression_id` is the one a click names; the id of an impression is in `id`. `ranked` fills `id_rank`.
        """
        size = rows.num_rows
        kind = _ints(rows["kind"])
        user_code = codes(rows["user_id"])
        user = np.cumsum(np.diff(user_code, prepend=user_code[:1]) != 0)
        item = codes(rows["item_id"])
        impressions = np.flatnonzero(kind == KIND_IMPRESSION)
        clicks = np.flatnonzero(kind == KIND_CLICK)
        names = rows["impression_id"].take(pa.array(clicks)).combine_chunks()
        ids = rows["id"].take(pa.array(impressions)).combine_chunks()
        found = _ints(pc.fill_null(pc.index_in(names, value_set=ids, skip_nulls=True), -1))
        named = np.full(size, -1, dtype=np.int64)
        has_name = np.zeros(size, dtype=np.bool_)
        if len(impressions):
            named[clicks] = np.where(found >= 0, impressions[found], -1)
        has_name[clicks] = names.is_valid().to_numpy(zero_copy_only=False)
        return cls(
            user=user,
            time=micros(rows["event_time"]),
            known=micros(rows["known_time"]),
            kind=kind,
            scenario=_ints(rows["scenario"]),
            item=item,
            named=named,
            has_name=has_name,
            id_rank=_ranks(rows["id"], rows["item_id"]) if ranked else None,
        )

    def rows(self, kind: int) -> Ints:
        """Rows of one kind, in the chunk's order."""
        return np.flatnonzero(self.kind == kind)


class GroupedTimes:
    """Events sorted by (group, time), ties in the given order; counts of events before an instant by binary search."""

    def __init__(self, groups: Ints, times: Ints) -> None:
        self._times = np.unique(times)
        self._stride = len(self._times) + 1
        keys = groups * self._stride + np.searchsorted(self._times, times)
        self.order = np.argsort(keys, kind="stable")
        """Positions of the events as given, in sorted order."""
        self._keys = keys[self.order]

    def start(self, groups: Ints) -> Ints:
        """Sorted position of each group's first event."""
        return np.searchsorted(self._keys, groups * self._stride)

    def before(self, groups: Ints, times: Ints) -> Ints:
        """Sorted position of each group's first event at or after its time: the end of those strictly before."""
        return np.searchsorted(self._keys, groups * self._stride + np.searchsorted(self._times, times, "left"))

    def until(self, groups: Ints, times: Ints) -> Ints:
        """Sorted position of each group's first event after its time: the end of those at or before."""
        return np.searchsorted(self._keys, groups * self._stride + np.searchsorted(self._times, times, "right"))

    def last(self, groups: Ints, times: Ints) -> Ints:
        """Position, as given, of each group's last event at or before its time; -1 where there is none."""
        if not len(self.order):
            return np.full(len(groups), -1, dtype=np.int64)
        position = self.until(groups, times) - 1
        return np.where(position >= self.start(groups), self.order[position], -1)

    def any_within(self, groups: Ints, first: Ints, last: Ints) -> Bools:
        """True where the group has an event in [first, last]."""
        return self.until(groups, last) > self.before(groups, first)


def user_items(events: Events) -> Ints:
    """A dense code of (user, item) for every row."""
    width = int(events.item.max(initial=0)) + 1
    return np.unique(events.user * width + events.item, return_inverse=True)[1].astype(np.int64, copy=False)


def _ints(column: pa.ChunkedArray | pa.Array) -> Ints:
    return column.to_numpy().astype(np.int64, copy=False)


def micros(column: pa.ChunkedArray) -> Ints:
    """Microseconds since 1970 of a timestamp column without nulls."""
    return column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()


def codes(column: pa.ChunkedArray) -> Ints:
    """Codes equal where the strings are equal; a null is a value of its own."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return _ints(encoded.indices)


def codes_and_values(column: pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    """Code of every row, -1 where it is null, and the values that the codes stand for."""
    encoded = column.combine_chunks().dictionary_encode()
    return _ints(pc.fill_null(encoded.indices, -1)), encoded.dictionary


def _ranks(ids: pa.ChunkedArray, items: pa.ChunkedArray) -> Ints:
    order = pc.sort_indices(
        pa.table({"id": ids, "item": items}), sort_keys=[("id", "ascending"), ("item", "ascending")]
    )
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order.to_numpy()] = np.arange(len(order))
    return ranks
