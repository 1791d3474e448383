"""One Parquet row group -> one UsrBatch, checked. Arrow memory becomes tensors without pandas and without row loops."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from usr_ray.data.assemble import empty_array, list_type, sparse_type
from usr_ray.data.batch import History, UsrBatch
from usr_ray.data.manifest import (
    REBUILD,
    DataError,
    Manifest,
    join_path,
    model_columns,
    open_filesystem,
)
from usr_ray.data.mature import EVERY_ROW, WhichRows, labels_close_us
from usr_ray.data.parts import RowGroupRef
from usr_ray.files import one_line
from usr_ray.schema import (
    ACTION_ORDER,
    ALL_LABELS,
    LABEL_ORDER,
    OPEN_LABEL,
    ORDERS,
    PADDING_ID,
    FeatureSpec,
    HistoryColumns,
)

_STRIP_ROWS = 4096
_TYPES = {"long": pa.int64(), "float": pa.float32(), "boolean": pa.bool_()}


class RowGroupDecoder:
    """Decodes row groups of a manifest; safe to call from several threads."""

    def __init__(self, manifest: Manifest, which: WhichRows = EVERY_ROW, cache_dir: Path | str | None = None) -> None:
        """`cache_dir`: as Reading has it."""
        self._manifest, self._which = manifest, which
        unused = {"is_mature": which.mature_only, "event_time": which.ready_before_us is not None}
        self.columns = [name for name in model_columns(manifest.spec) if unused.get(name, True)]
        self._filesystem, self._table_path = open_filesystem(manifest.table_uri)
        self._footers: dict[int, pq.FileMetaData] = {}
        self._lock = threading.Lock()
        self._cache = RowGroupCache(cache_dir, manifest, self.columns) if cache_dir else None

    def decode(self, ref: RowGroupRef, *, use_threads: bool = False) -> UsrBatch:
        """All rows of a row group.

        Raises:
            DataError: the file cannot be read, was replaced since the manifest was built, or breaks the contract of
                the samples table (a null, an id outside its embedding table, labels out of order ...).
        """
        table = self._cache.load(ref) if self._cache else None
        if table is None:
            table = self.read(ref, use_threads=use_threads)
            if self._cache:
                self._cache.store(ref, table)
        return table_to_batch(table, self._manifest.spec, self._which, where=self._where(ref), first_row=ref.first_row)

    def read(self, ref: RowGroupRef, *, use_threads: bool = False) -> pa.Table:
        """The needed columns of a row group, as stored in Parquet; DataError where the file has changed."""
        path = join_path(self._table_path, self._manifest.files[ref.file].path)
        try:
            with pq.ParquetFile(
                path,
                filesystem=self._filesystem,
                metadata=self._footers.get(ref.file),
                pre_buffer=True,
                coerce_int96_timestamp_unit="us",
            ) as file:
                with self._lock:
                    self._footers[ref.file] = file.metadata
                if ref.index >= file.metadata.num_row_groups:
                    raise DataError(f"{self._where(ref)}: the file has no such row group; it was replaced: {REBUILD}")
                table = file.read_row_group(ref.index, columns=self.columns, use_threads=use_threads)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._where(ref)}: cannot be read ({one_line(error)}); {REBUILD}") from error
        if table.num_rows != ref.row_group.num_rows:
            raise DataError(
                f"{self._where(ref)}: holds {table.num_rows} rows, the manifest says {ref.row_group.num_rows}; the "
                "file was replaced: build the manifest again"
            )
        return table

    def _where(self, ref: RowGroupRef) -> str:
        return f"{join_path(self._table_path, self._manifest.files[ref.file].path)}, row group {ref.index}"


def table_to_batch(
    table: pa.Table, spec: FeatureSpec, which: WhichRows = EVERY_ROW, *, where: str, first_row: int
) -> UsrBatch:
    """Rows of a samples table as a checked batch; the events are as wide as in the table (BatchBuilder narrows them).

    Args:
        table: the columns of `manifest.model_columns`; is_mature and event_time only if `which` looks at them.
        where: file and row group, for messages.
        first_row: row_number of the first row.

    Raises:
        DataError: a value that breaks the contract of the samples table.
    """
    columns = _Columns(table, spec, where)
    weights_B = np.ones(table.num_rows, dtype=np.float32)
    labels_BT = columns.labels()
    if which.mature_only:
        weights_B *= columns.scalars("is_mature").to_numpy(zero_copy_only=False)
    if which.ready_before_us is not None:
        close_us_B = labels_close_us(columns.event_time_us(), spec)
        weights_B *= close_us_B - which.order_wait_us <= which.ready_before_us
        if which.order_wait_us:
            is_open_B1 = (close_us_B > which.ready_before_us)[:, None]
            labels_BT[:, ORDERS] = np.where(is_open_B1, OPEN_LABEL, labels_BT[:, ORDERS])
    scenario_B = columns.ids("scenario_index", len(spec.scenarios), "scenarios")
    histories = tuple(columns.history(names, spec) for names in spec.histories)
    if only := which.only_scenario:
        weights_B *= scenario_B.to_numpy() == spec.scenarios.index(only)
        pairs = zip(spec.histories, histories, strict=True)
        histories = tuple(events if names.scenario == only else events.emptied() for names, events in pairs)
    ids = [columns.ids(feature.column, feature.num_embeddings).to_numpy() for feature in spec.sparse]
    numbers = [columns.finite(feature.column) for feature in spec.dense]
    return UsrBatch(
        labels_BT=torch.from_numpy(labels_BT),
        weights_B=torch.from_numpy(weights_B),
        scenario_B=torch.from_dlpack(scenario_B),
        sparse_BF=torch.from_numpy(_stack(ids, table.num_rows, sparse_type(spec).type)),
        dense_BF=torch.from_numpy(_stack(numbers, table.num_rows, np.float32)),
        histories=histories,
        user_key_B=torch.from_dlpack(columns.scalars("user_key")),
        request_key_B=torch.from_dlpack(columns.scalars("request_key")),
        row_number_B=torch.arange(first_row, first_row + table.num_rows),
        lists_BW=torch.from_numpy(columns.padded_lists(spec)) if spec.lists else None,
    )


def _stack(columns_F: list[NDArray[Any]], num_rows: int, dtype: type) -> NDArray[Any]:
    """Columns side by side, row-major; in strips that stay in the cache (twice as fast as np.stack)."""
    matrix_BF = empty_array((num_rows, len(columns_F)), dtype)
    for start in range(0, num_rows, _STRIP_ROWS):
        for n, column in enumerate(columns_F):
            matrix_BF[start : start + _STRIP_ROWS, n] = column[start : start + _STRIP_ROWS]
    return matrix_BF


class _Columns:
    """The columns of one row group as Arrow arrays over the decoded memory, each checked as it is taken."""

    def __init__(self, table: pa.Table, spec: FeatureSpec, where: str) -> None:
        self._table = table
        self._types = model_columns(spec)
        self._where = where

    def scalars(self, name: str) -> pa.Array:
        """A column of one value per row, without nulls and of the type the table promises."""
        array = self._array(name)
        if array.type != _TYPES[self._types[name]]:
            raise self._fail(name, f"is {array.type} in the file, the table says {self._types[name]}")
        return array

    def event_time_us(self) -> NDArray[np.int64]:
        """Microseconds since 1970 UTC; older Spark files hold INT96, which Arrow reads as a timestamp too."""
        array = self._array("event_time")
        if not pa.types.is_timestamp(array.type):
            raise self._fail("event_time", f"is {array.type} in the file, the table says timestamp")
        return array.cast(pa.timestamp("us", tz=array.type.tz)).cast(pa.int64()).to_numpy()

    def ids(self, name: str, limit: int, what: str = "embeddings") -> pa.Array:
        """A column of ids in 0..limit - 1; `what` there are `limit` of, for the message."""
        array = self.scalars(name)
        self._check_ids(name, array, limit, what)
        return array

    def finite(self, name: str) -> NDArray[np.float32]:
        """A column of numbers, none of them NaN or infinite: one would spread over the whole model."""
        values = self.scalars(name).to_numpy()
        finite = np.isfinite(values)
        if not finite.all():
            raise self._fail(name, f"holds {values[finite.argmin()]} in row {finite.argmin()}, not a finite number")
        return values

    def labels(self) -> NDArray[np.float32]:
        """(B, 4) labels, each 0 or 1, in the order that always holds (docs/tables.md, labels 5)."""
        labels_BT = np.empty((self._table.num_rows, len(ALL_LABELS)), dtype=np.float32)
        for n, name in enumerate(ALL_LABELS):
            values = self.scalars(name).to_numpy()
            wrong = (values != 0) & (values != 1)
            if wrong.any():
                raise self._fail(name, f"holds {values[wrong.argmax()]} in row {wrong.argmax()}, a label is 0 or 1")
            labels_BT[:, n] = values
        for low, high in LABEL_ORDER:
            wrong = labels_BT[:, ALL_LABELS.index(low)] > labels_BT[:, ALL_LABELS.index(high)]
            if wrong.any():
                raise self._fail(low, f"is 1 where {high} is 0 in row {wrong.argmax()}, against the order of labels")
        return labels_BT

    def history(self, names: HistoryColumns, spec: FeatureSpec) -> History:
        """One scenario's histories; the arrays of a row have one length."""
        offsets, item_ids = self._lists(names.item_ids)
        longest = int((offsets[1:] - offsets[:-1]).max(initial=0))
        if longest > spec.history_length:
            raise self._fail(
                names.item_ids, f"holds {longest} events in a row, histories.length is {spec.history_length}"
            )
        self._check_ids(names.item_ids, item_ids, spec.sparse_feature("item_id").num_embeddings)
        actions = self._same_lists(names.actions, names.item_ids, offsets)
        if len(actions) and not (actions.to_numpy().min() > 0 and actions.to_numpy().max() <= ACTION_ORDER):
            raise self._fail(names.actions, f"holds an action outside 1..{ACTION_ORDER}")
        ages = self._same_lists(names.ages_s, names.item_ids, offsets)
        if len(ages) and not (ages.to_numpy().min() > 0 and ages.to_numpy().max() < np.inf):
            raise self._fail(
                names.ages_s, "holds an age that is not a positive number: events lie before the impression"
            )
        query_ids = None
        if names.query_ids:
            query_ids = self._same_lists(names.query_ids, names.item_ids, offsets)
            self._check_ids(names.query_ids, query_ids, spec.sparse_feature("query").num_embeddings)
        return History(
            item_ids_V=torch.from_dlpack(item_ids),
            actions_V=torch.from_dlpack(actions),
            ages_s_V=torch.from_dlpack(ages),
            query_ids_V=None if query_ids is None else torch.from_dlpack(query_ids),
            offsets=torch.from_numpy(offsets),
        )

    def padded_lists(self, spec: FeatureSpec) -> NDArray[Any]:
        """UsrBatch.lists_BW."""
        width = sum(feature.length for feature in spec.lists)
        lists_BW = empty_array((self._table.num_rows, width), list_type(spec).type)
        lists_BW.fill(PADDING_ID)
        for feature in spec.lists:
            offsets, ids = self._lists(feature.column)
            lengths = np.diff(offsets)
            if lengths.max(initial=0) > feature.length:
                found = f"holds {lengths.max()} values in a row"
                raise self._fail(feature.column, f"{found}, the table's feature spec has {feature.length} of them")
            self._check_ids(feature.column, ids, feature.num_embeddings)
            rows = np.repeat(np.arange(len(lengths)), lengths)
            first = spec.list_places[feature.name][0]
            lists_BW[rows, first + np.arange(len(rows)) - offsets[rows]] = ids.to_numpy()
        return lists_BW

    def _array(self, name: str) -> pa.Array:
        if name not in self._table.column_names:
            raise self._fail(name, "is missing in the file, though the table has it")
        column = self._table.column(name)
        array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        if array.null_count:
            raise self._fail(name, f"has {array.null_count} nulls, but the samples table never holds null there")
        return array

    def _lists(self, name: str) -> tuple[NDArray[np.int64], pa.Array]:
        """Offsets that start at 0, and the values they point into: both without the parts outside the slice."""
        array = self._array(name)
        element = self._types[name].removeprefix("array<").removesuffix(">")
        if not pa.types.is_list(array.type) or array.type.value_type != _TYPES[element]:
            raise self._fail(name, f"is {array.type} in the file, the table says {self._types[name]}")
        values = array.flatten()
        if values.null_count:
            raise self._fail(
                name, f"has {values.null_count} null elements, but the samples table never holds null there"
            )
        offsets = array.offsets.to_numpy().astype(np.int64)
        return offsets - offsets[0], values

    def _same_lists(self, name: str, other: str, offsets: NDArray[np.int64]) -> pa.Array:
        own_offsets, values = self._lists(name)
        if not np.array_equal(own_offsets, offsets):
            row = int((own_offsets != offsets).argmax()) - 1
            raise self._fail(name, f"has another number of events than {other} in row {row}")
        return values

    def _check_ids(self, name: str, array: pa.Array, limit: int, what: str = "embeddings") -> None:
        # As unsigned numbers negative ids are huge: one pass finds both ends.
        if len(array) and array.to_numpy().view(np.uint64).max() >= limit:
            values = array.to_numpy()
            found = values[(values.view(np.uint64) >= limit).argmax()]
            raise self._fail(name, f"holds id {found}, but the table's feature spec has {limit} {what}")

    def _fail(self, name: str, problem: str) -> DataError:
        return DataError(f"{self._where}: column {name} {problem}; {REBUILD}")


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
