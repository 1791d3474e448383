"""Tables by encoded id: what items of histories are (`<lake>/item_features`), and vectors of users and items.

A history names items by their encoded ids; what an item is stands here once, and not in every event of every row. A
reader of the samples moves no byte more, and the model gathers what it needs of the items that a step uses. Vectors of
users and items are held in the same way (`<lake>/user_vectors`, `<lake>/item_vectors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

from etl.features.vocabulary import Vocabularies, encode
from etl.jvm import table_version
from etl.kernel.features import packed_vectors
from etl.lake.tables import (
    Lake,
    content_hash,
    create_table,
    item_features_schema,
    replace_dates,
    samples_version,
    vectors_schema,
)
from etl.session import kept
from usr_ray.config import Config
from usr_ray.schema import (
    FIRST_ID,
    ITEM_FEATURES,
    ITEM_FEATURES_PROPERTY,
    VECTOR_TABLES,
    VECTORS_PROPERTIES,
    FeatureSpec,
    VectorFeature,
    index_column,
)


def update_tables_by_id(
    spark: SparkSession,
    config: Config,
    lake: Lake,
    tables: Mapping[str, DataFrame],
    known: Vocabularies,
    spec: FeatureSpec,
) -> dict[str, int]:
    """Bring the tables up to date, each in one commit, and leave alone what has not changed.

    Args:
        tables: "user" and "item" -> one row a key.
        known: includes what this build has added.
        spec: the samples'; says what vectors are divided by.

    Returns:
        Property of the samples -> the version that holds what this build knows.
    """
    versions = {}
    if config.features.sides:
        rows, schema = item_features(tables["item"], known, config), item_features_schema(config)
        versions[ITEM_FEATURES_PROPERTY] = _update(spark, lake, ITEM_FEATURES, rows, schema, ITEM_FEATURES_PROPERTY)
    for owner, table in tables.items():
        if vectors := [vector for vector in spec.vectors if vector.owner == owner]:
            rows, schema = vectors_by_id(table, vectors, known, config), vectors_schema(config, owner)
            name = VECTORS_PROPERTIES[owner]
            cold = None if known.cold is None else known.cold.filter(F.col("feature") == f"{owner}_id").select("id")
            versions[name] = _update(spark, lake, VECTOR_TABLES[owner], rows, schema, name, cold)
    return versions


def _update(
    spark: SparkSession,
    lake: Lake,
    name: str,
    rows: DataFrame,
    schema: T.StructType,
    prop: str,
    cold: DataFrame | None = None,
) -> int:
    """The version of a table that has these rows, by its first column, and those of what the logs have dropped.

    What a feature table has dropped keeps its row: histories go on naming it. A row of nulls is none, and ends one.
    `cold` are the ids that the schema's last column shall be true of; without, the rows have all columns.
    """
    path, key = lake.path(name), schema[0].name
    wanted = rows.dropna("all", subset=rows.columns[1:])
    named = samples_version(spark, lake, prop)
    is_there = lake.has(spark, name)
    if not is_there:
        create_table(spark, lake, name, schema)
    if not is_there or named is None:
        wanted = _with_cold(wanted, schema, cold)
    else:
        # Not the newest version where the samples name another: a build that was killed, or samples and vocabularies
        # that were RESTOREd, leave rows behind whose ids the vocabularies may not know. Nothing stays where no samples
        # name a version, as where they were deleted: their vectors were divided by another scale.
        version = min(named, table_version(spark, path))  # a table that was deleted begins anew
        there = spark.read.format("delta").option("versionAsOf", version).load(path)
        dropped = there.select(rows.columns).dropna("all", subset=rows.columns[1:])
        wanted = wanted.unionByName(dropped.join(rows.select(key), on=key, how="left_anti"))
        wanted = kept(_with_cold(wanted, schema, cold))  # read twice: to compare, and to write
        if content_hash(wanted) == content_hash(there.select(wanted.columns)):
            return version
    # One file, sorted: every training worker reads all of it.
    replace_dates(wanted.repartition(1).sortWithinPartitions(key), path, f"{key} IS NOT NULL")
    return table_version(spark, path)


def _with_cold(rows: DataFrame, schema: T.StructType, cold: DataFrame | None) -> DataFrame:
    """The rows with the schema's last column; a cold id whose vector was taken back has a row of its own."""
    if cold is None:
        return rows
    key, flag = schema[0].name, schema[-1].name
    return rows.join(cold.select(F.col("id").alias(key), F.lit(True).alias(flag)), on=key, how="full")


def item_features(items: DataFrame, known: Vocabularies, config: Config) -> DataFrame:
    """One row for each item with an id: `item_id_index` and `<category>_index`."""
    names = config.features.item_categories
    encoded = encode(items.select("item_id", *names), ("item_id", *names), known, config.vocabulary)
    return _one_an_id(encoded, "item_id", {index_column(name): F.col(f"id:{name}") for name in names})


def vectors_by_id(table: DataFrame, vectors: Sequence[VectorFeature], known: Vocabularies, config: Config) -> DataFrame:
    """One row for each user or item that has an id: `<owner>_id_index`, and the vectors as bytes, null without one."""
    key, names = vectors[0].key, [vector.name for vector in vectors]
    encoded = encode(table.select(key, *names), (key,), known, config.vocabulary)
    rows = _one_an_id(encoded, key, {name: F.col(name) for name in names})
    schema = T.StructType(vectors_schema(config, vectors[0].owner).fields[: 1 + len(names)])
    arrow_schema = to_arrow_schema(schema)
    scales = {vector.name: vector.scale for vector in vectors}

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return packed_vectors(batches, scales, arrow_schema)

    return rows.mapInArrow(run, schema)


def _one_an_id(encoded: DataFrame, key: str, columns: Mapping[str, Column]) -> DataFrame:
    """`<key>_index` and the columns; of several that share a hashed id, and have any, those of the smallest raw id."""
    index = index_column(key)
    named = encoded.select(key, F.col(f"id:{key}").alias(index), *(c.alias(name) for name, c in columns.items()))
    of_key = F.min_by(F.struct(*columns), F.struct(F.coalesce(*columns).isNull(), F.col(key)))
    rows = named.filter(F.col(index) >= FIRST_ID).groupBy(index).agg(of_key.alias("of:"))
    return rows.select(index, *(F.col(f"`of:`.`{name}`") for name in columns))
