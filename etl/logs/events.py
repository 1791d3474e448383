"""Read the logs, cast them, and set aside what cannot be used.

All logs become one frame of event rows, so that whatever follows is one pass over one frame: rows in, duplicates,
rejects, and the one shuffle by user.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl.checks import DataCheckError, check_columns
from etl.kernel.events import KIND_CLICK, KIND_IMPRESSION, KIND_ORDER, NO_SCENARIO, context_column, texts_column
from etl.logs.files import TEXT_FORMATS, LogFolder, readable
from etl.logs.formats import MALFORMED, REPLACEMENT, own
from etl.logs.mapping import (
    FIRST_MICRO,
    LAST_MICRO,
    TIMES,
    as_text,
    as_written,
    is_imprecise,
    is_value,
    iso_instant,
    names_of,
    plain_number,
)
from usr_ray.config import Config
from usr_ray.config.logs import MAX_NUMBER
from usr_ray.config.terms import SEPARATOR
from usr_ray.schema import TERM, ListFeature, VectorFeature

_INTEGERS = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
REASON = "reason:"
"""Column of a feature table: why the row cannot be used; null where it can."""
_TIME, _UNREADABLE, _UNPARSABLE, _UNREAD_NUMBER, _RAW = "time:", "unreadable:", "unparsable:", "number:", "raw:"
"""Columns between a log's own and those of `read_events`."""
Read = Callable[[DataFrame, str, str], Column]
"""Reads a column of a log of that name."""
_FIRST_ROWS = 1000
_ATOMIC = (T.StringType, T.BooleanType, T.NumericType, T.DateType)


@dataclass(frozen=True, kw_only=True, slots=True)
class EventLog:
    """One event log and how its rows are keyed."""

    name: str
    kind: int
    scenario: int
    key: str
    """Column of the row's own id."""
    required: tuple[str, ...]


def event_logs(config: Config, folder: LogFolder) -> tuple[EventLog, ...]:
    """The event logs the configuration asks for, in the order in which equal keys prefer them.

    Raises:
        DataCheckError: an impressions or clicks log is missing, there is no orders log at all, or there is one of a
            scenario that labels.no_order_scenarios says to have none.
    """
    logs = []
    for number, scenario in enumerate(config.scenarios):
        query = ("query",) if scenario in config.query_scenarios else ()
        shown, clicks = f"{scenario}_impressions", f"{scenario}_clicks"
        logs.append(_event_log(shown, KIND_IMPRESSION, number, ("impression_id", "request_id"), query))
        logs.append(_event_log(clicks, KIND_CLICK, number, ("click_id", "impression_id")))
    orders = [(f"{scenario}_orders", number) for number, scenario in enumerate(config.scenarios)]
    found = [(name, number) for name, number in [*orders, ("orders", NO_SCENARIO)] if folder.has(name)]
    unknown = config.labels.no_order_scenarios
    for name, number in found:
        of_log = config.scenarios if number == NO_SCENARIO else (config.scenarios[number],)
        refuted = ", ".join(scenario for scenario in of_log if scenario in unknown)
        if refuted:
            raise DataCheckError(
                f"log {name}: gives orders to {refuted}, of which labels.no_order_scenarios says that no log knows "
                "any; take the scenario out of the list, or the log out of --logs"
            )
    if not found and len(unknown) < len(config.scenarios):
        folder.read("orders")  # says what is missing and what there is
    logs += [_event_log(name, KIND_ORDER, number, ("order_id",)) for name, number in found]
    return tuple(logs)


def _check_unread_query(folder: LogFolder, config: Config, log: EventLog, raw: DataFrame) -> None:
    """Queries that nobody would read must not be lost without a word; the log's first rows show whether it has any.

    A search box has them in most of its rows. A column of that name without a value is a shared layout's.
    """
    for name in raw.columns:
        if name.lower() != "query":
            continue
        with readable(log.name):
            rows = raw.select(own(name)).take(_FIRST_ROWS)
        if any(row[0] not in (None, "") for row in rows):
            folder.note(unread_query(config, log, name))


def unread_query(config: Config, log: EventLog, column: str) -> str:
    """The warning of a column with queries in the impressions of a scenario that has none.

    Raises:
        DataCheckError: the configuration itself says that they are queries.
    """
    scenario, named = config.scenarios[log.scenario], ", ".join(config.query_scenarios) or "empty"
    mapping = config.logs.get(log.name)
    if mapping is not None and "query" in {**mapping.columns, **mapping.constants}:
        raise DataCheckError(
            f"log {log.name}: logs.{log.name} gives it queries, but query_scenarios ({named}) does not name {scenario}"
            ", so none would be read; name it there, or take the query out"
        )
    return (
        f"log {log.name}: column '{column}' holds queries, which are not read: query_scenarios ({named}) does not name "
        f"{scenario}; name it there if its impressions answer a query"
    )


def _event_log(name: str, kind: int, scenario: int, ids: tuple[str, ...], query: tuple[str, ...] = ()) -> EventLog:
    required = (*ids, "user_id", "item_id", "event_time", *query)
    return EventLog(name=name, kind=kind, scenario=scenario, key=ids[0], required=required)


def read_events(config: Config, folder: LogFolder, logs: Sequence[EventLog]) -> DataFrame:
    """All event rows as one frame, one row per log row, nothing dropped.

    Columns: log, kind, scenario, id, item_id, user_id, event_time, known_time, impression_id (that a click names),
    request_id, position, query, the context features under names that no other column has (`context_column`;
    categories and tags string, numbers double), `reason` (null: usable) and `row_json` (the row as it stood, where
    it is not).

    Raises:
        DataCheckError: a log or column is missing or has the wrong type; nothing has been computed yet.
    """
    features = config.features
    context = (*features.context_categories, *features.context_numbers, *context_tags(features.lists))
    optional = {KIND_IMPRESSION: ("position", "ingest_time", *context)}
    frames = []
    for log in logs:
        columns = [*log.required, *optional.get(log.kind, ["ingest_time"])]
        # The report on an experiment reads the bucket, and an unread query has lines of its own.
        of_others = [config.online.bucket_column, "query"] if log.kind == KIND_IMPRESSION else []
        folder.note_unread(log.name, [*columns, *of_others])
        frames.append((log, *folder.read(log.name, columns)))
    contexts = _context_columns(config, [raw for log, raw, _ in frames if log.kind == KIND_IMPRESSION])
    result: DataFrame | None = None
    for log, raw, kind in frames:
        if log.kind == KIND_IMPRESSION and config.scenarios[log.scenario] not in config.query_scenarios:
            _check_unread_query(folder, config, log, raw)
        frame = _event_rows(log, raw, text=kind in TEXT_FORMATS, contexts=contexts, config=config)
        result = frame if result is None else result.unionByName(frame)
    assert result is not None  # a configuration has at least one scenario
    return result


def read_features(
    folder: LogFolder,
    log: str,
    key: str,
    categories: Sequence[str],
    numbers: Sequence[str],
    lists: Sequence[ListFeature] = (),
    vectors: Sequence[VectorFeature] = (),
) -> DataFrame:
    """The `users` or `items` table: its key, category columns as strings, number columns as doubles, and REASON.

    The texts of tags and terms are in columns of their own (`texts_column`); vectors are lists of floats, as long as
    they should be.

    Rows of one key are all kept.

    Raises:
        DataCheckError: the table or a column that the configuration names is missing or has the wrong type.
    """
    sources = [name for feature in lists for name in feature.sources]
    columns = list(dict.fromkeys((key, *categories, *numbers, *sources, *(vector.name for vector in vectors))))
    folder.note_unread(log, columns)
    raw, _ = folder.read(log, columns)
    check_columns(log, names_of(raw), columns)
    _check_numbers(folder, raw, log, numbers)
    ident = _text(raw, log, key)
    tests = [*_unreadable(raw, columns), *_imprecise(raw, (*categories, *sources)), (ident.isNull(), f"null_{key}")]
    read = {vector.name: _vector(raw, log, vector.name) for vector in vectors}
    _check_vectors(raw.select(ident.alias(key), *(found.alias(n) for n, found in read.items())), log, key, vectors)
    return raw.select(
        first_reason(tests).alias(REASON),
        ident.alias(key),
        *(_category(raw, log, name).alias(name) for name in categories),
        *(_number(raw, log, name).alias(name) for name in numbers),
        *(
            F.array(*(_list_text(raw, log, name, feature) for name in feature.sources)).alias(
                texts_column(feature.name)
            )
            for feature in lists
        ),
        *(found.cast("array<float>").alias(name) for name, found in read.items()),
    )


def context_tags(lists: Sequence[ListFeature]) -> dict[str, ListFeature]:
    """Column of the impressions logs -> tags of the query or the context."""
    return {feature.name: feature for feature in lists if feature.key == feature.name}


def _check_numbers(folder: LogFolder, raw: DataFrame, log: str, numbers: Sequence[str]) -> None:
    """A column of text that is mostly no number, such as 12,50, would become null without a word; some are told."""
    texts = [name for name in numbers if isinstance(raw.schema[name].dataType, T.StringType)]
    if not texts:
        return
    sums = []
    for name in texts:
        value = F.when(is_value(own(name)), own(name))
        unread = value.isNotNull() & plain_number(value).isNull()
        sums += [F.count(value), F.count_if(unread), F.min(F.when(unread, value))]
    found = raw.agg(*(column.alias(str(n)) for n, column in enumerate(sums))).collect()[0]
    for place, name in enumerate(texts):
        given, unreadable, example = found[3 * place : 3 * place + 3]
        line = f"log {log}: column '{name}' is no number in {unreadable:,} of {given:,} rows, such as {example!r}"
        way_out = f"; write 1234.50, or name it in logs.{log}.decimal_comma"
        if 2 * unreadable > given:
            raise DataCheckError(line + way_out)
        if unreadable:
            folder.note(f"{line}, and null there{way_out}")


def _vector(raw: DataFrame, log: str, column: str) -> Column:
    """A list of doubles; text holds JSON ("[0.1, -2]") or, where the mapping splits it, its numbers.

    Null where there is none; what is no list of numbers is a list with a null in it.
    """
    kind = raw.schema[column].dataType
    if isinstance(kind, T.NullType):
        return _null("array<double>")
    nothing_read = F.array(F.lit(None).cast("double"))
    if isinstance(kind, T.StringType):
        text = F.nullif(F.trim(own(column)), F.lit(""))
        read = F.from_json(text, "array<double>", {"allowNonNumericNumbers": "true"})
        return F.when(text.isNotNull(), F.coalesce(read, nothing_read))
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, (T.NumericType, T.StringType)):
        numbers = F.transform(own(column), lambda one: one.try_cast("double"))
        is_text = isinstance(kind.elementType, T.StringType)  # an empty text that was split is a list of it
        return F.when(F.trim(F.array_join(own(column), "")) != "", numbers) if is_text else numbers
    raise _wrong_type(log, column, kind, "a list of numbers, or text such as [0.1, -2]")


def _check_vectors(table: DataFrame, log: str, key: str, vectors: Sequence[VectorFeature]) -> None:
    """Refuse vectors of another length, or with something in them that is no finite number of 32 bits."""
    if not vectors:
        return
    sums = []
    for vector in vectors:
        value = F.col(f"`{vector.name}`")
        is_odd = F.exists(value, lambda one: one.isNull() | ~(F.abs(one.cast("float")) < F.lit(float("inf"))))
        for wrong in (F.size(value) != vector.length, is_odd):
            first = F.struct(F.coalesce(F.col(f"`{key}`"), F.lit("")).alias("key"), F.size(value).alias("size"))
            sums += [F.count_if(value.isNotNull() & wrong), F.min(F.when(value.isNotNull() & wrong, first))]
    found = table.agg(*(column.alias(str(n)) for n, column in enumerate(sums))).collect()[0]
    for place, vector in enumerate(vectors):
        num_long, a_long, num_odd, an_odd = found[4 * place : 4 * place + 4]
        where = f"log {log}: column '{vector.name}'"
        if num_odd:
            raise DataCheckError(
                f"{where} holds something that is no finite number in {num_odd:,} rows, such as {key} "
                f"{an_odd['key']!r}; write a list of numbers or [0.1, -2] as text, or leave it null"
            )
        if num_long:
            raise DataCheckError(
                f"{where} has another length than features.{vector.owner}_vectors.{vector.name} = {vector.length} in "
                f"{num_long:,} rows, such as {a_long['size']} in {key} {a_long['key']!r}; correct the length, or leave "
                "the vector null"
            )


def _event_rows(log: EventLog, raw: DataFrame, *, text: bool, contexts: dict[str, Read], config: Config) -> DataFrame:
    check_columns(log.name, names_of(raw), log.required)
    shown = log.kind == KIND_IMPRESSION
    has_query = shown and config.scenarios[log.scenario] in config.query_scenarios
    # Times first, then columns, then their tests: in one step the plan would hold the same terms many times.
    times = {name: _time(raw, log.name, name, text=text) for name in TIMES if name in raw.columns}
    timed = raw.select(*map(own, raw.columns), *(time.alias(_TIME + name) for name, time in times.items()))
    event_time = own(f"{_TIME}event_time")
    columns = {
        "id": _text(raw, log.name, log.key),
        "item_id": _text(raw, log.name, "item_id"),
        "user_id": _text(raw, log.name, "user_id"),
        "event_time": event_time,
        "known_time": F.coalesce(own(f"{_TIME}ingest_time"), event_time) if "ingest_time" in times else event_time,
        "impression_id": _text(raw, log.name, "impression_id") if log.kind == KIND_CLICK else _null("string"),
        "request_id": _text(raw, log.name, "request_id") if shown else _null("string"),
        "position": _position(raw, log.name) if shown else _null("int"),
        "query": _text(raw, log.name, "query") if has_query else _null("string"),
    }
    for name, read in contexts.items():
        there = shown and name in raw.columns
        nothing = _null("double" if read is _number else "string")
        columns[context_column(name)] = read(raw, log.name, name) if there else nothing
    # A mapped time that cannot be read is null: whether there was one stands beside it.
    given = {name: as_written(name) if as_written(name) in raw.columns else name for name in TIMES}
    texts = [log.key, "user_id", "item_id", "impression_id", "request_id", "query", *contexts]
    numbers = [name for name, read in contexts.items() if read is _number]
    values = [name for name, read in contexts.items() if read is not _number]
    rows = timed.select(
        *(column.alias(name) for name, column in columns.items()),
        first_reason([*_unreadable(raw, texts), *_imprecise(raw, values)]).alias(_UNREADABLE),
        *((_is_given(raw, given[name]) & own(_TIME + name).isNull()).alias(_UNPARSABLE + name) for name in times),
        first_reason(_unread_numbers(raw, log.name, numbers) if shown else []).alias(_UNREAD_NUMBER),
        F.struct(*map(own, raw.columns)).alias(_RAW),
    )
    tests = [
        (F.col("id").isNull(), f"null_{log.key}"),
        (F.col("user_id").isNull(), "null_user_id"),
        (F.col("item_id").isNull(), "null_item_id"),
        (F.col("event_time").isNull() & ~own(f"{_UNPARSABLE}event_time"), "null_event_time"),
        *((own(_UNPARSABLE + name), f"unparsable_{name}") for name in times),
    ]
    judged = rows.withColumn("reason", F.coalesce(own(_UNREADABLE), first_reason(tests), own(_UNREAD_NUMBER)))
    return judged.select(
        F.lit(log.name).alias("log"),
        F.lit(log.kind).alias("kind"),
        F.lit(log.scenario).alias("scenario"),
        *map(own, columns),
        "reason",
        F.when(F.col("reason").isNotNull(), F.to_json(own(_RAW))).alias("row_json"),
    )


def first_reason(tests: Sequence[tuple[Column, str]]) -> Column:
    """The reason of the first test that a row meets; null where it meets none."""
    return F.coalesce(*(F.when(test, F.lit(name)) for test, name in tests), _null("string"))


def _context_columns(config: Config, impressions: Sequence[DataFrame]) -> dict[str, Read]:
    """Context features -> how one is read. Each must be in one impressions log at least; elsewhere it is null."""
    wanted: dict[str, Read] = dict.fromkeys(config.features.context_categories, _category)
    wanted |= dict.fromkeys(config.features.context_numbers, _number)
    for name, feature in context_tags(config.features.lists).items():
        wanted[name] = functools.partial(_list_text, feature=feature)
    there = {column for frame in impressions for column in names_of(frame)}
    for name in wanted:
        if name not in there:
            raise DataCheckError(
                f"features: the context feature '{name}' is in no impressions log; "
                f"they have: {', '.join(sorted(there))}; correct the name or add the column"
            )
    return wanted


def _unreadable(raw: DataFrame, columns: Sequence[str]) -> list[tuple[Column, str]]:
    """Tests of what reading has broken, with the reason of each: a line of CSV or JSON, and texts.

    Texts that were decoded wrongly would be one value: all of them hold the same sign.
    """
    tests = [(own(MALFORMED).isNotNull(), "malformed_line")] if MALFORMED in raw.columns else []
    texts = [own(f.name) for f in raw.schema.fields if f.name in columns and isinstance(f.dataType, T.StringType)]
    broken = [F.coalesce(text.contains(REPLACEMENT) | ~F.is_valid_utf8(text), F.lit(False)) for text in texts]
    return [*tests, *((test, "undecodable_text") for test in broken)]


def _imprecise(raw: DataFrame, columns: Sequence[str]) -> list[tuple[Column, str]]:
    """Tests of the columns whose values are taken as they are: none may be an integer that a float has changed.

    In JSON lines a column of integers is one of floats as soon as one of them has a fraction.
    """
    fields = [(own(field.name), field.dataType) for field in raw.schema.fields if field.name in columns]
    tests = [_is_one_imprecise(value, kind) for value, kind in fields]
    return [(F.coalesce(test, F.lit(False)), "imprecise_value") for test in tests if test is not None]


def _is_one_imprecise(value: Column, kind: T.DataType) -> Column | None:
    if isinstance(kind, T.FloatType | T.DoubleType):
        return is_imprecise(value, kind)
    element = kind.elementType if isinstance(kind, T.ArrayType) else None
    if isinstance(element, T.FloatType | T.DoubleType):
        return F.exists(value, lambda one: is_imprecise(one, element))
    return None


def _null(kind: str) -> Column:
    return F.lit(None).cast(kind)


def _wrong_type(
    log: str, column: str, found: T.DataType, needed: str, way_out: str = "cast it in the log"
) -> DataCheckError:
    return DataCheckError(f"log {log}: column '{column}' is {found.simpleString()}, needed {needed}; {way_out}")


def _text(raw: DataFrame, log: str, column: str) -> Column:
    """An id as a string; integers are written out, an empty string is a null."""
    kind = raw.schema[column].dataType
    if isinstance(kind, T.NullType):
        return _null("string")
    is_unsigned = isinstance(kind, T.DecimalType) and kind.scale == 0  # what Spark makes of a 64-bit one
    if not is_unsigned and not isinstance(kind, (T.StringType, *_INTEGERS)):
        raise _wrong_type(log, column, kind, "string or integer")
    return F.nullif(own(column).cast("string"), F.lit(""))


def _time(raw: DataFrame, log: str, column: str, *, text: bool) -> Column:
    """An instant of the years 1 to 9999; text formats hold ISO 8601 (UTC where no zone is named). Null: unreadable."""
    kind = raw.schema[column].dataType
    if isinstance(kind, T.StringType) and text:
        read = iso_instant(own(column), "UTC")
    elif isinstance(kind, T.NullType | T.TimestampType | T.TimestampNTZType):
        read = own(column).cast("timestamp")
    else:
        formats = "'s', 'ms', 'us' or 'ns'" if isinstance(kind, T.NumericType) else "'iso' or a pattern of strptime"
        way_out = f"cast it in the log, or set logs.{log}.time_format to {formats}"
        raise _wrong_type(log, column, kind, "timestamp (UTC, microseconds)", way_out)
    micros = F.unix_micros(read)
    return F.when((micros >= FIRST_MICRO) & (micros < LAST_MICRO), read)


def _is_given(raw: DataFrame, column: str) -> Column:
    """Whether there is a time to read: a text of blanks alone is none, as everywhere."""
    given = own(column).isNotNull()
    return given & ~own(column).rlike(r"^\s*$") if isinstance(raw.schema[column].dataType, T.StringType) else given


def _position(raw: DataFrame, log: str) -> Column:
    if "position" not in raw.columns:
        return _null("int")
    kind = raw.schema["position"].dataType
    if not isinstance(kind, (T.StringType, T.NullType, T.NumericType)):
        raise _wrong_type(log, "position", kind, "integer")
    if isinstance(kind, T.NullType):
        return _null("int")
    # 3.0 is how pandas writes a 3 of a column in which some are missing.
    whole = own("position").cast("string").try_cast("decimal(38,9)") if kind == T.StringType() else own("position")
    return F.when(whole == F.floor(whole), whole.try_cast("int"))


def _unread_numbers(raw: DataFrame, log: str, numbers: Sequence[str]) -> list[tuple[Column, str]]:
    """Tests of a position and of numbers of the context that are given and cannot be read, with the reason of each.

    As null a price of 12,50 would be one of 0, and a position of "3rd" one that was never logged.
    """
    columns = [(name, _number(raw, log, name), "unparsable_number") for name in numbers if name in raw.columns]
    columns += [("position", _position(raw, log), "unparsable_position")] if "position" in raw.columns else []
    tests = []
    for name, read, reason in columns:
        kind, value = raw.schema[name].dataType, own(name)
        if isinstance(kind, T.StringType) or (name == "position" and isinstance(kind, T.NumericType)):
            tests.append((is_value(value.cast("string")) & read.isNull(), reason))
    return tests


def _category(raw: DataFrame, log: str, column: str) -> Column:
    kind = raw.schema[column].dataType
    if not isinstance(kind, (T.NullType, *_ATOMIC)):
        raise _wrong_type(log, column, kind, "a single value (string, number, boolean or date)")
    return F.nullif(as_text(own(column), kind), F.lit(""))


def _number(raw: DataFrame, log: str, column: str) -> Column:
    kind = raw.schema[column].dataType
    if not isinstance(kind, (T.NullType, T.StringType, T.BooleanType, T.NumericType)):
        raise _wrong_type(log, column, kind, "number")
    if isinstance(kind, T.StringType):
        return plain_number(own(column))
    read = own(column).try_cast("double")
    is_too_large = (F.abs(read) > F.lit(MAX_NUMBER)) & (F.abs(read) < F.lit(float("inf")))
    return F.when(~is_too_large, read)


def _list_text(raw: DataFrame, log: str, column: str, feature: ListFeature) -> Column:
    """The values of tags, or the text of terms, as one text: the elements of a list with SEPARATOR between them."""
    kind = raw.schema[column].dataType
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, (T.NullType, *_ATOMIC)):
        element, texts = kind.elementType, own(column).cast("array<string>")
        if isinstance(element, T.FloatType | T.DoubleType):
            texts = F.transform(own(column), lambda one: as_text(one, element))
        joined = F.nullif(F.array_join(texts, SEPARATOR), F.lit(""))
        # A separator says that these are terms as they are, of a list with one element too.
        return F.concat(F.lit(SEPARATOR), joined) if feature.vocabulary == TERM else joined
    is_text = isinstance(kind, T.StringType)
    if (feature.vocabulary == TERM and is_text) or isinstance(kind, T.NullType):
        return F.nullif(own(column).cast("string"), F.lit(""))
    if is_text:
        way_out = f'set logs.{log}.split = {{ {column} = "|" }}, or what stands between its values'
        raise _wrong_type(log, column, kind, "a list of single values", way_out)
    needed = "text or a list of single values" if feature.vocabulary == TERM else "a list of single values"
    raise _wrong_type(log, column, kind, needed)
