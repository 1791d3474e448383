"""Small random worlds for the ETL's kernel, and the kernel run on a world. No Spark."""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from etl.kernel.attribution import NO_TIME, REASONS, LabelRules, attribute, label, mature
from etl.kernel.events import KIND_CLICK, KIND_IMPRESSION, KIND_ORDER, NO_SCENARIO, Events
from etl.kernel.histories import history_events, last_events
from tests.etl_oracle import Expected, Windows, World

NOON = int(dt.datetime(2026, 1, 1, 23, 59, 50, tzinfo=dt.UTC).timestamp()) * 1_000_000
"""Close to midnight, so that worlds of some seconds hold two UTC days."""
SECOND = 1_000_000


def table(world: World) -> pa.Table:
    """The rows of a world as the pass gets them: sorted by (user, time, kind, id, item, scenario)."""
    rows: list[dict[str, Any]] = []
    for kind, part in ((KIND_IMPRESSION, world.impressions), (KIND_CLICK, world.clicks), (KIND_ORDER, world.orders)):
        rows += [
            {
                "user_id": r["user"],
                "event_time": r["time"],
                "known_time": r["known"],
                "kind": kind,
                "id": r["id"],
                "scenario": NO_SCENARIO if r["scenario"] is None else r["scenario"],
                "item_id": r["item"],
                "impression_id": r.get("names"),
            }
            for r in part
        ]
    rows.sort(key=lambda r: (r["user_id"], r["event_time"], r["kind"], r["id"], r["item_id"], r["scenario"]))
    schema = pa.schema(
        [
            ("user_id", pa.string()),
            ("event_time", pa.int64()),
            ("known_time", pa.int64()),
            ("kind", pa.int32()),
            ("id", pa.string()),
            ("scenario", pa.int32()),
            ("item_id", pa.string()),
            ("impression_id", pa.string()),
        ]
    )
    result = pa.Table.from_pylist(rows, schema=schema)
    for name in ("event_time", "known_time"):
        result = result.set_column(
            result.schema.get_field_index(name), name, result[name].cast(pa.timestamp("us", tz="UTC"))
        )
    return result


def event_rows(world: World) -> pa.Table:
    """The rows of a world as Spark hands them to the pass: grouped by user_key, hashed, duplicates of others marked."""
    queries = {(i["id"], i["user"], i["time"]): i["query"] for i in world.impressions}
    extra: dict[str, list[Any]] = {name: [] for name in _EXTRA.names}
    rows = table(world).to_pylist()
    winners: dict[Any, tuple] = {}
    for row in rows:
        key = key_of(row)
        rank = (row["event_time"], row["known_time"], row["scenario"] % 99, row["user_id"])
        winners[key] = min(winners.get(key, (rank, row["user_id"])), (rank, row["user_id"]))
    for row in rows:
        shown = row["kind"] == KIND_IMPRESSION
        time = (row["event_time"] - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)
        query = queries[row["id"], row["user_id"], time] if shown else None
        content = sorted((k, str(v)) for k, v in row.items() if k != "known_time")
        extra["user_key"].append(number_of(row["user_id"]))
        extra["key_hash"].append(number_of(key_of(row)))
        extra["row_hash"].append(number_of((content, query)) if shown else 0)
        extra["value_hash"].append(number_of((row["item_id"], query)))
        extra["is_foreign"].append(winners[key_of(row)][1] != row["user_id"])
        extra["request_key"].append(number_of(row["id"]))
        extra["query"].append(query)
        for name in ("reason", "row_json", "request_id", "position"):
            extra[name].append(None)
    result = table(world)
    for name, values in extra.items():
        result = result.append_column(name, pa.array(values, _EXTRA.field(name).type))
    return result.sort_by("user_key")


def key_of(row: dict[str, Any]) -> tuple:
    """The key of a row as the pass gets it."""
    kind = row["kind"]
    return (
        kind,
        row["scenario"] if kind == KIND_CLICK else None,
        row["id"],
        row["item_id"] if kind == KIND_ORDER else None,
    )


def number_of(content: Any) -> int:
    """A 64-bit hash."""
    digest = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


_EXTRA = pa.schema(
    [
        *((name, pa.int64()) for name in ("user_key", "request_key", "key_hash", "row_hash", "value_hash")),
        ("is_foreign", pa.bool_()),
        *((name, pa.string()) for name in ("query", "reason", "row_json", "request_id")),
        ("position", pa.int32()),
    ]
)


def duplicated(draw: Any, world: World) -> World:
    """The world with some rows twice: as they were, at another time, or of another user."""
    again = copy.deepcopy(world)
    for rows in (again.impressions, again.clicks, again.orders):
        # Copies at times of their own: of full ties over users the contract does not say which row stays.
        for n, row in enumerate(draw(st.lists(st.sampled_from(rows), max_size=2)) if rows else []):
            how = draw(st.sampled_from(["same", "later", "user", "shelf"]))
            changes: dict[str, Any] = {}
            if how == "later":
                changes = {"time": row["time"] + SECOND, "known": row["known"] + 2 * SECOND}
            elif how == "user":
                time = row["time"] + draw(st.sampled_from([-1, 1])) * (2 * n + 1) * SECOND // 2
                changes = {"user": draw(users), "time": time, "known": time}
            elif how == "shelf" and rows is again.orders:
                changes = {"scenario": None}
            rows.append(row | changes)
    return again


def rules_of(windows: Windows) -> LabelRules:
    return LabelRules(
        click_window=windows.click,
        order_window=windows.order,
        global_window=windows.whole,
        clock_skew=windows.skew,
        day_span=windows.day_span,
        credit_impression=windows.credit_impression,
    )


def run_kernel(world: World, windows: Windows, *, num_scenarios: int, length: int, watermark: int) -> Expected:
    """What the kernel says of a world without duplicates, in the oracle's words."""
    rows = table(world)
    rules = rules_of(windows)
    events = Events.from_arrow(rows, ranked=windows.skew > 0)
    attribution = attribute(events, rules, num_scenarios=num_scenarios)
    ids, items = rows["id"].to_pylist(), rows["item_id"].to_pylist()
    queries = {i["id"]: i["query"] for i in world.impressions}
    shown = events.rows(KIND_IMPRESSION)
    labels = label(events, attribution, shown, rules)
    is_mature = mature(events.time[shown], watermark, rules)
    histories = []
    for scenario in range(num_scenarios):
        flat = history_events(events, attribution, scenario)
        ranges = last_events(flat, events.user[shown], events.time[shown], length)
        of_rows = [
            [
                (
                    items[flat.impression[p]],
                    queries[ids[flat.impression[p]]],
                    int(flat.action[p]),
                    int(t - flat.time[p]),
                )
                for p in ranges.positions[a:b]
            ]
            for a, b, t in zip(ranges.offsets, ranges.offsets[1:], events.time[shown], strict=False)
        ]
        histories.append(of_rows)
    samples = {
        ids[row]: {
            **{
                name: float(getattr(labels, name)[n])
                for name in ("is_click", "is_order", "is_click_global", "is_order_global")
            },
            **{
                name: None if getattr(labels, name)[n] == NO_TIME else int(getattr(labels, name)[n])
                for name in ("click_time", "order_time")
            },
            "is_mature": bool(is_mature[n]),
            "histories": [histories[k][n] for k in range(num_scenarios)],
        }
        for n, row in enumerate(shown)
    }
    kinds = {KIND_CLICK: "click", KIND_ORDER: "order"}
    rejects = {
        (kinds[int(events.kind[row])], ids[row], items[row]): REASONS[code]
        for row, code in zip(attribution.reject_rows, attribution.reject_codes, strict=True)
    }
    every = np.concatenate([attribution.click_rows, attribution.order_rows, attribution.reject_rows])
    assert sorted(every) == sorted(np.flatnonzero(events.kind != KIND_IMPRESSION))
    return Expected(samples, rejects, {"impressions": 0, "clicks": 0, "orders": 0})


seconds = st.integers(0, 20).map(lambda s: NOON + s * SECOND)
lags = st.sampled_from([0, 0, 0, 1, 3, 15]).map(lambda s: s * SECOND)
users = st.sampled_from(["a", "b", "ab"])
items = st.sampled_from(["x", "y"])


@st.composite
def worlds(draw: st.DrawFn, *, num_scenarios: int = 2, max_rows: int = 12) -> World:
    """A few users and items and many equal times, so that ties, windows' ends and mix-ups are common."""
    world = World()
    scenarios = st.integers(0, num_scenarios - 1)
    numbers = draw(st.permutations(range(max_rows)))
    for n in numbers[: draw(st.integers(1, max_rows))]:
        world.impression(
            f"i{n}",
            draw(users),
            draw(items),
            draw(scenarios),
            draw(seconds),
            query=draw(st.sampled_from([None, "q", "r"])),
        )
    for n in numbers[: draw(st.integers(0, max_rows))]:
        named = draw(st.sampled_from([None, *(i["id"] for i in world.impressions), "nowhere"]))
        shown = draw(st.sampled_from(world.impressions))
        if draw(st.booleans()):  # mostly sensible clicks: the impression's own user, item and scenario
            user, item, scenario = shown["user"], shown["item"], shown["scenario"]
            named = draw(st.sampled_from([None, shown["id"]]))
        else:
            user, item, scenario = draw(users), draw(items), draw(scenarios)
        time = draw(seconds)
        world.click(f"c{n}", user, item, scenario, time, named, known=time + draw(lags))
    for n in range(draw(st.integers(0, max_rows // 2))):
        time = draw(seconds)
        world.order(
            f"o{n // 2}{n % 2}", draw(users), draw(items), time, draw(st.none() | scenarios), known=time + draw(lags)
        )
    return world


def windows_of(**fixed: Any) -> st.SearchStrategy[Windows]:
    """Windows of a few seconds, so that their ends are met."""
    spans = st.integers(0, 12).map(lambda s: s * SECOND)
    return st.builds(
        lambda click, order, more, skew, day, credit: Windows(
            **(
                {
                    "click": click,
                    "order": order,
                    "whole": click + more,
                    "skew": skew,
                    "day_span": day,
                    "credit_impression": credit,
                }
                | fixed
            )
        ),
        spans,
        spans,
        spans,
        st.sampled_from([0, 0, 1, 3]).map(lambda s: s * SECOND),
        st.booleans(),
        st.booleans(),
    )
