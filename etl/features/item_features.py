"""`<lake>/item_features`: the categories of every item that has an id, for the events of histories.

A history names items by their encoded ids; what an item is stands here once, and not in every event of every row. A
reader of the samples moves no byte more, and the model gathers the categories of the items that a step uses.
"""

from __future__ import annotations

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.features.vocabulary import Vocabularies, encode
from etl.jvm import table_version
from etl.lake.tables import (
    Lake,
    content_hash,
    create_table,
    item_features_schema,
    replace_dates,
    samples_item_features,
)
from etl.session import kept
from usr_ray.config import Config
from usr_ray.schema import FIRST_ID, ITEM_FEATURES, index_column

_ITEM = index_column("item_id")


def update_item_features(
    spark: SparkSession, config: Config, lake: Lake, items: DataFrame | None, known: Vocabularies
) -> int | None:
    """Bring the table up to date, in one commit, and leave it alone where nothing has changed.

    An item that the feature table has dropped keeps its row: histories go on naming it.

    Args:
        spark: the session.
        config: names the categories.
        lake: where the table is.
        items: one row an item.
        known: the vocabularies, this build's included.

    Returns:
        The version that holds what this build knows; None where the configuration wants no such table.
    """
    if items is None or not config.features.sides:
        return None
    path = lake.path(ITEM_FEATURES)
    rows = item_features(items, known, config)
    if not lake.has(spark, ITEM_FEATURES):
        create_table(spark, lake, ITEM_FEATURES, item_features_schema(config))
    else:
        # Not the newest version where the samples name another: a build that was killed, or samples and vocabularies
        # that were RESTOREd, leave rows behind whose ids the vocabularies may not know.
        newest, named = table_version(spark, path), samples_item_features(spark, lake)
        version = newest if named is None else min(named, newest)  # a table that was deleted begins anew
        there = spark.read.format("delta").option("versionAsOf", version).load(path)
        # Read twice: to compare, and to write.
        rows = kept(rows.unionByName(there.join(rows.select(_ITEM), on=_ITEM, how="left_anti")))
        if content_hash(rows) == content_hash(there.select(rows.columns)):
            return version
    # One file, sorted: every training worker reads all of it.
    replace_dates(rows.repartition(1).sortWithinPartitions(_ITEM), path, f"{_ITEM} IS NOT NULL")
    return table_version(spark, path)


def item_features(items: DataFrame, known: Vocabularies, config: Config) -> DataFrame:
    """One row for each item with an id: `item_id_index` and `<category>_index`.

    Of several items that share a hashed id, the one whose raw id is smallest.
    """
    names = config.features.item_categories
    encoded = encode(items.select("item_id", *names), ("item_id", *names), known, config.vocabulary)
    columns = [index_column(name) for name in names]
    ids = [F.col(f"id:{name}").alias(column) for name, column in zip(names, columns, strict=True)]
    encoded = encoded.select("item_id", F.col("id:item_id").alias(_ITEM), *ids)
    of_item = F.struct("item_id", *columns)
    rows = encoded.filter(F.col(_ITEM) >= FIRST_ID).groupBy(_ITEM).agg(F.min(of_item).alias("of_item"))
    return rows.select(_ITEM, *(F.col(f"of_item.{column}") for column in columns))
