"""Raw values of a request to the inputs of request.onnx, by the rules of the ETL. Numpy and Arrow; no Spark, no torch.

The samples table is the reference: for an impression of it, these inputs equal its columns bit for bit (`usr-ray
replay`). Ids come from the vocabularies, memory-mapped and looked up by hash, or are hashes themselves; numbers are
scaled as the feature spec says; a history holds the newest events strictly before the request and known by it.

Shape letters: N candidates or values, V events, L history length.
"""

from __future__ import annotations

import bisect
import datetime as dt
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from usr_ray.config import DAY_US, UserError
from usr_ray.config.logs import MAX_NUMBER, null_numbers
from usr_ray.config.terms import SEPARATOR, tags_of, terms_of
from usr_ray.schema import (
    ACTION_ORDER,
    FIRST_ID,
    LOG1P,
    PADDING_ID,
    QUERY_TERMS,
    STANDARD,
    TERM,
    UNKNOWN_ID,
    DenseFeature,
    FeatureSpec,
    ListFeature,
    scaled_column,
)

Ints = NDArray[np.int64]
EVENT_HOUR = "event_hour"
_NUM_HOURS = 24
_SEED = 42
"""Seed of Spark's xxhash64."""
_FIXED = ("user_id", "item_id", "query", EVENT_HOUR)
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_LARGEST = 1e30
"""Of a scaled number. Beyond are a type's largest values, as logs have them for "no value": in a program's float32
their products are infinite. Raw numbers may be as large as the logs' own, for logarithms of them are small."""


class EncodeError(UserError):
    """Values that cannot be encoded."""


def micros_of(text: Any) -> int:
    """Microseconds since 1970 of an ISO 8601 time with a zone; TypeError or ValueError where it is none."""
    since = dt.datetime.fromisoformat(text) - EPOCH
    try:
        EPOCH + since  # with its zone a time of the year 1 or 9999 may be outside the calendar in UTC
    except OverflowError as error:
        raise ValueError(f"{text} is outside the years 1 to 9999 in UTC") from error
    return since // dt.timedelta(microseconds=1)


def hashes(values: Sequence[str]) -> NDArray[np.uint64]:
    """Spark's xxhash64 of each value."""
    digest = xxhash.xxh64_intdigest
    return np.fromiter((digest(value.encode(), _SEED) for value in values), dtype=np.uint64, count=len(values))


class ValueIndex:
    """A number for each of many strings: an Arrow file sorted by the strings' hashes, memory-mapped.

    Args:
        path: the file that `write` made.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all().combine_chunks()
        self._hashes = table["hash"].to_numpy()
        self._numbers = table["number"].to_numpy()
        self._values = table["value"].combine_chunks()

    @staticmethod
    def write(path: Path, values: Sequence[str], numbers: Ints) -> None:
        """Write the index of `values`, each once.

        Raises:
            EncodeError: two values have one hash (the odds are one in 3,700 for a hundred million values).
        """
        keys = hashes(values)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        same = np.flatnonzero(keys[1:] == keys[:-1])
        if len(same):
            first, second = (values[order[place]] for place in (same[0], same[0] + 1))
            raise EncodeError(f"{path.stem}: {first!r} and {second!r} have one hash; rename one of them in the logs")
        columns = {
            "hash": pa.array(keys),
            "number": pa.array(numbers[order]),
            "value": pa.array(values, pa.large_string()).take(pa.array(order)),
        }
        batch = pa.RecordBatch.from_pydict(columns)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    def __len__(self) -> int:
        return len(self._hashes)

    def items(self) -> dict[int, str]:
        """Number -> value, all of them."""
        return dict(zip(self._numbers.tolist(), self._values.to_pylist(), strict=True))

    def find(self, values: Sequence[str]) -> Ints:
        """The number of each value, -1 where it is not there."""
        found = np.full(len(values), -1, dtype=np.int64)
        if not len(values) or not len(self):
            return found
        keys = hashes(values)
        places = np.minimum(np.searchsorted(self._hashes, keys), len(self) - 1)
        hits = np.flatnonzero(self._hashes[places] == keys)
        if len(hits):
            asked = pa.array([values[n] for n in hits.tolist()], pa.large_string())
            equal = pc.equal(self._values.take(pa.array(places[hits])), asked).to_numpy(zero_copy_only=False)
            hits = hits[equal]
            found[hits] = self._numbers[places[hits]]
        return found


def scaled(values: Sequence[float | None], features: Sequence[DenseFeature]) -> NDArray[np.float32]:
    """Each value by its feature's scale; 0 for None, NaN and infinity (etl/features/vocabulary.py, scale)."""
    if not features:
        return np.empty(0, np.float32)
    x = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    is_there = np.isfinite(x)
    x[~is_there] = 0.0
    kinds = np.array([feature.scale for feature in features])
    fits = np.array([(feature.mean, feature.deviation) for feature in features]).reshape(-1, 2)
    standard = np.where(is_there, (x - fits[:, 0]) / fits[:, 1], 0.0)
    found = np.select([kinds == LOG1P, kinds == STANDARD], [np.sign(x) * np.log1p(np.abs(x)), standard], x)
    with np.errstate(over="ignore"):  # infinite then: `Encoder.profile` refuses it
        return found.astype(np.float32)


def bucket_id(value: float | None, edges: Sequence[float]) -> int:
    """The id of a number's bucket, as float32 (etl/kernel/features.py, bucket_ids)."""
    if value is None or not math.isfinite(value):
        return UNKNOWN_ID
    with np.errstate(over="ignore"):
        return FIRST_ID + bisect.bisect_right(edges, float(np.float32(value)))


def category_text(value: Any) -> str | None:
    """A category as the logs have it: text, an integer or a boolean written out; '' is no value.

    Raises:
        EncodeError: another type, or text that is no Unicode.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, int):
        return None if value is None else str(value)
    if not isinstance(value, str):
        raise EncodeError(f"is {type(value).__name__}; a string, an integer, a boolean or null is needed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise EncodeError("is no Unicode text; send UTF-8") from None
    return value or None


def without_nulls(value: Any, nulls: Collection[str]) -> Any:
    """A raw value, or None where a log's `null_values` say that it stands for none; a list without those that do.

    As the build has it (etl/logs/mapping.py): texts by themselves, -1 and -1.0 alike, blanks round a tag are no part.
    """
    if not nulls or value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return None if value in nulls else value
    if isinstance(value, int | float):
        is_null = str(value) in nulls or value in null_numbers(nulls)
        return None if is_null else value
    if isinstance(value, list | tuple):
        bare = [one.strip() if isinstance(one, str) else one for one in value]
        return [one for one, alone in zip(value, bare, strict=True) if without_nulls(alone, nulls) is not None]
    return value


@dataclass(frozen=True, slots=True)
class UserEvents:
    """Attributed clicks and orders of one user, sorted by (time, action, id) within each scenario."""

    time: Ints
    """Microseconds since 1970."""
    known: Ints
    """Microseconds from which on the event was known."""
    scenario: NDArray[np.uint8]
    action: NDArray[np.uint8]
    item: NDArray[np.int32]
    """Encoded."""
    query: NDArray[np.int32]
    key: NDArray[np.uint64]
    """`event_keys`."""

    def rows(self, places: Ints) -> UserEvents:
        """Some of the events, in the order of `places`."""
        return UserEvents(
            self.time[places],
            self.known[places],
            self.scenario[places],
            self.action[places],
            self.item[places],
            self.query[places],
            self.key[places],
        )

    def and_then(self, more: UserEvents) -> UserEvents:
        """These events and others, sorted by (time, action); of equal ones these first."""
        parts = [np.concatenate([getattr(self, name), getattr(more, name)]) for name in self.__slots__]
        whole = UserEvents(*parts)
        return whole.rows(np.lexsort((whole.action, whole.time)))

    @classmethod
    def none(cls) -> UserEvents:
        """The events of a user who has done nothing."""
        times, small, ids = np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.int32)
        return cls(times, times, small, small, ids, ids, np.empty(0, np.uint64))


def event_keys(events: Iterable[tuple[int, str, str]]) -> NDArray[np.uint64]:
    """What tells events of a user apart, from (action, id, item_id) of each: click_id, or order_id and item_id."""
    return hashes([f"{action} {id_}" + (f"\n{item}" if action == ACTION_ORDER else "") for action, id_, item in events])


@dataclass(frozen=True, slots=True)
class Profile:
    """Encoded features of a user or, a row each, of N candidates, without the id's own."""

    ids: NDArray[np.int32]
    """(width) or (N, width): the categories in the spec's order, then each list of `Encoder.lists`, padded with 0, then
    the codes of what counters count by (`Encoder.counted`), 0 for none."""
    numbers: NDArray[np.float32]
    """(numbers) or (N, numbers)."""
    sums: tuple[Ints, NDArray[np.uint32]] | None = None
    """A user's places and sums of the counters that count by the user (daily_sums.DailySums); None: there are none."""


class Encoder:
    """What encodes for one version of a model.

    Args:
        indexes: feature -> its vocabulary; empty for hashed ids.
        num_buckets: for hashed ids; None: the vocabularies are fitted.
        counted: column that counters count by -> its codes (counters.Counters).
    """

    def __init__(
        self,
        spec: FeatureSpec,
        indexes: Mapping[str, ValueIndex],
        num_buckets: int | None,
        counted: Mapping[str, ValueIndex] | None = None,
    ) -> None:
        self.spec = spec
        self._indexes, self._num_buckets, self._counted = indexes, num_buckets, counted or {}
        self.categories = {
            owner: tuple(f.name for f in spec.sparse if f.owner == owner and f.name not in _FIXED)
            for owner in ("user", "item", "context")
        }
        """Owner -> its categories beside the ids and the hour, numbers in buckets among them."""
        self.counted = {
            owner: tuple(name for name in (f"{owner}_id", *names) if name in self._counted)
            for owner, names in self.categories.items()
        }
        """Owner -> what of it counters count by; the user's id has no code."""
        self.edges = {f.name: f.edges for f in spec.sparse if f.edges is not None}
        """Number in buckets -> the edges between them."""
        self.dense = {f.name: f for f in spec.dense}
        self.lists = {
            owner: tuple(f for f in spec.lists if f.owner in owners and f.name != QUERY_TERMS)
            for owner, owners in (("user", ("user",)), ("item", ("item",)), ("context", ("query", "context")))
        }
        """Owner -> its tags and terms; a query's tags come with the context."""
        self.numbers = {
            owner: tuple(f.name for f in spec.dense if f.owner == owner and f.column == scaled_column(f.name))
            for owner in ("user", "item", "context")
        }
        self.names = {
            owner: dict.fromkeys([*names, *self.numbers[owner], *(n for f in self.lists[owner] for n in f.sources)])
            for owner, names in self.categories.items()
        }
        """Owner -> the raw features that `profile` takes."""

    def ids(self, feature: str, values: Sequence[str | None]) -> Ints:
        """Encoded id of each value: 0 for None, 1 for one that the model does not know."""
        is_given = np.array([value is not None for value in values], dtype=np.bool_)
        given = [value for value in values if value is not None]
        result = np.full(len(values), PADDING_ID, dtype=np.int64)
        if self._num_buckets is not None:
            result[is_given] = np.mod(hashes(given).view(np.int64), self._num_buckets - FIRST_ID) + FIRST_ID
            return result
        index = self._indexes.get(feature)
        found = np.full(len(given), -1, dtype=np.int64) if index is None else index.find(given)
        result[is_given] = np.where(found < 0, UNKNOWN_ID, found)
        return result

    def width(self, owner: str) -> int:
        """Width of Profile.ids."""
        lists = sum(feature.length for feature in self.lists[owner])
        return len(self.categories[owner]) + lists + len(self.counted[owner])

    def codes(self, name: str, texts: Sequence[str | None]) -> Ints:
        """Code of each value of a column that counters count by; 0 for None, and for one that was never counted."""
        found = self._counted[name].find([text or "" for text in texts])
        return np.where([text is None for text in texts], 0, np.maximum(found, 0))

    def counted_places(self, owner: str) -> dict[str, int]:
        """Column that counters count by -> where its code is in Profile.ids."""
        names = self.counted[owner]
        return {name: self.width(owner) - len(names) + n for n, name in enumerate(names)}

    def list_places(self, owner: str) -> dict[str, slice]:
        """Name of tags or terms -> where they are in Profile.ids."""
        places, start = {}, len(self.categories[owner])
        for feature in self.lists[owner]:
            places[feature.name] = slice(start, start + feature.length)
            start += feature.length
        return places

    def list_ids(self, feature: ListFeature, texts: Sequence[str | None]) -> NDArray[np.int32]:
        """Ids (L) of the tags or terms of some texts, padded with 0, as the ETL has them (etl/kernel/features.py)."""
        read = terms_of if feature.table == TERM else tags_of
        values = list(dict.fromkeys(value for text in texts if text for value in read(text)))[: feature.length]
        result = np.full(feature.length, PADDING_ID, dtype=np.int32)
        result[: len(values)] = self.ids(feature.vocabulary, values)
        return result

    def values(self, feature: str) -> dict[int, str]:
        """Encoded id -> value of every value that the model knows; empty for hashed ids."""
        index = self._indexes.get(feature)
        return {} if index is None else index.items()

    def profile(self, owner: str, values: Mapping[str, Any], own_id: str | None = None) -> Profile:
        """Raw features of one user or item; a missing key is a null.

        Args:
            owner: 'user', 'item' or 'context'.
            own_id: the item's own, by which counters may count.

        Raises:
            EncodeError: a key is none of the owner's features, or a value has the wrong type.
        """
        categories, numbers, lists = self.categories[owner], self.numbers[owner], self.lists[owner]
        if unknown := sorted(values.keys() - self.names[owner].keys()):
            there = ", ".join(self.names[owner]) or "none"
            raise EncodeError(f"unknown feature {unknown[0]!r:.60}; features of the {owner} are: {there}")
        texts = {n: _named(n, category_text, values.get(n)) for n in categories if n not in self.edges}
        ids = [self._bucket(n, values.get(n)) if n in self.edges else self.ids(n, [texts[n]])[0] for n in categories]
        parts = [np.array(ids, dtype=np.int32)]
        for feature in lists:
            read = _text_of_terms if feature.table == TERM else _text_of_tags
            parts.append(self.list_ids(feature, [_named(name, read, values.get(name)) for name in feature.sources]))
        texts["item_id"] = own_id
        codes = [int(self.codes(name, [texts[name]])[0]) for name in self.counted[owner]]
        parts.append(np.array(codes, dtype=np.int32))
        found = [_named(name, _number, values.get(name)) for name in numbers]
        columns = scaled(found, [self.dense[name] for name in numbers])
        for name, value in zip(numbers, columns.tolist(), strict=True):
            if not abs(value) < _LARGEST:
                raise EncodeError(f"{name}: is too large to be taken as it is; a number below 1e30 is needed")
        return Profile(np.concatenate(parts), columns)

    def _bucket(self, name: str, value: Any) -> int:
        return bucket_id(_named(name, _number, value), self.edges[name])

    def nothing(self, owner: str) -> Profile:
        """The profile of a user or item that no table knows: padding, a number's bucket of nulls, and 0."""
        ids = np.full(self.width(owner), PADDING_ID, dtype=np.int32)
        for place, name in enumerate(self.categories[owner]):
            ids[place] = self.spec.sparse_feature(name).nothing
        return Profile(ids, np.zeros(len(self.numbers[owner]), dtype=np.float32))

    def inputs(
        self,
        *,
        scenario: int,
        time_us: int,
        user_id: str,
        query: str | None,
        user: Profile,
        context: Profile,
        events: UserEvents,
        items: tuple[Ints, Profile],
        counters: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """The inputs of request.onnx for one request.

        Args:
            scenario: position in the spec's scenarios.
            time_us: microseconds since 1970.
            user_id: as in the logs, not encoded.
            query: as it was typed; not looked at outside scenarios with queries.
            items: encoded item_id (N) and features of the candidates.
            counters: from counters.Counters; None: the model has none.
        """
        spec = self.spec
        has_query = spec.scenarios[scenario] in spec.query_scenarios
        own = {
            "user_id": self.ids("user_id", [user_id])[0],
            "query": self.ids("query", [(query or None) if has_query else None])[0],
            EVENT_HOUR: time_us // (DAY_US // _NUM_HOURS) % _NUM_HOURS + FIRST_ID,
        }
        daily = counters or {}
        numbers: dict[str, Any] = {name: values[0] for name, values in daily.items()}
        lists: dict[str, NDArray[Any]] = {}
        for owner, profile in (("user", user), ("context", context)):
            own |= dict(zip(self.categories[owner], profile.ids[: len(self.categories[owner])], strict=True))
            lists |= {name: profile.ids[None, place] for name, place in self.list_places(owner).items()}
            numbers |= dict(zip(self.numbers[owner], profile.numbers, strict=True))
        item_ids, of_items = items
        categories = self.categories["item"]
        columns = {"item_id": item_ids} | dict(zip(categories, of_items.ids[:, : len(categories)].T, strict=True))
        lists |= {name: of_items.ids[:, place] for name, place in self.list_places("item").items()}
        item_numbers = dict(daily) | dict(zip(self.numbers["item"], of_items.numbers.T, strict=True))
        sparse, dense = ([(f.name, f.owner == "item") for f in features] for features in (spec.sparse, spec.dense))
        inputs: dict[str, NDArray[Any]] = {
            "scenario": np.array([scenario], dtype=np.int64),
            "request_sparse": np.array([[own[name] for name, of_item in sparse if not of_item]], dtype=np.int64),
            "item_sparse": np.stack([columns[name] for name, of_item in sparse if of_item], axis=1).astype(np.int64),
        }
        if any(not of_item for _, of_item in dense):
            row = [numbers[name] for name, of_item in dense if not of_item]
            inputs["request_dense"] = np.array([row], dtype=np.float32)
        if any(of_item for _, of_item in dense):
            inputs["item_dense"] = np.stack([item_numbers[name] for name, of_item in dense if of_item], axis=1)
        for feature in spec.lists:
            if feature.name == QUERY_TERMS:
                lists[feature.name] = self.list_ids(feature, [query if has_query else None])[None]
            inputs[feature.column] = lists[feature.name].astype(np.int64)
        return inputs | self.histories(events, time_us)

    def histories(self, events: UserEvents, time_us: int) -> dict[str, NDArray[Any]]:
        """Input name -> (1, L), padded on the left: per scenario the newest events before `time_us` and known by it."""
        length = self.spec.history_length
        visible = (events.time < time_us) & (events.known <= time_us)
        inputs: dict[str, NDArray[Any]] = {}
        for number, names in enumerate(self.spec.histories):
            rows = np.flatnonzero(visible & (events.scenario == number))[-length:]
            parts: dict[str, NDArray[Any]] = {
                names.item_ids: events.item[rows].astype(np.int64),
                names.actions: events.action[rows].astype(np.int64),
                names.ages_s: ((time_us - events.time[rows]) / 1e6).astype(np.float32),
            }
            if names.query_ids is not None:
                parts[names.query_ids] = events.query[rows].astype(np.int64)
            for name, values in parts.items():
                inputs[name] = np.zeros((1, length), dtype=values.dtype)
                inputs[name][0, length - len(rows) :] = values
        return inputs


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise EncodeError(f"is {type(value).__name__}; a number or null is needed")
    if not abs(value) <= MAX_NUMBER:  # JSON's 1e400 is infinite here; NaN, which JSON has not, may come from a program
        raise EncodeError("is infinite, too large or NaN; a number up to 3.4e38 or null is needed")
    return float(value)


def _named(name: str, read: Any, value: Any) -> Any:
    try:
        return read(value)
    except EncodeError as error:
        raise EncodeError(f"{name}: {error}") from error


def _text_of_tags(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise EncodeError(f"is {type(value).__name__}; a list of strings or null is needed")
    return SEPARATOR.join(text for text in map(category_text, value) if text is not None)


def _text_of_terms(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return category_text(value)
    if not isinstance(value, list | tuple):
        raise EncodeError(f"is {type(value).__name__}; a string, a list of strings or null is needed")
    return SEPARATOR + (_text_of_tags(value) or "")  # terms as they are, of a list with one element too
