"""Reading values: durations, dates, TOML sections -> frozen dataclasses, each mistake one clear line.

Standard library only; `usr_ray.config` re-exports what others need.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
import functools
import os
import re
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class UserError(Exception):
    """A mistake of the user's: one clear line (where, found, needed, way out); jobs exit with code 2."""


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


DAY_US = 86_400_000_000
_EPOCH = dt.date(1970, 1, 1)
SHOWN_RANGES = 5
"""Most ranges of dates in a message: one wrong clock must not make them one of 8,000 years."""
_UNITS_US = {
    "us": 1,
    "microsecond": 1,
    "ms": 1000,
    "millisecond": 1000,
    "s": 1_000_000,
    "second": 1_000_000,
    "m": 60_000_000,
    "min": 60_000_000,
    "minute": 60_000_000,
    "h": 3_600_000_000,
    "hour": 3_600_000_000,
    "d": DAY_US,
    "day": DAY_US,
}


def parse_duration_us(text: str, *, where: str) -> int:
    """Microseconds of a duration such as "1 hour", "24 hours", "90s" or "0 s"; ConfigError naming `where` otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    unit = match and (_UNITS_US.get(match[2]) or _UNITS_US.get(match[2].removesuffix("s")))
    if not match or not unit:
        raise ConfigError(f"{where}: {text!r} is not a duration; write a number and a unit, for example '24 hours'")
    return round(min(float(match[1]), 1e12) * unit)  # no infinity; a key's own range refuses what is too long


def parse_date(text: str, *, where: str) -> dt.date:
    """The date of "YYYY-MM-DD"; ConfigError naming `where` otherwise."""
    try:
        date = dt.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is not a date; write YYYY-MM-DD") from error
    # Beyond these years days, nanoseconds or windows overflow in one library or another.
    require(1970 <= date.year < 2200, f"{where}: {text!r} is not a date from 1970 to 2199; write YYYY-MM-DD")
    return date


def parse_dates(text: str, *, where: str) -> tuple[dt.date, dt.date]:
    """First and last date (both included) of "A:B" or "A"; ConfigError when empty, malformed or reversed."""
    first_text, colon, last_text = text.partition(":")
    require(bool(last_text) or not colon, f"{where}: {text!r} has no last date; write A:B, or A alone for one day")
    first = parse_date(first_text, where=where)
    last = parse_date(last_text, where=where) if last_text else first
    if last < first:
        raise ConfigError(f"{where}: the range {text!r} is empty; the first date must not be after the last")
    return first, last


def date_ranges(dates: Collection[str], *, most: int | None = None) -> str:
    """ISO dates as ranges without a gap, "A:B, C", the first `most` of them; '' for none."""
    ranges: list[list[dt.date]] = []
    for date in sorted(map(dt.date.fromisoformat, dates)):
        if ranges and (date - ranges[-1][1]).days == 1:
            ranges[-1][1] = date
        else:
            ranges.append([date, date])
    shown = [f"{first}:{last}" if first < last else f"{first}" for first, last in ranges]
    return ", ".join(shown[:most]) + (" ..." if most is not None and len(shown) > most else "")


def dates_in(ranges: str) -> frozenset[str]:
    """ISO dates of "A:B, C", as `date_ranges` writes them; none of ''."""
    found: set[str] = set()
    for text in ranges.split(", ") if ranges else ():
        first, last = parse_dates(text, where="dates")
        found |= {date_of(n).isoformat() for n in range(day_number(first), day_number(last) + 1)}
    return frozenset(found)


def dates_there(
    asked: tuple[dt.date, dt.date], there: Collection[str], *, where: str, source: str, allow_missing: bool
) -> tuple[list[dt.date], str]:
    """(Dates of first..last that are there, a warning that names the others or '').

    Args:
        asked: first and last date, both included.
        there: all ISO dates that `source` has.
        where: what names the dates, for messages.
        source: what has the dates, as the subject of a message, with its verb: 'the table T holds'.
        allow_missing: take those that are there, and warn of the others.

    Raises:
        UserError: none is there; or some are not, and that is not allowed.
    """
    first, last = asked
    every = [first + dt.timedelta(days=n) for n in range((last - first).days + 1)]
    found, missing = ([d for d in every if (d.isoformat() in there) == is_there] for is_there in (True, False))
    if not missing:
        return found, ""
    gone = date_ranges([date.isoformat() for date in missing], most=SHOWN_RANGES)
    if not allow_missing or not found:
        has = f"{source} {date_ranges(there, most=SHOWN_RANGES) or 'none'}"
        raise UserError(
            f"{where} {first}:{last}: {len(missing)} of these {len(every)} dates have no rows: {gone}; {has}; name "
            "dates of those, or take the ones that are there with --allow-missing-dates"
        )
    return found, f"{where} {first}:{last}: without {gone}, of which there are no rows"


def parse_instant_us(text: str, *, where: str) -> int:
    """Microseconds since 1970 UTC of "2026-01-08T00:00:00Z"; ConfigError naming `where` otherwise."""
    try:
        instant = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is not a time; write YYYY-MM-DDTHH:MM:SSZ") from error
    if instant.tzinfo is None:
        raise ConfigError(f"{where}: {text!r} has no time zone; end it with Z for UTC")
    return (instant - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


def day_number(date: dt.date) -> int:
    """Days since 1970."""
    return (date - _EPOCH).days


def date_of(number: int) -> dt.date:
    """The date this many days after 1970-01-01."""
    return _EPOCH + dt.timedelta(days=number)


def end_of_us(day: dt.date) -> int:
    """End of a UTC day in microseconds since 1970; labels of training rows up to that day must be final by then."""
    return (day_number(day) + 1) * DAY_US


def dotted(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one of dotted paths, as `--set` writes them."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved value, value now) of all that differs in two nested dictionaries; a key that one lacks is
    None there.
    """
    before, after = dotted(saved), dotted(now)
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def first_difference(
    saved: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str] = ("",), *, but: Sequence[str] = ()
) -> tuple[str, Any, Any] | None:
    """(dotted key, saved value, value now) of the first difference that counts; None where two are the same.

    Args:
        saved: nested dictionaries, as is `now`; a key that one side lacks is None there.
        keys: sections or single keys that count, by dotted path; '': all.
        but: sections or single keys of these that do not.
    """

    def is_of(key: str, places: Sequence[str]) -> bool:
        return any(place in ("", key) or key.startswith(f"{place}.") for place in places)

    found = differences(saved, now).items()
    return next(((key, *values) for key, values in found if is_of(key, keys) and not is_of(key, but)), None)


def complete(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries with the entries of `defaults` that `raw` lacks."""
    both = {**defaults, **raw}
    of = {key: default if isinstance(default := defaults.get(key), Mapping) else {} for key in both}
    return {key: complete(value, of[key]) if isinstance(value, Mapping) else value for key, value in both.items()}


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers between two ends, written as in mathematics: "[0, 1)" holds 0 and not 1. No range holds NaN."""

    text: str
    low: int | float
    high: int | float

    @classmethod
    def of(cls, text: str) -> Range:
        """The range that `text` writes."""
        low, high = (float(end) if re.search(r"[.e]", end) else int(end) for end in text[1:-1].split(","))
        return cls(text, low, high)

    def __contains__(self, value: int | float) -> bool:
        above = value > self.low if self.text[0] == "(" else value >= self.low
        return above and (value < self.high if self.text[-1] == ")" else value <= self.high)


SEED = "[0, 4294967295]"
"""What torch, numpy and Optuna all take."""
FINITE = "[-1e300, 1e300]"
SIZE = "[1, 65536]"
"""Range for the size of a layer, or of a list of parts."""
COUNT = "[1, 1000000000]"


def number(default: Any, within: str) -> Any:
    """A field that holds a number, or a tuple or mapping of numbers, each in a range; texts and bools are let pass."""
    return field(**_default(default), metadata={"range": Range.of(within)})


def choice(default: str, *others: str) -> Any:
    """A field that holds one of a few words."""
    return field(default=default, metadata={"choices": (default, *others)})


def duration(default: str, least: str, most: str) -> Any:
    """A field that holds a duration between two others, both included; where '' is the default, '' too."""
    return field(default=default, metadata={"durations": (least, most)})


def _default(value: Any) -> dict[str, Any]:
    return {"default_factory": dict} if value == {} else {"default": value}


def check_values(kind: type, values: Mapping[str, Any], where: str) -> None:
    """Check the values of a dataclass against its fields' own rules (number, choice, duration).

    Raises:
        ConfigError: naming `where`, the field, its value and what it may be.
    """
    for key in dataclasses.fields(kind):
        if key.name not in values:
            continue
        value, path = values[key.name], f"{where}.{key.name}"
        if "range" in key.metadata:
            for place, part in _parts(value):
                is_number = isinstance(part, int | float) and not isinstance(part, bool)
                within = key.metadata["range"]
                require(not is_number or part in within, f"{path}{place} must be in {within.text}, got {part}")
        elif "choices" in key.metadata:
            words = [repr(word) for word in key.metadata["choices"]]
            wanted = f"{', '.join(words[:-1])} or {words[-1]}"
            require(value in key.metadata["choices"], f"{path} must be {wanted}, got {value!r}")
        elif "durations" in key.metadata and (value or key.default):
            least, most = key.metadata["durations"]
            low, found, high = (parse_duration_us(text, where=path) for text in (least, value, most))
            require(low <= found <= high, f"{path} must be between {least} and {most}, got {value!r}")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from ((f".{name}{place}", part) for place, part in _parts(inner))
    elif isinstance(value, tuple):
        yield from ((f"[{n}]", part) for n, part in enumerate(value))
    else:
        yield "", value


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition`."""
    if not condition:
        raise ConfigError(message)


def check_address(text: str, *, flag: str) -> None:
    """A folder, or an object store's address, that can be saved with a run, shown in logs and named in SQL.

    Raises:
        UserError: it is empty; a ~ that no shell has replaced, or an address of one slash, either of which would become
            a folder of that name; a key or options (they belong into the environment), or a character that would end
            a quoted name or be replaced inside one (backtick, control characters, ${).
    """
    if not text:
        raise UserError(f"{flag} '': is empty; name a place (is a variable of the shell not set?)")
    if re.match(r"~[^/]*(/|$)", text):
        raise UserError(f"{flag} {text}: no shell has replaced the ~, and a folder would get this name; write it whole")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?!//)", text):
        raise UserError(
            f"{flag} {text}: would be taken for an address; write s3://BUCKET/FOLDER with two slashes, or ./NAME for a "
            "folder with a colon in its name"
        )
    if re.search(r"[`\x00-\x1f\x7f\ud800-\udfff]|\$\{", text):
        raise UserError(
            f"{flag} {text!r}: a path must hold no backtick, no control character, no ${{ and nothing that is not "
            "UTF-8; rename it"
        )
    scheme, has_scheme, rest = text.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if has_scheme and ((at and ":" in user) or "?" in rest or "#" in rest):
        raise UserError(
            f"{flag} {scheme}://...: an address must hold no key and no option, since it is saved with the run; name "
            "them in the environment (docs/cluster.md, object stores) and give the bucket and folder alone"
        )


def check_table_address(text: str, *, flag: str) -> None:
    """`check_address` for the place of Delta tables, which two readers must take for the same folder.

    Raises:
        UserError: as check_address; or delta-rs would take the path for another one (it decodes %41 to A and turns a
            backslash into a slash) or cannot write it ([ ] | ^).
    """
    check_address(text, flag=flag)
    where = text if "://" in text else os.path.realpath(text)
    if "://" not in text and (found := re.search(r"%[0-9A-Fa-f]{2}|[\\\[\]|^]", where)):
        raise UserError(
            f"{flag} {text}: the path of a Delta table must not hold {found[0]!r}, which other readers take for "
            "something else; rename it"
        )


def override_key(raw: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` to nested dictionaries; c is TOML, or a bare word; ConfigError where that cannot be."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: write it as section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except ValueError:  # no TOML, or a number of more digits than Python reads
        value = text  # a bare word is a string
    *sections, last = key.strip().split(".")
    for section in sections:
        child = raw.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
        raw = child
    raw[last] = value


_hints = functools.cache(typing.get_type_hints)
"""Type hints of a dataclass, kept: a study makes hundreds of configurations."""


def build(kind: type, raw: Any, *, path: str) -> Any:
    """A dataclass of type `kind` from nested dictionaries; ConfigError naming the dotted path of what does not fit.

    Here values are held to their ranges, choices and durations; what keys mean together is checked by the classes.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} must be a section, got {raw!r}")
    hints = _hints(kind)
    takers = [key.name for key in dataclasses.fields(kind) if key.metadata.get("takes_sections")]
    for taker in takers:
        others = {k: v for k, v in raw.items() if k not in hints and isinstance(v, Mapping)}
        if others:
            raw = {k: v for k, v in raw.items() if k not in others} | {taker: {**raw.get(taker, {}), **others}}
    unknown = sorted(set(raw) - set(hints))
    if unknown:
        where = f"{path}." if path else ""
        owner = path or "the configuration"
        own = [key for key in hints if key not in takers]
        near = difflib.get_close_matches(unknown[0], own, n=1)
        hint = f"; did you mean '{where}{near[0]}'?" if near else ""
        sections = [f"[{where}NAME]"] if takers else []
        raise ConfigError(f"unknown key '{where}{unknown[0]}'; {owner} has: {', '.join([*own, *sections])}{hint}")
    # Sections that a key takes stand beside the others: it is no part of their paths.
    paths = {k: path if k in takers else f"{path}.{k}" if path else k for k in raw}
    values = {k: _convert(hints[k], v, path=paths[k]) for k, v in raw.items()}
    check_values(kind, values, path)
    return kind(**values)


def _convert(hint: Any, value: Any, *, path: str) -> Any:  # noqa: PLR0911 - one return a kind of value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path=path)
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        return _convert_to_one_of(typing.get_args(hint), value, path=path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, v, path=f"{path}[{n}]") for n, v in enumerate(value))
    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a section, got {value!r}")
        inner = typing.get_args(hint)[1]
        return {str(k): _convert(inner, v, path=f"{path}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(str(value))  # float(value) raises where a whole number is too large, this gives infinity
    if hint is str and isinstance(value, dt.date):  # TOML reads a bare 2026-01-01 as a date
        return value.isoformat()
    if type(value) is not hint:
        raise ConfigError(f"{path} must be {_NAMES.get(hint, hint)}, got {value!r}")
    return value


def _convert_to_one_of(hints: tuple[Any, ...], value: Any, *, path: str) -> Any:
    for hint in hints:
        try:
            return _convert(hint, value, path=path)
        except ConfigError:
            continue
    names = " or ".join("a list" if typing.get_origin(hint) is tuple else _NAMES[hint] for hint in hints)
    raise ConfigError(f"{path} must be {names}, got {value!r}")


_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
