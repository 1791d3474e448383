"""Counters: the pass's sums and the rows' windows against plain Python, and the smoothing by hand."""

from __future__ import annotations

import collections
import datetime as dt
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.kernel.counters import _numbered, cell_name, packed_sums
from etl.kernel.packs import pair_values, unpack
from etl.kernel.rows import RowPlan, sample_rows
from etl.kernel.user_pass import PassPlan
from tests.etl_oracle import DAY, Row, Windows, World, counted, counters, unique
from tests.unit.etl_kernel.test_user_pass import SPEC, passed
from tests.unit.etl_worlds import NOON, duplicated, event_rows, rules_of, windows_of, worlds
from tests.unit.examples import depth
from usr_ray import daily_sums
from usr_ray.daily_sums import (
    ALL_ROWS,
    CounterColumns,
    CounterPlan,
    DailySums,
    counter_values,
    key_parts,
    key_parts_joined,
    log_odds,
)
from usr_ray.schema import DenseFeature, SparseFeature
from usr_ray.serving.counters import Counters, write_counters
from usr_ray.serving.encode import Encoder

pytestmark = pytest.mark.unit

EPOCH = dt.date(1970, 1, 1).toordinal()
STRETCH = 10_800
"""Makes a second three hours: worlds of twenty seconds last three days, and rows become known up to two days late."""
WHAT = ("impressions", "clicks", "orders", "ctr", "cvr")
BRANDS = {"x": "a|b", "y": "a", "z": None}
"""Item -> its category; joined with others, the texts must not be mistaken for each other."""
PAGES = ("b", "\\", None)
COLUMNS = {
    "user_id": "user_id",
    "item_id": "item_id",
    "query": "query",
    "owned:brand": "brand",
    "context:page": "page",
}
"""Column of the pass -> what the oracle calls it."""
COUNTED = (
    ("user_id",),
    ("item_id",),
    ("query",),
    ("context:page",),
    ("owned:brand",),
    ("user_id", "owned:brand"),
    ("query", "item_id"),
    ("owned:brand", "context:page", "query"),
)
Sums = dict[tuple, list[int]]
"""(feature, value, scenario, event day, day on which it was known) -> impressions, clicks, orders."""


def page_of(impression_id: str) -> str | None:
    return PAGES[int(impression_id[1:]) % 3]


def with_features(row: Row) -> Row:
    return row | {"brand": BRANDS[row["item_id"]], "page": page_of(row["id"])}


def text_of(values: list[str]) -> str:
    """What counter_cells makes of some values."""
    if len(values) == 1:
        return values[0]
    return "|".join(value.replace("\\", "\\\\").replace("|", "\\|") for value in values)


def event_table(world: World) -> pa.Table:
    rows = event_rows(world)
    pages = [page_of(key) if kind == 1 else None for key, kind in zip(*map(_list(rows), ("id", "kind")), strict=True)]
    brands = [BRANDS[item] for item in rows["item_id"].to_pylist()]
    rows = rows.append_column("context:page", pa.array(pages, pa.string()))
    return rows.append_column("owned:brand", pa.array(brands, pa.string()))


def _list(rows: pa.Table) -> Any:
    return lambda name: rows[name].to_pylist()


def stretched(world: World) -> World:
    def later(rows: list[Row]) -> list[Row]:
        return [row | {key: NOON + (row[key] - NOON) * STRETCH for key in ("time", "known")} for row in rows]

    return World(later(world.impressions), later(world.clicks), later(world.orders))


def plan_of(windows: Windows, days: tuple[int, ...], since: int | None, chunk_rows: int = 7) -> PassPlan:
    more = {} if since is None else {"since": since * DAY}
    return PassPlan(
        rules=rules_of(windows),
        num_scenarios=3,
        history_length=3,
        days=days,
        chunk_rows=chunk_rows,
        categories=("context:page",),
        counted=COUNTED,
        **more,
    )


def sums_of(parts: dict[str, list[dict[str, Any]]]) -> Sums:
    """Of all chunks together."""
    found: Sums = collections.defaultdict(lambda: [0, 0, 0])
    for row in parts["count"]:
        for sums in unpack(pa.scalar(row["table"])).to_pylist():
            place = found[row["feature"], sums["key"], sums["scenario"], sums["event_date"], sums["date"]]
            for n, what in enumerate(("impressions", "clicks", "orders")):
                place[n] += sums[what]
    return dict(found)


def wanted_sums(world: World, windows: Windows) -> Sums:
    want: Sums = collections.defaultdict(lambda: [0, 0, 0])
    for event in map(with_features, counted(world, windows)):
        places = {ALL_ROWS: [ALL_ROWS]}
        places |= {cell_name(columns): [event[COLUMNS[column]] for column in columns] for columns in COUNTED}
        for name, values in places.items():
            if None not in values:
                want[name, text_of(values), event["scenario"], event["event_day"], event["day"]][event["what"]] += 1
    return dict(want)


@st.composite
def late_worlds(draw: st.DrawFn) -> World:
    world = stretched(draw(worlds(num_scenarios=3)))
    for row in world.impressions:
        row["known"] += draw(st.sampled_from([0, 0, 1, 3])) * DAY
        row["item"] = draw(st.sampled_from([row["item"], row["item"], "z"]))
    return duplicated(draw, world)


def wide(windows: Windows) -> Windows:
    return replace(windows, **{name: getattr(windows, name) * STRETCH for name in ("click", "order", "whole", "skew")})


@pytest.mark.integration
@depth(25)
@given(
    world=late_worlds(),
    windows=windows_of().map(wide),
    chunk_rows=st.integers(1, 20),
    since=st.sampled_from([None, NOON // DAY + 1]),
)
def test_the_pass_sums_every_event_once_on_the_day_it_was_known(
    world: World, windows: Windows, chunk_rows: int, since: int | None
) -> None:
    want = {p: sums for p, sums in wanted_sums(world, windows).items() if since is None or p[3] >= since}
    plan = plan_of(windows, (), since, chunk_rows)
    assert sums_of(passed(event_table(world), plan, 5)) == want
    told = replace(plan, counted=COUNTED[1:], told=COUNTED[0])  # by users for the service alone
    assert sums_of(passed(event_table(world), told, 5)) == want


# The rows: the counters of each impression.
COUNTERS = tuple(
    (columns, per_scenario, days) for columns in COUNTED for per_scenario in (True, False) for days in (1, 2, None)
)


def column_of(columns: tuple[str, ...], per_scenario: bool, days: int | None, what: str) -> str:
    return f"{'+'.join(columns)} {per_scenario} {days} {what}"


def pairs_of(parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """chunk, feature, code and value of the values that are made for counters."""
    schema = pa.schema([("chunk", pa.string()), ("feature", pa.string()), ("table", pa.binary())])
    rows = pa.RecordBatch.from_pylist([{name: row[name] for name in schema.names} for row in parts["pairs"]], schema)
    schema = pa.schema([*list(schema)[:2], ("code", pa.int32()), ("value", pa.string())])
    return [row for batch in pair_values([rows], schema) for row in batch.to_pylist()]


def packed(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Chunk -> what `packed_sums` makes of its rows, which come in batches of three."""
    schema = pa.schema(
        [("chunk", pa.string()), ("feature", pa.string()), ("code", pa.int32()), ("sums", pa.list_(pa.int64()))]
    )
    ordered = pa.Table.from_pylist(sorted(rows, key=lambda row: row["chunk"]), schema=schema)
    found = [row for batch in packed_sums(ordered.to_batches(max_chunksize=3)) for row in batch.to_pylist()]
    assert [row["chunk"] for row in found] == sorted({row["chunk"] for row in rows}), "one row a chunk"
    return {row["chunk"]: row["sums"] for row in found}


def rows_of(
    parts: dict[str, list[dict[str, Any]]], sums: Sums, windows: Windows, since: int = 0
) -> dict[str, dict[str, float]]:
    """impression_id -> the counters of the rows of the packs, of the sums of a lake: by users, before a day alone."""
    of_value: dict[tuple, list[tuple[int, ...]]] = collections.defaultdict(list)
    for (feature, value, scenario, event_day, day), counts in sums.items():
        if "user_id" not in feature or event_day < since:
            of_value[feature.removeprefix("context:"), value].append((day, scenario, *counts))
    features = ["user_id", "item_id", "query", "page", *(c for c in map(cell_name, COUNTED) if c.startswith("cell:"))]
    lookups: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    counted: list[dict[str, Any]] = []
    for row in (*parts["value"], *pairs_of(parts)):
        feature = row["feature"].removeprefix("context:")
        place = {"feature": features.index(feature), "code": row["code"]}
        if not feature.startswith("cell:"):
            lookups[row["chunk"]].append(place | {"value": row["value"], "ids": [1], "numbers": []})
        if found := of_value[feature, row["value"]]:
            numbers = [number for sums in found for number in sums]
            counted.append({"chunk": row["chunk"], "feature": feature, "code": row["code"], "sums": numbers})
    long, number = pa.list_(pa.int64()), pa.list_(pa.float32())
    kinds = {"feature": pa.int32(), "code": pa.int32(), "value": pa.string(), "ids": long, "numbers": number}
    sums_of = packed(counted)
    packs = [
        {**row, "user_sums": row["table"], "lookups": lookups[row["chunk"]], "sums": sums_of.get(row["chunk"])}
        for row in parts["pack"]
    ]
    binaries = [(name, pa.binary()) for name in ("targets", "events", "user_sums", "sums")]
    schema = pa.schema([*binaries, ("lookups", pa.list_(pa.struct(list(kinds.items()))))])
    table = pa.Table.from_pylist([{n: p[n] for n in schema.names} for p in packs], schema=schema)
    # A scenario's daily sums may come in several parts.
    totals = tuple(number for found in of_value[ALL_ROWS, ALL_ROWS] for number in found)
    plan = RowPlan(
        rules=rules_of(windows),
        spec=SPEC,
        watermark=NOON,
        days=(),
        features=tuple(features),
        owned_categories={},
        owned_numbers={},
        counters=CounterPlan(
            columns=tuple(
                CounterColumns(
                    feature=cell_name(columns).removeprefix("context:"),
                    per_scenario=per_scenario,
                    windows=((days, tuple((column_of(columns, per_scenario, days, what), what) for what in WHAT)),),
                )
                for columns, per_scenario, days in COUNTERS
            ),
            prior=2.0,
            num_scenarios=3,
            of_scenarios=totals,
        ),
    )
    names = [column_of(*counter, what) for counter in COUNTERS for what in WHAT]
    out = pa.schema([("impression_id", pa.string()), *((name, pa.float32()) for name in names)])
    found = pa.Table.from_batches(sample_rows(table.to_batches(), plan, out), schema=out).to_pylist()
    return {row.pop("impression_id"): row for row in found}


def wanted_rows(world: World, windows: Windows, days: tuple[int, ...]) -> dict[str, dict[str, float]]:
    past = [with_features(event) for event in counted(world, windows)]
    found = {}
    for i in unique(world.impressions, ("id",)):
        if i["time"] // DAY not in days:
            continue
        values = with_features({"id": i["id"], "user_id": i["user"], "item_id": i["item"], "query": i["query"]})
        columns = found[i["id"]] = {}
        for keys, per_scenario, window in COUNTERS:
            own = {COLUMNS[key]: values[COLUMNS[key]] for key in keys}
            scenario = i["scenario"] if per_scenario else None
            of_row = counters(past, own, scenario, i["time"] // DAY, window, 2.0)
            columns |= {column_of(keys, per_scenario, window, what): of_row[what] for what in WHAT}
    return found


def assert_equal(found: dict[str, dict[str, float]], wanted: dict[str, dict[str, float]]) -> None:
    assert found.keys() == wanted.keys()
    for key, columns in wanted.items():
        assert found[key] == pytest.approx(columns, abs=1e-5), key


def before(world: World, time: int) -> World:
    return World(*([row for row in rows if row["time"] < time] for rows in _parts(world)))


def _parts(world: World) -> tuple[list[Row], ...]:
    return world.impressions, world.clicks, world.orders


@pytest.mark.integration
@depth(25)
@given(world=late_worlds(), windows=windows_of(skew=0).map(wide), day=st.integers(0, 3))
def test_one_more_day_on_the_sums_of_those_before_equals_all_logs_and_the_oracle(
    world: World, windows: Windows, day: int
) -> None:
    """Some days from the logs up to then; then the next day alone, from the logs of as far back as a build reads."""
    day += NOON // DAY
    whole = passed(event_table(world), plan_of(windows, (day,), None), 5)
    wanted = wanted_rows(world, windows, (day,))
    assert_equal(rows_of(whole, sums_of(whole), windows), wanted)
    earlier = before(world, day * DAY)
    first = sums_of(passed(event_table(earlier), plan_of(windows, (), None), 5)) if earlier.impressions else {}
    first_row = day * DAY - rules_of(windows).reach - DAY
    recent = World(*([row for row in rows if row["time"] >= first_row] for rows in _parts(world)))
    if not any(_parts(recent)):
        return
    later = passed(event_table(recent), plan_of(windows, (day,), day), 5)
    assert not first.keys() & sums_of(later).keys()
    assert first | sums_of(later) == sums_of(whole)
    assert_equal(rows_of(later, first | sums_of(later), windows, since=day), wanted)


@pytest.mark.integration
@depth(25)
@given(world=late_worlds(), windows=windows_of().map(wide), data=st.data())
def test_no_label_of_a_held_out_day_changes_a_counter_of_its_rows(
    world: World, windows: Windows, data: st.DataObject
) -> None:
    """Clicks and orders from a day on belong to other impressions, come at other times, or are gone."""
    day = NOON // DAY + data.draw(st.integers(0, 2))
    other = before(world, day * DAY)
    held_out = [i for i in world.impressions if i["time"] >= day * DAY]
    other.impressions += held_out
    for n, shown in enumerate(data.draw(st.lists(st.sampled_from(held_out), max_size=9)) if held_out else []):
        time = max(shown["time"] + windows.click * (n % 3) // 2, day * DAY)
        other.click(f"x{n}", shown["user"], shown["item"], shown["scenario"], time, shown["id"])
        other.order(f"y{n}", shown["user"], shown["item"], time)
    windows = replace(windows, skew=0)  # a corrected clock would let a click of the day before belong to this one
    days = (day,)
    found = [passed(event_table(w), plan_of(windows, days, None), 5) for w in (world, other)]
    assert rows_of(found[0], sums_of(found[0]), windows) == rows_of(found[1], sums_of(found[1]), windows)


def lake_table(sums: Sums) -> pa.Table:
    """`<lake>/counters` as the build writes it: of items with their brands too."""
    of_items = {place: counts for place, counts in sums.items() if place[0] == "item_id" and BRANDS[place[1]]}
    sums = sums | {
        ("item_id:brand", text_of([item, BRANDS[item]]), *rest): n for (_, item, *rest), n in of_items.items()
    }
    rows = [
        {
            "name": feature.removeprefix("cell:").removeprefix("context:"),
            "key": value,
            "date": dt.date.fromordinal(EPOCH + known),
            "event_date": dt.date.fromordinal(EPOCH + day),
            "scenario": SPEC.scenarios[scenario],
            **dict(zip(WHAT, counts, strict=False)),
        }
        for (feature, value, scenario, day, known), counts in sums.items()
    ]
    return pa.Table.from_pylist(rows)


@pytest.mark.integration
@depth(10)
@given(world=late_worlds(), windows=windows_of().map(wide), day=st.integers(0, 3))
def test_the_service_has_the_counters_of_each_row_bit_for_bit(world: World, windows: Windows, day: int) -> None:
    day += NOON // DAY
    parts = passed(event_table(world), plan_of(windows, (day,), None), 5)
    found = rows_of(parts, sums_of(parts), windows)
    if not found:
        return
    named = {f"c{n}": counter for n, counter in enumerate(COUNTERS)}
    meaning = {
        name: {
            "keys": [COLUMNS[column] for column in columns],
            "windows": ["all" if days is None else f"{days}d"],
            "events": WHAT[:3],
            "per_scenario": per_scenario,
        }
        for name, (columns, per_scenario, days) in named.items()
    }
    columns = {
        f"counter_{name}_{meaning[name]['windows'][0]}_{what}": column_of(*counter, what)
        for name, counter in named.items()
        for what in WHAT
    }
    categories = [
        SparseFeature(name=name, column=f"{name}_index", num_embeddings=9, owner=owner)
        for name, owner in (("item_id", "item"), ("query", "query"), ("brand", "item"), ("page", "context"))
    ]
    spec = replace(
        SPEC,
        query_scenarios=SPEC.scenarios,  # the drawn worlds have queries everywhere
        sparse=(*SPEC.sparse, *categories),
        dense=tuple(DenseFeature(name=name, column=name, owner="item") for name in columns),
    )
    built_with = json.dumps({"counters": {"prior": 2.0, **meaning}})
    with tempfile.TemporaryDirectory() as name:
        lake = write_counters(Path(name), spec, built_with, lake_table(sums_of(parts)), as_of_us=day * DAY)
        service = Counters(Path(name))
        encoder = Encoder(spec, {}, None, service.indexes)
        for shown in unique(world.impressions, ("id",)):
            if shown["time"] // DAY != day:
                continue
            nothing = encoder.nothing("user")
            profiles = {
                "user": replace(nothing, sums=lake.sums(shown["user"])),
                "context": encoder.profile("context", {"page": page_of(shown["id"])}),
                "item": encoder.profile("item", {"brand": BRANDS[shown["item"]]}, shown["item"]),
            }
            values = service.values(encoder, shown["scenario"], shown["time"], shown["query"], profiles)
            assert {columns[c]: v.tolist() for c, v in values.items()} == {
                c: [v] for c, v in found[shown["id"]].items()
            }
        of_items = {i["item"]: BRANDS[i["item"]] for i in world.impressions}
        known = [item for item in sorted(of_items) if of_items[item]]
        codes = lake.codes("brand", pa.array(known, pa.string()), encoder, np.ones(len(known)))
        assert codes.tolist() == encoder.codes("brand", [of_items[item] for item in known]).tolist()


def test_a_click_counts_for_its_impression_s_query_on_the_day_it_was_known() -> None:
    """Shown and clicked on day 10, one click known on day 12; an order of day 11."""
    world = World()
    noon = 10 * DAY + DAY // 2
    world.impression("i", "u", "x", 1, noon, query="tea", known=noon)
    world.click("a", "u", "x", 1, noon + 1, "i", known=noon + 1)
    world.click("b", "u", "x", 1, noon + 2, "i", known=12 * DAY)
    world.order("o", "u", "x", 11 * DAY + 1, known=11 * DAY + 1)
    rules = rules_of(Windows(click=DAY, order=DAY, whole=DAY))
    plan = PassPlan(rules=rules, num_scenarios=2, history_length=3, days=(10,), counted=(("query",),))
    found = sums_of(passed(event_rows(world), plan, 5))
    of_query = {place: counts for place, counts in found.items() if place[0] == "query"}
    assert of_query == {
        ("query", "tea", 1, 10, 10): [1, 1, 0],
        ("query", "tea", 1, 10, 12): [0, 1, 0],
        ("query", "tea", 1, 11, 11): [0, 0, 1],
    }
    assert {place[2:]: counts for place, counts in found.items() if place[0] == ALL_ROWS} == {
        place[2:]: counts for place, counts in of_query.items()
    }


def test_a_vocabulary_counts_nothing_of_what_only_counters_know() -> None:
    """The category of the item has its values by the items table, a pair of columns has none."""
    world = World().impression("i0", "u", "x", 0, NOON, query="tea")
    parts = passed(event_table(world), plan_of(Windows(click=1, order=1, whole=1), (NOON // DAY,), None), 5)
    days = {row["feature"]: (row["value"], row["days"]) for row in parts["value"]}
    assert days["query"] == ("tea", [NOON // DAY])
    assert not any(name.startswith("cell:") for name in days)
    pairs = {row["feature"]: row["value"] for row in pairs_of(parts)}
    assert pairs == {"cell:brand": "a|b", "cell:query:item_id": "tea|x", "cell:brand:page:query": "a\\|b|b|tea"}
    later = passed(event_table(world), plan_of(Windows(click=1, order=1, whole=1), (NOON // DAY,), NOON // DAY), 5)
    assert {row["feature"]: row["value"] for row in pairs_of(later)} == pairs | {"cell:user_id:brand": "u|a\\|b"}


def test_log_odds_are_those_of_the_smoothed_rate_less_those_of_all() -> None:
    """3 of 10 where all have 200 of 1,000: (3 + 20 * 0.2) / (10 + 20) = 7 / 30, odds 7 / 23 beside 1 / 4."""
    hits, trials = np.array([3, 0, 0, 5, 2]), np.array([10, 0, 7, 2, 2])
    found = log_odds(hits, trials, np.full(5, 200), np.full(5, 1000), 20.0)
    wanted = [math.log(7 / 23 * 4), 0.0, math.log(4 / 23 * 4), math.log(9 / 16 * 4), math.log(6 / 16 * 4)]
    assert found.tolist() == pytest.approx(wanted)
    for all_hits, all_trials in ((0, 100), (100, 100), (0, 0)):
        assert log_odds(hits, trials, np.full(5, all_hits), np.full(5, all_trials), 20.0).tolist() == [0.0] * 5


def test_a_giant_item_and_days_far_apart_add_up() -> None:
    codes = np.array([1, 1, 3])
    sums = DailySums.of(codes, np.array([[10, 0, 2**40, 7, 1], [3000, 1, 5, 5, 5], [10, 0, 1, 0, 0]]), 2)
    rows, days = np.array([1, 1, 3, 2, 0, -1]), np.array([11, 3001, 11, 3001, 3001, 3001])
    found = sums.before(rows, days, (None, 1))
    assert found.shape == (2, 2, 6, 3)
    assert found[0, 0, :, 0].tolist() == [2**40, 2**40, 1, 0, 0, 0]
    assert found[0, 1, :, 0].tolist() == [2**40, 0, 1, 0, 0, 0]
    assert found[1, 1].tolist() == found[1, 0].tolist() == [[0] * 3, [5, 5, 5], *[[0] * 3] * 4]
    assert not sums.before(rows, np.array([10]), (None, 1, 366)).any()
    assert sums.before(rows, np.array([11]), (1,))[0, 0, :, 1].tolist() == [7, 7, 0, 0, 0, 0]


@given(st.lists(st.tuples(*[st.text("a|\\01", max_size=4)] * 3), max_size=5))
def test_the_text_of_several_values_tells_them_again(values: list[tuple[str, ...]]) -> None:
    parts = [pa.array(column, pa.string()) for column in zip(*values, strict=True)] or [pa.array([], pa.string())] * 3
    for number in (1, 2, 3):
        joined = key_parts_joined(parts[:number])
        assert joined.to_pylist() == [text_of(list(row[:number])) for row in values]
        assert [part.to_pylist() for part in key_parts(joined, number)] == [p.to_pylist() for p in parts[:number]]


def test_clicks_whose_orders_no_log_records_are_no_trials_of_an_order() -> None:
    """Both items have 100 clicks and 50 orders in search (all: 200 and 60), item 1 another 900 clicks in the feed.

    Rate 0.3: (50 + 20 * 0.3) / (50 + 20 * 0.7) = 56 / 64, beside 3 / 7.
    """
    windows = ((None, (("clicks", "clicks"), ("ctr", "ctr"), ("cvr", "cvr"))),)
    own = CounterColumns(feature="item", per_scenario=True, windows=windows)
    over_all = CounterColumns(
        feature="item", per_scenario=False, windows=((None, tuple((f"all_{c}", what) for c, what in windows[0][1])),)
    )
    plan = CounterPlan(
        columns=(own, over_all),
        prior=20.0,
        num_scenarios=2,
        of_scenarios=(0, 0, 1000, 200, 60, 0, 1, 2000, 1000, 0),
        cvr_without=(1,),
    )
    daily = np.array([[0, 0, 500, 100, 50], [0, 0, 500, 100, 50], [0, 1, 900, 900, 0]])
    sums = {"item": DailySums.of(np.array([0, 1, 1]), daily, 2)}
    rows = {"item": np.array([0, 1, 1])}
    found = counter_values(plan, plan.totals(), sums, rows, np.array([0, 0, 1]), np.array([1, 1, 1]))
    odds = math.log(56 / 64 * 7 / 3)
    assert found["all_cvr"].tolist() == pytest.approx([odds] * 3, rel=1e-6)
    assert found["cvr"].tolist() == pytest.approx([odds, odds, 0.0], rel=1e-6)
    assert found["all_clicks"].tolist() == pytest.approx([math.log(101), *[math.log(1001)] * 2], rel=1e-6)
    # 1,000 of 1,400 impressions were clicked, of all 1,200 of 3,000: (1000 + 8) / (400 + 12), beside 2 / 3.
    assert found["all_ctr"][1] == pytest.approx(math.log(1008 / 412 * 3 / 2), rel=1e-6)


def test_columns_of_one_counter_are_its_windows() -> None:
    """Item 1: 4 impressions and 2 clicks on day 10, 1 and 1 on day 12; all: 40 and 10, then 10 and 5. Row of day 13."""
    daily = [[10, 0, 4, 2, 0], [12, 0, 1, 1, 0]]
    windows = ((1, (("near", "ctr"),)), (None, (("shown", "impressions"), ("far", "ctr"))))
    plan = CounterPlan(
        columns=(CounterColumns(feature="item_id", per_scenario=True, windows=windows),),
        prior=20.0,
        num_scenarios=1,
        of_scenarios=(10, 0, 40, 10, 0, 12, 0, 10, 5, 0),
    )
    sums = {"item_id": DailySums.of(np.array([1, 1]), np.array(daily), 1)}
    found = counter_values(plan, plan.totals(), sums, {"item_id": np.array([1])}, np.array([0]), np.array([13]))
    # Near: (1 + 20 / 2) / 21 beside 5 / 10. Far: (3 + 20 * .3) / 25 = 9 / 25 beside 15 / 50.
    wanted = {"near": math.log(11 / 10), "shown": math.log(6), "far": math.log(9 / 16) - math.log(3 / 7)}
    assert {name: values.item() for name, values in found.items()} == pytest.approx(wanted, abs=1e-6)


def test_an_index_finds_what_a_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes without entries, -1 and beyond the last among them, and days before and after all sums."""
    rng = np.random.default_rng(3)
    columns = [rng.integers(0, high, 200) for high in (6, 3, 4, 3, 2)]
    sums = DailySums.of(rng.integers(0, 20, 200), np.column_stack([columns[0] + 100, columns[1] % 2, *columns[2:]]), 2)
    codes, days = rng.integers(-1, 25, 500), rng.integers(95, 110, 500)
    found = sums.indexed()
    assert found.index is not None
    assert sums.index is None
    windows = (None, 1, 3)
    assert (found.before(codes, days, windows) == sums.before(codes, days, windows)).all()
    assert found.before(codes, days, windows).any()
    monkeypatch.setattr(daily_sums, "_MAX_INDEX", 10)
    assert sums.indexed().index is None, "it would be too large"


def test_numbers_are_placed_alike_whether_they_are_marked_or_sorted() -> None:
    values = np.array([7, 3, 3, 0, 9, 7])
    for size in (10, 1000):
        distinct, places = _numbered(values, size)
        assert distinct.tolist() == [0, 3, 7, 9]
        assert places.tolist() == [2, 1, 1, 0, 3, 2]
    assert [len(part) for part in _numbered(np.empty(0, np.int64), 0)] == [0, 0]
