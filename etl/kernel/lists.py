"""Tags and terms: raw texts to values, and the encoded lists of a chunk by code. In Spark's Python workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from etl.kernel.events import Ints
from usr_ray.config.terms import tags_of, terms_of
from usr_ray.schema import TERM, ListFeature

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
        codes: of the rows.
        pairs: of each row: place, id, place, id ..; null: no list has a value.
        places: of the feature that the codes are of.
        size: codes + 1.
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
