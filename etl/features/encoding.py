"""Codes of the packs to ids and features: one join of the values with the vocabularies, one with users and items.

What is joined are the distinct values of a chunk, not its rows; each pack then carries the lookups of its chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from etl.features.counters import counted_feature, counted_windows
from etl.features.numbers import bucket
from etl.features.vocabulary import Vocabularies, encode, hash_index, scale
from etl.kernel.rows import RowPlan, sample_rows
from etl.lake.tables import samples_schema
from usr_ray.config import Config
from usr_ray.config.counters import counter_columns
from usr_ray.schema import BUCKETS, PADDING_ID, SCALES, UNKNOWN_ID, FeatureSpec, index_column, scaled_column

_MAX_BROADCAST_VALUES = 1_000_000
"""Values of all chunks together that are sent to every task; more of them travel with their packs in a shuffle.

A value with the sums of as many days as its rows may see is as much as so many values.
"""


def pack_features(config: Config) -> tuple[str, ...]:
    """Features whose codes packs hold: those with values of their own, and those that counters count by."""
    of_rows = (feature.key for feature in config.features.lists if feature.key == feature.name)
    own = ("user_id", "item_id", "query", *config.features.context_categories, *of_rows)
    counted = (counted_feature(config, counter) for counter in config.every_counter.values())
    return tuple(dict.fromkeys((*own, *counted)))


def owned_categories(config: Config) -> dict[str, tuple[str, ...]]:
    """What comes as ids with a `user_id` and an `item_id`: categories, then numbers in buckets."""
    features = config.features
    return {f"{o}_id": (*features.categories_of(o), *features.numbers_of(o, BUCKETS)) for o in ("user", "item")}


def owned_numbers(config: Config) -> dict[str, tuple[str, ...]]:
    """What comes as numbers with a `user_id` and an `item_id`: all numbers that are not in buckets."""
    others = [scale for scale in SCALES if scale != BUCKETS]
    return {f"{owner}_id": config.features.numbers_of(owner, *others) for owner in ("user", "item")}


def kept_columns(config: Config, spec: FeatureSpec) -> tuple[str, ...]:
    """Columns that say what the user and the item were at the time of the impression, and counters by such a value.

    Rows keep them when their date is restated: the users and items tables of that day may know how it went on.
    """
    ids = [index_column(name) for names in owned_categories(config).values() for name in names]
    numbers = [scaled_column(name) for names in owned_numbers(config).values() for name in names]
    lists = [feature.column for feature in spec.lists if feature.key in ("user_id", "item_id")]
    owned = {name for owner in ("user", "item") for name in config.features.categories_of(owner)}
    counters = [
        column
        for name, counter in config.every_counter.items()
        if owned.intersection(counter.keys)
        for column in counter_columns(name, counter)
    ]
    return (*ids, *numbers, *lists, *counters)


def encoded_packs(
    packs: DataFrame,
    values: DataFrame,
    tables: Mapping[str, DataFrame],
    known: Vocabularies,
    config: Config,
    num_values: int,
    sums: DataFrame | None = None,
    lists: DataFrame | None = None,
    num_days: int = 1,
    before: DataFrame | None = None,
    num_before: int = 0,
) -> DataFrame:
    """Every pack with the lookups of its chunk: what `sample_rows` reads.

    Args:
        packs: `pack` rows of the pass.
        values: `value` rows of the pass.
        tables: "user" and "item" -> one row a key, where the configuration names features of theirs.
        known: includes what this build has added.
        num_values: number of the `values`, those that are made for counters among them.
        sums: from `sums_of_chunks` (etl/features/counters.py); None: there are no counters.
        lists: from `list_values` (etl/features/lists.py); None: there are neither tags nor terms.
        num_days: the rows are of so many.
        before: KEPT_KEY and the columns to keep of the rows that are there and keep some; None: there are none.
        num_before: about so many.
    """
    lookups = _lookups(values, tables, known, config, lists, before)
    windows = counted_windows(config)
    seen = num_days + max([0, *(days for days in windows if days is not None)]) if windows else 0
    is_small = num_values * (1 + seen) + num_before <= _MAX_BROADCAST_VALUES

    def sent(frame: DataFrame) -> DataFrame:
        return F.broadcast(frame) if is_small else frame

    user_sums = [] if sums is None else [F.col("table").alias("user_sums")]
    encoded = packs.select("chunk", "targets", "events", *user_sums).join(sent(lookups), on="chunk", how="inner")
    return encoded if sums is None else encoded.join(sent(sums), on="chunk", how="left")


def sample_frame(encoded: DataFrame, plan: RowPlan) -> DataFrame:
    """The samples of the planned days, in the columns of the table."""
    schema = samples_schema(plan.spec)
    arrow_schema = to_arrow_schema(schema, timezone="UTC")

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return sample_rows(batches, plan, arrow_schema)

    return encoded.mapInArrow(run, schema)


def _lookups(
    values: DataFrame,
    tables: Mapping[str, DataFrame],
    known: Vocabularies,
    config: Config,
    lists: DataFrame | None,
    before: DataFrame | None,
) -> DataFrame:
    """One row a chunk: `lookups`, a list of (feature, code, value, ids, numbers, lists), one for every code.

    With rows of `before` those of its users, as `kept`.
    """
    features = config.features
    names = pack_features(config)
    number = F.lit(None).cast("int")
    for n, name in enumerate(names):
        number = F.when(F.col("feature") == name, F.lit(n)).otherwise(number)
    rows = _with_ids(values.select("chunk", "feature", "code", "value"), known, config)
    ids, numbers = F.array("id"), F.array().cast("array<float>")
    for owner, table in tables.items():
        key = f"{owner}_id"
        categories, buckets = features.categories_of(owner), features.numbers_of(owner, BUCKETS)
        scaled = owned_numbers(config)[key]
        owned = _owned(table, owner, known, config).withColumn("feature", F.lit(key))
        rows = rows.join(owned, on=["feature", "value"], how="left")
        mine = F.col("feature") == key
        # A key without a row has padding for its categories, the bucket of nulls, and 0 for its other numbers.
        nothing = [F.lit(PADDING_ID)] * len(categories) + [F.lit(UNKNOWN_ID)] * len(buckets)
        padding = F.array(*nothing).cast("array<bigint>")
        zeros = F.array(*[F.lit(0.0)] * len(scaled)).cast("array<float>")
        ids = F.when(mine, F.concat(ids, F.coalesce(f"{key}_ids", padding))).otherwise(ids)
        numbers = F.when(mine, F.coalesce(f"{key}_numbers", zeros)).otherwise(numbers)
    more = []
    if lists is not None:
        rows, more = rows.join(_list_ids(lists, known, config), on=["feature", "value"], how="left"), ["lists"]
    entry = F.struct(number.alias("feature"), "code", "value", ids.alias("ids"), numbers.alias("numbers"), *more)
    found = rows.select("chunk", entry.alias("entry"))
    listed = [F.collect_list("entry").alias("lookups")]  # which leaves nulls out
    if before is not None:
        of_users = values.filter(F.col("feature") == "user_id").select("chunk", F.col("value").alias("user_id"))
        rows_there = before.join(of_users, on="user_id", how="inner")
        found = found.unionByName(
            rows_there.select("chunk", F.struct(*before.columns).alias("row")), allowMissingColumns=True
        )
        listed.append(F.collect_list("row").alias("kept"))
    return found.groupBy("chunk").agg(*listed)


def _list_ids(found: DataFrame, known: Vocabularies, config: Config) -> DataFrame:
    """feature, value and `lists` of every user, item, query and text with a tag or term: place, id, place, id ..

    The places are those in FeatureSpec.lists, ascending; the ids of a list stand in the order of its values.
    """
    names = F.array(*(F.lit(feature.vocabulary) for feature in config.features.lists))
    single = found.select(
        F.col("feature").alias("of"),
        F.col("value").alias("whose"),
        "list",
        F.posexplode("values").alias("pos", "value"),
    ).withColumn("feature", F.element_at(names, F.col("list") + 1))
    entry = F.struct("list", "pos", "id")
    grouped = _with_ids(single, known, config).groupBy(F.col("of").alias("feature"), F.col("whose").alias("value"))
    pairs = F.transform(F.array_sort(F.collect_list(entry)), lambda one: F.array(one["list"].cast("bigint"), one["id"]))
    return grouped.agg(F.flatten(pairs).alias("lists"))


def _with_ids(rows: DataFrame, known: Vocabularies, config: Config) -> DataFrame:
    """Add `id` (bigint) of each feature and value; not admitted -> 1."""
    if config.vocabulary.kind == "hash":
        return rows.withColumn("id", hash_index(F.col("value"), config.vocabulary))
    rows = rows.join(known.entries.select("feature", "value", "id"), on=["feature", "value"], how="left")
    return rows.withColumn("id", F.coalesce("id", F.lit(UNKNOWN_ID)).cast("bigint"))


def _owned(table: DataFrame, owner: str, known: Vocabularies, config: Config) -> DataFrame:
    """One row per user or item: `value` (its key), `<key>_ids` and `<key>_numbers`."""
    features, fits, key = config.features, known.fits or {}, f"{owner}_id"
    categories = features.categories_of(owner)

    def listed(columns: list[Column], kind: str) -> Column:
        return F.array(*columns).cast(f"array<{kind}>")

    ids = [F.col(f"id:{name}") for name in categories]
    ids += [bucket(F.col(name), fits[name]) for name in features.numbers_of(owner, BUCKETS)]
    numbers = [scale(F.col(n), features.scale_of(n), *fits.get(n, ())) for n in owned_numbers(config)[key]]
    return encode(table, categories, known, config.vocabulary).select(
        F.col(key).alias("value"),
        listed(ids, "bigint").alias(f"{key}_ids"),
        listed(numbers, "float").alias(f"{key}_numbers"),
    )
