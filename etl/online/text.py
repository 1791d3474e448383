"""The experiment's report as lines of text: the notice, the warnings, then the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etl.online.report import few_note
from etl.online.stats import METRICS

DEFINITIONS = {
    "uctr": "users with a click / users exposed",
    "ucvr": "users with an order / users exposed",
    "ctr": "clicked impressions / impressions",
    "ctcvr": "ordered impressions / impressions",
}
NONE = "-"


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The whole report; warnings stand before any number."""
    lines = [report["notice"], ""]
    lines += [f"WARNING: {warning}" for warning in report["warnings"]] + [""] * bool(report["warnings"])
    lines += about_lines(report)
    lines += ["", "sample ratio", *table_lines(*ratio_table(report))]
    lines += ["", "per bucket", *table_lines(*bucket_table(report))]
    lines += ["", f"against {report['control']}", *table_lines(*comparison_table(report))]
    return [*lines, "", *note_lines(report)]


def about_lines(report: Mapping[str, Any]) -> list[str]:
    """Dates and where users and impressions went."""
    users, impressions = report["users"], report["impressions"]
    unplanned = sum(users["unplanned_buckets"].values())
    return [
        f"{report['dates']}, buckets from '{report['bucket_column']}', control {report['control']}",
        f"users: {users['in_experiment']:,} in the experiment; left out: {users['several_buckets']:,} seen in several "
        f"buckets, {users['no_bucket']:,} without one, {unplanned:,} in unplanned ones",
        f"impressions: {impressions['counted']:,} counted; of these users left out: "
        f"{impressions['not_mature']:,} whose labels are not final, {impressions['without_bucket']:,} without a bucket",
    ]


def note_lines(report: Mapping[str, Any]) -> list[str]:
    """How to read the numbers."""
    return [
        *(f"{metric.upper()}: {text}" for metric, text in DEFINITIONS.items()),
        f"Intervals: {report['confidence']:.0%}; [delta method; shares of users by Wilson] and {{bootstrap of "
        f"{report['num_resamples']:,} resamples of users, seed {report['seed']}}}.",
        f"Verdicts are Holm's over the {len(report['comparisons'])} comparisons, at {1 - report['confidence']:.2g}; an "
        "interval speaks of its own row alone. " + few_note(),
    ]


Table = tuple[list[str], list[list[str]]]


def ratio_table(report: Mapping[str, Any]) -> Table:
    """Users found and planned, and the test's p-value, per scenario."""
    rows = []
    for scenario, found in report["sample_ratio"].items():
        numbers = ", ".join(f"{b} {n:,} ({found['expected'][b]:,.1f})" for b, n in found["observed"].items())
        rows.append([scenario, numbers, p_text(found["p_value"]), "ok" if found["is_ok"] else "MISMATCH"])
    return ["scenario", "users (planned)", "p", ""], rows


def bucket_table(report: Mapping[str, Any]) -> Table:
    """Every metric of every bucket with both intervals."""
    rows = [
        [
            scenario,
            metric.upper(),
            bucket,
            f"{cell['num_users']:,}",
            f"{cell['num_impressions']:,}",
            percent(cell[metric]["value"]),
            *intervals(cell[metric], percent),
        ]
        for scenario in report["sample_ratio"]
        for metric in METRICS
        for bucket, cells in report["buckets"].items()
        if (cell := cells.get(scenario))
    ]
    return ["scenario", "metric", "bucket", "users", "impressions", "value", "interval", "bootstrap"], rows


def comparison_table(report: Mapping[str, Any]) -> Table:
    """Difference and lift of every bucket against the control, p-values and the verdict."""
    rows = [
        [
            row["scenario"],
            row["metric"].upper(),
            row["bucket"],
            points(row["difference"]["value"]),
            *intervals(row["difference"], points),
            gain(row["lift"]["value"]),
            *intervals(row["lift"], gain),
            p_text(row["p_value"]),
            p_text(row["p_value_holm"]),
            row["verdict"],
        ]
        for row in report["comparisons"]
    ]
    names = ["scenario", "metric", "bucket", "difference", "interval", "bootstrap", "lift", "interval", "bootstrap"]
    return [*names, "p", "p (Holm)", "verdict"], rows


def table_lines(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest entry."""
    widths = [max(len(line[n]) for line in [names, *rows]) for n in range(len(names))]
    return [
        "  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip()
        for line in [names, *rows]
    ]


def intervals(entry: Mapping[str, Any], text: Callable[[float | None], str]) -> list[str]:
    """The delta method's and the bootstrap's interval as text."""
    texts = []
    for brackets, low, high in (("[]", "low", "high"), ("{}", "bootstrap_low", "bootstrap_high")):
        ends = (entry[low], entry[high])
        texts.append(NONE if None in ends else f"{brackets[0]}{', '.join(map(text, ends))}{brackets[1]}")
    return texts


def percent(value: float | None) -> str:
    """A share in percent with two decimals, with four below 0.1 %."""
    if value is None:
        return NONE
    return f"{value:.2%}" if abs(value) >= 0.001 or value == 0 else f"{value:.4%}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, so that it is not taken for a lift."""
    return NONE if value is None else f"{100 * value:+.3f} pp"


def gain(value: float | None) -> str:
    """A lift in percent."""
    return NONE if value is None else f"{value:+.2%}"


def p_text(value: float | None) -> str:
    """A p-value; small ones as a bound."""
    return NONE if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"
