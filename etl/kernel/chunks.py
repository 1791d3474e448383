"""Whole users, cleaned: a stream of event rows cut into chunks, duplicates set aside, rows in a fixed order.

Spark only brings the rows of a user together (one radix sort by a 64-bit key); the order of a user's rows, and
which of two rows with one key stays, is decided here by content alone, so that neither partitions nor arrival matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.kernel.events import (
    KIND_CLICK,
    KIND_ORDER,
    KIND_PAST_CLICK,
    KIND_PAST_ORDER,
    NO_SCENARIO,
    Bools,
    Ints,
    codes,
    micros,
)
from usr_ray.config import DAY_US

USER_KEY = "user_key"
"""xxhash64(user_id): rows of a user have one key, and the rows of a key arrive next to each other."""
REQUEST_KEY = "request_key"
"""xxhash64 of the request, or of the impression where it has none: each its own request, not one for all such rows."""
KEY_HASH = "key_hash"
"""Hash of a row's own key (etl/logs/duplicates.py)."""
FOREIGN = "is_foreign"
"""The key belongs to a row of another user: a duplicate wherever it is."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """Rows of whole users; the three parts together are the rows that came in."""

    rows: pa.Table
    """Usable, no key twice, within the limits, sorted by (user, event_time, kind, id, item_id, scenario)."""
    duplicates: pa.Table
    unusable: pa.Table
    """Rows with a `reason`."""
    capped: pa.Table
    """Rows of a user's days beyond `limits.max_user_events_per_day`."""


def whole_users(batches: Iterable[pa.RecordBatch], chunk_rows: int) -> Iterator[pa.Table]:
    """Cut a stream grouped by `user_key` into tables of at least `chunk_rows` rows (the last: fewer), no key split."""
    held: list[pa.RecordBatch] = []
    num_rows = cut = 0  # the newest key's first row
    newest: int | None = None
    for batch in batches:
        if not batch.num_rows:
            continue
        keys = batch.column(USER_KEY).to_numpy()
        others = np.flatnonzero(keys != keys[-1])
        if len(others) or keys[-1] != newest:
            cut = num_rows + (int(others[-1]) + 1 if len(others) else 0)
        newest = keys[-1]
        held.append(batch)
        num_rows += batch.num_rows
        if num_rows >= chunk_rows and cut:
            whole, held = pa.Table.from_batches(held), []
            held, ready = whole.slice(cut).to_batches(), [whole.slice(0, cut)]
            num_rows, cut = num_rows - cut, 0
            # Nothing here may keep a chunk alive that its reader has released: giant users make large ones.
            del whole
            yield ready.pop()
    if held:
        ready = [pa.Table.from_batches(held)]
        held = []
        yield ready.pop()


def cleaned(rows: pa.Table, max_user_day_rows: int = 0) -> Cleaned:
    """Set aside unusable rows, duplicates and the days of giant users (0: no limit); sort the rest."""
    unusable = rows["reason"].is_valid().to_numpy()
    foreign = rows[FOREIGN].to_numpy() & ~unusable
    mine = ~unusable & ~foreign
    usable = rows if mine.all() else rows.filter(pa.array(mine))
    again = _second_copies(usable)
    parts = [usable.filter(pa.array(again)), rows.filter(pa.array(foreign))]
    unique = usable.filter(pa.array(~again)) if again.any() else usable
    capped = _over_limit(unique, max_user_day_rows)
    kept = unique.filter(pa.array(~capped)) if capped.any() else unique
    return Cleaned(
        rows=kept.take(_order(kept)),
        duplicates=pa.concat_tables(parts),
        unusable=rows.filter(pa.array(unusable)),
        capped=unique.filter(pa.array(capped)),
    )


def _over_limit(rows: pa.Table, max_user_day_rows: int) -> Bools:
    """True for every row of a user's UTC day that has more rows than allowed; duplicates do not count."""
    if not (max_user_day_rows and rows.num_rows):
        return np.zeros(rows.num_rows, dtype=np.bool_)
    day = days_of(rows)
    places = codes(rows["user_id"]) * (int(np.ptp(day)) + 1) + (day - day.min())
    logged = rows["kind"].to_numpy() <= KIND_ORDER  # what earlier builds kept was within the limit
    distinct, owner = np.unique(places, return_inverse=True)
    counts = np.bincount(owner[logged], minlength=len(distinct))
    return logged & (counts[owner] > max_user_day_rows)


def _order(rows: pa.Table) -> pa.Array:
    """Order of the rows by (user, event_time, kind, id, item_id, scenario); strings are compared in ties only."""
    keys = (rows["kind"].to_numpy(), micros(rows["event_time"]), codes(rows["user_id"]))
    order = np.lexsort(keys)
    same = np.ones(max(len(order) - 1, 0), dtype=np.bool_)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    tied = np.zeros(len(order), dtype=np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    places = np.flatnonzero(tied)
    if len(places):
        runs = np.cumsum(np.concatenate([[True], ~same]))[places]
        names = ["id", "item_id", "scenario"]
        part = rows.select(names).take(pa.array(order[places])).append_column("run", pa.array(runs))
        sort = pc.sort_indices(part, sort_keys=[(name, "ascending") for name in ("run", *names)])
        order[places] = order[places][sort.to_numpy()]
    return pa.array(order)


def _second_copies(rows: pa.Table) -> Bools:
    """True for every row whose key another row of the user has that comes first.

    First is the earliest (event_time, known_time); then a scenario's order log before the shop's; then by content.
    """
    again = np.zeros(rows.num_rows, dtype=np.bool_)
    hashes = rows[KEY_HASH].to_numpy()
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    if not same.any():
        return again
    doubled = np.zeros(len(order), dtype=np.bool_)
    doubled[1:] |= same
    doubled[:-1] |= same
    places = order[doubled]
    some = rows.take(pa.array(places))
    # Equal hashes of unequal keys are distinguished here.
    kind, scenario = some["kind"].to_numpy(), some["scenario"].to_numpy()
    key = pa.table(
        {
            "kind": some["kind"],
            "scope": pa.array(np.where(np.isin(kind, (KIND_CLICK, KIND_PAST_CLICK)), scenario, 0)),
            "id": some["id"],
            "part": pc.if_else(pa.array(np.isin(kind, (KIND_ORDER, KIND_PAST_ORDER))), some["item_id"], ""),
            "user_id": some["user_id"],
        }
    )
    rank = {
        "rank_time": some["event_time"],
        "rank_known": some["known_time"],
        "rank_log": pa.array(np.where(scenario == NO_SCENARIO, np.iinfo(np.int32).max, scenario)),
    }
    rest = [name for name in sorted(some.column_names) if name not in key.column_names and name not in _SAME_FOR_KEY]
    table = key
    for name, column in (*rank.items(), *((f"rest_{name}", some[name]) for name in rest)):
        table = table.append_column(name, column)
    sort = pc.sort_indices(table, sort_keys=[(name, "ascending", "at_start") for name in table.column_names]).to_numpy()
    first = np.ones(len(sort), dtype=np.bool_)
    if len(sort) > 1:
        sorted_key = key.take(pa.array(sort))
        equal = np.ones(len(sort) - 1, dtype=np.bool_)
        for name in key.column_names:
            column = sorted_key[name].combine_chunks()
            equal &= pc.equal(column[1:], column[:-1]).to_numpy(zero_copy_only=False)
        first[1:] = ~equal
    again[places[sort[~first]]] = True
    return again


_SAME_FOR_KEY = {
    USER_KEY,
    REQUEST_KEY,
    KEY_HASH,
    FOREIGN,
    "reason",
    "row_json",
    "event_time",
    "known_time",
    "scenario",
    "row_hash",
    "value_hash",
}
"""Columns that cannot tell two rows of one key and one time apart, or are a function of the others."""


def days_of(rows: pa.Table) -> Ints:
    """UTC day (since 1970) of each row's event_time."""
    return micros(rows["event_time"]) // DAY_US
