"""The reports of a build: sums read back from the written samples, `<lake>/reports/<date>.json`, the printed funnel."""

from __future__ import annotations

import datetime as dt
import json
import operator
import os
import platform
import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from importlib import metadata
from pathlib import Path
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

import usr_ray
from etl.build.account import UNDATED, Account
from etl.build.silence import Hour, silence
from etl.jvm import file_system, json_texts
from etl.kernel.rows import EVENT_HOUR
from etl.lake.tables import Lake
from usr_ray.config import Config, parse_dates
from usr_ray.config.stored import REPORT, REPORT_WAY_OUT, parse_json
from usr_ray.schema import (
    ALL_LABELS,
    FIRST_ID,
    PARTITION_COLUMN,
    REPORTS,
    UNKNOWN_ID,
    FeatureSpec,
    ListFeature,
    SparseFeature,
    index_column,
    scaled_column,
)

HELPLESS_RATE = 0.98
"""Above this P(y_k = 1 | y_g = 1) the global label says nothing that the scenario's own does not: GLMT cannot help."""


COLD = ("unknown_user", "unknown_item", "unknown_query", "no_history", "new_user", "new_item")
"""Kinds of cold impressions: the value has no id of its own; no event before; no training impression of it."""
_MAY_BE_COLD = ("user_id", "item_id")
"""What may have an id for its vector alone."""
_MATURE_ORDERS = "mature_orders"
WITH_QUERY = "with_query"
"""Impressions that have a query: what `unknown_query` is a part of."""


@dataclass(frozen=True, slots=True)
class Funnel:
    """Sums over impressions."""

    impressions: int = 0
    clicks: int = 0
    orders: int = 0
    clicks_global: int = 0
    orders_global: int = 0
    mature: int = 0

    def __add__(self, other: Funnel) -> Funnel:
        mine, its = asdict(self), asdict(other)
        return Funnel(**{key: mine[key] + its[key] for key in mine})

    def to_dict(self, *, knows_orders: bool = True) -> dict[str, Any]:
        """Sums and rates; a rate over nothing is null, and so is all that orders say where no log knows them."""
        numbers = asdict(self) | {
            "click_rate": _rate(self.clicks, self.impressions),
            "order_rate": _rate(self.orders, self.impressions),
            "click_rate_global": _rate(self.clicks_global, self.impressions),
            "order_rate_global": _rate(self.orders_global, self.impressions),
            "p_click_given_click_global": _rate(self.clicks, self.clicks_global),
            "p_order_given_order_global": _rate(self.orders, self.orders_global),
        }
        return {key: None if "order" in key and not knows_orders else value for key, value in numbers.items()}


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """What was written, per date."""

    funnels: Mapping[tuple[str, str], Funnel]
    """(date, scenario) -> sums."""
    known: Mapping[tuple[str, str], int]
    """(date, feature) -> impressions whose value has an id of its own; of tags and terms, values that have one."""
    present: Mapping[tuple[str, str], int]
    """(date, feature) -> impressions that have a value at all; of a number, one other than 0, which stands for null."""
    cold: Mapping[tuple[str, str], Mapping[str, int | None]] = field(default_factory=dict)
    """(date, scenario) -> impressions of each kind of COLD; null where it cannot be known."""
    hours: Mapping[tuple[dt.datetime, str], Hour] = field(default_factory=dict)
    """(begin of the hour in UTC, scenario) -> sums of its impressions."""

    def scenario(self, scenario: str) -> Funnel:
        """Sums over all dates."""
        return sum((f for (_, s), f in self.funnels.items() if s == scenario), Funnel())

    def date(self, date: str) -> Funnel:
        """Sums over all scenarios."""
        return sum((f for (d, _), f in self.funnels.items() if d == date), Funnel())


def count_samples(
    samples: DataFrame, spec: FeatureSpec, *, hashed: bool, cold_ids: DataFrame | None = None
) -> SampleCounts:
    """Read the labels and ids of written samples (with the columns of `mark_new`) back and add them up.

    `cold_ids`, as Vocabularies.cold, count as unknown: what they stand for was not shown often enough.
    """
    samples = _mark_cold(samples, cold_ids)
    features = [
        *(feature for feature in spec.sparse if feature.name != EVENT_HOUR),  # an hour is always known
        *spec.lists,
    ]
    sums = {"rows": F.lit(1), "mature": F.col("is_mature"), **{name: F.col(name) for name in ALL_LABELS}}
    for feature in features:
        for kind, least in (("known", FIRST_ID), ("present", UNKNOWN_ID)):
            sums[f"{kind}_{feature.name}"] = _at_least(feature, least)
    for key in _MAY_BE_COLD:
        sums[f"known_{key}"] = sums[f"known_{key}"] & ~F.col(f"cold:{key}")
    numbers = [feature.name for feature in spec.dense if feature.column == scaled_column(feature.name)]
    sums |= {f"present_{name}": F.col(scaled_column(name)) != 0 for name in numbers}
    sums |= _cold_conditions(spec)
    sums[_MATURE_ORDERS] = F.when(F.col("is_mature"), F.col("is_order")).otherwise(0)
    of_hours = (
        samples.groupBy(
            F.col(PARTITION_COLUMN).cast("string").alias("date"), "scenario", F.hour("event_time").alias("hour")
        )
        .agg(*(F.sum(column.cast("bigint")).alias(name) for name, column in sums.items()))
        .collect()
    )
    hours = {
        (dt.datetime.fromisoformat(f"{row['date']}T{row['hour']:02}+00:00"), row["scenario"]): Hour(
            row["rows"], row["is_click"], row["mature"], row[_MATURE_ORDERS]
        )
        for row in of_hours
    }
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in of_hours:
        total = rows.setdefault((row["date"], row["scenario"]), {})
        for name in sums:  # of what cannot be known, null on every row
            total[name] = row[name] if total.get(name) is None else total[name] + row[name]
    funnels: dict[tuple[str, str], Funnel] = {}
    known: dict[tuple[str, str], int] = {}
    present: dict[tuple[str, str], int] = {}
    cold: dict[tuple[str, str], Mapping[str, int | None]] = {}
    for group, day in rows.items():
        clicks, orders, clicks_global, orders_global = (day[name] for name in ALL_LABELS)
        funnels[group] = Funnel(day["rows"], clicks, orders, clicks_global, orders_global, day["mature"])
        # Nobody can say what is unknown among hashed ids: each has one.
        cold[group] = {n: None if hashed and n.startswith("unknown_") else day[n] for n in (*COLD, WITH_QUERY)}
        for feature in features:
            place = (group[0], feature.name)
            known[place] = known.get(place, 0) + day[f"known_{feature.name}"]
        for name in (*(feature.name for feature in features), *numbers):
            present[group[0], name] = present.get((group[0], name), 0) + day[f"present_{name}"]
    return SampleCounts(funnels, known, present, cold, hours)


def _mark_cold(samples: DataFrame, cold: DataFrame | None) -> DataFrame:
    """Add `cold:user_id` and `cold:item_id`: the id is one of `cold`."""
    for key in _MAY_BE_COLD:
        flag = f"cold:{key}"
        if cold is None:
            samples = samples.withColumn(flag, F.lit(False))
            continue
        ids = cold.filter(F.col("feature") == key).select(
            F.col("id").alias(index_column(key)), F.lit(True).alias("is:")
        )
        samples = samples.join(ids, on=index_column(key), how="left")
        samples = samples.withColumn(flag, F.coalesce("is:", F.lit(False))).drop("is:")
    return samples


def _at_least(feature: SparseFeature, least: int) -> Column:
    """How many values of a row have such an id."""
    if isinstance(feature, ListFeature):
        return F.size(F.filter(feature.column, lambda value: value >= least))
    return F.col(feature.column) >= least


def _cold_conditions(spec: FeatureSpec) -> dict[str, Column]:
    """Name of COLD, and WITH_QUERY -> what holds on its rows."""
    no_events = [F.size(history.item_ids) == 0 for history in spec.histories]

    def is_unknown(name: str) -> Column:
        return F.col(index_column(name)) == UNKNOWN_ID

    return {
        **{f"unknown_{key.removesuffix('_id')}": (is_unknown(key) | F.col(f"cold:{key}")) for key in _MAY_BE_COLD},
        "unknown_query": is_unknown("query"),
        "no_history": reduce(operator.and_, no_events),
        "new_user": F.col("is_new_user"),
        "new_item": F.col("is_new_item"),
        WITH_QUERY: F.col(index_column("query")) >= UNKNOWN_ID,
    }


def mark_new(samples: DataFrame, table: DataFrame, config: Config, dates: Sequence[dt.date]) -> DataFrame:
    """Add is_new_user and is_new_item: no impression of the training dates has the user, or the item.

    False on the training dates themselves; null where the table holds none of them yet, so that nothing can be said.

    Args:
        table: the samples table with all its dates.
        config: without training dates in it, all dates are training dates.
    """
    names = {"user_id": "is_new_user", "item_id": "is_new_item"}
    first, last = dt.date.min, dt.date.max
    if config.data.train_dates:
        first, last = parse_dates(config.data.train_dates, where="data.train_dates")
    if all(first <= date <= last for date in dates):
        return samples.withColumns({name: F.lit(False) for name in names.values()})
    is_fitted = F.col(PARTITION_COLUMN).between(F.lit(first), F.lit(last))
    fitted = table.filter(is_fitted)
    if fitted.isEmpty():
        return samples.withColumns({name: F.lit(None).cast("boolean") for name in names.values()})
    for key, name in names.items():
        seen = fitted.select(key).distinct().withColumn("_seen", F.lit(True))
        is_new = ~is_fitted & F.col("_seen").isNull()
        samples = samples.join(seen, on=key, how="left").withColumn(name, is_new).drop("_seen")
    return samples


def date_report(
    date: str, *, account: Account, counts: SampleCounts, config: Config, spec: FeatureSpec, build: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `reports/<date>.json` (docs/tables.md)."""
    total = counts.date(date)
    features = sorted({feature for _, feature in counts.known})
    return {
        "date": date,
        **build,
        "versions": versions(),
        "rows": _rows(account, date),
        "rejects": _reasons(account, date),
        "undated": {"rows": _rows(account, UNDATED), "rejects": _reasons(account, UNDATED)},
        "samples": total.impressions,
        "scenarios": {
            s: counts.funnels.get((date, s), Funnel()).to_dict(knows_orders=s not in spec.no_order_scenarios)
            for s in config.scenarios
        },
        "vocabulary_coverage": {
            f: _rate(counts.known.get((date, f), 0), counts.present.get((date, f), 0)) for f in features
        },
        "cold_start": {
            s: _cold_report(found, counts.funnels[date, s].impressions)
            for s in config.scenarios
            if (found := counts.cold.get((date, s))) is not None
        },
        "num_embeddings": {name: feature.num_embeddings for name, feature in spec.vocabularies.items()},
    }


def _cold_report(counts: Mapping[str, int | None], impressions: int) -> dict[str, Any]:
    """Cold impressions of one scenario in `reports/<date>.json`: counts, and shares of the impressions under `share`.

    The share of unknown queries is one of the impressions with a query; a share of nothing is null.
    """

    def share(name: str) -> float | None:
        count, whole = counts[name], (counts[WITH_QUERY] if name == "unknown_query" else impressions)
        return count / whole if count is not None and whole else None

    return {"impressions": impressions, **counts, "share": {name: share(name) for name in COLD}}


def versions() -> dict[str, str]:
    """Versions of what wrote the table."""
    return {
        "usr_ray": usr_ray.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("pyspark", "delta-spark", "pyarrow", "numpy")},
    }


def funnel_lines(counts: SampleCounts, spec: FeatureSpec) -> list[str]:
    """The funnel per scenario as a text table; '-' for orders that no log knows."""
    scenarios = spec.scenarios
    names = ("impressions", "clicks", "orders", "clicks_global", "orders_global", "mature")
    extra = ("P(click|click_g)", "P(order|order_g)")
    width = max(map(len, (*scenarios, "scenario")))
    lines = [f"{'scenario':<{width}} " + " ".join(f"{name:>16}" for name in (*names, *extra))]
    for scenario in scenarios:
        sums = counts.scenario(scenario)
        raw = sums.to_dict(knows_orders=scenario not in spec.no_order_scenarios)
        numbers = [f"{'-' if raw[name] is None else f'{raw[name]:,}':>16}" for name in names]
        rates = [raw["p_click_given_click_global"], raw["p_order_given_order_global"]]
        numbers += [f"{'-' if rate is None else f'{rate:.4f}':>16}" for rate in rates]
        lines.append(f"{scenario:<{width}} " + " ".join(numbers))
    if spec.no_order_scenarios:
        lines.append(f"no orders in this source: {', '.join(spec.no_order_scenarios)} (CTCVR is not trained there)")
    return lines


def _owners(spec: FeatureSpec) -> dict[str, str]:
    """Feature -> whose it is."""
    return {f.name: f.owner for f in (*spec.sparse, *spec.lists)} | {f.name: f.owner for f in spec.dense}


def owners_with_gaps(counts: SampleCounts, spec: FeatureSpec) -> list[str]:
    """'user' and 'item', where no feature of theirs has a value in every impression: some may have no row in the table.

    Args:
        counts: of the dates that are built.
    """
    num_rows = sum(funnel.impressions for funnel in counts.funnels.values())
    most: Counter[str] = Counter()
    for name, owner in _owners(spec).items():
        if name != f"{owner}_id":
            found = sum(number for (_, feature), number in counts.present.items() if feature == name)
            most[owner] = max(most[owner], found)
    return [owner for owner in ("user", "item") if owner in most and most[owner] < num_rows]


def warnings_of(counts: SampleCounts, spec: FeatureSpec, logs: Collection[str], settled: dt.datetime) -> list[str]:
    """What the user should know of labels and features before training.

    Args:
        logs: names of those that were read.
        settled: clicks of impressions before it are final.
    """
    result = []
    for name, owner in _owners(spec).items():
        there = [number for (_, feature), number in counts.present.items() if feature == name]
        if there and not any(there) and (name != "query" or spec.query_scenarios):
            way_out = (
                f"compare {owner}_id in {owner}s with that of the impressions (1 and 1.0, 007 and 7, blanks)"
                if owner in ("user", "item")
                else "look at the column in the impressions logs"
            )
            result.append(f"{name}: no impression has a value of it (of a number: other than 0); {way_out}")
    for scenario in spec.scenarios:
        sums = counts.scenario(scenario)
        if not {"orders", f"{scenario}_orders"} & set(logs) and scenario not in spec.no_order_scenarios:
            result.append(
                f"{scenario}: no log holds its orders, so is_order is 0 on every row and will be trained on; if "
                "they are not known rather than none, name it in labels.no_order_scenarios"
            )
        for task, mine, union in (
            ("click", sums.clicks, sums.clicks_global),
            ("order", sums.orders, sums.orders_global),
        ):
            if task == "order" and scenario in spec.no_order_scenarios:
                continue
            rate = _rate(mine, union)
            if rate is not None and rate > HELPLESS_RATE:
                result.append(
                    f"{scenario}: P(is_{task} | is_{task}_global) = {rate:.4f} > {HELPLESS_RATE}: users hardly {task} "
                    "the same item elsewhere, so GLMT cannot help here; consider a longer labels.global_window"
                )
    result += silence(counts.hours, spec.scenarios, settled, spec.no_order_scenarios)
    if not any(funnel.mature for funnel in counts.funnels.values()):
        result.append("no row is mature: training will refuse these dates; build again with a later --watermark")
    return result


def write_report(spark: SparkSession, lake: Lake, name: str, report: Mapping[str, Any]) -> None:
    """Write `<lake>/reports/<name>.json`: whole or not at all."""
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path = f"{lake.path(REPORTS)}/{name}.json"
    if "://" not in path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        return
    system, target = file_system(spark, path)
    stream = system.create(target, True)  # object stores show a file once its stream is closed
    stream.write(bytearray(text.encode("utf-8")))
    stream.close()


def read_reports(spark: SparkSession, lake: Lake) -> dict[str, dict[str, Any]]:
    """Date -> report, of every date built so far."""
    texts = json_texts(spark, lake.path(REPORTS)).items()
    found = [parse_json(text, REPORT, where=path, way_out=REPORT_WAY_OUT) for path, text in texts]
    return {report["date"]: report for report in sorted(found, key=lambda report: report["date"])}


def _rows(account: Account, date: str) -> dict[str, dict[str, int]]:
    return {log: asdict(count) for (log, day), count in sorted(account.counts.items()) if day == date}


def _reasons(account: Account, date: str) -> dict[str, dict[str, int]]:
    return {log: dict(sorted(r.items())) for (log, day), r in sorted(account.reasons.items()) if day == date}


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None
