"""The report on an experiment as one plain dictionary: what is printed, written as JSON and drawn. No Spark in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from numpy.typing import NDArray

from etl.build.experiment import ALL, ExperimentCounts
from etl.checks import DataCheckError
from etl.online.stats import (
    METRICS,
    MIN_USERS,
    Cell,
    Interval,
    Ratio,
    SampleRatio,
    bootstrap,
    difference,
    holm,
    lift,
    p_value,
    percentile_interval,
    ratio,
    sample_ratio,
    value_interval,
)
from usr_ray.config import OnlineConfig

NOTICE = (
    "This reports an experiment that another system has run: it read the buckets from the logs. It does not run an "
    "experiment: it assigns no user, changes no traffic and stops nothing."
)
HIGHER, LOWER, OPEN, FEW, INVALID = "higher", "lower", "no difference shown", "too few users", "not valid: sample ratio"
_SEVERAL_ALARM = 0.01
"""Share of users seen in several buckets above which leaving them out needs a warning."""


def experiment_report(counts: ExperimentCounts, config: OnlineConfig, *, dates: str) -> dict[str, Any]:
    """Everything the report says, of plain values; undefined numbers are None.

    Keys: notice, warnings, dates, bucket_column, control, confidence, num_resamples, seed, planned_shares (None:
    equal), users, impressions, sample_ratio, buckets ({bucket: {scenario: {num_..., metric: interval}}}),
    comparisons.

    Raises:
        DataCheckError: fewer than two buckets have users, or the control has none.
    """
    control = _control(counts, config)
    ratios = _sample_ratios(counts, config)
    draws, estimates = _estimates(counts, config)
    comparisons = _comparisons(counts, config, control, draws=draws, estimates=estimates, ratios=ratios)
    return {
        "kind": "online_report",
        "notice": NOTICE,
        "warnings": _warnings(counts, config, ratios),
        "dates": dates,
        "bucket_column": config.bucket_column,
        "control": control,
        "confidence": config.confidence,
        "num_resamples": config.num_resamples,
        "seed": config.seed,
        "planned_shares": dict(config.shares) or None,
        "users": {
            "in_experiment": counts.num_users,
            "several_buckets": counts.several_buckets,
            "no_bucket": counts.no_bucket,
            "unplanned_buckets": dict(sorted(counts.unplanned.items())),
        },
        "impressions": {
            "counted": counts.num_impressions,
            "without_bucket": counts.impressions_without_bucket,
            "not_mature": counts.impressions_not_mature,
        },
        "sample_ratio": {scenario: asdict(found) | {"is_ok": found.is_ok} for scenario, found in ratios.items()},
        "buckets": _buckets(counts, config, draws, estimates),
        "comparisons": comparisons,
    }


_Draws = dict[tuple[str, str], dict[str, NDArray]]
_Estimates = dict[tuple[str, str], dict[str, Ratio]]


def _control(counts: ExperimentCounts, config: OnlineConfig) -> str:
    found = counts.buckets
    if len(found) < 2:
        raise DataCheckError(
            f"--bucket-column {config.bucket_column}: users are in one bucket only, {''.join(found)}; a "
            "comparison needs two: check the column and the dates"
        )
    control = config.control or (min(config.shares) if config.shares else found[0])
    if control not in found:
        raise DataCheckError(f"--control {control}: no user is in this bucket; there are: {', '.join(found)}")
    return control


def _sample_ratios(counts: ExperimentCounts, config: OnlineConfig) -> dict[str, SampleRatio]:
    shares = dict(config.shares) or dict.fromkeys(counts.buckets, 1.0)
    return {
        scenario: sample_ratio({bucket: cell.num_users for bucket, cell in cells.items()}, shares)
        for scenario, cells in _in_order(counts).items()
    }


def _in_order(counts: ExperimentCounts) -> dict[str, dict[str, Cell]]:
    """All scenarios together first, then by name."""
    return {scenario: counts.cells[scenario] for scenario in sorted(counts.cells, key=lambda s: (s != ALL, s))}


def _estimates(counts: ExperimentCounts, config: OnlineConfig) -> tuple[_Draws, _Estimates]:
    draws, estimates = {}, {}
    for scenario, cells in counts.cells.items():
        for bucket, cell in cells.items():
            place = (scenario, bucket)
            estimates[place] = {metric: ratio(cell, metric) for metric in METRICS}
            draws[place] = bootstrap(
                cell, bucket=bucket, scenario=scenario, num_resamples=config.num_resamples, seed=config.seed
            )
    return draws, estimates


def _buckets(
    counts: ExperimentCounts, config: OnlineConfig, draws: _Draws, estimates: _Estimates
) -> dict[str, dict[str, dict[str, Any]]]:
    result: dict[str, dict[str, dict[str, Any]]] = {bucket: {} for bucket in counts.buckets}
    for scenario, cells in _in_order(counts).items():
        for bucket, cell in cells.items():
            entry: dict[str, Any] = {
                "num_users": cell.num_users,
                "num_impressions": cell.sum_of(cell.impressions_K),
                "num_clicks": cell.sum_of(cell.clicks_K),
                "num_orders": cell.sum_of(cell.orders_K),
            }
            for metric, estimate in estimates[scenario, bucket].items():
                interval = value_interval(estimate, metric, config.confidence)
                entry[metric] = _with_bootstrap(interval, draws[scenario, bucket][metric], config.confidence)
                entry[metric]["num_users_with_event"] = estimate.num_positives
            result[bucket][scenario] = entry
    return result


def _comparisons(
    counts: ExperimentCounts,
    config: OnlineConfig,
    control: str,
    *,
    draws: _Draws,
    estimates: _Estimates,
    ratios: Mapping[str, SampleRatio],
) -> list[dict[str, Any]]:
    """One entry per (scenario, metric, bucket other than the control); Holm's family is all of them."""
    rows: list[dict[str, Any]] = []
    for scenario, cells in _in_order(counts).items():
        for metric in METRICS:
            for bucket in sorted(set(cells) - {control}):
                if control not in cells:
                    continue
                treated, base = estimates[scenario, bucket][metric], estimates[scenario, control][metric]
                drawn, drawn_base = draws[scenario, bucket][metric], draws[scenario, control][metric]
                # A resample without any event of the control has no lift.
                lifts = drawn / drawn_base - 1 if (drawn_base > 0).all() else drawn * float("nan")
                rows.append(
                    {
                        "scenario": scenario,
                        "metric": metric,
                        "bucket": bucket,
                        "difference": _with_bootstrap(
                            difference(treated, base, config.confidence), drawn - drawn_base, config.confidence
                        ),
                        "lift": _with_bootstrap(lift(treated, base, config.confidence), lifts, config.confidence),
                        "p_value": p_value(treated, base),
                        "is_sound": treated.is_sound and base.is_sound,
                    }
                )
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_value_holm"] = adjusted
        is_valid = ratios[ALL].is_ok and ratios[row["scenario"]].is_ok
        row["verdict"] = _verdict(row, adjusted, 1 - config.confidence) if is_valid else INVALID
    return rows


def _verdict(row: Mapping[str, Any], adjusted: float | None, alpha: float) -> str:
    if not row["is_sound"]:
        return FEW
    if adjusted is None or adjusted >= alpha:
        return OPEN
    return HIGHER if row["difference"]["value"] > 0 else LOWER


def _with_bootstrap(interval: Interval, values_R: NDArray, confidence: float) -> dict[str, float | int | None]:
    low, high = percentile_interval(values_R, confidence)
    return asdict(interval) | {"bootstrap_low": low, "bootstrap_high": high}


def _warnings(counts: ExperimentCounts, config: OnlineConfig, ratios: Mapping[str, SampleRatio]) -> list[str]:
    """What a reader must know before any number; a sample-ratio mismatch first."""
    warnings = []
    planned = "planned shares" if config.shares else "equal shares (online.shares is not set)"
    for scenario, found in ratios.items():
        if found.is_ok:
            continue
        numbers = ", ".join(f"{b} {n:,} for {found.expected[b]:,.0f}" for b, n in found.observed.items())
        if scenario == ALL:
            warnings.append(
                f"SAMPLE RATIO MISMATCH: users per bucket do not fit the {planned}: {numbers}; p = "
                f"{found.p_value:.1e}. Assignment, logging or a filter treats the buckets differently: no comparison "
                "below can be trusted."
            )
        elif ratios[ALL].is_ok:
            warnings.append(
                f"SAMPLE RATIO MISMATCH in {scenario}: users exposed there do not fit the {planned}: {numbers}; "
                f"p = {found.p_value:.1e}. Its buckets hold different users, through a fault or because the treatment "
                f"changes who gets there: the comparisons of {scenario} are not valid."
            )
    everyone = counts.num_users + counts.several_buckets
    if counts.several_buckets > _SEVERAL_ALARM * everyone:
        warnings.append(
            f"{counts.several_buckets:,} users ({counts.several_buckets / everyone:.1%}) were seen in several buckets "
            "and are left out: check how users are assigned and whether their ids are stable."
        )
    if counts.unplanned:
        numbers = ", ".join(f"{bucket} {n:,}" for bucket, n in sorted(counts.unplanned.items()))
        warnings.append(f"Users in buckets that online.shares does not name are left out: {numbers}.")
    if counts.without_column:
        warnings.append(
            f"Left out, since their impressions logs have no column '{config.bucket_column}': "
            f"{', '.join(counts.without_column)}."
        )
    return warnings


def few_note() -> str:
    """What FEW means."""
    return f"'{FEW}': a bucket has fewer than {MIN_USERS} users with, or without, the event; its intervals say little."
