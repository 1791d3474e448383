"""Parquet files of a samples table: where they are, and what their footers say of their row groups."""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from usr_ray.config import DAY_US, UserError, check_address

REBUILD = "rebuild its date with jobs/build_samples.py"
STORE_HINT = "check the address, and the store's keys and endpoint in the environment (docs/cluster.md, object stores)"
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class DataError(UserError):
    """A samples table that cannot be used as it is: one line naming the file and, where known, the row group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """One Parquet row group, the smallest unit of reading."""

    num_rows: int
    num_bytes: int
    """Uncompressed."""
    min_event_time_us: int
    """Microseconds since 1970 UTC; the start of the file's date where the footer has no statistics."""
    max_event_time_us: int
    """Likewise, the end of the file's date."""
    has_mature: bool
    """False: every row has is_mature = false."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """One Parquet file of the table."""

    path: str
    """Relative to the table, or absolute where the table refers to a file outside of itself."""
    date: str
    """impression_date of all its rows, YYYY-MM-DD."""
    size_bytes: int
    row_groups: tuple[RowGroup, ...]


def table_address(lake: Path | str, table: str) -> str:
    """Where a table of the lake is: a whole path, or `<lake>/<table>` of an object store's address, as it was written.

    Raises:
        UserError: see check_address.
    """
    text = str(lake)
    check_address(text, flag="--lake")
    if "://" not in text:
        return str((Path(text) / table).resolve())
    return f"{text.rstrip('/')}/{table}"


def open_filesystem(table_uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a table and the table's path in it: a local path, or an address in an object store.

    Keys, region and endpoint come from the environment or from the machine's role, never from the address.

    Raises:
        UserError: Arrow knows no such kind of address, or the store refuses.
    """
    if "://" not in table_uri:
        return pafs.LocalFileSystem(), table_uri
    try:
        # Spark's name for S3 is s3a; a table has one address on both sides.
        return pafs.FileSystem.from_uri(re.sub("^s3a://", "s3://", table_uri))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{table_uri}: cannot be reached ({whole_line(error)}); {STORE_HINT}") from error


def join_path(table_path: str, path: str) -> str:
    """Path of a table's file: `path` itself if absolute, as a shallow clone names it.

    Raises:
        DataError: the path climbs out of the table.
    """
    if ".." in path.split("/"):
        raise DataError(f"{table_path}: its log names the file {path!r}, which is outside of the table; {REBUILD}")
    return path if path.startswith("/") else f"{table_path.rstrip('/')}/{path}"


def one_line(error: BaseException) -> str:
    """The first line of an error's text, without the final stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def whole_line(error: BaseException) -> str:
    """All lines of an error's text as one, without colours: delta-rs puts the cause into the last of them."""
    lines = re.sub("\x1b\\[[0-9;]*m", "", str(error)).splitlines()
    return ": ".join(line.strip(" \t.↳") for line in lines if line.strip()) or type(error).__name__


def read_footer(
    filesystem: pafs.FileSystem, table_path: str, path: str, *, date: dt.date, size_bytes: int, num_rows: int | None
) -> DataFile:
    """Read the footer of one file.

    Args:
        filesystem: of `open_filesystem`.
        table_path: likewise.
        path: of the file, as in the Delta log.
        date: impression_date of its rows.
        size_bytes: of the Delta log.
        num_rows: of the Delta log; None where it has no statistics.

    Raises:
        DataError: the file is missing, has another size or row count than the log says, or is no Parquet file.
    """
    full = join_path(table_path, path)
    try:
        info = filesystem.get_file_info(full)
    except OSError as error:
        raise DataError(f"{full}: cannot be reached ({whole_line(error)}); {STORE_HINT}") from error
    if info.type != pafs.FileType.File:
        raise DataError(
            f"{full}: the file is missing, though the table's log names it; it was deleted or vacuumed: {REBUILD}"
        )
    if info.size != size_bytes:
        raise DataError(
            f"{full}: the file has {info.size} bytes, the table's log says {size_bytes}; it is cut short or was "
            f"replaced: copy it again or {REBUILD}"
        )
    try:
        with pq.ParquetFile(full, filesystem=filesystem, coerce_int96_timestamp_unit="us") as file:
            groups = tuple(_row_group(file, n, date) for n in range(file.metadata.num_row_groups))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{full}: not a readable Parquet file ({one_line(error)}); {REBUILD}") from error
    found = sum(group.num_rows for group in groups)
    if num_rows is not None and found != num_rows:
        raise DataError(
            f"{full}: the footer counts {found} rows, the table's log {num_rows}; the file was replaced: {REBUILD}"
        )
    return DataFile(
        path=path,
        date=date.isoformat(),
        size_bytes=size_bytes,
        row_groups=tuple(group for group in groups if group.num_rows),
    )


def _row_group(file: pq.ParquetFile, index: int, date: dt.date) -> RowGroup:
    metadata = file.metadata.row_group(index)
    columns = {metadata.column(n).path_in_schema: n for n in range(metadata.num_columns)}
    event_time = _min_max(metadata.column(columns["event_time"]).statistics)
    is_mature = _min_max(metadata.column(columns["is_mature"]).statistics)
    day_start_us = (date - _EPOCH.date()).days * DAY_US
    low, high = (
        (_microseconds(event_time[0]), _microseconds(event_time[1]))
        if event_time and isinstance(event_time[0], dt.datetime)
        else (day_start_us, day_start_us + DAY_US - 1)  # INT96 has no statistics; the date bounds the time
    )
    if is_mature is None and metadata.num_rows:
        column = file.read_row_group(index, columns=["is_mature"]).column("is_mature")
        is_mature = (None, pc.any(column).as_py())
    return RowGroup(
        num_rows=metadata.num_rows,
        num_bytes=metadata.total_byte_size,
        min_event_time_us=low,
        max_event_time_us=high,
        has_mature=bool(is_mature and is_mature[1]),
    )


def _min_max(statistics: Any) -> tuple[Any, Any] | None:
    if statistics is None or not statistics.has_min_max:
        return None
    return statistics.min, statistics.max


def _microseconds(time: dt.datetime) -> int:
    aware = time if time.tzinfo else time.replace(tzinfo=dt.UTC)
    return (aware - _EPOCH) // dt.timedelta(microseconds=1)
