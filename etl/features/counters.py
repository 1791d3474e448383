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
from usr_ray.config.counters import COUNTED, COUNTER_IDS, CounterConfig
from usr_ray.daily_sums import ALL_ROWS, SUMS, CounterColumns, CounterPlan
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
        counted: feature, value and packs.DAY_SUMS of the pass.
        condition: which dates of events are replaced, as SQL on a column `event_date`.
    """
    path = lake.path(COUNTERS)
    if not lake.has(spark, COUNTERS):
        create_table(spark, lake, COUNTERS, COUNTERS_SCHEMA, "event_date")
    scenario = F.element_at(F.array(*map(F.lit, config.scenarios)), F.col("scenario") + 1)
    rows = counted.select(
        F.regexp_replace("feature", f"^({CELL_PREFIX}|{context_column('')})", "").alias("name"),
        F.col("value").alias("key"),
        _date(F.col("day")).alias("date"),
        _date(F.col("event_day")).alias("event_date"),
        scenario.alias("scenario"),
        *COUNTED,
    )
    # A user is in one chunk, so its rows are sums already and need no shuffle.
    of_users = F.array_contains(F.split("name", ":"), "user_id")
    fresh = rows.filter(~of_users).groupBy("name", "key", "date", "event_date", "scenario")
    both = rows.filter(of_users).unionByName(fresh.agg(*_summed()))
    replace_dates(both.filter(condition).select(COUNTERS_SCHEMA.names), path, condition, metadata=metadata)
    return spark.read.format("delta").option("versionAsOf", table_version(spark, path)).load(path)


def sums_of_values(table: DataFrame, config: Config, days: Sequence[int]) -> DataFrame:
    """feature, value and daily_sums.SUMS of what the rows of `days` may see; more than one row of a day may add up."""
    features = {counted_feature(config, counter) for counter in config.every_counter.values()}
    names = [name.removeprefix(CELL_PREFIX) for name in features]
    recent, old = _visible(table.filter(F.col("name").isin(names)), config, days)
    if old is not None:  # much, where a lake is old, and a row a value at most
        recent = recent.unionByName(old.groupBy("name", "key", "day", "scenario").agg(*_summed()))
    cells = [name.removeprefix(CELL_PREFIX) for name in features if name.startswith(CELL_PREFIX)]
    feature = F.when(F.col("name").isin(cells), F.concat(F.lit(CELL_PREFIX), "name")).otherwise(F.col("name"))
    return recent.select(feature.alias("feature"), F.col("key").alias("value"), *SUMS)


def counter_plan(table: DataFrame, config: Config, days: Sequence[int]) -> CounterPlan:
    """The columns of the counters, and the sums of whole scenarios."""
    parts = [part for part in _visible(table.filter(F.col("name") == ALL_ROWS), config, days) if part is not None]
    rows = [row for part in parts for row in part.groupBy("day", "scenario").agg(*_summed()).collect()]
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
    # Only where a row came late are there sums of several days of events, which are added up.
    late = [row["date"] for row in table.filter("date != event_date").select("date").distinct().collect()]
    columns = ("name", "key", "date", "scenario", *COUNTED)
    added = table.filter(F.col("date").isin(late)).groupBy(*columns[:4]).agg(*_summed())
    per_day = table.filter(~F.col("date").isin(late)).select(*columns).unionByName(added)
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


def _visible(table: DataFrame, config: Config, days: Sequence[int]) -> tuple[DataFrame, DataFrame | None]:
    """name, key and SUMS that rows of these days may see: of days that a window may end at, and of those before.

    The latter count for "all" alone (None without such a window), and are one day.
    """
    windows = counted_windows(config)
    reach = min(days) - max([0, *(days_ for days_ in windows if days_ is not None)])
    index = (F.array_position(F.array(*map(F.lit, config.scenarios)), F.col("scenario")) - 1).cast("bigint")

    def of(rows: DataFrame, day: Column) -> DataFrame:
        return rows.select("name", "key", day.cast("bigint").alias("day"), index.alias("scenario"), *COUNTED)

    date = F.col("date")
    recent = table.filter((date >= F.lit(date_of(reach))) & (date < F.lit(date_of(max(days)))))
    old = table.filter(date < F.lit(date_of(reach)))
    return of(recent, F.unix_date(date)), of(old, F.lit(reach - 1)) if None in windows else None


def _summed() -> list[Column]:
    return [F.sum(name).alias(name) for name in COUNTED]


def counted_windows(config: Config) -> list[int | None]:
    """Days that each window of each counter looks back; None: all."""
    return [counter.days(window) for counter in config.every_counter.values() for window in counter.windows]


def _longest(config: Config) -> int | None:
    windows = counted_windows(config)
    return None if None in windows else max(days for days in windows if days is not None)


def _date(day: Column) -> Column:
    return F.date_from_unix_date(day.cast("int"))
