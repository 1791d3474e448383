"""Decoded row groups on a local disk, so that later epochs skip Parquet: Arrow IPC files, mapped into memory.

The files are as large as the rows are in memory (no compression), and are never needed: a file that cannot be written
or read back only costs the time to decode the row group again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from usr_ray.data.manifest import Manifest
from usr_ray.data.parts import RowGroupRef
from usr_ray.files import one_line


class RowGroupCache:
    """Row groups of one manifest and one choice of columns; safe for several threads and processes at a time."""

    def __init__(self, folder: Path | str, manifest: Manifest, columns: Sequence[str]) -> None:
        """Files go to a subfolder of `folder` named after the manifest's hash, which another table never reads."""
        choice = hashlib.sha256("\n".join(columns).encode()).hexdigest()
        self._folder = Path(folder) / f"{manifest.sha256[:32]}-{choice[:8]}"
        self._columns = list(columns)
        self._is_writable = True
        self._lock = threading.Lock()

    def load(self, ref: RowGroupRef) -> pa.Table | None:
        """The row group, over mapped memory; None when it is not there or is damaged."""
        path = self._path(ref)
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
        except (OSError, pa.ArrowException):
            return None
        whole = table.num_rows == ref.row_group.num_rows and table.column_names == self._columns
        return table if whole else None

    def store(self, ref: RowGroupRef, table: pa.Table) -> None:
        """Write a row group, whole or not at all; when the disk refuses, warn once and write no more."""
        if not self._is_writable:
            return
        path = self._path(ref)
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            with self._lock:
                is_first, self._is_writable = self._is_writable, False
            if is_first:
                warnings.warn(
                    f"train.reader_cache: {self._folder} cannot be written ({one_line(error)}; "
                    f"{table.nbytes / 1e6:,.1f} MB needed for a row group); the rest is decoded from Parquet in every "
                    "epoch: free space there, or name a folder with more",
                    stacklevel=2,
                )

    def _path(self, ref: RowGroupRef) -> Path:
        return self._folder / f"{ref.file:06d}-{ref.index:04d}.arrow"
