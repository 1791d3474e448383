"""docs/tables.md says what the code writes: columns, types, null rules, reasons of rejects, keys of the reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pyspark.sql import types as T

from etl.attribution import REASONS
from etl.tables import REJECTS_SCHEMA, VOCABULARIES_SCHEMA, label_constraints, samples_schema
from usr_ray.schema import DenseFeature, FeatureSpec, SparseFeature, index_column, scaled_column

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tables.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def documented(title: str) -> dict[str, tuple[str, bool]]:
    """column -> (type, nullable) as the page's table says."""
    table = section(title).split("\n| column | type | null | meaning |\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|", table, re.MULTILINE)
    return {name: (kind.strip(), null.strip() != "never") for name, kind, null in rows}


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
        scenarios=("<scenario>",), query_scenarios=("<scenario>",), history_length=5, label_delay_us=0,
        sparse=tuple(sparse(*pair) for pair in (*names, ("<feature>", "item"))),
        dense=(DenseFeature(name="<feature>", column=scaled_column("<feature>"), owner="item"),),
    )  # fmt: skip


def test_samples_columns_types_and_nulls_are_documented() -> None:
    assert documented("samples") == written(samples_schema(spec()))


@pytest.mark.parametrize(("title", "schema"), [("vocabularies", VOCABULARIES_SCHEMA), ("rejects", REJECTS_SCHEMA)])
def test_the_other_tables_are_documented(title: str, schema: T.StructType) -> None:
    assert documented(title) == written(schema)


def test_every_reason_of_a_reject_is_documented() -> None:
    assert {reason for reason in REASONS if f"`{reason}`" not in section("rejects")} == set()


def test_every_constraint_is_said_in_words() -> None:
    text = section("samples")
    for name in label_constraints():
        low, _, high = name.partition("_le_")
        assert re.search(rf"{low} <= (\w+ <= )?{high}", text) if high else "each label is 0 or 1" in text, name
