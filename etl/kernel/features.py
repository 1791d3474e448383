"""Numbers with a fitted scale, tags and terms, vectors: raw values to the table's. In Spark's Python workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from etl.kernel.events import Ints, context_column
from etl.kernel.packs import unpack
from usr_ray.config import DAY_US
from usr_ray.config.terms import tags_of, terms_of
from usr_ray.schema import FIRST_ID, TERM, UNKNOWN_ID, ListFeature

COUNTED = pa.schema([("feature", pa.string()), ("number", pa.float64()), ("count", pa.int64())])
"""How many impressions have a value of a number; every pair at most once a pack."""


def bucket_ids(values: NDArray[np.float64], edges: Sequence[float]) -> Ints:
    """FIRST_ID + how many edges are not above the value; UNKNOWN_ID for null, NaN and infinity (`bucket` in Spark).

    As float32: 0.1 is in the bucket that begins at 0.1 whether a log held it in 32 bits or a request wrote it out.
    """
    usable = np.isfinite(values)
    with np.errstate(over="ignore"):  # infinite then: the last bucket, or the first
        singles = np.where(usable, values, 0.0).astype(np.float32)
    found = np.searchsorted(np.array(edges, np.float32), singles, side="right")
    return np.where(usable, found + FIRST_ID, UNKNOWN_ID).astype(np.int64)


def standardised(values: NDArray[np.float64], mean: float, deviation: float) -> NDArray[np.float32]:
    """(x - mean) / deviation; 0 for null, NaN and infinity."""
    usable = np.isfinite(values)
    return ((np.where(usable, values, mean) - mean) / deviation).astype(np.float32)


def number_counts(
    batches: Iterable[pa.RecordBatch], names: Sequence[str], days: Sequence[int]
) -> Iterator[pa.RecordBatch]:
    """Rows of COUNTED: the context numbers `names` of the impressions on some days (since 1970), of `pack` rows."""
    for batch in batches:
        for targets in batch.column("targets"):
            rows = unpack(targets)
            on_days = np.isin(rows["event_time"].to_numpy() // DAY_US, days)
            for name in names:
                values = rows[context_column(name)].to_numpy()[on_days]
                found, counts = np.unique(values[np.isfinite(values)], return_counts=True)
                arrays = [pa.repeat(name, len(found)), pa.array(found), pa.array(counts.astype(np.int64))]
                yield pa.RecordBatch.from_arrays(arrays, schema=COUNTED)


LISTED = pa.schema(
    [
        ("feature", pa.string()),
        ("value", pa.string()),
        ("list", pa.int32()),
        ("values", pa.list_(pa.string())),
        ("cut", pa.int64()),
    ]
)
"""`values` of a list (its place in FeatureSpec.lists) of a user, item, query or text; `cut`: how many were too many."""


def listed(batches: Iterable[pa.RecordBatch], lists: Sequence[ListFeature]) -> Iterator[pa.RecordBatch]:
    """Rows of LISTED, of rows with feature, value, list and `texts` (list of strings, nulls among them)."""
    for batch in batches:
        values: list[list[str]] = []
        cut: list[int] = []
        for number, texts in zip(batch.column("list").to_pylist(), batch.column("texts").to_pylist(), strict=True):
            feature = lists[number]
            read = terms_of if feature.vocabulary == TERM else tags_of
            found = list(dict.fromkeys(value for text in texts or () if text for value in read(text)))
            values.append(found[: feature.length])
            cut.append(max(len(found) - feature.length, 0))
        columns = [batch.column(name) for name in ("feature", "value", "list")]
        arrays = [*columns, pa.array(values, pa.list_(pa.string())), pa.array(cut, pa.int64())]
        yield pa.RecordBatch.from_arrays(arrays, schema=LISTED)


def lists_by_code(codes: Ints, pairs: pa.ListArray, places: Sequence[int], size: int) -> dict[int, pa.ListArray]:
    """Place in FeatureSpec.lists -> the ids of every code + 1 up to `size`; position 0, null, has none.

    Args:
        codes: one a row, -1 for null.
        pairs: for each row place, id, place, id ..; null: no list has a value.
        places: those of the feature that the codes are of.
        size: number of codes + 1.
    """
    lengths = pairs.value_lengths().fill_null(0).to_numpy() // 2
    owner = np.repeat(codes + 1, lengths)
    flat = pairs.flatten().to_numpy().reshape(-1, 2)
    order = np.argsort(owner, kind="stable")
    owner, flat = owner[order], flat[order]
    found = {}
    for place in places:
        mine = flat[:, 0] == place
        edges = np.concatenate([[0], np.cumsum(np.bincount(owner[mine], minlength=size))]).astype(np.int32)
        kind = pa.list_(pa.field("element", pa.int64(), nullable=False))
        found[place] = pa.ListArray.from_arrays(pa.array(edges), pa.array(flat[mine, 1]), type=kind)
    return found


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
