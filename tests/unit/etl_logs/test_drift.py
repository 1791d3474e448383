"""Columns of a Parquet schema as text, as Parquet's Java library prints it."""

from __future__ import annotations

import pytest

from etl.logs.drift import column_kinds

pytestmark = pytest.mark.unit

SCHEMA = """message spark_schema {
  optional binary Item_Id (STRING);
  required int64 event_time (TIMESTAMP(MICROS,true));
  optional int96 ingest_time;
  optional int64 seen (TIMESTAMP(NANOS,true));
  optional int32 position;
  optional int32 small (INTEGER(8,true)) = 4;
  optional fixed_len_byte_array(5) price (DECIMAL(10,2));
  optional group tags (LIST) {
    repeated group list {
      optional binary element (STRING);
    }
  }
}
"""


def test_top_level_columns_have_one_word_for_their_type() -> None:
    assert column_kinds(SCHEMA) == {
        "item_id": "string",
        "event_time": "timestamp",
        "ingest_time": "timestamp",
        "position": "int32",
        "small": "INTEGER(8,true)",
        "price": "DECIMAL(10,2)",
        "tags": "group",
        "seen": "timestamp in nanoseconds",
    }
