"""Tables by encoded id as arrays: what the items of histories are, and vectors of users and items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from usr_ray.data.manifest import DataError, Manifest, join_path, open_filesystem
from usr_ray.data.parts import FeatureFile
from usr_ray.files import one_line
from usr_ray.schema import ITEM_FEATURES, VECTOR_TABLES, VectorFeature, cold_column, index_column

_ITEM = index_column("item_id")
REBUILD_ID = "build any date with jobs/build_samples.py, which writes the table anew, and train on that version"


def read_item_features(manifest: Manifest) -> NDArray[np.int64]:
    """Encoded ids, int64 (N, C): row i is the item with encoded id i, column c FeatureSpec.history_item_features[c].

    N is the number of item ids that the spec knows; padding, unknown and items without a row have 0. C may be 0, and
    nothing is read then.

    Raises:
        DataError: a file is missing, was replaced, or holds ids outside of the spec's tables.
    """
    spec = manifest.spec
    names = spec.history_item_features
    num_items = spec.sparse_feature("item_id").num_embeddings
    features_NC = np.zeros((num_items, len(names)), dtype=np.int64)
    if not names:
        return features_NC
    columns = [_ITEM, *map(index_column, names)]
    for path, table in tables_by_id(manifest, ITEM_FEATURES, manifest.item_features, columns):
        items = ids_of(table, _ITEM, num_items, path)
        for c, name in enumerate(names):
            limit = spec.sparse_feature(name).num_embeddings
            features_NC[items, c] = ids_of(table, index_column(name), limit, path)
    return features_NC


def tables_by_id(
    manifest: Manifest, name: str, files: Sequence[FeatureFile], columns: Sequence[str]
) -> Iterator[tuple[str, pa.Table]]:
    """Path and content of each file of a table by encoded id, which lies beside the samples.

    Raises:
        DataError: a file is missing, was replaced, or cannot be read.
    """
    lake_uri = manifest.table_uri.rstrip("/").rpartition("/")[0]
    filesystem, table_path = open_filesystem(f"{lake_uri}/{name}")
    for file in files:
        path = join_path(table_path, file.path)
        try:
            info = filesystem.get_file_info(path)
            if info.type != pafs.FileType.File or info.size != file.size_bytes:
                raise DataError(
                    f"{path}: the file is missing or was replaced since the manifest was built; {REBUILD_ID}"
                )
            with pq.ParquetFile(path, filesystem=filesystem) as opened:
                table = opened.read(columns=[*columns])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read ({one_line(error)}); {REBUILD_ID}") from error
        yield path, table


def ids_of(table: pa.Table, name: str, limit: int, path: str) -> NDArray[np.int64]:
    """A column of ids in 0 .. limit - 1. Raises DataError, naming the path."""
    column = table.column(name) if name in table.column_names else pa.chunked_array([pa.nulls(1, pa.int64())])
    ids = column.to_numpy() if column.type == pa.int64() and not column.null_count else np.array([-1])
    if len(ids) and not 0 <= ids.min() <= ids.max() < limit:
        raise DataError(f"{path}: column {name} holds nulls or ids outside of 0..{limit - 1}; {REBUILD_ID}")
    return ids


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


def read_cold(manifest: Manifest) -> dict[str, NDArray[np.bool_]]:
    """Feature -> bool (N), of `user_id` and `item_id` where they have vectors: True at an id that the vocabulary has
    for its vector alone. N as in read_vectors; a table of before there were such ids has none.

    Raises:
        DataError: a file is missing, was replaced, or holds something else in that column.
    """
    spec, found = manifest.spec, dict[str, NDArray[np.bool_]]()
    files = {"user": manifest.user_vectors, "item": manifest.item_vectors}
    for owner in dict.fromkeys(vector.owner for vector in spec.vectors):
        key = f"{owner}_id"
        ids_column, flag = index_column(key), cold_column(key)
        found[key] = np.zeros(spec.sparse_feature(key).num_embeddings, dtype=np.bool_)
        for path, table in tables_by_id(manifest, VECTOR_TABLES[owner], files[owner], [ids_column, flag]):
            if flag in table.column_names:
                column = table.column(flag)
                if column.type != pa.bool_():
                    raise DataError(f"{path}: column {flag} is {column.type}, needed booleans; {REBUILD_ID}")
                ids = ids_of(table, ids_column, len(found[key]), path)
                found[key][ids] = column.fill_null(False).to_numpy()
    return found


def _fill(
    target: NDArray[np.float16], ids: NDArray[np.int64], table: pa.Table, vector: VectorFeature, path: str
) -> None:
    column = table.column(vector.name) if vector.name in table.column_names else pa.chunked_array([pa.nulls(1)])
    if column.type != pa.binary():
        raise DataError(
            f"{path}: column {vector.name} is {column.type}, needed numbers of float16 as bytes; {REBUILD_ID}"
        )
    first = 0
    for chunk in column.chunks:  # together they may have more bytes than one array can count
        of_chunk = ids[first : first + len(chunk)][chunk.is_valid().to_numpy(zero_copy_only=False)]
        first += len(chunk)
        values = chunk.drop_null()
        if not pc.all(pc.equal(pc.binary_length(values), 2 * vector.length), min_count=0).as_py():
            raise DataError(
                f"{path}: column {vector.name} holds vectors of another length than {vector.length} numbers; "
                f"{REBUILD_ID}"
            )
        numbers = _bytes_of(values).view("<f2").reshape(-1, vector.length)
        if not np.isfinite(numbers).all():
            raise DataError(f"{path}: column {vector.name} holds NaN or infinity; {REBUILD_ID}")
        target[of_chunk, :-1] = numbers
        target[of_chunk, -1] = 0


def _bytes_of(values: pa.BinaryArray) -> NDArray[np.uint8]:
    """The bytes of all values, one after the other; no copy."""
    _, ends, data = values.buffers()
    if not len(values) or data is None:
        return np.empty(0, np.uint8)
    places = np.frombuffer(ends, np.int32)[values.offset : values.offset + len(values) + 1]
    return np.frombuffer(data, np.uint8)[places[0] : places[-1]]
