"""Fingerprints of the vocabularies: Spark's are Python's, growth keeps them, and a lost vocabulary is noticed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from etl.checks import DataCheckError
from etl.features.vocabulary import grow_vocabularies, new_entries, read_vocabularies
from etl.jvm import table_version
from etl.lake.tables import Lake, append_vocabularies, prepare_samples
from tests.spark.killed_build import OVERRIDES
from tests.spark.test_build_samples import DATES, rows_of
from usr_ray.config import load_config
from usr_ray.data import lineage
from usr_ray.data.manifest import open_samples
from usr_ray.data.manifest import read_vocabularies as read_in_python
from usr_ray.schema import SAMPLES, VOCABULARIES

pytestmark = pytest.mark.spark

NAMES = "feature string, value string"
COUNTS = f"{NAMES}, count bigint"


def test_sparks_fingerprints_are_pythons_and_grow_by_appending(spark: SparkSession, tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    path = lake.path(VOCABULARIES)
    nothing = read_vocabularies(spark, path, None, {})
    values = [("user_id", "u1", 9), ("user_id", "Zoë 雨", 8), ("item_id", "a:b", 3), ("item_id", "rare", 1)]
    fresh, first = new_entries(spark.createDataFrame(values, COUNTS), nothing, 2)
    append_vocabularies(spark, lake, fresh)
    more = [*values, ("user_id", "u3", 5)]
    known = read_vocabularies(spark, path, table_version(spark, path), {})
    assert known.hashes == first.hashes
    fresh, grown = new_entries(spark.createDataFrame(more, COUNTS), known, 2)
    append_vocabularies(spark, lake, fresh)
    entries = read_in_python(str(tmp_path))
    assert entries.num_rows == 4
    for vocabularies, feature, size in ((first, "user_id", 4), (first, "item_id", 3), (grown, "user_id", 5)):
        assert vocabularies.fingerprints(feature)[-1] == lineage.fingerprint(entries, feature, size)
    again = read_vocabularies(spark, path, table_version(spark, path), {"user_id": first.fingerprints("user_id")})
    assert again.fingerprints("user_id") == (*first.fingerprints("user_id"), *grown.fingerprints("user_id"))


def test_a_vocabulary_that_the_samples_were_not_encoded_with_stops_the_build(
    spark: SparkSession, narrow_lake: Path, tmp_path: Path
) -> None:
    """What a build does of values that appear once: it grows the vocabularies, then says so in the samples' table."""
    path = Path(shutil.copytree(narrow_lake, tmp_path / "lake"))
    lake, first = Lake(str(path)), open_samples(path)
    config = load_config(None, (*OVERRIDES, "vocabulary.min_count=1"))
    shown = Counter(
        (feature, row[feature], row["impression_date"])
        for row in rows_of(path / SAMPLES)
        for feature in ("user_id", "item_id", "query")
        if row[feature] is not None
    )
    counts = spark.createDataFrame([(*key, n) for key, n in shown.items()], f"{NAMES}, date date, count bigint")

    def grow() -> None:
        known, spec = grow_vocabularies(spark, config, lake, counts, {}, [f"{DATES[3]}"], counts)
        prepare_samples(spark, lake, spec, config, known.fitted)

    grow()
    grown = open_samples(path)
    assert grown.spec.sparse_feature("item_id").num_embeddings > first.spec.sparse_feature("item_id").num_embeddings
    assert lineage.difference(first.spec, first.built_with, grown) is None
    assert lineage.difference(grown.spec, grown.built_with, first) is None
    for feature in grown.spec.sparse:
        if feature.fingerprints:
            found = lineage.fingerprint(read_in_python(path), feature.name, feature.num_embeddings)
            assert found == feature.fingerprints[-1]
    assert json.loads(grown.fitted) == {"dates": f"{DATES[0]}:{DATES[3]}", "min_count": 1}, "of both builds"
    shutil.rmtree(path / VOCABULARIES)
    with pytest.raises(DataCheckError, match=r"the 0 values of .* are not those that the samples were encoded with"):
        grow()
    assert open_samples(path).version == grown.version, "nothing was written"
