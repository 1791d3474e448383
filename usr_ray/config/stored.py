"""JSON that jobs wrote and somebody may have changed or torn since, held to its shape where it is read.

A shape is a type (float: any number, object: anything); a `Text`, which says what a text must be; `[shape]`, a list of
such; `(shape, None)`, such or null; or `{"key": shape, "key?": shape, "*": shape}`, an object: a key with a ? may be
absent, * stands for any other key, and without it other keys are let pass. Standard library only.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usr_ray.config.fields import UserError, dates_in

Shape = Any


@dataclass(frozen=True, slots=True)
class Text:
    """A text that `read` takes without ValueError or UserError."""

    words: str
    read: Callable[[str], object]


def one_of(*words: str) -> Text:
    """One of a few words."""
    return Text(f"one of {', '.join(words)}", words.index)


def _zoned(text: str) -> None:
    if dt.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(text)


NUMBER = (float, None)
TIME = Text("a time such as 2026-01-08T12:00:00+00:00", _zoned)
DATE = Text("a date such as 2026-01-08", dt.date.fromisoformat)
DATES = Text("dates such as 2026-01-01:2026-01-07", dates_in)
SUMS: Shape = {"*": {"*": int}}
REPORT: Shape = {
    "date": DATE,
    "watermark?": (str, None),
    "table_version?": int,
    "rows": {"*": {"rows_in": int, "duplicates": int, "rejects": int, "used": int}},
    "rejects": SUMS,
    "undated": {"rows": SUMS, "rejects": SUMS},
    "scenarios": {"*": {"impressions": int, "mature": int, "*": NUMBER}},
    "cold_start?": {"*": {"share?": {"*": NUMBER}, "impressions?": int, "*": (int, None)}},
    "vocabulary_coverage?": {"*": NUMBER},
    "fingerprint?": dict,
}
"""<lake>/reports/<date>.json, as far as it is read again (docs/tables.md has all of it)."""
REPORT_WAY_OUT = "remove it, and build its date again"
_KINDS = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", dict: "an object"}


def requiring(shape: dict[str, Shape], needed: Iterable[str]) -> dict[str, Shape]:
    """The shape with its entries `needed`, which may be absent or null there, neither absent nor null."""
    found = {name: shape[f"{name}?"] for name in needed}
    return shape | {name: kind[0] if isinstance(kind, tuple) else kind for name, kind in found.items()}


def read_json(
    path: Path, shape: Shape, *, way_out: str = "remove it or write it again", error: type[UserError] = UserError
) -> Any:
    """The content of a JSON file of this shape.

    Raises:
        UserError: `error`: there is none, it is no JSON, or it has another shape; the line ends with `way_out`.
    """
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); {way_out}") from cause
    return parse_json(content, shape, where=path, way_out=way_out, error=error)


def parse_json(
    content: bytes | str,
    shape: Shape,
    *,
    where: object,
    way_out: str = "remove it or write it again",
    error: type[UserError] = UserError,
) -> Any:
    """As `read_json`, of what `where` holds."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: is not readable JSON ({cause}); {way_out}") from cause
    if problem := misfit(value, shape):
        raise error(f"{where}: is damaged ({problem}); {way_out}")
    return value


def misfit(value: Any, shape: Shape, place: str = "") -> str:
    """In words, the first place of a JSON value that is not as `shape` has it; '' where there is none."""
    if shape is object:
        return ""
    if isinstance(shape, tuple):
        return "" if value is None else misfit(value, shape[0], place)
    kind = shape if isinstance(shape, type) else str if isinstance(shape, Text) else type(shape)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if fits and isinstance(shape, Text):
        try:
            shape.read(value)
        except (ValueError, TypeError, UserError):
            fits = False
    if not fits:
        needed = shape.words if isinstance(shape, Text) else _KINDS.get(kind, "a list")
        return f"{place or 'it'} is {_shown(value)}, needed {needed}"
    if isinstance(shape, list):
        found = (misfit(inner, shape[0], f"{place}[{n}]") for n, inner in enumerate(value))
        return next(filter(None, found), "")
    return _object_misfit(value, shape, place) if isinstance(shape, dict) else ""


def _object_misfit(value: dict[str, Any], shape: dict[str, Shape], place: str) -> str:
    shapes = {key.removesuffix("?"): inner for key, inner in shape.items() if key != "*"}
    for key in shapes:
        if key in shape and key not in value:
            return f"{f'{place}.{key}' if place else key} is missing"
    for key, inner in value.items():
        expected = shapes.get(key, shape.get("*"))
        if expected is not None and (found := misfit(inner, expected, f"{place}.{key}" if place else key)):
            return found
    return ""


def _shown(value: Any) -> str:
    """A value for a message; of a list or an object its kind."""
    text = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
