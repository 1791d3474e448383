"""The labels of the contract (section 2), row by row in plain Python: a slow reference for the sources' tests."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


def read_rows(logs: Path, log: str) -> list[dict[str, Any]]:
    """Rows of a log, event_time as microseconds since 1970."""
    table = pq.read_table(logs / log)
    if "event_time" in table.column_names:
        place = table.schema.get_field_index("event_time")
        table = table.set_column(place, "event_time", table["event_time"].cast(pa.int64()))
    return table.to_pylist()


def first_by_key(rows: list[dict[str, Any]], *key: str) -> list[dict[str, Any]]:
    """One row a key, the earliest."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: r["event_time"]):
        kept.setdefault(tuple(row[name] for name in key), row)
    return list(kept.values())


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
    shown: dict[str, dict[str, Any]] = {}
    by_pair: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for scenario in scenarios:
        for row in first_by_key(read_rows(logs, f"{scenario}_impressions"), "impression_id"):
            shown[row["impression_id"]] = row | {"scenario": scenario}
            by_pair[row["user_id"], row["item_id"], scenario].append(row)
    clicks: dict[tuple[str, str], list[tuple[int, str, str, str]]] = defaultdict(list)
    clicked, lost_clicks = set(), []
    for scenario in scenarios:
        for click in first_by_key(read_rows(logs, f"{scenario}_clicks"), "click_id"):
            impression = click_owner(click, scenario, shown, by_pair, click_us)
            if impression is None:
                lost_clicks.append(click)
                continue
            clicked.add(impression)
            event = (click["event_time"], click["click_id"], impression, scenario)
            clicks[click["user_id"], click["item_id"]].append(event)
    ordered, lost_orders = set(), []
    for scenario in scenarios if orders_by_scenario else [None]:
        log = "orders" if scenario is None else f"{scenario}_orders"
        for order in first_by_key(read_rows(logs, log), "order_id", "item_id"):
            earned = [
                event
                for event in clicks[order["user_id"], order["item_id"]]
                if event[0] <= order["event_time"] <= event[0] + order_us and scenario in (None, event[3])
            ]
            if earned:
                ordered.add(max(earned)[2])
            else:
                lost_orders.append(order)
    is_global = {
        impression
        for impression, row in shown.items()
        if impression in clicked
        or any(0 <= e[0] - row["event_time"] <= global_us for e in clicks[row["user_id"], row["item_id"]])
    }
    return Labels(clicked, ordered, is_global, lost_clicks, lost_orders, shown)


def click_owner(
    click: dict[str, Any],
    scenario: str,
    shown: dict[str, dict[str, Any]],
    by_pair: dict[tuple[str, str, str], list[dict[str, Any]]],
    click_us: int,
) -> str | None:
    time_us = click["event_time"]
    if click["impression_id"] is not None:
        row = shown.get(click["impression_id"])
        same = row is not None and (row["user_id"], row["item_id"], row["scenario"]) == (
            click["user_id"],
            click["item_id"],
            scenario,
        )
        return row["impression_id"] if row and same and 0 <= time_us - row["event_time"] <= click_us else None
    fitting = [
        (row["event_time"], row["impression_id"])
        for row in by_pair[click["user_id"], click["item_id"], scenario]
        if 0 <= time_us - row["event_time"] <= click_us
    ]
    return max(fitting)[1] if fitting else None
