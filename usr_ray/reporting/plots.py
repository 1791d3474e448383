"""Plots of the report as inline SVG whose colours are CSS variables, so that they follow light, dark and print.

matplotlib draws with the light palette; every colour is then replaced by `var(--name)` of the page's style sheet.
"""

from __future__ import annotations

import datetime as dt
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from usr_ray.evaluation.statistics import Bin

COLOURS = {
    "ink": "#0b0b0b",
    "ink-2": "#52514e",
    "muted": "#898781",
    "grid": "#e1e0d9",
    "axis": "#c3c2b7",
    "series-1": "#2a78d6",
    "series-2": "#eb6834",
    "series-3": "#1baf7a",
    "series-4": "#4a3aa7",
    "series-5": "#e34948",
    "series-6": "#e87ba4",
    "series-7": "#eda100",
    "series-8": "#008300",
}
"""Name in the style sheet -> its light value, which matplotlib draws with."""
SERIES = tuple(name for name in COLOURS if name.startswith("series"))

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "usr-ray",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": COLOURS["axis"],
    "axes.labelcolor": COLOURS["ink-2"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["axis"],
    "ytick.color": COLOURS["axis"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink-2"],
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
}


def series_name(place: int) -> str:
    """Style-sheet name of the place-th series colour."""
    return SERIES[place % len(SERIES)]


def series_colour(place: int) -> str:
    """The light value of the place-th series colour; colours belong to a series, whatever else is drawn."""
    return COLOURS[series_name(place)]


@dataclass(frozen=True, slots=True)
class Line:
    """One line over training steps."""

    name: str
    place: int
    """Of its colour."""
    steps: Sequence[float]
    values: Sequence[float]


def line_plot(lines: Sequence[Line], *, label: str, percent: bool = False, from_zero: bool = False) -> str:
    """Lines over training steps; one line needs no legend. `label` is what a screen reader says."""

    def draw(axes: Axes) -> None:
        for line in lines:
            marker = "o" if len(line.steps) < 3 else None
            axes.plot(line.steps, line.values, color=series_colour(line.place), label=line.name, marker=marker)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if from_zero:
            largest = max(v for line in lines for v in line.values)
            axes.set_ylim(0, 1.08 * max(largest, 0.01 if percent else 1e-9))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
        elif max(abs(v) for line in lines for v in line.values) >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if len(lines) > 1:
            # Above the plot: inside it would lie on the lines.
            num_columns = 4 if sum(len(line.name) for line in lines) < 45 else 2
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=num_columns, handlelength=1.2, borderaxespad=0.2)

    return draw_svg(draw, label=label)


@dataclass(frozen=True, slots=True)
class DateLine:
    """One line over dates; dates without a value are left out."""

    name: str
    place: int
    """Of its colour."""
    points: Sequence[tuple[dt.date, float]]


def date_plot(lines: Sequence[DateLine], *, label: str, last_trained: dt.date | None = None) -> str:
    """Shares over dates; one line needs no legend. What lies right of the dashed line was not trained on."""
    dates = sorted({date for line in lines for date, _ in line.points})

    def draw(axes: Axes) -> None:
        for line in lines:
            places = [dates.index(date) for date, _ in line.points]
            shares = [y for _, y in line.points]
            axes.plot(places, shares, "o-", color=series_colour(line.place), label=line.name, markersize=4)
        if last_trained is not None and dates[0] <= last_trained < dates[-1]:
            edge = sum(date <= last_trained for date in dates) - 0.5
            axes.axvline(edge, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        shown = range(0, len(dates), max(1, -(-len(dates) // 7)))
        axes.set_xticks(list(shown), [f"{dates[place]:%d %b}" for place in shown])
        axes.set_xlim(-0.5, len(dates) - 0.5)
        axes.set_ylim(0, 1.08 * max(0.01, *(y for line in lines for _, y in line.points)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
        if len(lines) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, handlelength=1.2, borderaxespad=0.2)

    return draw_svg(draw, label=label, size=(6.5, 2.7))


def calibration_plot(bins: Sequence[Bin], *, colour: str, label: str) -> str:
    """Observed rate over mean probability of each bin, with 95 % intervals, and the positives of each bin below."""

    def draw(axes: Axes) -> None:
        top = max(max(b.high, b.mean_prob) for b in bins) * 1.05 or 1.0
        axes.plot([0, top], [0, top], color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        x = np.array([b.mean_prob for b in bins])
        y = np.array([b.rate for b in bins])
        spread = np.array([[b.rate - b.low for b in bins], [b.high - b.rate for b in bins]]).clip(min=0)
        axes.errorbar(x, y, yerr=spread, color=colour, linewidth=1.2, fmt="o-", markersize=5, elinewidth=1.2)
        axes.set(xlim=(0, top), ylim=(0, top), xlabel="mean predicted probability", ylabel="observed rate")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}%"))

    return draw_svg(draw, label=label, size=(6.5, 4.0))


def roc_plot(curves: Sequence[tuple[str, str, bool, tuple[NDArray, NDArray]]], *, label: str) -> str:
    """ROC curves; each is (name, colour, is_baseline, points). Baselines are dashed."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=COLOURS["axis"], linewidth=1)
        for name, colour, is_baseline, (x, y) in curves:
            style: Any = {"linestyle": (0, (3, 2)), "linewidth": 1.2} if is_baseline else {}
            axes.plot(x, y, color=colour, label=name, **style)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="false positive rate", ylabel="true positive rate")
        axes.legend(loc="lower right", handlelength=1.6)

    return draw_svg(draw, label=label, size=(6.5, 5.0))


def draw_svg(draw: Callable[[Axes], None], *, label: str, size: tuple[float, float] = (6.5, 3.1)) -> str:
    """An inline <svg> of what `draw` draws on the axes; `label` is what a screen reader says, size in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(file.getvalue(), label=label)


def _embedded(svg: str, *, label: str) -> str:
    """The <svg> element alone: no prolog, metadata, style or address; ids of its own; theme colours; any width."""
    prefix = re.sub(r"[^a-z0-9]+", "-", label.lower()) + "-"
    svg = svg[svg.index("<svg") :]
    # A <style> inside would apply to the whole page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}", svg)
    svg = re.sub(r'font: [^;"]*?(\d+(?:\.\d+)?px)[^;"]*', r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for name, value in COLOURS.items():
        svg = re.sub(re.escape(value), f"var(--{name})", svg, flags=re.IGNORECASE)
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    assert view_box is not None  # matplotlib always writes one
    opening = f'<svg viewBox="{view_box[1]}" role="img" aria-label="{html.escape(label)}">'
    return opening + svg[svg.index(">") + 1 :].strip()
