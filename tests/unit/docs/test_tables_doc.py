"""docs/tables.md says what the code writes: columns, types, null rules, reasons of rejects, keys of the reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pyspark.sql import types as T

from etl.build.account import Account
from etl.build.report import SampleCounts, date_report
from etl.build.state import STATE_SCHEMA
from etl.kernel.attribution import REASONS
from etl.kernel.user_pass import OVER_LIMIT
from etl.lake.tables import (
    COUNTERS_SCHEMA,
    REJECTS_SCHEMA,
    STATISTICS,
    TABLE_PROPERTIES,
    TABLES,
    VOCABULARIES_SCHEMA,
    item_features_schema,
    label_constraints,
    list_constraints,
    samples_schema,
    vectors_schema,
)
from etl.session import MAX_FILE_BYTES, MIN_FILE_BYTES, ROW_GROUP_ROWS
from usr_ray.config import load_config
from usr_ray.config.etl import REJECT_REASONS
from usr_ray.schema import (
    CONFIG_PROPERTY,
    FEATURE_SPEC_PROPERTY,
    ITEM_FEATURES_PROPERTY,
    VECTORS_PROPERTIES,
    DenseFeature,
    FeatureSpec,
    ListFeature,
    SparseFeature,
    index_column,
    list_column,
    scaled_column,
)

pytestmark = pytest.mark.unit

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE = (DOCS / "tables.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def documented(title: str) -> dict[str, tuple[str, bool]]:
    """column -> (type, nullable) as the page's table says."""
    table = section(title).split("\n| column | type | null | meaning |\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|", table, re.MULTILINE)
    return {name: (kind.strip(), null.strip() != "never") for name, kind, null in rows}


def documented_keys(title: str) -> set[str]:
    """Keys of a JSON file as the page's table says."""
    table = section(title).split("\n| key | meaning |\n")[1].split("\n\n")[0]
    return {
        key for keys in re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", keys)
    }


def written(schema: T.StructType) -> dict[str, tuple[str, bool]]:
    return {field.name: (field.dataType.simpleString(), field.nullable) for field in schema}


def spec() -> FeatureSpec:
    def sparse(name: str, owner: str) -> SparseFeature:
        return SparseFeature(name=name, column=index_column(name), num_embeddings=9, owner=owner)

    names = (
        ("user_id", "user"),
        ("item_id", "item"),
        ("query", "query"),
        ("event_hour", "context"),
        ("<feature>", "item"),
    )
    return FeatureSpec(
        scenarios=("<scenario>",),
        query_scenarios=("<scenario>",),
        history_length=5,
        label_delay_us=0,
        sparse=tuple(sparse(*pair) for pair in (*names, ("<feature>", "item"))),
        dense=tuple(
            DenseFeature(name=column, column=column, owner="item")
            for column in (scaled_column("<feature>"), "counter_<name>_<window>_<event>")
        ),
        lists=(
            ListFeature(
                name="<feature>",
                column=list_column("<feature>"),
                table="<feature>",
                num_embeddings=9,
                owner="item",
                length=16,
                sources=("<feature>",),
            ),
        ),
    )


def test_samples_columns_types_and_nulls_are_documented() -> None:
    assert documented("samples") == written(samples_schema(spec()))


@pytest.mark.parametrize(
    ("title", "schema"),
    [
        ("vocabularies", VOCABULARIES_SCHEMA),
        ("item_features", item_features_schema(load_config(None, ('features.item_categories=["<category>"]',)))),
        (
            "user_vectors, item_vectors",
            vectors_schema(load_config(None, ("features.item_vectors={'<vector>' = 2}",)), "item"),
        ),
        ("counters", COUNTERS_SCHEMA),
        ("rejects", REJECTS_SCHEMA),
        ("state", STATE_SCHEMA),
    ],
)
def test_the_other_tables_are_documented(title: str, schema: T.StructType) -> None:
    assert documented(title) == written(schema)


def test_every_reason_of_a_reject_is_documented() -> None:
    """Those that the configuration takes too."""
    table = section("rejects").split("\n| reason | of | meaning |\n")[1].split("\n\n")[0]
    found = re.findall(r"`([a-z_]+)`", " ".join(line.split(" | ")[0] for line in table.splitlines()))
    assert sorted(found) == sorted((*REJECT_REASONS, OVER_LIMIT))
    assert set(REASONS) <= set(found)


def test_the_constraints_are_documented_rule_by_rule() -> None:
    table = section("samples").split("\n| constraint | rule |\n")[1].split("\n\n")[0]
    assert dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", table, re.MULTILINE)) == label_constraints()
    ((name, rule),) = list_constraints(spec()).items()
    shown = (name.replace("0", "<n>"), rule.replace("<= 16", "<= <most>").replace("`", ""))
    assert re.findall(r"^\| `(list_[^`]+)` \| ``([^`]+)`` \|$", table, re.MULTILINE) == [shown]


def test_the_properties_of_the_tables_are_documented() -> None:
    table = PAGE.split("\n| property | value | why |\n")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", table, re.MULTILINE))
    statistics = "; ".join(f"{table}: `{columns}`" for table, columns in STATISTICS.items())
    wanted = {name: f"`{value}`" for name, value in TABLE_PROPERTIES.items()}
    assert rows == wanted | {"delta.dataSkippingStatsColumns": statistics}
    assert set(STATISTICS) == set(TABLES)
    for name in (FEATURE_SPEC_PROPERTY, CONFIG_PROPERTY, ITEM_FEATURES_PROPERTY, *VECTORS_PROPERTIES.values()):
        assert f"`{name}`" in section("samples")


def test_the_sizes_on_the_disk_are_documented() -> None:
    assert f"row groups of {ROW_GROUP_ROWS:,} rows" in PAGE
    assert f"below {MIN_FILE_BYTES >> 20} MB into files of up to {MAX_FILE_BYTES >> 20} MB" in " ".join(PAGE.split())


def test_the_keys_of_a_report_are_documented() -> None:
    config = load_config(None, ())
    report = date_report(
        "2026-01-01", account=Account(), counts=SampleCounts({}, {}, {}), config=config, spec=spec(), build={}
    )
    about_the_build = {"watermark", "table_version", "fingerprint", "cut_values"}
    assert documented_keys("reports") == set(report) | about_the_build
