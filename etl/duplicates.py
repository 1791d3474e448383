"""Exact and key duplicates: the earliest (event_time, known_time) stays (contract 1)."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from etl.events import KIND_CLICK, KIND_ORDER, NO_SCENARIO
from etl.session import kept

_NUMBER, _HASH = "_number", "_hash"


def split_duplicates(events: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Unique rows and their duplicates, both with the columns of `events`; the two together are `events`.

    The key is impression_id over all scenarios, click_id inside a log, and (order_id, item_id) over all order logs,
    where a row of `<scenario>_orders` wins over the same row of `orders`. Only keys whose hash occurs twice are sorted,
    so that clean logs pay for one count of 64-bit hashes; equal hashes of unequal keys are told apart.

    Args:
        events: usable event rows (`reason` is null).
    """
    # A click_id need only be unique in its log; the scenario makes part of its key. An order line's key has its item.
    scope = F.when(F.col("kind") == KIND_CLICK, F.col("scenario"))
    part = F.when(F.col("kind") == KIND_ORDER, F.col("item_id"))
    hashed = events.withColumn(_HASH, F.xxhash64("kind", scope, "id", part))
    doubled = kept(hashed.groupBy(_HASH).count().filter(F.col("count") > 1).select(_HASH))
    if doubled.isEmpty():
        return events, events.filter(F.lit(False))
    marked = hashed.join(doubled.withColumn("_doubled", F.lit(True)), on=_HASH, how="left")
    single = marked.filter(F.col("_doubled").isNull())
    others = sorted(set(events.columns) - {"event_time", "known_time", "scenario"})
    shop_last = F.nullif(F.col("scenario"), F.lit(NO_SCENARIO)).asc_nulls_last()
    order = Window.partitionBy("kind", scope, "id", part).orderBy("event_time", "known_time", shop_last, *others)
    ranked = kept(marked.filter("_doubled").withColumn(_NUMBER, F.row_number().over(order)))
    first, rest = ranked.filter(F.col(_NUMBER) == 1), ranked.filter(F.col(_NUMBER) > 1)
    return single.select(events.columns).unionByName(first.select(events.columns)), rest.select(events.columns)
