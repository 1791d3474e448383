"""`<lake>/reports`: one JSON file a date, whole or not at all, on any file system Spark knows."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

from etl.lake.tables import Lake
from usr_ray.schema import REPORTS


def write_report(spark: SparkSession, lake: Lake, name: str, report: Mapping[str, Any]) -> None:
    """Write `<lake>/reports/<name>.json`: whole or not at all."""
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path = f"{lake.path(REPORTS)}/{name}.json"
    if "://" not in path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        return
    context = spark.sparkContext
    hadoop = context._jvm.org.apache.hadoop.fs  # type: ignore[union-attr]
    target = hadoop.Path(path)
    system = target.getFileSystem(context._jsc.hadoopConfiguration())  # type: ignore[union-attr]
    stream = system.create(target, True)  # object stores show a file once its stream is closed
    stream.write(bytearray(text.encode("utf-8")))
    stream.close()


def read_reports(spark: SparkSession, lake: Lake) -> dict[str, dict[str, Any]]:
    """Date -> report, of every date built so far."""
    try:
        # A filter, not a pattern in the path: for that Spark warns, with a stack, that it cannot look the folder up.
        rows = spark.read.option("pathGlobFilter", "*.json").text(lake.path(REPORTS), wholetext=True).collect()
    except AnalysisException:  # no such folder
        return {}
    reports = [json.loads(row[0]) for row in rows]
    return {report["date"]: report for report in sorted(reports, key=lambda r: r["date"])}
