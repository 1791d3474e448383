"""LogWriter: logs as Parquet folders, all of them or none."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from usr_ray.config import Config, UserError

MARKER = "_ingest.json"
"""Written beside the logs: source, configuration and counts. Only a folder that has it may be overwritten."""
ROWS_PER_FILE = 1 << 20
_BLOCK_BYTES = 1 << 25
_PROGRESS_EVERY = 2_000_000
TIMESTAMP = pa.timestamp("us", tz="UTC")

_EVENT = [("user_id", pa.string()), ("item_id", pa.string()), ("event_time", TIMESTAMP)]
IMPRESSIONS = pa.schema(
    [
        ("impression_id", pa.string()),
        ("request_id", pa.string()),
        *_EVENT,
        ("position", pa.int32()),
        ("query", pa.string()),
    ]
)
CLICKS = pa.schema([("click_id", pa.string()), ("impression_id", pa.string()), *_EVENT])
ORDERS = pa.schema([("order_id", pa.string()), *_EVENT])
USERS = pa.schema([("user_id", pa.string())])
ITEMS = pa.schema([("item_id", pa.string())])
TRUTH = pa.schema([("impression_id", pa.string()), ("p_click", pa.float64()), ("p_order", pa.float64())])
NEEDS = pa.schema([("user_id", pa.string()), ("born_time", TIMESTAMP), ("end_time", TIMESTAMP)])
CEILINGS = pa.schema([("scenario", pa.string()), ("task", pa.string())])
SIDE_TABLES = {"truth": TRUTH, "needs": NEEDS, "ceilings": CEILINGS}
"""What only the simulated source writes, beside its logs."""


def log_schema(log: str) -> pa.Schema:
    """The columns that every log of this name has; KeyError for a name that no log has."""
    for ending, schema in (("_impressions", IMPRESSIONS), ("_clicks", CLICKS), ("_orders", ORDERS)):
        if log.endswith(ending):
            return schema
    return {"orders": ORDERS, "users": USERS, "items": ITEMS, **SIDE_TABLES}[log]


class LogWriter:
    """Collects logs in a temporary folder beside `logs_dir` and renames it there on `commit`.

    Use it as a context manager: leaving without `commit` (an error, Ctrl-C) removes the temporary folder, so a failed
    ingest leaves nothing half-written.

    Raises:
        UserError: `logs_dir` is a file, or has files and `overwrite` is off, or was not written by a LogWriter.
    """

    def __init__(self, logs_dir: Path, *, overwrite: bool = False) -> None:
        self.logs_dir = logs_dir.resolve()
        self.num_rows: dict[str, int] = {}
        self._check_target(overwrite)
        self._buffers: dict[str, list[pa.Table]] = {}
        self._num_files: dict[str, int] = {}
        try:
            self.logs_dir.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self.logs_dir.name}-", dir=self.logs_dir.parent))
        except OSError as error:
            raise UserError(f"--logs {logs_dir}: cannot be written ({error.strerror}); name another folder") from error

    def _check_target(self, overwrite: bool) -> None:
        if not self.logs_dir.exists():
            return
        if not self.logs_dir.is_dir():
            raise UserError(f"--logs {self.logs_dir}: is a file; name a folder")
        if not any(self.logs_dir.iterdir()):
            return
        if not overwrite:
            raise UserError(f"--logs {self.logs_dir}: is not empty; name a new folder or add --overwrite")
        if not (self.logs_dir / MARKER).exists():
            raise UserError(
                f"--logs {self.logs_dir}: --overwrite replaces only folders written by ingest_logs and this one has "
                f"no {MARKER}; remove it yourself or name a new folder"
            )

    def append(self, log: str, columns: Mapping[str, Any] | pa.Table) -> None:
        """Add rows to a log. The columns of `log_schema` are cast to their types; further columns keep theirs.

        Args:
            log: for example "search_clicks" or "users".
            columns: one array a column; event_time as int64 microseconds since 1970 UTC or as a timestamp.

        Raises:
            ValueError: a column of `log_schema` is missing, or the further columns differ from the rows before.
        """
        table = _contract_table(log, columns)
        buffer = self._buffers.setdefault(log, [])
        if buffer and buffer[0].schema != table.schema:
            raise ValueError(
                f"{log}: columns {table.schema.names} differ from the columns before: {buffer[0].schema.names}"
            )
        buffer.append(table)
        self.num_rows[log] = self.num_rows.get(log, 0) + table.num_rows
        if sum(t.num_rows for t in buffer) >= ROWS_PER_FILE:
            self._flush(log)

    def declare(self, log: str) -> None:
        """Make the log exist even when no row is ever appended to it."""
        if log not in self._buffers:
            self.append(log, log_schema(log).empty_table())

    def append_events(
        self,
        scenario: str,
        event: Mapping[str, pa.Array],
        *,
        impression_id: pa.Array,
        request_id: pa.Array,
        clicked: pa.Array | None = None,
        query: pa.Array | None = None,
        **more: pa.Array,
    ) -> None:
        """Add impressions without a position, and a click at the same time of those that are `clicked` (None: all).

        `event` has user_id, item_id and event_time; the click's id is the impression's.
        """
        text, place = pa.nulls(len(impression_id), pa.string()), pa.nulls(len(impression_id), pa.int32())
        query = text if query is None else query
        shown = {"impression_id": impression_id, "request_id": request_id, **event, "position": place, "query": query}
        self.append(f"{scenario}_impressions", shown | more)
        clicks = pa.table({"click_id": impression_id, "impression_id": impression_id, **event})
        self.append(f"{scenario}_clicks", clicks if clicked is None else clicks.filter(clicked))

    def _flush(self, log: str) -> None:
        buffer = self._buffers[log]
        number = self._num_files.get(log, 0)
        table = pa.concat_tables(buffer)
        if table.num_rows or not number:
            folder = self._folder / log
            folder.mkdir(exist_ok=True)
            pq.write_table(table, folder / f"part-{number:05d}.parquet", compression="zstd")
            self._num_files[log] = number + 1
        self._buffers[log] = [buffer[0].slice(0, 0)]  # keeps the schema for the next rows

    def commit(self, provenance: Mapping[str, Any]) -> dict[str, int]:
        """Write what is buffered, put the folder in its place and return the rows of each log."""
        for log in self._buffers:
            self._flush(log)
        marker = {**provenance, "num_rows": self.num_rows}
        (self._folder / MARKER).write_text(json.dumps(marker, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        self._folder.chmod(0o755)  # mkdtemp's folder is the owner's alone
        if self.logs_dir.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.logs_dir.name}-old-", dir=self.logs_dir.parent))
            self.logs_dir.rename(old)
            self._folder.rename(self.logs_dir)
            shutil.rmtree(old)
        else:
            self._folder.rename(self.logs_dir)
        return dict(self.num_rows)

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _contract_table(log: str, columns: Mapping[str, Any] | pa.Table) -> pa.Table:
    schema = log_schema(log)
    names = columns.column_names if isinstance(columns, pa.Table) else list(columns)
    missing = [name for name in schema.names if name not in names]
    if missing:
        raise ValueError(f"{log}: no column {', '.join(missing)}")
    ordered = [*schema.names, *(name for name in names if name not in schema.names)]
    arrays = []
    for name in ordered:
        values = columns[name]
        array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
        arrays.append(array.cast(schema.field(name).type) if name in schema.names else array)
    return pa.table(arrays, names=ordered)


def text_column(*parts: str | np.ndarray | pa.Array) -> pa.Array:
    """Strings joined row by row from constants and columns; null where a column is null."""
    columns = [
        part if isinstance(part, str) else pc.cast(part if isinstance(part, pa.Array) else pa.array(part), pa.string())
        for part in parts
    ]
    return pc.binary_join_element_wise(*columns, "")


def input_files(input_dir: Path, patterns: Sequence[str], *, what: str) -> list[Path]:
    """Files of `input_dir` that match a pattern, sorted by name; UserError when there is none."""
    if not input_dir.is_dir():
        raise UserError(f"--input {input_dir}: no such folder; name the folder with the data set's files")
    files = sorted({path for pattern in patterns for path in input_dir.glob(pattern)})
    if not files:
        raise UserError(f"--input {input_dir}: no {what} ({' or '.join(patterns)}); put the data set's files there")
    return files


def require_columns(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    """UserError when a file lacks a needed column."""
    missing = [name for name in needed if name not in names]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; it has: {', '.join(names)}")


@contextlib.contextmanager
def source_file(path: Path) -> Iterator[None]:
    """What is done with a file of a data set; UserError naming it where it is torn or holds something else."""
    try:
        yield
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        problem = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: cannot be read ({problem}); unpack the data set anew") from error


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, with their ends. UserError: it cannot be read."""
    with source_file(path), path.open(encoding="utf-8", newline="\n") as file:
        yield from file


def text_blocks(
    path: Path, columns: Sequence[str], *, nulls: Sequence[str] = ("",), delimiter: str = ",", **parse: Any
) -> Iterator[pa.Table]:
    """Columns of a CSV file as text, one block at least, with lines of progress; fields such as `nulls` are null.

    `parse` is for pyarrow's ParseOptions. UserError for a missing column, or a file that cannot be read.
    """
    require_columns(path, header_of(path, delimiter), columns)
    with source_file(path):
        yield from _blocks(path, columns, nulls, pacsv.ParseOptions(delimiter=delimiter, **parse))


def _blocks(path: Path, columns: Sequence[str], nulls: Sequence[str], parse: pacsv.ParseOptions) -> Iterator[pa.Table]:
    reader = pacsv.open_csv(
        path,
        read_options=pacsv.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=parse,
        convert_options=pacsv.ConvertOptions(
            include_columns=list(columns),
            column_types={name: pa.string() for name in columns},
            strings_can_be_null=True,
            null_values=list(nulls),
        ),
    )
    num_rows = 0
    for batch in reader:
        before, num_rows = num_rows, num_rows + batch.num_rows
        if num_rows // _PROGRESS_EVERY > before // _PROGRESS_EVERY:
            print(f"{path.name}: {num_rows:,} rows", file=sys.stderr, flush=True)
        yield pa.Table.from_batches([batch])
    if not num_rows:
        yield reader.schema.empty_table()


def header_of(path: Path, delimiter: str = ",") -> list[str]:
    """Names in the first line of a CSV file. UserError: it cannot be read."""
    with source_file(path), path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file, delimiter=delimiter), [])


def require_scenarios(config: Config, wanted: Sequence[str], *, source: str) -> None:
    """UserError when the configured scenarios are not the ones the source writes."""
    if set(config.scenarios) != set(wanted):
        raise UserError(
            f"scenarios are {list(config.scenarios)} but source {source} writes {list(wanted)}; "
            f"set scenarios to those, or start from jobs/configs/{source}.toml"
        )
