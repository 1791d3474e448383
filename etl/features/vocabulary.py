"""Vocabularies: which values have an id, and the columns with the ids (docs/tables.md, vocabularies).

Ids only grow: a value keeps its id for ever, new values go behind the largest one. So a model trained on an older
version of the table still reads the newer one.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pyspark.sql import Column, DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F

from etl.checks import DataCheckError
from etl.features.lists import count_list_values
from etl.features.numbers import BUILT, Fits, carried, fit_numbers, fit_vectors, fits_of, is_finite, owned_counts
from etl.jvm import table_properties, table_version
from etl.kernel.rows import EVENT_HOUR, NUM_HOURS
from etl.lake.tables import Lake, append_vocabularies, sample_dates, samples_version
from etl.session import kept
from usr_ray.config import Config, VocabularyConfig, date_ranges, dates_in, parse_dates
from usr_ray.config.counters import CounterConfig, counter_columns
from usr_ray.schema import (
    BUCKETS,
    FEATURE_SPEC_PROPERTY,
    FIRST_ID,
    FITTED_PROPERTY,
    HASHED,
    LOG1P,
    MAX_FINGERPRINTS,
    PADDING_ID,
    SAMPLES,
    SCALES,
    STANDARD,
    UNKNOWN_ID,
    VECTOR_TABLES,
    VECTORS_PROPERTIES,
    VOCABULARIES,
    DenseFeature,
    FeatureSpec,
    SparseFeature,
    cold_column,
    fingerprint_text,
    index_column,
    scaled_column,
)

VOCABULARY_SCHEMA = "feature string, value string, id bigint, count bigint"


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """Every (feature, value, id), with the largest id of each feature; a feature without a value has none."""

    entries: DataFrame
    max_ids: dict[str, int]
    hashes: dict[str, tuple[int, int]]
    """Each feature that has values -> the two halves of its fingerprint (usr_ray/data/lineage.py)."""
    recorded: dict[str, tuple[tuple[int, str], ...]]
    """FeatureSpec's fingerprints, as the samples table has them."""
    fits: Fits | None = None
    """The fits (etl/features/numbers.py) that the samples table records; None: there is no table."""
    fitted: Mapping[str, str] = field(default_factory=dict)
    """Table property that says on which dates; empty where nothing was fitted in this build."""
    cold: DataFrame | None = None
    """feature and id of the users and items that have an id for their vector alone; None: there are no vectors."""

    def fingerprints(self, feature: str) -> tuple[tuple[int, str], ...]:
        """The samples table's fingerprints, and one of the values there are now, if it is another."""
        now = (self.max_ids.get(feature, FIRST_ID - 1) + 1, fingerprint_text(self.hashes.get(feature, (0, 0))))
        before = self.recorded.get(feature, ())
        return (before if now in before else (*before, now))[-MAX_FINGERPRINTS:]


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


def count_values(
    per_date: DataFrame, tables: Mapping[str, DataFrame], config: Config, built: Sequence[dt.date]
) -> DataFrame:
    """Impressions that carry each value: columns feature, value, count. Nulls are no value.

    What users and items have is counted by the tables of now. Earlier dates had others: without an impression that is
    built with these a value would have an id that no row has, and is left out.

    Args:
        per_date: impressions of the fitting dates that carry a value: feature, value, date, count.
        tables: "user" and "item" -> one row a key, where the configuration names features of theirs.
        built: the fitting dates whose rows are made now.
    """
    is_built = F.col("date").isin([*built])
    sums = (F.sum("count").alias("count"), F.sum(F.when(is_built, F.col("count")).otherwise(0)).alias(BUILT))
    both = kept(per_date.groupBy("feature", "value").agg(*sums))
    result = both.drop(BUILT)
    for owner, table in tables.items():
        if names := config.features.categories_of(owner):
            owned = owned_counts(both, table, owner, names, "value").filter(F.col("value").isNotNull())
            result = result.unionByName(carried(owned))
    if lists := config.features.lists:
        # What the pass counts of tags are whole texts.
        result = result.filter(~F.col("feature").isin([feature.name for feature in lists]))
        result = result.unionByName(count_list_values(both, tables, lists))
    return result


def read_vocabularies(
    spark: SparkSession, path: str, version: int | None, recorded: dict[str, tuple[tuple[int, str], ...]]
) -> Vocabularies:
    """The vocabularies of a lake at a version of the table; empty where there is none yet.

    Args:
        version: None where there is no table.
        recorded: fingerprints of the samples table by feature: the values that its rows were encoded with.

    Raises:
        DataCheckError: ids are doubled or missing, as after two builds at once, or are not those of the samples.
    """
    if version is None:
        known = Vocabularies(spark.createDataFrame([], VOCABULARY_SCHEMA), {}, {}, recorded)
        encoded_with: dict[str, tuple[int, int]] = {}
    else:
        # Pinned, so that the ids appended by this build do not show up in it a second time.
        entries = kept(spark.read.format("delta").option("versionAsOf", version).load(path))
        end = _by_feature({feature: found[-1][0] for feature, found in recorded.items() if found}, F.lit(0))
        of_samples = [F.bit_xor(F.when(F.col("id") < end, half)).alias(f"old_{n}") for n, half in enumerate(_halves())]
        sizes = entries.groupBy("feature").agg(*_sizes(), F.count("*").alias("rows"), *of_samples).collect()
        for size in sizes:
            if size["last"] - FIRST_ID + 1 != size["rows"]:
                raise DataCheckError(
                    f"vocabularies {path}: feature '{size['feature']}' has {size['rows']} values but its largest id is "
                    f"{size['last']}; two builds ran at once: RESTORE the table to the version before and build again"
                )
        known = Vocabularies(entries, *_found(sizes), recorded)
        encoded_with = {size["feature"]: (size["old_0"] or 0, size["old_1"] or 0) for size in sizes}
    for feature, found in recorded.items():
        num_values = found[-1][0] - FIRST_ID if found else 0
        there = known.max_ids.get(feature, FIRST_ID - 1) - FIRST_ID + 1
        if found and (there < num_values or fingerprint_text(encoded_with.get(feature, (0, 0))) != found[-1][1]):
            raise DataCheckError(
                f"vocabularies {path}: the {there:,} values of '{feature}' are not those that the samples were encoded "
                f"with ({num_values:,} values); RESTORE the table to the version that the samples were built with, or "
                "build into a new --lake"
            )
    return known


def existing_vocabularies(spark: SparkSession, config: Config, lake: Lake) -> Vocabularies:
    """The newest vocabularies of a lake; empty before the first build and for hashed ids."""
    recorded, fits = {}, None
    if lake.has(spark, SAMPLES):
        spec = FeatureSpec.from_json(table_properties(spark, lake.path(SAMPLES))[FEATURE_SPEC_PROPERTY])
        recorded = {name: feature.fingerprints for name, feature in spec.vocabularies.items()}
        fits = fits_of(spec)
    if config.vocabulary.kind == "hash":
        return Vocabularies(spark.createDataFrame([], VOCABULARY_SCHEMA), {}, {}, {}, fits)
    path = lake.path(VOCABULARIES)
    version = table_version(spark, path) if lake.has(spark, VOCABULARIES) else None
    known = replace(read_vocabularies(spark, path, version, recorded), fits=fits)
    return replace(known, cold=_cold_before(spark, config, lake, known))


def _cold_before(spark: SparkSession, config: Config, lake: Lake, known: Vocabularies) -> DataFrame | None:
    """`Vocabularies.cold` as the builds before have left it."""
    parts = []
    for owner in dict.fromkeys(vector.owner for vector in config.features.vectors):
        key, path, end = f"{owner}_id", lake.path(VECTOR_TABLES[owner]), FIRST_ID
        version = samples_version(spark, lake, VECTORS_PROPERTIES[owner])
        if version is not None and lake.has(spark, VECTOR_TABLES[owner]):
            version = min(version, table_version(spark, path))
            rows = spark.read.format("delta").option("versionAsOf", version).load(path).filter(cold_column(key))
            parts.append(rows.select(F.lit(key).alias("feature"), F.col(index_column(key)).alias("id")))
            end = known.recorded[key][-1][0] if known.recorded.get(key) else FIRST_ID
        # Ids that no such table tells of, as after a build that was killed when it had appended them: by their counts.
        is_rare = (F.col("feature") == key) & (F.col("id") >= end) & (F.col("count") < config.vocabulary.min_count)
        parts.append(known.entries.filter(is_rare).select("feature", "id"))
    return functools.reduce(DataFrame.unionByName, parts) if parts else None


def _halves() -> tuple[Column, Column]:
    digest = F.md5(F.concat_ws(":", F.col("id").cast("string"), F.col("value")).cast("binary"))
    first, second = (F.conv(F.substring(digest, start, 15), 16, 10).cast("bigint") for start in (1, 16))
    return first, second


def _sizes() -> list[Column]:
    return [F.max("id").alias("last"), *(F.bit_xor(half).alias(f"hash_{n}") for n, half in enumerate(_halves()))]


def _by_feature(numbers: dict[str, int], otherwise: Column) -> Column:
    """The number of the row's feature."""
    column = otherwise
    for feature, number in sorted(numbers.items()):
        column = F.when(F.col("feature") == feature, F.lit(number)).otherwise(column)
    return column


def _found(sizes: Sequence[Row]) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    return {s["feature"]: s["last"] for s in sizes}, {s["feature"]: (s["hash_0"], s["hash_1"]) for s in sizes}


def fitting_dates(spark: SparkSession, config: Config, lake: Lake, dates: Iterable[str]) -> set[str]:
    """The dates that the vocabularies are fitted on: those built and those to build, inside the training dates."""
    fitting = {*dates, *sample_dates(spark, lake)}
    if config.data.train_dates:
        first, last = parse_dates(config.data.train_dates, where="data.train_dates")
        fitting = {date for date in fitting if first.isoformat() <= date <= last.isoformat()}
    return fitting


def _fitted_property(spark: SparkSession, config: Config, lake: Lake, fitting: Iterable[dt.date]) -> dict[str, str]:
    """The samples' table property of what vocabularies and scales were fitted on: these dates, and those before."""
    there = table_properties(spark, lake.path(SAMPLES)) if lake.has(spark, SAMPLES) else None
    if there is not None and FITTED_PROPERTY not in there:
        return {}  # a table older than the property: its earlier dates are not known
    before = dates_in(json.loads(there[FITTED_PROPERTY])["dates"]) if there is not None else frozenset()
    dates = date_ranges(before | {date.isoformat() for date in fitting})
    return {FITTED_PROPERTY: json.dumps({"dates": dates, "min_count": config.vocabulary.min_count}, sort_keys=True)}


def grow_vocabularies(
    spark: SparkSession,
    config: Config,
    lake: Lake,
    per_date: DataFrame,
    tables: Mapping[str, DataFrame],
    dates: Collection[str],
    packs: DataFrame,
) -> tuple[Vocabularies, FeatureSpec]:
    """Admit the values of the fitting dates, and say what the table offers: before the samples need the ids.

    The first build of a samples table also fits the numbers that want it, and what vectors are divided by.

    Args:
        per_date: impressions that carry a value, on every fitting date: feature, value, date, count.
        tables: as for `count_values`.
        dates: those that are being built; with the dates built before, they are fitted on.
        packs: `pack` rows of the pass.
    """
    known = existing_vocabularies(spark, config, lake)
    is_hashed = config.vocabulary.kind == "hash"
    if is_hashed and known.fits is not None:
        return known, feature_spec(config, known)
    fitting = [dt.date.fromisoformat(date) for date in sorted(fitting_dates(spark, config, lake, dates))]
    if known.fits is None:
        fits = fit_numbers(config, per_date, tables, packs, fitting)
        known = replace(known, fits={**fits, **fit_vectors(config.features.vectors, tables)})
    if is_hashed and not known.fits:
        return known, feature_spec(config, known)
    known = replace(known, fitted=_fitted_property(spark, config, lake, fitting))
    if is_hashed:
        return known, feature_spec(config, known)
    counted = per_date.filter(F.col("date").isin(fitting))
    names = {*dates}
    counts = count_values(counted, tables, config, [date for date in fitting if date.isoformat() in names])
    min_count = config.vocabulary.min_count
    fresh, grown = new_entries(counts, known, min_count, _have_vectors(config, tables))
    if grown.max_ids != known.max_ids:
        append_vocabularies(spark, lake, fresh)
        known = replace(grown, entries=kept(spark.read.format("delta").load(lake.path(VOCABULARIES))))
    if known.cold is not None:
        # Once shown often enough, an id stays as one that is, whatever later builds count.
        cold = known.cold.unionByName(fresh.filter(F.col("count") < min_count).select("feature", "id"))
        often = counts.filter(F.col("count") >= min_count).select("feature", "value")
        shown = known.entries.join(often, on=["feature", "value"], how="left_semi").select("feature", "id")
        known = replace(known, cold=kept(cold.distinct().join(shown, on=["feature", "id"], how="left_anti")))
    return known, feature_spec(config, known)


def _have_vectors(config: Config, tables: Mapping[str, DataFrame]) -> DataFrame | None:
    """Columns feature and value of every user and item with a vector; None where that is no reason for an id."""
    parts = []
    for owner, table in tables.items():
        names = [vector.name for vector in config.features.vectors if vector.owner == owner]
        if names and config.vocabulary.admit_vectors:
            rows = table.dropna("all", subset=names)
            parts.append(rows.select(F.lit(f"{owner}_id").alias("feature"), F.col(f"{owner}_id").alias("value")))
    return functools.reduce(DataFrame.unionByName, parts) if parts else None


def new_entries(
    counts: DataFrame, known: Vocabularies, min_count: int, always: DataFrame | None = None
) -> tuple[DataFrame, Vocabularies]:
    """Rows to append to the vocabularies, and largest ids and hashes of the features once they are.

    New ids follow the feature's largest one by descending count, then value. So those that are `always` admitted (each
    feature and value once), whatever their count, come behind the ones that are counted often enough.
    """
    order = Window.partitionBy("feature").orderBy(F.desc("count"), "value")
    offset = _by_feature(known.max_ids, F.lit(FIRST_ID - 1))
    if always is None:
        common = counts.filter(F.col("count") >= min_count)
    else:
        is_admitted = (F.col("count") >= min_count) | F.col("always:")
        both = counts.join(always.withColumn("always:", F.lit(True)), on=["feature", "value"], how="full")
        common = both.filter(is_admitted).select("feature", "value", F.coalesce("count", F.lit(0)).alias("count"))
    if known.max_ids:
        common = common.join(known.entries.select("feature", "value"), on=["feature", "value"], how="left_anti")
    number = (F.row_number().over(order) + offset).cast("bigint").alias("id")
    fresh = kept(common.select("feature", "value", number, "count"))
    max_ids, hashes = _found(fresh.groupBy("feature").agg(*_sizes()).collect())
    for feature, (high, low) in hashes.items():
        before = known.hashes.get(feature, (0, 0))
        hashes[feature] = (high ^ before[0], low ^ before[1])
    return fresh, replace(known, max_ids=known.max_ids | max_ids, hashes=known.hashes | hashes)


def feature_spec(config: Config, known: Vocabularies | None = None) -> FeatureSpec:
    """What the samples table offers a model under these vocabularies; None: empty ones."""
    hashed = ((config.vocabulary.num_buckets, HASHED),)

    def fingerprints(name: str) -> tuple[tuple[int, str], ...]:
        if config.vocabulary.kind == "hash":
            return hashed
        return known.fingerprints(name) if known else ((FIRST_ID, fingerprint_text((0, 0))),)

    sparse = []
    for name, owner in value_features(config):
        found = fingerprints(name)
        sparse.append(
            SparseFeature(
                name=name, column=index_column(name), num_embeddings=found[-1][0], owner=owner, fingerprints=found
            )
        )
    lists = [(feature, fingerprints(feature.vocabulary)) for feature in config.features.lists]
    hour = SparseFeature(
        name=EVENT_HOUR, column=index_column(EVENT_HOUR), num_embeddings=FIRST_ID + NUM_HOURS, owner="context"
    )
    fits = (known.fits if known else None) or {}
    buckets, dense = _number_features(config, fits)
    return FeatureSpec(
        scenarios=config.scenarios,
        query_scenarios=tuple(s for s in config.scenarios if s in config.query_scenarios),
        sparse=(*sparse[:3], hour, *sparse[3:], *buckets),
        dense=(
            *dense,
            *(
                DenseFeature(name=column, column=column, owner=_counter_owner(counter, dict(value_features(config))))
                for name, counter in config.every_counter.items()
                for column in counter_columns(name, counter)
            ),
        ),
        history_length=config.histories.length,
        label_delay_us=config.labels.global_window_us + config.labels.order_window_us,
        label_day_span=config.labels.global_span == "day",
        no_order_scenarios=tuple(s for s in config.scenarios if s in config.labels.no_order_scenarios),
        history_item_features=config.features.sides,
        vectors=tuple(replace(of, scale=fits.get(of.name, (1.0,))[0]) for of in config.features.vectors),
        lists=tuple(replace(of, num_embeddings=found[-1][0], fingerprints=found) for of, found in lists),
    )


def _number_features(config: Config, fits: Fits) -> tuple[list[SparseFeature], list[DenseFeature]]:
    """Numbers in buckets, and all others; without a fit as if they had no values, for their columns alone."""
    features = config.features
    buckets = []
    dense = []
    for owner in ("user", "item", "context"):
        for name in features.numbers_of(owner, BUCKETS):
            edges = fits.get(name, ())
            size = FIRST_ID + len(edges) + 1
            column = index_column(name)
            buckets.append(SparseFeature(name=name, column=column, num_embeddings=size, owner=owner, edges=edges))
        for name in features.numbers_of(owner, *(scale for scale in SCALES if scale != BUCKETS)):
            kind = features.scale_of(name)
            mean, deviation = fits.get(name, (0.0, 1.0))
            dense.append(
                DenseFeature(
                    name=name, column=scaled_column(name), owner=owner, scale=kind, mean=mean, deviation=deviation
                )
            )
    return buckets, dense


def _counter_owner(counter: CounterConfig, owners: Mapping[str, str]) -> str:
    """Whose feature a counter is: the item's if it changes with the item; else of what changes oftenest."""
    found = {owners[key] for key in counter.keys}
    return next(owner for owner in ("item", "context", "query", "user") if owner in found)


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


def scale(value: Column, kind: str, mean: float = 0.0, deviation: float = 1.0) -> Column:
    """sign(x) * log1p(|x|), (x - mean) / deviation, or x itself by `kind`, as float; 0 for null, NaN and infinity."""
    scaled = {
        LOG1P: F.signum(value) * F.log1p(F.abs(value)),
        STANDARD: (value - F.lit(mean)) / F.lit(deviation),
    }.get(kind, value)
    return F.when(is_finite(value), scaled).otherwise(F.lit(0.0)).cast("float")
