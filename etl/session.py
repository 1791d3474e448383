"""The Spark session: the only place that sets Spark or Delta options."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from py4j.java_gateway import JavaPackage
from pyspark import StorageLevel
from pyspark.errors import PySparkRuntimeError
from pyspark.sql import DataFrame, SparkSession

from etl.jvm import delta_jars_version, submitted_options
from usr_ray.config import UserError

PYSPARK_VERSION = "4.2"
DELTA_PACKAGE = "io.delta:delta-spark_4.2_2.13:4.4.0"
MIN_JAVA = 17
CHUNK_BATCH_ROWS = 32_768
"""Rows of one Arrow batch between Spark and the Python pass."""
ROW_GROUP_ROWS = 131_072
"""Rows of a Parquet row group, at most: the smallest unit a trainer reads."""
ROW_GROUP_BYTES = 256 << 20
"""Bytes of a row group, at most; wide enough for ROW_GROUP_ROWS rows with full histories."""

MIN_FILE_BYTES, MAX_FILE_BYTES = 128 << 20, 512 << 20
"""OPTIMIZE merges files of a date below the one size into files of up to the other."""
CHUNK_BATCH_BYTES = 32 << 20
"""About the bytes of one of those Arrow batches: a pack of the second pass is one row of some megabytes."""

_ASKED_FOR = ("functions", "org.apache.spark.sql.functions", "PythonUtils", "org.apache.spark.sql.classic.SparkSession")

_PACKAGES = ("org", "java", "io", "scala")

_SHIPPED = ("etl/**/*.py", *(f"usr_ray/{name}.py" for name in ("__init__", "schema", "daily_sums", "config/*")))
"""What the Python workers need of this package."""

REQUIRED = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.legacy.parquet.nanosAsLong": "true",  # etl/logs/formats.py makes timestamps of them
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",  # a folder shop=007 says 007, not 7
    "spark.sql.legacy.javaCharsets": "true",  # else windows-1252 is refused (logs.<log>.encoding)
    "spark.databricks.delta.properties.defaults.enableDeletionVectors": "false",
    "spark.databricks.delta.properties.defaults.columnMapping.mode": "none",
}
"""What the tables mean depends on these."""
DEFAULTS = {
    "spark.sql.adaptive.enabled": "true",
    "spark.sql.autoBroadcastJoinThreshold": str(32 << 20),
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(CHUNK_BATCH_ROWS),
    "spark.sql.execution.arrow.maxBytesPerBatch": str(CHUNK_BATCH_BYTES),
    "spark.sql.parquet.compression.codec": "zstd",
    # A task keeps fewer files open than this, one a date or part; from then on Spark sorts its rows first.
    "spark.sql.maxConcurrentOutputFileWriters": "8",
    # A small table that a task looks up takes a whole page of the heap, and Spark's own choice is 64 MB: a build has a
    # dozen of them at once.
    "spark.buffer.pageSize": "4m",
    # The share of the heap that Spark sorts in before it spills. Parquet's writer has no such bound: the files that a
    # task has open hold up to ROW_GROUP_ROWS rows each, some 400 MB, and the lookups of a chunk come on top.
    "spark.memory.fraction": "0.4",
    # A chunk's lookups are one list of some megabytes, and Spark would hold those of 128 chunks before it sorts.
    "spark.sql.objectHashAggregate.sortBased.fallbackThreshold": "1",
    # Options of a DataFrameWriter do not reach Delta's Parquet files, and OPTIMIZE has none: so they stand here.
    "spark.hadoop.parquet.block.row.count.limit": str(ROW_GROUP_ROWS),
    "spark.hadoop.parquet.block.size": str(ROW_GROUP_BYTES),
    "spark.databricks.delta.optimize.minFileSize": str(MIN_FILE_BYTES),
    "spark.databricks.delta.optimize.maxFileSize": str(MAX_FILE_BYTES),
    # Delta's own check knows one week and no runs; etl/lake/maintain.py knows who still needs a file.
    "spark.databricks.delta.retentionDurationCheck.enabled": "false",
    # The files of a version in its .crc as well: this Delta never reads them, and a Spark job a commit collects them.
    "spark.databricks.delta.allFilesInCrc.enabled": "false",
    # Or every call on a column asks the JVM several times more, to name the line of Python in an error's text.
    "spark.python.sql.dataFrameDebugging.enabled": "false",
    "spark.sql.dataFrameQueryContext.enabled": "false",
    "spark.log.level": "WARN",
    "spark.ui.showConsoleProgress": "false",
}
"""What `--conf` of spark-submit may change."""
LOCAL_DEFAULTS = {
    "spark.sql.shuffle.partitions": "4",
    "spark.databricks.delta.snapshotPartitions": "1",
    # VACUUM lists a table's folders in this many tasks, however few there are; Spark's default is 10,000.
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "8",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.ui.enabled": "false",
    # What that UI would show of the last thousand plans: the collector walks through it again and again.
    "spark.sql.ui.retainedExecutions": "10",
    "spark.ui.retainedJobs": "100",
    "spark.ui.retainedStages": "100",
    "spark.sql.ui.explainMode": "simple",
}
"""One machine: few partitions, and nothing listens beyond the loopback (Spark's UI heeds only SPARK_LOCAL_IP)."""


def build_spark(app_name: str, options: Mapping[str, str] | None = None) -> SparkSession:
    """The session of a job, under spark-submit or plain Python.

    Args:
        options: further Spark options; they win over the ones here.

    Raises:
        UserError: JDK, pyspark, delta-spark or the Delta jars are missing or of another version.
    """
    _check_packages()
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        _check_java(_java_version())
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(app_name)
    submitted = submitted_options()
    master = (options or {}).get("spark.master", submitted.get("spark.master", "local[*]"))
    defaults = DEFAULTS | (LOCAL_DEFAULTS if master.startswith("local") else {})
    for key, value in (defaults | submitted | REQUIRED | dict(options or {})).items():
        builder = builder.config(key, value)
    try:
        spark = builder.getOrCreate()
    except PySparkRuntimeError as error:
        raise UserError(
            f"spark: the JVM did not start ({error.getCondition()}); check JAVA_HOME and its memory"
        ) from error
    spark.sparkContext.setLogLevel("WARN")
    _check_delta(spark)
    _know_classes(spark)
    _ship_code(spark)
    return spark


def literal_path(path: str) -> str:
    """A path for Spark's readers, which would take the signs of a glob in a name for one."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", path)


def kept(frame: DataFrame) -> DataFrame:
    """The frame, computed once and then read back.

    On one machine its plan is cut off too: planning costs more than the rows of a small run, and no executor can be
    lost. On a cluster it is persisted, so that a lost part is computed again.
    """
    if str(frame.sparkSession.conf.get("spark.master")).startswith("local"):
        return frame.localCheckpoint()
    return frame.persist(StorageLevel.MEMORY_AND_DISK)


def _check_packages() -> None:
    for package, needed in (("pyspark", PYSPARK_VERSION), ("delta-spark", DELTA_PACKAGE.rpartition(":")[2])):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "none"
        if found != needed and not found.startswith(f"{needed}."):
            raise UserError(f"{package}: found {found}, needed {needed}; run: pip install '{package}=={needed}.*'")


def _java_version() -> str:
    """What `java -version` says, '' where there is no java."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if not java or not Path(java).exists():
        return ""
    return subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr


def _check_java(text: str) -> None:
    match = re.search(r'version "(\d+)(?:\.(\d+))?', text)
    # Java 8 and older call themselves 1.8.
    version = int(match[2] if match and match[1] == "1" and match[2] else match[1]) if match else 0
    if version < MIN_JAVA:
        found = f"Java {version}" if version else "none"
        raise UserError(f"java: found {found}, needed JDK {MIN_JAVA} or newer; install it and point JAVA_HOME to it")


def _know_classes(spark: SparkSession) -> None:
    """Look up once the classes that pyspark, Delta and etl/jvm.py ask for again and again.

    py4j keeps none of them: one named without its package is looked for in every imported package and jar, and of one
    named with it so is every part of the name (`org`, `org.apache` ..). An eighth of the driver's time in a build of a
    few rows, and a twentieth.
    """
    view = spark.sparkContext._jvm
    for name in _ASKED_FOR:
        setattr(view, name, getattr(view, name))
    for name in _PACKAGES:
        setattr(view, name, _Package(name, view._gateway_client, jvm_id=view._id))  # type: ignore[union-attr]


class _Package(JavaPackage):
    """A package of the JVM that asks for each of its members once."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if type(found) is JavaPackage:
            found = _Package(found._fqn, self._gateway_client, jvm_id=self._jvm_id)
        setattr(self, name, found)
        return found


def _check_delta(spark: SparkSession) -> None:
    needed = DELTA_PACKAGE.rpartition(":")[2]
    way_out = f"run `make setup`, or spark-submit with `--packages {DELTA_PACKAGE}`"
    found = delta_jars_version(spark)
    if found is None:
        spark.stop()
        raise UserError(f"delta: its jars are not on Spark's class path, needed {needed}; {way_out}")
    if found != needed:
        raise UserError(f"delta: found jars of version {found}, needed {needed}; {way_out}")


def _ship_code(spark: SparkSession) -> None:
    """Give this package to the Python workers, so that executors need numpy and pyarrow but no installation of ours."""
    if getattr(spark.sparkContext, "_usr_ray_shipped", False):
        return
    root = Path(__file__).resolve().parent.parent
    folder = Path(tempfile.mkdtemp(prefix="usr-ray-"))
    archive = folder / "usr_ray_etl.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        for path in sorted(p for pattern in _SHIPPED for p in root.glob(pattern)):
            bundle.write(path, path.relative_to(root).as_posix())
    spark.sparkContext.addPyFile(str(archive))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # executors fetch the file when they start
    spark.sparkContext._usr_ray_shipped = True  # type: ignore[attr-defined]
