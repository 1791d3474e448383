"""The inputs of a build: logs opened and checked, duplicates set aside, every row attributed or rejected once."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.account import Account, account_of, add_audit, audit_events, unique_features
from etl.attribution import LabelRules
from etl.checks import check_accounting
from etl.duplicates import split_duplicates
from etl.events import KIND_IMPRESSION
from etl.log_files import LogFolder
from etl.logs import EventLog, event_logs, read_events, read_features
from etl.session import kept
from etl.user_pass import PassPlan
from etl.vocabulary import feature_spec
from usr_ray.config import Config

MAX_ROWS_PER_FILE = 1 << 20
"""Impressions of one date in one file, at most; sets the number of tasks together with the number of cores."""
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Checked logs, nothing computed twice: unique event rows, feature tables and the account so far."""

    logs: tuple[EventLog, ...]
    events: DataFrame
    unique: DataFrame
    users: DataFrame | None
    items: DataFrame | None
    account: Account

    @property
    def impressions(self) -> DataFrame:
        """Unique impressions."""
        return self.unique.filter(F.col("kind") == KIND_IMPRESSION)

    @property
    def unusable(self) -> DataFrame:
        """Rows without a key or a time, in the columns of the rejects."""
        broken = self.events.filter(F.col("reason").isNotNull())
        return broken.select("log", "reason", F.col("row_json").alias("row"), F.to_date("event_time").alias("date"))

    def num_impressions(self, dates: set[str]) -> dict[str, int]:
        """Impressions that came in on each of the dates."""
        shown = dict.fromkeys(dates, 0)
        for (log, date), count in self.account.counts.items():
            if date in dates and log.endswith("_impressions"):
                shown[date] += count.used
        return shown


def read_inputs(spark: SparkSession, config: Config, logs_dir: str) -> Inputs:
    """Open, check and cast all logs, and set duplicates aside.

    Raises:
        DataCheckError: a log or a column is missing or has the wrong type.
    """
    folder = LogFolder(spark, logs_dir, config.logs)
    logs = event_logs(config, folder)
    events = read_events(config, folder, logs)
    features = config.features
    tables = {}
    for log, key, categories, numbers in (
        ("users", "user_id", features.user_categories, features.user_numbers),
        ("items", "item_id", features.item_categories, features.item_numbers),
    ):
        if categories or numbers:
            tables[log] = (read_features(folder, log, key, categories, numbers), key)
    unique, duplicates = split_duplicates(events.filter(F.col("reason").isNull()).drop("reason", "row_json"))
    # Three passes read it, and clean rows are smaller than the logs.
    unique = kept(unique)
    account = account_of(events, duplicates, logs)
    unique_tables = {log: unique_features(table, log, key, account) for log, (table, key) in tables.items()}
    return Inputs(logs, events, unique, unique_tables.get("users"), unique_tables.get("items"), account)


def make_plan(config: Config, inputs: Inputs, watermark: dt.datetime | None) -> PassPlan:
    """The plan of a pass without dates yet; the watermark is by default the newest event of all logs."""
    moment = watermark or inputs.account.newest or _EPOCH
    return PassPlan(
        rules=LabelRules.from_config(config.labels),
        spec=feature_spec(config, {}),
        watermark=(moment - _EPOCH) // dt.timedelta(microseconds=1),
        days=(),
    )


def audited(spark: SparkSession, inputs: Inputs, plan: PassPlan) -> DataFrame:
    """Attribute every row once, before anything is written; the account then adds up (`audit_events`)."""
    result = audit_events(inputs.unique, inputs.logs, plan, num_tasks(spark, inputs, inputs.account.impression_dates))
    add_audit(inputs.account, result)
    check_accounting(inputs.account.counts)
    return result


def num_tasks(spark: SparkSession, inputs: Inputs, dates: set[str]) -> int:
    """Tasks of a pass: each core has one, and no file gets more than MAX_ROWS_PER_FILE rows of a date."""
    most = max(
        (count.rows_in for (log, date), count in inputs.account.counts.items()
         if date in dates and log.endswith("_impressions")),
        default=0,
    )  # fmt: skip
    return max(spark.sparkContext.defaultParallelism, -(-most // MAX_ROWS_PER_FILE))


def day_of(date: str) -> int:
    """Days since 1970 of YYYY-MM-DD."""
    return (dt.date.fromisoformat(date) - _EPOCH.date()).days


def iso_time(micros: int) -> str:
    """ISO 8601 of microseconds since 1970."""
    return (_EPOCH + dt.timedelta(microseconds=micros)).isoformat()
