"""One small Spark session for all tests of this folder; the JVM's options are those of cluster/spark/conf.

Plans are interpreted: compiling classes for plans of a hundred rows took a quarter of a build's processor time. Builds
with compiled plans, Spark's default, are those of the jobs in tests/e2e and in test_build_killed.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from etl.session import build_spark


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    options = {
        "spark.master": "local[2]",
        "spark.driver.memory": "1g",
        "spark.sql.shuffle.partitions": "2",
        "spark.log.level": "ERROR",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    }
    session = build_spark("tests", options)
    yield session
    session.stop()
