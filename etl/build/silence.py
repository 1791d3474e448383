"""Hours that a log of clicks or orders seems not to hold: a file that is lost, or a log that ends before the others.

Their impressions are there, and every label of theirs would say "not clicked" for good.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

USUAL = 25
"""A span is told where so many of its impressions would be positives at other hours: by chance, e^-25 of such spans."""
NEVER = 1_000
"""Impressions of a scenario without any positive from which on that is told."""
MOST = 3
"""Spans of a scenario and label that are told one by one."""
_HOUR = dt.timedelta(hours=1)
_WORDS = {"click": "clicked", "order": "ordered"}


@dataclass(frozen=True, slots=True)
class Hour:
    """Sums over the impressions of one hour."""

    impressions: int = 0
    clicks: int = 0
    mature: int = 0
    mature_orders: int = 0
    """Of the mature ones."""


@dataclass(frozen=True, slots=True)
class Span:
    """Hours one after the other, each with impressions that could have a positive and with none."""

    first: dt.datetime
    end: dt.datetime
    rows: int


def silence(
    hours: Mapping[tuple[dt.datetime, str], Hour],
    scenarios: Iterable[str],
    settled: dt.datetime,
    no_orders: Iterable[str],
) -> list[str]:
    """A line for each span of hours that has no click, or no order, where many are usual.

    Args:
        hours: (begin of the hour in UTC, scenario) -> its sums.
        settled: clicks of impressions before it are final; orders count on mature rows alone.
        no_orders: scenarios whose orders nobody logs.
    """
    lines = []
    for scenario in scenarios:
        own = {hour: sums for (hour, name), sums in sorted(hours.items()) if name == scenario}
        final = {hour: sums for hour, sums in own.items() if hour + _HOUR <= settled}
        clicks = _silent({hour: (sums.impressions, sums.clicks) for hour, sums in final.items()})
        lines += _lines(scenario, "click", clicks)
        if scenario not in set(no_orders):  # nor is ordered what is not clicked: that is told already
            clicked = {h: s for h, s in own.items() if not any(span.first <= h < span.end for span, _ in clicks)}
            orders = _silent({hour: (sums.mature, sums.mature_orders) for hour, sums in clicked.items()})
            lines += _lines(scenario, "order", orders)
    return lines


def _lines(scenario: str, label: str, silent: Sequence[tuple[Span, float | None]]) -> list[str]:
    lines = [
        f"{scenario}: none of the {span.rows:,} impressions from {span.first:%Y-%m-%d %H:%M} to "
        f"{span.end:%Y-%m-%d %H:%M} was {_WORDS[label]}{'' if usual is None else f', where {usual:,.0f} are usual'}; "
        f"do the {label}s logs hold these hours?"
        for span, usual in silent[:MOST]
    ]
    if len(silent) > MOST:
        lines[-1] += f" {len(silent) - MOST} more such spans follow"
    return lines


def _silent(counts: Mapping[dt.datetime, tuple[int, int]]) -> list[tuple[Span, float | None]]:
    """Spans to tell, and how many positives are usual in each (None: there is none at all)."""
    spans, positives = _spans(counts), sum(found for _, found in counts.values())
    if not positives:
        return [(span, None) for span in spans if span.rows >= NEVER]
    # Of all other hours: those with a positive alone say too much where an hour has one or none.
    rows = sum(rows for rows, _ in counts.values())
    usual = [(span, positives * span.rows / (rows - span.rows)) for span in spans]
    return [(span, number) for span, number in usual if number >= USUAL]


def _spans(counts: Mapping[dt.datetime, tuple[int, int]]) -> list[Span]:
    """Runs of hours without a positive; an hour without an impression ends none."""
    there = [(hour, rows, found) for hour, (rows, found) in counts.items() if rows]
    runs = [list(run) for is_silent, run in itertools.groupby(there, lambda one: not one[2]) if is_silent]
    return [Span(run[0][0], run[-1][0] + _HOUR, sum(rows for _, rows, _ in run)) for run in runs]
