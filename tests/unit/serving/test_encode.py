"""Encoding, stores and the registry by hand; against a real build in tests/spark/test_build_samples.py."""

from __future__ import annotations

import datetime as dt
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from etl.kernel.features import bucket_ids
from tests.unit.random_batches import make_lists
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.data.events import COLUMNS
from usr_ray.data.manifest import build_manifest
from usr_ray.schema import FIRST_ID, UNKNOWN_ID, DenseFeature, SparseFeature
from usr_ray.serving.encode import (
    EncodeError,
    Encoder,
    Profile,
    UserEvents,
    ValueIndex,
    bucket_id,
    category_text,
    scaled,
    without_nulls,
)
from usr_ray.serving.ranker import MAX_CANDIDATES, Ranker, RequestError
from usr_ray.serving.replay import _Replayer, _unscaled
from usr_ray.serving.stores import ItemTable, StoreError, UserStore, instant_after, write_items, write_users

pytestmark = pytest.mark.unit

DAY = dt.timedelta(days=1)
FIRST = 1_767_225_600_000_000
"""Microseconds of 2026-01-01T00:00:00Z."""


def index_of(path, *values):
    ValueIndex.write(path, list(values), np.arange(2, 2 + len(values)))
    return ValueIndex(path)


@pytest.fixture
def encoder(tmp_path):
    features = {"user_id": ["u1", "u2"], "item_id": ["v1", "v2"], "query": ["größe", "日本"], "brand": ["a", "b"]}
    indexes = {name: index_of(tmp_path / f"{name}.arrow", *values) for name, values in features.items()}
    return Encoder(samples_spec(history_length=3), indexes, None)


def test_an_index_finds_its_values_and_no_others(tmp_path):
    index = index_of(tmp_path / "i.arrow", *(f"v{n}" for n in range(1000)), "", "größe")
    assert index.find(["v7", "größe", "", "v1000", "V7"]).tolist() == [9, 1003, 1002, -1, -1]
    assert index.find([]).tolist() == []
    assert index_of(tmp_path / "none.arrow").find(["x"]).tolist() == [-1]
    with pytest.raises(EncodeError, match=r"^d: 'x' and 'x' have one hash; rename one"):
        index_of(tmp_path / "d.arrow", "x", "x")


def test_ids_are_padding_unknown_or_known(encoder):
    assert encoder.ids("query", ["größe", None, "tea", "日本"]).tolist() == [2, 0, 1, 3]
    assert encoder.ids("event_hour", ["x"]).tolist() == [1]  # a feature without values
    # Spark: SELECT xxhash64('a') = -8582455328737087284; pmod(.., 98) + 2
    assert Encoder(encoder.spec, {}, 100).ids("query", ["a", None]).tolist() == [-8582455328737087284 % 98 + 2, 0]


def test_tags_and_terms_of_a_request(tmp_path):
    """Made as make_lists has them: two tags an item, three terms a query, four an item."""
    spec = samples_spec(history_length=3, lists=make_lists(9))
    values = {"tags": ["red", "new"], "term": ["tea", "茶", "xl"]}
    indexes = {name: index_of(tmp_path / f"{name}.arrow", *found) for name, found in values.items()}
    encoder = Encoder(spec, indexes, None)
    item = encoder.profile("item", {"tags": ["new", " red ", "red", "old"], "item_terms": "XL 茶杯 xl"})
    assert item.ids.tolist() == [0, 3, 2, 4, 3, 1, 1]  # brand; tags; xl, 茶, 茶杯, 杯
    assert encoder.profile("item", {"item_terms": [4, True]}).ids.tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert encoder.profile("item", {"item_terms": ["xl"]}).ids.tolist() == [0, 0, 0, 4, 0, 0, 0]
    assert encoder.profile("item", {"item_terms": ["XL"]}).ids.tolist() == [0, 0, 0, 1, 0, 0, 0]  # terms as they are
    assert encoder.profile("item", {"item_terms": ["", None]}).ids.tolist() == [0, 0, 0, 0, 0, 0, 0]
    context = encoder.profile("context", {"intents": None, "moods": []})
    assert context.ids.tolist() == [0, 0, 0]
    inputs = encoder.inputs(
        scenario=0,
        time_us=FIRST,
        user_id="u",
        query="Tea, tea XL",
        user=encoder.nothing("user"),
        context=context,
        events=UserEvents.none(),
        items=(np.array([5, 6]), Profile(np.stack([item.ids, item.ids * 0]), np.zeros((2, 1), np.float32))),
    )
    assert inputs["query_terms_indices"].tolist() == [[2, 4, 0]]
    assert inputs["tags_indices"].tolist() == [[3, 2], [0, 0]]
    assert inputs["item_terms_indices"].tolist() == [[4, 3, 1, 1], [0, 0, 0, 0]]
    assert inputs["hobbies_indices"].tolist() == [[0, 0, 0]]
    assert inputs["item_sparse"].tolist() == [[5, 0], [6, 0]]
    assert {value.dtype for name, value in inputs.items() if name.endswith("_indices")} == {np.dtype(np.int64)}
    with pytest.raises(EncodeError, match="tags: is str; a list of strings or null is needed"):
        encoder.profile("item", {"tags": "red"})
    with pytest.raises(EncodeError, match="item_terms: is float; a string, a list of strings or null is needed"):
        encoder.profile("item", {"item_terms": 4.5})


def test_numbers_are_scaled_as_the_etl_does():
    log = DenseFeature(name="n", column="n_scaled", owner="item")
    plain = replace(log, scale="none")
    expected = [np.log1p(9.0), -np.log1p(3.5), 0, 0, 0, 0]
    values = [9, -3.5, 0.0, None, np.nan, np.inf]
    assert scaled(values, [log] * 6).tolist() == np.array(expected, np.float32).tolist()
    assert scaled(values, [plain] * 6).tolist() == [9, -3.5, 0, 0, 0, 0]
    assert scaled([9, 9], [plain, log]).tolist() == [9, float(np.float32(np.log1p(9)))]
    assert scaled([], []).tolist() == []


@pytest.mark.parametrize(("scale", "is_good"), [("log1p", True), ("none", False), ("standard", False)])
def test_a_number_that_no_float32_holds_is_refused_where_it_is_taken_as_it_is(encoder, scale, is_good):
    dense = tuple(replace(feature, scale=scale) for feature in encoder.spec.dense)
    encoder = Encoder(replace(encoder.spec, dense=dense), {}, None)
    if is_good:
        assert encoder.profile("item", {"price": -1e38}).numbers.tolist() == [np.float32(-np.log1p(1e38))]
        return
    assert np.isfinite(encoder.profile("item", {"price": -1e29}).numbers).all()
    for price in (3.4028234e38, -3.3e38, 1e37):  # the largest float32, too, stands for "no value" in logs
        with pytest.raises(EncodeError, match=r"price: is too large to be taken as it is; a number below 1e30 is need"):
            encoder.profile("item", {"price": price})


@pytest.mark.parametrize("in_buckets", [False, True])
def test_a_number_that_the_build_has_as_none_is_said_to_be_too_large(encoder, in_buckets):
    """Beyond the largest of 32 bits the build takes a number for null: as a number it would be another row's."""
    if in_buckets:
        price = SparseFeature(name="price", column="price_index", num_embeddings=4, owner="item", edges=(1.5,))
        encoder = Encoder(replace(encoder.spec, sparse=(*encoder.spec.sparse, price), dense=()), {}, None)
    largest = float(np.finfo(np.float32).max)
    encoder.profile("item", {"price": -largest})
    for price in (json.loads("1e400"), -(10**400), float("nan"), 3.5e38, -1e39, 10**39, 1.7e308):
        with pytest.raises(EncodeError, match=r"^price: is infinite, too large or NaN; a number up to 3.4e38 or null"):
            encoder.profile("item", {"price": price})
    with pytest.raises(EncodeError, match=r"^price: is str; a number or null is needed"):
        encoder.profile("item", {"price": "1e400"})


def test_numbers_in_buckets_are_categories_of_a_request(encoder):
    priced = SparseFeature(name="cost", column="cost_index", num_embeddings=5, owner="item", edges=(1.5, 4.0))
    encoder = Encoder(replace(encoder.spec, sparse=(*encoder.spec.sparse, priced)), {}, None)
    assert [encoder.profile("item", {"cost": v}).ids.tolist() for v in (None, 1, 1.5, 3, 4.0)] == [
        [0, 1],
        [0, 2],
        [0, 3],
        [0, 3],
        [0, 4],
    ]
    assert encoder.profile("item", {}).ids.tolist() == encoder.nothing("item").ids.tolist() == [0, 1]
    with pytest.raises(EncodeError, match="cost: is str; a number or null is needed"):
        encoder.profile("item", {"cost": "4"})


@pytest.mark.parametrize("scale", ["log1p", "none", "standard"])
def test_a_replay_finds_a_value_of_a_scaled_number_again(scale):
    feature = DenseFeature(name="n", column="n_scaled", owner="context", scale=scale, mean=1234.5, deviation=0.37)
    columns = scaled([0.0, 1200.0, 1234.5, -7.25, 1e6], [feature] * 5)
    again = [_unscaled(float(column), feature) for column in columns]
    assert scaled(again, [feature] * 5).tolist() == columns.tolist()


def test_a_replay_finds_the_largest_number_again():
    feature = DenseFeature(name="n", column="n_scaled", owner="context", scale="log1p")
    largest = float(np.finfo(np.float32).max)
    for value in (largest, -largest):
        (column,) = scaled([value], [feature]).tolist()
        assert abs(_unscaled(column, feature)) <= largest
        assert scaled([_unscaled(column, feature)], [feature]).tolist() == [column]


@pytest.mark.parametrize("edges", [(), (0.0,), (3.0, 7.0), (-5.5, 0.1, 0.3), (1e-45, 2e38)])
def test_a_replay_finds_a_value_in_each_bucket_of_a_number(edges):
    edges = tuple(np.array(edges, np.float32).tolist())  # as the build fits them
    replayer = SimpleNamespace(_encoder=SimpleNamespace(edges={"n": edges}))
    for bucket in range(UNKNOWN_ID, FIRST_ID + len(edges) + 1):
        value = _Replayer._in_bucket(replayer, "n", bucket)
        assert bucket_id(value, edges) == bucket
        assert bucket_ids(np.array([np.nan if value is None else value]), edges).tolist() == [bucket]


def test_categories_are_texts():
    assert [category_text(v) for v in ("a", 7, True, "", None)] == ["a", "7", "true", None, None]
    for value in (1.5, [], "\ud800"):
        with pytest.raises(EncodeError):
            category_text(value)


def events_of(*rows):
    """(seconds, seconds when known, scenario, action, item, query) of each event."""
    time, known, scenario, action, item, query = np.array(rows).T
    at = FIRST + 1_000_000 * np.array([time, known])
    small = [part.astype(np.uint8) for part in (scenario, action)]
    keys = np.arange(len(time), dtype=np.uint64)
    return UserEvents(at[0], at[1], *small, *(part.astype(np.int32) for part in (item, query)), keys)


def test_a_history_is_strictly_before_and_known_by_and_newest_last(encoder):
    events = events_of(
        (1, 1, 0, 1, 2, 2),
        (2, 9, 0, 1, 3, 2),  # known only later
        (3, 3, 0, 2, 4, 3),
        (3, 3, 1, 1, 5, 0),
        (4, 4, 0, 1, 6, 0),
        (5, 5, 0, 1, 7, 1),
        (8, 8, 0, 1, 8, 1),  # at the request's time: not before it
    )
    found = encoder.histories(events, FIRST + 8_000_000)
    assert found["search_history_item_ids"].tolist() == [[4, 6, 7]]
    assert found["search_history_actions"].tolist() == [[2, 1, 1]]
    assert found["search_history_ages_s"].tolist() == [[5, 4, 3]]
    assert found["search_history_query_ids"].tolist() == [[3, 0, 1]]
    assert found["recommendation_history_item_ids"].tolist() == [[0, 0, 5]]
    assert "recommendation_history_query_ids" not in found
    late = encoder.histories(events, FIRST + 9_000_000)
    assert late["search_history_item_ids"].tolist() == [[6, 7, 8]]
    assert encoder.histories(UserEvents.none(), FIRST)["search_history_ages_s"].tolist() == [[0, 0, 0]]


@pytest.fixture
def stores(encoder, tmp_path):
    write_samples(tmp_path / "lake", encoder.spec, num_rows=80, num_days=2)
    manifest = build_manifest(tmp_path / "lake", dates=(FIRST_DATE, FIRST_DATE + DAY))
    rows = [("u1", 0, 1, f"c{n}", "v1", "größe", n, n) for n in range(6)]
    rows.append(("u1", 0, 1, "late", "v2", None, 2, 99))
    rows += [("u2", 1, 2, "o1", "v9", None, 3, 3), ("gone", 1, 2, "o2", "v9", None, 3, 3)]
    events = pa.table(
        dict(zip(COLUMNS, map(list, zip(*sorted(rows, key=lambda row: (row[0], row[6])), strict=True)), strict=True))
    )
    for place, name in ((6, "event_time"), (7, "known_time")):
        micros = pa.array([FIRST + 1_000_000 * s for s in events[name].to_pylist()])
        events = events.set_column(place, name, micros.cast(pa.timestamp("us", tz="UTC")))
    write_items(tmp_path, manifest, encoder)
    as_of = instant_after(events, FIRST + DAY // dt.timedelta(microseconds=1))
    write_users(tmp_path, manifest, events, encoder, as_of_us=as_of)
    assert instant_after(events, FIRST + 4_000_000) == FIRST + 4_000_000  # one of them lies ahead
    for name, moment in (("ahead", FIRST + 4_000_000), ("all", None)):
        (tmp_path / name).mkdir()
        write_users(tmp_path / name, manifest, events, encoder, as_of_us=moment)
    return tmp_path, as_of


def test_users_keep_what_a_later_request_can_see(encoder, stores):
    folder, as_of = stores
    assert as_of == FIRST + 5_000_001
    users = UserStore(folder, encoder)
    # As of second 4, while events lie ahead: the three before it, the late one, and those ahead.
    ahead, whole = (UserStore(folder / name, encoder).get("u1")[0] for name in ("ahead", "all"))
    assert ((ahead.time - FIRST) // 1_000_000).tolist() == [1, 2, 2, 3, 4, 5]
    for second in (4, 4.5, 5, 5.5, 99, 100):
        found, right = (encoder.histories(events, FIRST + int(second * 1_000_000)) for events in (ahead, whole))
        assert all((found[name] == right[name]).all() for name in right)
    events, profile = users.get("u1")
    # The three newest known ones, and the one that is not known yet.
    assert ((events.time - FIRST) // 1_000_000).tolist() == [2, 3, 4, 5]
    assert events.item.tolist() == [3, 2, 2, 2]
    assert events.query.tolist() == [0, 2, 2, 2]
    assert (profile.ids.tolist(), len(profile.numbers)) == ([], 1)
    assert users.get("u2")[0].action.tolist() == [2]
    assert users.get("u2")[0].item.tolist() == [1]
    assert users.get("nobody") is None
    events, profile = users.get("gone")  # in no impression any more: a later row has its history
    assert (events.item.tolist(), profile.ids.tolist(), profile.numbers.tolist()) == ([1], [], [0.0])
    again = UserStore(folder, encoder)  # LMDB itself refuses to open one twice in a process
    del users
    assert again.get("u2")[0].action.tolist() == [2]


def test_a_user_who_cannot_be_read_in_time_has_no_history(encoder, stores):
    folder, as_of = stores
    gate, users = threading.Event(), UserStore(folder, encoder)

    class Hanging:
        def get(self, user_id):
            assert gate.wait(30)
            return users.get(user_id)

    version = {"version": "v", "rules": {"click_window": 0, "order_window": 0}}
    ranker = Ranker(version, None, encoder, (ItemTable(folder), Hanging()), exact_from_us=as_of)
    ranker.read_within(0.01)
    request = ranker.checked({"scenario": "search", "user_id": "u1", "candidates": ["v1"]})
    for _ in range(6):  # more than there are readers
        inputs, unknown, is_degraded = ranker.encoded(request)
        assert (is_degraded, unknown["user"]) == (True, False)
        assert not inputs["search_history_item_ids"].any()
    gate.set()
    ranker.read_within(30)
    inputs, unknown, is_degraded = ranker.encoded(request)
    assert (is_degraded, unknown["user"]) == (False, False)
    assert inputs["search_history_item_ids"].any()


def test_items_are_as_their_newest_impression_has_them(encoder, stores):
    folder, _ = stores
    rows = DeltaTable(folder / "lake" / "samples").to_pyarrow_table().to_pylist()
    rows.sort(key=lambda row: row["event_time"])
    newest = {row["item_id"]: row for row in rows}
    table = ItemTable(folder)
    names = sorted(newest)
    ids, profile, is_new = table.find([*names, "never seen"], encoder)
    assert len(table) == len(names) > 20
    assert is_new.tolist() == [False] * len(names) + [True]
    assert profile.numbers[:-1, 0].tolist() == [newest[name]["price_scaled"] for name in names]
    assert profile.ids[:-1, 0].tolist() == [newest[name]["brand_index"] for name in names]
    assert (profile.ids[-1].tolist(), profile.numbers[-1].tolist(), ids[-1]) == ([0], [0.0], 1)
    assert ids[names.index("v2")] == 3


def test_stores_that_are_not_there_are_refused_in_one_line(encoder, tmp_path):
    with pytest.raises(StoreError, match="its items cannot be read"):
        ItemTable(tmp_path)
    with pytest.raises(StoreError, match="users: cannot be opened"):
        UserStore(tmp_path, encoder)


GOOD = {"scenario": "search", "user_id": "u1", "candidates": ["v1"], "time": "2026-01-02T00:00:00Z"}
BAD = [
    ([], r"^request: is list; an object is needed"),
    ({"user": 1}, r"^unknown field 'user'; a request has: request_id, scenario"),
    ({"scenario": "cart"}, r"^scenario: 'cart' is not known; there are: search, recommendation"),
    ({"scenario": ["search"]}, r"^scenario: \['search'\] is not known"),
    ({"user_id": None}, r"^user_id: is None; a string"),
    ({"user_id": True}, r"^user_id: is True"),
    ({"user_id": "\ud800"}, r"^user_id: is no Unicode text"),
    ({"scenario": "recommendation", "query": "x"}, r"^query: recommendation has no queries; leave it out"),
    ({"candidates": []}, r"^candidates: 0 of them; a list of 1 to 2000"),
    ({"candidates": ["v"] * (MAX_CANDIDATES + 1)}, r"^candidates: 2001 of them"),
    ({"candidates": "v1"}, r"^candidates: str; a list"),
    ({"candidates": [{"id": "v1", "price": 3}]}, r"^candidates\[0\]: unknown field 'price'; an item has: id, features"),
    ({"candidates": [{"id": "v1", "features": {"prise": 3}}]}, r"^candidates\[0\].features: unknown feature 'prise'"),
    ({"candidates": [{"id": "v1", "features": {"price": "3"}}]}, r"^candidates\[0\].features: price: is str; a number"),
    ({"candidates": [{"id": "v1", "features": {"brand": 1.5}}]}, r"brand: is float; a string"),
    ({"candidates": ["v1", ""]}, r"^candidates\[1\]: is ''"),
    ({"context": {"x": 1}}, r"^context: unknown feature 'x'; features of the context are: none"),
    ({"context": 3}, r"^context: is int; an object of features"),
    (
        {"time": "2025-12-31T23:59:59Z"},
        r"^time: 2025-.* is before 2026-01-01.*, up to which .* go; leave it out, or",
    ),
    ({"time": "noon"}, r"^time: 'noon' cannot be read; ISO 8601"),
    ({"time": "2026-01-02T00:00:00"}, r"^time: .* cannot be read"),
    ({"time": 3}, r"^time: 3 cannot be read"),
    ({"time": "0001-01-01T00:00:00+14:00"}, r"^time: '0001-01-01T00:00:00\+14:00' cannot be read; ISO 8601"),
    ({"time": "9999-12-31T23:59:59-14:00"}, r"^time: '9999-12-31T23:59:59-14:00' cannot be read; ISO 8601"),
    ({"time": "2025-12-31T00:00:00Z"}, r"^time: 2025-12-31T00:00:00\+00:00 is before 2026-01-01"),
    ({"task": "cvr"}, r"^task: 'cvr' is none; 'ctr', 'ctcvr'"),
    ({"task": {"ctr": "1"}}, r"^task: "),
    ({"task": {"ctr": 1e301}}, r"^task: "),
    ({"task": {"ctr": float("nan")}}, r"^task: "),
    ({"k": 0}, r"^k: is 0; an integer from 1 on"),
]


@pytest.fixture
def ranker(encoder):
    return Ranker(
        {"version": "v", "rules": {"click_window": 0, "order_window": 0}},
        None,
        encoder,
        (None, None),
        exact_from_us=FIRST,
    )


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change)[:40] for change, _ in BAD])
def test_bad_requests_are_refused_in_one_line(ranker, change, message):
    with pytest.raises(RequestError, match=message):
        ranker.checked(GOOD | change if isinstance(change, dict) else change)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("NULL", None),
        ("null", "null"),
        ("-1", None),
        (-1, None),
        (-1.0, None),
        (1, 1),
        (2.5, None),
        (None, None),
        (True, True),
        (["a", " NULL ", "-1", "b "], ["a", "b "]),
        ([3, -1, True], [3, True]),  # of a list of numbers the build leaves -1 out too
        ({"x": 1}, {"x": 1}),
        (10**400, 10**400),
    ],
)
def test_what_stands_for_no_value_is_null_as_the_build_has_it(value, found):
    assert without_nulls(value, ["NULL", "-1", "2.50"]) == found
    assert without_nulls(value, ()) is value


def test_null_values_of_the_logs_are_nulls_of_a_request(encoder):
    """Query and context by the scenario's impressions, features of items by the items' log."""
    device = SparseFeature(name="device", column="device_index", num_embeddings=50, owner="context")
    encoder = Encoder(replace(encoder.spec, sparse=(*encoder.spec.sparse, device)), {}, 50)
    version = {"version": "v", "rules": {"click_window": 0, "order_window": 0}}
    nulls = {"search_impressions": ["-"], "items": ["n/a", "-1"]}
    with_nulls = Ranker(version | {"null_values": nulls}, None, encoder, (None, None), exact_from_us=FIRST)
    without = Ranker(version, None, encoder, (None, None), exact_from_us=FIRST)

    def asked(ranker, query, device, brand, price, scenario="search"):
        given = {"id": "new", "features": {"brand": brand, "price": price}}
        found = ranker.checked(
            GOOD | {"scenario": scenario, "query": query, "context": {"device": device}, "candidates": [given]}
        )
        profile = found.given[0]
        return found.query, found.context.ids.tolist(), profile.ids.tolist(), profile.numbers.tolist()

    nothing = asked(without, None, None, None, None)
    assert nothing == (None, [0], [0], [0.0])
    assert asked(with_nulls, "-", "-", "n/a", -1) == nothing
    assert asked(without, "-", "-", "n/a", -1)[0] == "-"
    whole = ("red -", "n/a", "-", 4.0)
    assert asked(with_nulls, *whole) == asked(without, *whole)
    other = (None, "-", "-", 1.5, "recommendation")  # another scenario's log says nothing of "-"
    assert asked(with_nulls, *other) == asked(without, *other)


def test_a_clock_that_is_behind_is_said_where_no_time_was_sent(ranker):
    ranker._exact_from_us = 4_000_000_000_000_000  # 2096
    for asked in ({k: v for k, v in GOOD.items() if k != "time"}, GOOD | {"time": None}):
        with pytest.raises(
            RequestError, match=r"^time: it is 20.* by the service's clock, .* before 2096-.*; set the c"
        ):
            ranker.checked(asked)


@pytest.mark.parametrize("weight", [1.0, 1e-60, 1e250])
def test_candidates_are_ordered_by_weights_of_any_size(encoder, weight):
    names = [f"v{n}" for n in range(4)]
    ctr, ctcvr = ([0.1, 0.4, 0.3, 0.2], [0.1, 0.05, 0.2, 0.1])
    program = SimpleNamespace(predict=lambda inputs: {"p_ctr": np.float32(ctr), "p_ctcvr": np.float32(ctcvr)})
    version = {"version": "v", "model_id": "m", "rules": {"click_window": 0, "order_window": 0}}
    ranker = Ranker(version, program, encoder, (None, None), exact_from_us=FIRST)
    ranker.encoded = lambda request: ({}, {}, False)
    answer = ranker.rank(**GOOD | {"candidates": names, "task": {"ctr": weight, "ctcvr": 2 * weight}})
    # 0.3, 0.5, 0.7, 0.4
    assert [item["id"] for item in answer["items"]] == ["v2", "v1", "v3", "v0"]


def test_where_nobody_logs_orders_their_probabilities_are_not_known(tmp_path):
    spec = replace(samples_spec(), no_order_scenarios=("recommendation",))
    probs = {"p_ctr": np.float32([0.25, 0.5]), "p_ctcvr": np.float32([0.5, 0.5]), "p_ctcvr_global": np.float32([1, 1])}
    version = {"version": "v", "model_id": "m", "rules": {"click_window": 0, "order_window": 0}}
    program = SimpleNamespace(predict=lambda inputs: probs)
    ranker = Ranker(version, program, Encoder(spec, {}, 50), (None, None), exact_from_us=FIRST)
    ranker.encoded = lambda request: ({}, {}, False)
    asked = GOOD | {"candidates": ["v0", "v1"], "scenario": "recommendation"}
    items = ranker.rank(**asked)["items"]
    assert items == [
        {"id": "v1", "p_ctr": 0.5, "p_ctcvr": None, "p_ctcvr_global": None},
        {"id": "v0", "p_ctr": 0.25, "p_ctcvr": None, "p_ctcvr_global": None},
    ]
    assert ranker.rank(**asked | {"task": {"ctr": 1, "ctcvr": 0}})["items"] == items
    for task in ("ctcvr", {"ctr": 1, "ctcvr": -0.1}):
        with pytest.raises(
            RequestError, match=r"^task: nobody logs the orders of recommendation \(labels.no_order_sce"
        ):
            ranker.rank(**asked | {"task": task})
    ranker.check_golden([{"request": asked, "items": [{"id": "v0", "p_ctcvr": 0.5}, {"id": "v1", "p_ctcvr": 0.5}]}])
    assert ranker.rank(**asked | {"scenario": "search", "task": "ctcvr"})["items"][0]["p_ctcvr"] == 0.5


def test_a_good_request(ranker):
    request = ranker.checked(GOOD | {"query": 7, "candidates": [3, {"id": "v1", "features": {"price": -3.5}}], "k": 1})
    assert (request.scenario, request.query, request.candidates, request.k) == (0, "7", ["3", "v1"], 1)
    assert ranker.checked(GOOD | {"query": ""}).query is None
    assert request.time_us == FIRST + 86_400_000_000
    assert request.weights == (1.0, 0.0)
    assert list(request.given) == [1]
    assert request.given[1].numbers.tolist() == [np.float32(-np.log1p(3.5))]
    assert ranker.checked(GOOD | {"task": {"ctr": 1, "ctcvr": 2.5}}).weights == (1.0, 2.5)
