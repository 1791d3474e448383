"""The one pass and its packs: chunks split no user, their size changes nothing, every row is accounted for."""

from __future__ import annotations

import collections
import datetime as dt
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.kernel.chunks import whole_users
from etl.kernel.rows import RowPlan, list_type, sample_rows
from etl.kernel.user_pass import OVER_LIMIT, PassPlan, first_pass
from tests.etl_oracle import Expected, Windows, World, expected, unique
from tests.unit.etl_worlds import NOON, SECOND, duplicated, event_rows, number_of, rules_of, windows_of, worlds
from tests.unit.examples import depth
from usr_ray.config import DAY_US
from usr_ray.schema import FeatureSpec, SparseFeature, index_column

pytestmark = pytest.mark.unit

SCENARIOS = ("search", "feed", "related")
SPEC = FeatureSpec(
    scenarios=SCENARIOS,
    query_scenarios=("search",),
    history_length=3,
    label_delay_us=0,
    dense=(),
    sparse=tuple(SparseFeature(name=n, column=index_column(n), num_embeddings=9, owner=n) for n in ("user_id",)),
)
FLOAT, LONG, TEXT = pa.float32(), pa.int64(), pa.string()
TIME = pa.timestamp("us", tz="UTC")
LABELS = ("is_click", "is_order", "is_click_global", "is_order_global")
SCHEMA = pa.schema(
    [(name, TEXT) for name in ("impression_id", "user_id", "item_id", "query")]
    + [("event_time", TIME), ("scenario_index", LONG), ("user_id_index", LONG), ("item_id_index", LONG)]
    + [(name, FLOAT) for name in LABELS]
    + [("is_mature", pa.bool_()), ("click_time", TIME), ("order_time", TIME)]
    + [
        (f"{s}_history_{what}", list_type(kind.to_pandas_dtype()))
        for s in SCENARIOS
        for what, kind in (("item_ids", LONG), ("actions", LONG), ("ages_s", FLOAT), ("query_ids", LONG))
        if s == "search" or what != "query_ids"
    ]
)
IDS = {"user_id": {"a": 7}, "item_id": {"x": 2, "y": 3}, "query": {"q": 4, "r": 5}}
"""What is in the vocabularies: user b and user ab are not."""
FEATURES = ("user_id", "item_id", "query")
NOON_DAY = NOON // DAY_US
KINDS = {2: "click", 3: "order"}


def plan(windows: Windows, chunk_rows: int, days: tuple[int, ...] = (NOON_DAY, NOON_DAY + 1)) -> PassPlan:
    return PassPlan(
        rules=rules_of(windows),
        num_scenarios=3,
        history_length=3,
        days=days,
        chunk_rows=chunk_rows,
        max_user_day_rows=windows.max_user_day_rows,
    )


def batches(rows: pa.Table, size: int) -> Iterator[pa.RecordBatch]:
    yield from rows.to_batches(max_chunksize=size)


def passed(rows: pa.Table, run_plan: PassPlan, size: int) -> dict[str, list[dict[str, Any]]]:
    """What the pass emits, by part."""
    parts: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for batch in first_pass(batches(rows, size), run_plan):
        for row in batch.to_pylist():
            parts[row["part"]].append(row)
    return parts


def written(parts: dict[str, list[dict[str, Any]]], windows: Windows) -> list[dict[str, Any]]:
    """The rows of the samples table that the packs make."""
    lookups: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in parts["value"]:
        feature = row["feature"]
        lookups[row["chunk"]].append(
            {
                "feature": FEATURES.index(feature),
                "code": row["code"],
                "value": row["value"],
                "ids": [IDS[feature].get(row["value"], 1)],
                "numbers": [],
            }
        )
    entry = pa.struct(
        [
            ("feature", pa.int32()),
            ("code", pa.int32()),
            ("value", TEXT),
            ("ids", pa.list_(LONG)),
            ("numbers", pa.list_(FLOAT)),
        ]
    )
    schema = pa.schema([("targets", pa.binary()), ("events", pa.binary()), ("lookups", pa.list_(entry))])
    packs = [{**row, "lookups": lookups[row["chunk"]]} for row in parts["pack"]]
    rows = RowPlan(
        rules=rules_of(windows),
        spec=SPEC,
        watermark=NOON,
        days=(),
        features=FEATURES,
        owned_categories={},
        owned_numbers={},
    )
    table = pa.Table.from_pylist([{n: p[n] for n in schema.names} for p in packs], schema=schema)
    return pa.Table.from_batches(sample_rows(table.to_batches(), rows, SCHEMA), schema=SCHEMA).to_pylist()


def micros(time: dt.datetime | None) -> int | None:
    return None if time is None else (time - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


@depth(25)
@given(lengths=st.lists(st.integers(1, 9), max_size=12), size=st.integers(1, 7), chunk_rows=st.integers(1, 15))
def test_chunks_are_whole_users_in_order(lengths: list[int], size: int, chunk_rows: int) -> None:
    users = [n for n, length in enumerate(lengths) for _ in range(length)]
    rows = pa.table({"user_key": pa.array(users, LONG), "row": pa.array(range(len(users)), LONG)})
    chunks = [c.to_pydict() for c in whole_users(batches(rows, size), chunk_rows)]
    assert [u for c in chunks for u in c["user_key"]] == users
    assert [r for c in chunks for r in c["row"]] == list(range(len(users)))
    owners = [set(c["user_key"]) for c in chunks]
    assert sum(map(len, owners)) == len(set(users))
    # A chunk is closed by the first user behind chunk_rows rows: never more than that, a batch and one user.
    assert all(len(c["row"]) <= chunk_rows + size + max(lengths) for c in chunks)


def test_memory_is_bounded_by_the_chunk_when_users_are_small() -> None:
    rows = pa.table({"user_key": range(1000)})
    assert max(c.num_rows for c in whole_users(batches(rows, 10), 50)) <= 60


@pytest.mark.integration
@depth(25)
@given(
    world=worlds(num_scenarios=3),
    windows=windows_of(),
    size=st.integers(1, 9),
    chunk_rows=st.integers(1, 20),
    most=st.sampled_from([0, 0, 1, 2, 5]),
    data=st.data(),
)
def test_rows_and_account_equal_the_oracle_whatever_the_chunks(
    world: World, windows: Windows, size: int, chunk_rows: int, most: int, data: st.DataObject
) -> None:
    windows = replace(windows, max_user_day_rows=most)
    world = duplicated(data.draw, world)
    want = expected(world, windows, num_scenarios=3, length=3, watermark=NOON)
    shown = {i["id"]: i for i in sorted(world.impressions, key=lambda i: (i["time"], i["known"]), reverse=True)}
    rows = event_rows(world)
    rows = rows.take(pa.array(data.draw(st.permutations(range(rows.num_rows))))).sort_by("user_key")
    parts = passed(rows, plan(windows, chunk_rows), size)
    found = {row["impression_id"]: row for row in written(parts, windows)}
    assert found.keys() == want.samples.keys()
    for key, row in found.items():
        i, sample = shown[key], want.samples[key]
        assert (row["user_id"], row["item_id"], row["query"]) == (i["user"], i["item"], i["query"])
        assert row["user_id_index"] == (7 if i["user"] == "a" else 1)
        assert row["item_id_index"] == IDS["item_id"][i["item"]]
        assert row["scenario_index"] == i["scenario"]
        assert [row[name] for name in LABELS] == [sample[name] for name in LABELS]
        assert [micros(row[n]) for n in ("click_time", "order_time")] == [sample["click_time"], sample["order_time"]]
        assert row["is_mature"] == sample["is_mature"]
        for scenario, events in zip(SCENARIOS, sample["histories"], strict=True):
            assert row[f"{scenario}_history_item_ids"] == [IDS["item_id"][e[0]] for e in events]
            assert row[f"{scenario}_history_actions"] == [e[2] for e in events]
            assert row[f"{scenario}_history_ages_s"] == [e[3] / SECOND for e in events]
        queries = [IDS["query"].get(e[1], 0) for e in sample["histories"][0]]
        assert row["search_history_query_ids"] == queries
    check_account(parts, world, want)


@pytest.mark.integration
@depth(25)
@given(world=worlds(num_scenarios=3), windows=windows_of(skew=0), data=st.data())
def test_no_label_of_a_time_or_later_changes_a_feature_until_then(
    world: World, windows: Windows, data: st.DataObject
) -> None:
    """Clicks and orders from a time on belong to others, come at other times, or are gone. What stays: histories of
    rows up to then, all else of every row, and what vocabularies count."""
    if not world.impressions:
        return
    cut = data.draw(st.sampled_from(sorted({i["time"] for i in world.impressions})))
    clicks, orders = ([row for row in rows if row["time"] < cut] for rows in (world.clicks, world.orders))
    other = World(list(world.impressions), clicks, orders)
    for n, shown in enumerate(data.draw(st.lists(st.sampled_from(world.impressions), max_size=9))):
        time = max(shown["time"] + windows.click * (n % 3) // 2, cut)
        other.click(f"x{n}", shown["user"], shown["item"], shown["scenario"], time, (shown["id"], None)[n % 2])
        other.order(f"y{n}", shown["user"], shown["item"], time)
    parts = [passed(event_rows(of), plan(windows, 5), 3) for of in (world, other)]
    counts: list[collections.Counter[tuple]] = [collections.Counter() for _ in parts]
    for found, part in zip(counts, parts, strict=True):
        for row in part["value"]:
            for day, count in zip(row["days"], row["counts"], strict=True):
                found[row["feature"], row["value"], day] += count
    assert counts[0] == counts[1]
    told = (*LABELS, "is_mature", "click_time", "order_time")
    rows = [{r["impression_id"]: r for r in written(p, windows)} for p in parts]
    for key, row in rows[0].items():
        for name, value in row.items():
            is_past = "_history_" not in name or micros(row["event_time"]) <= cut  # type: ignore[operator]
            assert name in told or not is_past or rows[1][key][name] == value, (key, name)


def check_account(parts: dict[str, list[dict[str, Any]]], world: World, want: Expected) -> None:
    rejects = [row for row in parts["reject"] if row["reason"] != OVER_LIMIT]
    capped = sum(row["num_rows"] for row in parts["reject"] if row["reason"] == OVER_LIMIT)
    assert capped == want.capped
    assert {(KINDS[r["kind"]], r["id"], r["item_id"]): r["reason"] for r in rejects} == want.rejects
    assert len(rejects) == len(want.rejects)
    sums: collections.Counter[str] = collections.Counter()
    for row in parts["account"]:
        sums[row["what"]] += row["num_rows"]
    assert sums["rows_in"] == len(world.impressions) + len(world.clicks) + len(world.orders)
    assert sums["duplicates"] == sum(want.duplicates.values())
    assert sums["rows_in"] == sums["used"] + sums["duplicates"] + len(rejects) + capped
    values: collections.Counter[tuple] = collections.Counter()
    for row in parts["value"]:
        values[row["feature"], row["value"]] += sum(row["counts"])
    once = [i for i in unique(world.impressions, ("id",)) if i["id"] in want.samples]
    pairs = [
        (feature, i[name])
        for i in once
        for feature, name in (("user_id", "user"), ("item_id", "item"), ("query", "query"))
        if i[name] is not None
    ]
    assert +values == collections.Counter(pairs)


MIDNIGHT = (NOON_DAY + 1) * DAY_US


def past_rows(parts: dict[str, list[dict[str, Any]]], schema: pa.Schema) -> pa.Table:
    """The events of an earlier build before MIDNIGHT, as rows of the pass."""
    rows = []
    for event in parts["event"]:
        if micros(event["event_time"]) < MIDNIGHT:
            row = dict.fromkeys(schema.names) | {name: event[name] for name in ("user_id", "id", "item_id", "kind")}
            row |= {name: event[name] for name in ("scenario", "event_time", "known_time")}
            row |= {"query": event["value"], "user_key": number_of(event["user_id"]), "row_hash": 0, "request_key": 0}
            row |= {"is_foreign": False, "key_hash": number_of(tuple(event.items()))}
            row["value_hash"] = number_of((event["item_id"], event["value"]))
            rows.append(row)
    return pa.Table.from_pylist(rows, schema=schema)


@pytest.mark.integration
@depth(25)
@given(world=worlds(num_scenarios=3), windows=windows_of(), chunk_rows=st.integers(1, 20), data=st.data())
def test_a_day_built_on_earlier_events_equals_a_build_from_the_beginning(
    world: World, windows: Windows, chunk_rows: int, data: st.DataObject
) -> None:
    rows = event_rows(world)
    day = (NOON_DAY + 1,)
    whole = passed(rows, plan(windows, 100, days=day), 9)
    first = MIDNIGHT - rules_of(windows).reach
    recent = rows.filter(pc.greater_equal(rows["event_time"].cast(LONG), first))
    rows = pa.concat_tables([recent, past_rows(whole, rows.schema)])
    rows = rows.take(pa.array(data.draw(st.permutations(range(rows.num_rows))), LONG)).sort_by("user_key")
    later = passed(rows, replace(plan(windows, chunk_rows, days=day), since=MIDNIGHT), 5)

    def sorted_rows(parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        return sorted(written(parts, windows), key=lambda row: row["impression_id"])

    def totals(parts: dict[str, list[dict[str, Any]]]) -> dict[tuple, int]:
        found: dict[tuple, int] = collections.defaultdict(int)
        for row in parts["cell"]:
            found[row["what"], row["day"]] ^= row["hash"]
        for row in parts["value"]:
            for number, count in zip(row["days"], row["counts"], strict=True):
                found[row["feature"], row["value"], number] += count
        return {key: number for key, number in found.items() if key[-1] == day[0]}

    assert sorted_rows(later) == sorted_rows(whole)
    assert totals(later) == totals(whole)
    named = [{k: v for k, v in row.items() if k != "part"} for row in whole["event"] if row["day"] == day[0]]
    again = [{k: v for k, v in row.items() if k != "part"} for row in later["event"]]
    assert sorted(map(str, again)) == sorted(map(str, named))


@pytest.mark.integration
@depth(25)
@given(world=worlds(num_scenarios=3), windows=windows_of(), cuts=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_fingerprints_do_not_depend_on_the_chunks(world: World, windows: Windows, cuts: tuple[int, int]) -> None:
    def cells(chunk_rows: int) -> dict[tuple, int]:
        found: dict[tuple, int] = collections.defaultdict(int)
        for row in passed(event_rows(world), plan(windows, chunk_rows), 5)["cell"]:
            found[row["what"], row["day"]] ^= row["hash"]
        return found

    assert cells(cuts[0]) == cells(cuts[1])


def test_impressions_outside_the_dates_are_context_only() -> None:
    world = World().impression("i", "a", "x", 0, NOON).click("c", "a", "x", 0, NOON + 1, "i")
    world.impression("j", "a", "y", 0, NOON + 15 * SECOND)
    windows = Windows(9, 9, 9)
    found = written(passed(event_rows(world), plan(windows, 100, days=(NOON_DAY + 1,)), 100), windows)
    assert [(r["impression_id"], r["search_history_item_ids"]) for r in found] == [("j", [2])]


def test_a_row_of_another_user_with_the_same_key_is_a_duplicate() -> None:
    world = World().impression("i", "a", "x", 0, NOON).impression("i", "b", "x", 0, NOON + 1)
    parts = passed(event_rows(world), plan(Windows(9, 9, 9), 1), 1)
    assert [r["user_id"] for r in written(parts, Windows(9, 9, 9))] == ["a"]
    assert sum(r["num_rows"] for r in parts["account"] if r["what"] == "duplicates") == 1


def test_rows_that_cannot_be_used_are_rejects_with_their_text() -> None:
    rows = event_rows(World().impression("i", "a", "x", 0, NOON)).to_pylist()
    broken = rows[0] | {
        "user_id": None,
        "event_time": None,
        "known_time": None,
        "reason": "null_user_id",
        "row_json": "{}",
        "user_key": -5,
    }
    table = pa.Table.from_pylist([broken, *rows], schema=event_rows(World()).schema)
    parts = passed(table, plan(Windows(9, 9, 9), 10), 10)
    assert [(r["reason"], r["row"], r["event_time"]) for r in parts["reject"]] == [("null_user_id", "{}", None)]
    assert {(r["what"], r["day"], r["num_rows"]) for r in parts["account"]} == {
        ("unusable", None, 1),
        ("rows_in", NOON_DAY, 1),
        ("used", NOON_DAY, 1),
    }
