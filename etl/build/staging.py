"""Where a build keeps what the pass found until every check has passed: a folder of the lake's own storage.

Executors write it like any table, so that a lost one costs its tasks only and memory does not grow with the logs.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from etl.jvm import file_system
from etl.kernel.packs import EMITTED
from etl.lake.tables import Lake
from etl.session import literal_path

STAGING = "_staging"
_SCHEMA = from_arrow_schema(EMITTED)
_FILES = {
    "compression": "snappy",  # packs are compressed already
    "parquet.block.size": str(32 << 20),
    # A pack has megabytes: by default the writer would look at its memory after a hundred of them.
    "parquet.block.size.row.check.min": "1",
    "parquet.page.size.row.check.min": "1",
}
_STALE = dt.timedelta(days=1)
"""A folder of this age belongs to a build that was killed."""


@contextmanager
def staging_folder(spark: SparkSession, lake: Lake) -> Iterator[str]:
    """A new folder below the lake, removed at the end; those that killed builds left behind are removed too."""
    system, root = file_system(spark, lake.path(STAGING))
    now = dt.datetime.now(dt.UTC)
    if system.exists(root):
        for status in system.listStatus(root):
            if now.timestamp() - status.getModificationTime() / 1000 > _STALE.total_seconds():
                system.delete(status.getPath(), True)
    folder = f"{lake.path(STAGING)}/{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex}"
    try:
        yield folder
    finally:
        system.delete(file_system(spark, folder)[1], True)
        # A build that is refused leaves nothing behind, not even the folder of a lake that was not there.
        for path in (root, root.getParent()):
            if system.exists(path) and not len(system.listStatus(path)):
                system.delete(path, False)


def stage(frame: DataFrame, folder: str) -> None:
    """Write what the pass emits, each part into a folder of its own."""
    frame.write.partitionBy("part").options(**_FILES).parquet(folder)


def staged(spark: SparkSession, folder: str, *parts: str) -> DataFrame:
    """The rows of some parts; none where the pass emitted none."""
    return spark.read.schema(_SCHEMA).parquet(literal_path(folder)).filter(F.col("part").isin(*parts))
