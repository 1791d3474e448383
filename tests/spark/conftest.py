"""One small Spark session for all tests of this folder; the JVM's options are those of cluster/spark/conf.

Plans are interpreted: compiling classes for plans of a hundred rows took a quarter of a build's processor time. Nor are
they adapted while they run, which makes a Spark job of every shuffle: 37 jobs a build instead of 65. Builds with
compiled and adapted plans, the product's, are those of the jobs in tests/e2e and in test_build_killed.py.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.lake.tables import Lake
from etl.session import build_spark
from tests.spark import killed_build
from tests.spark.shop import CONFIG, DAYS, MINUTE, START, Shop, logs_of, random_shop, write_logs
from usr_ray.config import load_config

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_logs"


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    options = {
        "spark.master": "local[2]",
        "spark.driver.memory": "1g",
        "spark.sql.shuffle.partitions": "2",
        "spark.log.level": "ERROR",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.files.minPartitionNum": "1",  # a task reads all files of a log
        "spark.buffer.pageSize": "256k",  # or each sort and hash map of a task begins with eight megabytes
    }
    session = build_spark("tests", options)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def example_lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All dates of examples/own_logs, every label final; to be read only."""
    path = tmp_path_factory.mktemp("example") / "lake"
    request = BuildRequest(
        logs=str(EXAMPLE),
        lake=Lake(str(path)),
        first=dt.date(2026, 3, 28),
        last=dt.date(2026, 3, 30),
        watermark=dt.datetime(2026, 4, 2, tzinfo=dt.UTC),
    )
    build_samples(spark, load_config(EXAMPLE / "own_logs.toml"), request, Progress(write=lambda line: None))
    return path


@pytest.fixture(scope="session")
def narrow_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of tests/spark/killed_build.py: two scenarios, no features."""
    return write_logs(logs_of(killed_build.worlds()[0]), tmp_path_factory.mktemp("narrow") / "logs")


@pytest.fixture(scope="session")
def narrow_lake(spark: SparkSession, narrow_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed build makes of them; to be read or copied only."""
    path = tmp_path_factory.mktemp("narrow") / "lake"
    killed_build.build(spark, narrow_logs, path)
    return path


@pytest.fixture(scope="session")
def wide_shop() -> Shop:
    """Three scenarios and features; without duplicates that are days apart, which a build on the state does not see."""
    shop = random_shop(5, num_impressions=150)
    for rows in (shop.world.impressions, shop.world.clicks, shop.world.orders):
        first: dict[str, int] = {}
        for row in rows:
            first[row["id"]] = min(row["time"], first.get(row["id"], row["time"]))
        rows[:] = [row for row in rows if row["time"] - first[row["id"]] < 12 * 60 * MINUTE]
    return shop


@pytest.fixture(scope="session")
def wide_logs(wide_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its logs; to be read or copied only."""
    return write_logs(logs_of(wide_shop), tmp_path_factory.mktemp("wide") / "logs")


@pytest.fixture(scope="session")
def wide_lake(spark: SparkSession, wide_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All dates of them, up to noon of the last, with vocabulary.min_count = 2; to be read or copied only."""
    path, first = tmp_path_factory.mktemp("wide") / "lake", START.date()
    request = BuildRequest(
        logs=str(wide_logs),
        lake=Lake(str(path)),
        first=first,
        last=first + dt.timedelta(days=DAYS - 1),
        watermark=killed_build.WATERMARK,
    )
    config = load_config(None, (*CONFIG, "vocabulary.min_count=2"))
    build_samples(spark, config, request, Progress(write=lambda line: None))
    return path
