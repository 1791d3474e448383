"""Before a build reads or writes anything: the lake's tables are those that this code makes, and their guards are up.

Nothing is ever merged into another schema. Each difference is one line with its way out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import types as T

from etl.checks import DataCheckError
from etl.features.vocabulary import feature_spec
from etl.lake.tables import (
    CONFIG_PROPERTY,
    REJECTS_SCHEMA,
    SWITCHED_OFF,
    VOCABULARIES_SCHEMA,
    Lake,
    label_constraints,
    row_meaning,
    samples_schema,
    table_properties,
)
from usr_ray.config import Config, first_difference
from usr_ray.schema import REJECTS, SAMPLES, VOCABULARIES

_NEW_LAKE = "or build into a new --lake"


def check_tables(spark: SparkSession, lake: Lake, config: Config) -> None:
    """Every table that is there can take rows of this configuration and this version of the code.

    Raises:
        DataCheckError: naming the first table and property, configuration key, column or constraint that differs.
    """
    schemas = {
        SAMPLES: samples_schema(feature_spec(config, {})),
        REJECTS: REJECTS_SCHEMA,
        VOCABULARIES: VOCABULARIES_SCHEMA,
    }
    for table, schema in schemas.items():
        if not lake.has(spark, table):
            continue
        path = lake.path(table)
        properties = table_properties(spark, path)
        _check_switches(path, properties)
        if table == SAMPLES:
            _check_meaning(path, properties, config)
        _check_schema(path, spark.read.format("delta").load(path).schema, schema)
        if table == SAMPLES:
            _check_constraints(path, properties)


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


def _check_meaning(path: str, properties: Mapping[str, str], config: Config) -> None:
    if CONFIG_PROPERTY not in properties:
        raise DataCheckError(
            f"{path}: was not made by jobs/build_samples.py (it has no property {CONFIG_PROPERTY}); move that table "
            f"away, {_NEW_LAKE}"
        )
    if found := first_difference(json.loads(properties[CONFIG_PROPERTY]), row_meaning(config)):
        key, before, now = found
        raise DataCheckError(
            f"{path}: built with {key} = {json.dumps(before)}, the configuration has {json.dumps(now)}; rows of both "
            f"would mix: take the old value {_NEW_LAKE}"
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


def _check_constraints(path: str, properties: Mapping[str, str]) -> None:
    for name, rule in label_constraints().items():
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
