"""Vectors from the lake's bytes to arrays by encoded id: by hand; what is wrong is one line. No JVM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from etl.features.vocabulary import feature_spec
from etl.kernel.features import packed_vectors
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.config import UserError, load_config
from usr_ray.data.by_id import read_cold, read_vectors
from usr_ray.data.lineage import difference
from usr_ray.data.manifest import DataError, Manifest, build_manifest
from usr_ray.schema import SAMPLES, FeatureSpec, VectorFeature

pytestmark = pytest.mark.unit

TITLE = VectorFeature(name="title", owner="item", length=2, scale=4.0)
FACE = VectorFeature(name="face", owner="user", length=3)
SPEC = samples_spec(num_items=4, num_users=3, vectors=(FACE, TITLE))


def halves(*numbers: float) -> bytes:
    return np.array(numbers, "<f2").tobytes()


def write_titles(lake: Path, ids: list[int], titles: list[bytes | None], kind: pa.DataType | None = None) -> Manifest:
    """Vectors of items as a newer version that the samples name."""
    rows = pa.table({"item_id_index": ids, "title": pa.array(titles, kind or pa.binary())})
    write_deltalake(str(lake / "item_vectors"), rows, mode="overwrite", schema_mode="overwrite")
    version = str(DeltaTable(lake / "item_vectors").version())
    samples = DeltaTable(lake / SAMPLES)
    samples.alter.set_table_properties({"usr_ray.item_vectors_version": version}, raise_if_not_exists=False)
    return build_manifest(lake, dates=None)


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    write_samples(tmp_path / "lake", SPEC, num_rows=60, num_days=2)
    return tmp_path / "lake"


def test_rows_are_ids_and_the_last_column_says_who_has_none(lake: Path) -> None:
    found = read_vectors(write_titles(lake, [5, 2, 3], [halves(1, -2), halves(0, 0), None]))
    assert found["title"].dtype == np.float16
    assert found["title"].tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 1], [1, -2, 0]]
    assert found["face"].shape == (5, 4)
    # samples_table: user 2 has one, 3 has none in its row, 4 one.
    assert found["face"][:, 3].tolist() == [1, 1, 0, 1, 0]
    assert read_vectors(build_manifest(lake, dates=None)).keys() == {"face", "title"}


def test_a_column_of_several_pieces_is_read_piece_by_piece(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Arrow gives more bytes than one array can count; an Arrow slice keeps the whole's buffers."""
    whole = pa.array([halves(9, 9), halves(1, -2), None, halves(0, 0), halves(3, 4)])
    pieces = pa.chunked_array([whole.slice(1, 2), whole.slice(0, 0), whole.slice(4), pa.array([None], pa.binary())])
    table = pa.table({"item_id_index": pa.chunked_array([[5, 3, 4], [2]]), "title": pieces})

    def tables(_manifest: Manifest, name: str, *_others: object) -> Iterator[tuple[str, pa.Table]]:
        if name == "item_vectors":
            yield "x", table

    monkeypatch.setattr("usr_ray.data.by_id.tables_by_id", tables)
    found = read_vectors(build_manifest(lake, dates=None))["title"]
    assert found.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1], [3, 4, 0], [1, -2, 0]]


def with_flags(lake: Path, ids: list[int], flags: pa.Array) -> Manifest:
    """`write_titles`, with flags of who has its id for its vector alone, and no vectors."""
    rows = pa.table({"item_id_index": ids, "title": pa.nulls(len(ids), pa.binary()), "item_id_is_cold": flags})
    write_deltalake(str(lake / "item_vectors"), rows, mode="overwrite", schema_mode="overwrite")
    version = str(DeltaTable(lake / "item_vectors").version())
    samples = DeltaTable(lake / SAMPLES)
    samples.alter.set_table_properties({"usr_ray.item_vectors_version": version}, raise_if_not_exists=False)
    return build_manifest(lake, dates=None)


def test_who_has_an_id_for_its_vector_alone(lake: Path) -> None:
    """A null is no; a table of before there was the column knows none; a row without a vector counts."""
    old = read_cold(write_titles(lake, [5, 2], [halves(1, -2), None]))
    assert old["item_id"].tolist() == [False] * 6
    assert old["user_id"].tolist() == [False, False, False, True, False], "samples_table: every fourth"
    manifest = with_flags(lake, [5, 2, 3], pa.array([True, None, False]))
    assert read_cold(manifest)["item_id"].tolist() == [False, False, False, False, False, True]
    with pytest.raises(DataError, match=r"column item_id_is_cold is int64, needed booleans; build any date with"):
        read_cold(with_flags(lake, [2], pa.array([1])))
    with pytest.raises(DataError, match=r"column item_id_index holds nulls or ids outside of 0\.\.5"):
        read_cold(with_flags(lake, [9], pa.array([True])))
    write_samples(lake.parent / "plain", samples_spec(), num_rows=60, num_days=2)
    assert read_cold(build_manifest(lake.parent / "plain", dates=None)) == {}


@pytest.mark.parametrize(
    ("ids", "titles", "kind", "message"),
    [
        ([2], [halves(1)], None, "holds vectors of another length than 2 numbers; build any date with"),
        ([2], [halves(1, np.nan)], None, "column title holds NaN or infinity; build any date"),
        ([9], [halves(1, 2)], None, r"column item_id_index holds nulls or ids outside of 0\.\.5"),
        ([2], ["1 2"], pa.string(), "column title is .*string, needed numbers of float16 as bytes"),
    ],
)
def test_bytes_that_are_no_such_vectors_are_refused(
    lake: Path, ids: list[int], titles: list, kind: pa.DataType | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_vectors(write_titles(lake, ids, titles, kind))


def test_a_manifest_holds_the_files_of_the_version_and_its_hash_covers_them(lake: Path, tmp_path: Path) -> None:
    before = build_manifest(lake, dates=None)
    after = write_titles(lake, [2], [halves(1, 2)])
    assert before.user_vectors == after.user_vectors
    assert before.item_vectors != after.item_vectors
    assert before.sha256 != after.sha256
    after.save(tmp_path / "m.json")
    assert Manifest.load(tmp_path / "m.json") == after
    raw = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps({**raw, "item_vectors": []}))
    with pytest.raises(UserError, match="its hash does not match its files"):
        Manifest.load(tmp_path / "m.json")
    (lake / "item_vectors" / after.item_vectors[0].path).unlink()
    with pytest.raises(DataError, match="missing or was replaced since the manifest was built"):
        read_vectors(after)
    samples = DeltaTable(lake / SAMPLES)
    samples.alter.set_table_properties({"usr_ray.item_vectors_version": ""}, raise_if_not_exists=False)
    with pytest.raises(DataError, match=r"item_vectors_version is missing, though the feature spec names vectors; reb"):
        build_manifest(lake, dates=None)


def test_a_model_of_other_vectors_does_not_fit_the_table(lake: Path) -> None:
    table = build_manifest(lake, dates=None)
    assert difference(SPEC, "", table) is None
    longer = replace(SPEC, vectors=(FACE, replace(TITLE, length=3)))
    assert difference(longer, "", table) == (
        "vectors of the samples table is face (3 over 1.0), title (2 over 4.0), but the model was trained with "
        "face (3 over 1.0), title (3 over 4.0)"
    )


def test_vectors_are_part_of_the_spec_and_of_a_row_s_meaning_where_there_are_some() -> None:
    plain = load_config(None)
    config = load_config(None, ["features.item_vectors={title = 2}", "features.user_vectors={face = 3}"])
    spec = feature_spec(config)
    assert [(v.name, v.owner, v.key, v.length, v.scale) for v in spec.vectors] == [
        ("face", "user", "user_id", 3, 1.0),
        ("title", "item", "item_id", 2, 1.0),
    ]
    assert FeatureSpec.from_json(spec.to_json()) == spec
    assert '"vectors"' not in feature_spec(plain).to_json()
    assert config.row_meaning()["features"] == plain.row_meaning()["features"] | {
        "item_vectors": {"title": 2},
        "user_vectors": {"face": 3},
    }
    for key, message in (
        ("features.item_vectors={title = 0}", r"features.item_vectors.title must be in \[1, 8192\], got 0"),
        ("features.item_vectors={item_id = 2}", "'item_id' is a feature of every table already"),
        (
            "features.user_vectors={Item_ID_is_cold = 2}",
            r"'Item_ID_is_cold' is a column of every table of vectors \(user_id_index, user_id_is_cold, item_id_ind",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_config(None, [key])


def test_what_the_etl_packs_is_divided_rounded_and_null_where_it_was() -> None:
    lists = pa.array([[4.0, -2.0], None, [1e9, 0.1], [-1e9, 0.0]], pa.list_(pa.float32()))
    batch = pa.record_batch({"item_id_index": pa.array([2, 3, 4, 5]), "title": lists})
    schema = pa.schema([("item_id_index", pa.int64()), ("title", pa.binary())])
    sliced = [batch.slice(0, 2), batch.slice(2, 2), batch.slice(1, 0)]  # an Arrow slice keeps the whole's buffers
    found = [row for part in packed_vectors(sliced, {"title": 4.0}, schema) for row in part.to_pylist()]
    assert [row["title"] for row in found] == [
        halves(1, -0.5),
        None,
        halves(65504, 0.1 / 4),
        halves(-65504, 0),
    ]
    assert [row["item_id_index"] for row in found] == [2, 3, 4, 5]
