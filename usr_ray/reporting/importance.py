"""The section of a run's report that says which signal carries what (training/importance.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from usr_ray.reporting.page import DASH, Row, Section, Table, count, signed, words
from usr_ray.reporting.plots import Bar, Plot, forest_plot, series_name

MAX_BARS = 15


def importance_section(found: Mapping[str, Any] | None, scenarios: Sequence[str]) -> Section:
    """Bars for each scenario, and a table with the cold rows apart; empty without `found`."""
    parts = [part for part in found["parts"] if part["drops"]] if found else []
    if not found or not parts:
        return Section("What each signal carries")
    plots = [
        _plot(part["scenario"], part, scenarios.index(part["scenario"])) for part in parts if part["rows"] == "all"
    ]
    note = (
        f"The click AUC that is lost when rows exchange their values of one signal, on {found['num_rows']:,} of the "
        "evaluated rows; bars are 95% intervals over users, filled points those that leave out 0, before any "
        "correction. A counter's columns, a scenario's history, and the categories of all its events go together. A "
        "signal of little loss need not be useless: another may say the same. In the table, rows of users, items and "
        "queries that the vocabularies do not know are apart; they exchange values among themselves."
    )
    return Section("What each signal carries", note, plots, _table(parts))


def _sorted(part: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return sorted(part["drops"].items(), key=lambda entry: -entry[1]["drop"])


def _plot(scenario: str, part: Mapping[str, Any], place: int) -> Plot:
    colour = series_name(place)
    bars = [
        Bar(words(name), drop["drop"], [(drop["low"], drop["high"])], colour, drop["low"] > 0 or drop["high"] < 0)
        for name, drop in _sorted(part)[:MAX_BARS]
    ]
    title = f"Clicks in {words(scenario)}"
    more = len(part["drops"]) - len(bars)
    caption = f"AUC {part['auc']:.4f} of {part['num_rows']:,} rows, {part['num_positives']:,} of them clicked."
    caption += f" The {len(bars)} largest; {more} more are in the table." if more else ""
    svg = forest_plot(bars, label=f"Click AUC lost without each signal in {words(scenario)}", axis="click AUC lost")
    return Plot(title, svg, caption, colour)


def _table(parts: Sequence[Mapping[str, Any]]) -> Table:
    largest: dict[str, float] = {}
    for part in parts:
        for name, drop in part["drops"].items():
            largest[name] = max(largest.get(name, drop["drop"]), drop["drop"])
    heads = [words(p["scenario"]) + ("" if p["rows"] == "all" else f", {p['rows']}") for p in parts]
    rows = [
        Row(["all rows as they are: AUC", *(f"{part['auc']:.4f}" for part in parts)]),
        Row(["rows", *(count(part["num_rows"]) for part in parts)]),
        Row(["clicks", *(count(part["num_positives"]) for part in parts)]),
    ]
    for name in sorted(largest, key=lambda name: -largest[name]):
        drops = [part["drops"].get(name) for part in parts]
        rows.append(Row([words(name), *(DASH if d is None else signed(d["drop"]) for d in drops)]))
    return Table(["AUC lost without", *heads], rows, 1, folded="All signals, and cold rows apart", is_dense=True)
