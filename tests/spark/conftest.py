"""One small Spark session for all tests of this folder; the JVM's options are those of cluster/spark/conf.

Plans are interpreted: compiling classes for plans of a hundred rows took a quarter of a build's processor time. Nor are
they adapted while they run, which makes a Spark job of every shuffle: 37 jobs a build instead of 65. Builds with
compiled and adapted plans, the product's, are those of the jobs in tests/e2e and in test_build_killed.py.
"""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.lake.tables import Lake
from etl.session import build_spark
from tests.spark import killed_build
from tests.spark.shop import CONFIG, START, Shop, logs_of, write_logs
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
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": "2",  # tasks of a VACUUM's listing
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
def wide_shop() -> Shop:
    """Three scenarios and features."""
    return killed_build.worlds()[0]


@pytest.fixture(scope="session")
def wide_logs(wide_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its logs; to be read or copied only."""
    return write_logs(logs_of(wide_shop), tmp_path_factory.mktemp("wide") / "logs")


@pytest.fixture(scope="session")
def late_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the same shop some days later; to be read only."""
    return write_logs(logs_of(killed_build.worlds()[1]), tmp_path_factory.mktemp("late") / "logs")


@pytest.fixture(scope="session")
def narrow_lake(spark: SparkSession, wide_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed build makes of two of its scenarios, without features; to be read or copied only."""
    path = tmp_path_factory.mktemp("narrow") / "lake"
    killed_build.build(spark, wide_logs, path)
    return path


@dataclass(frozen=True)
class Restated:
    """A lake after a restatement, and what that said."""

    lake: Path
    touched: dict[str, list[str]]
    lines: list[str]


@pytest.fixture(scope="session")
def restated(
    spark: SparkSession, narrow_lake: Path, late_logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Restated:
    """The narrow lake restated from the late logs; to be read or copied only."""
    lake = Path(shutil.copytree(narrow_lake, tmp_path_factory.mktemp("restated") / "lake"))
    lines: list[str] = []
    return Restated(lake, killed_build.restate(spark, late_logs, lake, Progress(write=lines.append)), lines)


def build_wide(
    spark: SparkSession, logs: Path, lake: Path, *overrides: str, first: int = 0, last: int = 3
) -> list[str]:
    """Build days first..last of the wide shop, up to noon of the last; what the job said."""
    day, lines = START.date(), list[str]()
    request = BuildRequest(
        logs=str(logs),
        lake=Lake(str(lake)),
        first=day + dt.timedelta(days=first),
        last=day + dt.timedelta(days=last),
        watermark=killed_build.WATERMARK,
    )
    build_samples(spark, load_config(None, (*CONFIG, *overrides)), request, Progress(write=lines.append))
    return lines


@pytest.fixture(scope="session")
def wide_lake(spark: SparkSession, wide_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All dates of them, with vocabulary.min_count = 2; to be read or copied only."""
    path = tmp_path_factory.mktemp("wide") / "lake"
    build_wide(spark, wide_logs, path, "vocabulary.min_count=2")
    return path


HASHED = ("vocabulary.kind='hash'", "vocabulary.num_buckets=9")
"""Fewer buckets than items, so that some share an id."""


@pytest.fixture(scope="session")
def hashed_lake(spark: SparkSession, wide_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All dates of them; to be read or copied only."""
    path = tmp_path_factory.mktemp("hashed") / "lake"
    build_wide(spark, wide_logs, path, *HASHED)
    return path
