"""No label of a held-out day is in a feature: examples/own_logs beside the same logs with other clicks and payments."""

from __future__ import annotations

import csv
import datetime as dt
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.lake.tables import Lake
from tests.spark.conftest import EXAMPLE
from tests.spark.test_build_samples import rows_of
from usr_ray.config import load_config
from usr_ray.data.manifest import build_manifest

pytestmark = pytest.mark.spark

HELD_OUT = dt.date(2026, 3, 30)
"""The last of the example's days; its configuration trains on the two before."""
LABELS = ("is_click", "is_order", "is_click_global", "is_order_global", "click_time", "order_time")
TIME = "%d.%m.%Y %H:%M:%S"


def inverted(folder: Path) -> Path:
    """The example's logs; on the held-out day what was not clicked is, every third time with an order, and no other."""
    shutil.copytree(EXAMPLE, folder)
    path = folder / "events" / f"{HELD_OUT}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    views = [row for row in rows if row["action"] == "view"]
    clicked = {(row["customer"], row["surface"], row["sku"]) for row in rows if row["action"] == "click"}
    clicks, midnight_ms = [], dt.datetime.combine(HELD_OUT, dt.time(), dt.UTC).timestamp() * 1000
    lines = [json.loads(line) for line in (folder / "payments.jsonl").read_text().splitlines()]
    payments = [line for line in lines if line["paid_at"] < midnight_ms]
    for view in views:
        if (view["customer"], view["surface"], view["sku"]) in clicked:
            continue
        time = dt.datetime.strptime(view["time"], TIME) + dt.timedelta(seconds=20)
        named = {"clicked_view": view["event"] if view["surface"] == "search" else "", "phrase": view["phrase"]}
        clicks.append(
            view | named | {"time": time.strftime(TIME), "event": f"x{view['event']}", "action": "click", "place": ""}
        )
        if len(clicks) % 3 == 0:
            paid = (time - dt.timedelta(hours=2)).replace(tzinfo=dt.UTC)  # the file's times are those of Berlin
            line = {"order_no": 9000 + len(clicks), "customer": view["customer"], "lines_sku": view["sku"]}
            payments.append({**line, "paid_at": int(paid.timestamp() * 1000) + 5000})
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=";", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*views, *clicks])
    (folder / "payments.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in payments))
    return folder


def features_of(row: dict[str, Any]) -> dict[str, Any]:
    """All columns but labels; of histories what lies before the row's own day."""
    since_day_s = row["event_time"].timestamp() % 86_400
    found = {name: value for name, value in row.items() if name not in LABELS and "_history_" not in name}
    for scenario in ("search", "feed"):
        columns = [name for name in row if name.startswith(f"{scenario}_history_")]
        age = columns.index(f"{scenario}_history_ages_s")
        events = zip(*(row[name] for name in columns), strict=True)
        found[f"{scenario}_history"] = [event for event in events if event[age] > since_day_s]
    return found


def test_other_labels_of_a_held_out_day_change_none_of_its_features(
    spark: SparkSession, example_lake: Path, tmp_path: Path
) -> None:
    """But for what histories see of the same day's earlier events; nothing of the days before changes at all.

    Vocabularies, fitted scales, counters, sides, tags and terms included. Vectors are the logs' own.
    """
    logs, path = inverted(tmp_path / "logs"), tmp_path / "lake"
    request = BuildRequest(
        logs=str(logs),
        lake=Lake(str(path)),
        first=HELD_OUT - dt.timedelta(days=2),
        last=HELD_OUT,
        watermark=dt.datetime(2026, 4, 2, tzinfo=dt.UTC),
    )
    build_samples(spark, load_config(logs / "own_logs.toml"), request, Progress(write=lambda line: None))
    lakes = (example_lake, path)
    specs = [build_manifest(lake, dates=None).spec.to_json() for lake in lakes]
    assert specs[0] == specs[1], "sizes and fingerprints of vocabularies, and what was fitted"
    for table in ("vocabularies", "item_features"):
        contents = [sorted(map(str, rows_of(lake / table))) for lake in lakes]
        assert contents[0] == contents[1] != [], table
    rows = [{row["impression_id"]: row for row in rows_of(lake / "samples")} for lake in lakes]
    assert rows[0].keys() == rows[1].keys()
    held_out = sorted(key for key, row in rows[0].items() if row["impression_date"] == HELD_OUT)
    for key, one in rows[0].items():
        other = rows[1][key]
        assert features_of(one) == features_of(other), key
        assert key in held_out or all(one[name] == other[name] for name in one if "_history_" in name), key
    # The labels are others, what may see them does, and the features that are compared say something.
    assert all(rows[0][key]["is_click"] != rows[1][key]["is_click"] for key in held_out)
    assert sum(rows[1][key]["is_order"] for key in held_out) > 8
    assert sum(rows[0][key]["search_history_ages_s"] != rows[1][key]["search_history_ages_s"] for key in held_out) > 8
    counted = [sorted(map(str, rows_of(lake / "counters"))) for lake in lakes]
    assert counted[0] != counted[1], "the next day's rows would see them"
    assert sum(features_of(rows[0][key])["search_history"] != [] for key in held_out) > 8
    assert sum(rows[0][key]["counter_item_1d_clicks"] > 0 for key in held_out) > 8
