"""A Parquet log is many files, written on many days: the columns that are read must be the same in all of them.

Spark takes the schema of some file for all: a column that another file lacks would be null there without a word, and
one of another type fails in the middle of the build.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pyspark.sql import SparkSession

from etl.checks import DataCheckError
from etl.jvm import data_files, parquet_footer

MISSING = "missing"
_THREADS = 16
_COLUMN = re.compile(
    r"^ {2}(?:required|optional|repeated) (\S+) ([^;({]+?)(?: \((.+)\))?(?: = \d+)?(?:;| \{)$", re.MULTILINE
)
_SAME = {"int96": "timestamp", "STRING": "string", "UTF8": "string"}


def check_same_columns(spark: SparkSession, log: str, paths: Sequence[str], columns: Iterable[str]) -> None:
    """Every file of the log has these columns in one type, or none of them has the column.

    Args:
        spark: the session; the driver reads the files' footers.
        log: named in the message.
        paths: files, or folders of files.
        columns: what will be read.

    Raises:
        DataCheckError: naming the first column that differs, and a file of each kind.
    """
    files = sorted(file for path in paths for file in _parquet_files(spark, path))
    if len(files) < 2:
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        schemas = list(pool.map(lambda file: column_kinds(_schema_text(spark, file)), files))
    for column in sorted(set(columns)):
        kinds = [schema.get(column.lower(), MISSING) for schema in schemas]
        counts = Counter(kinds)
        if len(counts) > 1:
            (usual, _), (other, num_files) = counts.most_common(2)
            raise DataCheckError(
                f"log {log}: column '{column}' is {other} in {files[kinds.index(other)]} ({num_files} of {len(files)} "
                f"files) and {usual} in {files[kinds.index(usual)]}; write the odd files again, so that all of the log "
                "agree"
            )


def column_kinds(schema: str) -> dict[str, str]:
    """Lower-case name -> type of each top-level column of a Parquet schema (text); what Spark reads alike is one."""
    found = {}
    for physical, name, logical in _COLUMN.findall(schema):
        kind = logical if logical and physical != "group" else physical
        if kind.startswith("TIMESTAMP"):  # etl/logs/parquet_times.py divides nanoseconds, of all files or of none
            kind = "timestamp in nanoseconds" if "NANOS" in kind else "timestamp"
        found[name.lower()] = _SAME.get(kind, kind)
    return found


def _parquet_files(spark: SparkSession, path: str) -> list[str]:
    return [str(file) for file in data_files(spark, path) if file.getName().endswith(".parquet")]


def _schema_text(spark: SparkSession, file: str) -> str:
    with parquet_footer(spark, file) as footer:
        return str(footer.getFileMetaData().getSchema().toString())
