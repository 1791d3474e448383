"""`<lake>/item_features` beside a plain reading of the logs and of the vocabularies; its versions; who reads it."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from etl.checks import DataCheckError
from etl.features.by_id import update_tables_by_id
from etl.features.vocabulary import existing_vocabularies, feature_spec, grow_vocabularies
from etl.lake.maintain import MaintainRequest, maintain
from etl.lake.tables import Lake, prepare_samples, replace_dates
from etl.logs.events import read_features
from etl.logs.files import LogFolder
from tests.spark.shop import CONFIG, Shop
from tests.spark.test_build_samples import rows_of
from usr_ray.config import UserError, load_config
from usr_ray.config.logs import LogConfig
from usr_ray.data.by_id import read_item_features
from usr_ray.data.manifest import DataError, Manifest, build_manifest
from usr_ray.schema import ITEM_FEATURES_PROPERTY

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def shop(wide_shop: Shop) -> Shop:
    return wide_shop


@pytest.fixture(scope="module")
def lake(wide_lake: Path) -> Path:
    return wide_lake


def ids_of(lake: Path, feature: str) -> dict[str, int]:
    return {row["value"]: row["id"] for row in rows_of(lake / "vocabularies") if row["feature"] == feature}


def expected(lake: Path, items: dict[str, dict[str, Any]]) -> dict[int, int]:
    """Encoded item -> encoded brand, of the items that have both an id and a row."""
    brands = ids_of(lake, "brand")
    with_id = {i: n for i, n in ids_of(lake, "item_id").items() if i in items}
    return {n: 0 if items[i]["brand"] is None else brands.get(items[i]["brand"], 1) for i, n in with_id.items()}


def found(lake: Path) -> dict[int, int]:
    rows = rows_of(lake / "item_features")
    assert len({row["item_id_index"] for row in rows}) == len(rows), "one row an item"
    return {row["item_id_index"]: row["brand_index"] for row in rows}


def manifest_of(lake: Path, version: int | None = None) -> Manifest:
    return build_manifest(lake, dates=None, version=version)


def test_every_item_with_an_id_has_its_categories(lake: Path, shop: Shop) -> None:
    assert found(lake) == expected(lake, shop.items)
    assert len(found(lake)) > 5
    manifest = manifest_of(lake)
    assert manifest.spec.history_item_features == ("brand",)
    read = read_item_features(manifest)
    assert read.shape == (manifest.spec.sparse_feature("item_id").num_embeddings, 1)
    assert {n: int(read[n, 0]) for n in found(lake)} == found(lake)
    others = [n for n in range(len(read)) if n not in found(lake)]
    assert {0, 1} <= set(others)
    assert not read[others].any(), "padding, unknown, and items that the log lacks"


def test_the_samples_name_the_version_that_is_theirs(
    spark: SparkSession, lake: Path, shop: Shop, tmp_path: Path
) -> None:
    path = tmp_path / "lake"
    shutil.copytree(lake, path)
    before = manifest_of(path)
    settings = load_config(None, (*CONFIG, "vocabulary.min_count=2"))
    # From day 2 on the shop has renamed a brand of one item, and has dropped another from its catalogue.
    changed, dropped = sorted(i for i in shop.items if i in ids_of(lake, "item_id"))[:2]
    other = "b" if shop.items[changed]["brand"] == "a" else "a"
    now = {i: dict(row) for i, row in shop.items.items() if i != dropped}
    now[changed]["brand"] = other

    def update() -> None:
        """What a build does with the log of items."""
        known = existing_vocabularies(spark, settings, Lake(str(path)))
        items = spark.createDataFrame([(i, row["brand"]) for i, row in now.items()], "item_id string, brand string")
        spec = feature_spec(settings, known)
        versions = update_tables_by_id(spark, settings, Lake(str(path)), {"item": items}, known, spec)
        prepare_samples(spark, Lake(str(path)), spec, settings, versions)

    update()
    kept = {dropped: shop.items[dropped]} | now
    assert found(path) == expected(path, kept), "histories go on naming the item that was dropped"
    after = manifest_of(path)
    assert found(path)[ids_of(path, "item_id")[changed]] == ids_of(path, "brand")[other]
    assert np.array_equal(read_item_features(manifest_of(path, before.version)), read_item_features(before))
    assert manifest_of(path, before.version).item_features == before.item_features
    assert {f.path for f in after.item_features}.isdisjoint(f.path for f in before.item_features)

    commits = len(DeltaTable(str(path / "item_features")).history())
    update()
    assert len(DeltaTable(str(path / "item_features")).history()) == commits, "nothing has changed, nothing is written"
    assert manifest_of(path).item_features == after.item_features


def test_a_manifest_pins_the_files_and_refuses_others(lake: Path, tmp_path: Path) -> None:
    path = tmp_path / "lake"
    shutil.copytree(lake, path)
    manifest = manifest_of(path)
    manifest.save(tmp_path / "manifest.json")
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert loaded == manifest
    raw = json.loads((tmp_path / "manifest.json").read_text())
    raw["item_features"] = []
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="its hash does not match its files"):
        Manifest.load(tmp_path / "manifest.json")
    file = path / "item_features" / manifest.item_features[0].path
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"missing or was replaced since the manifest was built; build any date with"):
        read_item_features(manifest)


def test_vacuum_keeps_the_versions_that_a_run_and_the_samples_name(
    spark: SparkSession, lake: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lake"
    # Every VACUUM goes through all tables of a lake; tests/spark/test_table_care.py has the others.
    shutil.copytree(lake, path, ignore=shutil.ignore_patterns("state", "rejects", "vocabularies"))
    manifest = manifest_of(path)
    before = read_item_features(manifest)
    assert before.any()
    lines: list[str] = []

    def vacuum(**more: Any) -> None:
        maintain(spark, MaintainRequest(lake=Lake(str(path)), vacuum=True, keep_us=0, **more), lines.append)

    # As a build leaves it that is killed between the two commits: a newer version, which the samples do not name.
    table = spark.read.format("delta").load(str(path / "item_features"))
    replace_dates(table.withColumn("brand_index", F.lit(0).cast("bigint")), str(path / "item_features"), "true")
    vacuum()
    assert np.array_equal(read_item_features(manifest_of(path)), before)

    newest = DeltaTable(str(path / "item_features")).version()
    settings = load_config(None, (*CONFIG, "vocabulary.min_count=2"))
    prepare_samples(spark, Lake(str(path)), manifest.spec, settings, {ITEM_FEATURES_PROPERTY: newest})
    assert not read_item_features(manifest_of(path)).any()
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    manifest.save(run_dir / "manifest-train.json")
    (run_dir / "config.json").write_text(json.dumps({"status": "running"}))
    runs = (str(tmp_path / "runs"),)
    with pytest.raises(DataCheckError, match=r"VACUUM would delete 1 files of version \d+, to which the run"):
        vacuum(runs=runs)
    vacuum(runs=runs, keep_pinned=True)
    assert "item_features: VACUUM deletes 0 files older than 0 days; 1 stay for the runs pinned to them" in lines
    assert np.array_equal(read_item_features(manifest), before)
    vacuum()
    assert "item_features: VACUUM deleted 1 files older than 0 days" in lines
    with pytest.raises(DataError, match="missing or was replaced since the manifest was built"):
        read_item_features(manifest)


READ = {"json": "[1, -2.5]", "null": "", "empty": "[]", "odd": "[1, NaN]", "words": "red", "long": "[1,2,3]"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("json", "null"), ""),
        (
            ("json", "odd", "words"),
            "'look' holds something that is no finite number in 2 rows, such as item_id '2'",
        ),
        (("json", "long"), r"length than features.item_vectors.look = 2 in 1 rows, such as 3 in item_id '2'; correct"),
        (("json", "empty"), r"length than features.item_vectors.look = 2 in 1 rows, such as 0 in item_id '2'; correct"),
    ],
)
def test_vectors_in_text_are_read_or_one_line(
    spark: SparkSession, tmp_path: Path, rows: tuple[str, ...], message: str
) -> None:
    lines = [f'{n},"{READ[row]}"' for n, row in enumerate(rows, start=1)]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,look", *lines]) + "\n")
    vectors = load_config(None, ["features.item_vectors={look = 2}"]).features.vectors
    folder = LogFolder(spark, str(tmp_path), {})
    if message:
        with pytest.raises(DataCheckError, match=message):
            read_features(folder, "items", "item_id", (), (), (), vectors)
        return
    table = read_features(folder, "items", "item_id", (), (), (), vectors)
    assert [(r["item_id"], r["look"]) for r in table.orderBy("item_id").collect()] == [("1", [1.0, -2.5]), ("2", None)]
    split = LogFolder(spark, str(tmp_path), {"items": LogConfig(split={"look": ","})})
    same = read_features(split, "items", "item_id", (), (), (), vectors)  # a list in JSON is one with `split` too
    assert same.orderBy("item_id").collect() == table.orderBy("item_id").collect()


def test_a_vector_that_was_taken_back_is_gone_and_one_that_the_log_dropped_stays(
    spark: SparkSession, tmp_path: Path
) -> None:
    config = load_config(None, ["vocabulary.kind=hash", "features.item_vectors={look = 2}"])

    def update(lake: Lake, **looks: list[float] | None) -> list[list[float]]:
        known = existing_vocabularies(spark, config, lake)
        spec = feature_spec(config, known)
        items = spark.createDataFrame([*looks.items()], "item_id string, look array<float>")
        versions = update_tables_by_id(spark, config, lake, {"item": items}, known, spec)
        prepare_samples(spark, lake, spec, config, versions)
        rows = rows_of(Path(lake.path("item_vectors")))
        return sorted(np.frombuffer(row["look"], "<f2").tolist() for row in rows)

    lake, without_samples = (Lake(str(tmp_path / name)) for name in ("lake", "without_samples"))
    assert update(lake, a=[1.0, 2.0], b=[3.0, 4.0], c=[5.0, 6.0], d=None) == [[1, 2], [3, 4], [5, 6]]
    assert update(lake, a=None, b=[3.5, 4.0]) == [[3.5, 4], [5, 6]]
    shutil.copytree(lake.path("item_vectors"), without_samples.path("item_vectors"))
    assert update(without_samples, b=[3.5, 4.0]) == [[3.5, 4]], "its scale is another's"


class Growing:
    """A lake without rows, whose vocabulary of items and vectors grow by what each build of one date would find."""

    def __init__(self, spark: SparkSession, folder: Path) -> None:
        self.spark, self.lake = spark, Lake(str(folder))

    def build(
        self, counts: dict[str, int], looks: dict[str, float | None], *settings: str, killed: bool = False
    ) -> str:
        """Impressions and vectors by item; every id in its order, `-` after those that are there for theirs alone."""
        config = load_config(None, ["features.item_vectors={look = 1}", *settings])
        date, spark, lake = dt.date(2026, 1, 1), self.spark, self.lake
        rows = [("item_id", item, date, count) for item, count in counts.items()]
        per_date = spark.createDataFrame(rows, "feature string, value string, date date, count bigint")
        vectors = [(item, None if look is None else [look]) for item, look in looks.items()]
        tables = {"item": spark.createDataFrame(vectors, "item_id string, look array<float>")}
        known, spec = grow_vocabularies(spark, config, lake, per_date, tables, ["2026-01-01"], per_date)
        if not killed:
            versions = update_tables_by_id(spark, config, lake, tables, known, spec)
            prepare_samples(spark, lake, spec, config, {**versions, **known.fitted})
        entries = {row["id"]: row["value"] for row in rows_of(Path(lake.path("vocabularies")))}
        flags = {row["item_id_index"]: row["item_id_is_cold"] for row in rows_of(Path(lake.path("item_vectors")))}
        assert False not in flags.values(), "a row without a vector, of one that is not cold, would never go"
        return " ".join(f"{entries[n]}{'-' if flags.get(n) else ''}" for n in sorted(entries))

    @property
    def looks(self) -> dict[int, float | None]:
        """Vectors by encoded id."""
        rows = rows_of(Path(self.lake.path("item_vectors")))
        return {
            r["item_id_index"]: None if r["look"] is None else float(np.frombuffer(r["look"], "<f2")[0]) for r in rows
        }


def test_an_item_with_a_vector_has_its_id_before_it_is_shown(spark: SparkSession, tmp_path: Path) -> None:
    """By hand; vectors are of one size, so that they are divided by 1."""
    shop = Growing(spark, tmp_path / "lake")
    looks: dict[str, float | None] = {"a": 1.0, "k": 1.0, "c": 1.0, "b": -1.0, "d": None}
    assert shop.build({"a": 3, "b": 1, "d": 1, "e": 2}, looks) == "a e b- c- k-"
    assert shop.looks == {2: 1.0, 4: -1.0, 5: 1.0, 6: 1.0}
    counts = {row["value"]: row["count"] for row in rows_of(tmp_path / "lake" / "vocabularies")}
    assert counts == {"a": 3, "e": 2, "b": 1, "c": 0, "k": 0}
    # A build that is killed when it has appended an id, and the next one; b is shown often enough now.
    looks["f"] = 1.0
    assert shop.build({"a": 3}, looks, killed=True) == "a e b- c- k- f"
    assert shop.build({"a": 3, "b": 2, "c": 1}, looks) == "a e b c- k- f-"
    # So it stays, whatever later builds count and want. The vectors of b and c are taken back, k and f are dropped from
    # the log: who was not shown keeps its id, and the unknown id's row.
    now = {"a": 1.0, "b": None, "c": None, "g": 1.0, "h": 1.0}
    others = ("vocabulary.min_count=9", "vocabulary.admit_vectors=false")
    assert shop.build({"a": 3, "f": 9, "h": 9, "g": 1}, now, *others) == "a e b c- k- f h"
    assert shop.looks == {2: 1.0, 5: None, 6: 1.0, 7: 1.0, 8: 1.0}
    # Without the samples' word, by the counts of the builds that appended them.
    shutil.rmtree(tmp_path / "lake" / "samples")
    assert shop.build({}, looks) == "a e b- c- k- f- h"
