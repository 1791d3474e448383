"""The label funnel of the report: what the ETL read, dropped and labelled, as sums that visibly add up.

Input: the ETL's reports (`<lake>/reports/*.json`), summed. Per log `rows_in = duplicates + rejected + rows_out`; per
scenario the counts of the labels on the samples table's rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from usr_ray import report_text
from usr_ray.report_plots import series_name

HIGH_P = 0.97
"""P(click | global click) from which the report warns: GLMT has next to nothing to learn from."""


def funnel(reports: Sequence[Mapping[str, Any]], scenarios: Sequence[str]) -> dict[str, Any] | None:
    """What the template shows; None without reports."""
    if not reports:
        return None
    logs: dict[str, Counter[str]] = {}
    rejects: Counter[str] = Counter()
    samples: dict[str, Counter[str]] = {scenario: Counter() for scenario in scenarios}
    for report in reports:
        for name, counts in report.get("logs", {}).items():
            logs.setdefault(name, Counter()).update(_numbers(counts))
        rejects.update(_numbers(report.get("rejects", {})))
        for scenario, counts in report.get("scenarios", {}).items():
            samples.setdefault(scenario, Counter()).update(_numbers(counts))
    parts = [_scenario(name, counts, place) for place, (name, counts) in enumerate(samples.items())]
    dates = sorted(str(report.get("date", report.get("dates", ""))) for report in reports)
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return {
        "note": f"From {len(reports)} ETL report{'s' if len(reports) > 1 else ''} ({span}).",
        "warnings": [warning for part in parts for warning in part["warnings"]],
        "logs": _logs(logs),
        "scenarios": parts,
        "rejects": _rejects(rejects),
    }


def _numbers(counts: Mapping[str, Any]) -> dict[str, int]:
    return {key: value for key, value in counts.items() if isinstance(value, int)}


def _logs(logs: Mapping[str, Counter[str]]) -> list[dict[str, Any]]:
    lines = [_log(name, counts) for name, counts in logs.items()]
    if len(lines) > 1:
        total: Counter[str] = Counter()
        for counts in logs.values():
            total.update(counts)
        lines.append(_log("all logs", total) | {"is_total": True})
    return lines


def _log(name: str, counts: Counter[str]) -> dict[str, Any]:
    missing = counts["rows_in"] - counts["duplicates"] - counts["rejected"] - counts["rows_out"]
    return {
        "name": name, "rows_in": counts["rows_in"], "duplicates": counts["duplicates"],
        "rejected": counts["rejected"], "kept": counts["rows_out"], "missing": missing, "adds_up": missing == 0,
        "is_total": False,
    }  # fmt: skip


def _rejects(rejects: Counter[str]) -> list[dict[str, Any]]:
    if not rejects:
        return []
    most = max(rejects.values())
    lines = [{"name": n.replace("_", " "), "count": c, "part": c / most, "is_total": False}
             for n, c in rejects.most_common()]  # fmt: skip
    return [*lines, {"name": "all reasons", "count": sum(rejects.values()), "part": 1.0, "is_total": True}]


def _scenario(name: str, counts: Counter[str], place: int) -> dict[str, Any]:
    rows, clicks, orders = counts["num_samples"], counts["is_click"], counts["is_order"]
    global_clicks, global_orders = counts["is_click_global"], counts["is_order_global"]
    # Bars are on the scale of global clicks, and impressions have none: beside theirs no other would be seen.
    scale = max(global_clicks, 1)
    stages = [("impressions", rows, None), ("clicked in any scenario", global_clicks, global_clicks / scale),
              ("clicked in this one", clicks, clicks / scale),
              ("ordered in any scenario", global_orders, global_orders / scale),
              ("ordered in this one", orders, orders / scale)]  # fmt: skip
    p_click = clicks / global_clicks if global_clicks else None
    p_order = orders / global_orders if global_orders else None
    warnings = []
    title = report_text.cell_name(name)
    if p_click is not None and p_click >= HIGH_P:
        warnings.append(f"{title}: {report_text.share(p_click)} of the rows clicked in any scenario were clicked in "
                        "this one, so GLMT's global labels add next to nothing here.")  # fmt: skip
    mature = counts["is_mature"] / rows if rows else None
    note = (f"P(click | click in any scenario) = {report_text.share(p_click)}; P(order | order in any scenario) = "
            f"{report_text.share(p_order)}; {report_text.share(mature)} of the rows have final labels.")  # fmt: skip
    return {
        "name": title, "colour": series_name(place), "note": note, "warnings": warnings,
        "stages": [{"name": n, "count": c, "share": report_text.share(c / rows if rows else None, 2), "part": part}
                   for n, c, part in stages],
    }  # fmt: skip
