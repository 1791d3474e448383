"""What a service knows of items and users: files beside the model, read through memory maps, one read a request.

    items.arrow          raw item_id -> row        (encode.ValueIndex)
    items_ids.npy        (rows, 1 + width): encoded item_id, then `Profile.ids`: categories, tags, terms, codes; int32
    items_numbers.npy    (rows, numbers), float32, scaled
    users/data.mdb       LMDB: digest of the raw user_id -> one packed value: features, events, sums for counters

Both are made from the lake: features from the newest impression of each item and user, events from `<lake>/state`.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import weakref
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from usr_ray.config import UserError
from usr_ray.data.manifest import Manifest
from usr_ray.data.rows import micros, read_rows
from usr_ray.files import one_line
from usr_ray.serving.counters import LakeCounters
from usr_ray.serving.encode import Encoder, Ints, Profile, UserEvents, ValueIndex, event_keys

ITEMS, ITEM_IDS, ITEM_NUMBERS, USERS = "items.arrow", "items_ids.npy", "items_numbers.npy", "users"
_EVENT_BYTES = 8 + 8 + 4 + 4 + 1 + 1 + 8
_SUM_BYTES = 8 + 3 * 4
_PAGE_BYTES = 4096
_MIN_MAP_BYTES = 1 << 24


class StoreError(UserError):
    """A store that cannot be read."""


# ---- from the lake


def newest_features(manifest: Manifest, key: str, owner: str) -> pa.Table:
    """Features of every user or item as its newest impression has them.

    Args:
        manifest: covers all dates of the samples.
        key: 'user_id' or 'item_id'.
        owner: 'user' or 'item'.

    Returns:
        `key` (string), the encoded columns of its categories, tags and terms, the scaled ones of its numbers; one row a
        key.

    Raises:
        DataError: a file of the table cannot be read.
    """
    spec = manifest.spec
    columns = [f.column for f in spec.sparse if f.owner == owner and f.name != key]
    columns += [f.column for f in spec.dense if f.owner == owner] + [f.column for f in spec.lists if f.owner == owner]
    newest: pa.Table | None = None
    found = read_rows(manifest, [key, "event_time", *columns])
    for _, of_date in groupby(found, key=lambda pair: pair[0].date):
        parts = [] if newest is None else [newest]
        for _, rows in of_date:
            parts.append(rows.set_column(1, "event_time", rows["event_time"].cast(pa.timestamp("us", tz="UTC"))))
        newest = _last_of_each(pa.concat_tables(parts), key)
    assert newest is not None
    return newest.drop_columns(["event_time"]).sort_by(key)


def _last_of_each(rows: pa.Table, key: str) -> pa.Table:
    rows = rows.sort_by([("event_time", "ascending")])
    codes = rows[key].combine_chunks().dictionary_encode().indices.to_numpy()
    _, from_end = np.unique(codes[::-1], return_index=True)
    return rows.take(pa.array(len(codes) - 1 - from_end))


def _profiles(rows: pa.Table, encoder: Encoder, owner: str, counted: LakeCounters | None) -> Profile:
    """Rows of `newest_features` as the model takes them: ids that it has no embedding for are unknown."""
    spec = encoder.spec
    ids = np.zeros((rows.num_rows, encoder.width(owner)), dtype=np.int32)
    for place, name in enumerate(encoder.categories[owner]):
        feature = spec.sparse_feature(name)
        column = rows[feature.column].to_numpy()
        ids[:, place] = np.where(column < feature.num_embeddings, column, 1)
    places = encoder.list_places(owner)
    for of_list in encoder.lists[owner]:
        lists = rows[of_list.column].combine_chunks()
        lengths = lists.value_lengths().to_numpy()
        owner_V = np.repeat(np.arange(len(lengths)), lengths)
        place_V = np.arange(len(owner_V)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        known_V = lists.flatten().to_numpy()
        known_V = np.where(known_V < of_list.num_embeddings, known_V, 1)
        ids[owner_V, places[of_list.name].start + place_V] = known_V
    for name, place in encoder.counted_places(owner).items():
        assert counted is not None
        encoded = None if name == f"{owner}_id" else rows[spec.sparse_feature(name).column].to_numpy()
        ids[:, place] = counted.codes(name, rows[f"{owner}_id"].combine_chunks(), encoder, encoded)
    numbers = np.zeros((rows.num_rows, len(encoder.numbers[owner])), dtype=np.float32)
    dense = {f.name: f.column for f in spec.dense}
    for place, name in enumerate(encoder.numbers[owner]):
        numbers[:, place] = rows[dense[name]].to_numpy()
    return Profile(ids, numbers)


# ---- items


def write_items(folder: Path, manifest: Manifest, encoder: Encoder, counted: LakeCounters | None = None) -> int:
    """Write the item table of every item in the samples; its rows. `counted` as in `write_users`."""
    rows = newest_features(manifest, "item_id", "item")
    put_items(folder, rows["item_id"].to_pylist(), _profiles(rows, encoder, "item", counted), encoder)
    return rows.num_rows


def put_items(folder: Path, names: Sequence[str], profiles: Profile, encoder: Encoder) -> None:
    """Write the item table: raw ids, each once, and their features, a row each."""
    ValueIndex.write(folder / ITEMS, names, np.arange(len(names)))
    np.save(folder / ITEM_IDS, np.column_stack([encoder.ids("item_id", names).astype(np.int32), profiles.ids]))
    np.save(folder / ITEM_NUMBERS, profiles.numbers)


class ItemTable:
    """The items of a version, memory-mapped. Raises StoreError when a file is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        try:
            self._rows = ValueIndex(folder / ITEMS)
            self._ids, self._numbers = (np.load(folder / name, mmap_mode="r") for name in (ITEM_IDS, ITEM_NUMBERS))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StoreError(f"{folder}: its items cannot be read ({one_line(error)}); publish again") from error

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, item_ids: Sequence[str], encoder: Encoder) -> tuple[Ints, Profile, NDArray[np.bool_]]:
        """Encoded ids and features (N) of raw items, and which of them are in no impression of the lake."""
        rows = self._rows.find(item_ids)
        is_new = rows < 0
        if len(self):
            ids, numbers = self._ids[np.maximum(rows, 0)], self._numbers[np.maximum(rows, 0)]
        else:
            ids, numbers = (np.empty((len(rows), of.shape[1]), of.dtype) for of in (self._ids, self._numbers))
        if is_new.any():
            nothing, new = encoder.nothing("item"), [i for i, new in zip(item_ids, is_new, strict=True) if new]
            ids, numbers = np.array(ids), np.array(numbers)
            ids[is_new, 0] = encoder.ids("item_id", new)
            ids[is_new, 1:], numbers[is_new] = nothing.ids, nothing.numbers
            if "item_id" in encoder.counted["item"]:
                ids[is_new, 1 + encoder.counted_places("item")["item_id"]] = encoder.codes("item_id", new)
        return ids[:, 0].astype(np.int64), Profile(ids[:, 1:], numbers), is_new


# ---- users


def write_users(
    folder: Path,
    manifest: Manifest,
    events: pa.Table,
    encoder: Encoder,
    *,
    as_of_us: int | None,
    counted: LakeCounters | None = None,
) -> int:
    """Write the users of the lake into an LMDB; how many.

    A user whose impressions have left the samples is written too: its events and counts are in the rows of a later day.
    Its features are unknown then, as of a new user.

    Args:
        manifest: covers all dates of the samples.
        events: as `usr_ray.data.events.read_events` gives them.
        as_of_us: from when on requests come: the newest events of each scenario, as many as a history holds, are kept,
            and those not yet known then. None: all are, for `replay`.
        counted: the sums that counters count by the users; None: the model has no counters.
    """
    rows = newest_features(manifest, "user_id", "user")
    profiles = _profiles(rows, encoder, "user", counted)
    names: list[str] = rows["user_id"].to_pylist()
    elsewhere = {*pc.unique(events["user_id"]).to_pylist(), *(() if counted is None else counted.users)}
    gone = sorted(elsewhere.difference(names))
    nothing = encoder.nothing("user")
    profiles = Profile(
        np.concatenate([profiles.ids, np.tile(nothing.ids, (len(gone), 1))]),
        np.concatenate([profiles.numbers, np.tile(nothing.numbers, (len(gone), 1))]),
    )
    names += gone
    put_users(folder, names, _events_of(events, encoder, names, as_of_us), profiles, counted)
    return len(names)


def instant_after(events: pa.Table, now_us: int) -> int:
    """Microseconds since 1970 from when on a version answers: after the newest event, and not later than now.

    One event of a clock that goes ahead would else have every request refused until then.
    """
    times = micros(events["event_time"])
    return min(int(times.max(initial=0)) + 1, now_us)


def put_users(
    folder: Path,
    names: Sequence[str],
    of_users: Sequence[UserEvents],
    profiles: Profile,
    counted: LakeCounters | None = None,
) -> None:
    """Write the user store: raw ids, each once, their events, their features, a row each, and sums for counters."""
    num_bytes = sum(
        _PAGE_BYTES // 4 + 2 * _EVENT_BYTES * len(found.time) + 8 * (profiles.ids.shape[1] + profiles.numbers.shape[1])
        for found in of_users
    ) + (0 if counted is None else 2 * _SUM_BYTES * counted.num_user_sums)
    digests = [user_key(name) for name in names]
    order = sorted(range(len(names)), key=digests.__getitem__)
    environment = lmdb.open(str(folder / USERS), map_size=max(2 * num_bytes, _MIN_MAP_BYTES), lock=False, sync=False)
    with environment.begin(write=True) as transaction:
        for n in order:  # in the order of the keys pages are filled one after the other
            sums = None if counted is None else counted.sums(names[n])
            profile = Profile(profiles.ids[n], profiles.numbers[n], sums)
            transaction.put(digests[n], _packed(of_users[n], profile), append=True)
    environment.sync(True)
    environment.close()


def _events_of(events: pa.Table, encoder: Encoder, names: list[str], as_of_us: int | None) -> list[UserEvents]:
    """The events of each user in `names`."""
    time_V, known_V = micros(events["event_time"]), micros(events["known_time"])
    whole = UserEvents(
        time=time_V,
        known=np.maximum(known_V, time_V),
        scenario=events["scenario"].to_numpy().astype(np.uint8),
        action=events["action"].to_numpy().astype(np.uint8),
        item=_encoded(events["item_id"], encoder, "item_id"),
        query=_encoded(events["query"], encoder, "query"),
        key=event_keys(zip(*(events[name].to_pylist() for name in ("action", "id", "item_id")), strict=True)),
    )
    length = encoder.spec.history_length
    users = events["user_id"].combine_chunks().dictionary_encode()
    # Sorted by user: code n is the n-th user, whose events stand together.
    edges = [*np.flatnonzero(np.diff(users.indices.to_numpy(), prepend=-1)).tolist(), len(users)]
    rows = dict(zip(users.dictionary.to_pylist(), (np.arange(*span) for span in pairwise(edges)), strict=True))
    found = []
    for name in names:
        some = whole.rows(rows.get(name, np.empty(0, np.int64)))
        found.append(some if as_of_us is None else some.rows(_kept(some, as_of_us, length)))
    return found


def _kept(events: UserEvents, as_of: int, length: int) -> Ints:
    """What a request from `as_of` on can see: each scenario's newest `length` visible events, and all others."""
    is_known = (events.time < as_of) & (events.known <= as_of)
    kept = [np.flatnonzero(~is_known)]
    for scenario in np.unique(events.scenario):
        kept.append(np.flatnonzero((events.scenario == scenario) & is_known)[-length:])
    return np.sort(np.concatenate(kept))


def _encoded(column: pa.ChunkedArray, encoder: Encoder, feature: str) -> NDArray[np.int32]:
    found = column.combine_chunks().dictionary_encode()
    ids = np.append(encoder.ids(feature, found.dictionary.to_pylist()), 0)  # a null takes the last: padding
    places = found.indices.fill_null(len(ids) - 1).to_numpy()
    return ids[places].astype(np.int32)


def user_key(user_id: str) -> bytes:
    """Key of a user in the store."""
    return hashlib.blake2b(user_id.encode(), digest_size=16).digest()


def _packed(events: UserEvents, profile: Profile) -> bytes:
    places, until = profile.sums or (np.empty(0, np.int64), np.empty((0, 3), np.uint32))
    parts: list[NDArray[Any]] = [events.time, events.known, events.key, places, until, events.item, events.query]
    parts += [profile.ids, profile.numbers, events.scenario, events.action]
    return b"".join([struct.pack("<II", len(events.time), len(until)), *(part.tobytes() for part in parts)])


def _unpacked(value: bytes, num_ids: int, num_numbers: int) -> tuple[UserEvents, Profile]:
    size, num_sums = struct.unpack_from("<II", value)
    place = 8

    def take(dtype: Any, count: int) -> NDArray[Any]:
        nonlocal place
        array = np.frombuffer(value, dtype, count, place)
        place += array.nbytes
        return array

    time, known, key = take(np.int64, size), take(np.int64, size), take(np.uint64, size)
    sums = None
    if num_sums:  # one more than there are places
        sums = take(np.int64, num_sums - 1), take(np.uint32, 3 * num_sums).reshape(-1, 3)
    item, query = take(np.int32, size), take(np.int32, size)
    profile = Profile(take(np.int32, num_ids), take(np.float32, num_numbers), sums)
    scenario, action = take(np.uint8, size), take(np.uint8, size)
    return UserEvents(time, known, scenario, action, item, query, key), profile


class _Environment:
    """An open LMDB. A process may map one only once: all stores of a version share it, and the last one unmaps it."""

    def __init__(self, path: Path) -> None:
        self.lmdb = lmdb.open(str(path), readonly=True, lock=False, create=False)


_open: weakref.WeakValueDictionary[Path, _Environment] = weakref.WeakValueDictionary()
_opening = threading.Lock()


class UserStore:
    """The users of a version. Raises StoreError when it cannot be opened or read."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self._sizes = (encoder.width("user"), len(encoder.numbers["user"]))
        path = (folder / USERS).resolve()
        try:
            with _opening:
                self._environment = _open.get(path) or _Environment(path)
                _open[path] = self._environment
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"{folder / USERS}: cannot be opened ({one_line(error)}); publish again") from error

    def get(self, user_id: str) -> tuple[UserEvents, Profile] | None:
        """Events and features of a user; None: in no impression of the lake.

        Raises:
            StoreError: the store cannot be read.
        """
        try:
            value = self._value(user_key(user_id))
            return None if value is None else _unpacked(value, *self._sizes)
        except (lmdb.Error, OSError, ValueError, struct.error) as error:
            raise StoreError(f"users: cannot be read ({one_line(error)}); publish again") from error

    def _value(self, digest: bytes) -> bytes | None:
        with self._environment.lmdb.begin() as transaction:
            return transaction.get(digest)
