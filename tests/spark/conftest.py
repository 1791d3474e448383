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
from tests.spark.shop import logs_of, write_logs
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
