"""Tags and terms: their values from texts, and what counts for their vocabularies.

What is read is each distinct text of the users, items and impressions once, not each row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from etl.features.numbers import BUILT, carried
from etl.kernel.events import texts_column
from etl.kernel.features import LISTED, listed
from etl.session import kept
from usr_ray.schema import ListFeature


def list_values(values: DataFrame, tables: Mapping[str, DataFrame], lists: Sequence[ListFeature]) -> DataFrame | None:
    """Rows of kernel.features.LISTED: the values of every user and item, query and text; None without tags and terms.

    Args:
        values: columns feature and value: the queries and texts, any number of times.
        tables: "user" and "item" -> one row a key, with the texts of each list in a column `texts_column` of its name.
    """
    if not lists:
        return None
    owned = {f"{owner}_id": table for owner, table in tables.items()}
    frames = []
    for number, feature in enumerate(lists):
        if feature.key in ("user_id", "item_id"):
            found = owned[feature.key].select(
                F.col(feature.key).alias("value"), F.col(texts_column(feature.name)).alias("texts")
            )
        else:
            found = values.filter(F.col("feature") == feature.key).select("value").distinct()
            found = found.select("value", F.array("value").alias("texts"))
        place = F.lit(number).cast("int").alias("list")
        frames.append(found.select(F.lit(feature.key).alias("feature"), "value", place, "texts"))
    texts = functools.reduce(DataFrame.unionByName, frames)

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return listed(batches, lists)

    return kept(texts.mapInArrow(run, from_arrow_schema(LISTED)))


def count_list_values(counts: DataFrame, tables: Mapping[str, DataFrame], lists: Sequence[ListFeature]) -> DataFrame:
    """Impressions that carry each tag or term of a row built now: feature (the vocabulary), value, count.

    Args:
        counts: impressions of each user, item, query and text: feature, value, count, BUILT.
        tables: as for `list_values`.
        lists: at least one.
    """
    found = list_values(counts, tables, lists)
    assert found is not None
    both = found.join(counts, on=["feature", "value"], how="inner")
    names = F.array(*(F.lit(feature.vocabulary) for feature in lists))
    of_value = F.explode("values").alias("value")
    return carried(both.select(F.element_at(names, F.col("list") + 1).alias("feature"), of_value, "count", BUILT))


def cut_values(found: DataFrame, lists: Sequence[ListFeature]) -> dict[str, int]:
    """Name -> how many values of the users, items and texts were beyond max_tags or max_terms."""
    sums = {row["list"]: row["cut"] for row in found.groupBy("list").agg(F.sum("cut").alias("cut")).collect()}
    return {feature.name: sums.get(number, 0) for number, feature in enumerate(lists)}
