"""What types hold the values of two files, names that are the same, hidden and literal paths. No JVM is started."""

from __future__ import annotations

import itertools

import pytest
from pyspark.sql import types as T

from etl.logs.files import _partition_keys
from etl.logs.formats import encoding_of, nanosecond_columns, plain, wider
from etl.logs.names import format_of
from etl.session import literal_path

pytestmark = pytest.mark.unit

SCHEMA = """message spark_schema {
  optional binary Item_Id (STRING);
  required int64 event_time (TIMESTAMP(MICROS,true));
  optional int96 ingest_time;
  optional int64 paid at (TIMESTAMP(NANOS,true));
  optional int64 local (TIMESTAMP(NANOS,false)) = 4;
  optional group tags (LIST) {
    repeated group list {
      optional int64 element (TIMESTAMP(NANOS,true));
    }
  }
}
"""


def test_nanoseconds_are_found_at_the_top_level_whatever_their_name() -> None:
    assert nanosecond_columns(SCHEMA) == {"paid at": T.TimestampType(), "local": T.TimestampNTZType()}


def test_utf_16_is_known_by_its_mark_or_its_zeros() -> None:
    heads = {name: "id,name\n".encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-8", "latin-1")}
    assert [encoding_of(head) for head in heads.values()] == ["UTF-16", "UTF-16LE", "UTF-16BE", "", ""]


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (T.IntegerType(), T.LongType(), T.LongType()),
        (T.ByteType(), T.ShortType(), T.ShortType()),
        (T.FloatType(), T.DoubleType(), T.DoubleType()),
        (T.IntegerType(), T.DoubleType(), T.DoubleType()),
        (T.NullType(), T.StringType(), T.StringType()),
        (T.DecimalType(20, 0), T.LongType(), T.DecimalType(20, 0)),
        (T.LongType(), T.DoubleType(), None),  # 2**53 + 1 is no double
        (T.IntegerType(), T.FloatType(), None),
        (T.StringType(), T.LongType(), None),
        (T.TimestampType(), T.TimestampNTZType(), None),
        (T.DecimalType(10, 2), T.LongType(), None),
    ],
)
def test_a_type_is_widened_only_where_no_value_is_lost(
    one: T.DataType, other: T.DataType, both: T.DataType | None
) -> None:
    assert wider(one, other) == wider(other, one) == both


def test_names_are_the_same_whatever_their_case_and_the_blanks_around_them() -> None:
    assert {plain(name) for name in ("item_id", " Item_ID", "ITEM_ID\t")} == {"item_id"}
    assert plain("item id") != plain("itemid")


def test_suffixes_of_files_that_hold_data() -> None:
    for name, kind in (("a.csv", "csv"), ("A.CSV.gz", "csv"), ("b.snappy.parquet", "parquet"), ("c.ndjson", "json")):
        assert format_of(name) == kind
    assert [format_of(name) for name in ("a.csv.bak", "csv", "notes.txt", "x.parquet.crc")] == [None] * 4


def test_folders_of_keys_are_told_from_others() -> None:
    assert _partition_keys(("date=2026-01-01", "hour=3")) == ("date", "hour")
    assert _partition_keys(("2026", "01")) == ()
    assert _partition_keys(("2026", "hour=3")) == ("?",)


def test_the_signs_of_a_glob_are_escaped_and_no_others() -> None:
    assert literal_path("/a b/logs[1]/{x}*?.csv") == r"/a b/logs\[1\]/\{x\}\*\?.csv"
    plain_names = ("".join(pair) for pair in itertools.permutations("ä%#'\"(),;=+", 2))
    assert all(literal_path(name) == name for name in plain_names)
