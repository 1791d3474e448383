"""Rows of a samples table as the files hold them, raw columns among them: what serving reads beside the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from usr_ray.data.manifest import REBUILD, DataError, Manifest, join_path, open_filesystem
from usr_ray.data.parts import DataFile
from usr_ray.files import one_line


def read_rows(manifest: Manifest, columns: Sequence[str] | None = None) -> Iterator[tuple[DataFile, pa.Table]]:
    """Every row group with its file, in the order of the row numbers; `columns` None: all that the file has.

    Raises:
        DataError: a file cannot be read or lacks a column.
    """
    filesystem, table_path = open_filesystem(manifest.table_uri)
    for file in manifest.files:
        path = join_path(table_path, file.path)
        try:
            with pq.ParquetFile(path, filesystem=filesystem, coerce_int96_timestamp_unit="us") as opened:
                for index in range(opened.metadata.num_row_groups):
                    rows = opened.read_row_group(index, columns=columns)
                    yield file, _plain_text(rows if columns is None else rows.select(columns))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{path}: cannot be read ({one_line(error)}); {REBUILD}") from error


def _plain_text(table: pa.Table) -> pa.Table:
    """Text of files that delta-rs rewrote is read as string_view, which few functions of Arrow have a kernel for."""
    types = [pa.string() if field.type == pa.string_view() else field.type for field in table.schema]
    return table.cast(pa.schema(zip(table.schema.names, types, strict=True)))


def micros(times: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Timestamps of any unit and zone as microseconds since 1970 UTC."""
    return times.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
