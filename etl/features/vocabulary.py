"""Vocabularies: which values have an id, and the columns with the ids (contract 3).

Ids only grow: a value keeps its id for ever, new values go behind the largest one. So a model trained on an older
version of the table still reads the newer one.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from etl.checks import DataCheckError
from etl.jvm import table_version
from etl.kernel.rows import EVENT_HOUR, NUM_HOURS
from etl.lake.tables import Lake, append_vocabularies
from etl.session import kept
from usr_ray.config import Config, VocabularyConfig, parse_dates
from usr_ray.schema import (
    FIRST_ID,
    PADDING_ID,
    PARTITION_COLUMN,
    SAMPLES,
    UNKNOWN_ID,
    VOCABULARIES,
    DenseFeature,
    FeatureSpec,
    SparseFeature,
    index_column,
    scaled_column,
)

VOCABULARY_SCHEMA = "feature string, value string, id bigint, count bigint"


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """Every (feature, value, id) and the largest id of each feature; a feature without a value has none."""

    entries: DataFrame
    max_ids: dict[str, int]


def value_features(config: Config) -> tuple[tuple[str, str], ...]:
    """(feature, owner) of every categorical feature that has values, without event_hour, in FeatureSpec's order."""
    features = config.features
    return (
        ("user_id", "user"),
        ("item_id", "item"),
        ("query", "query"),
        *((name, "user") for name in features.user_categories),
        *((name, "item") for name in features.item_categories),
        *((name, "context") for name in features.context_categories),
    )


def count_values(per_date: DataFrame, users: DataFrame | None, items: DataFrame | None, config: Config) -> DataFrame:
    """Impressions that carry each value: columns feature, value, count. Nulls are no value.

    Args:
        per_date: impressions of the fitting dates that carry a value: feature, value, date, count.
        users: one row per user, or None where the configuration names no feature of theirs.
        items: one row per item, or None likewise.
        config: names the features.
    """
    counts = kept(per_date.groupBy("feature", "value").agg(F.sum("count").alias("count")))
    result = counts
    for key, table, names in (
        ("user_id", users, config.features.user_categories),
        ("item_id", items, config.features.item_categories),
    ):
        if table is None or not names:
            continue
        # A colon is in no feature's name: a column of the table may be called count, feature or value.
        of_key = counts.filter(F.col("feature") == key).select(
            F.col("value").alias(key), F.col("count").alias("count:")
        )
        owned = (
            table.select(key, *names)
            .join(of_key, on=key, how="inner")
            .select("count:", *names)
            .unpivot(["count:"], [F.col(name) for name in names], "feature", "value")
            .filter(F.col("value").isNotNull())
            .groupBy("feature", "value")
            .agg(F.sum("count:").alias("count"))
        )
        result = result.unionByName(owned)
    return result


def read_vocabularies(spark: SparkSession, path: str, version: int | None) -> Vocabularies:
    """The vocabularies of a lake at a version of the table; empty where there is none yet.

    Raises:
        DataCheckError: ids are doubled or missing, as after two builds at once.
    """
    if version is None:
        return Vocabularies(spark.createDataFrame([], VOCABULARY_SCHEMA), {})
    # Pinned, so that the ids appended by this build do not show up in it a second time.
    entries = kept(spark.read.format("delta").option("versionAsOf", version).load(path))
    sizes = entries.groupBy("feature").agg(F.max("id").alias("last"), F.count("*").alias("rows")).collect()
    for size in sizes:
        if size["last"] - FIRST_ID + 1 != size["rows"]:
            raise DataCheckError(
                f"vocabularies {path}: feature '{size['feature']}' has {size['rows']} values but its largest id is "
                f"{size['last']}; two builds ran at once: RESTORE the table to the version before and build again"
            )
    return Vocabularies(entries, {size["feature"]: size["last"] for size in sizes})


def existing_vocabularies(spark: SparkSession, config: Config, lake: Lake) -> Vocabularies:
    """The newest vocabularies of a lake; empty before the first build and for hashed ids."""
    path = lake.path(VOCABULARIES)
    there = config.vocabulary.kind == "fit" and lake.has(spark, VOCABULARIES)
    return read_vocabularies(spark, path, table_version(spark, path) if there else None)


def fitting_dates(spark: SparkSession, config: Config, lake: Lake, dates: Iterable[str]) -> set[str]:
    """The dates that the vocabularies are fitted on: those built and those to build, inside the training dates."""
    fitting = set(dates)
    if lake.has(spark, SAMPLES):
        rows = spark.read.format("delta").load(lake.path(SAMPLES)).select(PARTITION_COLUMN).distinct().collect()
        fitting |= {row[0].isoformat() for row in rows}
    if config.data.train_dates:
        first, last = parse_dates(config.data.train_dates, where="data.train_dates")
        fitting = {date for date in fitting if first.isoformat() <= date <= last.isoformat()}
    return fitting


def grow_vocabularies(
    spark: SparkSession,
    config: Config,
    lake: Lake,
    per_date: DataFrame,
    tables: tuple[DataFrame | None, DataFrame | None],
    dates: Iterable[str],
) -> tuple[Vocabularies, FeatureSpec]:
    """Admit the values of the fitting dates, and say what the table offers: before the samples need the ids.

    Args:
        spark: the session.
        config: names the features and the training dates.
        lake: its vocabularies grow.
        per_date: impressions that carry a value: feature, value, date, count; of every fitting date.
        tables: users and items, where the configuration names features of theirs.
        dates: dates that are being built; with those built before, they are the ones fitted on.
    """
    known = existing_vocabularies(spark, config, lake)
    if config.vocabulary.kind == "hash":
        return known, feature_spec(config, {})
    fitting = [dt.date.fromisoformat(date) for date in sorted(fitting_dates(spark, config, lake, dates))]
    counted = per_date.filter(F.col("date").isin(fitting))
    fresh, max_ids = new_entries(count_values(counted, *tables, config), known, config.vocabulary.min_count)
    if max_ids != known.max_ids:
        append_vocabularies(spark, lake, fresh)
        known = Vocabularies(kept(spark.read.format("delta").load(lake.path(VOCABULARIES))), max_ids)
    return known, feature_spec(config, max_ids)


def new_entries(counts: DataFrame, known: Vocabularies, min_count: int) -> tuple[DataFrame, dict[str, int]]:
    """Rows to append to the vocabularies, and the largest id of each feature once they are.

    New ids follow the feature's largest one by descending count, then value.
    """
    order = Window.partitionBy("feature").orderBy(F.desc("count"), "value")
    offset: Column = F.lit(FIRST_ID - 1)
    for feature, last in sorted(known.max_ids.items()):
        offset = F.when(F.col("feature") == feature, F.lit(last)).otherwise(offset)
    fresh = kept(
        counts.filter(F.col("count") >= min_count)
        .join(known.entries.select("feature", "value"), on=["feature", "value"], how="left_anti")
        .select("feature", "value", (F.row_number().over(order) + offset).cast("bigint").alias("id"), "count")
    )
    grown = {row["feature"]: row["last"] for row in fresh.groupBy("feature").agg(F.max("id").alias("last")).collect()}
    return fresh, known.max_ids | grown


def feature_spec(config: Config, max_ids: dict[str, int]) -> FeatureSpec:
    """What the samples table offers a model under these vocabularies."""
    hashed = config.vocabulary.kind == "hash"

    def size(feature: str) -> int:
        return config.vocabulary.num_buckets if hashed else max_ids.get(feature, FIRST_ID - 1) + 1

    sparse = [
        SparseFeature(name=name, column=index_column(name), num_embeddings=size(name), owner=owner)
        for name, owner in value_features(config)
    ]
    hour = SparseFeature(
        name=EVENT_HOUR, column=index_column(EVENT_HOUR), num_embeddings=FIRST_ID + NUM_HOURS, owner="context"
    )
    owners = (
        ("user", config.features.user_numbers),
        ("item", config.features.item_numbers),
        ("context", config.features.context_numbers),
    )
    return FeatureSpec(
        scenarios=config.scenarios,
        query_scenarios=tuple(s for s in config.scenarios if s in config.query_scenarios),
        sparse=(*sparse[:3], hour, *sparse[3:]),
        dense=tuple(
            DenseFeature(name=name, column=scaled_column(name), owner=owner)
            for owner, names in owners
            for name in names
        ),
        history_length=config.histories.length,
        label_delay_us=config.labels.global_window_us + config.labels.order_window_us,
        label_day_span=config.labels.global_span == "day",
        no_order_scenarios=tuple(s for s in config.scenarios if s in config.labels.no_order_scenarios),
    )


def encode(frame: DataFrame, features: Sequence[str], known: Vocabularies, config: VocabularyConfig) -> DataFrame:
    """Add `id:<feature>` (bigint, never null): null -> 0, not admitted -> 1. Grain unchanged."""
    for feature in features:
        if config.kind == "hash":
            frame = frame.withColumn(f"id:{feature}", hash_index(F.col(feature), config))
            continue
        entries = known.entries.filter(F.col("feature") == feature).select(
            F.col("value").alias(feature), F.col("id").alias("id:")
        )
        index = F.when(F.col(feature).isNull(), F.lit(PADDING_ID)).otherwise(F.coalesce("id:", F.lit(UNKNOWN_ID)))
        frame = (
            frame.join(entries, on=feature, how="left").withColumn(f"id:{feature}", index.cast("bigint")).drop("id:")
        )
    return frame


def hash_index(value: Column, config: VocabularyConfig) -> Column:
    """Id of a value under vocabulary.kind = "hash": 0 for null, else 2 + pmod(xxhash64(value), num_buckets - 2)."""
    bucket = F.pmod(F.xxhash64(value), F.lit(config.num_buckets - FIRST_ID)) + FIRST_ID
    return F.when(value.isNull(), F.lit(PADDING_ID)).otherwise(bucket).cast("bigint")


def scale(value: Column) -> Column:
    """sign(x) * log1p(|x|) as float; null, NaN and infinite values become 0."""
    usable = value.isNotNull() & ~F.isnan(value) & (F.abs(value) != F.lit(float("inf")))
    return F.when(usable, F.signum(value) * F.log1p(F.abs(value))).otherwise(F.lit(0.0)).cast("float")
