"""Logs as other people have them: sub-folders, odd names, other clocks, bytes and types. Read rightly, or one line."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import time
import zoneinfo
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from etl.build.account import keys_in_other_forms
from etl.build.samples import BuildRequest, Progress, build_samples
from etl.checks import DataCheckError
from etl.kernel.events import context_column, texts_column
from etl.lake.tables import Lake, prepare_samples
from etl.logs.events import REASON, event_logs, read_events, read_features
from etl.logs.files import LogFolder
from etl.logs.mapping import as_text, iso_instant, map_columns
from tests.spark.test_build_samples import rows_of
from usr_ray.config import LogConfig, load_config
from usr_ray.config.terms import SEPARATOR
from usr_ray.data.manifest import build_manifest, null_values

pytestmark = pytest.mark.spark

DAY = dt.date(2026, 1, 1)
NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
PLAIN = ('scenarios=["feed"]', "query_scenarios=[]", 'labels.no_order_scenarios=["feed"]', "vocabulary.min_count=1")


def impressions(size: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "impression_id": f"i{n}",
            "request_id": f"r{n // 4}",
            "user_id": f"u{n % 5}",
            "item_id": f"a{n}",
            "event_time": (NOON + dt.timedelta(minutes=n)).isoformat(),
        }
        for n in range(size)
    ]


def clicks(shown: list[dict[str, Any]], shift: dt.timedelta = dt.timedelta()) -> list[dict[str, Any]]:
    """A click on every fourth impression, half a minute later."""
    delay = dt.timedelta(seconds=30) + shift
    return [
        {
            "click_id": f"c{row['impression_id']}",
            "impression_id": row["impression_id"],
            "user_id": row["user_id"],
            "item_id": row["item_id"],
            "event_time": (dt.datetime.fromisoformat(row["event_time"]) + delay).isoformat(),
        }
        for row in shown[::4]
    ]


def csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)


def build(spark: SparkSession, logs: Path, lake: Path, *overrides: str) -> list[str]:
    lines: list[str] = []
    request = BuildRequest(logs=str(logs), lake=Lake(str(lake)), first=DAY, last=DAY)
    build_samples(spark, load_config(None, (*PLAIN, *overrides)), request, Progress(write=lines.append))
    return lines


def refusal(spark: SparkSession, logs: Path, lake: Path, *overrides: str) -> str:
    with pytest.raises(DataCheckError) as error:
        build(spark, logs, lake, *overrides)
    assert not lake.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_at_every_depth_of_folders_with_odd_names_are_read_and_their_neighbours_are_not(
    spark: SparkSession, tmp_path: Path
) -> None:
    logs, lake, shown = tmp_path / "logs[1]", tmp_path / "lake[1] {a,b}*?", impressions()
    csv(logs / "feed_impressions" / "a.csv", shown[:10])
    csv(logs / "feed_impressions" / "2026" / "b [x].csv", shown[10:20])
    csv(logs / "feed_impressions" / "2026" / "01 #%20" / "c.csv", shown[20:])
    csv(logs / "feed_clicks" / "deep" / "deeper" / "a.csv", clicks(shown))
    csv(logs / "feed_order.csv", shown)
    csv(tmp_path / "logs1" / "feed_impressions.csv", impressions(80))  # what the glob logs[1] would match
    lines = build(spark, logs, lake)
    rows = rows_of(lake / "samples")
    assert {row["impression_id"] for row in rows} == {row["impression_id"] for row in shown}
    assert sum(row["is_click"] for row in rows) == 10
    assert "  feed_impressions: 3 csv files, 40 rows: 40 used, 0 rejected, 0 duplicates" in lines
    assert "  feed_clicks: 1 csv file, 10 rows: 10 used, 0 rejected, 0 duplicates" in lines
    assert any("holds feed_order.csv, which no log reads; is it feed_orders?" in line for line in lines)
    # A second build reads the lake's own folders of that name: the state, the reports.
    assert any(
        line.endswith("events before 2026-01-01 are known") or "known" in line for line in build(spark, logs, lake)
    )


@pytest.mark.parametrize(
    ("stray", "told"),
    [
        ("feed_clicks/notes.txt", "holds csv, notes.txt; needed one of"),
        ("feed_clicks/_b.csv", "holds csv, _b.csv; needed one of"),
        ("feed_clicks/.tmp/b.csv", "holds csv, b.csv; needed one of"),
        ("feed_clicks/date=2026-01-01/b.csv", "lie in different key=value folders"),
        ("feed_clicks/x/date=2026-01-01/b.csv", "lie in different key=value folders"),
    ],
)
def test_a_file_that_would_not_be_read_is_named(spark: SparkSession, tmp_path: Path, stray: str, told: str) -> None:
    csv(tmp_path / "feed_clicks" / "a.csv", clicks(impressions()))
    csv(tmp_path / stray, clicks(impressions()))
    with pytest.raises(DataCheckError, match=told):
        LogFolder(spark, str(tmp_path)).read("feed_clicks")


def test_what_spark_writes_beside_its_files_is_no_data_and_folders_of_keys_are_columns(
    spark: SparkSession, tmp_path: Path
) -> None:
    shops = ["007", "1.10"]
    frame = spark.createDataFrame([("a", shops[0], 1), ("b", shops[1], 2)], "item_id string, shop string, n int")
    frame.write.partitionBy("shop").parquet(str(tmp_path / "items"))
    rows = LogFolder(spark, str(tmp_path)).read("items", ["item_id", "shop"])[0].orderBy("n").collect()
    assert [(row["item_id"], row["shop"]) for row in rows] == [("a", "007"), ("b", "1.10")]


def test_a_name_is_literal_where_a_file_has_it_and_a_glob_where_none_has(spark: SparkSession, tmp_path: Path) -> None:
    for name in ("e[1].csv", "e1.csv", "e2.csv"):
        csv(tmp_path / name, [{"order_id": name}])

    def read(path: str) -> set[str]:
        folder = LogFolder(spark, str(tmp_path), {"orders": LogConfig(path=path)})
        return {row[0] for row in folder.read("orders", ["order_id"])[0].select("order_id").collect()}

    assert read("e[1].csv") == {"e[1].csv"}
    assert read("e[2].csv") == {"e2.csv"}
    assert read("e?.csv") == {"e1.csv", "e2.csv"}


def test_clicks_on_another_clock_stop_the_build_with_the_cause(spark: SparkSession, tmp_path: Path) -> None:
    shown = impressions()
    csv(tmp_path / "feed_impressions.csv", shown)
    csv(tmp_path / "feed_clicks.csv", clicks(shown, dt.timedelta(hours=-2)))
    told = refusal(spark, tmp_path, tmp_path / "lake")
    assert "log feed_clicks: 10 of 10 rows (100.0%) are rejected as before_impression" in told
    assert "their times are 2 whole hours early" in told
    assert "look at logs.feed_clicks.time_zone" in told
    csv(tmp_path / "feed_clicks.csv", clicks(shown, dt.timedelta(hours=1)))
    told = refusal(spark, tmp_path, tmp_path / "lake", "limits.max_reject_share=1")
    assert "log feed_clicks: none of its 10 clicks is kept, so every label would be 0 (10 after_window)" in told
    assert "their times are 1 whole hours late" in told


def test_times_in_two_units_stop_the_build_with_the_cause(spark: SparkSession, tmp_path: Path) -> None:
    shown = impressions()
    for n, row in enumerate(shown):
        seconds = int(dt.datetime.fromisoformat(row["event_time"]).timestamp())
        row["event_time"] = str(seconds * 1000 if n % 2 else seconds)
    csv(tmp_path / "feed_impressions.csv", shown)
    csv(tmp_path / "feed_clicks.csv", clicks(impressions()))
    told = refusal(spark, tmp_path, tmp_path / "lake", 'logs.feed_impressions.time_format="s"')
    assert "log feed_impressions: 20 of 40 rows (50.0%) are rejected as unparsable_event_time" in told
    assert "numbers that are times in 'ms', a factor of 1000" in told
    # Without a time_format all are unreadable, and the line says which it is.
    assert 'set logs.feed_impressions.time_format = "' in refusal(spark, tmp_path, tmp_path / "lake")


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock shows Tokyo's time, nine hours ahead."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("in_tokyo")
def test_one_clock_of_the_year_9999_makes_no_label_final(spark: SparkSession, tmp_path: Path) -> None:
    """A click that is rejected, an impression that is used, an ingest_time: none is the watermark. Nor local time."""
    shown = impressions()
    shown[0] |= {"impression_id": "late", "event_time": "9999-12-31T00:00:00"}
    given = clicks(shown[1:])
    given[0] |= {"click_id": "wild", "event_time": "9999-12-31T00:00:00"}
    given.append(given[1] | {"click_id": "wilder", "event_time": "9999-12-31T23:00:00-05:00"})  # the year 10000
    for row in given:
        row["ingest_time"] = "9999-12-31T00:00:00"
    csv(tmp_path / "feed_impressions.csv", shown)
    csv(tmp_path / "feed_clicks.csv", given)
    lines = build(spark, tmp_path, tmp_path / "lake", "limits.max_reject_share=0.5")
    report = json.loads((tmp_path / "lake" / "reports" / "2026-01-01.json").read_text())
    assert report["watermark"] == (NOON + dt.timedelta(minutes=39)).isoformat()
    assert not any(row["is_mature"] for row in rows_of(tmp_path / "lake" / "samples"))
    assert any(line.startswith("warning: no row is mature") for line in lines)


ZONES = {
    name: name
    for name in (
        *("CET", "EET", "EST", "MST", "HST", "EST5EDT", "GB", "GMT", "UTC", "America/Port-au-Prince", "Etc/GMT+5"),
        *("Etc/GMT-14", "Asia/Kolkata", "Asia/Kathmandu", "Europe/Berlin", "America/Argentina/Buenos_Aires"),
    )
} | {"Z": "UTC", "UT": "UTC", "UTC+1": "Etc/GMT-1", "GMT-05:00": "Etc/GMT+5", "UTC+0100": "Etc/GMT-1"}
ZONES |= {"+01": "Etc/GMT-1", "-5": "Etc/GMT+5", "+0530": "Asia/Kolkata", "+05:30": "Asia/Kolkata", "": "Europe/Berlin"}
FIXED = {"PST": -8, "PDT": -7, "MDT": -6, "CST": -6, "CDT": -5, "EDT": -4}
"""Of RFC 2822, the same in winter and summer."""


def test_every_form_of_a_zone_is_read_as_python_reads_it_in_winter_and_summer(spark: SparkSession) -> None:
    wanted: dict[str, dt.datetime | None] = {}
    for day in ("2026-01-15", "2026-07-15"):
        local = dt.datetime.fromisoformat(f"{day}T10:15:00")
        for gap in ("", " "):
            for zone, name in ZONES.items():
                wanted[f"{day}T10:15:00{gap}{zone}"] = local.replace(tzinfo=zoneinfo.ZoneInfo(name))
            for zone, hours in FIXED.items():
                wanted[f"{day} 10:15:00{gap}{zone}"] = local.replace(tzinfo=dt.timezone(dt.timedelta(hours=hours)))
        # Names of no one zone, clock times without a day and numbers are no times, rather than some.
        wanted |= dict.fromkeys(f"{day} 10:15:00 {zone}" for zone in ("BST", "IST", "AST", "nowhere", "+25"))
    wanted |= dict.fromkeys(("10:15:00", "T10:15", "2026", "2026-01", "12345", "1767225600", "2026-13-01", "soon"))
    frame = spark.createDataFrame([(text,) for text in wanted], "t string")
    for text, found in frame.select("t", iso_instant(F.col("t"), "Europe/Berlin")).collect():
        expected = wanted[text]
        assert found == (expected and expected.astimezone(dt.UTC).replace(tzinfo=None)), text


FEATURES = ("count", "reason", "position", "kind", "log", "request_key", "user_key", "row_json", "first_0", "is_click")


def test_features_may_be_called_like_columns_of_ours_and_integers_as_times_are_told_of_the_time_format(
    spark: SparkSession, tmp_path: Path
) -> None:
    shown, names = impressions(), list(FEATURES)
    for n, row in enumerate(shown):
        row.update({name: f"{name}{n % 2}" for name in names}, event_time_index=n, position=n, first_0=n % 2)
    seconds = [int(dt.datetime.fromisoformat(row["event_time"]).timestamp()) for row in shown]
    table = pa.Table.from_pylist(shown).set_column(4, "event_time", pa.array(seconds))
    pq.write_table(table, tmp_path / "feed_impressions.parquet")
    csv(tmp_path / "feed_clicks.csv", clicks(shown))
    csv(
        tmp_path / "users.csv",
        [{"user_id": f"u{n}", "value": f"v{n % 2}", "feature": n, "value_index": n} for n in range(5)],
    )
    csv(tmp_path / "items.csv", [{"item_id": f"a{n}", "rows": n % 3, "id": n % 2, "chunk": n} for n in range(40)])
    told = refusal(spark, tmp_path, tmp_path / "lake")
    assert "column 'event_time' is bigint" in told
    assert "set logs.feed_impressions.time_format to 's', 'ms', 'us' or 'ns'" in told
    build(
        spark,
        tmp_path,
        tmp_path / "lake",
        'logs.feed_impressions.time_format="s"',
        f"features.context_categories={json.dumps([n for n in names if n not in ('position', 'first_0')])}",
        'features.context_numbers=["event_time_index", "first_0"]',
        'features.user_categories=["value", "feature"]',
        'features.user_numbers=["value_index"]',
        'features.item_categories=["rows", "id"]',
        'features.item_numbers=["chunk"]',
    )
    found = {row["impression_id"]: row for row in rows_of(tmp_path / "lake" / "samples")}
    assert min(row["event_time"] for row in found.values()) == NOON
    for n, row in enumerate(shown):
        mine = found[row["impression_id"]]
        assert mine["user_key"] != mine["user_key_index"]
        assert mine["event_time_index_scaled"] == np.float32(np.log1p(n))
        assert mine["first_0_scaled"] == np.float32(np.log1p(n % 2))
        assert mine["position"] == n
        assert mine["value_index_scaled"] == np.float32(np.log1p(n % 5))
        assert mine["chunk_scaled"] == np.float32(np.log1p(n))
        assert {mine[f"{name}_index"] for name in ("count", "reason", "kind", "user_key")} <= {2, 3}
    for name in ("count", "value", "rows"):
        by_value = {
            (found[f"i{n}"][f"{name}_index"], {"count": n % 2, "value": n % 5 % 2, "rows": n % 3}[name])
            for n in range(40)
        }
        assert len(by_value) == (3 if name == "rows" else 2), name


def test_bytes_that_are_no_text_are_found_in_parquet_and_in_headers_too(spark: SparkSession, tmp_path: Path) -> None:
    wrong = pa.array([b"u\xfc", b"\xc3\xbc"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"item_id": ["a", "b"], "brand": wrong}), tmp_path / "items.parquet")
    rows = (
        read_features(LogFolder(spark, str(tmp_path)), "items", "item_id", ["brand"], []).orderBy("item_id").collect()
    )
    assert [(row[REASON], row["brand"]) for row in rows][1] == (None, "ü")
    assert rows[0][REASON] == "undecodable_text"
    (tmp_path / "users.csv").write_bytes("user_id,Größe\nu,1\n".encode("latin-1"))
    with pytest.raises(DataCheckError, match=r"the header of .*users.csv holds bytes that are not UTF-8 \(.*encoding"):
        LogFolder(spark, str(tmp_path)).read("users", ["user_id"])
    for name in ("UTF-16", "UTF-16LE"):
        (tmp_path / "users.csv").write_bytes("user_id,Größe\r\nu,ü\r\n".encode(name))
        with pytest.raises(DataCheckError, match=rf"that are not UTF-8 .*; set logs.users.encoding, .* to '{name}'"):
            LogFolder(spark, str(tmp_path)).read("users", ["user_id"])
        users = LogFolder(spark, str(tmp_path), {"users": LogConfig(path="users.csv", encoding=name)})
        assert [row["Größe"] for row in users.read("users", ["user_id"])[0].collect()] == ["ü"]


def test_lines_with_too_few_or_too_many_fields_are_rejected(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text('item_id,brand,price\na,x,1\nb,y\nc,z,3,4\n\nd,"q\nr",5\n')
    folder = LogFolder(spark, str(tmp_path))
    rows = read_features(folder, "items", "item_id", ["brand"], ["price"]).orderBy("item_id").collect()
    assert [(row["item_id"], row[REASON]) for row in rows] == [
        ("a", None),
        ("b", "malformed_line"),
        ("c", "malformed_line"),
        ("d", None),
    ]
    assert rows[3]["brand"] == "q\nr"


@pytest.mark.parametrize(("header", "rest"), [("\n", "\r\n"), ("\r\n", "\n"), ("\r\n", "\r\n"), ("\r", "\r")])
def test_lines_may_end_in_one_way_or_the_other(spark: SparkSession, tmp_path: Path, header: str, rest: str) -> None:
    lines = ["a,1,red", 'b,2,"green, dark"', 'c,3,""', "d,4,", "", 'e,5,"x\ny"', "f,6,last"]
    text = "item_id,price,colour" + header + rest.join([*lines, ""])
    (tmp_path / "items.csv").write_bytes(text.encode())
    folder = LogFolder(spark, str(tmp_path))
    rows = read_features(folder, "items", "item_id", ["colour"], ["price"]).orderBy("item_id").collect()
    assert [(row["item_id"], row["price"], row["colour"], row[REASON]) for row in rows] == [
        (name, price, colour, None)
        for name, price, colour in zip(
            "abcdef", range(1, 7), ["red", "green, dark", None, None, "x\ny", "last"], strict=True
        )
    ]


def test_a_stray_quote_takes_no_lines_away_without_a_word(spark: SparkSession, tmp_path: Path) -> None:
    lines = [
        "item_id,colour,price",
        'a,"red,1',
        "b,blue,2",
        'c,"green",3',
        'd,5" wide,4',
        'e,"5"" ""x""",5',
        'f,"two\nl",6',
    ]
    (tmp_path / "items.csv").write_text("\n".join([*lines, ""]))

    def read(quote: str) -> list[tuple[Any, ...]]:
        folder = LogFolder(spark, str(tmp_path), {"items": LogConfig(path="items.csv", quote=quote)})
        rows = read_features(folder, "items", "item_id", ["colour"], ["price"]).orderBy("item_id").collect()
        return [(row["item_id"], row["colour"], row[REASON]) for row in rows]

    rest = [("d", '5" wide', None), ("e", '5" "x"', None), ("f", "two\nl", None)]
    assert read('"') == [("a", '"red,1\nb,blue,2\nc,"green"', "malformed_line"), *rest]
    assert [row for row in read("") if row[2] is None] == [
        ("a", '"red', None),
        ("b", "blue", None),
        ("c", '"green"', None),
        ("d", '5" wide', None),
        ("e", '"5"" ""x"""', None),
    ]


def test_a_whole_float_is_the_category_and_the_tag_that_the_integer_was(spark: SparkSession, tmp_path: Path) -> None:
    """pandas writes a column of integers as floats on the day on which one of them is missing."""
    cells = {1.0: "1", 2.5: "2.5", -3.0: "-3", -0.0: "0", 2.0**53 - 1: "9007199254740991", 1e300: "1.0E300"}
    values = [*cells, float("nan"), None]
    tags, titles = [[one, 7.0, None] for one in values], [[1.0, 2.5]] * len(values)
    table = {"item_id": [f"a{n}" for n in range(len(values))], "kind": values, "tags": tags, "title": titles}
    single = pa.array(values[:2] + [None] * 6, pa.float32())
    pq.write_table(pa.table(table | {"narrow": single}), tmp_path / "items.parquet")
    config = load_config(None, (*PLAIN, 'features.item_tags=["tags"]', 'features.item_terms=["title"]'))
    names, lists = ("kind", "narrow"), config.features.lists
    read = read_features(LogFolder(spark, str(tmp_path)), "items", "item_id", names, (), lists).collect()
    wanted = [*cells.values(), None, None]
    assert [row["kind"] for row in read] == wanted
    assert [row["narrow"] for row in read] == ["1", "2.5"] + [None] * 6
    listed = {feature.name: [row[texts_column(feature.name)][0].split(SEPARATOR) for row in read] for feature in lists}
    assert listed[lists[0].name] == [[one, "7"] if one else ["7"] for one in wanted]
    assert listed[lists[1].name] == [["", "1", "2.5"]] * len(values)

    rows = [(1.0, "x"), (None, "x"), (2.0, None), (2.0, "y")]
    views = spark.createDataFrame(rows, "shop double, view string")
    joined = map_columns(views, "orders", LogConfig(columns={"order_id": ("shop", "view")})).collect()
    assert [row["order_id"] for row in joined] == ["1|x", None, None, "2|y"]
    for wanted_shop in ("2", "2.0"):
        assert map_columns(views, "orders", LogConfig(where={"shop": wanted_shop})).count() == 2


def test_an_integer_that_a_float_has_changed_is_no_value_but_a_reject(spark: SparkSession, tmp_path: Path) -> None:
    """In JSON lines a column of integers is one of floats as soon as one has a fraction: 2^53 + 1 is 2^53 then."""
    brands = [2**53 - 1, 2**53 + 1, -(2**53) - 1, 3.0, 2.5, None, 2**63, 1e300]
    lines = [{"item_id": f"a{n}", "brand": brand, "tags": [7, 0.5]} for n, brand in enumerate(brands)]
    lines += [{"item_id": "b", "tags": [2**60 + 1]}]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    config = load_config(None, (*PLAIN, 'features.item_tags=["tags"]'))
    lists = config.features.lists
    read = read_features(LogFolder(spark, str(tmp_path)), "items", "item_id", ["brand"], (), lists)
    found = {row["item_id"]: (row[REASON], row["brand"]) for row in read.collect()}
    lost = "imprecise_value"
    wanted = [
        (None, str(2**53 - 1)),
        (lost, None),
        (lost, None),
        (None, "3"),
        (None, "2.5"),
        (None, None),
        (lost, None),
    ]
    assert [found[f"a{n}"] for n in range(7)] == wanted
    assert found["a7"] == (None, "1.0E300"), "no integer of 64 bits"
    assert found["b"][0] == lost

    shown = impressions()
    for n, row in enumerate(shown):
        row["shelf"] = 2**53 + 1 if n < 9 else n + 0.5
    (tmp_path / "feed_impressions.jsonl").write_text("\n".join(map(json.dumps, shown)) + "\n")
    csv(tmp_path / "feed_clicks.csv", clicks(shown)[2:])
    (tmp_path / "items.jsonl").unlink()
    told = refusal(spark, tmp_path, tmp_path / "lake", 'features.context_categories=["shelf"]')
    assert "9 of 40 rows (22.5%) are rejected as imprecise_value" in told
    assert "a float of that size has lost the last digits of the integer that was meant; write the column as" in told
    views = spark.createDataFrame([(2.0**53, "x")], "shop double, view string")
    joined = map_columns(views, "orders", LogConfig(columns={"order_id": ("shop", "view")}))
    assert joined.first()["order_id"] is None, "a row without an id is rejected"
    narrow = spark.createDataFrame([(float(2**24),), (float(2**24 - 1),)], "shop float")
    texts = [row[0] for row in narrow.select(as_text(F.col("shop"), narrow.schema[0].dataType)).collect()]
    assert texts == [None, str(2**24 - 1)]


def test_a_blank_time_in_json_lines_is_none(spark: SparkSession, tmp_path: Path) -> None:
    noon = NOON.isoformat()
    times = [(noon, ""), (noon, " \t"), (noon, None), (noon, "soon"), ("", noon), (" ", ""), ("soon", noon)]
    shown = [
        {
            "impression_id": f"i{n}",
            "request_id": None,
            "user_id": "u",
            "item_id": "a",
            "event_time": t,
            "ingest_time": k,
        }
        for n, (t, k) in enumerate(times)
    ]
    (tmp_path / "feed_impressions.jsonl").write_text("\n".join(map(json.dumps, shown)) + "\n")
    (tmp_path / "feed_clicks.csv").write_text("click_id,impression_id,user_id,item_id,event_time\n")
    for mapping in ((), ("logs.feed_impressions.time_zone='UTC'",)):
        config = load_config(None, (*PLAIN, *mapping))
        folder = LogFolder(spark, str(tmp_path), config.logs)
        found = read_events(config, folder, event_logs(config, folder)[:1]).collect()
        read = {row["id"]: (row["reason"], row["known_time"] and row["known_time"].astimezone(dt.UTC)) for row in found}
        assert [read[f"i{n}"] for n in range(3)] == [(None, NOON)] * 3
        assert [read[f"i{n}"][0] for n in range(3, len(times))] == [
            "unparsable_ingest_time",
            "null_event_time",
            "null_event_time",
            "unparsable_event_time",
        ]


def test_positions_and_numbers_that_cannot_be_read_are_rejected(spark: SparkSession, tmp_path: Path) -> None:
    positions = {"3": 3, "3.0": 3, " 4 ": 4, "-1": -1, "": None, "NaN": None}  # pandas writes the second and the last
    numbers = {"1.5": 1.5, "": None, "nan": None, "-2e1": -20.0, " 7 ": 7.0, ".5": 0.5}
    wrong = [
        ("3.5", "1"),
        ("top", "1"),
        ("9999999999", "1"),
        ("1", "12,50"),
        ("1", "1e400"),
        ("1", "-4e38"),
        ("1", "12d"),
        ("1", "inf"),
    ]
    rows = [*zip(positions, numbers, strict=True), *wrong]
    texts = [f'i{n},r,u,a,2026-01-01T12:00:00Z,{place},"{number}"' for n, (place, number) in enumerate(rows)]
    header = "impression_id,request_id,user_id,item_id,event_time,position,price"
    (tmp_path / "feed_impressions.csv").write_text("\n".join([header, *texts, ""]))
    (tmp_path / "feed_clicks.csv").write_text("click_id,impression_id,user_id,item_id,event_time\n")
    config, folder = load_config(None, (*PLAIN, 'features.context_numbers=["price"]')), LogFolder(spark, str(tmp_path))
    shown = read_events(config, folder, event_logs(config, folder)[:1]).collect()
    found = {row["id"]: (row["position"], row[context_column("price")], row["reason"]) for row in shown}
    expected = [(*pair, None) for pair in zip(positions.values(), numbers.values(), strict=True)]
    assert [found[f"i{n}"] for n in range(len(expected))] == expected
    reasons = [found[f"i{n}"][2] for n in range(len(expected), len(rows))]
    assert reasons == ["unparsable_position"] * 3 + ["unparsable_number"] * 5
    told = refusal(spark, tmp_path, tmp_path / "lake", 'features.context_numbers=["price"]')
    assert "5 of 14 rows (35.7%) are rejected as unparsable_number" in told
    assert "write 1234.50, or name the column in logs.feed_impressions.decimal_comma" in told


def test_texts_that_mean_no_value_are_told_and_bytes_of_another_encoding_rejected_until_they_are_named(
    spark: SparkSession, tmp_path: Path
) -> None:
    """Two bytes that are no UTF-8 must not become one value of two users."""
    shown, logs = impressions(), tmp_path / "logs"
    for row in shown[:6]:
        row["user_id"] = "NULL"
    for row, user in zip(shown[6:8], ("Jürgen", "Jörgen"), strict=True):
        row["user_id"] = user
    csv(logs / "feed_impressions.csv", shown, encoding="latin-1")
    csv(logs / "feed_clicks.csv", clicks(shown)[2:])
    csv(logs / "users.csv", [{"user_id": f"u{n}", "city": "\\N" if n < 3 else "Rome"} for n in range(5)])
    features = 'features.user_categories=["city"]'
    told = refusal(spark, logs, tmp_path / "lake", features, "limits.max_reject_share=0.01")
    assert "2 of 40 rows (5.0%) are rejected as undecodable_text" in told
    assert "set logs.feed_impressions.encoding" in told
    lines = build(spark, logs, tmp_path / "lake", features, "limits.max_reject_share=0.2")
    warned = [line for line in lines if line.startswith("warning: ") and "null_values" in line]
    assert len(warned) == 2
    assert "user_id: 'NULL' is among its commonest values (6 rows)" in " ".join(warned)
    assert "set logs.users.null_values" in " ".join(warned)
    assert sum("rgen" in row["user_id"] for row in rows_of(tmp_path / "lake" / "samples")) == 0
    nulls = ('logs.feed_impressions.null_values=["NULL"]', 'logs.users.null_values=["\\\\N"]')
    known = ('logs.feed_impressions.encoding="latin-1"', *nulls, "limits.max_reject_share=0.2")
    users = [*({"user_id": f"u{n}", "city": "\\N"} for n in range(3)), {"user_id": "JÜRGEN", "city": "Rome"}]
    csv(logs / "users.csv", [*users, *({"user_id": f"U{n}", "city": "Rome"} for n in (3, 4))])
    lines = build(spark, logs, tmp_path / "second", features, *known)
    (forms,) = [line for line in lines if "but for their form" in line]
    assert "user_id: 3 of 4 values in impressions without a row in users would have one but for" in forms
    rows = rows_of(tmp_path / "second" / "samples")
    assert len(rows) == 34, "a null user is rejected"
    assert {"Jürgen", "Jörgen"} < {row["user_id"] for row in rows}
    assert {row["city_index"] for row in rows if row["user_id"] in ("u0", "u1", "u2")} == {0}
    assert not any("null_values" in line for line in lines)
    manifest = build_manifest(tmp_path / "second", dates=None)
    assert null_values(manifest) == {"feed_impressions": ["NULL"], "users": ["\\N"]}, "a service applies them too"
    odd = ["it's", "${spark.app.name}", "\\N", '"', "", "ж"]
    logs_of = {"feed_impressions": LogConfig(null_values=tuple(odd))}
    for found in (logs_of, {}):
        config = replace(load_config(None, (*PLAIN, features)), logs=found)
        prepare_samples(spark, Lake(str(tmp_path / "second")), manifest.spec, config, {})
        newest = build_manifest(tmp_path / "second", dates=None)
        assert null_values(newest) == dict.fromkeys(found, odd)


def test_ids_in_another_form_than_in_their_table_are_told(spark: SparkSession) -> None:
    def told(shown: list[str], there: list[str], owner: str = "user") -> list[str]:
        values = [(f"{owner}_id", value) for value in shown] + [("city", "7.0"), ("city", "8.0"), ("city", "9.0")]
        of_both = spark.createDataFrame(values * 2, "feature string, value string")
        return keys_in_other_forms(
            of_both, {owner: spark.createDataFrame([(key,) for key in there], f"{owner}_id string")}
        )

    (line,) = told(["7.0", "08", " 9 ", "10", "gone", "u1", "U2"], ["7", "8", "9", "10", "u1"])
    assert line == (
        "user_id: 3 of 5 values in impressions without a row in users would have one but for their form, such as ' 9 ' "
        "for '9'; write them alike (7 and 7.0, 007, blanks, capitals)"
    )
    (line,) = told(["AB-1", "AB-2", "AB-3"], ["ab-1", "ab-2", "ab-3"], "item")
    assert line.startswith("item_id: 3 of 3 values in impressions without a row in items would have one but for their")
    assert told(["7.0", "8.0", "9"], ["7", "8", "9"]) == [], "two may be chance"
    assert told(["7.0", "8.0", "9.0", *(f"n{n}" for n in range(30))], ["7", "8", "9"]) == [], "3 of 33"
    assert told(["7", "7.0", "7.5", "0x7", "70"], ["7", "7.0", "75", "7x", "700"]) == []
    assert told(["a"], []) == []
    assert keys_in_other_forms(spark.createDataFrame([("user_id", "1")], "feature string, value string"), {}) == []


def test_headers_with_blanks_and_in_another_case_are_those_of_the_contract(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text(" Order_ID ,USER_ID,item_id\t,Event_Time\no,u,a,2026-01-01\n")
    rows = LogFolder(spark, str(tmp_path)).read("orders", ["order_id", "user_id", "item_id", "event_time"])[0].collect()
    assert [rows[0][name] for name in ("order_id", "user_id", "item_id", "event_time")] == ["o", "u", "a", "2026-01-01"]
    (tmp_path / "items.csv").write_text("Item_ID,item_id,brand,brand\na,b,c,d\n")
    with pytest.raises(DataCheckError, match="has the columns 'Item_ID' and 'item_id', and case and blanks tell no"):
        LogFolder(spark, str(tmp_path)).read("items", ["item_id"])


def test_types_and_columns_of_older_files_are_widened(spark: SparkSession, tmp_path: Path) -> None:
    instant = pa.array([NOON], pa.timestamp("us", tz="UTC"))
    tables = {
        "a": {"item_id": pa.array([1], pa.int32()), "price": pa.array([1.5], pa.float32()), "t": instant},
        "b": {"item_id": pa.array([2**40], pa.int64()), "price": pa.array([0.1], pa.float64())},
        "c": {
            "Item_ID": pa.array([3], pa.int64()),
            "price": pa.array([2], pa.int32()),
            "brand": pa.array(["x"]),
            "t": instant.cast(pa.timestamp("ns", tz="UTC")),
        },
    }
    for name, columns in tables.items():
        (tmp_path / "items").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "items" / f"{name}.parquet")
    folder = LogFolder(spark, str(tmp_path))
    rows = folder.read("items", ["item_id", "price", "brand", "t"])[0].orderBy("item_id").collect()
    noon = NOON.replace(tzinfo=None)
    assert [tuple(row[n] for n in ("item_id", "price", "brand", "t")) for row in rows] == [
        (1, 1.5, None, noon),
        (3, 2.0, "x", noon),
        (2**40, 0.1, None, None),
    ]
    assert any("column 'brand' is in 1 of 3 files and null in the others" in note for note in folder.notes())


def test_a_file_that_breaks_while_it_is_read_is_one_line(spark: SparkSession, tmp_path: Path) -> None:
    shown = impressions(400)
    lines = "\n".join([",".join(shown[0]), *(",".join(row.values()) for row in shown)])
    packed = gzip.compress(lines.encode())
    (tmp_path / "feed_impressions.csv.gz").write_bytes(packed[: len(packed) // 2])
    csv(tmp_path / "feed_clicks.csv", clicks(shown))
    assert "cannot be read" in refusal(spark, tmp_path, tmp_path / "lake")


def test_queries_of_a_scenario_that_is_not_among_query_scenarios_are_told(spark: SparkSession, tmp_path: Path) -> None:
    """A renamed search box would lose its strongest signal; a feed with an empty column of that name has none."""
    shown = impressions(4)
    for scenario, query in (("web", "shoes"), ("feed", "")):
        csv(tmp_path / f"{scenario}_impressions.csv", [{**row, "Query": query} for row in shown])
        csv(tmp_path / f"{scenario}_clicks.csv", clicks(shown))
    config = load_config(None, ['scenarios=["web","feed"]', 'labels.no_order_scenarios=["web","feed"]'])
    folder = LogFolder(spark, str(tmp_path))
    read_events(config, folder, event_logs(config, folder))
    assert folder.notes() == [
        "log web_impressions: column 'Query' holds queries, which are not read: query_scenarios (search) does "
        "not name web; name it there if its impressions answer a query"
    ]
    mapped = {f"{scenario}_impressions": LogConfig(columns={"query": "Query"}) for scenario in ("web", "feed")}
    config = replace(config, logs=mapped)
    folder = LogFolder(spark, str(tmp_path), mapped)
    with pytest.raises(DataCheckError, match=r"log web_impressions: logs\.web_impressions gives it queries, but"):
        read_events(config, folder, event_logs(config, folder))
