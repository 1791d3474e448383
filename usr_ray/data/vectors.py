"""Vectors of users and items as arrays by encoded id: `<lake>/user_vectors` and `<lake>/item_vectors`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from usr_ray.data.item_features import REBUILD_ID, ids_of, tables_by_id
from usr_ray.data.manifest import DataError, Manifest
from usr_ray.schema import VECTOR_TABLES, VectorFeature, index_column


def read_vectors(manifest: Manifest) -> dict[str, NDArray[np.float16]]:
    """Name -> float16 (N, length + 1) of every vector of the spec: row i is the user or item with encoded id i.

    The last column is 1 where there is no vector, and all others are 0 then: padding, unknown, and who has none. N is
    the number of ids that the spec knows.

    Raises:
        DataError: a file is missing, was replaced, or does not hold such vectors.
    """
    spec = manifest.spec
    files = {"user": manifest.user_vectors, "item": manifest.item_vectors}
    found = {}
    for vector in spec.vectors:
        num_ids = spec.sparse_feature(vector.key).num_embeddings
        found[vector.name] = np.zeros((num_ids, vector.length + 1), dtype=np.float16)
        found[vector.name][:, -1] = 1
    for owner, table_name in VECTOR_TABLES.items():
        vectors = [vector for vector in spec.vectors if vector.owner == owner]
        if not vectors:
            continue
        key = index_column(f"{owner}_id")
        columns = [key, *(vector.name for vector in vectors)]
        for path, table in tables_by_id(manifest, table_name, files[owner], columns):
            ids = ids_of(table, key, spec.sparse_feature(f"{owner}_id").num_embeddings, path)
            for vector in vectors:
                _fill(found[vector.name], ids, table, vector, path)
    return found


def _fill(
    target: NDArray[np.float16], ids: NDArray[np.int64], table: pa.Table, vector: VectorFeature, path: str
) -> None:
    column = table.column(vector.name).combine_chunks() if vector.name in table.column_names else pa.nulls(1)
    if column.type != pa.binary():
        raise DataError(
            f"{path}: column {vector.name} is {column.type}, needed numbers of float16 as bytes; {REBUILD_ID}"
        )
    is_there = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.drop_null().to_pylist()
    if any(len(value) != 2 * vector.length for value in values):
        raise DataError(
            f"{path}: column {vector.name} holds vectors of another length than {vector.length} numbers; {REBUILD_ID}"
        )
    numbers = np.frombuffer(b"".join(values), dtype="<f2").reshape(-1, vector.length)
    if not np.isfinite(numbers).all():
        raise DataError(f"{path}: column {vector.name} holds NaN or infinity; {REBUILD_ID}")
    target[ids[is_there], :-1] = numbers
    target[ids[is_there], -1] = 0
