"""The columns of a Parquet log, from its first file's footer, without a Spark job.

And its times in nanoseconds, as pandas writes them: Spark has no such type and gives the bare number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl.jvm import data_files, footer_schema, parquet_footer


def first_schema(spark: SparkSession, paths: Sequence[str]) -> T.StructType | None:
    """The schema that Spark would find, which asks an executor for the footer of one file; None where there is no file.

    That all files agree is checked elsewhere (etl/logs/drift.py).
    """
    file = _first_file(spark, paths)
    return None if file is None else T.StructType.fromJson(json.loads(footer_schema(spark, file)))


def with_instants(spark: SparkSession, raw: DataFrame, paths: Sequence[str]) -> DataFrame:
    """`raw` with every nanosecond column as a timestamp, cut to whole microseconds; without a zone, as timestamp_ntz.

    What a bigint is stands in the files alone: the first one's footer is read when `raw` has a bigint at all. Needs
    spark.sql.legacy.parquet.nanosAsLong (etl/session.py).
    """
    if not any(isinstance(field.dataType, T.LongType) for field in raw.schema):
        return raw
    instants = {}
    for name, has_zone in _nanosecond_columns(spark, paths).items():
        if name in raw.columns:
            own = "`" + name.replace("`", "``") + "`"
            instant = F.timestamp_micros(F.expr(f"{own} div 1000"))
            instants[name] = instant if has_zone else instant.cast("timestamp_ntz")
    return raw.withColumns(instants) if instants else raw


def _nanosecond_columns(spark: SparkSession, paths: Sequence[str]) -> dict[str, bool]:
    """Top-level TIMESTAMP(NANOS) columns of the first file below `paths` -> whether it names instants."""
    file = _first_file(spark, paths)
    if file is None:
        return {}
    with parquet_footer(spark, file) as footer:
        fields = footer.getFileMetaData().getSchema().getFields()
        kinds = {field.getName(): str(field.getLogicalTypeAnnotation()) for field in fields}
    return {name: kind.endswith(",true)") for name, kind in kinds.items() if kind.startswith("TIMESTAMP(NANOS")}


def _first_file(spark: SparkSession, paths: Sequence[str]) -> Any:
    return next((file for path in paths for file in data_files(spark, path)), None)
