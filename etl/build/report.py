"""The reports of a build: `<lake>/reports/<date>.json` and the funnel that the job prints."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

import usr_ray
from etl.build.account import UNDATED, Account
from etl.build.cold_start import cold_report, cold_start, cold_sums
from etl.build.sample_counts import counted_features
from usr_ray.config import Config
from usr_ray.schema import ALL_LABELS, FIRST_ID, PARTITION_COLUMN, UNKNOWN_ID, FeatureSpec

HELPLESS_RATE = 0.98
"""Above this P(y_k = 1 | y_g = 1) the global label says nothing that the scenario's own does not: GLMT cannot help."""


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
    """(date, feature) -> impressions whose value has an id of its own."""
    present: Mapping[tuple[str, str], int]
    """(date, feature) -> impressions that have a value at all."""
    cold: Mapping[tuple[str, str], Mapping[str, int | None]] = field(default_factory=dict)
    """(date, scenario) -> impressions of each kind of etl.build.sample_counts.COLD; null where it cannot be known."""

    def __or__(self, other: SampleCounts) -> SampleCounts:
        """Those of other dates too."""
        return SampleCounts(
            funnels={**self.funnels, **other.funnels},
            known={**self.known, **other.known},
            present={**self.present, **other.present},
            cold={**self.cold, **other.cold},
        )

    def scenario(self, scenario: str) -> Funnel:
        """Sums over all dates."""
        return sum((f for (_, s), f in self.funnels.items() if s == scenario), Funnel())

    def date(self, date: str) -> Funnel:
        """Sums over all scenarios."""
        return sum((f for (d, _), f in self.funnels.items() if d == date), Funnel())


def count_samples(samples: DataFrame, spec: FeatureSpec, *, hashed: bool) -> SampleCounts:
    """Read the labels and ids of written samples (`etl.build.cold_start.mark_new`) back and add them up."""
    sums = [F.sum(F.col(name)).cast("bigint").alias(name) for name in ALL_LABELS]
    features = counted_features(spec)
    covered = [
        F.sum((F.col(f.column) >= floor).cast("bigint")).alias(f"{what}_{f.name}")
        for f in features
        for what, floor in (("known", FIRST_ID), ("present", UNKNOWN_ID))
    ]
    whole = [F.count("*").alias("rows"), F.sum(F.col("is_mature").cast("bigint")).alias("mature")]
    rows = (
        samples.groupBy(F.col(PARTITION_COLUMN).cast("string").alias("date"), "scenario")
        .agg(*whole, *sums, *covered, *cold_sums(spec))
        .collect()
    )
    return sample_counts([row.asDict() for row in rows], spec, hashed=hashed)


def sample_counts(rows: Iterable[Mapping[str, Any]], spec: FeatureSpec, *, hashed: bool) -> SampleCounts:
    """Sums of each date and scenario (etl/build/sample_counts.py) in the form that the reports want."""
    funnels: dict[tuple[str, str], Funnel] = {}
    known: dict[tuple[str, str], int] = {}
    present: dict[tuple[str, str], int] = {}
    cold: dict[tuple[str, str], Mapping[str, int | None]] = {}
    for row in rows:
        group = (row["date"], row["scenario"])
        clicks, orders, clicks_global, orders_global = (row[name] for name in ALL_LABELS)
        funnels[group] = Funnel(row["rows"], clicks, orders, clicks_global, orders_global, row["mature"])
        cold[group] = cold_start(row, hashed=hashed)
        for feature in counted_features(spec):
            place = (row["date"], feature.name)
            known[place] = known.get(place, 0) + row[f"known_{feature.name}"]
            present[place] = present.get(place, 0) + row[f"present_{feature.name}"]
    return SampleCounts(funnels, known, present, cold)


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
            s: cold_report(found, counts.funnels[date, s].impressions)
            for s in config.scenarios
            if (found := counts.cold.get((date, s))) is not None
        },
        "num_embeddings": {feature.name: feature.num_embeddings for feature in spec.sparse},
    }


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


def warnings_of(counts: SampleCounts, spec: FeatureSpec, logs: Collection[str]) -> list[str]:
    """What the user should know of the labels before training on them; `logs`: names of those that were read."""
    result = []
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
    if not any(funnel.mature for funnel in counts.funnels.values()):
        result.append("no row is mature: training will refuse these dates; build again with a later --watermark")
    return result


def _rows(account: Account, date: str) -> dict[str, dict[str, int]]:
    return {log: asdict(count) for (log, day), count in sorted(account.counts.items()) if day == date}


def _reasons(account: Account, date: str) -> dict[str, dict[str, int]]:
    return {log: dict(sorted(r.items())) for (log, day), r in sorted(account.reasons.items()) if day == date}


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None
