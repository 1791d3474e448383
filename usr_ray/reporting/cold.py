"""Cold users and items in the report: how much of each scenario a model has to rank knowing little, date by date.

Input: `cold_start` and `vocabulary_coverage` of the ETL's reports. A count that nobody can know (ids that are hashed,
training dates that are not built) is null there and a dash here.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from usr_ray.config import parse_dates
from usr_ray.reporting import page as report_text
from usr_ray.reporting.plots import DateLine, date_plot, series_name

KINDS = {
    "unknown_user": "unknown user",
    "unknown_item": "unknown item",
    "unknown_query": "unknown query",
    "no_history": "no history",
    "new_user": "new user",
    "new_item": "new item",
}
"""Key of `cold_start` -> heading."""
WITH_QUERY = "with_query"
NOTE = (
    "Unknown: the value has no id of its own, so it shares the embedding of all such values (of queries: among the "
    "impressions with one). No history: the user had clicked nothing before. New: no impression of the training "
    "dates has the user, or the item."
)


def cold_part(
    reports: Sequence[Mapping[str, Any]], scenarios: Sequence[str], train_dates: str
) -> dict[str, Any] | None:
    """What the template shows; None where no report has the counts."""
    reports = sorted((r for r in reports if r.get("cold_start")), key=lambda report: str(report["date"]))
    if not reports:
        return None
    last = parse_dates(train_dates, where="data.train_dates")[1] if train_dates else None
    spans = {"all dates": reports}
    if last is not None:
        trained = [r for r in reports if dt.date.fromisoformat(str(r["date"])) <= last]
        spans = {"to the last training date": trained, "later": [r for r in reports if r not in trained]}
    rows = [
        {
            "scenario": report_text.cell_name(name),
            "colour": series_name(place),
            "span": span,
            "values": values,
            "impressions": num_rows,
        }
        for place, name in enumerate(scenarios)
        for span, part in spans.items()
        for num_rows, values in [_sums([r["cold_start"].get(name) or {} for r in part])]
        if num_rows
    ]
    caption = "Share by UTC date." if last is None else "Share by UTC date; right of the dashed line: not trained on."
    return {
        "headings": list(KINDS.values()),
        "rows": rows,
        "note": NOTE,
        "caption": caption,
        "plots": _plots(reports, scenarios, last),
    }


def _sums(cells: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """Impressions, and each kind's share of them as text."""
    num_rows = sum(cell.get("impressions", 0) for cell in cells)
    values = []
    for kind in KINDS:
        counts = [cell.get(kind) for cell in cells if cell]
        whole = sum(cell.get(WITH_QUERY) or 0 for cell in cells) if kind == "unknown_query" else num_rows
        known = [count for count in counts if count is not None]
        is_known = len(known) == len(counts) and whole > 0
        values.append(report_text.share(sum(known) / whole if is_known else None))
    return num_rows, values


def _plots(
    reports: Sequence[Mapping[str, Any]], scenarios: Sequence[str], last: dt.date | None
) -> list[dict[str, Any]]:
    """A plot for each kind, a line a scenario; and the coverage of the vocabularies, a line a feature."""

    def line(name: str, place: int, value: Callable[[Mapping[str, Any]], Any]) -> DateLine:
        points = [(dt.date.fromisoformat(str(r["date"])), value(r)) for r in reports]
        return DateLine(name, place, [(date, y) for date, y in points if isinstance(y, int | float)])

    def share(scenario: str, kind: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda report: report["cold_start"].get(scenario, {}).get("share", {}).get(kind)

    def coverage(feature: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda report: report.get("vocabulary_coverage", {}).get(feature)

    article = {"u": "an ", "n": "a "}
    titles = {
        kind: f"Impressions with {'' if kind == 'no_history' else article[name[0]]}{name}"
        for kind, name in KINDS.items()
    }
    drawn = [
        (title, [line(s.replace("_", " "), place, share(s, kind)) for place, s in enumerate(scenarios)])
        for kind, title in titles.items()
    ]
    ids = [line(name, place, coverage(name)) for place, name in enumerate(("user_id", "item_id", "query"))]
    plots = []
    for title, lines in [*drawn, ("Values that have an id of their own", ids)]:
        present = [one for one in lines if one.points]
        if any(y > 0 for one in present for _, y in one.points):
            plots.append({"title": title, "svg": Markup(date_plot(present, label=title, last_trained=last))})
    return plots
