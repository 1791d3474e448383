"""The label funnel of the report: what the ETL read, dropped and labelled, as sums that visibly add up.

Input: the ETL's reports, `<lake>/reports/<date>.json`, summed over dates. Per log rows_in = duplicates + rejects +
used, the used impressions are the samples, and the rejects by reason are the rejects of the logs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from usr_ray.reporting import page as report_text
from usr_ray.reporting.plots import series_name

HIGH_RATE = 0.98
"""P(y_k = 1 | y_g = 1) from which the report warns, as the ETL does: GLMT has next to nothing to learn from."""
_IMPRESSIONS = "_impressions"


def funnel(reports: Sequence[Mapping[str, Any]], scenarios: Sequence[str]) -> dict[str, Any] | None:
    """What the template shows; None without reports."""
    if not reports:
        return None
    logs: dict[str, Counter[str]] = {}
    rejects: Counter[tuple[str, str]] = Counter()
    for rows, reasons in _accounts(reports):
        for log, counts in rows.items():
            logs.setdefault(log, Counter()).update(counts)
        for log, counts in reasons.items():
            rejects.update({(log, reason): count for reason, count in counts.items()})
    samples: dict[str, Counter[str]] = {scenario: Counter() for scenario in scenarios}
    for report in reports:
        for scenario, counts in report.get("scenarios", {}).items():
            sums = {key: value for key, value in counts.items() if isinstance(value, int)}  # rates are not added up
            samples.setdefault(scenario, Counter()).update(sums)
    parts = [_scenario(name, counts, place) for place, (name, counts) in enumerate(samples.items())]
    lines = _logs(logs)
    return {
        "note": _note(reports),
        "warnings": [warning for part in parts for warning in part["warnings"]],
        "logs": lines,
        "checks": _checks(logs, rejects, samples),
        "scenarios": parts,
        "rejects": _rejects(rejects),
    }


def _accounts(reports: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(rows, rejects by reason) of every date, and of the rows without a date: those of the newest build alone.

    Each build reads all logs, so each of its reports carries the same undated rows.
    """
    for report in reports:
        yield report.get("rows", {}), report.get("rejects", {})
    newest = max(reports, key=lambda report: report.get("table_version", 0)).get("undated", {})
    yield newest.get("rows", {}), newest.get("rejects", {})


def _note(reports: Sequence[Mapping[str, Any]]) -> str:
    dates = sorted(str(report.get("date", "")) for report in reports)
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    watermarks = sorted({str(report["watermark"]) for report in reports if report.get("watermark")})
    until = f" Labels are final up to the watermark {watermarks[-1]}." if watermarks else ""
    files = "the ETL report" if len(reports) == 1 else f"{len(reports)} ETL reports"
    return f"From {files} of {span}: log rows of these dates, and rows without a usable time.{until}"


def _logs(logs: Mapping[str, Counter[str]]) -> list[dict[str, Any]]:
    lines = [_log(name, counts) for name, counts in sorted(logs.items())]
    if len(lines) > 1:
        lines.append(_log("all logs", sum(logs.values(), Counter())) | {"is_total": True})
    return lines


def _log(name: str, counts: Counter[str]) -> dict[str, Any]:
    missing = counts["rows_in"] - counts["duplicates"] - counts["rejects"] - counts["used"]
    return {
        "name": name,
        "rows_in": counts["rows_in"],
        "duplicates": counts["duplicates"],
        "rejected": counts["rejects"],
        "kept": counts["used"],
        "missing": missing,
        "adds_up": missing == 0,
        "is_total": False,
    }


def _checks(
    logs: Mapping[str, Counter[str]], rejects: Counter[tuple[str, str]], samples: Mapping[str, Counter[str]]
) -> list[dict[str, Any]]:
    """Equations between the tables: text with both sides, and whether they agree."""
    used = {log: counts["used"] for log, counts in sorted(logs.items()) if log.endswith(_IMPRESSIONS)}
    rows = sum(counts["impressions"] for counts in samples.values())
    rejected = sum(counts["rejects"] for counts in logs.values())
    by_reason = sum(rejects.values())
    return [
        {
            "text": f"impressions kept {_sum_text(list(used.values()))}, samples {rows:,}",
            "adds_up": sum(used.values()) == rows,
        },
        {"text": f"rows rejected {rejected:,}, rejects by reason {by_reason:,}", "adds_up": rejected == by_reason},
    ]


def _sum_text(numbers: list[int]) -> str:
    terms = " + ".join(f"{n:,}" for n in numbers)
    return f"{terms} = {sum(numbers):,}" if len(numbers) > 1 else terms


def _rejects(rejects: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    if not rejects:
        return []
    most = max(rejects.values()) or 1
    lines = [
        {"name": f"{log}: {reason.replace('_', ' ')}", "count": count, "part": count / most, "is_total": False}
        for (log, reason), count in rejects.most_common()
    ]
    return [*lines, {"name": "all", "count": sum(rejects.values()), "part": 1.0, "is_total": True}]


def _scenario(name: str, counts: Counter[str], place: int) -> dict[str, Any]:
    rows, title = counts["impressions"], report_text.cell_name(name)
    # Null in the ETL's reports: not known, which is not 0.
    knows_orders = "orders" in counts or not rows
    # Bars are on the scale of global clicks, and impressions have none: beside theirs no other would be seen.
    scale = max(counts["clicks_global"], 1)
    stages = [
        ("impressions", "impressions"),
        ("clicked in any scenario", "clicks_global"),
        ("clicked in this one", "clicks"),
    ]
    if knows_orders:
        stages += [("ordered in any scenario", "orders_global"), ("ordered in this one", "orders")]
    p_click = _rate(counts["clicks"], counts["clicks_global"])
    p_order = _rate(counts["orders"], counts["orders_global"])
    warnings = [
        f"{title}: {report_text.share(rate)} of the rows {done} in any scenario were {done} in this one, so the global "
        "labels tell GLMT next to nothing new here."
        for rate, done in ((p_click, "clicked"), (p_order, "ordered"))
        if rate is not None and rate > HIGH_RATE
    ]
    of_orders = (
        f"P(order | order in any scenario) = {report_text.share(p_order)}"
        if knows_orders
        else "no orders in this source, so CTCVR is not trained here"
    )
    note = (
        f"P(click | click in any scenario) = {report_text.share(p_click)}; {of_orders}; "
        f"{report_text.share(_rate(counts['mature'], rows))} of the rows have final labels."
    )
    return {
        "name": title,
        "colour": series_name(place),
        "note": note,
        "warnings": warnings,
        "stages": [
            {
                "name": words,
                "count": counts[key],
                "share": report_text.share(_rate(counts[key], rows), 2),
                "part": None if key == "impressions" else counts[key] / scale,
            }
            for words, key in stages
        ],
    }


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None
