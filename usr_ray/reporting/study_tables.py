"""Tables of a study's report: gaps at a glance, every comparison, every point. Words and rows only, no plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from usr_ray.experiments.analysis import WHOLE, Contrast, Mean, Point, Trials, point_name, value_name
from usr_ray.reporting import page as report_text

VERDICTS = {
    "better": "▲ better",
    "worse": "▼ worse",
    "unsure": "≈ not sure",
    "even": "≈ no clear gap",
    "few": "? too few positives",
    "none": "undefined",
}
METRICS = (("auc", "AUC"), ("gauc", "GAUC"), ("log_loss", "Log loss"), ("pcoc", "PCOC"))
_MANY_ROWS = 12
"""A table of more comparisons is folded behind the one at a glance."""


def pair_name(axis: str, label: str, against: str) -> str:
    """'usr against plain'; with the axis where the label is a number: 'd 8 against 16'."""
    return f"{value_name(axis, label)} against {against}"


def glance_section(found: Sequence[Contrast]) -> dict[str, Any]:
    """A row for each compared point, a column for each scenario and task: the gap and its verdict."""
    cells = list(dict.fromkeys((c.scenario, c.task) for c in found))
    groups: dict[tuple[str, ...], dict[tuple[str, str], Contrast]] = {}
    for c in found:
        groups.setdefault((pair_name(c.axis, c.label, c.against), point_name(c.at)), {})[c.scenario, c.task] = c
    rows = []
    for (pair, at), own in groups.items():
        shown = [own.get(cell) for cell in cells]
        rows.append(
            {
                "values": [", ".join(filter(None, (at, pair))), *(_glance(c) for c in shown)],
                "classes": ["", *(c.verdict if c else "none" for c in shown)],
            }
        )
    return {
        "title": "At a glance",
        "note": "AUC gap on the held-out rows, mean over the seeds. ▲ better, ▼ worse: holds after correction for all "
        "comparisons of this report. ≈: these data do not tell the two apart. ?: too few positives.",
        "plots": [],
        "table": {"head": ["Gap of", *(report_text.cell_task(*cell) for cell in cells)], "num_left": 1, "rows": rows},
    }


def _glance(found: Contrast | None) -> str:
    if found is None or found.gap is None:
        return report_text.DASH
    return f"{report_text.signed(found.gap.value)} {VERDICTS[found.verdict][0]}"


def contrast_section(title: str, found: Sequence[Contrast], plots: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every comparison with its interval, spread over the seeds and corrected p."""
    is_sliced = any(c.part != WHOLE for c in found)
    pairs = {(c.axis, c.label, c.against) for c in found}
    has_at = any(c.at for c in found)
    rows = [
        {
            "class": c.verdict,
            "values": [
                *([pair_name(c.axis, c.label, c.against)] if len(pairs) > 1 or not has_at else []),
                *([point_name(c.at)] if has_at else []),
                *([c.part] if is_sliced else []),
                report_text.cell_task(c.scenario, c.task),
                *_numbers(c),
                VERDICTS[c.verdict],
            ],
        }
        for c in found
    ]
    left = [
        *(["Comparison"] if len(pairs) > 1 or not has_at else []),
        *(["At"] if has_at else []),
        *(["Rows"] if is_sliced else []),
        "Cell",
    ]
    return {
        "title": title,
        "note": f"AUC of {' or '.join(dict.fromkeys(c.label for c in found)) if len(pairs) < 4 else 'the first'} minus "
        f"AUC of {' or '.join(dict.fromkeys(c.against for c in found))}, on the same rows and seeds. The 95% interval "
        f"knows the seeds and the users (method in docs/studies.md); p is Holm's, over the {len(found)} comparisons "
        "below. An interval that holds 0 means that these data cannot tell, not that there is no difference.",
        "plots": [plot for plot in plots if plot],
        "table": {
            "head": [*left, "AUC gap", "95% interval", "SD over seeds", "p (Holm)", "Verdict"],
            "num_left": len(left),
            "rows": rows,
            "folded": f"All {len(found)} intervals and p-values" if len(found) > _MANY_ROWS else "",
        },
    }


def _numbers(found: Contrast) -> list[str]:
    gap = found.gap
    if gap is None:
        return [report_text.DASH] * 4
    spread = f"{gap.seed_sd:.4f}" if len(gap.by_seed) > 1 else report_text.DASH
    return [report_text.signed(gap.value), f"{gap.low:+.4f} to {gap.high:+.4f}", spread, f"{found.adjusted_p:.3f}"]


def means_table(trials: Trials, averages: Mapping[Point, Mapping[tuple[str, str, str], Mean]]) -> dict[str, Any]:
    """Metrics of every point, by scenario and task."""
    rows = []
    for point, entries in averages.items():
        for scenario, task in dict.fromkeys(key[:2] for key in entries):
            values = [entries.get((scenario, task, name)) for name, _ in METRICS]
            if any(values):
                rows.append(
                    {
                        "class": "",
                        "values": [
                            point_name(point),
                            report_text.cell_name(scenario),
                            report_text.TASK_NAMES[task],
                            *map(_mean, values),
                            str(len(trials.by_point[point])),
                        ],
                    }
                )
    return {
        "head": ["Point", "Scenario", "Task", *(name for _, name in METRICS), "Seeds"],
        "num_left": 3,
        "rows": rows,
        "folded": f"All {len(rows)} rows" if len(rows) > 2 * _MANY_ROWS else "",
    }


def _mean(mean: Mean | None) -> str:
    if mean is None:
        return report_text.DASH
    return f"{mean.value:.4f} ± {mean.sd:.4f}" if mean.num_seeds > 1 else f"{mean.value:.4f}"
