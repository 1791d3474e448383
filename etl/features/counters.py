"""`<lake>/counters`: daily sums of past events by value, and what the rows of some days need of them.

The sums are replaced from the first date that a build reads the logs of; those of earlier dates stay, so that no build
reads the logs of all history. They depend on the logs alone, like the state (etl/build/state.py), and are committed
before it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Sequence

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.jvm import table_version
from etl.kernel.counters import cell_name
from etl.kernel.events import context_column, owned_column
from etl.kernel.packs import CELL_PREFIX
from etl.lake.tables import COUNTERS_SCHEMA, Lake, create_table, replace_dates
from usr_ray.config import Config, date_of
from usr_ray.config.counters import COUNTER_IDS, CounterConfig
from usr_ray.daily_sums import ALL_ROWS, CounterColumns, CounterPlan
from usr_ray.schema import COUNTERS


def counted_columns(config: Config, counter: CounterConfig) -> tuple[str, ...]:
    """Columns of the pass that hold a counter's keys."""
    of_context = config.features.context_categories
    return tuple(
        key if key in COUNTER_IDS else context_column(key) if key in of_context else owned_column(key)
        for key in counter.keys
    )


def counted_feature(config: Config, counter: CounterConfig) -> str:
    """Feature of the packs whose values are those of a counter's keys."""
    return cell_name(counted_columns(config, counter)).removeprefix(context_column(""))


def told_columns(config: Config) -> tuple[tuple[str, ...], ...]:
    """Columns of the pass that are summed for the service alone: each category that counters count by, with its owner.

    So `<lake>/counters` says which value a user or item had when it was shown last, as text and however rare.
    """
    keys = {key for counter in config.every_counter.values() for key in counter.keys}
    names = [(f"{owner}_id", name) for owner in ("user", "item") for name in config.features.categories_of(owner)]
    return tuple((key, owned_column(name)) for key, name in names if name in keys)


def update_counters(
    spark: SparkSession, config: Config, lake: Lake, counted: DataFrame, condition: str, metadata: str
) -> DataFrame:
    """Replace the sums of the dates that a build has read; the whole table as it is then.

    Args:
        counted: `count` rows of the pass.
        condition: which dates of events are replaced, as SQL on a column `event_date`.
    """
    path = lake.path(COUNTERS)
    if not lake.has(spark, COUNTERS):
        create_table(spark, lake, COUNTERS, COUNTERS_SCHEMA, "event_date")
    scenario = F.element_at(F.array(*map(F.lit, config.scenarios)), F.col("scenario") + 1)
    number = [F.sum(F.col("counts")[n]).alias(name) for n, name in enumerate(("impressions", "clicks", "orders"))]
    fresh = counted.groupBy(
        F.regexp_replace("feature", f"^({CELL_PREFIX}|{context_column('')})", "").alias("name"),
        F.col("value").alias("key"),
        _date(F.col("days")[0]).alias("date"),
        _date(F.col("day")).alias("event_date"),
        scenario.alias("scenario"),
    ).agg(*number)
    replace_dates(fresh.filter(condition).select(COUNTERS_SCHEMA.names), path, condition, metadata=metadata)
    return spark.read.format("delta").option("versionAsOf", table_version(spark, path)).load(path)


def sums_of_values(table: DataFrame, config: Config, days: Sequence[int]) -> DataFrame:
    """feature, value and `sums` (daily_sums.SUMS, one after the other) of what the rows of `days` may see."""
    features = {counted_feature(config, counter) for counter in config.every_counter.values()}
    names = [name.removeprefix(CELL_PREFIX) for name in features]
    visible = _visible(table, config, days).filter(F.col("name").isin(names))
    entry = F.array("day", "index", "impressions", "clicks", "orders")
    cells = [name.removeprefix(CELL_PREFIX) for name in features if name.startswith(CELL_PREFIX)]
    feature = F.when(F.col("name").isin(cells), F.concat(F.lit(CELL_PREFIX), "name")).otherwise(F.col("name"))
    grouped = visible.groupBy(feature.alias("feature"), F.col("key").alias("value"))
    return grouped.agg(F.flatten(F.collect_list(entry)).alias("sums"))


def counter_plan(table: DataFrame, config: Config, days: Sequence[int]) -> CounterPlan:
    """The columns of the counters, and the sums of whole scenarios."""
    visible = _visible(table, config, days).filter(F.col("name") == ALL_ROWS)
    rows = visible.select("day", "index", "impressions", "clicks", "orders").collect()
    counters = config.every_counter.items()
    return CounterPlan(
        columns=tuple(CounterColumns.of(name, one, counted_feature(config, one)) for name, one in counters),
        prior=config.counters.prior,
        num_scenarios=len(config.scenarios),
        of_scenarios=tuple(int(number) for row in sorted(rows) for number in row),
        cvr_without=tuple(map(config.scenarios.index, config.cvr_without)),
    )


def counter_fingerprints(table: DataFrame | None, config: Config, days: Iterable[int]) -> dict[str, str]:
    """Date -> hash of all sums that its rows may see: where it differs, its counters do; {} without counters."""
    if table is None:
        return {}
    per_day = table.groupBy("name", "key", "date", "scenario").agg(*map(F.sum, ("impressions", "clicks", "orders")))
    hashed = per_day.groupBy("date").agg(
        F.bit_xor(F.xxhash64(*(c for c in per_day.columns if c != "date"))).alias("hash")
    )
    hashes = {row["date"]: row["hash"] for row in hashed.collect()}
    longest = _longest(config)
    found = {}
    for day in days:
        date = date_of(day)
        first = dt.date.min if longest is None else date_of(day) - dt.timedelta(days=longest)
        seen = sorted((past.isoformat(), value) for past, value in hashes.items() if first <= past < date)
        found[date.isoformat()] = hashlib.md5(repr(seen).encode(), usedforsecurity=False).hexdigest()[:16]
    return found


def _visible(table: DataFrame, config: Config, days: Sequence[int]) -> DataFrame:
    """Sums by name, key, `day` and `index` (of the scenario) that rows of these days may see.

    What no window of days reaches counts for "all" alone, as one day.
    """
    windows = counted_windows(config)
    reach = min(days) - max([0, *(days_ for days_ in windows if days_ is not None)])
    day = F.unix_date("date").cast("bigint")
    rows = table.filter(day < max(days))
    rows = (
        rows.withColumn("day", F.greatest(day, F.lit(reach - 1)))
        if None in windows
        else rows.filter(day >= reach).withColumn("day", day)
    )
    index = (F.array_position(F.array(*map(F.lit, config.scenarios)), F.col("scenario")) - 1).cast("bigint")
    sums = [F.sum(name).alias(name) for name in ("impressions", "clicks", "orders")]
    return rows.groupBy("name", "key", "day", index.alias("index")).agg(*sums)


def counted_windows(config: Config) -> list[int | None]:
    """Days that each window of each counter looks back; None: all."""
    return [counter.days(window) for counter in config.every_counter.values() for window in counter.windows]


def _longest(config: Config) -> int | None:
    windows = counted_windows(config)
    return None if None in windows else max(days for days in windows if days is not None)


def _date(day: Column) -> Column:
    return F.date_from_unix_date(day.cast("int"))
