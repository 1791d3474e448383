"""Logs of a source, and the labels that the oracle of the contract (tests/etl_oracle.py) gives them, user by user."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from etl.sources import SOURCES
from etl.sources.writer import LogWriter
from tests.etl_oracle import Windows, World, expected
from usr_ray.config import load_config


def ingest(source: str, input_dir: Path, logs: Path, *overrides: str, file: Path | None = None) -> Path:
    with LogWriter(logs) as writer:
        SOURCES[source](input_dir, writer, load_config(file, list(overrides)))
        writer.commit({})
    return logs


def read_rows(logs: Path, log: str) -> list[dict[str, Any]]:
    """Rows of a log, event_time as microseconds since 1970."""
    table = pq.read_table(logs / log)
    if "event_time" in table.column_names:
        place = table.schema.get_field_index("event_time")
        table = table.set_column(place, "event_time", table["event_time"].cast(pa.int64()))
    return table.to_pylist()


class Labels(NamedTuple):
    is_click: set[str]
    """impression_ids."""
    is_order: set[str]
    is_click_global: set[str]
    rejected_clicks: list[dict[str, Any]]
    rejected_orders: list[dict[str, Any]]
    impressions: dict[str, dict[str, Any]]


def attribute(
    logs: Path, scenarios: list[str], *, click_us: int, order_us: int, global_us: int, orders_by_scenario: bool = False
) -> Labels:
    worlds: dict[str, World] = defaultdict(World)
    found = Labels(set(), set(), set(), [], [], {})
    for number, scenario in enumerate(scenarios):
        for row in read_rows(logs, f"{scenario}_impressions"):
            event = (row["user_id"], row["item_id"], number, row["event_time"])
            worlds[row["user_id"]].impression(row["impression_id"], *event)
            found.impressions.setdefault(row["impression_id"], row)
        for row in read_rows(logs, f"{scenario}_clicks"):
            event = (row["user_id"], row["item_id"], number, row["event_time"])
            worlds[row["user_id"]].click(row["click_id"], *event, row["impression_id"], row=row)
    for number, log in enumerate(f"{s}_orders" for s in scenarios) if orders_by_scenario else [(None, "orders")]:
        for row in read_rows(logs, log):
            event = (row["user_id"], row["item_id"], row["event_time"], number)
            worlds[row["user_id"]].order(row["order_id"], *event, row=row)
    for world in worlds.values():
        seen = expected(world, Windows(click_us, order_us, global_us), num_scenarios=0, length=0, watermark=0)
        for name in ("is_click", "is_order", "is_click_global"):
            getattr(found, name).update(key for key, labels in seen.samples.items() if labels[name])
        for kind, rows, lost in (("click", world.clicks, found[3]), ("order", world.orders, found[4])):
            keys = [(kind, row["id"], row["item"]) for row in rows]
            lost.extend({key: row["row"] for key, row in zip(keys, rows, strict=True) if key in seen.rejects}.values())
    return found
