"""Configuration of the shop's own logs (`[logs.<log>]`) and of the experiment report (`[online]`). Stdlib only."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from usr_ray.config.fields import FINITE, SEED, ConfigError, choice, number, require

TIME_UNITS_NS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
"""time_format of a number -> nanoseconds of its unit."""
ISO = "iso"
LOG_FORMATS = ("parquet", "delta", "csv", "json")
MAX_NUMBER = 3.4028234663852886e38
"""The largest of 32 bits, in which numbers are written: what is larger would be infinite there, and is no value."""

OFFSETS = "[XXX][XX][X]"
"""Spark's pattern of %z: +01:00, +0100 or +01."""
_LENIENT = {"Y": "y", "m": "M", "d": "d", "H": "H", "I": "h", "M": "m", "S": "s", "j": "D"}
_FIXED = {"Y": "yyyy", "m": "MM", "d": "dd", "H": "HH", "I": "hh", "M": "mm", "S": "ss", "j": "DDD"}
_OTHER = {"y": "yy", "f": "SSSSSS", "b": "MMM", "B": "MMMM", "a": "E", "A": "EEEE", "p": "a", "z": OFFSETS}


def null_numbers(nulls: Iterable[str]) -> list[float]:
    """Those of a log's `null_values` that are numbers: as one, -1 stands for -1.0 too."""
    return [float(text) for text in nulls if re.fullmatch(r"[+-]?\d{1,15}(?:\.\d*)?", text)]


def spark_time_pattern(text: str) -> str:
    """Spark's pattern for a strptime one: "%d.%m.%Y %H:%M" -> "d'.'M'.'y' 'H':'m".

    Numbers between other text may lack their leading zero; numbers that touch ("%Y%m%d") have their full width.

    Raises:
        ValueError: a code that Spark cannot parse, a lone %, no code at all, or an hour of a clock that is twice a day.
    """
    parts = re.findall(r"%(.)|([^%]+)|(%)", text, flags=re.DOTALL)
    if not any(code for code, _, _ in parts):
        raise ValueError("it has no %-code")
    pattern = ""
    for place, (code, literal, _) in enumerate(parts):
        touches = any(0 <= n < len(parts) and parts[n][0] in _FIXED for n in (place - 1, place + 1))
        if literal or code == "%":
            pattern += "'" + (literal or "%").replace("'", "''") + "'"
        elif code in _FIXED:
            pattern += (_FIXED if touches else _LENIENT)[code]
        elif code in _OTHER:
            pattern += _OTHER[code]
        else:
            raise ValueError(f"%{code} is not among %{' %'.join([*_FIXED, *_OTHER])}")
    codes = {code for code, _, _ in parts}
    if "I" in codes and "p" not in codes:
        raise ValueError("%I without %p is an hour of the morning or of the afternoon; write %H for 0 to 23")
    return pattern


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """How one log is made from the shop's own files (docs/own-logs.md); logs may share files."""

    path: str = ""
    """File, folder or glob, below --logs unless it starts with / or names a file system; empty: the log's own entry."""
    format: str = choice("", *LOG_FORMATS)
    """'parquet', 'delta', 'csv' or 'json' (one object a line); empty: what the file names end with."""
    separator: str = ","
    """Between the fields of a CSV line."""
    quote: str = '"'
    """Encloses a CSV field with separators, line breaks or quotes (doubled); '': a quote is an ordinary character."""
    encoding: str = "UTF-8"
    """Encoding of CSV and JSON lines: 'UTF-8', 'ISO-8859-1', 'windows-1252' or another."""
    columns: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Column of the log, or feature -> own column; the values of several own columns are joined by '|'."""
    split: Mapping[str, str] = field(default_factory=dict)
    """Column of tags or terms, by its name in the log -> text between its values, such as "|"."""
    decimal_comma: tuple[str, ...] = ()
    """Number columns, by their name in the log, written as 1.234,50."""
    constants: Mapping[str, str | int | float | bool] = number({}, FINITE)
    """Column -> its value in every row; '' is null."""
    where: Mapping[str, str | int | bool | tuple[str, ...]] = number({}, FINITE)
    """Own column -> the value, or one of the values, that a row of this log has in it."""
    null_values: tuple[str, ...] = ()
    """Texts that stand for no value in any column of the log, such as 'NULL' or '-'; an empty text always does."""
    time_format: str = ISO
    """Form of event_time and ingest_time: 'iso', a number's unit ('s', 'ms', 'us', 'ns'), or a strptime pattern."""
    time_zone: str = "UTC"
    """Zone of times that do not name their own, such as 'Europe/Berlin'."""

    def check(self, where: str) -> None:
        """Raise ConfigError, naming `where`, unless every value can be used."""
        require(len(self.quote) <= 1, f"{where}.quote must be one character, or '' for none, got {self.quote!r}")
        require(len(self.separator) == 1, f"{where}.separator must be one character, got {self.separator!r}")
        require(
            self.quote != self.separator,
            f"{where}: quote and separator are both {self.quote!r}; set another quote, or '' for files without quoting",
        )
        require(
            _is_encoding(self.encoding),
            f"{where}.encoding {self.encoding!r} is unknown; write it as 'UTF-8' or 'ISO-8859-1'",
        )
        doubled = sorted(set(self.columns) & set(self.constants))
        require(not doubled, f"{where}: {', '.join(doubled)} is in columns and in constants; keep one of them")
        for key in ("event_time", "ingest_time"):
            require(key not in self.constants, f"{where}.constants.{key} would be the time of every row; name a column")
            require(isinstance(self.columns.get(key, ""), str), f"{where}.columns.{key} must be one column")
        for key in ("columns", "where"):
            empty = [name for name, value in getattr(self, key).items() if value in ("", ())]
            require(not empty, f"{where}.{key}.{''.join(empty[:1])} is empty; name at least one")
        empty = [name for name, text in self.split.items() if not text]
        require(not empty, f"{where}.split.{''.join(empty[:1])} is empty; name what stands between the values")
        why = _fault_of_time_format(self.time_format)
        require(
            not why,
            f"{where}.time_format must be 'iso', 's', 'ms', 'us', 'ns' or a pattern of strptime such as "
            f"'%d.%m.%Y %H:%M:%S', got {self.time_format!r}: {why}",
        )
        if not _is_time_zone(self.time_zone):  # the suggestion reads the whole time zone database
            like = _like_time_zone(self.time_zone)
            raise ConfigError(f"{where}.time_zone {self.time_zone!r} is unknown; write it as {like}")


def _is_encoding(name: str) -> bool:
    try:
        codecs.lookup(name)
    except LookupError:
        return False
    return True


def _is_time_zone(name: str) -> bool:
    import zoneinfo  # here: few configurations need it, and it reads the machine's own set-up

    def known(zone: str) -> bool:
        try:
            zoneinfo.ZoneInfo(zone)
        except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
            return False
        return True

    # A machine without a time zone database cannot tell; Spark brings its own.
    return name == "UTC" or known(name) or not known("Europe/London")


def _like_time_zone(name: str) -> str:
    """The zone that was probably meant, or two examples. UTC+8 is like none: the database's GMT+8 lies west of it."""
    import zoneinfo

    zones = sorted(zone for zone in zoneinfo.available_timezones() if "GMT" not in zone)
    same = [zone for zone in zones if f"/{zone}".lower().endswith(f"/{name}".lower())]
    near = same or difflib.get_close_matches(name, zones, n=1, cutoff=0.9)
    return repr(near[0]) if near else "'UTC' or 'Europe/Berlin'"


def _fault_of_time_format(text: str) -> str:
    if text == ISO or text in TIME_UNITS_NS:
        return ""
    try:
        spark_time_pattern(text)
    except ValueError as error:
        return str(error)
    return ""


def log_names(scenarios: Sequence[str]) -> list[str]:
    """Every log that there may be with these scenarios."""
    return [f"{s}_{kind}" for s in scenarios for kind in ("impressions", "clicks", "orders")] + [
        "orders",
        "users",
        "items",
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineConfig:
    """The report on an experiment that the shop has run (docs/online.md)."""

    bucket_column: str = "bucket"
    """Column of the impressions logs with the experiment's bucket; null: the impression is outside the experiment."""
    control: str = ""
    """Bucket the others are compared with; empty: the first by name."""
    shares: Mapping[str, float] = number({}, "(0, 1e300]")
    """Bucket -> planned share of users, in any unit; empty: every bucket found was planned to be as large."""
    confidence: float = number(0.95, "[0.5, 1)")
    """Level of every interval; 1 - confidence is also the level of Holm's verdicts."""
    num_resamples: int = number(1000, "[100, 1000000]")
    """Resamples of the bootstrap."""
    seed: int = number(0, SEED)
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        require(bool(self.bucket_column), "online.bucket_column is empty; name a column of the impressions logs")
        require(
            len(self.shares) != 1,
            f"online.shares names one bucket, {''.join(self.shares)}; an experiment has two or more",
        )
        require(
            not (self.shares and self.control) or self.control in self.shares,
            f"online.control {self.control!r} is not in online.shares, which has: {', '.join(self.shares)}",
        )
