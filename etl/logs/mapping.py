"""The shop's own columns -> those of the log, as `[logs.<log>]` says: frames in, frames out (docs/own-logs.md)."""

from __future__ import annotations

import functools
import re
import zoneinfo
from collections.abc import Sequence
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl.checks import DataCheckError
from etl.logs.formats import MALFORMED, own
from usr_ray.config.logs import ISO, MAX_NUMBER, OFFSETS, TIME_UNITS_NS, LogConfig, null_numbers, spark_time_pattern

TIMES = ("event_time", "ingest_time")
JOINER = "|"
"""Between the values of several own columns that make one id."""
_NUMBERS = (T.StringType, T.NumericType)
LAST_MICRO = 253_402_300_800_000_000
"""Start of the year 10000: what lies outside the years 1 to 9999 is no time, most often a wrong unit."""
FIRST_MICRO = -62_135_596_800_000_000
_EXACT = {T.FloatType: float(1 << 24), T.DoubleType: float(1 << 53)}
"""From there on a float need not be the integer that was written: its neighbours have the same bits."""
_NO_INTEGER = float(1 << 64)
"""What is larger was no integer of 64 bits, an id that is, but a number."""
_DATE = r"^\s*\d{4}-\d{1,2}-\d{1,2}"
_CLOCK = r"[T ]\s*\d{1,2}:\d{1,2}(?::\d{1,2}(?:\.\d*)?)?"
_ISO = _DATE + f"(?:{_CLOCK}" + r"\s*(\S.*?)?)?\s*$"
"""A date, a clock time behind it, a zone (group 1) behind that: Spark takes a bare clock time for one of today, and a
number for a year."""
_OFFSET = r"^(?:Z|(?:UTC?|GMT)?[+-]\d{1,2}(?::?\d{2}){0,2}|UTC?|GMT)$"
_NUMBER = r"^\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*$"
_DECIMAL_COMMA = r"^\s*[+-]?(?:[1-9]\d{0,2}(?:[.\s\u00a0\u202f]\d{3})+|\d+)(?:,\d*)?\s*$"
"""Points and spaces, no-break ones too, stand between thousands only, which do not begin with 0."""
_AMERICAN = {"EDT": "-04:00", "CST": "-06:00", "CDT": "-05:00", "MDT": "-06:00", "PST": "-08:00", "PDT": "-07:00"}
"""Short names that RFC 2822 defines and the time zone database lacks. Java reads PST as Los Angeles, in summer too, and
BST as Dhaka: of all others without a slash only those of the database are names of zones."""


def as_written(column: str) -> str:
    """Column beside a mapped time that holds it as the log wrote it: null and unreadable are different rejects."""
    return f"{column}_as_written"


def map_columns(raw: DataFrame, log: str, mapping: LogConfig) -> DataFrame:
    """The rows of `raw` that belong to the log, with the log's columns beside the shop's own.

    Grain: one row per row of `raw` that meets `where`. A mapped column hides an own one of its name. event_time and
    ingest_time are instants, null where they cannot be read.

    Raises:
        DataCheckError: an own column that the mapping names is not there, `where` meets no row, or a time has a type
            that its time_format cannot read.
    """
    rows = _matching_rows(raw, log, mapping)
    if nulls := mapping.null_values:
        fields = [field for field in raw.schema.fields if field.name != MALFORMED]
        rows = rows.withColumns({field.name: _without(own(field.name), field.dataType, nulls) for field in fields})
    targets: dict[str, Column] = {}
    for name, source in mapping.columns.items():
        for column in [source] if isinstance(source, str) else source:
            _check_there(raw, log, f"columns.{name}", column)
        targets[name] = own(source) if isinstance(source, str) else _joined(raw, source)
    for name in TIMES:
        source = str(mapping.columns.get(name, name))
        if source in raw.columns and name not in mapping.constants:
            targets[as_written(name)] = own(source)
            targets[name] = _instant(raw, log, source, mapping)
    for name in mapping.decimal_comma:
        number = mapping.columns.get(name, name)
        if not isinstance(number, str) or number not in raw.columns:
            raise DataCheckError(
                f"log {log}: logs.{log}.decimal_comma names '{name}', which is not there; there are: "
                f"{', '.join([*mapping.columns, *names_of(raw)])}; name one of those"
            )
        _check_is_text(raw, log, "decimal_comma", name, number)
        targets[name] = _with_point(own(number))
    for name, separator in mapping.split.items():
        text = targets.get(name, own(name) if name in raw.columns else None)
        _check_is_text(raw, log, "split", name, mapping.columns.get(name, name))
        if text is None:
            raise DataCheckError(
                f"log {log}: logs.{log}.split names '{name}', which is not there; there are: "
                f"{', '.join([*mapping.columns, *names_of(raw)])}; name one of those"
            )
        whole = text.cast("string")
        # A log of JSON lines with lists in some rows and texts in others has its lists as JSON.
        in_json = F.when(whole.rlike(r"^\s*\["), F.from_json(whole, "array<string>"))
        values = F.coalesce(in_json, F.split(whole, re.escape(separator), -1))
        targets[name] = _without(values, T.ArrayType(T.StringType()), mapping.null_values)
    targets |= {name: F.lit(value) for name, value in mapping.constants.items()}
    # Spark's names ignore case: an own column of a target's name, however written, would make it ambiguous.
    hidden = {name.lower() for name in targets}
    others = [own(name) for name in raw.columns if name.lower() not in hidden]
    return rows.select(*others, *(column.alias(name) for name, column in targets.items()))


def _matching_rows(raw: DataFrame, log: str, mapping: LogConfig) -> DataFrame:
    if not mapping.where:
        return raw
    tests = []
    for name, wanted in mapping.where.items():
        _check_there(raw, log, "where", name)
        values = wanted if isinstance(wanted, tuple) else (str(wanted).lower() if wanted in (True, False) else wanted,)
        text, kind = own(name).cast("string"), raw.schema[name].dataType
        wanted_texts = [str(value) for value in values]
        tests.append(text.isin(wanted_texts) | as_text(own(name), kind).isin(wanted_texts))
    rows = raw.filter(reduce(lambda a, b: a & b, tests))
    if rows.isEmpty():  # a misspelt value would make every label 0 without a word
        first = next(iter(mapping.where))
        seen = [row[0] for row in raw.select(own(first).cast("string")).distinct().limit(6).collect()]
        wanted_text = ", ".join(f"{name} = {value}" for name, value in mapping.where.items())
        raise DataCheckError(
            f"log {log}: logs.{log}.where ({wanted_text}) meets no row; column '{first}' holds "
            f"{', '.join(map(repr, sorted(map(str, seen)))) or 'no row'}; correct the values"
        )
    return rows


def names_of(raw: DataFrame) -> list[str]:
    """The columns of a log, for messages."""
    return [name for name in raw.columns if name != MALFORMED]


def _check_there(raw: DataFrame, log: str, key: str, column: str) -> None:
    if column not in raw.columns:
        raise DataCheckError(
            f"log {log}: logs.{log}.{key} names the column '{column}', which is not there; "
            f"there are: {', '.join(names_of(raw))}; name one of those"
        )


def _without(value: Column, kind: T.DataType, nulls: Sequence[str]) -> Column:
    """The value, or null where it is one of `nulls`; of a list the values that are none of them."""
    if isinstance(kind, T.ArrayType):
        element = kind.elementType
        has_blanks = isinstance(element, T.StringType)  # around a tag, which they are no part of

        def is_some(one: Column) -> Column:
            return _without(F.trim(one) if has_blanks else one, element, nulls).isNotNull()

        return F.filter(value, is_some) if nulls else value
    if isinstance(kind, T.FloatType | T.DoubleType | T.DecimalType):  # -1 is -1.0 and -1.00
        numbers = null_numbers(nulls)
        return F.when(~value.cast("double").isin(numbers), value) if numbers else value
    if isinstance(kind, T.StringType | T.NumericType | T.DateType):
        return F.when(~value.cast("string").isin([*nulls]), value)
    return value


def _check_is_text(raw: DataFrame, log: str, key: str, name: str, source: str | tuple[str, ...]) -> None:
    """What is a number or a list already would be read as its text: 12.5 as 125, [x, y] as one tag."""
    if not isinstance(source, str) or source not in raw.columns:
        return
    kind = raw.schema[source].dataType
    if not isinstance(kind, T.StringType | T.NullType):
        raise DataCheckError(
            f"log {log}: logs.{log}.{key} names '{name}', which is no text but {kind.simpleString()}; take it out of "
            f"{key}"
        )


def _with_point(text: Column) -> Column:
    """1.234,50 -> 1234.50; what is not written so, as 12.50, becomes no number: which of two it is nobody knows."""
    digits = F.regexp_replace(F.regexp_replace(text, r"[.\s\u00a0\u202f]", ""), ",", ".")
    read = F.when(text.rlike(_DECIMAL_COMMA), digits)
    return F.coalesce(read, F.when(~is_value(text), text), F.concat(F.lit("no decimal comma: "), text))


def plain_number(text: Column) -> Column:
    """Text as a double; null where it is none, or too large for 32 bits. Java's own reading takes 12d for a number."""
    read = F.when(text.rlike(_NUMBER), text.try_cast("double"))
    return F.when(F.abs(read) <= F.lit(MAX_NUMBER), read)


def is_value(text: Column) -> Column:
    """Whether there is something to read in a number's text: no blanks alone, and no NaN, as pandas writes a null."""
    return F.coalesce(~text.rlike(r"^\s*(?:[nN]a[nN])?\s*$"), F.lit(False))


def as_text(value: Column, kind: T.DataType) -> Column:
    """A single value as text; of floats a whole one without a fraction, as 3, and null for NaN and `is_imprecise`.

    pandas writes a column of integers as floats when one of them is missing: 3 is the same value in both.
    """
    text = value.cast("string")
    if not isinstance(kind, T.FloatType | T.DoubleType):
        return text
    is_whole = (value == F.rint(value)) & (F.abs(value) < F.lit(_EXACT[type(kind)]))
    is_text = ~F.isnan(value) & ~is_imprecise(value, kind)
    return F.when(is_whole, value.try_cast("bigint").cast("string")).when(is_text, text)


def is_imprecise(value: Column, kind: T.FloatType | T.DoubleType) -> Column:
    """Whether a float stands for an integer whose last digits it has lost, as that of a long id."""
    return (F.abs(value) >= F.lit(_EXACT[type(kind)])) & (F.abs(value) < F.lit(_NO_INTEGER))


def _joined(raw: DataFrame, columns: tuple[str, ...]) -> Column:
    """One id of several columns; null where one of them is null or empty."""
    texts = [F.nullif(as_text(own(column), raw.schema[column].dataType), F.lit("")) for column in columns]
    whole = reduce(lambda a, b: a & b, [text.isNotNull() for text in texts])
    return F.when(whole, F.concat_ws(JOINER, *texts))


def _instant(raw: DataFrame, log: str, source: str, mapping: LogConfig) -> Column:
    """The instant of a time column; a time without a zone is local in `time_zone`, one with a zone keeps it."""
    kind, column = raw.schema[source].dataType, own(source)
    if isinstance(kind, T.NullType | T.TimestampType):
        return column.cast("timestamp")
    if isinstance(kind, T.TimestampNTZType):
        return _local(column.cast("timestamp"), mapping.time_zone)
    is_number = mapping.time_format in TIME_UNITS_NS
    if not isinstance(kind, _NUMBERS if is_number else T.StringType):
        way_out = "cast it in the log" if is_number else f"set logs.{log}.time_format to 's', 'ms', 'us' or 'ns'"
        needed = f"a number ({mapping.time_format}) or a timestamp" if is_number else "text or a timestamp"
        raise DataCheckError(f"log {log}: column '{source}' is {kind.simpleString()}, needed {needed}; {way_out}")
    if is_number:
        return _from_number(column, TIME_UNITS_NS[mapping.time_format])
    if mapping.time_format == ISO:
        return iso_instant(column, mapping.time_zone)
    pattern = spark_time_pattern(mapping.time_format)
    if OFFSETS not in pattern:
        return _local(F.try_to_timestamp(column, F.lit(pattern)), mapping.time_zone)
    # One after the other, as options all three could be left out: a time without its offset would be one of UTC.
    forms = [pattern.replace(OFFSETS, form) for form in OFFSETS.strip("[]").split("][")]
    return F.coalesce(*(F.try_to_timestamp(column, F.lit(form)) for form in forms))


def iso_instant(text: Column, zone: str) -> Column:
    """The instant of ISO 8601 text, null where it is none; local in `zone` where it names no zone of its own."""
    named = F.regexp_extract(text, _ISO, 1)
    # Few and flat terms: a build plans them once for every time column of every log, again and again.
    offset = F.try_element_at(F.create_map(*(F.lit(word) for pair in _AMERICAN.items() for word in pair)), named)
    fixed = F.when(offset.isNull(), text).otherwise(F.regexp_replace(text, r"[A-Z]{3}\s*$", offset))
    line = F.concat(F.lit("\n"), named, F.lit("\n"))
    known = named.rlike(_OFFSET) | offset.isNotNull() | F.lit(_zone_lines()).contains(line)
    read = fixed.try_cast("timestamp")
    instant = F.when(named == "", _local(read, zone)).when(known, read)
    return F.when(text.rlike(_ISO), instant)


@functools.cache
def _zone_lines() -> str:
    """Names of the time zone database, a line each; no name that a row gives holds a line break."""
    return "\n".join(("", *sorted(zoneinfo.available_timezones()), ""))


def _local(read: Column, zone: str) -> Column:
    """`read` as UTC, taken as local time instead. Of an hour that a clock shows twice it is the first."""
    return read if zone == "UTC" else F.to_utc_timestamp(read, zone)


def _from_number(column: Column, unit_ns: int) -> Column:
    """Decimals, not doubles: a double of seconds since 1970 is 0.2 microseconds off."""
    micros = column.try_cast("decimal(29,9)") * F.lit(unit_ns).cast("decimal(10,0)") / F.lit(1000)
    whole = F.floor(micros).try_cast("bigint")
    return F.when((whole >= FIRST_MICRO) & (whole < LAST_MICRO), F.timestamp_micros(whole))
