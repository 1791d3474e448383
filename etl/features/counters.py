"""`<lake>/counters`: daily sums of past events by value, and what the rows of some days need of them.

The sums are replaced from the first date that a build reads the logs of; those of earlier dates stay, so that no build
reads the logs of all history. They depend on the logs alone, like the state (etl/build/state.py), and are committed
before it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from etl.kernel.counters import cell_name, packed_sums, table_rows
from etl.kernel.events import context_column, owned_column
from etl.kernel.packs import CELL_PREFIX, pair_values
from etl.lake.tables import COUNTERS_SCHEMA
from usr_ray.config import Config, date_of
from usr_ray.config.counters import COUNTED, COUNTER_IDS, CounterConfig
from usr_ray.daily_sums import ALL_ROWS, SUMS, CounterColumns, CounterPlan


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


def told_categories(config: Config) -> dict[str, tuple[str, ...]]:
    """Owner ("user", "item") -> its categories that counters count by; an owner without any is left out.

    `<lake>/counters` has sums by the owner and each of them besides, for the service alone: so it says which value a
    user or item had when it was shown last, as text and however rare.
    """
    keys = {key for counter in config.every_counter.values() for key in counter.keys}
    names = {o: tuple(n for n in config.features.categories_of(o) if n in keys) for o in ("user", "item")}
    return {owner: found for owner, found in names.items() if found}


def counter_rows(config: Config, counted: DataFrame, tables: Mapping[str, DataFrame]) -> DataFrame:
    """Rows of the table of all that a build has counted.

    Args:
        counted: `count` rows of the pass.
        tables: "user" and "item" -> one row a key, with the categories that the pass has counted by.
    """
    told = told_categories(config)
    columns = [counted_columns(config, counter) for counter in config.every_counter.values()]
    by_user = {cell_name(one) for one in columns if "user_id" in one}
    others = {ALL_ROWS, *map(cell_name, columns)} - by_user
    keys = {f"{owner}_id" for owner in told}
    frames = [
        _summed_rows(config, counted, by_user - keys, of_users=True),
        _summed_rows(config, counted, others - keys, of_users=False),
    ]
    for owner, names in told.items():
        rows = _summed_rows(config, counted, {f"{owner}_id"}, of_users=owner == "user")
        frames.append(_with_told(rows, tables[owner], owner, names, keep=f"{owner}_id" in by_user | others))
    return reduce(DataFrame.unionByName, frames).select(COUNTERS_SCHEMA.names)


def _summed_rows(config: Config, counted: DataFrame, features: set[str], *, of_users: bool) -> DataFrame:
    """The table's rows of some features of the pass."""
    schema, scenarios = to_arrow_schema(COUNTERS_SCHEMA, timezone="UTC"), config.scenarios

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return table_rows(batches, scenarios, schema)

    packed = counted.filter(F.col("feature").isin(sorted(features))).select("feature", "table")
    rows = packed.mapInArrow(run, COUNTERS_SCHEMA)
    if of_users:  # a user is in one chunk, so its rows are sums already and need no shuffle
        return rows
    return rows.groupBy("name", "key", "date", "event_date", "scenario").agg(*_summed())


def _with_told(rows: DataFrame, table: DataFrame, owner: str, names: Sequence[str], *, keep: bool) -> DataFrame:
    """The rows by an owner's id (where they are to `keep`), and again by the id and each category that it has."""
    categories = table.select(F.col(f"{owner}_id").alias("key"), *(F.col(n).alias(f"told:{n}") for n in names))

    def escaped(column: str) -> Column:  # as daily_sums.key_parts_joined has it
        return F.replace(F.replace(F.col(column), F.lit("\\"), F.lit("\\\\")), F.lit("|"), F.lit("\\|"))

    places = [F.struct("name", "key")] if keep else []
    for name in names:
        place = F.struct(
            F.lit(f"{owner}_id:{name}").alias("name"),
            F.concat_ws("|", escaped("key"), escaped(f"told:{name}")).alias("key"),
        )
        places.append(F.when(F.col(f"told:{name}").isNotNull(), place))
    joined = rows.join(categories, on="key", how="left" if keep else "inner")
    return joined.select(F.inline(F.array_compact(F.array(*places))), "date", "event_date", "scenario", *COUNTED)


def sums_of_values(table: DataFrame, config: Config, days: Sequence[int], since: dt.date | None) -> DataFrame:
    """feature, value and daily_sums.SUMS of what the rows of `days` may see; more than one row of a day may add up.

    Of users only what was counted before `since` (None: nothing): the packs have the rest.
    """
    features = {counted_feature(config, counter) for counter in config.every_counter.values()}
    of_users = [name.removeprefix(CELL_PREFIX) for name in features if "user_id" in name.split(":")]
    names = [name.removeprefix(CELL_PREFIX) for name in features]
    wanted = F.col("name").isin([name for name in names if name not in of_users])
    if since is not None:
        wanted |= F.col("name").isin(of_users) & (F.col("event_date") < F.lit(since))
    recent, old = _visible(table.filter(wanted), config, days)
    if old is not None:  # much, where a lake is old, and a row a value at most
        recent = recent.unionByName(old.groupBy("name", "key", "day", "scenario").agg(*_summed()))
    cells = [name.removeprefix(CELL_PREFIX) for name in features if name.startswith(CELL_PREFIX)]
    feature = F.when(F.col("name").isin(cells), F.concat(F.lit(CELL_PREFIX), "name")).otherwise(F.col("name"))
    return recent.select(feature.alias("feature"), F.col("key").alias("value"), *SUMS)


def sums_of_chunks(values: DataFrame, pairs: DataFrame, sums: DataFrame) -> DataFrame:
    """One row a chunk: `sums`, what `packed_sums` (etl/kernel/counters.py) makes of those of its codes.

    Args:
        values: `value` rows of the pass.
        pairs: `pairs` rows of the pass.
        sums: from `sums_of_values`.
    """
    single = values.select("chunk", "feature", "code", "value")
    arrow_schema = to_arrow_schema(single.schema)

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return pair_values(batches, arrow_schema)

    every = single.unionByName(pairs.select("chunk", "feature", "table").mapInArrow(run, single.schema))
    # One list a value, however many chunks have it: an item's sums are many.
    of_value = sums.groupBy("feature", "value").agg(F.flatten(F.collect_list(F.array(*SUMS))).alias("sums"))
    found = every.join(of_value, on=["feature", "value"], how="inner").select("chunk", "feature", "code", "sums")
    # A worker packs them, row by row: as one list of the JVM a chunk's would be some hundred megabytes, several times.
    return found.repartition("chunk").sortWithinPartitions("chunk").mapInArrow(packed_sums, "chunk string, sums binary")


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
