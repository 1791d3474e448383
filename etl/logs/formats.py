"""Open the files of a log, whose columns and types may differ from file to file, as one frame.

Spark takes the schema of some file for all: a column that another file lacks would be null there without a word, and
one of another type fails in the middle of the build. So every file's header or footer is looked at first. Files of
equal columns are opened together, each column is cast to the type that holds the values of all, and what only some
files have is null in the others and told. What no type can hold is refused.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame, DataFrameReader, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl.checks import DataCheckError
from etl.jvm import file_head, knows_charset, parquet_schemas
from etl.session import literal_path
from usr_ray.config import LogConfig

MALFORMED = "malformed:line"
"""Column of a text log: the line, where it has not as many fields as the header or is no JSON; null elsewhere."""
_UNREAD = "unread:"
"""Begins the names of a CSV file's columns without a name of their own."""
REPLACEMENT = "\ufffd"
"""What a decoder puts in the place of bytes that are not the encoding."""
_CASE = "spark.sql.caseSensitive"
_THREADS = 16
_HEAD_BYTES = (1 << 16, 1 << 22)
"""First bytes of a CSV file read for its header; the second number where the first holds no whole line."""
_NANOS = re.compile(r"^ {2}(?:required|optional) int64 (.+) \(TIMESTAMP\(NANOS,(true|false)\)\)(?: = \d+)?;$", re.M)
_WHOLE = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
_REAL = (T.FloatType, T.DoubleType)


@dataclass(frozen=True, slots=True)
class FileColumn:
    """One column of one file, as it stands there."""

    name: str
    read_as: T.DataType
    """The type to ask Spark for."""
    type: T.DataType
    """What it means: of nanoseconds, which Spark gives as bare numbers, a timestamp."""


Columns = tuple[FileColumn, ...]
Layout = tuple[Columns, str]
"""The columns of a file, and what ends its lines; '' where the reader finds that out, and of Parquet."""


class Formats:
    """Opens files; keeps what it has learned of headers and footers, as logs may share files."""

    def __init__(self, spark: SparkSession) -> None:
        self._spark = spark
        self._layouts: dict[tuple[str, ...], Layout | None] = {}
        self.notes: list[str] = []

    def open(
        self, log: str, kind: str, files: Sequence[str], base: str, mapping: LogConfig, needed: Sequence[str]
    ) -> DataFrame:
        """All rows of the files.

        Args:
            kind: 'parquet', 'csv' or 'json'.
            files: at least one.
            base: folder whose `key=value` folders are columns; '' for none.
            needed: columns that are read, by their names in the result.

        Raises:
            DataCheckError: a needed column is there more than once or has types that no one type holds.
        """
        charset = self._charset(log, mapping) if kind != "parquet" else ""
        reader = self._spark.read.option("basePath", literal_path(base)) if base else self._spark.read
        if kind == "json":
            if charset != "utf-8":
                reader = reader.option("encoding", charset).option("lineSep", "\n")
            paths = [literal_path(file) for file in files]
            found = self._json_fields(reader, paths)
            _check_once(log, [field.name for field in found], {plain(name) for name in needed}, "it")
            raw = reader.schema(json_kinds(found)).json(paths, columnNameOfCorruptRecord=MALFORMED)
            return renamed(log, raw, raw.columns, needed)
        groups: dict[Layout, list[str]] = {}
        for file, layout in zip(files, self._learned(log, kind, files, mapping), strict=True):
            if layout is not None:
                groups.setdefault(layout, []).append(file)
        names, kinds = self._agreed(log, groups, needed)
        parts = []
        for (columns, line_end), same in groups.items():
            once = _once(columns)
            paths = [literal_path(file) for file in same]
            if kind == "csv":  # by position: every field has its place
                fields = [c.name if c in once else f"{_UNREAD}{n}" for n, c in enumerate(columns)]
                schema = T.StructType([T.StructField(name, T.StringType()) for name in (*fields, MALFORMED)])
                raw = reader.schema(schema).csv(paths, **_csv_options(mapping, charset, line_end))
                raw = _without_carriage_returns(raw, fields) if line_end else raw
                raw = _with_runaway_quotes(raw, fields, mapping.quote) if mapping.quote else raw
            else:
                schema = T.StructType([T.StructField(column.name, column.read_as) for column in once])
                raw = reader.schema(schema).parquet(*paths)
            parts.append(_cast(raw, columns, names, kinds))
        if not parts:  # files without a byte
            return self._spark.createDataFrame(
                [], T.StructType([T.StructField(name, T.StringType()) for name in needed])
            )
        return reduce(DataFrame.unionByName, parts)

    def _json_fields(self, reader: DataFrameReader, paths: Sequence[str]) -> T.StructType:
        """The fields of JSON lines, each spelling by itself.

        Where names ignore case, Spark takes lines with a `Device` and lines with a `device` for lines of one schema,
        and reads the one and null of the other, as long as the fields stand in the same order without their case.
        """
        ignores = str(self._spark.conf.get(_CASE))
        self._spark.conf.set(_CASE, "true")
        try:
            return reader.json([*paths], columnNameOfCorruptRecord=MALFORMED).schema
        finally:
            self._spark.conf.set(_CASE, ignores)

    def _charset(self, log: str, mapping: LogConfig) -> str:
        """Java's name of the encoding, which Python may call otherwise: latin-1."""
        name = codecs.lookup(mapping.encoding).name.removesuffix("-sig")
        forms = (name, mapping.encoding, re.sub(r"-(?=[lb]e$)", "", name))  # utf-16-le is Java's UTF-16LE
        known = next((form for form in forms if knows_charset(self._spark, form)), None)
        if known is None:
            raise DataCheckError(
                f"log {log}: logs.{log}.encoding {mapping.encoding!r} is not known to Java; write it as 'UTF-8', "
                "'ISO-8859-1' or 'windows-1252', or write the file again in UTF-8"
            )
        return known

    def _learned(self, log: str, kind: str, files: Sequence[str], mapping: LogConfig) -> list[Layout | None]:
        place = (kind, mapping.separator, mapping.quote, mapping.encoding) if kind == "csv" else (kind,)

        def learn(file: str) -> Layout | None:
            key = (file, *place)
            if key not in self._layouts:
                self._layouts[key] = self._header(log, file, mapping) if kind == "csv" else (self._footer(file), "")
            return self._layouts[key]

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(learn, files))

    def _agreed(
        self, log: str, groups: Mapping[Layout, Sequence[str]], needed: Sequence[str]
    ) -> tuple[dict[str, str], dict[str, T.DataType]]:
        """Name in the result of each column's plain name, and its type; None of those that no type holds."""
        wanted = {plain(name): name for name in reversed(needed)}
        names: dict[str, str] = {}
        seen: dict[str, list[tuple[T.DataType, str, int]]] = {}
        for (columns, _), files in groups.items():
            _check_once(log, [column.name for column in columns], wanted, files[0])
            for column in _once(columns):
                key = plain(column.name)
                names.setdefault(key, wanted.get(key, column.name.strip()))
                seen.setdefault(key, []).append((column.type, files[0], len(files)))
        kinds: dict[str, T.DataType] = {}
        num_files = sum(map(len, groups.values()))
        for key, found in seen.items():
            kind: T.DataType | None = found[0][0]
            for other, _, _ in found[1:]:
                kind = kind and wider(kind, other)
            if kind is None and key in wanted:
                counts: Counter[str] = Counter()
                examples: dict[str, str] = {}
                for other, file, size in found:
                    counts[other.simpleString()] += size
                    examples.setdefault(other.simpleString(), file)
                (usual, _), (odd, size), *_ = counts.most_common()
                raise DataCheckError(
                    f"log {log}: column '{names[key]}' is {odd} in {examples[odd]} ({size} of {num_files} files) and "
                    f"{usual} in {examples[usual]}; write the odd files again, so that all of the log agree"
                )
            having = sum(size for _, _, size in found)
            note = f"log {log}: column '{names[key]}' is in {having} of {num_files} files and null in the others"
            if key in wanted and having < num_files and note not in self.notes:
                self.notes.append(note)
            if kind is not None:
                kinds[key] = kind
        return names, kinds

    def _header(self, log: str, file: str, mapping: LogConfig) -> Layout | None:
        """Names in the first line of a CSV file, and what ends its lines; None where the file is empty."""
        for size in _HEAD_BYTES:
            head = file_head(self._spark, file, size)
            text = codecs.getincrementaldecoder(mapping.encoding)("replace").decode(head).removeprefix("\ufeff")
            if "\n" in text or "\r" in text:
                break
        try:
            quoting: Any = {"quotechar": mapping.quote} if mapping.quote else {"quoting": csv.QUOTE_NONE}
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=mapping.separator, **quoting)
            row = next((row for row in rows if row), None)
        except csv.Error as error:
            raise DataCheckError(f"log {log}: cannot be read as CSV: {file}: {error}; write it again") from error
        if row is None:
            return None
        broken = [name for name in row if REPLACEMENT in name or "\0" in name]
        if broken:
            example = encoding_of(head) or "windows-1252"
            raise DataCheckError(
                f"log {log}: the header of {file} holds bytes that are not {mapping.encoding} ({broken[0]!r}); set "
                f"logs.{log}.encoding, for example to {example!r}"
            )
        columns = tuple(FileColumn(name, T.StringType(), T.StringType()) for name in row)
        end = re.search(r"\r\n?|\n", re.sub('"[^"]*"', "", text))
        return columns, "" if end and end[0] == "\r" else "\n"

    def _footer(self, file: str) -> Columns:
        """The columns of a Parquet file as Spark reads them. Nanoseconds: see spark.sql.legacy.parquet.nanosAsLong."""
        spark_schema, own_schema = parquet_schemas(self._spark, file)
        nanos = nanosecond_columns(own_schema)
        return tuple(
            FileColumn(field.name, field.dataType, nanos.get(field.name, field.dataType))
            for field in T.StructType.fromJson(json.loads(spark_schema)).fields
        )


def json_kinds(found: T.StructType) -> T.StructType:
    """How the fields of JSON lines are read: as they are written, as text, but for columns of numbers with a fraction.

    Those are doubles, as in Parquet: 3.0, which pandas writes for the 3 of a column in which some are missing, is then
    the category 3 and no id. Fields that differ in case only are left out.
    """

    def read_as(kind: T.DataType) -> T.DataType:
        if isinstance(kind, T.StructType):
            return json_kinds(kind)
        if isinstance(kind, T.ArrayType):
            return T.ArrayType(read_as(kind.elementType))
        return kind if isinstance(kind, T.DoubleType) else T.StringType()

    counts = Counter(plain(field.name) for field in found)
    once = (field for field in found if counts[plain(field.name)] == 1)
    return T.StructType([T.StructField(field.name, read_as(field.dataType)) for field in once])


def nanosecond_columns(schema: str) -> dict[str, T.DataType]:
    """Top-level TIMESTAMP(NANOS) columns of a Parquet schema (text): what they are, an instant or a local time."""
    return {
        name: T.TimestampType() if is_instant == "true" else T.TimestampNTZType()
        for name, is_instant in _NANOS.findall(schema)
    }


def encoding_of(head: bytes) -> str:
    """The UTF-16 of a file's first bytes, by its byte order mark or by where the zeros of its letters are; or ''."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    zero = head.find(b"\0")
    return "" if zero < 0 else "UTF-16LE" if zero % 2 else "UTF-16BE"


def wider(one: T.DataType, other: T.DataType) -> T.DataType | None:
    """The type that holds all values of both; None where there is none, as of bigint and double."""
    for a, b in ((one, other), (other, one)):
        if a == b or isinstance(b, T.NullType):
            return a
        for family in (_WHOLE, _REAL):
            if isinstance(a, family) and isinstance(b, family) and family.index(type(a)) >= family.index(type(b)):
                return a
        if isinstance(a, T.DoubleType) and isinstance(b, _WHOLE[:3]):
            return a
        if isinstance(a, T.DecimalType) and a.scale == 0 and a.precision >= 19 and isinstance(b, _WHOLE):
            return a  # 64-bit numbers without a sign
    return None


def plain(name: str) -> str:
    """A column's name without what does not count: case, and blanks around it."""
    return name.strip().lower()


def renamed(log: str, raw: DataFrame, columns: Sequence[str], needed: Sequence[str]) -> DataFrame:
    """The frame with the needed columns under exactly these names, whatever their case and blanks; grain unchanged."""
    wanted = {plain(name): name for name in reversed(needed)}
    _check_once(log, columns, wanted, "it")
    counts = Counter(map(plain, columns))
    kept = [name for name in columns if counts[plain(name)] == 1]
    return raw.select(*(own(name).alias(wanted.get(plain(name), name.strip())) for name in kept))


def own(column: str) -> Column:
    """A column by its name, whatever signs are in it."""
    return F.col("`" + column.replace("`", "``") + "`")


def _check_once(log: str, columns: Sequence[str], wanted: Iterable[str], file: str) -> None:
    counts = Counter(map(plain, columns))
    for key in wanted:
        if counts[key] > 1:
            same = " and ".join(repr(name) for name in columns if plain(name) == key)
            raise DataCheckError(
                f"log {log}: {file} has the columns {same}, and case and blanks tell no columns apart; rename one"
            )


def _once(columns: Columns) -> Columns:
    """The columns, except unread ones that have no name or that Spark could not tell apart."""
    counts = Counter(plain(column.name) for column in columns)
    return tuple(column for column in columns if plain(column.name) and counts[plain(column.name)] == 1)


def _csv_options(mapping: LogConfig, charset: str, line_end: str) -> dict[str, Any]:
    # RFC 4180: quotes are doubled, and a quoted field may hold line breaks and be of any length.
    # Left alone, Spark takes the end of the header for that of all lines: a file of both kinds, as where a header was
    # put before an export, would keep carriage returns in its last column, or two lines would be one.
    return ({"lineSep": line_end} if line_end else {}) | {
        "header": True,
        "sep": mapping.separator,
        "encoding": charset,
        "quote": mapping.quote,
        "escape": mapping.quote or '"',
        "multiLine": True,
        "maxCharsPerColumn": -1,
        "columnNameOfCorruptRecord": MALFORMED,
    }


def _without_carriage_returns(raw: DataFrame, fields: Sequence[str]) -> DataFrame:
    """Lines that end in CRLF, read as ones of LF: without the rest of it in the last field, and without empty lines."""
    last = own(fields[-1])
    end = F.when(last != "\r", F.regexp_replace(last, r"\r\z", ""))
    lines = raw.filter(F.coalesce(own(fields[0]) != "\r", F.lit(True))) if len(fields) > 1 else raw
    return lines.withColumn(fields[-1], end)


def _with_runaway_quotes(raw: DataFrame, fields: Sequence[str], quote: str) -> DataFrame:
    """Rows in which a quote that was none ran on to the next one, lines later, are malformed.

    As in `a,"red,1`, where red with a quote before it was written as it was: the field ends at the next field with a
    quote, and the lines between are in it. Spark leaves the first quote in such a field.
    """
    ran_on = F.filter(F.array(*map(own, fields)), lambda field: field.startswith(quote) & field.contains("\n"))
    return raw.withColumn(MALFORMED, F.coalesce(own(MALFORMED), F.get(ran_on, F.lit(0))))


def _cast(raw: DataFrame, columns: Columns, names: Mapping[str, str], kinds: Mapping[str, T.DataType]) -> DataFrame:
    """The rows of some files in the columns of all; those of `key=value` folders and MALFORMED behind them."""
    mine = {plain(column.name): column for column in _once(columns)}
    there = {plain(name) for name in raw.columns}
    result = []
    for key, kind in kinds.items():
        if key not in mine or key not in there:
            result.append(F.lit(None).cast(kind).alias(names[key]))
            continue
        value = own(mine[key].name)
        if mine[key].type != mine[key].read_as:  # nanoseconds, cut to microseconds; doubles would not hold them
            micros = F.floor(value.cast("decimal(20,0)") / F.lit(1000)).cast("bigint")
            value = F.timestamp_micros(micros).cast(mine[key].type)
        result.append(value.cast(kind).alias(names[key]))
    others = [n for n in raw.columns if plain(n) not in kinds and plain(n) not in mine and not n.startswith(_UNREAD)]
    return raw.select(*result, *map(own, others))
