"""The report on an experiment that was run elsewhere, as text and as a page. Warnings stand before any number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from usr_ray.evaluation.experiment import FEW, HIGHER, INVALID, LOWER, METRICS, MIN_USERS
from usr_ray.evaluation.files import aligned
from usr_ray.reporting.page import DASH, Row, Section, Table, p_value, span, words, write_page
from usr_ray.reporting.plots import Bar, Plot, forest_plot

DEFINITIONS = {
    "uctr": "users with a click / users exposed",
    "ucvr": "users with an order / users exposed",
    "ctr": "clicked impressions / impressions",
    "ctcvr": "ordered impressions / impressions",
}
_COLOURS = {HIGHER: "good", LOWER: "bad", FEW: "muted", INVALID: "muted"}


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The whole report; warnings stand before any number."""
    lines = [report["notice"], ""]
    lines += [f"WARNING: {warning}" for warning in report["warnings"]] + [""] * bool(report["warnings"])
    lines.append(f"{report['dates']}, buckets from '{report['bucket_column']}', control {report['control']}")
    lines += [f"{name}: {text}" for name, text in account(report).items()]
    tables = {"sample ratio": ratio_table, "per bucket": bucket_table, f"against {report['control']}": comparison_table}
    for title, table_of in tables.items():
        table = table_of(report)
        lines += ["", title, *aligned([table.head, *(row.values for row in table.rows)])]
    return [*lines, "", *note_lines(report)]


def account(report: Mapping[str, Any]) -> dict[str, str]:
    """Where users and impressions went."""
    users, impressions = report["users"], report["impressions"]
    unplanned = sum(users["unplanned_buckets"].values())
    return {
        "users": f"{users['in_experiment']:,} in the experiment; left out: {users['several_buckets']:,} seen in "
        f"several buckets, {users['no_bucket']:,} without one, {unplanned:,} in unplanned ones",
        "impressions": f"{impressions['counted']:,} counted; of these users left out: {impressions['not_mature']:,} "
        f"whose labels are not final, {impressions['without_bucket']:,} without a bucket",
    }


def note_lines(report: Mapping[str, Any]) -> list[str]:
    """How to read the numbers."""
    judged = sum(row["p_value_holm"] is not None for row in report["comparisons"])
    return [
        *(f"{metric.upper()}: {text}" for metric, text in DEFINITIONS.items()),
        f"Intervals: {report['confidence']:.0%}; [delta method; shares of users by Wilson] and {{bootstrap of "
        f"{report['num_resamples']:,} resamples of users, seed {report['seed']}}}.",
        f"Verdicts are Holm's over the {judged} of {len(report['comparisons'])} comparisons that can have one, at "
        f"{1 - report['confidence']:.2g}; an interval speaks of its own row alone. "
        f"'{FEW}': a bucket has fewer than {MIN_USERS} users with the event, or of a share of users without it; its "
        "intervals say little.",
    ]


def write_experiment_page(path: Path, report: Mapping[str, Any]) -> Path:
    """Write the page of evaluation.experiment's report; its path."""
    control = report["control"]
    note = (
        "Point and thick line: estimate and delta-method interval, filled where the verdict holds; thin line: "
        "bootstrap. Grey: no statement can be made. An arrow: the interval goes on."
    )
    return write_page(
        path,
        "experiment.html.j2",
        eyebrow="Experiment report",
        title=f"Experiment of {span(report['dates'])}",
        question=report["notice"],
        warnings=report["warnings"],
        lead=[],
        facts=[
            ("Buckets from", report["bucket_column"], False),
            ("Control", control, False),
            *((name.capitalize(), text, False) for name, text in account(report).items()),
        ],
        sections=[
            Section(f"Lift over {control}", note, lift_plots(report["comparisons"])),
            Section("Sample ratio", "", table=ratio_table(report)),
            Section("Per bucket", "", table=bucket_table(report)),
            Section(f"Against {control}", "", table=comparison_table(report)),
        ],
        notes=note_lines(report),
    )


def lift_plots(comparisons: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """A forest plot a scenario, all on the axis that the sound comparisons need."""
    limit = _limit([row for row in comparisons if row["is_sound"]]) or _limit(comparisons) or 0.01
    plots = []
    for scenario in dict.fromkeys(row["scenario"] for row in comparisons):
        bars = []
        for row in comparisons:
            if row["scenario"] == scenario:
                lift, verdict = row["lift"], row["verdict"]
                ends = [(lift["low"], lift["high"]), (lift["bootstrap_low"], lift["bootstrap_high"])]
                name, colour = f"{row['metric'].upper()}, {row['bucket']}", _COLOURS.get(verdict, "series-1")
                note = "no lift: the control has no event" if lift["value"] is None else verdict
                bars.append(Bar(name, lift["value"], ends, colour, verdict in (HIGHER, LOWER), note))
        title = f"Lift, {words(scenario)}"
        svg = forest_plot(bars, label=title, axis="relative lift over the control", percent=True, limit=limit)
        plots.append(Plot(title, svg))
    return plots


def _limit(comparisons: Sequence[Mapping[str, Any]]) -> float:
    """Half the width of an axis that holds every interval; 0 where there is none."""
    keys = ("value", "low", "high", "bootstrap_low", "bootstrap_high")
    return 1.05 * max(
        (abs(row["lift"][key]) for row in comparisons for key in keys if row["lift"][key] is not None), default=0
    )


def ratio_table(report: Mapping[str, Any]) -> Table:
    """Users found and planned, and the test's p-value, per scenario."""
    rows = []
    for scenario, found in report["sample_ratio"].items():
        numbers = ", ".join(f"{b} {n:,} ({found['expected'][b]:,.1f})" for b, n in found["observed"].items())
        rows.append(
            Row(
                [scenario, numbers, p_value(found["p_value"]), "ok" if found["is_ok"] else "MISMATCH"],
                ["better" if found["is_ok"] else "worse"],
            )
        )
    return Table(["scenario", "users (planned)", "p", ""], rows, num_left=2)


def bucket_table(report: Mapping[str, Any]) -> Table:
    """Every metric of every bucket with both intervals."""
    rows = [
        Row(
            [
                scenario,
                metric.upper(),
                bucket,
                f"{cell['num_users']:,}",
                f"{cell['num_impressions']:,}",
                percent(cell[metric]["value"]),
                *intervals(cell[metric], percent),
            ]
        )
        for scenario in report["sample_ratio"]
        for metric in METRICS
        for bucket, cells in report["buckets"].items()
        if (cell := cells.get(scenario))
    ]
    head = ["scenario", "metric", "bucket", "users", "impressions", "value", "interval", "bootstrap"]
    return Table(head, rows, num_left=3)


def comparison_table(report: Mapping[str, Any]) -> Table:
    """Verdict, difference and lift of every bucket against the control, and p-values."""
    head = ["scenario", "metric", "bucket", "verdict", "difference", "interval (pp)", "bootstrap (pp)"]
    head += ["lift", "interval (%)", "bootstrap (%)", "p", "p (Holm)"]
    rows = []
    for row in report["comparisons"]:
        names = [row["scenario"], row["metric"].upper(), row["bucket"], row["verdict"]]
        difference, change = row["difference"], row["lift"]
        numbers = [points(difference["value"]), *intervals(difference, lambda end: f"{100 * end:+.3f}")]
        numbers += [gain(change["value"]), *intervals(change, lambda end: f"{100 * end:+.2f}")]
        colour = {HIGHER: "better", LOWER: "worse"}.get(row["verdict"], "even")
        ps = [p_value(row["p_value"]), p_value(row["p_value_holm"])]
        rows.append(Row([*names, *numbers, *ps], [colour, *[""] * (len(numbers) + 2)]))
    return Table(head, rows, num_left=4, is_dense=True)


def intervals(entry: Mapping[str, Any], text: Callable[[float], str]) -> list[str]:
    """The delta method's and the bootstrap's interval as text."""
    texts = []
    for brackets, low, high in (("[]", "low", "high"), ("{}", "bootstrap_low", "bootstrap_high")):
        ends = (entry[low], entry[high])
        texts.append(DASH if None in ends else f"{brackets[0]}{', '.join(map(text, ends))}{brackets[1]}")
    return texts


def percent(value: float | None) -> str:
    """A share in percent with two decimals, with four below 0.1 %."""
    if value is None:
        return DASH
    return f"{value:.2%}" if abs(value) >= 0.001 or value == 0 else f"{value:.4%}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, so that it is not taken for a lift."""
    return DASH if value is None else f"{100 * value:+.3f} pp"


def gain(value: float | None) -> str:
    """A lift in percent."""
    return DASH if value is None else f"{value:+.2%}"
