"""`<lake>/item_features` as an array: what the items of histories are, by encoded id."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from usr_ray.data.manifest import DataError, Manifest, join_path, open_filesystem
from usr_ray.data.parts import FeatureFile
from usr_ray.files import one_line
from usr_ray.schema import ITEM_FEATURES, index_column

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
