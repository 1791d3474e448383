"""The shop's own columns -> those of the contract, as `[logs.<log>]` says: frames in, frames out (docs/own-logs.md)."""

from __future__ import annotations

from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl.checks import DataCheckError
from usr_ray.config.logs import ISO, TIME_UNITS_NS, LogConfig, spark_time_pattern

TIMES = ("event_time", "ingest_time")
JOINER = "|"
"""Between the values of several own columns that make one id."""
_NUMBERS = (T.StringType, T.NumericType)
_LAST_MICRO = 253_402_300_800_000_000
"""Start of the year 10000: what lies outside the years 1 to 9999 is no time, most often a wrong unit."""
_FIRST_MICRO = -62_135_596_800_000_000
_NAMES_ZONE = r"\d:\d\d.*(?:Z|UTC|GMT|[+-]\d{1,2}(?::?\d{2})?|[A-Za-z]+/[A-Za-z_/]+)\s*$"
"""A zone is looked for behind a clock time: the -01 of 2026-01-01 is none."""


def as_written(column: str) -> str:
    """Column beside a mapped time that holds it as the log wrote it: null and unreadable are different rejects."""
    return f"{column}_as_written"


def map_columns(raw: DataFrame, log: str, mapping: LogConfig) -> DataFrame:
    """The rows of `raw` that belong to the log, with the contract's columns beside the shop's own.

    Grain: one row per row of `raw` that meets `where`. A mapped column hides an own one of its name. event_time and
    ingest_time are instants, null where they cannot be read.

    Raises:
        DataCheckError: an own column that the mapping names is not there, `where` meets no row, or a time has a type
            that its time_format cannot read.
    """
    rows = _matching_rows(raw, log, mapping)
    targets: dict[str, Column] = {}
    for name, own in mapping.columns.items():
        for column in [own] if isinstance(own, str) else own:
            _check_there(raw, log, f"columns.{name}", column)
        targets[name] = _own(own) if isinstance(own, str) else _joined(own)
    for name in TIMES:
        source = str(mapping.columns.get(name, name))
        if source in raw.columns:
            targets[as_written(name)] = _own(source)
            targets[name] = _instant(raw, log, source, mapping)
    for name in mapping.decimal_comma:
        number = mapping.columns.get(name, name)
        if not isinstance(number, str) or number not in raw.columns:
            raise DataCheckError(
                f"log {log}: logs.{log}.decimal_comma names '{name}', which is not there; there are: "
                f"{', '.join([*mapping.columns, *raw.columns])}; name one of those"
            )
        # Spaces too stand between thousands, as 1 234,50 with a no-break space.
        whole = F.regexp_replace(_own(number).cast("string"), r"[.\s\u00a0\u202f]", "")
        targets[name] = F.regexp_replace(whole, ",", ".")
    targets |= {name: F.lit(value) for name, value in mapping.constants.items()}
    # Spark's names ignore case: an own column of a target's name, however written, would make it ambiguous.
    hidden = {name.lower() for name in targets}
    others = [_own(name) for name in raw.columns if name.lower() not in hidden]
    return rows.select(*others, *(column.alias(name) for name, column in targets.items()))


def _matching_rows(raw: DataFrame, log: str, mapping: LogConfig) -> DataFrame:
    if not mapping.where:
        return raw
    tests = []
    for own, wanted in mapping.where.items():
        _check_there(raw, log, "where", own)
        values = wanted if isinstance(wanted, tuple) else (str(wanted).lower() if wanted in (True, False) else wanted,)
        tests.append(_own(own).cast("string").isin([str(value) for value in values]))
    rows = raw.filter(reduce(lambda a, b: a & b, tests))
    if rows.isEmpty():  # a misspelt value would make every label 0 without a word
        own = next(iter(mapping.where))
        seen = [row[0] for row in raw.select(_own(own).cast("string")).distinct().limit(6).collect()]
        wanted_text = ", ".join(f"{name} = {value}" for name, value in mapping.where.items())
        raise DataCheckError(
            f"log {log}: logs.{log}.where ({wanted_text}) meets no row; column '{own}' holds "
            f"{', '.join(map(repr, sorted(map(str, seen)))) or 'no row'}; correct the values"
        )
    return rows


def _check_there(raw: DataFrame, log: str, key: str, column: str) -> None:
    if column not in raw.columns:
        raise DataCheckError(
            f"log {log}: logs.{log}.{key} names the column '{column}', which is not there; "
            f"there are: {', '.join(raw.columns)}; name one of those"
        )


def _own(column: str) -> Column:
    return F.col("`" + column.replace("`", "``") + "`")


def _joined(columns: tuple[str, ...]) -> Column:
    """One id of several columns; null where one of them is null or empty."""
    texts = [F.nullif(_own(column).cast("string"), F.lit("")) for column in columns]
    whole = reduce(lambda a, b: a & b, [text.isNotNull() for text in texts])
    return F.when(whole, F.concat_ws(JOINER, *texts))


def _instant(raw: DataFrame, log: str, source: str, mapping: LogConfig) -> Column:
    """The instant of a time column; a time without a zone is local in `time_zone`, one with a zone keeps it."""
    kind, column = raw.schema[source].dataType, _own(source)
    if isinstance(kind, T.TimestampType):
        return column
    if isinstance(kind, T.TimestampNTZType):
        return _local(column.cast("timestamp"), mapping.time_zone)
    if isinstance(kind, T.NullType):
        return F.lit(None).cast("timestamp")
    is_number = mapping.time_format in TIME_UNITS_NS
    if not isinstance(kind, _NUMBERS if is_number else T.StringType):
        way_out = "cast it in the log" if is_number else f"set logs.{log}.time_format to 's', 'ms', 'us' or 'ns'"
        needed = f"a number ({mapping.time_format}) or a timestamp" if is_number else "text or a timestamp"
        raise DataCheckError(f"log {log}: column '{source}' is {kind.simpleString()}, needed {needed}; {way_out}")
    if is_number:
        return _from_number(column, TIME_UNITS_NS[mapping.time_format])
    if mapping.time_format == ISO:
        read = column.try_cast("timestamp")
        return F.when(column.rlike(_NAMES_ZONE), read).otherwise(_local(read, mapping.time_zone))
    read = F.try_to_timestamp(column, F.lit(spark_time_pattern(mapping.time_format)))
    return read if "%z" in mapping.time_format else _local(read, mapping.time_zone)


def _local(read: Column, zone: str) -> Column:
    """`read` as UTC, taken as local time instead. Of an hour that a clock shows twice it is the first."""
    return read if zone == "UTC" else F.to_utc_timestamp(read, zone)


def _from_number(column: Column, unit_ns: int) -> Column:
    """Decimals, not doubles: a double of seconds since 1970 is 0.2 microseconds off."""
    micros = column.try_cast("decimal(29,9)") * F.lit(unit_ns).cast("decimal(10,0)") / F.lit(1000)
    whole = F.floor(micros).try_cast("bigint")
    return F.when((whole >= _FIRST_MICRO) & (whole < _LAST_MICRO), F.timestamp_micros(whole))
