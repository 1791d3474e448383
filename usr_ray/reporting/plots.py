"""Plots of all reports as inline SVG whose colours are CSS variables, so that they follow light, dark and print.

matplotlib draws with the light palette; every colour is then replaced by `var(--name)` of the page's style sheet.

Shape letters: N points.
"""

from __future__ import annotations

import datetime as dt
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
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
    "good": "#006300",
    "bad": "#b42323",
}
"""Name in the style sheet -> its light value, which matplotlib draws with."""
SERIES = tuple(name for name in COLOURS if name.startswith("series"))

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "usr-ray",
    "text.parse_math": False,  # names of buckets, signals and studies may have dollar signs
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


_DASHED: Any = {"color": COLOURS["muted"], "linewidth": 1, "linestyle": (0, (4, 3))}
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")


def series_name(place: int) -> str:
    """Style-sheet name of the place-th series colour; colours belong to a series, whatever else is drawn."""
    return SERIES[place % len(SERIES)]


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing with its words."""

    title: str
    svg: Markup
    caption: str = ""
    colour: str = ""
    """Name in the style sheet of the swatch beside the title; '': none."""
    is_wide: bool = False
    bins: Sequence[Bin] = ()
    """Bins of a calibration plot, for the table below it."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot."""

    name: str
    place: int
    """Place of its colour."""
    x: Sequence[Any]
    """Steps, numbers or dates."""
    y: Sequence[float]
    spread: Sequence[float] = ()
    """Half the height of each bar; empty: no bars."""

    @property
    def colour(self) -> str:
        """The light value of its colour."""
        return COLOURS[series_name(self.place)]


def step_plot(lines: Sequence[Line], *, label: str, percent: bool = False, from_zero: bool = False) -> Markup:
    """Lines over training steps. `label` is what a screen reader says."""

    def draw(axes: Axes) -> None:
        largest = max(abs(y) for line in lines for y in line.y)
        for line in lines:
            axes.plot(line.x, line.y, color=line.colour, label=line.name, marker="o" if len(line.x) < 3 else None)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if from_zero:
            axes.set_ylim(0, 1.08 * max(largest, 0.01 if percent else 1e-9))
        if percent:
            axes.yaxis.set_major_formatter(_PERCENT)
        elif largest >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _legend(axes, lines)

    return draw_svg(draw, label=label)


def date_plot(lines: Sequence[Line], *, label: str, last_trained: dt.date | None = None) -> Markup:
    """Shares over dates. What lies right of the dashed line was not trained on."""
    dates = sorted({date for line in lines for date in line.x})

    def draw(axes: Axes) -> None:
        for line in lines:
            axes.plot([dates.index(x) for x in line.x], line.y, "o-", color=line.colour, label=line.name, markersize=4)
        if last_trained is not None and dates[0] <= last_trained < dates[-1]:
            axes.axvline(sum(date <= last_trained for date in dates) - 0.5, **_DASHED)
        shown = range(0, len(dates), max(1, -(-len(dates) // 7)))
        axes.set_xticks(list(shown), [f"{dates[place]:%d %b}" for place in shown])
        axes.set(xlim=(-0.5, len(dates) - 0.5), ylim=(0, 1.08 * max(0.01, *(y for line in lines for y in line.y))))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(_PERCENT)
        _legend(axes, lines)

    return draw_svg(draw, label=label, size=(6.5, 2.7))


def axis_plot(lines: Sequence[Line], *, label: str, x_axis: str, y_axis: str, dashed_at: float | None = None) -> Markup:
    """Means over a numeric axis with bars; the axis is logarithmic where its steps are."""

    def draw(axes: Axes) -> None:
        for line in lines:
            places = np.argsort(line.x)  # a study's file may name its values in any order
            x, y = np.asarray(line.x)[places], np.asarray(line.y)[places]
            spread = np.asarray(line.spread)[places] if len(line.spread) else None
            style: Any = {"color": line.colour, "fmt": "o-", "markersize": 5, "elinewidth": 1.2, "label": line.name}
            axes.errorbar(x, y, yerr=spread, **style)
        ticks = sorted({value for line in lines for value in line.x})
        if len(ticks) > 2 and ticks[0] > 0 and ticks[-1] / ticks[0] >= 8:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
        if dashed_at is not None:
            axes.axhline(dashed_at, **_DASHED)
        axes.set(xlabel=x_axis, ylabel=y_axis)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _legend(axes, lines)

    return draw_svg(draw, label=label)


def _legend(axes: Axes, lines: Sequence[Line]) -> None:
    """Above the plot, since inside it would lie on the lines; one line needs none."""
    if len(lines) > 1:
        num_columns = 4 if sum(len(line.name) for line in lines) < 45 else 2
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=num_columns, handlelength=1.2, borderaxespad=0.2)


def calibration_plot(bins: Sequence[Bin], *, colour: str, label: str) -> Markup:
    """Observed rate over mean probability of each bin, with 95 % intervals; on the dashed line it is calibrated."""

    def draw(axes: Axes) -> None:
        top = max(max(b.high, b.mean_prob) for b in bins) * 1.05 or 1.0
        axes.plot([0, top], [0, top], **_DASHED)
        x, y = [b.mean_prob for b in bins], [b.rate for b in bins]
        spread = np.array([[b.rate - b.low for b in bins], [b.high - b.rate for b in bins]]).clip(min=0)
        axes.errorbar(x, y, yerr=spread, color=COLOURS[colour], linewidth=1.2, fmt="o-", markersize=5, elinewidth=1.2)
        axes.set(xlim=(0, top), ylim=(0, top), xlabel="mean predicted probability", ylabel="observed rate")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(_PERCENT)

    return draw_svg(draw, label=label, size=(6.5, 4.0))


def roc_plot(curves: Sequence[tuple[str, str, bool, tuple[NDArray, NDArray]]], *, label: str) -> Markup:
    """ROC curves; each is (name, colour, is_baseline, points). Baselines are dashed."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=COLOURS["axis"], linewidth=1)
        for name, colour, is_baseline, (x, y) in curves:
            style: Any = {"linestyle": (0, (3, 2)), "linewidth": 1.2} if is_baseline else {}
            axes.plot(x, y, color=COLOURS[colour], label=name, **style)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="false positive rate", ylabel="true positive rate")
        axes.legend(loc="lower right", handlelength=1.6)

    return draw_svg(draw, label=label, size=(6.5, 5.0))


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a forest plot."""

    name: str
    value: float | None
    """None where it is undefined; `note` says why."""
    intervals: Sequence[tuple[float | None, float | None]]
    """The first one thick; a second one thin, below it; an end that is None: not known, so not drawn."""
    colour: str
    """Name in the style sheet."""
    is_sure: bool
    """Filled: the verdict holds after correction."""
    note: str = ""
    """Text on the right."""


def forest_plot(
    bars: Sequence[Bar], *, label: str, axis: str, percent: bool = False, limit: float | None = None
) -> Markup:
    """Differences with their intervals, one below the other; the dashed line is no difference.

    Args:
        bars: from the top.
        label: what a screen reader says.
        percent: write shares in per cent.
        limit: both ends of the axis; an interval that goes on has an arrow. None: as wide as the intervals.
    """

    def draw(axes: Axes) -> None:
        axes.axvline(0, **_DASHED)
        for row, bar in enumerate(bars):
            colour: Any = COLOURS[bar.colour]
            for place, (low, high) in enumerate(bar.intervals):
                if low is None or high is None:
                    continue
                y, width = row + 0.24 * place, 0.9 if place else 1.8
                ends = (low, high) if limit is None else (max(low, -limit), min(high, limit))
                if ends[0] <= ends[1]:
                    axes.plot(ends, [y, y], color=colour, linewidth=width)
                for end, marker, goes_on in ((ends[0], "<", ends[0] > low), (ends[1], ">", ends[1] < high)):
                    if goes_on:
                        axes.plot([end], [y], marker, color=colour, markersize=4 - place)
            if bar.value is not None and (limit is None or abs(bar.value) <= limit):
                axes.plot(
                    [bar.value], [row], "o", color=colour, fillstyle="full" if bar.is_sure else "none", markersize=6
                )
            if bar.note:
                axes.text(1.02, row, bar.note, va="center", fontsize=9.5, transform=axes.get_yaxis_transform())
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.set(ylim=(len(bars) - 0.4, -0.6), xlabel=axis)
        if limit is not None:
            axes.set_xlim(-limit, limit)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if percent:
            axes.xaxis.set_major_formatter(_PERCENT)

    return draw_svg(draw, label=label, size=(6.5, 0.9 + 0.3 * len(bars)))


def heat_map(values: Mapping[tuple[str, str], tuple[float, bool]], *, label: str, x_axis: str, y_axis: str) -> Markup:
    """(x, y) -> (difference, is sure): blue above 0, red below; a star where it holds after correction."""
    xs, ys = (list(dict.fromkeys(key[n] for key in values)) for n in (0, 1))
    largest = max((abs(value) for value, _ in values.values()), default=0.0) or 1e-9
    # Mixed with the page: the numbers are written on top, and both light and dark pages must keep them readable.
    colours = LinearSegmentedColormap.from_list("gap", [COLOURS["series-5"], "#ffffff", COLOURS["series-1"]])

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        for (x, y), (value, is_sure) in values.items():
            column, row = xs.index(x), ys.index(y)
            shade = colours(0.5 + 0.35 * value / largest)
            axes.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, color=shade, linewidth=0)
            axes.text(column, row, f"{value:+.4f}{'*' if is_sure else ''}", ha="center", va="center", color="#101010")
        axes.set_xticks(range(len(xs)), xs)
        axes.set_yticks(range(len(ys)), ys)
        axes.set(xlabel=x_axis, ylabel=y_axis, xlim=(-0.5, len(xs) - 0.5), ylim=(-0.5, len(ys) - 0.5))

    return draw_svg(draw, label=label, size=(6.5, 1.2 + 0.45 * len(ys)))


def scatter_plot(groups: Sequence[tuple[str, int, NDArray]], *, label: str, axes_names: tuple[str, str]) -> Markup:
    """Points (N, 2) of named groups, each with the place of its colour; 400 of a group at most."""

    def draw(axes: Axes) -> None:
        for name, place, points_N2 in groups:
            chosen = points_N2[:: max(1, math.ceil(len(points_N2) / 400))]
            axes.plot(
                chosen[:, 0], chosen[:, 1], ".", color=COLOURS[series_name(place)], alpha=0.55, markersize=4, label=name
            )
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, handlelength=1, borderaxespad=0.2, markerscale=2)

    return draw_svg(draw, label=label, size=(6.5, 4.4))


@dataclass(frozen=True, slots=True)
class Dimension:
    """One upright line of a parallel-coordinates plot."""

    name: str
    is_log: bool
    labels: tuple[str, ...] = ()
    """Values of a choice, from below; empty for numbers."""


def parallel_plot(dimensions: Sequence[Dimension], rows: Sequence[Sequence[float]], best: int, *, label: str) -> Markup:
    """Each trial is a line through its values (a choice's value is its place); the best one is bold.

    Args:
        dimensions: the tuned keys, then the metric.
        rows: one a trial, a number for each dimension.
        best: place of the chosen trial in `rows`.
        label: what a screen reader says.
    """
    columns = [[_scaled(row[n], dim) for row in rows] for n, dim in enumerate(dimensions)]
    spans = [
        (0.0, max(len(dim.labels) - 1, 1)) if dim.labels else (min(c), max(c))
        for c, dim in zip(columns, dimensions, strict=True)
    ]

    def height(value: float, n: int) -> float:
        low, high = spans[n]
        return 0.5 if high == low else (value - low) / (high - low)

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        order = [n for n in range(len(rows)) if n != best] + [best]
        for row in order:
            y = [height(columns[n][row], n) for n in range(len(dimensions))]
            style: Any = (
                {"color": COLOURS[series_name(1)], "linewidth": 2.6}
                if row == best
                else {"color": COLOURS[series_name(0)], "linewidth": 1.0, "alpha": 0.55}
            )
            axes.plot(range(len(dimensions)), y, **style)
        for n, dim in enumerate(dimensions):
            axes.axvline(n, color=COLOURS["axis"], linewidth=1)
            ends = [(height(place, n), name) for place, name in enumerate(dim.labels)] or [
                (0.0, _number(spans[n][0], dim)),
                (1.0, _number(spans[n][1], dim)),
            ]
            for end, text in ends:
                axes.text(n + 0.03, end, text, va="bottom", fontsize=9)
        axes.set_xticks(range(len(dimensions)), [dim.name.rsplit(".", 1)[-1].replace("_", "\n") for dim in dimensions])
        axes.set_yticks([])
        axes.set(xlim=(-0.1, len(dimensions) - 0.6), ylim=(-0.05, 1.12))

    return draw_svg(draw, label=label, size=(max(13.0, 1.4 * len(dimensions)), 4.0))


def bars_plot(values: Mapping[str, float], *, label: str) -> Markup:
    """Named strengths of association from 0 to 1, in the order given, the first on top."""

    def draw(axes: Axes) -> None:
        names = list(values)
        axes.barh(range(len(names)), [values[name] for name in names], color=COLOURS[series_name(0)], height=0.6)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1), xlabel="strength of association", ylim=(len(names) - 0.4, -0.6))

    return draw_svg(draw, label=label, size=(6.5, 1.0 + 0.36 * len(values)))


def _scaled(value: float, dim: Dimension) -> float:
    return float(np.log(value)) if dim.is_log else float(value)


def _number(scaled: float, dim: Dimension) -> str:
    return f"{math.exp(scaled) if dim.is_log else scaled:.3g}"


def draw_svg(draw: Callable[[Axes], None], *, label: str, size: tuple[float, float] = (6.5, 3.1)) -> Markup:
    """An inline <svg> of what `draw` draws on the axes; `label` is what a screen reader says, size in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_embedded(file.getvalue(), label=label))


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
