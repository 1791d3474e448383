"""The Delta table of probabilities: one model's, one commit a date, so that a date is there whole or not at all.

What is done is read from the table itself (row counts and the constant columns of its files), never from a note beside
it: rows that somebody deleted or restored are scored again, and a job that was killed leaves nothing to repair.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from usr_ray.config import UserError
from usr_ray.schema import PARTITION_COLUMN
from usr_ray.serving.model import GLOBAL_PROBABILITIES, PROBABILITIES

SCORES_SCHEMA = pa.schema(
    [
        pa.field("impression_id", pa.string(), nullable=False),
        pa.field("scenario", pa.string(), nullable=False),
        pa.field("event_time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field(PARTITION_COLUMN, pa.date32(), nullable=False),
        *(pa.field(name, pa.float32(), nullable=False) for name in PROBABILITIES),
        *(pa.field(name, pa.float32()) for name in GLOBAL_PROBABILITIES),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("model_step", pa.int64(), nullable=False),
        pa.field("table_version", pa.int64(), nullable=False),
    ]
)
"""Grain: one row a row of the samples table. Global probabilities are null for a model without GLMT."""


class ScoreError(UserError):
    """Rows that cannot be scored, or a table that scores cannot go to."""


@dataclass(frozen=True, slots=True)
class _File:
    date: dt.date
    num_rows: int | None
    model_ids: tuple[str | None, str | None]
    """Least and greatest; None where the table's log does not know."""
    model_steps: tuple[int | None, int | None]
    table_versions: tuple[int | None, int | None]


class ScoreTable:
    """The scores of one model.

    Args:
        path: of the table; created when it is absent or an empty directory.
        model_id: of export.model_id.
        model_step: of the checkpoint.

    Raises:
        ScoreError: something else is there, or the scores of another model.
    """

    def __init__(self, path: Path, *, model_id: str, model_step: int) -> None:
        from deltalake import DeltaTable

        self.path = path
        self.model_id = model_id
        if path.exists() and not DeltaTable.is_deltatable(str(path)) and (not path.is_dir() or any(path.iterdir())):
            raise ScoreError(f"--output {path}: is not empty and no Delta table; name another directory")
        # 'ignore': a table that is there stays as it is.
        self._table = DeltaTable.create(str(path), SCORES_SCHEMA, mode="ignore", partition_by=[PARTITION_COLUMN])
        names = [field.name for field in self._table.schema().fields]
        if names != SCORES_SCHEMA.names:
            raise ScoreError(f"--output {path}: is a Delta table, but not of scores; name another directory")
        for file in self._files():
            if file.model_ids != (model_id, model_id):
                raise ScoreError(
                    f"--output {path}: holds scores of another model (checkpoint of step {file.model_steps[0]}, id "
                    f"{file.model_ids[0]}), this one is of step {model_step}, id {model_id}; name another --output, "
                    "or delete that table first"
                )

    def dates(self) -> set[dt.date]:
        """Dates that have rows."""
        return {file.date for file in self._files()}

    def is_done(self, date: dt.date, *, table_version: int, num_rows: int) -> bool:
        """True when the table holds `num_rows` scores of `date`, all of that version of the samples table."""
        files = [file for file in self._files() if file.date == date]
        return (
            bool(files)
            and all(file.table_versions == (table_version, table_version) for file in files)
            and sum(file.num_rows or 0 for file in files) == num_rows
        )

    def write_date(self, date: dt.date, batches: Iterable[pa.RecordBatch]) -> None:
        """Put `batches` in place of the rows of `date`, in one commit after the last of them.

        An exception of `batches` comes out as it is, and nothing is committed.
        """
        from deltalake import write_deltalake

        failures: list[BaseException] = []

        def watched() -> Iterator[pa.RecordBatch]:
            try:
                yield from batches
            except BaseException as error:  # Delta's writer would make its own error of it, without the type
                failures.append(error)
                raise

        reader = pa.RecordBatchReader.from_batches(SCORES_SCHEMA, watched())
        try:
            write_deltalake(
                str(self.path), reader, mode="overwrite", predicate=_is_date(date), partition_by=[PARTITION_COLUMN]
            )
        except Exception as error:
            raise (failures[0] if failures else error) from None

    def remove_date(self, date: dt.date) -> None:
        """Delete the rows of `date`."""
        self._table.update_incremental()
        self._table.delete(_is_date(date))

    def _files(self) -> list[_File]:
        self._table.update_incremental()
        adds: list[dict[str, Any]] = pa.table(self._table.get_add_actions(flatten=True)).to_pylist()

        def ends(add: dict[str, Any], name: str) -> tuple[Any, Any]:
            return add.get(f"min.{name}"), add.get(f"max.{name}")

        return [
            _File(
                date=add[f"partition.{PARTITION_COLUMN}"],
                num_rows=add.get("num_records"),
                model_ids=ends(add, "model_id"),
                model_steps=ends(add, "model_step"),
                table_versions=ends(add, "table_version"),
            )
            for add in adds
        ]


def _is_date(date: dt.date) -> str:
    return f"{PARTITION_COLUMN} = '{date.isoformat()}'"
