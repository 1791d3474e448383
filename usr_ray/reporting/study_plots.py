"""Plots of a study and of a search, as inline SVG in the report's colours (report_plots).

Shape letters: N points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from usr_ray.reporting.plots import COLOURS, draw_svg, series_colour

_DASHES: Any = (0, (4, 3))


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a forest plot."""

    name: str
    value: float
    low: float
    high: float
    place: int
    """Of its colour."""
    is_sure: bool
    """Filled: the verdict holds after correction."""


def forest_plot(bars: Sequence[Bar], *, label: str, axis: str) -> str:
    """Differences with their intervals, one below the other; the dashed line is no difference."""

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=COLOURS["muted"], linewidth=1, linestyle=_DASHES)
        for row, bar in enumerate(bars):
            colour = series_colour(bar.place)
            axes.plot([bar.low, bar.high], [row, row], color=colour)
            axes.plot([bar.value], [row], "o", color=colour, fillstyle="full" if bar.is_sure else "none", markersize=6)
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(axis)

    return draw_svg(draw, label=label, size=(6.5, 0.9 + 0.3 * len(bars)))


@dataclass(frozen=True, slots=True)
class Curve:
    """One line over a numeric axis."""

    name: str
    place: int
    """Of its colour."""
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float]
    """Half the height of each bar."""


def axis_plot(curves: Sequence[Curve], *, label: str, x_axis: str, y_axis: str, dashed_at: float | None = None) -> str:
    """Means over a numeric axis with bars; the axis is logarithmic where its steps are."""

    def draw(axes: Axes) -> None:
        for curve in curves:
            colour = series_colour(curve.place)
            axes.errorbar(
                curve.x,
                curve.y,
                yerr=curve.spread,
                color=colour,
                fmt="o-",
                markersize=5,
                elinewidth=1.2,
                label=curve.name,
            )
        x = sorted({value for curve in curves for value in curve.x})
        if len(x) > 2 and x[0] > 0 and x[-1] / x[0] >= 8:
            axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        if dashed_at is not None:
            axes.axhline(dashed_at, color=COLOURS["muted"], linewidth=1, linestyle=_DASHES)
        axes.set(xlabel=x_axis, ylabel=y_axis)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if len(curves) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, handlelength=1.2, borderaxespad=0.2)

    return draw_svg(draw, label=label)


def heat_map(values: Mapping[tuple[str, str], tuple[float, bool]], *, label: str, x_axis: str, y_axis: str) -> str:
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


def scatter_plot(groups: Sequence[tuple[str, int, NDArray]], *, label: str, axes_names: tuple[str, str]) -> str:
    """Points (N, 2) of named groups, each with the place of its colour; 400 of a group at most."""

    def draw(axes: Axes) -> None:
        for name, place, points_N2 in groups:
            chosen = points_N2[:: max(1, math.ceil(len(points_N2) / 400))]
            axes.plot(chosen[:, 0], chosen[:, 1], ".", color=series_colour(place), alpha=0.55, markersize=4, label=name)
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
    """Of a choice: its values from below; empty for numbers."""


def parallel_plot(dimensions: Sequence[Dimension], rows: Sequence[Sequence[float]], best: int, *, label: str) -> str:
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
                {"color": series_colour(1), "linewidth": 2.6}
                if row == best
                else {"color": series_colour(0), "linewidth": 1.0, "alpha": 0.55}
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

    return draw_svg(draw, label=label, size=(max(6.5, 1.4 * len(dimensions)), 4.0))


def bars_plot(values: Mapping[str, float], *, label: str, axis: str) -> str:
    """Named shares from 0 to 1, the largest on top."""

    def draw(axes: Axes) -> None:
        names = list(values)
        axes.barh(range(len(names)), [values[name] for name in names], color=series_colour(0), height=0.6)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1), xlabel=axis, ylim=(len(names) - 0.4, -0.6))

    return draw_svg(draw, label=label, size=(6.5, 1.0 + 0.36 * len(values)))


def _scaled(value: float, dim: Dimension) -> float:
    return float(np.log(value)) if dim.is_log else float(value)


def _number(scaled: float, dim: Dimension) -> str:
    return f"{math.exp(scaled) if dim.is_log else scaled:.3g}"
