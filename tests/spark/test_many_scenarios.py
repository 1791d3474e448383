"""Five scenarios in two steps: labels by formula, vocabularies that only grow; training on five, on one, and hashed."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.lake.tables import Lake
from tests.spark.conftest import HASHED
from tests.spark.shop import CONFIG, START
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.config import Config, load_config
from usr_ray.data.manifest import build_manifest
from usr_ray.training.loop import train
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.spark

FIVE = ("search", "image_search", "feed", "related", "basket")
DATES = [dt.date(2026, 3, 1) + dt.timedelta(days=n) for n in range(3)]
PER_DAY = 60
MINUTE = dt.timedelta(minutes=1)
CART = "ß🛒 \u202e\u0643\u062a \U0001d4d0"
LONG = "x" * 20_000
BY_HAND = {
    # Item -> how often it is shown on each of the three days, beside the 4 items that every day shows.
    "a": (3, 0, 1),
    CART: (2, 0, 0),
    "b": (1, 1, 0),
    LONG: (0, 2, 0),
    "c": (0, 0, 1),
    "A": (1, 0, 0),
}
WINDOWS = tuple(f'labels.{name}_window="10 minutes"' for name in ("click", "order", "global"))
SMALL_MODEL = (
    "train.global_batch_size=64",
    "model.contrastive.group_size=32",
    "model.hidden=[8]",
    "model.embedding_dim=4",
    "model.trigger_dim=4",
    "train.reader_threads=1",
    "vocabulary.min_count=2",
)


def config_of(scenarios: tuple[str, ...], *overrides: str) -> Config:
    queries = [s for s in scenarios if s.endswith("search")]
    names = (f"scenarios={json.dumps(scenarios)}", f"query_scenarios={json.dumps(queries)}")
    return load_config(None, (*names, *WINDOWS, *SMALL_MODEL, *overrides))


def is_clicked(n: int, k: int) -> bool:
    return (n + k) % 3 == 0


def write_logs(folder: Path, scenarios: tuple[str, ...]) -> None:
    """Each day, minute 5 n + k shows scenario k the same user and item; every other click is bought 30 s later.

    Scenarios with an even number know their own orders, the others' are in the shop's.
    """
    logs: dict[str, list[dict[str, Any]]] = {"orders": []}
    for k, scenario in enumerate(scenarios):
        shown, clicks, orders = [], [], []
        for day, date in enumerate(DATES):
            for n in range(PER_DAY):
                time = dt.datetime.combine(date, dt.time(), dt.UTC) + (5 * n + k) * MINUTE
                key, event = f"{scenario}-{day}-{n}", {"user_id": f"u{n % 20}", "item_id": f"s{n % 4}"}
                asked = None if n % 7 == 0 else "" if n % 7 == 1 else f"größe {n % 5}"
                shown.append(event | {"impression_id": key, "request_id": key, "event_time": time, "query": asked})
                if is_clicked(n, k):
                    clicks.append(event | {"click_id": key, "impression_id": key, "event_time": time})
                    if n % 2 == 0:
                        rows = orders if k % 2 == 0 else logs["orders"]
                        rows.append(event | {"order_id": key, "event_time": time + MINUTE / 2})
            if k == 0:
                noon = dt.datetime.combine(date, dt.time(12), dt.UTC)
                shown += [
                    {
                        "user_id": "hand",
                        "item_id": item,
                        "impression_id": f"{item[:9]}-{day}-{n}",
                        "request_id": "r",
                        "event_time": noon,
                        "query": LONG,
                    }
                    for item, counts in BY_HAND.items()
                    for n in range(counts[day])
                ]
        logs |= {f"{scenario}_impressions": shown, f"{scenario}_clicks": clicks}
        if k % 2 == 0:
            logs[f"{scenario}_orders"] = orders
    for log, rows in logs.items():
        if rows:
            (folder / log).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / log / "a.parquet")


def build(spark: SparkSession, config: Config, logs: Path, lake: Path, first: dt.date, last: dt.date) -> None:
    after = dt.datetime.combine(DATES[-1] + dt.timedelta(days=1), dt.time(), dt.UTC)
    request = BuildRequest(logs=str(logs), lake=Lake(str(lake)), first=first, last=last, watermark=after)
    build_samples(spark, config, request, Progress(write=lambda line: None))


def table(lake: Path, name: str) -> list[dict[str, Any]]:
    return DeltaTable(str(lake / name)).to_pyarrow_table().to_pylist()


def vocabulary(lake: Path, feature: str) -> dict[str, int]:
    return {row["value"]: row["id"] for row in table(lake, "vocabularies") if row["feature"] == feature}


def check_labels(lake: Path, scenarios: tuple[str, ...]) -> None:
    """Every date and scenario by the formula of `write_logs`."""
    for date in DATES:
        report = json.loads((lake / "reports" / f"{date}.json").read_text())
        assert list(report["scenarios"]) == sorted(scenarios)
        for k, scenario in enumerate(scenarios):
            later = range(k, len(scenarios))
            expected = {
                "clicks": sum(is_clicked(n, k) for n in range(PER_DAY)),
                "orders": sum(is_clicked(n, k) for n in range(0, PER_DAY, 2)),
                "clicks_global": sum(any(is_clicked(n, j) for j in later) for n in range(PER_DAY)),
                "orders_global": sum(any(is_clicked(n, j) for j in later) for n in range(0, PER_DAY, 2)),
            }
            found = report["scenarios"][scenario]
            assert {key: found[key] for key in expected} == expected, (date, scenario)


def check_training(config: Config, lake: Path, run_dir: Path, dates: list[dt.date], num_samples: int = PER_DAY) -> None:
    """The first two dates train, the third has so many samples of each scenario at least."""
    torch.set_num_threads(1)
    manifests = [build_manifest(lake, dates=span) for span in ((dates[0], dates[1]), (dates[2], dates[2]))]
    result = train(config, LocalWorker("cpu"), train_manifest=manifests[0], eval_manifest=manifests[1], run_dir=run_dir)
    assert result.status == "finished" and result.step >= 1  # noqa: PT018
    metrics = result.evaluation.metrics  # type: ignore[union-attr]
    assert list(metrics) == [*config.scenarios, "global", "all"]
    for scenario in config.scenarios:
        assert metrics[scenario]["ctr"]["num_samples"] >= num_samples
        assert metrics[scenario]["ctcvr"]["log_loss"] > 0


def test_five_scenarios_two_with_queries_built_in_two_steps(spark: SparkSession, tmp_path: Path) -> None:
    lake, config = tmp_path / "lake", config_of(FIVE)
    write_logs(tmp_path / "logs", FIVE)
    after: list[dict[str, int]] = []
    for first, last in ((DATES[0], DATES[0]), (DATES[1], DATES[2])):
        build(spark, config, tmp_path / "logs", lake, first, last)
        after.append(vocabulary(lake, "item_id"))
    # Falling count, then value; "b" and LONG reach min_count with the second build, "c" and "A" never.
    everyday = {"s0": 2, "s1": 3, "s2": 4, "s3": 5}
    assert after[0] == everyday | {"a": 6, CART: 7}
    assert after[1] == everyday | {"a": 6, CART: 7, "b": 8, LONG: 9}
    assert vocabulary(lake, "query").keys() == {LONG, *(f"größe {n}" for n in range(5))}

    rows = table(lake, "samples")
    for row in rows:
        # A date keeps the ids of its build: what was unknown then stays so until the date is built again.
        known = after[row["impression_date"] > DATES[0]]
        assert row["item_id_index"] == known.get(row["item_id"], 1)
        assert (row["query_index"] == 0) == (row["query"] is None)
        has_query = row["scenario"] in ("search", "image_search") and row["query"] not in (None, "")
        assert (row["query_index"] >= 2) == has_query
    assert {r["query_index"] for r in rows if r["scenario"] == "feed"} == {0}
    names = DeltaTable(str(lake / "samples")).to_pyarrow_table().column_names
    assert [n for n in names if n.endswith("_history_query_ids")] == [f"{s}_history_query_ids" for s in FIVE[:2]]
    check_labels(lake, FIVE)
    check_training(config, lake, tmp_path / "run", DATES)


def test_one_scenario_without_a_query_is_trained(tmp_path: Path) -> None:
    """tests/spark/test_logs_as_they_come.py builds some."""
    spec = samples_spec(scenarios=("feed",), query_scenarios=())
    write_samples(tmp_path / "lake", spec, num_rows=600, num_days=3)
    dates = [FIRST_DATE + dt.timedelta(days=n) for n in range(3)]
    check_training(config_of(("feed",)), tmp_path / "lake", tmp_path / "run", dates)


def test_hashed_ids_are_trained(hashed_lake: Path, tmp_path: Path) -> None:
    config = load_config(None, (*CONFIG, *SMALL_MODEL, *HASHED))
    check_training(config, hashed_lake, tmp_path / "run", [START.date() + dt.timedelta(days=n) for n in range(3)], 5)
