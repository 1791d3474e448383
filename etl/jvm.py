"""What Python reaches in Spark's JVM beside pyspark's own API: Hadoop's file systems, Parquet footers, Delta's log.

No other file reaches into it. Importing this starts nothing: a job's entry point has it before Spark is loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def take_installed_pyspark() -> None:
    """Under spark-submit let pyspark be that of this Python, where Spark itself is that one; before it is imported.

    spark-submit puts pyspark's archive first, of whose source Python keeps no byte code: each driver compiled it anew,
    and listed the archive again for each of its packages.
    """
    spark = Path(os.environ.get("SPARK_HOME") or os.devnull).resolve()
    if str(spark.parent) not in map(os.path.realpath, sys.path) or not (spark.parent / "py4j").is_dir():
        return
    for place in [p for p in sys.path if p.endswith((".zip", ".jar")) and spark in Path(p).resolve().parents]:
        sys.path.remove(place)
        sys.path_importer_cache.pop(place, None)


def print_error(line: str) -> None:
    """Write one line to the job's standard error, under spark-submit and without.

    spark-submit runs the Python driver with its stderr joined to stdout, so a line written there would come out on the
    wrong stream; the JVM's own stderr is the user's.
    """
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        from py4j.protocol import Py4JError
        from pyspark import SparkContext
        from pyspark.java_gateway import launch_gateway

        try:
            gateway = SparkContext._gateway or launch_gateway()  # connects to the JVM that started this driver
            gateway.jvm.System.err.println(line)
        except (Py4JError, OSError):
            pass  # the JVM has gone: this process's own stream is all there is
        else:
            return
    print(line, file=sys.stderr, flush=True)


def submitted_options() -> dict[str, str]:
    """The options of spark-submit, its defaults file included; none where Python starts the JVM itself."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        return {}
    from pyspark import SparkContext

    SparkContext._ensure_initialized()
    found = SparkContext._jvm.org.apache.spark.SparkConf().getAll()  # type: ignore[union-attr]
    return {pair._1(): pair._2() for pair in found}


def delta_jars_version(spark: SparkSession) -> str | None:
    """Version of the Delta jars on Spark's class path; None where there are none."""
    from py4j.protocol import Py4JJavaError

    jvm = _jvm(spark)
    try:
        jvm.org.apache.spark.util.Utils.classForName("io.delta.sql.DeltaSparkSessionExtension", True, False)
        return str(getattr(jvm, "io.delta.package$").__getattr__("MODULE$").VERSION())
    except Py4JJavaError:
        return None


def file_system(spark: SparkSession, path: str) -> tuple[Any, Any]:
    """Hadoop's file system of a path, and the path as Hadoop's."""
    hadoop = _jvm(spark).org.apache.hadoop.fs.Path(path)
    return hadoop.getFileSystem(hadoop_conf(spark)), hadoop


def json_texts(spark: SparkSession, folder: str) -> dict[str, str]:
    """Path -> text of the `.json` files of a folder, by name; none where there is no folder.

    Spark's own readers leave out, without a word, what begins with _ or a point.
    """
    system, path = file_system(spark, folder)
    found = {}
    for status in system.listStatus(path) if system.exists(path) else ():
        if status.getPath().getName().endswith(".json"):
            stream = system.open(status.getPath())
            try:
                found[str(status.getPath().toString())] = bytes(stream.readAllBytes()).decode("utf-8", "replace")
            finally:
                stream.close()
    return dict(sorted(found.items()))


def file_head(spark: SparkSession, file: str, size: int) -> bytes:
    """The first bytes of a file; of a packed one, unpacked."""
    system, hadoop = file_system(spark, file)
    stream = system.open(hadoop)
    if file.lower().endswith(".zst"):  # as Spark's own readers: Hadoop's codec is a native library
        stream = _jvm(spark).com.github.luben.zstd.ZstdInputStreamNoFinalizer(stream)
    else:
        codec = _jvm(spark).org.apache.hadoop.io.compress.CompressionCodecFactory(hadoop_conf(spark)).getCodec(hadoop)
        stream = stream if codec is None else codec.createInputStream(stream)
    try:
        return bytes(stream.readNBytes(size))
    finally:
        stream.close()


def knows_charset(spark: SparkSession, name: str) -> bool:
    """True where Java has an encoding of this name."""
    return bool(_jvm(spark).java.nio.charset.Charset.isSupported(name))


@contextmanager
def parquet_footer(spark: SparkSession, file: str) -> Iterator[Any]:
    """The footer (ParquetMetadata) of a Parquet file."""
    path, parquet = _jvm(spark).org.apache.hadoop.fs.Path(file), _jvm(spark).org.apache.parquet.hadoop
    reader = parquet.ParquetFileReader.open(parquet.util.HadoopInputFile.fromPath(path, hadoop_conf(spark)))
    try:
        yield reader.getFooter()
    finally:
        reader.close()


def parquet_schemas(spark: SparkSession, file: str) -> tuple[str, str]:
    """The schema of a Parquet file: as JSON of the types that Spark reads, and as Parquet's own text."""
    java = _jvm(spark)
    sources = java.org.apache.spark.sql.execution.datasources.parquet
    converter = sources.ParquetToSparkSchemaConverter(spark._jsparkSession.sessionState().conf())
    with parquet_footer(spark, file) as found:
        footer = java.org.apache.parquet.hadoop.Footer(java.org.apache.hadoop.fs.Path(file), found)
        spark_schema = sources.ParquetFileFormat.readSchemaFromFooter(footer, converter).json()
        return str(spark_schema), str(found.getFileMetaData().getSchema().toString())


def table_properties(spark: SparkSession, path: str) -> dict[str, str]:
    """Properties of a Delta table; unlike DESCRIBE and the history this needs no Spark job."""
    configuration = _delta_snapshot(spark, path).metadata().configuration().iterator()
    found = {}
    while configuration.hasNext():
        pair = configuration.next()
        found[pair._1()] = pair._2()
    return found


def table_version(spark: SparkSession, path: str) -> int:
    """Newest version of a Delta table, without a Spark job."""
    return int(_delta_snapshot(spark, path).version())


def hadoop_conf(spark: SparkSession) -> Any:
    """Hadoop's configuration: file systems and their credentials."""
    return spark.sparkContext._jsc.hadoopConfiguration()  # type: ignore[union-attr]


def delta_log(spark: SparkSession, path: str) -> Any:
    """The log of a Delta table."""
    return _jvm(spark).org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, path)


def _delta_snapshot(spark: SparkSession, path: str) -> Any:
    nothing = _jvm(spark).scala.Option.empty()
    return delta_log(spark, path).update(False, nothing, nothing)


def _jvm(spark: SparkSession) -> Any:
    jvm = spark.sparkContext._jvm
    assert jvm is not None  # a started session has one
    return jvm
