"""Rows of several batches put into the places of one: the only gather between Parquet and the model.

Everything is vectorised, histories included: each event's new place is its row's new start plus its position in the
row. Events are written in the order they are stored, a few thousand rows at a time, so the index stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from usr_ray.batch import History, UsrBatch
from usr_ray.schema import ALL_LABELS, FeatureSpec

IntArray = NDArray[np.int64]
_CHUNK_ROWS = 8192
_ROW_FIELDS = ("labels_BT", "weights_B", "scenario_B", "sparse_BF", "dense_BF", "user_key_B", "request_key_B",
               "row_number_B")  # fmt: skip
_EVENT_FIELDS = ("item_ids_V", "actions_V", "ages_s_V", "query_ids_V")


def padding_batch(spec: FeatureSpec, num_rows: int) -> UsrBatch:
    """`num_rows` padding rows: weight 0, row_number -1, ids and labels 0, empty histories."""
    return UsrBatch(
        labels_BT=torch.zeros(num_rows, len(ALL_LABELS)),
        weights_B=torch.zeros(num_rows),
        scenario_B=torch.zeros(num_rows, dtype=torch.int64),
        sparse_BF=torch.zeros(num_rows, len(spec.sparse), dtype=torch.int64),
        dense_BF=torch.zeros(num_rows, len(spec.dense)),
        histories=tuple(
            History(
                item_ids_V=torch.zeros(0, dtype=torch.int64),
                actions_V=torch.zeros(0, dtype=torch.int64),
                ages_s_V=torch.zeros(0),
                query_ids_V=torch.zeros(0, dtype=torch.int64) if columns.query_ids else None,
                offsets=torch.zeros(num_rows + 1, dtype=torch.int64),
            )
            for columns in spec.histories
        ),
        user_key_B=torch.zeros(num_rows, dtype=torch.int64),
        request_key_B=torch.zeros(num_rows, dtype=torch.int64),
        row_number_B=torch.full((num_rows,), -1, dtype=torch.int64),
    )


def take_rows(batch: UsrBatch, rows: IntArray) -> UsrBatch:
    """The given rows of a batch, in that order, copied."""
    index = torch.from_numpy(rows)
    fields: dict[str, Any] = {name: getattr(batch, name)[index] for name in _ROW_FIELDS}
    return UsrBatch(**fields, histories=tuple(_take_history(history, rows) for history in batch.histories))


def _take_history(history: History, rows: IntArray) -> History:
    offsets = history.offsets.numpy()
    lengths = (offsets[1:] - offsets[:-1])[rows]
    taken = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=taken[1:])
    source = np.repeat(offsets[rows] - taken[:-1], lengths)
    source += np.arange(len(source))
    index = torch.from_numpy(source)
    values: dict[str, Any] = {
        name: None if (v := getattr(history, name)) is None else v[index] for name in _EVENT_FIELDS
    }
    return History(**values, offsets=torch.from_numpy(taken))


class BatchBuilder:
    """Fills a batch from pieces: `add` each piece (from any thread, places disjoint), then `finish` once."""

    def __init__(self, spec: FeatureSpec, num_rows: int) -> None:
        """A batch of `num_rows` rows; places that no piece fills stay padding."""
        self._batch = padding_batch(spec, num_rows)
        self._lengths = [np.zeros(num_rows, dtype=np.int64) for _ in spec.histories]
        self._pieces: list[tuple[UsrBatch, IntArray]] = []

    def add(self, rows: UsrBatch, places: IntArray) -> None:
        """Put row n of `rows` at places[n]."""
        for name in _ROW_FIELDS:
            getattr(self._batch, name).numpy()[places] = getattr(rows, name).numpy()
        for lengths, history in zip(self._lengths, rows.histories, strict=True):
            offsets = history.offsets.numpy()
            lengths[places] = offsets[1:] - offsets[:-1]
        self._pieces.append((rows, places))

    def finish(self, run: Callable[..., Iterable[Any]] = map) -> UsrBatch:
        """The batch; `run` maps a function over the pieces, for example Executor.map."""
        histories = []
        for lengths, columns in zip(self._lengths, self._batch.histories, strict=True):
            offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
            np.cumsum(lengths, out=offsets[1:])
            values: dict[str, Any] = {
                name: None if (empty := getattr(columns, name)) is None else empty.new_empty(int(offsets[-1]))
                for name in _EVENT_FIELDS
            }
            histories.append(History(**values, offsets=torch.from_numpy(offsets)))

        def place_events(piece: tuple[UsrBatch, IntArray]) -> None:
            rows, places = piece
            for source, target in zip(rows.histories, histories, strict=True):
                _scatter_events(source, target, places)

        for _ in run(place_events, self._pieces):
            pass
        self._pieces.clear()
        fields = {name: getattr(self._batch, name) for name in _ROW_FIELDS}
        return UsrBatch(**fields, histories=tuple(histories))


def _scatter_events(source: History, target: History, places: IntArray) -> None:
    offsets = source.offsets.numpy()
    target_starts = target.offsets.numpy()[places]
    pairs = [
        (values.numpy(), getattr(target, name).numpy())
        for name in _EVENT_FIELDS
        if (values := getattr(source, name)) is not None
    ]
    for start in range(0, len(places), _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, len(places))
        first, last = offsets[start], offsets[stop]
        lengths = offsets[start + 1 : stop + 1] - offsets[start:stop]
        index = np.repeat(target_starts[start:stop] - offsets[start:stop] + first, lengths)
        index += np.arange(last - first)
        for values, out in pairs:
            out[index] = values[first:last]
