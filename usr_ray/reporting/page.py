"""The kit of all pages: sections, tables and verdicts as data, numbers as text, templates filled and written whole."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from usr_ray import __version__
from usr_ray.evaluation.metrics import ALL, GLOBAL
from usr_ray.evaluation.statistics import PairedGap
from usr_ray.files import write_whole
from usr_ray.reporting.plots import Plot

REPORT_FILE = "report.html"
DASH = "\N{EN DASH}"
TASK_NAMES = {"ctr": "CTR", "ctcvr": "CTCVR"}
VERDICTS = {
    "better": "▲ better",
    "worse": "▼ worse",
    "unsure": "≈ not sure",
    "even": "≈ no clear gap",
    "few": "? too few rows or users",
    "none": "undefined",
}
"""Verdict of evaluation.statistics, which is also its class in the style sheet -> how a page says it."""
Fact = tuple[str, str, bool]
"""(name, value, whether it is code)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table."""

    values: Sequence[str]
    classes: Sequence[str] = ()
    """Classes of the last columns, in the style sheet."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts."""

    head: Sequence[str]
    rows: Sequence[Row]
    num_left: int = 1
    """Columns of words; the others are numbers, to the right."""
    folded: str = ""
    """Shown in place of the table until it is unfolded; '': never folded."""
    is_dense: bool = False
    """Many columns: smaller letters."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page: words, then plots, then a table."""

    title: str
    note: str = ""
    plots: Sequence[Plot] = ()
    table: Table | None = None


def write_page(path: Path, template: str, **context: Any) -> Path:
    """Fill a template of this package and write the page, whole or not at all, and its folder with it; its path.

    A name that the template needs and is not given is an error; texts are escaped.
    """
    context |= {"task_names": TASK_NAMES, "dash": DASH}
    written = (
        f"Written {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC by usr-ray {__version__}; this file needs no network."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _pages().get_template(template).render(context, footer=written))
    return path


@functools.cache
def _pages() -> jinja2.Environment:
    """The templates, each compiled once."""
    folder = resources.files("usr_ray.reporting").joinpath("templates")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    pages = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=loader, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"count": count, "share": share, "signed": signed, "interval": interval, "cell": cell_name}
    return pages


def count(number: float | None) -> str:
    """A whole number with thousands separators; a dash for None."""
    return DASH if number is None else f"{number:,.0f}"


def share(value: float | None, decimals: int = 1) -> str:
    """A fraction in per cent; a dash for None."""
    return DASH if value is None else f"{100 * value:.{decimals}f}%"


def signed(value: float) -> str:
    """Four decimals with a sign; a real minus."""
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def interval(gap: PairedGap) -> str:
    """'+0.0290 to +0.0334'."""
    return f"{signed(gap.low)} to {signed(gap.high)}"


def p_value(value: float | None) -> str:
    """Four decimals; small ones as a bound, since none is 0."""
    return DASH if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Seconds as '48 s', '3 min 20 s' or '2 h 05 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(text: str | None) -> str:
    """An ISO time as '2026-01-09 10:00 UTC'; '' for None."""
    return f"{dt.datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC" if text else ""


def span(dates: str | None) -> str:
    """'A:B, C' as 'A to B and C'."""
    return listed([" to ".join(dict.fromkeys(part.split(":"))) for part in (dates or "").split(", ")])


def words(name: str) -> str:
    """A scenario's name as words."""
    return name.replace("_", " ")


def cell_name(cell: str) -> str:
    """Heading of a cell of metrics.json."""
    names = {GLOBAL: "Global labels", ALL: "All rows pooled"}
    return names.get(cell, words(cell).capitalize())


def cell_task(cell: str, task: str) -> str:
    """'search CTR'."""
    return f"{words(cell)} {TASK_NAMES.get(task, task)}"


def listed(parts: Sequence[str]) -> str:
    """'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
