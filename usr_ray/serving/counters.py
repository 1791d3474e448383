"""Counters of a request: the daily sums of `<lake>/counters` beside a version's model, and its columns at request time.

    counters/plan.json       columns, sums of whole scenarios, what each counter counts by
    counters/N.arrow         values of the N-th counted column -> code from 1 on (encode.ValueIndex)
    counters/N-J.npy         pairs of codes that the N-th feature counts by, ascending; a pair's place is its own code
    counters/places.npy, until.npy     `DailySums` of all features that do not count by the user

What counts by the user is in the user's own value (stores.py), so that a request reads its user once. Codes of items'
and users' categories are among their features (`Profile.ids`). Sums are as fresh as the publication.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from usr_ray.config import DAY_US
from usr_ray.config.counters import CounterConfig
from usr_ray.daily_sums import ALL_ROWS, SUMS, CounterColumns, CounterPlan, DailySums, counter_values, key_parts
from usr_ray.data.manifest import open_table, table_address
from usr_ray.files import one_line
from usr_ray.schema import COUNTERS, PADDING_ID, UNKNOWN_ID, FeatureSpec, scaled_column
from usr_ray.serving.encode import EncodeError, Encoder, Ints, Profile, ValueIndex

FOLDER = "counters"
_USER = "user_id"
_OWNERS = {"user": "user_id", "item": "item_id"}
_MAX_SMALL = 1 << 32


@dataclass(frozen=True, slots=True)
class _Feature:
    """What some counters count by."""

    name: str
    columns: tuple[str, ...]
    """Its keys without the user."""
    sizes: tuple[int, ...]
    """Codes of each column, 0 among them."""
    offset: int
    """Where its codes begin among those of all features that count by the user, or of all that do not."""
    of_user: bool


def planned_counters(spec: FeatureSpec, built_with: str) -> tuple[float, tuple[CounterColumns, ...]]:
    """The prior, and the counters that a model needs; a counter's feature is its keys, joined by ':'.

    Args:
        built_with: `Manifest.built_with` of the samples.

    Raises:
        EncodeError: the model has a column that is no counter of the lake.
    """
    wanted = [f.column for f in spec.dense if f.column != scaled_column(f.name)]
    meaning: dict[str, Any] = json.loads(built_with or "{}").get("counters", {})
    prior = float(meaning.pop("prior", 0.0))
    every = [
        CounterColumns.of(name, CounterConfig(**_tuples(raw)), ":".join(raw["keys"])) for name, raw in meaning.items()
    ]
    there = {column for counter in every for _, columns in counter.windows for column, _ in columns}
    strays = [column for column in wanted if column not in there]
    if strays:
        raise EncodeError(f"features: {strays[0]} is no counter of the lake that is published; name the run's own lake")
    return prior, tuple(c for c in every if any(name in wanted for _, names in c.windows for name, _ in names))


def _tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}


# ---- from the lake


class LakeCounters:
    """What `write_counters` found for the users and items of a version."""

    def __init__(
        self,
        codes: Mapping[str, tuple[pa.Array, Ints]],
        values: Mapping[str, pa.Array],
        users: tuple[pa.Array, Ints, Ints, Ints],
        until: str | None,
    ) -> None:
        self.until = until
        """Newest day of the sums."""
        self.silent: collections.Counter[str] = collections.Counter()
        """Category -> users or items that `codes` found no value of, though they have one."""
        self._codes, self._values = codes, values
        names, self._edges, self._places, self._counts = users
        self._user = {name: n for n, name in enumerate(names.to_pylist())}
        self.num_user_sums = len(self._places)

    @property
    def users(self) -> Iterable[str]:
        """Who was counted."""
        return self._user

    def codes(self, name: str, owners: pa.Array, encoder: Encoder, encoded: Ints | None = None) -> Ints:
        """Code of a category, or of the id itself, of each user or item (ids), 0 where it has none or was not counted.

        The value is that of `encoded`, as the model sees it: the sums have the catalogue's of their last restatement,
        in which it may be another one or gone. Their word counts for ids that the model does not know apart.

        Args:
            encoded: ids of the category in the samples; None: `name` is the owner's own id.
        """
        ids, codes = self._codes[name]
        place = pc.index_in(owners, value_set=ids).fill_null(-1).to_numpy()
        told = np.append(codes, 0)[place]
        if encoded is None:  # one may never have been counted: by query and item, say, shown without queries only
            return told
        of_code = np.append(PADDING_ID, encoder.ids(name, self._values[name].to_pylist()))
        distinct, first, times = np.unique(of_code, return_index=True, return_counts=True)
        at = np.minimum(np.searchsorted(distinct, encoded), len(distinct) - 1)
        own = np.where((distinct[at] == encoded) & (times[at] == 1), first[at], 0)  # hashed ids may be of several
        is_known = (encoded > UNKNOWN_ID) & (encoded < encoder.spec.sparse_feature(name).num_embeddings)
        self.silent[name] += int(((place < 0) & ~is_known & (encoded != PADDING_ID)).sum())
        return np.select([encoded == PADDING_ID, is_known & (of_code[told] != encoded)], [0, own], told)

    def sums(self, user_id: str) -> tuple[Ints, NDArray[np.uint32]]:
        """Places and sums (`DailySums`) of a user."""
        n = self._user.get(user_id)
        some = slice(0, 0) if n is None else slice(self._edges[n], self._edges[n + 1])
        return self._places[some], _cumulated(self._counts[some]).astype(np.uint32)


def lake_counters(
    folder: Path, lake: Path | str, spec: FeatureSpec, built_with: str, *, as_of_us: int | None
) -> tuple[LakeCounters | None, int | None]:
    """`write_counters` of a lake's newest sums, and their version; None where the model has no counters.

    Raises:
        UserError: the model has counters, and the lake no sums or others.
    """
    if not planned_counters(spec, built_with)[1]:
        return None, None
    table = open_table(table_address(lake, COUNTERS), None)
    found = write_counters(folder, spec, built_with, table.to_pyarrow_table(), as_of_us=as_of_us)
    return found, table.version()


def write_counters(
    folder: Path, spec: FeatureSpec, built_with: str, table: pa.Table, *, as_of_us: int | None
) -> LakeCounters:
    """Write the counters of a version.

    Args:
        built_with: `Manifest.built_with` of the samples.
        table: `<lake>/counters`.
        as_of_us: no request is for an earlier time, so what is too old for a window of days is folded into one day.
            None: all days are kept, for `replay`.

    Raises:
        EncodeError: see `planned_counters`; two values have one hash.
    """
    prior, columns = planned_counters(spec, built_with)
    windows = [days for counter in columns for days, _ in counter.windows]
    seen = table if as_of_us is None else _folded(table, as_of_us // DAY_US, windows)
    parts = {name: _of_name(seen, name) for name in sorted({counter.feature for counter in columns})}
    values = _values(parts)
    home = folder / FOLDER
    home.mkdir()
    for n, texts in enumerate(values.values()):
        ValueIndex.write(home / f"{n}.arrow", texts.to_pylist(), np.arange(1, len(texts) + 1))
    days = _days(seen)
    first = int(days.min()) if len(days) else 0
    width = int(days.max(initial=first)) - first + 2  # as DailySums has it
    features, (places, counts), of_users = _placed(home, parts, values, spec.scenarios, (first, width))
    places, counts = _added(places, counts)
    np.save(home / "places.npy", places)
    np.save(home / "until.npy", _smallest(_cumulated(counts), places // (width * len(spec.scenarios))))
    totals_N5 = _sums_N5(seen.filter(pc.equal(seen["name"], ALL_ROWS)), spec.scenarios)
    plan = {
        "prior": prior,
        "columns": [asdict(counter) for counter in columns],
        "of_scenarios": totals_N5.reshape(-1).tolist(),
        "cvr_without": [spec.scenarios.index(s) for s in json.loads(built_with).get("cvr_without", ())],
        "features": [asdict(feature) for feature in features],
        "counted": list(values),  # columns with a code
        "num_scenarios": len(spec.scenarios),
        "first": first,
        "width": width,
    }
    (home / "plan.json").write_text(json.dumps(plan) + "\n", encoding="utf-8")
    return LakeCounters(_owned(table, spec, values), values, _by_user(*of_users), _newest(table))


def _placed(
    home: Path,
    parts: Mapping[str, tuple[pa.Table, list[pa.Array]]],
    values: Mapping[str, pa.Array],
    scenarios: Sequence[str],
    span: tuple[int, int],
) -> tuple[tuple[_Feature, ...], tuple[Ints, Ints], tuple[pa.Array, Ints, Ints]]:
    """What counters count by; places and counts of all that do not count by the user; users, places and counts."""
    features = []
    sizes = {True: 0, False: 0}
    users = [pa.array([], pa.large_string())]
    found = {of_user: ([np.empty(0, np.int64)], [np.empty((0, 3), np.int64)]) for of_user in sizes}
    for n, (name, (rows, texts)) in enumerate(parts.items()):
        keys = name.split(":")
        kept = tuple(key for key in keys if key != _USER)
        widths = tuple(len(values[key]) + 1 for key in kept)
        coded = [_codes(texts[keys.index(key)], values[key]) for key in kept]
        code, size = _combined(home, n, coded, widths, len(rows))
        of_user = len(kept) < len(keys)
        features.append(_Feature(name, kept, widths, sizes[of_user], of_user))
        sums_N5 = _sums_N5(rows, scenarios)
        cell = (code + sizes[of_user]) * len(scenarios) + sums_N5[:, 1]
        found[of_user][0].append(cell * span[1] + sums_N5[:, 0] - span[0])
        found[of_user][1].append(sums_N5[:, 2:])
        users += [texts[keys.index(_USER)]] if of_user else []
        sizes[of_user] += size
    of_users, whole = ((np.concatenate(at), np.concatenate(counts)) for at, counts in (found[True], found[False]))
    return tuple(features), whole, (pa.concat_arrays(users), *of_users)


def _newest(table: pa.Table) -> str | None:
    newest = pc.max(table["date"]).as_py()
    return None if newest is None else str(newest)


def _of_name(table: pa.Table, name: str) -> tuple[pa.Table, list[pa.Array]]:
    """Sums of one name, and the values of each of its keys."""
    rows = table.filter(pc.equal(table["name"], name))
    return rows, key_parts(rows["key"].cast(pa.large_string()).combine_chunks(), name.count(":") + 1)


def _values(parts: Mapping[str, tuple[pa.Table, list[pa.Array]]]) -> dict[str, pa.Array]:
    """Column -> its distinct values, without the user's."""
    found: dict[str, list[pa.Array]] = {}
    for name, (_, texts) in parts.items():
        for key, values in zip(name.split(":"), texts, strict=True):
            if key != _USER:
                found.setdefault(key, []).append(pc.unique(values))
    return {key: pc.unique(pa.concat_arrays(arrays)) for key, arrays in sorted(found.items())}


def _codes(texts: pa.Array, values: pa.Array) -> Ints:
    found: Ints = pc.index_in(texts, value_set=values).to_numpy(zero_copy_only=False).astype(np.int64)
    return found + 1


def _combined(home: Path, n: int, coded: list[Ints], sizes: Sequence[int], num_rows: int) -> tuple[Ints, int]:
    """One code from 0 on for the codes of several columns, and how many there are; the pairs are written."""
    if not coded:
        return np.zeros(num_rows, np.int64), 1
    code, size = coded[0], sizes[0]
    for j, (more, width) in enumerate(zip(coded[1:], sizes[1:], strict=True)):
        pairs, code = np.unique(code * width + more, return_inverse=True)
        np.save(home / f"{n}-{j}.npy", pairs)
        code, size = code.astype(np.int64), len(pairs)
    return code, size


def _days(table: pa.Table) -> Ints:
    found: Ints = table["date"].cast(pa.int32()).to_numpy().astype(np.int64)
    return found


def _folded(table: pa.Table, first_day: int, windows: Sequence[int | None]) -> pa.Table:
    """What rows from a day on may see; what no window of days reaches counts for "all" alone, as one day."""
    reach = first_day - max([0, *(days for days in windows if days is not None)])
    days = _days(table)
    if None not in windows:
        return table.filter(pa.array(days >= reach))
    dates = pa.array(np.maximum(days, reach - 1).astype(np.int32)).cast(pa.date32())
    return table.set_column(table.schema.get_field_index("date"), "date", dates)


def _sums_N5(rows: pa.Table, scenarios: Sequence[str]) -> Ints:
    scenario = pc.index_in(rows["scenario"], value_set=pa.array(scenarios, rows.schema.field("scenario").type))
    numbers = [rows[name].to_numpy() for name in SUMS[2:]]
    return np.column_stack([_days(rows), scenario.to_numpy().astype(np.int64), *numbers]).astype(np.int64)


def _added(places: Ints, counts_N3: Ints) -> tuple[Ints, Ints]:
    """Each place once, ascending, and the sums of its rows."""
    order = np.argsort(places, kind="stable")
    places = places[order]
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    sums = np.add.reduceat(counts_N3[order], starts, axis=0) if len(starts) else counts_N3
    return places[starts], sums


def _cumulated(counts_N3: Ints) -> Ints:
    return np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(counts_N3, axis=0)])


def _smallest(until: Ints, codes: Ints) -> NDArray[Any]:
    """The sums in four bytes, which may wrap, where those of every code fit."""
    starts = np.flatnonzero(np.diff(codes, prepend=-1, append=-1))
    return until.astype(np.uint32) if (np.diff(until[starts], axis=0) < _MAX_SMALL).all() else until


def _owned(table: pa.Table, spec: FeatureSpec, values: Mapping[str, pa.Array]) -> dict[str, tuple[pa.Array, Ints]]:
    """Column -> ids of users or items, and the code of the value that each had on its newest date.

    An item's own id is one too.
    """
    found = {}
    for name, known in values.items():
        feature = spec.sparse_feature(name)
        if name in _OWNERS.values():
            found[name] = known, np.arange(1, len(known) + 1)
        elif feature.owner in _OWNERS:
            rows, parts = _of_name(table, f"{_OWNERS[feature.owner]}:{name}")
            by_date = pc.sort_indices(rows["event_date"])
            ids, texts = (part.take(by_date) for part in parts)
            codes = pc.index_in(ids, value_set=(owners := pc.unique(ids))).to_numpy(zero_copy_only=False)
            last = np.zeros(len(owners), np.int64)
            last[codes] = np.arange(len(codes))  # of several, numpy keeps the last
            of_text = pc.index_in(texts.take(pa.array(last)), value_set=known).fill_null(-1)
            found[name] = owners, of_text.to_numpy(zero_copy_only=False).astype(np.int64) + 1
    return found


def _by_user(names: pa.Array, places: Ints, counts_N3: Ints) -> tuple[pa.Array, Ints, Ints, Ints]:
    """Users, where each one's entries begin and end, their places, and their counts."""
    users = pc.unique(names)
    user = pc.index_in(names, value_set=users).to_numpy(zero_copy_only=False).astype(np.int64)
    distinct, at = np.unique(places, return_inverse=True)
    width = max(len(distinct), 1)
    both, sums = _added(user * width + at, counts_N3)
    edges = np.searchsorted(both, np.arange(len(users) + 1) * width)
    return users, edges, distinct[both % width], sums


# ---- at request time


class Counters:
    """The counters of a version, memory-mapped.

    Raises:
        EncodeError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        home = folder / FOLDER
        try:
            raw = json.loads((home / "plan.json").read_text(encoding="utf-8"))
            self._features = [_Feature(**_tuples(feature)) for feature in raw["features"]]
            self._pairs = [
                [np.load(home / f"{n}-{j}.npy", mmap_mode="r") for j in range(len(feature.sizes) - 1)]
                for n, feature in enumerate(self._features)
            ]
            self.indexes = {name: ValueIndex(home / f"{n}.arrow") for n, name in enumerate(raw["counted"])}
            places, until = (np.load(home / f"{name}.npy", mmap_mode="r") for name in ("places", "until"))
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise EncodeError(f"{home}: cannot be read ({one_line(error)}); publish again") from error
        self.num_scenarios = int(raw["num_scenarios"])
        self._first, self._width = raw["first"], raw["width"]
        self.plan = CounterPlan(
            columns=tuple(_columns(counter) for counter in raw["columns"]),
            prior=raw["prior"],
            num_scenarios=self.num_scenarios,
            of_scenarios=tuple(raw["of_scenarios"]),
            cvr_without=tuple(raw.get("cvr_without", ())),  # earlier versions have none
        )
        self._totals = self.plan.totals()
        self._sums = self._daily(places, until)

    def _daily(self, places: Ints, until: NDArray[Any]) -> DailySums:
        return DailySums(np.asarray(places), np.asarray(until), self._first, self._width, self.num_scenarios)

    def columns_by(self, keys: Sequence[str]) -> list[str]:
        """Columns of the counters that count by one of some keys."""
        by = {feature.name for feature in self._features if set(keys) & set(feature.columns)}
        return [c for one in self.plan.columns if one.feature in by for _, columns in one.windows for c, _ in columns]

    def values(
        self,
        encoder: Encoder,
        scenario: int,
        time_us: int,
        query: str | None,
        profiles: Mapping[str, Profile],
    ) -> dict[str, NDArray[np.float32]]:
        """Column -> (N) where it counts by something of the items, else (1).

        Args:
            scenario: position in the spec's scenarios.
            query: as it was typed; not looked at outside scenarios with queries.
            profiles: of 'user', 'context' and 'item', the last of N candidates.
        """
        has_query = encoder.spec.scenarios[scenario] in encoder.spec.query_scenarios
        codes = {}
        if "query" in self.indexes:
            codes["query"] = encoder.codes("query", [(query or None) if has_query else None])
        for owner, profile in profiles.items():
            for name, place in encoder.counted_places(owner).items():
                codes[name] = np.atleast_1d(profile.ids[..., place]).astype(np.int64)
        own = profiles["user"].sums
        of_user = None if own is None else self._daily(*own)
        nothing = DailySums.of(np.empty(0, np.int64), np.empty((0, len(SUMS)), np.int64), self.num_scenarios)
        found: dict[str, Ints] = {}
        sums: dict[str, DailySums] = {}
        for feature, pairs in zip(self._features, self._pairs, strict=True):
            sums[feature.name] = (of_user or nothing) if feature.of_user else self._sums
            found[feature.name] = _code(feature, pairs, codes)
        return counter_values(
            self.plan, self._totals, sums, found, np.array([scenario]), np.array([time_us // DAY_US], dtype=np.int64)
        )


def _code(feature: _Feature, pairs: Sequence[Ints], codes: Mapping[str, Ints]) -> Ints:
    """Code of a feature among the sums; -1 where a value is null or was never counted."""
    if not feature.columns:
        return np.array([feature.offset])
    code = codes[feature.columns[0]]
    is_there = code > 0
    for column, size, known in zip(feature.columns[1:], feature.sizes[1:], pairs, strict=True):
        both = code * size + codes[column]
        code = np.searchsorted(known, both)
        is_there = is_there & (codes[column] > 0) & (code < len(known))
        is_there = is_there & (known[np.where(is_there, code, 0)] == both) if len(known) else is_there & False
    return np.where(is_there, code + feature.offset, -1)


def _columns(raw: Mapping[str, Any]) -> CounterColumns:
    windows = tuple((days, tuple((column, what) for column, what in columns)) for days, columns in raw["windows"])
    return CounterColumns(feature=raw["feature"], per_scenario=raw["per_scenario"], windows=windows)
