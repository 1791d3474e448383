"""`read_item_features`: by hand; what is missing or does not belong to the samples is one line."""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.config import UserError
from usr_ray.data.by_id import read_item_features
from usr_ray.data.manifest import DataError, Manifest, build_manifest
from usr_ray.schema import ITEM_FEATURES, ITEM_FEATURES_PROPERTY, SAMPLES

SPEC = samples_spec(num_items=4, sides=("brand",))
NUM_BRANDS = SPEC.sparse_feature("brand").num_embeddings


def manifest_of(lake: Path) -> Manifest:
    return build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE + dt.timedelta(days=3)))


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """Items 2 and 5 have a row, of brands 3 and 0."""
    write_samples(tmp_path / "lake", SPEC, num_rows=20)
    rows = pa.table({"item_id_index": [5, 2], "brand_index": [0, 3]})
    write_deltalake(str(tmp_path / "lake" / ITEM_FEATURES), rows, mode="overwrite")
    name_version(tmp_path / "lake", "1")
    return tmp_path / "lake"


def name_version(lake: Path, version: str) -> None:
    table = DeltaTable(str(lake / SAMPLES))
    table.alter.set_table_properties({ITEM_FEATURES_PROPERTY: version}, raise_if_not_exists=False)


def test_an_array_by_encoded_id(lake: Path) -> None:
    found = read_item_features(manifest_of(lake))
    assert found.tolist() == [[0], [0], [3], [0], [0], [0]]
    name_version(lake, "0")
    assert read_item_features(manifest_of(lake))[2:, 0].tolist() == [n % (NUM_BRANDS - 1) + 1 for n in range(2, 6)]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("item_id_index", 6, "column item_id_index holds nulls or ids outside of 0..5; build any date with"),
        ("item_id_index", None, "column item_id_index holds nulls or ids outside of 0..5; build any date with"),
        ("brand_index", NUM_BRANDS, rf"column brand_index holds nulls or ids outside of 0..{NUM_BRANDS - 1}; build"),
        ("brand_index", -1, rf"column brand_index holds nulls or ids outside of 0..{NUM_BRANDS - 1}; build"),
    ],
)
def test_ids_that_the_spec_does_not_know_are_refused(lake: Path, column: str, value: int | None, message: str) -> None:
    rows = {"item_id_index": [2], "brand_index": [1]} | {column: [value]}
    table = pa.table({name: pa.array(values, pa.int64()) for name, values in rows.items()})
    write_deltalake(str(lake / ITEM_FEATURES), table, mode="overwrite")
    name_version(lake, "2")
    with pytest.raises(DataError, match=message):
        read_item_features(manifest_of(lake))


def test_a_table_without_the_property_is_refused_before_anything_is_read(lake: Path) -> None:
    name_version(lake, "")
    with pytest.raises(
        DataError,
        match=f"samples: the table property {ITEM_FEATURES_PROPERTY} is missing, though the feature spec names "
        "categories of history events; rebuild the newest date with jobs/build_samples.py",
    ):
        manifest_of(lake)


def test_a_lake_without_the_table_or_the_version_is_refused(lake: Path) -> None:
    name_version(lake, "7")
    with pytest.raises(UserError, match=f"{ITEM_FEATURES}: the Delta table cannot be opened at version 7"):
        manifest_of(lake)
    shutil.rmtree(lake / ITEM_FEATURES)
    with pytest.raises(UserError, match=f"no Delta table at .*{ITEM_FEATURES}; run jobs/build_samples.py"):
        manifest_of(lake)
