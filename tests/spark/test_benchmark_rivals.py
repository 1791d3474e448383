"""The rivals of benchmarks/build_samples.py keep the contract: Spark SQL, DuckDB and the oracle agree on a small world.

Without this a rival could be fast because it does less.
"""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.lake.tables import Lake
from etl.sources.writer import CLICKS, IMPRESSIONS, ORDERS, TIMESTAMP
from tests.etl_oracle import Expected, Windows, World, expected
from usr_ray.config import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from build_samples_check import check_equal, files_of  # noqa: E402 - benchmarks is no package
from build_samples_sql import Query, export_vocabularies, run_duckdb, run_spark_sql  # noqa: E402

# tests/spark/test_build_samples.py holds our job to the oracle, and the benchmark holds the rivals to our job before it
# keeps a time.
pytestmark = [pytest.mark.spark, pytest.mark.slow]

SCENARIOS = ("search", "recommendation")
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
MINUTE, DAYS = 60_000_000, 3
WINDOWS = Windows(click=60 * MINUTE, order=24 * 60 * MINUTE, whole=60 * MINUTE)
WATERMARK = START + dt.timedelta(days=2, hours=20)
LENGTH = 3
CONFIG = load_config(
    ROOT / "jobs" / "configs" / "simulated.toml",
    (
        f"histories.length={LENGTH}",
        'data.train_dates=""',
        "limits.max_reject_share=1",
        "counters.defaults=true",
        'counters.windows=["1d", "7d", "all"]',
    ),
)
EVENT_SCHEMAS = {"impressions": IMPRESSIONS, "clicks": CLICKS, "orders": ORDERS}


def random_world(seed: int, size: int = 1500) -> World:
    """Wild clicks, equal times, repeated items, late news, exact and key duplicates; few users and items."""
    rng = np.random.default_rng(seed)
    world = World()

    def one(values: list) -> Any:
        return values[rng.integers(len(values))]

    users, items = [f"u{n}" for n in range(25)], [f"i{n}" for n in range(15)]
    for n in range(size):
        scenario = int(rng.integers(2))
        query = one(["tea", "größe", None, "red shoes"]) if scenario == 0 else None
        world.impression(
            f"n{n}", one(users), one(items), scenario, int(rng.integers(DAYS * 480)) * 3 * MINUTE, query=query
        )
    for n in range(size // 2):
        of, wild = one(world.impressions), rng.random() < 0.2
        time = of["time"] + int(one([0, 1, 30, 59, 60, 61, -1])) * MINUTE
        scenario = int(rng.integers(2)) if wild else of["scenario"]
        world.click(
            f"c{n}",
            one(users) if wild else of["user"],
            one(items) if wild else of["item"],
            scenario,
            time,
            one([of["id"], of["id"], None, "gone"]),
            known=time + int(one([0, 0, 0, 240])) * MINUTE,
        )
    for n in range(size // 3):
        of = one(world.clicks)
        time = of["time"] + int(one([0, 5, 600, 1439, 1440, 1441, -1])) * MINUTE
        world.order(f"o{n // 2}", of["user"], of["item"], time, known=time + int(one([0, 0, 500])) * MINUTE)
    for rows in (world.impressions, world.clicks, world.orders):
        rows += [dict(one(rows)) for _ in range(size // 40)]
        rows += [row | {"time": row["time"] + MINUTE, "known": row["known"] + MINUTE} for row in rows[: size // 50]]
    return world


def moments(micros: list[int]) -> pa.Array:
    start = int(START.timestamp()) * 1_000_000
    return pa.array([start + value for value in micros], pa.int64()).cast(TIMESTAMP)


def write_logs(world: World, folder: Path) -> Path:
    logs: dict[str, list[dict[str, Any]]] = {"orders": world.orders}
    for k, name in enumerate(SCENARIOS):
        logs[f"{name}_impressions"] = [row for row in world.impressions if row["scenario"] == k]
        logs[f"{name}_clicks"] = [row for row in world.clicks if row["scenario"] == k]
    keys = {"impressions": "impression_id", "clicks": "click_id", "orders": "order_id"}
    for log, rows in logs.items():
        kind = log.rpartition("_")[2]
        columns = {
            keys[kind]: [row["id"] for row in rows],
            "user_id": [row["user"] for row in rows],
            "item_id": [row["item"] for row in rows],
        }
        if kind == "impressions":
            columns |= {"query": [row["query"] for row in rows], "request_id": [None] * len(rows)}
            columns |= {"position": [len(row["id"]) for row in rows]}
        if kind == "clicks":
            columns |= {"impression_id": [row["names"] for row in rows]}
        times = {"event_time": moments([row["time"] for row in rows])}
        schema = EVENT_SCHEMAS[kind].append(pa.field("ingest_time", TIMESTAMP))
        times |= {"ingest_time": moments([row["known"] for row in rows])}
        (folder / log).mkdir(parents=True)
        pq.write_table(
            pa.table([columns.get(f.name, times.get(f.name)) for f in schema], schema=schema),
            folder / log / "rows.parquet",
        )
    users = [
        {"user_id": f"u{n}", "age_band": "x" if n % 3 else None, "city": f"c{n % 2}", "account_age_days": float(n)}
        for n in range(2, 30)
    ]
    items = [
        {"item_id": f"i{n}", "category_id": f"k{n % 4}", "brand_id": "b" if n % 2 else None, "price": n * 3.7 - 9}
        for n in range(1, 15)
    ]
    for name, table in (("users", users), ("items", items)):
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(table), folder / name / "rows.parquet")
    return folder


def test_spark_sql_duckdb_and_our_job_agree_with_the_oracle(spark: SparkSession, tmp_path: Path) -> None:
    world = random_world(3)
    logs = write_logs(world, tmp_path / "logs")
    first, last = START.date(), START.date() + dt.timedelta(days=DAYS - 1)
    request = BuildRequest(
        logs=str(logs), lake=Lake(str(tmp_path / "lake")), first=first, last=last, watermark=WATERMARK
    )
    build_samples(spark, CONFIG, request, Progress(write=lambda line: None))
    vocabularies = tmp_path / "vocabularies"
    export_vocabularies(tmp_path / "lake", vocabularies)
    tables = {"ours": tmp_path / "lake" / "samples", "spark_sql": tmp_path / "sql", "duckdb": tmp_path / "duckdb"}
    queries = {
        name: Query(logs, vocabularies, path, first.isoformat(), last.isoformat(), WATERMARK.isoformat())
        for name, path in tables.items()
    }
    session = spark.newSession()  # its views are its own
    run_spark_sql(session, queries["spark_sql"], CONFIG)
    session.catalog.clearCache()
    run_duckdb(queries["duckdb"], CONFIG, threads=2, memory="1GB")
    compared = check_equal(tables, {"duckdb": {"user_key", "request_key"}})
    assert "counters" not in compared["spark_sql"], "it has none"
    assert compared["duckdb"]["counters"] == len(CONFIG.every_counter) * 15 == 180
    want = expected(
        world, WINDOWS, num_scenarios=2, length=LENGTH, watermark=(WATERMARK - START) // dt.timedelta(microseconds=1)
    )
    assert {c["rows"] for c in compared.values()} == {len(want.samples)}
    ids = {(row["feature"], row["value"]): row["id"] for row in pq.read_table(vocabularies).to_pylist()}
    check_rows(pq.read_table(files_of(tables["duckdb"])).to_pylist(), want, ids)


def check_rows(rows: list[dict[str, Any]], want: Expected, ids: dict[tuple[str, str], int]) -> None:
    def code(feature: str, value: str | None) -> int:
        return 0 if value is None else ids.get((feature, value), 1)

    num_positives = 0
    for row in rows:
        expect = want.samples[row["impression_id"]]
        for name in ("is_click", "is_order", "is_click_global", "is_order_global", "is_mature"):
            assert row[name] == expect[name], (row["impression_id"], name)
        num_positives += row["is_order_global"] > row["is_order"]
        for scenario, events in zip(SCENARIOS, expect["histories"], strict=True):
            prefix = f"{scenario}_history"
            assert row[f"{prefix}_item_ids"] == [code("item_id", e[0]) for e in events], row["impression_id"]
            assert row[f"{prefix}_actions"] == [e[2] for e in events]
            assert row[f"{prefix}_ages_s"] == [float(np.float32(e[3] / 1e6)) for e in events]
        assert row["search_history_query_ids"] == [code("query", e[1]) for e in expect["histories"][0]]
    assert num_positives > 5
