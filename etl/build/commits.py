"""Files that Python workers have written become part of a Delta table: one transaction through Delta's own code.

Delta checks conflicts with other writers, the protocol and the table's properties as for a write of its own; what it
cannot check are the rows, which etl/build/sample_files.py does.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from delta import exceptions as delta_exceptions
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema

from etl.build.sample_counts import named_counts
from etl.build.sample_files import FILES, FilePlan, write_sample_files
from etl.checks import DataCheckError
from etl.features.encoding import sample_frame
from etl.jvm import delta_log, table_properties, table_version
from etl.kernel.rows import RowPlan
from etl.lake.tables import (
    any_date_condition,
    label_constraints,
    replace_dates,
    samples_schema,
)
from usr_ray.schema import PARTITION_COLUMN

_CONSTRAINT = "delta.constraints."
_CONFLICTS = (  # in Java they have a class in common, in Python they have not
    delta_exceptions.DeltaConcurrentModificationException,
    delta_exceptions.ConcurrentWriteException,
    delta_exceptions.MetadataChangedException,
    delta_exceptions.ProtocolChangedException,
    delta_exceptions.ConcurrentAppendException,
    delta_exceptions.ConcurrentDeleteReadException,
    delta_exceptions.ConcurrentDeleteDeleteException,
    delta_exceptions.ConcurrentTransactionException,
)


def replace_samples(
    spark: SparkSession, path: str, encoded: DataFrame, plan: RowPlan, dates: Sequence[dt.date]
) -> tuple[int, list[dict[str, Any]] | None]:
    """Replace the samples of some dates, in one commit.

    Args:
        spark: the session.
        path: of the samples table.
        encoded: packs with their lookups (etl/features/encoding.py).
        plan: what is written; its days are those of `dates`.
        dates: whose rows are replaced.

    Returns:
        The table's new version, and sums of what was written, a row a date and scenario
        (etl/build/sample_counts.py); None
        where Spark has written it, who counts nothing.

    Raises:
        DataCheckError: another job has changed these dates meanwhile, or a row breaks a rule of the table. Nothing has
            changed.
    """
    condition = any_date_condition(PARTITION_COLUMN, dates)
    if not _takes_files(path, table_properties(spark, path)):
        replace_dates(sample_frame(encoded, plan), path, condition)
        return table_version(spark, path), None
    replacement = Replacement(spark, path, condition)
    schema = to_arrow_schema(samples_schema(plan.spec), timezone="UTC")
    files = FilePlan(
        folder=path,
        compression=str(spark.conf.get("spark.sql.parquet.compression.codec")),
        row_group_rows=int(str(spark.conf.get("spark.hadoop.parquet.block.row.count.limit"))),
    )

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return write_sample_files(batches, plan, schema, files)

    written = encoded.mapInArrow(run, from_arrow_schema(FILES)).collect()
    for file in written:
        if file["broken"]:
            raise DataCheckError(
                f"{path}: rows of {file['date']} break the table's rule {file['broken']}: a fault of the ETL, not of "
                "the logs; no date was changed: please report this"
            )
    counts = named_counts(((file["date"], file["counts"]) for file in written), plan.spec.scenarios)
    return replacement.commit(written), counts


def _takes_files(path: str, properties: dict[str, str]) -> bool:
    """True where workers may write the files themselves: a mounted folder, and a table without rules that are not ours.

    A CHECK that somebody has added is one that only Spark's writer enforces.
    """
    rules = {key.lower() for key in properties if key.lower().startswith(_CONSTRAINT)}
    return "://" not in path and rules <= {f"{_CONSTRAINT}{name}".lower() for name in label_constraints()}


class Replacement:
    """A transaction that replaces the dates of a condition by files; it conflicts with whoever changes them meanwhile.

    It begins, with what the table holds, when the object is made: before the files are written.
    """

    def __init__(self, spark: SparkSession, path: str, condition: str) -> None:
        self._spark, self._path, self._condition = spark, path, condition
        jvm = spark.sparkContext._jvm
        assert jvm is not None  # a started session has one
        self._jvm = jvm
        self._transaction = delta_log(spark, path).startTransaction()
        predicate = spark._jsparkSession.sessionState().sqlParser().parseExpression(condition)
        self._replaced = self._transaction.filterFiles(self._seq([predicate]), False)

    def commit(self, files: Sequence[Row]) -> int:
        """Commit rows of FILES; the table's new version.

        Raises:
            DataCheckError: another writer has changed the dates, or the table, since this began. Nothing has changed.
        """
        actions = self._jvm.java.util.ArrayList()
        replaced = self._replaced.iterator()
        while replaced.hasNext():
            actions.add(replaced.next().remove())
        parse = self._jvm.org.apache.spark.sql.delta.actions.Action.fromJson
        for file in files:
            actions.add(parse(_add_action(file)))
        some, none = self._jvm.scala.Option.apply, self._jvm.scala.Option.empty
        mode = self._jvm.org.apache.spark.sql.SaveMode.Overwrite
        columns = some(self._seq([PARTITION_COLUMN]))
        operation = getattr(self._jvm.org.apache.spark.sql.delta, "DeltaOperations$Write")(
            mode, columns, some(self._condition), *(none() for _ in range(6))
        )
        try:
            return int(self._transaction.commit(self._jvm.PythonUtils.toSeq(actions), operation))
        except _CONFLICTS as error:
            raise DataCheckError(
                f"{self._path}: another job has changed this table since this build began ({type(error).__name__}); "
                "nothing of it was overwritten: let the other one end, and build again"
            ) from error

    def _seq(self, values: list[Any]) -> Any:
        return self._jvm.PythonUtils.toSeq(values)


def _add_action(file: Row) -> str:
    # A name is of digits, letters and .=-_ alone, so that Delta's URL encoding leaves it as it is.
    return json.dumps(
        {
            "add": {
                "path": file["path"],
                "partitionValues": {PARTITION_COLUMN: file["date"]},
                "size": file["size"],
                "modificationTime": file["modified_ms"],
                "dataChange": True,
                "stats": file["stats"],
            }
        }
    )
