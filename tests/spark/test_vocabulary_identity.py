"""Fingerprints of the vocabularies: Spark's are Python's, growth keeps them, and a lost vocabulary is noticed."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from etl.checks import DataCheckError
from etl.features.vocabulary import count_values, grow_vocabularies, new_entries, read_vocabularies
from etl.jvm import table_version
from etl.kernel.events import texts_column
from etl.lake.tables import Lake, append_vocabularies, prepare_samples
from tests.spark.killed_build import OVERRIDES
from tests.spark.test_build_samples import DATES, rows_of
from usr_ray.config import load_config
from usr_ray.config.terms import SEPARATOR
from usr_ray.data import lineage
from usr_ray.data.manifest import open_samples
from usr_ray.data.manifest import read_vocabularies as read_in_python
from usr_ray.schema import ITEM_TERMS, SAMPLES, VOCABULARIES

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


def test_what_users_and_items_have_counts_where_a_row_that_is_built_now_carries_it(spark: SparkSession) -> None:
    """Item a has been renamed since day 0, and item b, which day 1 does not show, too."""
    first, second = DATES[:2]
    rows = [
        ("item_id", "a", first, 3),
        ("item_id", "a", second, 1),
        ("item_id", "b", first, 5),
        ("item_id", "c", second, 2),
        ("user_id", "u", first, 8),
        ("user_id", "u", second, 1),
        ("user_id", "w", second, 2),
        ("query", "green tea", first, 2),
        ("query", "tea", second, 1),
    ]
    per_date = spark.createDataFrame(rows, "feature string, value string, date date, count bigint")
    items = [("a", "new", ["sale"], ["leaf"]), ("b", "gone", ["sale", "late"], ["pot"]), ("c", "new", None, [None])]
    tables = {
        "item": spark.createDataFrame(
            [(i, kind, [SEPARATOR.join(tags)] if tags else [None], title) for i, kind, tags, title in items],
            f"item_id string, kind string, `{texts_column('tags')}` array<string>, "
            f"`{texts_column(ITEM_TERMS)}` array<string>",
        ),
        "user": spark.createDataFrame([("u", "x"), ("w", None)], "user_id string, city string"),
    }
    config = load_config(
        None,
        (
            'features.user_categories=["city"]',
            'features.item_categories=["kind"]',
            'features.item_tags=["tags"]',
            'features.item_terms=["title"]',
            "features.query_terms=true",
        ),
    )
    ids = {("item_id", "a"): 4, ("item_id", "b"): 5, ("item_id", "c"): 2, ("user_id", "u"): 9, ("user_id", "w"): 2}
    ids |= {("query", "green tea"): 2, ("query", "tea"): 1}
    found: dict[tuple[dt.date, ...], dict[tuple[str, str], int]] = {}
    for built in ((), (second,), (first, second)):
        counted = count_values(per_date, tables, config, built).collect()
        found[built] = {(row["feature"], row["value"]): row["count"] for row in counted}
        assert len(found[built]) == len(counted)
    assert found[()] == ids
    # Day 1 shows a and c. What they have counts on day 0 too, as far as the tables of now can tell.
    now = {("kind", "new"): 6, ("city", "x"): 9, ("tags", "sale"): 9, ("term", "leaf"): 4, ("term", "tea"): 3}
    assert found[second,] == ids | now
    every = {("kind", "gone"): 5, ("tags", "late"): 5, ("term", "pot"): 5, ("term", "green"): 2}
    assert found[first, second] == ids | now | every


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
