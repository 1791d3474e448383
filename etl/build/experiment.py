"""Counts of an experiment from a lake and the logs' bucket column: one row a user, then users of equal counts together.

The labels are those of the samples table, so a click and an order mean the same online as in training; the bucket is
the impressions logs', joined by impression. Only counts leave Spark.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from functools import reduce

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.checks import DataCheckError
from etl.kernel.attribution import KIND_IMPRESSION
from etl.kernel.events import context_column
from etl.lake.tables import Lake, dates_condition, sample_dates
from etl.logs.events import EventLog, event_logs, read_events
from etl.logs.files import LogFolder
from etl.logs.mapping import names_of
from usr_ray.config import Config, FeaturesConfig, date_ranges, dates_there
from usr_ray.schema import (
    EXPERIMENT_ORDERS,
    EXPERIMENT_USERS,
    IN_EXPERIMENT,
    NO_BUCKET,
    PARTITION_COLUMN,
    SAMPLES,
    SEVERAL_BUCKETS,
    UNPLANNED_BUCKET,
)

ALL = "all"
"""The scenarios together: a user who clicked in any of them clicked."""
MAX_COMBINATIONS = 4_000_000
"""Rows that the driver takes: combinations of counts, of which millions of users have some thousands."""


def experiment_counts(
    spark: SparkSession, config: Config, *, logs: str, lake: Lake, dates: tuple[dt.date, dt.date]
) -> tuple[pa.Table, tuple[str, ...], str]:
    """Count the experiment's impressions, clicks and orders on the dates, both included.

    Returns:
        The `combinations`, the scenarios whose impressions log has no bucket column: left out, and the dates that have
        samples, as "A:B" or several of that.

    Raises:
        DataCheckError: no impressions log has the bucket column, the lake has no samples, or there are too many
            combinations of counts.
        UserError: the lake has no samples of the dates, or, without data.allow_missing_dates, of one of them.
    """
    folder = LogFolder(spark, logs, config.logs)
    shown = [log for log in event_logs(config, folder) if log.kind == KIND_IMPRESSION]
    having = _logs_with_bucket(config, folder, shown)
    if not lake.has(spark, SAMPLES):
        raise DataCheckError(f"--lake {lake.root}: has no samples table; run jobs/build_samples.py first")
    table = spark.read.format("delta").load(lake.path(SAMPLES))
    there, allow_missing = sample_dates(spark, lake), config.data.allow_missing_dates
    source = f"the table {lake.path(SAMPLES)} holds"
    used, warning = dates_there(dates, there, where="--dates", source=source, allow_missing=allow_missing)
    if warning:
        print(f"warning: {warning}", flush=True)
    samples = table.filter(dates_condition(PARTITION_COLUMN, *dates))
    buckets = bucket_of_impressions(config, folder, having, dates)
    scenarios = [config.scenarios[log.scenario] for log in having]
    users = user_counts(samples, buckets, scenarios, mature_only=config.data.mature_only)
    no_orders = config.labels.no_order_scenarios
    rows = (
        combinations(users, scenarios, config.online.shares, no_orders=no_orders).limit(MAX_COMBINATIONS + 1).toArrow()
    )
    if rows.num_rows > MAX_COMBINATIONS:
        raise DataCheckError(
            f"--dates {dates[0]}:{dates[1]}: users have more than {MAX_COMBINATIONS:,} combinations of impressions, "
            "clicks and orders; name fewer dates, or leave machines out of the logs"
        )
    left_out = tuple(config.scenarios[log.scenario] for log in shown if log not in having)
    return rows, left_out, date_ranges({date.isoformat() for date in used})


def bucket_of_impressions(
    config: Config, folder: LogFolder, logs: list[EventLog], dates: tuple[dt.date, dt.date]
) -> DataFrame:
    """Grain: one row per (scenario, impression_id) of the logs on the dates. Columns: these, low and high bucket.

    A log may hold an impression twice; low and high differ where its copies name different buckets. Null: no bucket.
    """
    column = config.online.bucket_column
    bucket = F.col(f"`{context_column(column)}`")
    events = read_events(of_bucket_alone(config), folder, logs).filter(F.col("reason").isNull())
    names = F.array(*(F.lit(s) for s in config.scenarios))
    return (
        events.filter(dates_condition("to_date(event_time)", *dates))
        .groupBy(F.element_at(names, F.col("scenario") + 1).alias("scenario"), F.col("id").alias("impression_id"))
        .agg(F.min(bucket).alias("low"), F.max(bucket).alias("high"))
    )


def of_bucket_alone(config: Config) -> Config:
    """How the logs are read for the bucket column: other columns, and what is made of them, are left out."""
    return Config(
        scenarios=config.scenarios,
        query_scenarios=config.query_scenarios,
        labels=config.labels,
        logs=config.logs,
        features=FeaturesConfig(context_categories=(config.online.bucket_column,)),
    )


def user_counts(samples: DataFrame, buckets: DataFrame, scenarios: list[str], *, mature_only: bool) -> DataFrame:
    """Grain: one row per user of the samples in these scenarios.

    Columns: low and high bucket of all impressions (null: none has one), per scenario `<s>_impressions`, `<s>_clicks`
    and `<s>_orders` over the impressions that have a bucket and, if asked, final labels; not_mature and without_bucket
    count the others.
    """
    rows = samples.filter(F.col("scenario").isin(scenarios)).join(buckets, ["scenario", "impression_id"], "left")
    has_bucket = F.col("low").isNotNull()
    is_final = F.col("is_mature") if mature_only else F.lit(True)
    sums = []
    for scenario in scenarios:
        counted = has_bucket & is_final & (F.col("scenario") == scenario)
        sums += [
            F.count_if(counted).alias(f"{scenario}_impressions"),
            F.count_if(counted & (F.col("is_click") > 0)).alias(f"{scenario}_clicks"),
            F.count_if(counted & (F.col("is_order") > 0)).alias(f"{scenario}_orders"),
        ]
    return rows.groupBy("user_id").agg(
        F.min("low").alias("low"),
        F.max("high").alias("high"),
        *sums,
        F.count_if(has_bucket & ~is_final).alias("not_mature"),
        F.count_if(~has_bucket).alias("without_bucket"),
    )


def combinations(
    users: DataFrame, scenarios: list[str], shares: Mapping[str, float], *, no_orders: Sequence[str] = ()
) -> DataFrame:
    """Users of equal (status, bucket, scenario, impressions, clicks, orders) together, with their number.

    Beside the scenarios and ALL there is a row per (status, bucket) that counts users and the impressions left out;
    with `no_orders`, scenarios whose orders nobody logs, the others together are EXPERIMENT_ORDERS.
    """
    planned = F.col("low").isin(list(shares)) if shares else F.lit(True)
    status = (
        F.when(F.col("low").isNull(), NO_BUCKET)
        .when(F.col("low") != F.col("high"), SEVERAL_BUCKETS)
        .when(~planned, UNPLANNED_BUCKET)
        .otherwise(IN_EXPERIMENT)
    )
    sides = ("impressions", "clicks", "orders")
    with_orders = [s for s in scenarios if s not in no_orders]
    together = {ALL: scenarios} | ({EXPERIMENT_ORDERS: with_orders} if 0 < len(with_orders) < len(scenarios) else {})
    places = [(s, [F.col(f"{s}_{side}") for side in sides]) for s in scenarios]
    for name, members in together.items():
        totals = [reduce(lambda a, b: a + b, [F.col(f"{s}_{side}") for s in members]) for side in sides]
        places.append((name, totals))
    zero = F.lit(0).cast("bigint")
    none = [zero, zero]
    entries = [_entry(name, values, none) for name, values in places]
    exposed = F.filter(F.array(*entries), lambda entry: (status == IN_EXPERIMENT) & (entry["impressions"] > 0))
    tally = F.array(_entry(EXPERIMENT_USERS, [zero, zero, zero], [F.col("not_mature"), F.col("without_bucket")]))
    is_one = status.isin(IN_EXPERIMENT, UNPLANNED_BUCKET)
    long = users.select(
        status.alias("status"), F.when(is_one, F.col("low")).alias("bucket"), F.inline(F.concat(exposed, tally))
    )
    return long.groupBy("status", "bucket", "scenario", *sides).agg(
        F.count("*").alias("users"),
        F.sum("not_mature").alias("not_mature"),
        F.sum("without_bucket").alias("without_bucket"),
    )


def _logs_with_bucket(config: Config, folder: LogFolder, logs: list[EventLog]) -> list[EventLog]:
    column = config.online.bucket_column
    columns = {log.name: names_of(folder.read(log.name)[0]) for log in logs}
    having = [log for log in logs if column in columns[log.name]]
    if not having:
        there = "; ".join(f"{name} has {', '.join(names)}" for name, names in columns.items())
        raise DataCheckError(
            f"--bucket-column {column}: is in no impressions log ({there}); name the column that holds the bucket"
        )
    return having


def _entry(name: str, counts: list[Column], others: list[Column]) -> Column:
    keys = ("impressions", "clicks", "orders", "not_mature", "without_bucket")
    values = zip(keys, [*counts, *others], strict=True)
    return F.struct(F.lit(name).alias("scenario"), *(value.alias(key) for key, value in values))
