"""Exact and key duplicates: the earliest (event_time, known_time) stays.

Rows of one user with one key meet in the pass, which sets the later ones aside (etl/kernel/chunks.py). What the pass
cannot see is a key that rows of several users have: one count of 64-bit hashes, without any text, finds those few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from etl.kernel.chunks import FOREIGN, KEY_HASH, USER_KEY
from etl.kernel.events import KIND_CLICK, KIND_ORDER, KIND_PAST_CLICK, KIND_PAST_ORDER, NO_SCENARIO
from etl.session import kept

_JOINED = (KEY_HASH, "kind", "scenario", "id", "item_id", "user_id")


def key_hash() -> Column:
    """Hash of the key: impression_id over all scenarios, click_id inside a log, (order_id, item_id) over order logs.

    A click_id need only be unique in its log, so the scenario is part of its key; an order line's key has its item.
    """
    scope = F.when(F.col("kind").isin(KIND_CLICK, KIND_PAST_CLICK), F.col("scenario"))
    part = F.when(F.col("kind").isin(KIND_ORDER, KIND_PAST_ORDER), F.col("item_id"))
    # A null does not change xxhash64; the structs keep the two apart.
    return F.xxhash64("kind", F.struct(F.lit(1), scope), "id", F.struct(F.lit(2), part))


def mark_foreign(events: DataFrame) -> tuple[DataFrame, int]:
    """Add `is_foreign`: true where another user's row has the same key and comes first; and the number of usable rows.

    Of the rows of a key the earliest (event_time, known_time) wins, then a scenario's order log over the shop's, then
    by content; rows of the winner's user are left to the pass.

    Args:
        events: all event rows, with `user_key`; usable where `reason` is null.
    """
    usable = events.filter(F.col("reason").isNull())
    # By numpy: Spark would first build a hash map of keys, which hardly ever repeat, before it shuffles them.
    hashed = usable.select(key_hash().alias(KEY_HASH), USER_KEY).repartition(KEY_HASH)
    found = kept(hashed.mapInArrow(_shared_keys, f"{KEY_HASH} bigint, rows bigint"))
    sums = found.agg(F.sum("rows").alias("rows"), F.count(KEY_HASH).alias("shared")).collect()[0]
    num_rows, num_shared = int(sums["rows"] or 0), int(sums["shared"])
    if not num_shared:
        return events.withColumn(FOREIGN, F.lit(False)), num_rows
    doubled = found.select(KEY_HASH).filter(F.col(KEY_HASH).isNotNull())
    rows = usable.withColumn(KEY_HASH, key_hash()).join(doubled, on=KEY_HASH, how="left_semi")
    scope = F.when(F.col("kind") == KIND_CLICK, F.col("scenario"))
    part = F.when(F.col("kind") == KIND_ORDER, F.col("item_id"))
    shop_last = F.nullif(F.col("scenario"), F.lit(NO_SCENARIO)).asc_nulls_last()
    others = sorted(set(events.columns) - {"event_time", "known_time", "scenario", "reason", "row_json", USER_KEY})
    order = Window.partitionBy("kind", scope, "id", part).orderBy("event_time", "known_time", shop_last, *others)
    winner = F.first("user_id").over(order)
    lost = rows.withColumn("_winner", winner).filter(F.col("user_id") != F.col("_winner")).select(*_JOINED).distinct()
    marked = events.withColumn(KEY_HASH, key_hash()).join(
        kept(lost).withColumn(FOREIGN, F.lit(True)), on=list(_JOINED), how="left"
    )
    return marked.withColumn(FOREIGN, F.coalesce(FOREIGN, F.lit(False))).drop(KEY_HASH), num_rows


def _shared_keys(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Keys that several users have, each once with 0 rows; and the number of all rows, without a key."""
    arrived = [(batch.column(KEY_HASH).to_numpy(), batch.column(USER_KEY).to_numpy()) for batch in batches]
    if not arrived:
        return
    key, user = (np.concatenate(columns) for columns in zip(*arrived, strict=True))
    order = np.argsort(key, kind="stable")
    key, user = key[order], user[order]
    shared = np.unique(key[1:][(key[1:] == key[:-1]) & (user[1:] != user[:-1])])
    keys = pa.concat_arrays([pa.nulls(1, pa.int64()), pa.array(shared, pa.int64())])
    num_rows = np.zeros(len(keys), dtype=np.int64)
    num_rows[0] = len(key)
    yield pa.RecordBatch.from_arrays([keys, pa.array(num_rows)], names=[KEY_HASH, "rows"])
