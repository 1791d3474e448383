"""Rows of the samples to Parquet files of the table's folder, by Arrow, in Spark's Python workers.

Spark's own writer takes the histories one element a call, which was half of a build. What is written here belongs to
the table only once the driver has committed it (etl/build/commits.py): until then, and after a task or a build that
failed,
the files are orphans that VACUUM removes.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.build.sample_counts import add_counts, count_rows
from etl.kernel.events import Bools
from etl.kernel.rows import DayRows, RowPlan, day_rows
from usr_ray.config import date_of
from usr_ray.schema import ALL_LABELS, LABEL_ORDER, PARTITION_COLUMN, index_column

FILES = pa.schema(
    [
        ("path", pa.string()),
        ("date", pa.string()),
        ("size", pa.int64()),
        ("modified_ms", pa.int64()),
        ("num_rows", pa.int64()),
        ("stats", pa.string()),
        ("counts", pa.string()),
        ("broken", pa.string()),
    ]
)
"""One row a file; `path` is below the table's folder, `stats` is Delta's JSON, `counts` sums of the rows (JSON of
etl/build/sample_counts.py), `broken` a rule that rows break."""
STATISTICS = ("event_time", index_column("scenario"))
"""Columns whose least and greatest values Delta keeps for each file."""
_DISTINCT = ("impression_id", "request_id", "event_time", "click_time", "order_time", "request_key")
"""Columns with hardly a value twice: a dictionary of them is built in vain."""
_AGES = "_history_ages_s"


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePlan:
    """How files are written; travels with the task."""

    folder: str
    """Of the table, on a file system that every worker mounts."""
    compression: str
    row_group_rows: int


def broken_rule(batch: pa.RecordBatch) -> str | None:
    """The first rule of the table that a row breaks: a CHECK constraint (etl/lake/tables.py) or a null where none
    may be.
    """
    for column in batch.schema:
        if not column.nullable and batch.column(column.name).null_count:
            return f"{column.name} IS NOT NULL"
    labels = {name: batch.column(name).to_numpy() for name in ALL_LABELS}
    holds = {f"{name}_is_0_or_1": ((labels[name] == 0) | (labels[name] == 1)).all() for name in ALL_LABELS}
    holds |= {f"{low}_le_{high}": (labels[low] <= labels[high]).all() for low, high in LABEL_ORDER}
    return next((name for name, all_hold in holds.items() if not all_hold), None)


def write_sample_files(
    batches: Iterable[pa.RecordBatch], rows: RowPlan, schema: pa.Schema, plan: FilePlan
) -> Iterator[pa.RecordBatch]:
    """One file for each day of the rows, and its row of FILES.

    Args:
        batches: packs with their lookups, as for `day_rows`.
        rows: which rows.
        schema: columns of the table.
        plan: where and how.
    """
    files: dict[int, _File] = {}
    try:
        for some in day_rows(batches, rows):
            if some.day not in files:
                files[some.day] = _File(date_of(some.day), rows, schema, plan)
            files[some.day].add(some)
        for day in sorted(files):
            yield files[day].finish()
    finally:
        for file in files.values():
            file.give_up()


@dataclass(slots=True)
class _File:
    date: dt.date
    rows: RowPlan
    schema: pa.Schema
    plan: FilePlan
    name: str = ""
    num_rows: int = 0
    broken: str | None = None
    least: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    counts: dict[int, dict[str, Any]] = field(default_factory=dict)
    writer: pq.ParquetWriter | None = None
    held: list[DayRows] = field(default_factory=list)
    """Rows of the next row group, which wait until it is full: an Arrow writer makes one of each table it is given."""
    num_held: int = 0

    def __post_init__(self) -> None:
        self.name = f"{PARTITION_COLUMN}={self.date}/part-{uuid.uuid4()}.{self.plan.compression}.parquet"
        columns = [column for column in self.schema if column.name != PARTITION_COLUMN]
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        self.writer = pq.ParquetWriter(
            self._path,
            pa.schema(columns),
            compression=self.plan.compression,
            use_dictionary=_with_dictionary(columns),
            store_schema=False,
            write_page_checksum=True,
        )

    @property
    def _path(self) -> str:
        return f"{self.plan.folder}/{self.name}"

    def add(self, some: DayRows) -> None:
        self.held.append(some)
        self.num_held += some.rows.num_rows
        while self.num_held >= self.plan.row_group_rows:
            self._write(self.plan.row_group_rows)

    def _write(self, size: int) -> None:
        """Write the first `size` of the rows that are held, as a row group."""
        assert self.writer is not None  # until it is finished
        group, left = [], size
        while left:
            some = self.held.pop(0)
            num_rows = min(left, some.rows.num_rows)
            if num_rows < some.rows.num_rows:
                self.held.insert(0, some.slice(num_rows))
            for part in some.slice(0, num_rows).parts():
                batch = part.batch(self.rows, self.schema)
                self._look_at(batch, part.new)
                group.append(batch)
            left -= num_rows
        self.num_held -= size
        self.num_rows += size
        if not self.broken:  # else nothing of this will be committed
            self.writer.write_table(pa.Table.from_batches(group).drop_columns([PARTITION_COLUMN]), row_group_size=size)

    def _look_at(self, batch: pa.RecordBatch, new: dict[str, Bools | None]) -> None:
        """Check the rules and add up what Delta and the reports want to know."""
        self.broken = self.broken or broken_rule(batch)
        if self.broken:
            return
        for name in STATISTICS:
            least, most = (value.cast(pa.int64()).as_py() for value in pc.min_max(batch.column(name)).values())
            self.least[name] = min(least, self.least.get(name, least))
            self.most[name] = max(most, self.most.get(name, most))
        self.counts = add_counts([self.counts, count_rows(batch, self.rows.spec, new)])

    def finish(self) -> pa.RecordBatch:
        assert self.writer is not None  # until it is finished
        if self.num_held:
            self._write(self.num_held)
        self.writer.close()
        self.writer = None
        status = os.stat(self._path)
        row = {
            "path": self.name,
            "date": self.date.isoformat(),
            "size": status.st_size,
            "modified_ms": status.st_mtime_ns // 1_000_000,
            "num_rows": self.num_rows,
            "stats": json.dumps(self._stats()),
            "counts": json.dumps(self.counts),
            "broken": self.broken,
        }
        return pa.RecordBatch.from_pylist([row], schema=FILES)

    def give_up(self) -> None:
        """Remove a file that was not finished."""
        if self.writer is not None:
            with suppress(Exception):
                self.writer.close()
            with suppress(OSError):
                os.remove(self._path)

    def _stats(self) -> dict[str, object]:
        """Delta's statistics. Its times have milliseconds: both ends are cut, as its own writer does."""
        scenario = index_column("scenario")
        return {
            "numRecords": self.num_rows,
            **{
                key: {"event_time": _millis(ends["event_time"]), scenario: ends[scenario]}
                for key, ends in (("minValues", self.least), ("maxValues", self.most))
                if ends
            },
            "nullCount": dict.fromkeys(STATISTICS, 0),
        }


def _with_dictionary(columns: list[pa.Field]) -> list[str]:
    """Paths of the Parquet columns that repeat their values."""
    return [
        f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name
        for column in columns
        if column.name not in _DISTINCT and not column.name.endswith(_AGES) and not pa.types.is_boolean(column.type)
    ]


def _millis(micros: int) -> str:
    time = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=micros)
    return f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z"
