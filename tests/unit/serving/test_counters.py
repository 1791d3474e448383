"""Counters of requests against the slow oracle, on drawn events; against a build in tests/spark/test_counters.py."""

from __future__ import annotations

import collections
import datetime as dt
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from tests.etl_oracle import counters
from tests.unit.samples_table import samples_spec
from usr_ray.config.counters import CounterConfig, counter_columns
from usr_ray.schema import DenseFeature, SparseFeature, index_column
from usr_ray.serving.counters import Counters, planned_counters, write_counters
from usr_ray.serving.encode import EncodeError, Encoder, Profile, UserEvents, ValueIndex
from usr_ray.serving.stores import UserStore, put_users

pytestmark = pytest.mark.integration

DAY_US = 86_400_000_000
BRANDS = {"v|1": "a|b", "v2": "a", "v3": None, "v4": "\\"}
CITIES = {"u1": "rome", "u2": "b|", "u3": None}
PAGES = ("a", "b|", None)
QUERIES = ("tea", "a|b", "größe", None)
EVERY = ("impressions", "clicks", "orders", "ctr", "cvr")
WANTED = {
    "user": (("user_id",), False, ("1d", "all")),
    "item": (("item_id",), True, ("2d", "1d")),
    "user_brand": (("user_id", "brand"), True, ("all", "3d")),
    "query_item": (("query", "item_id"), False, ("all",)),
    "mixed": (("brand", "page", "query"), True, ("2d",)),
    "triple": (("city", "user_id", "page"), False, ("3d",)),
    "town": (("city",), True, ("all",)),
}
"""Name -> keys, per_scenario, windows."""
PRIOR = 2.0


def spec_of():
    spec = samples_spec()
    more = [
        SparseFeature(name=name, column=index_column(name), num_embeddings=9, owner=owner)
        for name, owner in (("city", "user"), ("page", "context"))
    ]
    dense = [
        DenseFeature(
            name=column,
            column=column,
            owner="item" if {"item_id", "brand"} & set(keys) else "context" if "page" in keys else "user",
        )
        for name, (keys, _, windows) in WANTED.items()
        for column in counter_columns(name, CounterConfig(keys=keys, windows=windows))
    ]
    return replace(spec, sparse=(*spec.sparse, *more), dense=(*spec.dense, *dense))


def built_with():
    meaning = {
        name: {"keys": keys, "windows": windows, "events": EVERY[:3], "per_scenario": per_scenario}
        for name, (keys, per_scenario, windows) in WANTED.items()
    }
    return json.dumps({"counters": {"prior": PRIOR, **meaning}})


def drawn_events(rng, number):
    """Of days 0 to 5; a click or order in three of eight."""
    events = []
    for _ in range(number):
        user, item = rng.choice(list(CITIES)), rng.choice(list(BRANDS))
        scenario = int(rng.integers(2))
        events.append(
            {
                "what": int(rng.choice([0, 0, 0, 0, 0, 1, 1, 2])),
                "day": int(rng.integers(6)),
                "scenario": scenario,
                "user_id": str(user),
                "item_id": str(item),
                "query": QUERIES[rng.integers(4)] if scenario == 0 else None,
                "brand": BRANDS[item],
                "city": CITIES[user],
                "page": PAGES[rng.integers(3)],
            }
        )
    return events


def escaped(values):
    if len(values) == 1:
        return values[0]
    return "|".join(value.replace("\\", "\\\\").replace("|", "\\|") for value in values)


def table_of(events):
    names = {keys for keys, _, _ in WANTED.values()} | {("item_id", "brand"), ("user_id", "city")}
    sums = collections.defaultdict(lambda: [0, 0, 0])
    for event in events:
        sums["*", "*", event["day"], event["scenario"]][event["what"]] += 1
        for keys in names:
            values = [event[key] for key in keys]
            if None not in values:
                sums[":".join(keys), escaped(values), event["day"], event["scenario"]][event["what"]] += 1
    rows = [
        (*key[:2], dt.date.fromordinal(719163 + key[2]), samples_spec().scenarios[key[3]], *n)
        for key, n in sums.items()
    ]
    columns = ("name", "key", "date", "scenario", *EVERY[:3])
    table = pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
    return table.append_column("event_date", table["date"])


def opened(folder, events, as_of_day):
    as_of = None if as_of_day is None else as_of_day * DAY_US
    counted = write_counters(folder, spec_of(), built_with(), table_of(events), as_of_us=as_of)
    store = Counters(folder)
    encoder = Encoder(spec_of(), {}, None, store.indexes)
    names = [*CITIES, "gone"]
    has_city = np.array([city is not None for city in CITIES.values()])
    cities = counted.codes("city", pa.array(names[:3]), encoder, has_city)
    profiles = Profile(np.zeros((4, encoder.width("user")), np.int32), np.zeros((4, 1), np.float32))
    profiles.ids[:3, encoder.counted_places("user")["city"]] = cities
    put_users(folder, names, [UserEvents.none()] * 4, profiles, counted)
    return store, encoder, UserStore(folder, encoder), counted


@pytest.mark.parametrize("as_of_day", [None, 4])
def test_counters_of_a_request_are_those_of_its_row(tmp_path, as_of_day):
    rng = np.random.default_rng(3)
    events = drawn_events(rng, 400)
    store, encoder, users, counted = opened(tmp_path, events, as_of_day)
    assert set(counted.users) == set(CITIES)
    items = [*BRANDS, "never"]
    of_items = [encoder.profile("item", {"brand": BRANDS.get(item)}, item) for item in items]
    candidates = Profile(np.stack([p.ids for p in of_items]), np.stack([p.numbers for p in of_items]))
    seen = set()
    for n in range(60):
        day, scenario = int(rng.integers(as_of_day or 0, 9)), n % 2
        user, query, page = [*CITIES, "gone"][n % 4], QUERIES[rng.integers(4)], PAGES[rng.integers(3)]
        profile = users.get(user)[1] if n % 5 else encoder.nothing("user")
        profiles = {"user": profile, "context": encoder.profile("context", {"page": page}), "item": candidates}
        found = store.values(encoder, scenario, day * DAY_US + n, query, profiles)
        assert {name: values.dtype for name, values in found.items()} == dict.fromkeys(found, np.float32)
        assert set(found) == {f.column for f in spec_of().dense if f.column.startswith("counter_")}
        for place, item in enumerate(items):
            known = {"user_id": user, "city": CITIES.get(user)} if n % 5 else {"user_id": None, "city": None}
            known |= {"query": query if scenario == 0 else None, "page": page}
            known |= {"item_id": item, "brand": BRANDS.get(item)}
            for name, (keys, per_scenario, windows) in WANTED.items():
                own = {key: known[key] for key in keys}
                for window in windows:
                    days = CounterConfig.days(window)
                    wanted = counters(events, own, scenario if per_scenario else None, day, days, PRIOR)
                    for what in EVERY:
                        values = found[f"counter_{name}_{window}_{what}"]
                        assert len(values) == (5 if {"item_id", "brand"} & set(keys) else 1)
                        assert values[place % len(values)] == pytest.approx(wanted[what], abs=1e-6), (n, item, name)
                        seen.add(round(wanted[what], 4))
    assert len(seen) > 200, "the world is not trivial"


def test_a_published_store_folds_what_no_window_of_days_reaches(tmp_path):
    for name in ("whole", "folded"):
        (tmp_path / name).mkdir()
    events = drawn_events(np.random.default_rng(1), 4000)
    opened(tmp_path / "whole", events, None)
    opened(tmp_path / "folded", events, 6)
    whole, folded = (np.load(tmp_path / name / "counters" / "places.npy") for name in ("whole", "folded"))
    # Days 0 to 2 are one: longest windows look back three days from day 6.
    assert len(folded) < 0.75 * len(whole)
    until = np.load(tmp_path / "folded" / "counters" / "until.npy")
    assert (until.dtype, until[-1].tolist()) == (np.uint32, np.load(tmp_path / "whole/counters/until.npy")[-1].tolist())


def test_counts_that_fill_more_than_four_bytes_are_kept_whole(tmp_path):
    events = drawn_events(np.random.default_rng(1), 30)
    table = table_of(events)
    giant = pa.array(
        [
            2**40 if key == "v2" else n
            for key, n in zip(*(table[c].to_pylist() for c in ("key", "impressions")), strict=True)
        ]
    )
    table = table.set_column(table.schema.get_field_index("impressions"), "impressions", giant)
    write_counters(tmp_path, spec_of(), built_with(), table, as_of_us=None)
    assert np.load(tmp_path / "counters" / "until.npy").dtype == np.int64


def fitted(folder, store, **brands):
    """An encoder whose vocabulary has these brands."""
    path = folder / "brands.arrow"
    ValueIndex.write(path, list(brands), np.array(list(brands.values())))
    return Encoder(spec_of(), {"brand": ValueIndex(path)}, None, store.indexes)


def brands_of(store, codes):
    return [store.indexes["brand"].items().get(code) for code in codes.tolist()]


def test_an_item_counts_under_the_brand_that_its_samples_have_whatever_the_catalogue_says_since(tmp_path):
    """Restating renews what the sums tell: v2, of brand a in its rows, is of c now; nothing is told of v4 any more."""
    events = drawn_events(np.random.default_rng(1), 200)
    for event in events:
        event["brand"] = {"v2": "c", "v4": None, "v3": "a"}.get(event["item_id"], event["brand"])
    _, _, _, counted = opened(tmp_path, events, None)
    store = Counters(tmp_path)
    encoder = fitted(tmp_path, store, a=2, c=3, d=4)
    items = pa.array(["v2", "v4", "v3", "v2"])
    found = counted.codes("brand", items, encoder, np.array([2, 2, 2, 0]))
    assert brands_of(store, found) == ["a", "a", "a", None]
    assert counted.silent["brand"] == 0
    # d, which has an id, was never counted: that is not c's number.
    assert brands_of(store, counted.codes("brand", items, encoder, np.array([4, 3, 4, 1]))) == [None, "c", None, "c"]


def test_a_rare_brand_counts_as_the_sums_tell_and_is_nothing_where_they_are_silent(tmp_path):
    _, _, _, counted = opened(tmp_path, drawn_events(np.random.default_rng(1), 200), None)
    store = Counters(tmp_path)
    encoder = fitted(tmp_path, store, a=2)
    items = pa.array(["v4", "gone", "v3", "v4"])
    # 1 is unknown; 99 came after the model; 0 is no brand.
    found = counted.codes("brand", items, encoder, np.array([1, 1, 0, 99]))
    assert brands_of(store, found) == ["\\", None, None, "\\"]
    assert counted.silent["brand"] == 1  # not v3, which has no brand


def test_a_hashed_brand_is_told_by_the_sums_unless_they_tell_one_of_another_hash(tmp_path):
    _, _, _, counted = opened(tmp_path, drawn_events(np.random.default_rng(1), 200), None)
    store = Counters(tmp_path)
    encoder = Encoder(spec_of(), {}, 9, store.indexes)
    own, other = encoder.ids("brand", ["a", "\\"]).tolist()
    assert own != other
    items = pa.array(["v2", "v4", "gone"])
    assert brands_of(store, counted.codes("brand", items, encoder, np.array([own, own, own]))) == ["a", "a", "a"]


def test_a_user_has_the_value_of_the_newest_date(tmp_path):
    events = drawn_events(np.random.default_rng(1), 200)
    for event in events:
        if event["user_id"] == "u1":
            event["city"] = "oslo" if event["day"] == 5 else "rome"
    assert {event["city"] for event in events if event["user_id"] == "u1"} == {"oslo", "rome"}
    for shuffled in (events, events[::-1], sorted(events, key=lambda e: -e["day"])):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        counted = write_counters(folder, spec_of(), built_with(), table_of(shuffled), as_of_us=None)
        indexes = Counters(folder).indexes
        code = counted.codes("city", pa.array(["u1"]), Encoder(spec_of(), {}, None, indexes), np.ones(1))[0]
        assert indexes["city"].items()[code] == "oslo"


def test_an_item_that_was_never_counted_has_no_counts(tmp_path, monkeypatch):
    wanted = {"query_item": WANTED["query_item"]}
    monkeypatch.setitem(globals(), "WANTED", wanted)
    table = table_of([e for e in drawn_events(np.random.default_rng(1), 200) if e["item_id"] != "v2" or not e["query"]])
    counted = write_counters(tmp_path, spec_of(), built_with(), table, as_of_us=None)
    encoder = Encoder(spec_of(), {}, None, Counters(tmp_path).indexes)
    codes = counted.codes("item_id", pa.array(["v2", "v3"]), encoder)
    assert codes[0] == 0
    assert codes[1] > 0


def test_columns_that_are_no_counters_of_the_lake_are_refused():
    with pytest.raises(EncodeError, match=r"^features: counter_user_1d_impressions is no counter of the lake that is"):
        planned_counters(spec_of(), "")
    assert planned_counters(samples_spec(), built_with())[1] == ()


def test_counters_that_are_not_there_are_refused_in_one_line(tmp_path):
    (tmp_path / "counters").mkdir()
    with pytest.raises(EncodeError, match=r"counters: cannot be read \(.*\); publish again"):
        Counters(tmp_path)
