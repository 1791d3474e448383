"""What is fitted: of numbers mean and deviation, or quantile buckets, over the training dates; the scale of vectors.

They are fitted by the build that makes the samples table, stand in its FeatureSpec beside the fingerprints of the
vocabularies, and stay as they are: another fit would give rows of one table two meanings.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from etl.checks import DataCheckError
from etl.kernel.features import COUNTED, number_counts
from etl.session import kept
from usr_ray.config import Config, date_ranges, day_number
from usr_ray.schema import FIRST_ID, FITTED_SCALES, STANDARD, UNKNOWN_ID, FeatureSpec, VectorFeature

BUILT = "built:"
"""Column beside `count`: how many of these impressions have their rows made now."""
Fits = Mapping[str, tuple[float, ...]]
"""Number -> (mean, deviation) or the edges of its buckets (schema.SparseFeature.edges); vector -> (its scale,)."""


def fits_of(spec: FeatureSpec) -> Fits:
    """The fits that a samples table records."""
    fits = {f.name: f.edges for f in spec.sparse if f.edges is not None}
    fits |= {f.name: (f.scale,) for f in spec.vectors}
    return fits | {f.name: (f.mean, f.deviation) for f in spec.dense if f.scale == STANDARD}


def fit_numbers(
    config: Config,
    counts: DataFrame,
    tables: Mapping[str, DataFrame],
    packs: DataFrame,
    dates: Sequence[dt.date],
) -> Fits:
    """Fit every number that wants it, each impression counting once.

    Args:
        counts: impressions of each user and item on `dates`: feature, value, date, count.
        tables: "user" and "item" -> one row a key.
        packs: `pack` rows of the pass, for the numbers of the context.

    Raises:
        DataCheckError: no impression of these dates has a value of one of them.
    """
    names = [
        name for owner in ("user", "item", "context") for name in config.features.numbers_of(owner, *FITTED_SCALES)
    ]
    if not names:
        return {}
    found = kept(_counted(config, counts, tables, packs, dates))
    shares = [n / config.features.scale_buckets for n in range(1, config.features.scale_buckets)]
    quantiles = F.percentile("number", [0.0, *shares], F.col("count"))
    sums = found.groupBy("feature").agg(F.sum("count").alias("rows"), _mean(F.col("number")), quantiles.alias("at"))
    fitted = {row["feature"]: row for row in sums.collect()}
    for name in names:
        if name not in fitted:
            raise DataCheckError(
                f"features.scale.{name}: no impression has a value of it on the dates it is fitted on "
                f"({date_ranges({date.isoformat() for date in dates}) or 'none'}); build dates of data.train_dates "
                "that have one first, or take the number out"
            )
    mean = F.lit(0.0)
    for name, row in fitted.items():
        mean = F.when(F.col("feature") == name, F.lit(row["mean"])).otherwise(mean)
    squares = found.groupBy("feature").agg(_mean((F.col("number") - mean) ** 2)).collect()
    variances = {row["feature"]: row["mean"] for row in squares}
    return {
        name: standard_fit(fitted[name]["mean"], variances[name])
        if config.features.scale_of(name) == STANDARD
        else bucket_edges(fitted[name]["at"])
        for name in names
    }


def standard_fit(mean: float, variance: float) -> tuple[float, float]:
    """Mean and deviation, nine digits each: the order of a sum, and so the number of tasks, does not show.

    A deviation that these digits of the mean cannot tell from none is taken as 1.
    """
    mean, deviation = (float(f"{number:.9g}") for number in (mean, math.sqrt(variance)))
    return mean, deviation if deviation > 1e-7 * abs(mean) else 1.0


def bucket_edges(quantiles: Sequence[float]) -> tuple[float, ...]:
    """Edges between buckets: quantiles as float32, each once, above the least value, which is the first of them."""
    most = np.finfo(np.float32).max
    singles = np.clip(quantiles, -most, most).astype(np.float32).tolist()
    return tuple(above for below, above in pairwise(singles) if above > below)


def fit_vectors(vectors: Sequence[VectorFeature], tables: Mapping[str, DataFrame]) -> dict[str, tuple[float, ...]]:
    """Root mean square of the numbers of each vector over its owners, nine digits; 1 where none is or all are 0."""
    found: dict[str, tuple[float, ...]] = {}
    for owner, table in tables.items():
        names = [vector.name for vector in vectors if vector.owner == owner]
        if not names:
            continue
        squares = []
        for name in names:
            of_one = F.aggregate(F.col(name), F.lit(0.0), lambda total, one: total + one.cast("double") ** 2)
            squares.append(F.avg(of_one / F.size(name)).alias(name))
        row = table.agg(*squares).collect()[0]
        found |= {name: (float(f"{math.sqrt(row[name] or 0.0):.9g}") or 1.0,) for name in names}
    return found


def is_finite(value: Column) -> Column:
    """True for a number; False for null, NaN and infinity."""
    return value.isNotNull() & ~F.isnan(value) & (F.abs(value) != F.lit(float("inf")))


def bucket(value: Column, edges: Sequence[float]) -> Column:
    """FIRST_ID + how many edges are not above the value; UNKNOWN_ID for null, NaN and infinity (kernel/features.py)."""
    every = F.array(*(F.lit(edge) for edge in edges)).cast("array<float>")
    below = F.size(F.filter(every, lambda edge: edge <= value.cast("float")))
    return F.when(is_finite(value), F.lit(FIRST_ID) + below).otherwise(F.lit(UNKNOWN_ID)).cast("bigint")


def owned_counts(counts: DataFrame, table: DataFrame, owner: str, names: Sequence[str], of_value: str) -> DataFrame:
    """Impressions that carry a value of a user's or item's columns: feature, `of_value`, count; once for each owner.

    Args:
        counts: impressions that carry each value: feature, value, count, and BUILT where the result shall have it.
        owner: "user" or "item".
        names: columns of `table`, of one type.
        of_value: name that the value's column gets.
    """
    key, is_key = f"{owner}_id", F.col("feature") == f"{owner}_id"
    # A colon is in no feature's name: a column of the table may be called count, feature or value.
    of_key = counts.filter(is_key).withColumnsRenamed({"value": key, "count": "count:"}).drop("feature")
    sums = [name for name in of_key.columns if name != key]
    owned = table.select(key, *names).join(of_key, on=key, how="inner").select(*sums, *names)
    single = owned.unpivot([*map(F.col, sums)], [F.col(name) for name in names], "feature", of_value)
    return single.withColumnRenamed("count:", "count")


def carried(single: DataFrame) -> DataFrame:
    """feature, value and count of the values that a row built now carries: of rows with BUILT, which may repeat one."""
    sums = single.groupBy("feature", "value").agg(*(F.sum(name).alias(name) for name in ("count", BUILT)))
    return sums.filter(F.col(BUILT) > 0).drop(BUILT)


def _mean(value: Column) -> Column:
    return (F.sum(value * F.col("count")) / F.sum("count")).alias("mean")


def _counted(
    config: Config,
    counts: DataFrame,
    tables: Mapping[str, DataFrame],
    packs: DataFrame,
    dates: Sequence[dt.date],
) -> DataFrame:
    """feature, number, count of every finite value; a value may stand in several rows."""
    features = config.features
    of_context = features.numbers_of("context", *FITTED_SCALES)
    days = [day_number(date) for date in dates]

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return number_counts(batches, of_context, days)

    wanted = packs.filter(F.lit(bool(of_context))).select("targets")
    result = wanted.mapInArrow(run, from_arrow_schema(COUNTED))
    of_dates = (
        counts.filter(F.col("date").isin([*dates])).groupBy("feature", "value").agg(F.sum("count").alias("count"))
    )
    for owner, table in tables.items():
        if names := features.numbers_of(owner, *FITTED_SCALES):
            single = owned_counts(of_dates, table, owner, names, "number")
            result = result.unionByName(single.filter(is_finite(F.col("number"))))
    return result
