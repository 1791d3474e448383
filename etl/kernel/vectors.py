"""Vectors as the lake holds them: float16 numbers as bytes. In Spark's Python workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_LARGEST = float(np.finfo(np.float16).max)


def packed_vectors(
    batches: Iterable[pa.RecordBatch], scales: Mapping[str, float], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """The batches with each vector (list of floats) divided by its scale, as the bytes of little-endian float16.

    A null stays null; what float16 cannot hold becomes its largest number.
    """
    for batch in batches:
        arrays = []
        for field in schema:
            column = batch.column(field.name)
            if field.name in scales:
                numbers = column.flatten().to_numpy().astype(np.float64) / scales[field.name]
                halves = np.clip(numbers, -_LARGEST, _LARGEST).astype("<f2")
                edges = 2 * np.concatenate([[0], np.cumsum(column.value_lengths().fill_null(0).to_numpy())])
                there = pa.array(column.is_valid().to_numpy(zero_copy_only=False))
                buffers = [None, pa.py_buffer(edges.astype(np.int32)), pa.py_buffer(halves.tobytes())]
                bytes_of = pa.Array.from_buffers(pa.binary(), len(column), buffers)
                column = pc.if_else(there, bytes_of, pa.scalar(None, pa.binary()))
            arrays.append(column.cast(field.type))
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)
