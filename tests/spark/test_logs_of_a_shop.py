"""A shop's mapping and tables: what nobody reads is told, floats of JSON lines, the fullest of several rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from etl.build.account import Account, unique_features
from etl.checks import DataCheckError
from etl.kernel.events import context_column, texts_column
from etl.logs.events import event_logs, read_events, read_features
from etl.logs.files import LogFolder
from tests.spark.test_logs_as_they_come import PLAIN, clicks, csv, impressions
from usr_ray.config import LogConfig, load_config
from usr_ray.config.terms import SEPARATOR

pytestmark = pytest.mark.spark


def test_columns_that_a_mapping_makes_and_nobody_reads_are_told(spark: SparkSession, tmp_path: Path) -> None:
    """`ingest = "got"` would make every event known at its own time, and `colour` would be no feature."""
    shown = [{**row, "got": row["event_time"], "grp": "A"} for row in impressions(4)]
    csv(tmp_path / "feed_impressions.csv", shown)
    csv(tmp_path / "feed_clicks.csv", clicks(shown))
    csv(tmp_path / "items.csv", [{"item_id": "a1", "Title": "tea", "kinds": "x|y"}])
    logs = {
        "feed_impressions": LogConfig(columns={"ingest": "got", "bucket": "grp", "ingest_time": "got"}),
        "feed_clicks": LogConfig(constants={"scenario": "feed"}),
        "items": LogConfig(columns={"title": "Title", "colour": "Title"}, split={"kinds": "|"}),
    }
    config = replace(load_config(None, (*PLAIN, 'features.item_terms=["title"]')), logs=logs)
    folder = LogFolder(spark, str(tmp_path), logs)
    read_events(config, folder, event_logs(config, folder))
    read_features(folder, "items", "item_id", (), (), config.features.lists)
    way_out = "; correct the name, or name the feature in [features]"
    ids = "user_id, item_id, event_time"
    assert folder.notes() == [
        "log feed_impressions: logs.feed_impressions makes 'ingest', which nothing reads; read are "
        f"impression_id, request_id, {ids}, position, ingest_time, bucket, query{way_out}",
        "log feed_clicks: logs.feed_clicks makes 'scenario', which nothing reads; read are "
        f"click_id, impression_id, {ids}, ingest_time{way_out}",
        f"log items: logs.items makes 'colour', 'kinds', which nothing reads; read are item_id, title{way_out}",
    ]


def test_a_whole_float_in_json_lines_is_the_integer_that_it_was(spark: SparkSession, tmp_path: Path) -> None:
    """pandas writes 3.0 for the 3 of a column in which some are missing, on the days on which some are."""
    shelves = [3, 3.0, 2.5, -1.0, None, 0.0]
    shown = [
        row | {"shelf": shelf, "tags": [1.0, 2], "visit": visit}
        for row, shelf, visit in zip(impressions(6), shelves, [7, 7.0, 8.0, None, 9, 9], strict=True)
    ]
    (tmp_path / "feed_impressions").mkdir()
    for name, rows in (("a", shown[:1]), ("b", shown[1:])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "feed_impressions" / f"{name}.jsonl").write_text(lines)
    csv(tmp_path / "feed_clicks.csv", clicks(shown))
    mapping = LogConfig(columns={"request_id": ("visit", "user_id")}, null_values=("-1",))
    features = ('features.context_categories=["shelf"]', 'features.context_tags=["tags"]')
    config = replace(load_config(None, (*PLAIN, *features)), logs={"feed_impressions": mapping})
    folder = LogFolder(spark, str(tmp_path), config.logs)
    read = {row["id"]: row for row in read_events(config, folder, event_logs(config, folder)[:1]).collect()}
    found = [read[f"i{n}"] for n in range(6)]
    assert [row[context_column("shelf")] for row in found] == ["3", "3", "2.5", None, None, "0"]
    assert {row[context_column("tags")] for row in found} == {f"1{SEPARATOR}2"}
    assert [row["request_id"] for row in found] == ["7|u0", "7|u1", "8|u2", None, "9|u4", "9|u0"]

    lines = "".join(json.dumps(row | {"user_id": user}) + "\n" for row, user in zip(shown, range(6), strict=True))
    (tmp_path / "feed_impressions" / "a.jsonl").write_text(lines)
    (tmp_path / "feed_impressions" / "b.jsonl").write_text(lines.replace('"user_id": 1', '"user_id": 1.0'))
    folder = LogFolder(spark, str(tmp_path), config.logs)
    message = "log feed_impressions: column 'user_id' is double, needed string or integer; cast it in the log"
    with pytest.raises(DataCheckError, match=message):
        read_events(config, folder, event_logs(config, folder)[:1])


def test_json_keys_in_two_spellings_are_refused_and_not_read_by_half(spark: SparkSession, tmp_path: Path) -> None:
    """Spark took the lines for lines of one schema, and each `Device` was null."""
    shown = [
        {"Device" if n % 2 else "device": "ios"} | row | {"z" if n % 2 else "Z": 1}
        for n, row in enumerate(impressions(6))
    ]
    (tmp_path / "feed_impressions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    csv(tmp_path / "feed_clicks.csv", clicks(impressions(6)))
    config = load_config(None, (*PLAIN, 'features.context_categories=["device"]'))
    folder = LogFolder(spark, str(tmp_path))
    message = (
        "feed_impressions: it has the columns '[Dd]evice' and '[Dd]evice', and case and blanks tell no columns apart"
    )
    with pytest.raises(DataCheckError, match=message):
        read_events(config, folder, event_logs(config, folder)[:1])
    plain = load_config(None, PLAIN)  # what nobody reads may be spelt as it likes
    folder = LogFolder(spark, str(tmp_path))
    assert read_events(plain, folder, event_logs(plain, folder)[:1]).filter("reason is null").count() == 6


def test_empty_tags_and_texts_count_as_nulls_where_an_item_has_several_rows(
    spark: SparkSession, tmp_path: Path
) -> None:
    rows = ["a,9.5,x|y,red tea", "a,1.5,,red tea", "b,1.5,x,", "b,2.5,x,cup", "c,2.5,x,", "c,1.5,,cup"]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,price,tags,title", *rows, ""]))
    words = ('features.item_tags=["tags"]', 'features.item_terms=["title"]')
    config = replace(load_config(None, (*PLAIN, *words)), logs={"items": LogConfig(split={"tags": "|"})})
    folder = LogFolder(spark, str(tmp_path), config.logs)
    table = read_features(folder, "items", "item_id", (), ("price",), config.features.lists)
    found = unique_features(table, "items", "item_id", Account()).collect()
    tags, terms = (texts_column(feature.name) for feature in config.features.lists)
    kept = {row["item_id"]: (row["price"], row[tags][0], row[terms][0]) for row in found}
    # The fullest of a and b; the two of c have a null each, and 1.5 is the smaller price.
    assert kept == {"a": (9.5, f"x{SEPARATOR}y", "red tea"), "b": (2.5, "x", "cup"), "c": (1.5, None, "cup")}
