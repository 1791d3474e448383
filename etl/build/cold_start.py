"""Cold users and items: how many impressions of a date and scenario a model has to rank knowing little or nothing."""

from __future__ import annotations

import datetime as dt
import operator
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from etl.build.sample_counts import COLD, WITH_QUERY
from usr_ray.config import Config, day_number, parse_dates
from usr_ray.schema import PARTITION_COLUMN, UNKNOWN_ID, FeatureSpec, index_column

_OWNERS = ("user_id", "item_id")


def fitted_samples(table: DataFrame, config: Config, without: Collection[dt.date]) -> DataFrame | None:
    """Rows of the training dates, without those of some dates; None where there are none."""
    rows = table.filter(_is_fitted(config))
    if without:
        rows = rows.filter(~F.col(PARTITION_COLUMN).isin(*without))
    return None if rows.isEmpty() else rows


def seen_values(values: DataFrame, table: DataFrame | None, dates: Sequence[dt.date]) -> DataFrame:
    """`feature`, `value` of the users and items that have an impression on the training dates, each once.

    Args:
        values: `value` rows of the pass that makes the rows of `dates`.
        table: samples of other training dates (`fitted_samples`).
        dates: training dates that are being written.
    """
    days = F.array(*(F.lit(day_number(date)) for date in dates)).cast("array<bigint>")
    of_pass = values.filter(F.col("feature").isin(*_OWNERS) & F.arrays_overlap("days", days))
    seen = of_pass.select("feature", "value")
    if table is not None:
        owned = F.explode(F.array(*(F.struct(F.lit(k).alias("feature"), F.col(k).alias("value")) for k in _OWNERS)))
        seen = seen.unionByName(table.select(owned.alias("seen")).select("seen.*"))
    return seen.distinct()


def _is_fitted(config: Config) -> Column:
    first, last = parse_dates(config.data.train_dates, where="data.train_dates")
    return F.col(PARTITION_COLUMN).between(F.lit(first), F.lit(last))


def is_fitting(config: Config, date: dt.date) -> bool:
    """True for a training date; every date is one where the configuration names none."""
    if not config.data.train_dates:
        return True
    first, last = parse_dates(config.data.train_dates, where="data.train_dates")
    return first <= date <= last


def mark_new(samples: DataFrame, table: DataFrame, config: Config, dates: Sequence[dt.date]) -> DataFrame:
    """Add is_new_user and is_new_item: no impression of the training dates has the user, or the item.

    False on the training dates themselves; null where the table holds none of them yet, so that nothing can be said.

    Args:
        samples: rows of `dates`.
        table: the whole samples table.
        config: names the training dates; without any, all dates are.
        dates: dates of `samples`.
    """
    nothing_new = {name: F.lit(False) for name in ("is_new_user", "is_new_item")}
    if all(is_fitting(config, date) for date in dates):
        return samples.withColumns(nothing_new)
    is_fitted, fitted = _is_fitted(config), fitted_samples(table, config, ())
    if fitted is None:
        return samples.withColumns(dict.fromkeys(nothing_new, F.lit(None).cast("boolean")))
    for key, name in (("user_id", "is_new_user"), ("item_id", "is_new_item")):
        seen = fitted.select(key).distinct().withColumn("_seen", F.lit(True))
        is_new = ~is_fitted & F.col("_seen").isNull()
        samples = samples.join(seen, on=key, how="left").withColumn(name, is_new).drop("_seen")
    return samples


def cold_sums(spec: FeatureSpec) -> list[Column]:
    """Sums over rows of `mark_new`, one a name of COLD and one of WITH_QUERY."""
    no_events = [F.size(history.item_ids) == 0 for history in spec.histories]
    is_cold = {
        **{
            f"unknown_{key}": F.col(index_column(name)) == UNKNOWN_ID
            for key, name in (("user", "user_id"), ("item", "item_id"), ("query", "query"))
        },
        "no_history": reduce(operator.and_, no_events),
        "new_user": F.col("is_new_user"),
        "new_item": F.col("is_new_item"),
        WITH_QUERY: F.col(index_column("query")) >= UNKNOWN_ID,
    }
    return [F.sum(condition.cast("bigint")).alias(name) for name, condition in is_cold.items()]


def cold_start(row: Mapping[str, Any] | Row, *, hashed: bool) -> dict[str, int | None]:
    """Counts of COLD and WITH_QUERY of one group; null where nobody can know: hashed ids are never unknown."""
    return {name: None if hashed and name.startswith("unknown_") else row[name] for name in (*COLD, WITH_QUERY)}


def cold_report(counts: Mapping[str, int | None], impressions: int) -> dict[str, Any]:
    """`cold_start` of one scenario in `reports/<date>.json`: counts, and shares of the impressions under `share`.

    The share of unknown queries is one of the impressions with a query; a share of nothing is null.
    """

    def share(name: str) -> float | None:
        count, whole = counts[name], (counts[WITH_QUERY] if name == "unknown_query" else impressions)
        return count / whole if count is not None and whole else None

    return {"impressions": impressions, **counts, "share": {name: share(name) for name in COLD}}
