"""A small random shop for the tests of the build: its logs as files, and the rows that the oracle reads."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from tests.etl_oracle import Windows, World

SCENARIOS = ("search", "feed", "related")
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
MINUTE = 60_000_000
DAYS = 4
WINDOWS = Windows(click=30 * MINUTE, order=300 * MINUTE, whole=60 * MINUTE)
CONFIG = (
    'scenarios=["search","feed","related"]',
    'query_scenarios=["search"]',
    'labels.click_window="30 minutes"',
    'labels.order_window="300 minutes"',
    'labels.global_window="60 minutes"',
    "histories.length=4",
    "limits.max_reject_share=1",  # every sixth click is wild on purpose
    'features.user_categories=["city"]',
    'features.user_numbers=["age"]',
    'features.item_categories=["brand"]',
    'features.item_numbers=["price"]',
    'features.scale={price = "none"}',
    'features.context_categories=["device"]',
    'features.context_numbers=["depth"]',
)


def moment(micros: int) -> dt.datetime:
    """Microseconds since START as a time."""
    return START + dt.timedelta(microseconds=int(micros))


def micros(time: dt.datetime) -> int:
    """Microseconds since START."""
    return (time.replace(tzinfo=dt.UTC) - START) // dt.timedelta(microseconds=1)


@dataclass
class Shop:
    """Rows as the oracle wants them (times since START; START is a UTC midnight), and what else the logs say."""

    world: World = field(default_factory=World)
    broken: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Log -> rows without a key or a time."""
    users: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: dict[str, dict[str, Any]] = field(default_factory=dict)


def random_shop(seed: int, num_impressions: int = 500) -> Shop:
    """Three scenarios, orders of both kinds, late and wild clicks, duplicates, equal times, missing features."""
    rng = np.random.default_rng(seed)
    shop = Shop()
    world = shop.world

    def pick(values: Iterable[Any]) -> Any:
        options = list(values)
        return options[rng.integers(len(options))]

    users, items = [f"u{n}" for n in range(12)], [str(n) for n in range(20)]
    shop.users = {u: {"city": pick(["rome", "oslo", None]), "age": pick([20, 31.5, None])} for u in users[2:]}
    shop.items = {i: {"brand": pick(["a", "b"]), "price": pick([0.0, -3.5, 1e6, None])} for i in items[3:]}
    for n in range(num_impressions):
        time = int(rng.integers(DAYS * 24 * 60)) * MINUTE
        scenario = int(rng.integers(3))
        world.impression(
            f"i{n:04}",
            pick(users),
            pick(items[: 1 + n % 20]),
            scenario,
            time,
            query=pick(["red shoes", "tea", 'größe, "xl"', None]) if scenario == 0 else None,
            request=pick([None, f"r{n // 5}"]),
            position=pick([None, n % 7]),
            device=pick(["app", "web", None]),
            depth=pick([None, 3.0, -2.0]),
        )
    shown = world.impressions
    for n in range(num_impressions // 2):
        of = pick(shown)
        time = of["time"] + int(pick([0, 1, 5, 29, 30, 31, 500, -1])) * MINUTE
        wild = rng.random() < 0.15
        world.click(
            f"c{n:04}",
            pick(users) if wild else of["user"],
            pick(items) if wild else of["item"],
            int(rng.integers(3)) if wild else of["scenario"],
            time,
            pick([of["id"], of["id"], None, "gone"]),
            known=time + int(pick([0, 0, 1, 600])) * MINUTE,
        )
    for n in range(num_impressions // 3):
        of = pick(world.clicks)
        time = of["time"] + int(pick([0, 3, 299, 300, 301, -2])) * MINUTE
        world.order(
            f"o{n // 2:04}",
            of["user"],
            of["item"],
            time,
            pick([None, None, of["scenario"]]),
            known=time + int(pick([0, 2, 900])) * MINUTE,
        )
    for rows in (world.impressions, world.clicks, world.orders):
        for _ in range(len(rows) // 12):
            rows.append(dict(pick(rows)))  # exact duplicates
        for _ in range(len(rows) // 25):
            row = pick(rows)  # within half a day: builds that read the state see no duplicates further apart
            time = row["time"] + int(rng.integers(-720, 720)) * MINUTE + 1
            rows.append(row | {"time": min(max(time, 0), DAYS * 1440 * MINUTE - 1), "user": pick(users)})
    for row in (*world.impressions, *world.clicks, *world.orders):
        row["known"] = max(row["known"], row["time"])
    time = moment(90 * MINUTE)
    shop.broken = {
        "search_impressions": [_impression(None, "u1", "3", time), _impression("x1", None, "3", None)],
        "feed_clicks": [
            {"click_id": "x2", "impression_id": None, "user_id": "u1", "item_id": None, "event_time": time}
        ],
        "orders": [{"order_id": "x3", "user_id": "u1", "item_id": "3", "event_time": None}],
    }
    return shop


def _impression(key: str | None, user: str | None, item: str | None, time: dt.datetime | None, **more: Any) -> dict:
    empty = {"request_id": None, "position": None, "query": None, "device": None, "depth": None}
    return {"impression_id": key, "user_id": user, "item_id": item, "event_time": time, **(empty | more)}


def logs_of(shop: Shop) -> dict[str, list[dict[str, Any]]]:
    """Log name -> rows with the contract's columns."""
    logs: dict[str, list[dict[str, Any]]] = {f"{s}_{k}": [] for s in SCENARIOS for k in ("impressions", "clicks")}
    logs |= {"orders": [], "feed_orders": [], "search_orders": [], "related_orders": []}
    for i in shop.world.impressions:
        row = _impression(
            i["id"],
            i["user"],
            i["item"],
            moment(i["time"]),
            request_id=i["request"],
            position=i["position"],
            query=i["query"],
            device=i["device"],
            depth=i["depth"],
        )
        if i["scenario"] == 2:
            del row["query"], row["depth"]
        logs[f"{SCENARIOS[i['scenario']]}_impressions"].append(row)
    for c in shop.world.clicks:
        logs[f"{SCENARIOS[c['scenario']]}_clicks"].append(
            {
                "click_id": c["id"],
                "impression_id": c["names"],
                "user_id": c["user"],
                "item_id": c["item"],
                "event_time": moment(c["time"]),
                "ingest_time": moment(c["known"]),
            }
        )
    for o in shop.world.orders:
        log = "orders" if o["scenario"] is None else f"{SCENARIOS[o['scenario']]}_orders"
        logs[log].append(
            {
                "order_id": o["id"],
                "user_id": o["user"],
                "item_id": o["item"],
                "event_time": moment(o["time"]),
                "ingest_time": moment(o["known"]),
            }
        )
    for log, rows in shop.broken.items():
        logs[log] += [dict.fromkeys(logs[log][0]) | row for row in rows]
    logs["users"] = [{"user_id": u, **row} for u, row in shop.users.items()]
    logs["items"] = [{"item_id": i, **row} for i, row in shop.items.items()]
    return logs


_TYPES = {
    "event_time": pa.timestamp("us", tz="UTC"),
    "ingest_time": pa.timestamp("us", tz="UTC"),
    "position": pa.int32(),
    "depth": pa.float64(),
    "age": pa.float64(),
    "price": pa.float64(),
    "hobbies": pa.list_(pa.string()),
    "tags": pa.list_(pa.string()),
    "moods": pa.list_(pa.string()),
    **dict.fromkeys(("spent", "stock", "wait", "load"), pa.float64()),
    "look": pa.list_(pa.float64()),
    "face": pa.list_(pa.float32()),
}


def write_logs(logs: dict[str, list[dict[str, Any]]], folder: Path, kind: str = "parquet") -> Path:
    """Write every log as a folder of two files (Parquet) or as one file (CSV, JSON lines)."""
    folder.mkdir(parents=True)
    for log, rows in logs.items():
        if not rows:
            continue
        schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in rows[0]])
        table = pa.Table.from_pylist(rows, schema=schema)
        if kind == "parquet":
            (folder / log).mkdir()
            half = len(rows) // 2
            pq.write_table(table.slice(0, half), folder / log / "a.parquet")
            pq.write_table(table.slice(half), folder / log / "b.parquet")
        elif kind == "csv":
            pc.write_csv(_as_text(table), folder / f"{log}.csv")
        else:
            lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in _as_text(table).to_pylist()]
            (folder / f"{log}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _as_text(table: pa.Table) -> pa.Table:
    for n, name in enumerate(table.column_names):
        if pa.types.is_timestamp(table.schema.field(n).type):
            times = [None if t is None else t.isoformat() for t in table[name].to_pylist()]
            table = table.set_column(n, name, pa.array(times, pa.string()))
    return table
