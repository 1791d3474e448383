"""The Delta tables of a lake: schemas, creation, checks, and writes that replace whole dates at once."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delta import exceptions as delta_exceptions
from delta.tables import DeltaTable
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl.checks import DataCheckError
from etl.jvm import table_properties
from usr_ray.config import Config, first_difference
from usr_ray.schema import (
    ALL_LABELS,
    CONFIG_PROPERTY,
    COUNTERS,
    FEATURE_SPEC_PROPERTY,
    ITEM_FEATURES,
    LABEL_ORDER,
    NULLS_PROPERTY,
    PARTITION_COLUMN,
    REJECTS,
    SAMPLES,
    STATE,
    VECTOR_TABLES,
    VOCABULARIES,
    FeatureSpec,
    cold_column,
    index_column,
)

TABLES = (SAMPLES, REJECTS, VOCABULARIES, ITEM_FEATURES, *VECTOR_TABLES.values(), COUNTERS, STATE)
"""Delta tables of a lake."""

SWITCHED_OFF = {"delta.enableDeletionVectors": "false", "delta.columnMapping.mode": "none"}
"""What must stay off in every table: readers outside of Spark would read such tables wrong without an error."""
TABLE_PROPERTIES = SWITCHED_OFF | {
    # Time travel, and a VACUUM that knows when a file left the table, reach back this far.
    "delta.logRetentionDuration": "interval 60 days",
    "delta.deletedFileRetentionDuration": "interval 60 days",
}
"""Properties of every table of a lake."""
STATISTICS = {
    SAMPLES: "event_time,scenario_index",
    REJECTS: "log",
    VOCABULARIES: "id",
    ITEM_FEATURES: "item_id_index",
    **{table: f"{owner}_id_index" for owner, table in VECTOR_TABLES.items()},
    COUNTERS: "date",
    STATE: "part",
}
"""Columns whose least and greatest values Delta keeps for each file: what readers and builds filter by."""
_DISTINCT = ("impression_id", "request_id", "event_time", "click_time", "order_time", "request_key")
_NEW_LAKE = "or build into a new --lake"

_CONFLICTS = (  # in Java they have a class in common, in Python they have not
    delta_exceptions.DeltaConcurrentModificationException,
    delta_exceptions.ConcurrentWriteException,
    delta_exceptions.MetadataChangedException,
    delta_exceptions.ProtocolChangedException,
    delta_exceptions.ConcurrentAppendException,
    delta_exceptions.ConcurrentDeleteReadException,
    delta_exceptions.ConcurrentDeleteDeleteException,
    delta_exceptions.ConcurrentTransactionException,
)
_BROKEN_RULE = re.compile(
    r"CHECK constraint (?P<check>\w+) .* violated by row|NOT NULL constraint violated for column: (?P<column>\w+)"
)


def plain_schema(kinds: Mapping[str, T.DataType], *, nullable: Sequence[str] = ()) -> T.StructType:
    """The schema of a table whose columns, but for the `nullable` ones, must have values."""
    return T.StructType([T.StructField(name, kind, name in nullable) for name, kind in kinds.items()])


_TEXT, _DATE, _COUNT = T.StringType(), T.DateType(), T.LongType()
REJECTS_SCHEMA = plain_schema({"log": _TEXT, "reason": _TEXT, "row": _TEXT, "date": _DATE}, nullable=["date"])
VOCABULARIES_SCHEMA = plain_schema({"feature": _TEXT, "value": _TEXT, "id": _COUNT, "count": _COUNT})
COUNTERS_SCHEMA = plain_schema(
    {"name": _TEXT, "key": _TEXT, "date": _DATE, "event_date": _DATE, "scenario": _TEXT}
    | dict.fromkeys(("impressions", "clicks", "orders"), _COUNT)
)


@dataclass(frozen=True, slots=True)
class Lake:
    """Paths of one lake."""

    root: str

    def path(self, table: str) -> str:
        """Path of one of its tables; whole, as Delta takes a relative one for a name in the catalogue."""
        root = self.root if "://" in self.root else os.path.abspath(self.root)
        return f"{root.rstrip('/')}/{table}"

    def has(self, spark: SparkSession, table: str) -> bool:
        """True where the table has been created."""
        return DeltaTable.isDeltaTable(spark, self.path(table))


def samples_schema(spec: FeatureSpec) -> T.StructType:
    """Every column of the samples table, in order (docs/tables.md)."""

    def column(name: str, kind: T.DataType, nullable: bool = False) -> T.StructField:
        return T.StructField(name, kind, nullable)

    text, instant, number = T.StringType(), T.TimestampType(), T.LongType()
    ids, ages = T.ArrayType(number, containsNull=False), T.ArrayType(T.FloatType(), containsNull=False)
    fields = [
        column("impression_id", text),
        column("request_id", text, nullable=True),
        column("user_id", text),
        column("item_id", text),
        column("query", text, nullable=True),
        column("scenario", text),
        column("event_time", instant),
        column(PARTITION_COLUMN, T.DateType()),
        column("position", T.IntegerType(), nullable=True),
        *(column(name, T.FloatType()) for name in ALL_LABELS),
        column("is_mature", T.BooleanType()),
        column("click_time", instant, nullable=True),
        column("order_time", instant, nullable=True),
        column("user_key", number),
        column("request_key", number),
        column(index_column("scenario"), number),
        *(column(feature.column, number) for feature in spec.sparse),
        *(column(feature.column, T.FloatType()) for feature in spec.dense),
        *(column(feature.column, ids) for feature in spec.lists),
    ]
    for names in spec.histories:
        fields += [column(names.item_ids, ids), column(names.actions, ids), column(names.ages_s, ages)]
        fields += [column(names.query_ids, ids)] if names.query_ids else []
    return T.StructType(fields)


def item_features_schema(config: Config) -> T.StructType:
    """Encoded item id, and the encoded id of each of its categories."""
    names = ("item_id", *config.features.item_categories)
    return plain_schema(dict.fromkeys(map(index_column, names), T.LongType()))


def vectors_schema(config: Config, owner: str) -> T.StructType:
    """Encoded id of a user or item, and its vectors: the bytes of float16 numbers, little-endian; null: it has none.

    Last, where a vocabulary gives the ids: true of one that it has for its vector alone, else null.
    """
    key, names = f"{owner}_id", getattr(config.features, f"{owner}_vectors")
    kinds = {index_column(key): T.LongType(), **dict.fromkeys(names, T.BinaryType())}
    if config.vocabulary.kind == "fit":
        kinds[cold_column(key)] = T.BooleanType()
    return plain_schema(kinds, nullable=[*kinds][1:])


def label_constraints() -> dict[str, str]:
    """CHECK constraints of the samples table: name -> condition."""
    ranges = {f"{name}_is_0_or_1": f"{name} IN (0.0, 1.0)" for name in ALL_LABELS}
    return ranges | {f"{low}_le_{high}": f"{low} <= {high}" for low, high in LABEL_ORDER}


def list_constraints(spec: FeatureSpec) -> dict[str, str]:
    """CHECK constraints of tags and terms, name -> condition: not too many, and none of them padding."""
    return {
        f"list_{number}_fits": (
            f"size(`{feature.column}`) <= {feature.length} AND NOT array_contains(`{feature.column}`, 0)"
        )
        for number, feature in enumerate(spec.lists)
    }


def null_property(nulls: Mapping[str, Sequence[str]]) -> str:
    """schema.NULLS_PROPERTY: JSON in which no quote ends a text of SQL, and no dollar begins a variable of Spark's."""
    text = json.dumps({name: list(values) for name, values in nulls.items()}, sort_keys=True)
    return text.replace("'", "\\u0027").replace("$", "\\u0024")


def prepare_samples(
    spark: SparkSession, lake: Lake, spec: FeatureSpec, config: Config, versions: Mapping[str, int | str]
) -> None:
    """Create the samples table, or update its feature spec: before data is committed that needs it.

    `versions` are those of the tables by encoded id that belong to its rows, by the property that says so; other
    properties may be among them.
    """
    path = lake.path(SAMPLES)
    properties = {FEATURE_SPEC_PROPERTY: spec.to_json()} | {name: str(found) for name, found in versions.items()}
    nulls = {name: log.null_values for name, log in config.logs.items() if log.null_values}
    if nulls:
        properties[NULLS_PROPERTY] = null_property(nulls)
    if not lake.has(spark, SAMPLES):
        properties[CONFIG_PROPERTY] = json.dumps(config.row_meaning(), sort_keys=True)
        rules = label_constraints() | list_constraints(spec)
        properties |= {f"delta.constraints.{name}": rule for name, rule in rules.items()}
        create_table(spark, lake, SAMPLES, samples_schema(spec), PARTITION_COLUMN, properties)
        return
    there = table_properties(spark, path)
    if NULLS_PROPERTY in there:
        properties[NULLS_PROPERTY] = null_property(nulls)
    if any(there.get(name) != value for name, value in properties.items()):
        # The spec is JSON of names checked by the configuration; quotes are doubled for SQL all the same.
        escaped = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in properties.items()}
        pairs = ", ".join(f"'{name}' = '{value}'" for name, value in escaped.items())
        spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ({pairs})")


def sample_dates(spark: SparkSession, lake: Lake) -> set[str]:
    """ISO dates that the samples table holds rows of; none where there is no table."""
    if not lake.has(spark, SAMPLES):
        return set()
    rows = spark.read.format("delta").load(lake.path(SAMPLES)).select(PARTITION_COLUMN).distinct().collect()
    return {row[0].isoformat() for row in rows}


def samples_version(spark: SparkSession, lake: Lake, name: str) -> int | None:
    """The version of a table by encoded id that belongs to the newest samples; None where they name none.

    `name` is the property of the samples that says so.
    """
    if not lake.has(spark, SAMPLES):
        return None
    version = table_properties(spark, lake.path(SAMPLES)).get(name)
    return None if version is None else int(version)


def replace_dates(frame: DataFrame, path: str, condition: str, metadata: str = "") -> None:
    """Replace the rows that meet `condition` by `frame`, in one commit; nothing else of the table changes.

    Delta checks every row against the table's constraints, and that nobody has changed the same rows meanwhile.

    Args:
        condition: SQL on the table's columns.
        metadata: text that the commit carries (`userMetadata` in the table's history).

    Raises:
        DataCheckError: another job has changed these rows since, or a row breaks a rule of the table. Nothing has
            changed then.
    """
    without_dictionaries(frame)
    writer = frame.write.format("delta").mode("overwrite").option("replaceWhere", condition)
    if metadata:
        writer = writer.option("userMetadata", metadata)
    try:
        writer.save(path)
    except _CONFLICTS as error:
        raise DataCheckError(
            f"{path}: another job has changed this table since this build began ({type(error).__name__}); "
            "nothing of it was overwritten: let the other one end, and build again"
        ) from error
    except PySparkException as error:
        broken = _BROKEN_RULE.search(str(error))
        if broken is None:
            raise
        rule = broken["check"] or f"{broken['column']} IS NOT NULL"
        raise DataCheckError(
            f"{path}: a row breaks the table's rule {rule}; nothing of it was overwritten: drop the rule if it is one "
            "of yours (ALTER TABLE ... DROP CONSTRAINT), else it is a fault of the ETL: please report this"
        ) from error


def without_dictionaries(frame: DataFrame) -> None:
    """Tell Parquet writers of this session not to build dictionaries of columns that hardly hold a value twice.

    They are a quarter of the writer's time and, given up at a megabyte, a third of the bytes (docs/scale.md).
    """
    for column in frame.schema:
        if column.name in _DISTINCT or column.name.endswith("_history_ages_s"):
            place = f"{column.name}.list.element" if isinstance(column.dataType, T.ArrayType) else column.name
            frame.sparkSession.conf.set(f"parquet.enable.dictionary#{place}", "false")


def row_hash(names: Sequence[str]) -> Column:
    """A hash of these columns of a row; a null, which does not change xxhash64, is told by the column's place."""
    return F.xxhash64(*(F.struct(F.lit(n), F.col(f"`{name}`")) for n, name in enumerate(names)))


def content_hash(frame: DataFrame) -> str:
    """Number of rows and a hash of them all, columns in the order given; the order of the rows does not matter."""
    row = frame.agg(F.count("*").alias("rows"), F.bit_xor(row_hash(frame.columns)).alias("hash")).collect()[0]
    return f"{row['rows']} {row['hash']}"


def dates_condition(column: str, first: dt.date, last: dt.date) -> str:
    """SQL condition: the column's date is in [first, last]."""
    return f"({column} >= DATE'{first}' AND {column} <= DATE'{last}')"


def any_date_condition(column: str, dates: Sequence[dt.date]) -> str:
    """SQL condition: the column's date is one of the dates (one at least); dates in a row make one range."""
    spans: list[tuple[dt.date, dt.date]] = []
    for date in sorted(dates):
        if spans and date - spans[-1][1] == dt.timedelta(days=1):
            spans[-1] = (spans[-1][0], date)
        else:
            spans.append((date, date))
    return f"({' OR '.join(dates_condition(column, *span) for span in spans)})"


def write_rejects(spark: SparkSession, lake: Lake, rejects: DataFrame, condition: str) -> None:
    """Replace the rejects that meet `condition`; creates the table."""
    path = lake.path(REJECTS)
    if not lake.has(spark, REJECTS):
        create_table(spark, lake, REJECTS, REJECTS_SCHEMA, "date")
    replace_dates(rejects, path, condition)


def append_vocabularies(spark: SparkSession, lake: Lake, entries: DataFrame) -> None:
    """Append ids; creates the table."""
    path = lake.path(VOCABULARIES)
    if not lake.has(spark, VOCABULARIES):
        create_table(spark, lake, VOCABULARIES, VOCABULARIES_SCHEMA, "feature")
    entries.write.format("delta").mode("append").save(path)


def create_table(
    spark: SparkSession,
    lake: Lake,
    table: str,
    schema: T.StructType,
    partition: str | None = None,
    properties: Mapping[str, str] | None = None,
) -> None:
    """Create one of a lake's tables, where there is none yet."""
    builder = DeltaTable.createIfNotExists(spark).location(lake.path(table))
    builder = builder.addColumns(schema)
    if partition:
        builder = builder.partitionedBy(partition)
    every = {**TABLE_PROPERTIES, "delta.dataSkippingStatsColumns": STATISTICS[table], **(properties or {})}
    for key, value in every.items():
        builder = builder.property(key, value)
    builder.execute()


def check_tables(spark: SparkSession, lake: Lake, config: Config, spec: FeatureSpec) -> None:
    """Every table that is there can take rows of this configuration and this version of the code.

    Called before a build reads or writes anything. Nothing is ever merged into another schema.

    Args:
        spec: only the columns that it names matter, not the sizes of the vocabularies.

    Raises:
        DataCheckError: naming the first table and property, configuration key, column or constraint that differs.
    """
    schemas = {
        SAMPLES: samples_schema(spec),
        REJECTS: REJECTS_SCHEMA,
        VOCABULARIES: VOCABULARIES_SCHEMA,
        ITEM_FEATURES: item_features_schema(config),
        **{table: vectors_schema(config, owner) for owner, table in VECTOR_TABLES.items()},
        COUNTERS: COUNTERS_SCHEMA,
    }
    for table, schema in schemas.items():
        if not lake.has(spark, table):
            continue
        path = lake.path(table)
        properties = table_properties(spark, path)
        _check_switches(path, properties)
        if table == SAMPLES:
            check_meaning(path, properties, config)
        _check_schema(path, spark.read.format("delta").load(path).schema, schema)
        if table == SAMPLES:
            _check_constraints(path, properties, label_constraints() | list_constraints(spec))


def _check_switches(path: str, properties: Mapping[str, str]) -> None:
    deletion_vectors, column_mapping = SWITCHED_OFF
    if properties.get(deletion_vectors, "false") != SWITCHED_OFF[deletion_vectors]:
        raise DataCheckError(
            f"{path}: deletion vectors have been switched on, and trainers would read deleted rows; run ALTER TABLE "
            f"delta.`{path}` SET TBLPROPERTIES ('{deletion_vectors}' = 'false') and "
            f"REORG TABLE delta.`{path}` APPLY (PURGE)"
        )
    mode = properties.get(column_mapping, "none")
    if mode != SWITCHED_OFF[column_mapping]:
        raise DataCheckError(
            f"{path}: {column_mapping} has been set to '{mode}', and many readers would read nulls; RESTORE the table "
            f"to the version before, {_NEW_LAKE}"
        )


def check_meaning(path: str, properties: Mapping[str, str], config: Config) -> None:
    """DataCheckError where a samples table of these properties was built with another row meaning."""
    if CONFIG_PROPERTY not in properties:
        raise DataCheckError(
            f"{path}: was not made by jobs/build_samples.py (it has no property {CONFIG_PROPERTY}); move that table "
            f"away, {_NEW_LAKE}"
        )
    saved, meaning = json.loads(properties[CONFIG_PROPERTY]), config.row_meaning()
    if ("counters" in saved) != ("counters" in meaning):  # else named by the first key of many, such as the prior
        raise DataCheckError(
            f"{path}: built with{'' if 'counters' in saved else 'out'} counters, the configuration has "
            f"{'some' if 'counters' in meaning else 'none'}; rows of both would mix: "
            f"{'leave them out' if 'counters' in meaning else 'take the old [counters]'} {_NEW_LAKE}"
        )
    if found := first_difference(saved, meaning):
        key, before, now = found
        raise DataCheckError(
            f"{path}: built with {config.key_of(key)} = {json.dumps(before)}, the configuration has "
            f"{json.dumps(now)}; rows of both would mix: take the old value {_NEW_LAKE}"
        )


def _check_schema(path: str, found: T.StructType, wanted: T.StructType) -> None:
    there, needed = _columns(found), _columns(wanted)
    for name in sorted(there.keys() | needed.keys()):
        if there.get(name) != needed.get(name):
            raise DataCheckError(
                f"{path}: column '{name}' is {there.get(name, 'missing')}, this version of the ETL writes "
                f"{needed.get(name, 'no such column')}; go on with the version that built the table, RESTORE it to the "
                f"version before the change, {_NEW_LAKE}"
            )


def _check_constraints(path: str, properties: Mapping[str, str], rules: Mapping[str, str]) -> None:
    for name, rule in rules.items():
        found = properties.get(f"delta.constraints.{name}")
        if found != rule:
            drop = f"ALTER TABLE delta.`{path}` DROP CONSTRAINT {name} and " if found is not None else ""
            raise DataCheckError(
                f"{path}: the CHECK constraint {name} is {found or 'missing'}, needed {rule}; run {drop}ALTER TABLE "
                f"delta.`{path}` ADD CONSTRAINT {name} CHECK ({rule})"
            )


def _columns(schema: T.StructType) -> dict[str, str]:
    return {field.name: _kind(field) for field in schema}


def _kind(field: Any) -> str:
    return f"{field.dataType.simpleString()}{'' if field.nullable else ' not null'}"
