"""The experiment's report as one HTML page that needs no network: the words, a forest plot of the lifts, the tables."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etl.online.report import FEW, HIGHER, INVALID, LOWER
from etl.online.text import about_lines, bucket_table, comparison_table, gain, note_lines, ratio_table

_STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --ink: #0b0b0b; --ink-2: #52514e; --muted: #898781; --grid: #e1e0d9;
  --higher: #1b7f4f; --lower: #b42323; --open: #2a78d6; --warn: #fdf3dc; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #0d0d0d; --ink: #fff; --ink-2: #c3c2b7;
  --grid: #2c2c2a; --higher: #2fb574; --lower: #e66767; --open: #3987e5; --warn: #33290f; } }
body { margin: 0 auto; max-width: 1080px; padding: 32px 24px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 26px; margin: 0 0 8px; } h2 { font-size: 18px; margin: 32px 0 8px; } p { margin: 4px 0; }
.note { color: var(--ink-2); font-size: 13.5px; } .warning { background: var(--warn); border-radius: 8px;
  padding: 10px 14px; margin: 10px 0; font-weight: 600; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--ink-2); font-weight: 600; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--ink-2); }
"""
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 1000, 250, 150, 22, 12
_COLOURS = {HIGHER: "higher", LOWER: "lower", FEW: "muted", INVALID: "muted"}


def report_page(report: Mapping[str, Any]) -> str:
    """The page as text; everything that comes from the data is escaped."""
    title = f"Experiment report, {html.escape(report['dates'])}"
    warnings = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in report["warnings"])
    tables = (
        ("Sample ratio", ratio_table(report)),
        ("Per bucket", bucket_table(report)),
        (f"Against {report['control']}", comparison_table(report)),
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{html.escape(report['notice'])}</p>\n{warnings}\n"
        f"{_paragraphs(about_lines(report))}\n<h2>Lift over {html.escape(report['control'])}</h2>\n"
        f"{forest_plot(report['comparisons'])}\n"
        f'<p class="note">Square and thick line: estimate and delta-method interval; thin line below: bootstrap. Grey: '
        "no statement can be made. An arrow: the interval goes on.</p>\n"
        + "\n".join(f"<h2>{html.escape(name)}</h2>\n{_table(*table)}" for name, table in tables)
        + f"\n<h2>How to read this</h2>\n{_paragraphs(note_lines(report))}\n</body></html>\n"
    )


def forest_plot(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Lifts with both intervals as inline SVG, one row a comparison, grouped by scenario."""
    span = _span(comparisons)
    parts, y, before = [], _TOP, None
    for row in comparisons:
        if row["scenario"] != before:
            before = row["scenario"]
            y += _ROW
            parts.append(f'<text x="0" y="{y}" font-weight="600">{html.escape(before)}</text>')
        y += _ROW
        parts.append(_row(row, y, span))
    bottom = y + 14
    axis = "".join(
        f'<line x1="{_x(tick, span):.1f}" x2="{_x(tick, span):.1f}" y1="{_TOP}" y2="{bottom}" '
        f'stroke="var(--{"muted" if tick == 0 else "grid"})"/>'
        f'<text x="{_x(tick, span):.1f}" y="{bottom + 16}" text-anchor="middle">{_tick_text(tick)}</text>'
        for tick in _ticks(span)
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 24}" role="img" aria-label="relative lift over the control">'
        f"{axis}{''.join(parts)}</svg>"
    )


def _row(row: Mapping[str, Any], y: int, span: float) -> str:
    lift, colour = row["lift"], f"var(--{_COLOURS.get(row['verdict'], 'open')})"
    name = f'<text x="12" y="{y}">{row["metric"].upper()} · {html.escape(row["bucket"])}</text>'
    verdict = f'<text x="{_WIDTH - _RIGHT + 16}" y="{y}">{html.escape(row["verdict"])}</text>'
    if lift["value"] is None:
        return name + f'<text x="{_x(0, span) + 6:.1f}" y="{y}">no lift: the control has no event</text>' + verdict
    marks = ""
    for low, high, width, offset in (("low", "high", 3, 5), ("bootstrap_low", "bootstrap_high", 1, 0)):
        if lift[low] is not None:
            marks += _bar(lift[low], lift[high], y - offset, span, f'stroke="{colour}" stroke-width="{width}"')
    if abs(lift["value"]) <= span:
        marks += f'<rect x="{_x(lift["value"], span) - 4:.1f}" y="{y - 9}" width="8" height="8" fill="{colour}"/>'
    label = f"<title>{gain(lift['value'])}</title>"
    return f"{name}<g>{label}{marks}</g>{verdict}"


def _bar(low: float, high: float, y: int, span: float, style: str) -> str:
    """A horizontal line, with an arrow head where it leaves the plot."""
    ends = max(low, -span), min(high, span)
    if ends[0] > ends[1]:
        return ""
    line = f'<line x1="{_x(ends[0], span):.1f}" x2="{_x(ends[1], span):.1f}" y1="{y}" y2="{y}" {style}/>'
    for out, end, side in ((low < -span, ends[0], 1), (high > span, ends[1], -1)):
        if out:
            x = _x(end, span)
            line += (
                f'<path d="M{x + 5 * side:.1f} {y - 3} L{x:.1f} {y} L{x + 5 * side:.1f} {y + 3}" fill="none" {style}/>'
            )
    return line


def _span(comparisons: Sequence[Mapping[str, Any]]) -> float:
    """Half the width of the axis: what the sound comparisons need; the others are cut off."""
    for rows in ([row for row in comparisons if row["is_sound"]], comparisons):
        keys = ("value", "low", "high", "bootstrap_low", "bootstrap_high")
        ends = [abs(row["lift"][key]) for row in rows for key in keys if row["lift"][key] is not None]
        if ends and max(ends) > 0:
            return 1.05 * max(ends)
    return 0.01


def _ticks(span: float) -> list[float]:
    rough = span / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    num_steps = int(span / step)
    return [n * step for n in range(-num_steps, num_steps + 1)]


def _tick_text(tick: float) -> str:
    return "0%" if tick == 0 else f"{100 * tick:+.4g}%"


def _x(value: float, span: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value + span) / (2 * span)


def _paragraphs(lines: Sequence[str]) -> str:
    return "\n".join(f'<p class="note">{html.escape(line)}</p>' for line in lines)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(e)}</td>" for e in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
