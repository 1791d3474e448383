"""Rows of several batches gathered into one batch: the only gather between Parquet and the model.

Everything is vectorised, histories included: Arrow sees the events of a row as one string of bytes, so that a row's
events move by one copy of memory instead of one indexed read per event (three times faster, benchmarks/reader.py).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from usr_ray.data.batch import History, UsrBatch
from usr_ray.schema import ALL_LABELS, FeatureSpec

IntArray = NDArray[np.int64]
_EVENT_FIELDS = ("item_ids_V", "actions_V", "ages_s_V", "query_ids_V")
EventTypes = Mapping[str, "np.dtype[Any]"]
"""Type of each of _EVENT_FIELDS in a batch."""
_SPARE = 1.05
"""Room for events beyond what the rows so far lead to expect: row groups differ slightly."""


def id_type(*num_embeddings: int) -> np.dtype[Any]:
    """Type of ids of such tables: the table's own int64 would move twice the bytes through the shuffle."""
    return np.dtype(np.int32 if max(num_embeddings) <= 2**31 else np.int64)


def event_types(spec: FeatureSpec) -> EventTypes:
    """The narrowest types that hold the events of `spec`."""
    items, queries = (id_type(spec.sparse_feature(name).num_embeddings) for name in ("item_id", "query"))
    return {
        "item_ids_V": items,
        "actions_V": np.dtype(np.int8),
        "ages_s_V": np.dtype(np.float32),
        "query_ids_V": queries,
    }


def sparse_type(spec: FeatureSpec) -> np.dtype[Any]:
    """Type of UsrBatch.sparse_BF."""
    return id_type(*(feature.num_embeddings for feature in spec.sparse))


def list_type(spec: FeatureSpec) -> np.dtype[Any]:
    """Type of UsrBatch.lists_BW."""
    return id_type(*(feature.num_embeddings for feature in spec.lists))


def padding_batch(spec: FeatureSpec, num_rows: int) -> UsrBatch:
    """`num_rows` padding rows: weight 0, row_number -1, ids and labels 0, empty histories."""
    batch = _rows_to_fill(spec, num_rows)
    for name in batch.row_fields:
        getattr(batch, name).fill_(-1 if name == "row_number_B" else 0)
    return batch


def _rows_to_fill(spec: FeatureSpec, num_rows: int) -> UsrBatch:
    """A batch with uninitialised fields of one value per row, and empty histories."""

    def rows(dtype: type, *width: int) -> Tensor:
        return torch.from_numpy(empty_array((num_rows, *width), dtype))

    types = event_types(spec)

    def no_events(name: str) -> Tensor:
        return torch.from_numpy(np.zeros(0, types[name]))

    return UsrBatch(
        labels_BT=rows(np.float32, len(ALL_LABELS)),
        weights_B=rows(np.float32),
        scenario_B=rows(np.int64),
        sparse_BF=rows(sparse_type(spec).type, len(spec.sparse)),
        dense_BF=rows(np.float32, len(spec.dense)),
        histories=tuple(
            History(
                item_ids_V=no_events("item_ids_V"),
                actions_V=no_events("actions_V"),
                ages_s_V=no_events("ages_s_V"),
                query_ids_V=no_events("query_ids_V") if columns.query_ids else None,
                offsets=torch.zeros(num_rows + 1, dtype=torch.int64),
            )
            for columns in spec.histories
        ),
        user_key_B=rows(np.int64),
        request_key_B=rows(np.int64),
        row_number_B=rows(np.int64),
        lists_BW=rows(list_type(spec).type, sum(feature.length for feature in spec.lists)) if spec.lists else None,
    )


def empty_array(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """np.empty in Arrow's memory pool, which reuses large blocks that numpy would return to the kernel.

    Fresh pages cost as much at their first touch as the copy that fills them.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(pa.allocate_buffer(num_bytes), dtype=dtype).reshape(shape)


def take_rows(batch: UsrBatch, rows: IntArray) -> UsrBatch:
    """The given rows of a batch, in that order, copied."""
    index = torch.from_numpy(rows)
    fields: dict[str, Any] = {name: getattr(batch, name)[index] for name in batch.row_fields}
    histories = []
    for history in batch.histories:
        offsets = history.offsets.numpy()
        strings = {name: _as_bytes(events, offsets) for name, events in _fields(history).items()}
        types = {name: events.dtype for name, events in _fields(history).items()}
        values = {name: _gather([string], types[name], pa.array(rows)) for name, string in strings.items()}
        histories.append(_history(values, np.diff(offsets)[rows]))
    return UsrBatch(**fields, histories=tuple(histories))


class BatchBuilder:
    """Fills a batch from pieces: `add` each piece (from any thread, places disjoint), then `finish` or `start` once."""

    def __init__(self, spec: FeatureSpec, num_rows: int) -> None:
        """A batch of `num_rows` rows; places that no piece fills become padding."""
        self._spec = spec
        self._batch = _rows_to_fill(spec, num_rows)
        self._lengths = [np.zeros(num_rows, dtype=np.int64) for _ in spec.histories]
        self._events = [_Events(num_rows, event_types(spec)) for _ in spec.histories]
        self._places: list[IntArray] = []
        self._lock = threading.Lock()

    def add(self, rows: UsrBatch, places: IntArray) -> None:
        """Put row n of `rows` at places[n]; `rows` may be freed afterwards."""
        first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        is_run = last - first == len(places) and bool((np.diff(places) == 1).all())
        index = torch.from_numpy(places)
        for name in self._batch.row_fields:
            target = getattr(self._batch, name)
            values = getattr(rows, name).to(target.dtype)
            if is_run:
                target[first:last] = values
            else:
                target.index_copy_(0, index, values)  # half the time of numpy's
        for lengths, history in zip(self._lengths, rows.histories, strict=True):
            lengths[places] = np.diff(history.offsets.numpy())
        with self._lock:
            self._places.append(places)
            rooms = [events.reserve(h) for events, h in zip(self._events, rows.histories, strict=True)]
        for room, history in zip(rooms, rows.histories, strict=True):
            start, stop = int(history.offsets[0]), int(history.offsets[-1])
            for name, events in _fields(history).items():
                np.copyto(room[name], events[start:stop], casting="same_kind")  # narrower: the ids were checked

    def finish(self) -> UsrBatch:
        """The batch, in this thread."""
        return self.start(_at_once)()

    def start(self, submit: Callable[..., Future[Tensor]]) -> Callable[[], UsrBatch]:
        """Hand the gathers to `submit` (Executor.submit), the work of `finish`; returns what waits for the batch."""
        source = np.full(len(self._batch), -1, dtype=np.int64)
        first = 0
        for places in self._places:
            source[places] = np.arange(first, first + len(places))
            first += len(places)
        missing = source < 0
        index = pa.array(source, mask=missing if missing.any() else None)
        if missing.any():
            padding = padding_batch(self._spec, 1)
            for name in padding.row_fields:
                getattr(self._batch, name).numpy()[missing] = getattr(padding, name).numpy()
        if np.array_equal(source, np.arange(first)):
            index = None  # file order: nothing moves
        gathers = [{f: submit(events.take, f, index) for f in events.fields} for events in self._events]

        def wait() -> UsrBatch:
            if not self._places:
                return self._batch
            found = [{name: values.result() for name, values in history.items()} for history in gathers]
            histories = tuple(_history(values, lengths) for values, lengths in zip(found, self._lengths, strict=True))
            return replace(self._batch, histories=histories)

        return wait


class _Events:
    """The events of one history, piece after piece in a few large chunks, until all rows are there to be permuted.

    A piece is copied while it is fresh from decoding, and its memory serves the next decode: copying all pieces at the
    end, out of memory that has gone cold, costs twice as much (benchmarks/reader.py).
    """

    def __init__(self, num_rows: int, types: EventTypes) -> None:
        """Room for `num_rows` rows, made when the first of them tell how long they are."""
        self._rows_left, self._types = num_rows, types
        self._chunks: list[dict[str, NDArray[Any]]] = []
        self._used: list[int] = []
        self._offsets: list[list[IntArray]] = []

    @property
    def fields(self) -> list[str]:
        """Names of the fields that the pieces have, as History calls them."""
        return list(self._chunks[0]) if self._chunks else []

    def reserve(self, history: History) -> dict[str, NDArray[Any]]:
        """Field -> where the events of a piece go. One thread at a time."""
        offsets = history.offsets.numpy()
        num_rows, count = len(offsets) - 1, int(offsets[-1] - offsets[0])
        if not self._chunks or self._used[-1] + count > len(self._chunks[-1]["item_ids_V"]):
            # The rows to come are about as long as these. Where they are longer, they get a chunk of their own.
            room = max(count, math.ceil(_SPARE * count * self._rows_left / max(num_rows, 1)))
            self._chunks.append({name: empty_array((room,), self._types[name].type) for name in _fields(history)})
            self._used.append(0)
            self._offsets.append([np.zeros(1, dtype=np.int64)])
        start = self._used[-1]
        self._used[-1] = start + count
        self._offsets[-1].append(offsets[1:] - offsets[0] + start)
        self._rows_left -= num_rows
        return {name: values[start : start + count] for name, values in self._chunks[-1].items()}

    def take(self, name: str, index: pa.Array | None) -> Tensor:
        """One field of the rows `index`, numbered as they were reserved: once, for its memory is given back."""
        chunks = [
            _as_bytes(chunk.pop(name), np.concatenate(offsets))
            for chunk, offsets in zip(self._chunks, self._offsets, strict=True)
        ]
        return _gather(chunks, self._types[name], index)


def _at_once(function: Callable[..., Tensor], *arguments: Any) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(function(*arguments))
    return future


def _fields(history: History) -> dict[str, NDArray[Any]]:
    """The fields that a history has, over the same memory."""
    return {name: getattr(history, name).numpy() for name in _EVENT_FIELDS if getattr(history, name) is not None}


def _history(values: dict[str, Tensor], lengths: IntArray) -> History:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    fields: dict[str, Any] = {"query_ids_V": None, **values}
    return History(**fields, offsets=torch.from_numpy(offsets))


def _as_bytes(values: NDArray[Any], offsets: IntArray) -> pa.Array:
    """One field of events, each row's as one string of bytes over the same memory."""
    return pa.Array.from_buffers(
        pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets * values.itemsize), pa.py_buffer(values)]
    )


def _gather(pieces: list[pa.Array], dtype: np.dtype[Any], index: pa.Array | None) -> Tensor:
    """The rows `index` of `_as_bytes` arrays laid end to end; a null row is empty, None takes all rows in turn."""
    laid_out = pieces[0] if len(pieces) == 1 else pa.concat_arrays(pieces)
    pieces.clear()
    taken = laid_out if index is None else pc.take(laid_out, index, boundscheck=False)
    num_bytes = int(np.frombuffer(taken.buffers()[1], dtype=np.int64)[len(taken)])
    if num_bytes == 0:
        return torch.from_numpy(np.zeros(0, dtype))
    kind = pa.from_numpy_dtype(dtype)
    return torch.from_dlpack(pa.Array.from_buffers(kind, num_bytes // dtype.itemsize, [None, taken.buffers()[2]]))
