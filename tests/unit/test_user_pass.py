"""The one pass: chunks never split a user, their size changes nothing, profiles reach all impressions of a user."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.events import KIND_PROFILE
from etl.user_pass import AUDIT_SCHEMA, PassPlan, audit, list_type, samples, whole_users
from tests.etl_oracle import Windows, World, expected
from tests.unit.etl_worlds import NOON, SECOND, rules_of, table, windows_of, worlds
from usr_ray.config import DAY_US
from usr_ray.schema import FeatureSpec, SparseFeature, index_column

pytestmark = pytest.mark.unit

SPEC = FeatureSpec(
    scenarios=("search", "feed"), query_scenarios=("search",), history_length=3, label_delay_us=0, dense=(),
    sparse=tuple(SparseFeature(name=n, column=index_column(n), num_embeddings=9, owner=n) for n in ("user_id",)),
)  # fmt: skip
FLOAT, LONG = pa.float32(), pa.int64()
TIME = pa.timestamp("us", tz="UTC")
SCHEMA = pa.schema(
    [("impression_id", pa.string()), ("event_time", TIME), ("scenario_index", LONG), ("user_id_index", LONG)]
    + [(name, FLOAT) for name in ("is_click", "is_order", "is_click_global", "is_order_global")]
    + [("is_mature", pa.bool_()), ("click_time", TIME), ("order_time", TIME)]
    + [
        (f"{s}_history_{what}", list_type(kind.to_pandas_dtype()))
        for s in SPEC.scenarios
        for what, kind in (("item_ids", LONG), ("actions", LONG), ("ages_s", FLOAT), ("query_ids", LONG))
        if (s, what) != ("feed", "query_ids")
    ]
)
ITEMS = {"x": 2, "y": 3}


def rows_of(world: World) -> pa.Table:
    """The world's rows with encoded columns and, for user a only, a profile row (user_id_index 7)."""
    rows = table(world)
    items = [ITEMS[i] for i in rows["item_id"].to_pylist()]
    rows = rows.append_column("item_id_index", pa.array(items, LONG))
    rows = rows.append_column("query_index", pa.array([5] * rows.num_rows, LONG))
    rows = rows.append_column("user_id_index", pa.nulls(rows.num_rows, LONG))
    rows = rows.append_column("row_hash", pa.array(range(rows.num_rows), LONG))
    profile = {"user_id": "a", "event_time": dt.datetime(1, 1, 1), "known_time": dt.datetime(1, 1, 1),
               "kind": KIND_PROFILE, "id": "", "scenario": -1, "item_id": "",
               "user_id_index": 7, "row_hash": 0}  # fmt: skip
    return pa.concat_tables([pa.Table.from_pylist([profile], schema=rows.schema), rows])


NOON_DAY = NOON // DAY_US


def plan(windows: Windows, chunk_rows: int, days: tuple[int, ...] = (NOON_DAY, NOON_DAY + 1)) -> PassPlan:
    return PassPlan(
        rules=rules_of(windows), spec=SPEC, watermark=NOON, days=days, own_columns=("event_time",),
        profile_columns=("user_id_index",), chunk_rows=chunk_rows,
    )  # fmt: skip


def batches(rows: pa.Table, size: int) -> Iterator[pa.RecordBatch]:
    yield from rows.to_batches(max_chunksize=size)


def run(rows: pa.Table, run_plan: PassPlan, size: int) -> list[dict]:
    found = list(samples(batches(rows, size), run_plan, SCHEMA))
    return pa.Table.from_batches(found, schema=SCHEMA).to_pylist()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=12), size=st.integers(1, 7), chunk_rows=st.integers(1, 15))
def test_chunks_are_whole_users_in_order(lengths: list[int], size: int, chunk_rows: int) -> None:
    users = [f"u{n:02}" for n, length in enumerate(lengths) for _ in range(length)]
    rows = pa.table({"user_id": pa.array(users, pa.string()), "row": pa.array(range(len(users)), LONG)})
    chunks = [c.to_pydict() for c in whole_users(batches(rows, size), chunk_rows)]
    assert [u for c in chunks for u in c["user_id"]] == users
    assert [r for c in chunks for r in c["row"]] == list(range(len(users)))
    owners = [set(c["user_id"]) for c in chunks]
    assert sum(map(len, owners)) == len(set(users))
    # A chunk is closed by the first user behind chunk_rows rows: never more than that, a batch and one user.
    assert all(len(c["row"]) <= chunk_rows + size + max(lengths) for c in chunks)


def test_memory_is_bounded_by_the_chunk_when_users_are_small() -> None:
    rows = pa.table({"user_id": [f"u{n:05}" for n in range(1000)]})
    assert max(c.num_rows for c in whole_users(batches(rows, 10), 50)) <= 60


@settings(max_examples=60, deadline=None)
@given(world=worlds(), windows=windows_of(), size=st.integers(1, 9), chunk_rows=st.integers(1, 20))
def test_samples_equal_the_oracle_whatever_the_chunks(
    world: World, windows: Windows, size: int, chunk_rows: int
) -> None:
    want = expected(world, windows, num_scenarios=2, length=3, watermark=NOON)
    shown = {i["id"]: i for i in world.impressions}
    rows = {row["impression_id"]: row for row in run(rows_of(world), plan(windows, chunk_rows), size)}
    assert rows.keys() == want.samples.keys()
    for key, row in rows.items():
        assert row["user_id_index"] == (7 if shown[key]["user"] == "a" else 1)
        assert row["scenario_index"] == shown[key]["scenario"]
        assert row["is_order_global"] == want.samples[key]["is_order_global"]
        for scenario, events in zip(SPEC.scenarios, want.samples[key]["histories"], strict=True):
            assert row[f"{scenario}_history_item_ids"] == [ITEMS[e[0]] for e in events]
            assert row[f"{scenario}_history_ages_s"] == [e[3] / SECOND for e in events]
        assert row["search_history_query_ids"] == [5] * len(want.samples[key]["histories"][0])


def test_impressions_outside_the_dates_are_context_only() -> None:
    world = World().impression("i", "a", "x", 0, NOON).click("c", "a", "x", 0, NOON + 1, "i")
    world.impression("j", "a", "y", 0, NOON + 15 * SECOND)
    found = run(rows_of(world), plan(Windows(9, 9, 9), 100, days=(NOON_DAY + 1,)), 100)
    assert [(r["impression_id"], r["search_history_item_ids"]) for r in found] == [("j", [2])]


@settings(max_examples=60, deadline=None)
@given(world=worlds(), windows=windows_of(), chunk_rows=st.integers(1, 20))
def test_the_audit_accounts_for_every_row(world: World, windows: Windows, chunk_rows: int) -> None:
    want = expected(world, windows, num_scenarios=2, length=3, watermark=NOON)
    found = pa.Table.from_batches(audit(batches(rows_of(world), 5), plan(windows, chunk_rows)), schema=AUDIT_SCHEMA)
    rows = [row for row in found.to_pylist() if row["hash"] is None]
    rejects = [row for row in rows if row["reason"] is not None]
    kinds = {2: "click", 3: "order"}
    assert {(kinds[r["kind"]], r["id"], r["item_id"]): r["reason"] for r in rejects} == want.rejects
    used = sum(row["num_rows"] for row in rows if row["reason"] is None)
    assert used + len(rejects) == len(world.impressions) + len(world.clicks) + len(world.orders)
