"""What the run's report says of its data: the label funnel as sums that visibly add up, and cold users and items.

Input: the ETL's reports, `<lake>/reports/<date>.json`. Per log rows_in = duplicates + rejects + used, the used
impressions are the samples, and the rejects by reason are the rejects of the logs. A count that nobody can know (ids
that are hashed, training dates that are not built, orders of a source without them) is null there and a dash here.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from usr_ray.config import parse_dates
from usr_ray.reporting.page import cell_name, share, words
from usr_ray.reporting.plots import Line, Plot, date_plot, series_name

Report = Mapping[str, Any]
HIGH_RATE = 0.98
"""P(y_k = 1 | y_g = 1) from which the report warns, as the ETL does: GLMT has next to nothing to learn from."""
KINDS = {
    "unknown_user": "unknown user",
    "unknown_item": "unknown item",
    "unknown_query": "unknown query",
    "no_history": "no history",
    "new_user": "new user",
    "new_item": "new item",
}
"""Key of `cold_start` -> heading."""


def funnel(reports: Sequence[Report], scenarios: Sequence[str]) -> dict[str, Any] | None:
    """What the template shows; None without reports."""
    if not reports:
        return None
    # Each build reads all logs, so each of its reports carries the same rows without a date: those of the newest count.
    undated = max(reports, key=lambda report: report.get("table_version", 0)).get("undated", {})
    logs: dict[str, Counter[str]] = {}
    rejects: Counter[tuple[str, str]] = Counter()
    for account in (*reports, undated):
        for log, counts in account.get("rows", {}).items():
            logs.setdefault(log, Counter()).update(counts)
        for log, counts in account.get("rejects", {}).items():
            rejects.update({(log, reason): count for reason, count in counts.items()})
    samples: dict[str, Counter[str]] = {scenario: Counter() for scenario in scenarios}
    for report in reports:
        for scenario, counts in report.get("scenarios", {}).items():
            sums = {key: value for key, value in counts.items() if isinstance(value, int)}  # rates are not added up
            samples.setdefault(scenario, Counter()).update(sums)
    parts = [_scenario(name, counts, place) for place, (name, counts) in enumerate(samples.items())]
    lines = [_log(name, counts) for name, counts in sorted(logs.items())]
    whole = [_log("all logs", sum(logs.values(), Counter())) | {"is_total": True}] if len(lines) > 1 else []
    return {
        "note": _note(reports),
        "warnings": [warning for part in parts for warning in part["warnings"]],
        "logs": [*lines, *whole],
        "checks": _checks(logs, rejects, samples),
        "scenarios": parts,
        "rejects": [
            {"name": f"{log}: {words(reason)}", "count": count, "part": count / (max(rejects.values()) or 1)}
            for (log, reason), count in rejects.most_common()
        ],
        "num_rejects": rejects.total(),
    }


def _note(reports: Sequence[Report]) -> str:
    dates = sorted(str(report.get("date", "")) for report in reports)
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    watermarks = sorted({str(report["watermark"]) for report in reports if report.get("watermark")})
    until = f" Labels are final up to the watermark {watermarks[-1]}." if watermarks else ""
    files = "the ETL report" if len(reports) == 1 else f"{len(reports)} ETL reports"
    return f"From {files} of {span}: log rows of these dates, and rows without a usable time.{until}"


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
) -> list[tuple[str, bool]]:
    """Equations between the tables: text with both sides, and whether they agree."""
    used = [counts["used"] for log, counts in sorted(logs.items()) if log.endswith("_impressions")]
    terms = " + ".join(f"{n:,}" for n in used) + (f" = {sum(used):,}" if len(used) > 1 else "")
    rows = sum(counts["impressions"] for counts in samples.values())
    rejected, by_reason = sum(counts["rejects"] for counts in logs.values()), rejects.total()
    return [
        (f"impressions kept {terms}, samples {rows:,}", sum(used) == rows),
        (f"rows rejected {rejected:,}, rejects by reason {by_reason:,}", rejected == by_reason),
    ]


def _scenario(name: str, counts: Counter[str], place: int) -> dict[str, Any]:
    rows, title = counts["impressions"], cell_name(name)
    # Null in the ETL's reports: not known, which is not 0.
    knows_orders = "orders" in counts or not rows
    stages = {"impressions": "impressions", "clicked in any scenario": "clicks_global", "clicked in this one": "clicks"}
    if knows_orders:
        stages |= {"ordered in any scenario": "orders_global", "ordered in this one": "orders"}
    p_click, p_order = (
        _rate(counts["clicks"], counts["clicks_global"]),
        _rate(counts["orders"], counts["orders_global"]),
    )
    of_orders = (
        f"P(order | order in any scenario) = {share(p_order)}"
        if knows_orders
        else "no orders in this source, so CTCVR is not trained here"
    )
    return {
        "name": title,
        "colour": series_name(place),
        "note": f"P(click | click in any scenario) = {share(p_click)}; {of_orders}; "
        f"{share(_rate(counts['mature'], rows))} of the rows have final labels.",
        "warnings": [
            f"{title}: {share(rate)} of the rows {done} in any scenario were {done} in this one, so the global "
            "labels tell GLMT next to nothing new here."
            for rate, done in ((p_click, "clicked"), (p_order, "ordered"))
            if rate is not None and rate > HIGH_RATE
        ],
        "stages": [
            {
                "name": text,
                "count": counts[key],
                "share": share(_rate(counts[key], rows), 2),
                # On the scale of global clicks: beside the bar of the impressions no other would be seen.
                "part": None if key == "impressions" else counts[key] / max(counts["clicks_global"], 1),
            }
            for text, key in stages.items()
        ],
    }


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def cold_part(reports: Sequence[Report], scenarios: Sequence[str], train_dates: str) -> dict[str, Any] | None:
    """How much of each scenario a model has to rank knowing little; None where no report has the counts."""
    reports = sorted((r for r in reports if r.get("cold_start")), key=lambda report: str(report["date"]))
    if not reports:
        return None
    last = parse_dates(train_dates, where="data.train_dates")[1] if train_dates else None
    spans = {"all dates": reports}
    if last is not None:
        trained = [r for r in reports if _date(r) <= last]
        spans = {"to the last training date": trained, "later": [r for r in reports if r not in trained]}
    rows = [
        {"scenario": name, "colour": series_name(place), "span": span, "values": values, "impressions": num_rows}
        for place, name in enumerate(scenarios)
        for span, part in spans.items()
        for num_rows, values in [_sums([r["cold_start"].get(name) or {} for r in part])]
        if num_rows
    ]
    return {"headings": list(KINDS.values()), "rows": rows, "plots": _cold_plots(reports, scenarios, last)}


def _sums(cells: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """Impressions, and each kind's share of them (of a query: of those with one) as text."""
    num_rows = sum(cell.get("impressions", 0) for cell in cells)
    values = []
    for kind in KINDS:
        counts = [cell.get(kind) for cell in cells if cell]
        whole = sum(cell.get("with_query") or 0 for cell in cells) if kind == "unknown_query" else num_rows
        is_known = None not in counts and whole > 0
        values.append(share(sum(c for c in counts if c is not None) / whole if is_known else None))
    return num_rows, values


def _cold_plots(reports: Sequence[Report], scenarios: Sequence[str], last: dt.date | None) -> list[Plot]:
    """A plot for each kind, a line a scenario; and the coverage of the vocabularies, a line a feature."""

    def plot(title: str, lines: Mapping[str, Callable[[Report], Any]]) -> Plot | None:
        drawn = []
        for place, (name, value) in enumerate(lines.items()):
            points = [(_date(report), y) for report in reports if isinstance(y := value(report), int | float)]
            if points:
                drawn.append(Line(words(name), place, [x for x, _ in points], [y for _, y in points]))
        if not any(y > 0 for line in drawn for y in line.y):
            return None
        caption = (
            "Share by UTC date." if last is None else "Share by UTC date; right of the dashed line: not trained on."
        )
        return Plot(title, date_plot(drawn, label=title, last_trained=last), caption)

    def of_scenario(scenario: str, kind: str) -> Callable[[Report], Any]:
        return lambda report: report["cold_start"].get(scenario, {}).get("share", {}).get(kind)

    def of_feature(feature: str) -> Callable[[Report], Any]:
        return lambda report: report.get("vocabulary_coverage", {}).get(feature)

    articles = {"no_history": "", **{kind: "an " for kind in KINDS if kind.startswith("unknown")}}
    plots = [
        plot(f"Impressions with {articles.get(kind, 'a ')}{name}", {s: of_scenario(s, kind) for s in scenarios})
        for kind, name in KINDS.items()
    ]
    ids = {name: of_feature(name) for name in ("user_id", "item_id", "query")}
    return [p for p in (*plots, plot("Values that have an id of their own", ids)) if p is not None]


def _date(report: Report) -> dt.date:
    return dt.date.fromisoformat(str(report["date"]))
