"""--restate where users and items have changed: rows that are there keep what these were, late ones take the new."""

from __future__ import annotations

import copy
import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from etl.build.restate import RestateRequest, add_samples, restate_samples
from etl.build.samples import BuildRequest, Progress, build_samples
from etl.lake.tables import Lake
from tests.spark.killed_build import WATERMARK
from tests.spark.shop import MINUTE, moment, write_logs
from tests.spark.test_build_samples import DATES, rows_of
from usr_ray.config import Config, load_config
from usr_ray.data.by_id import read_item_features
from usr_ray.data.manifest import build_manifest

pytestmark = pytest.mark.spark


def restate(
    spark: SparkSession, logs: Path, lake: Path, settings: Config, watermark: dt.datetime
) -> tuple[dict[str, list[str]], list[str]]:
    lines: list[str] = []
    request = RestateRequest(logs=str(logs), lake=Lake(str(lake)), watermark=watermark)
    return restate_samples(spark, settings, request, Progress(write=lines.append)), lines


def _cafe(hours: int, number: int, user: str, item: str, device: str = "app") -> dict[str, object]:
    time = moment(hours * 60 * MINUTE)
    names = {"impression_id": f"v{number:02}", "request_id": None, "user_id": user, "item_id": item}
    return names | {"event_time": time, "position": 1, "query": "tea", "device": device}


CAFE = load_config(
    None,
    (
        'scenarios=["search"]',
        'features.user_categories=["city"]',
        'features.user_numbers=["spent"]',
        'features.item_categories=["brand"]',
        'features.item_numbers=["price", "stock"]',
        'features.scale={price = "none", stock = "buckets", spent = "none"}',
        "features.scale_buckets=2",
        'features.item_tags=["tags"]',
        'features.item_terms=["title"]',
        "features.query_terms=true",
        'features.context_categories=["device"]',
        'counters.brand={keys=["brand"], windows=["all"], events=["impressions", "clicks"], per_scenario=false}',
        'counters.item={keys=["item_id"], windows=["all"], events=["impressions", "clicks"], per_scenario=false}',
        "vocabulary.min_count=1",
    ),
)
"""One scenario, and each kind of column that comes from the users and items."""
OWNED = (
    "city_index",
    "spent_scaled",
    "brand_index",
    "price_scaled",
    "stock_index",
    "tags_indices",
    "item_terms_indices",
)


def test_rows_of_a_restated_date_keep_what_their_users_and_items_were(spark: SparkSession, tmp_path: Path) -> None:
    """Day 0 and 1 are built; then brand, price, stock, tags and title change as an outcome would, and rows come late.

    On day 1 a view of a new item, one of an item that is there, and a click come late.
    """
    items = {
        "a": {"brand": "plain", "price": 1.0, "stock": 10.0, "tags": ["x", "y"], "title": "green tea"},
        "b": {"brand": "other", "price": 2.0, "stock": 20.0, "tags": None, "title": "coffee"},
    }
    users = {"u": {"city": "rome", "spent": 0.0}, "w": {"city": None, "spent": None}}
    shown = [_cafe(1, 1, "u", "a"), _cafe(2, 2, "w", "b"), _cafe(25, 3, "u", "a"), _cafe(26, 4, "w", "b")]
    clicks = [{"click_id": "c1", "impression_id": "v01", "user_id": "u", "item_id": "a"}]
    clicks[0] |= {"event_time": moment(62 * MINUTE), "ingest_time": moment(62 * MINUTE)}  # type: ignore[dict-item]

    def logs(name: str) -> Path:
        tables = {"users": [{"user_id": u} | row for u, row in users.items()]}
        tables["items"] = [{"item_id": i} | row for i, row in items.items()]
        orders = [{"order_id": None, "user_id": "u", "item_id": "a", "event_time": moment(0)}]
        every = {"search_impressions": shown, "search_clicks": clicks, "orders": orders} | tables
        return write_logs(every, tmp_path / name)  # type: ignore[arg-type]

    def rows(lake: Path) -> dict[str, dict]:
        return {row["impression_id"]: row for row in rows_of(lake / "samples")}

    def run(first: int, name: str, lake: Path) -> None:
        request = BuildRequest(logs=str(logs(name)), lake=Lake(str(lake)), first=DATES[first], last=DATES[1])
        build_samples(spark, settings, request, Progress(write=lambda line: None))

    settings = replace(CAFE, limits=replace(CAFE.limits, max_reject_share=1.0))
    lake = tmp_path / "lake"
    run(0, "then", lake)
    then = copy.deepcopy((items, users))
    before = rows(lake)
    assert {before[key]["price_scaled"] for key in ("v01", "v03")} == {1.0}

    items |= {"a": {"brand": "other", "price": 9.0, "stock": 90.0, "tags": ["y"], "title": "coffee"}}
    items |= {"new": {"brand": "other", "price": 4.0, "stock": None, "tags": ["x"], "title": "tea"}}
    users |= {"u": {"city": None, "spent": 7.0}, "w": {"city": "rome", "spent": 8.0}}
    # Of the events only the watermark is another, and what is counted by the brand of now: the rows are made anew and
    # are what they were.
    touched, _ = restate(spark, logs("changed"), lake, settings, watermark=WATERMARK)
    assert touched == {str(DATES[0]): ["final_until"], str(DATES[1]): ["final_until", "counters"]}
    kept = rows(lake)
    assert kept == {key: row | {"is_mature": True} for key, row in before.items()}

    # Late rows: v05 and v06 were not there; v03 is clicked.
    shown += [_cafe(27, 5, "w", "a"), _cafe(28, 6, "u", "new")]
    late = {"click_id": "c2", "impression_id": "v03", "user_id": "u", "item_id": "a"}
    clicks.append(late | {"event_time": moment(1501 * MINUTE), "ingest_time": moment(1501 * MINUTE)})  # type: ignore[arg-type]
    touched, _ = restate(spark, logs("late"), lake, settings, watermark=WATERMARK)
    assert touched == {str(DATES[1]): ["impressions", "labels", "histories"]}
    found = rows(lake)
    assert [found["v03"][name] for name in ("is_click", "is_click_global")] == [1.0, 1.0]
    for key, row in kept.items():
        assert {name: found[key][name] for name in OWNED} == {name: row[name] for name in OWNED}, key
        assert found[key]["counter_brand_all_clicks"] == row["counter_brand_all_clicks"], key
    of_b = before["v02"]
    # "plain" of item a is now "other", whose id items b and a share; the stock of 90 is in b's bucket, the upper one.
    now = {"price_scaled": 9.0, "spent_scaled": 8.0, "city_index": before["v01"]["city_index"]}
    now |= {name: of_b[name] for name in ("brand_index", "stock_index", "item_terms_indices")}
    now |= {"tags_indices": before["v01"]["tags_indices"][1:]}
    assert {name: found["v05"][name] for name in OWNED} == now
    assert (found["v06"]["price_scaled"], found["v06"]["spent_scaled"], found["v06"]["city_index"]) == (4.0, 7.0, 0)
    # Histories of all rows see the items of now, in the version that the samples name.
    by_item = read_item_features(build_manifest(lake, dates=None))
    assert [by_item[before[key]["item_id_index"], 0] for key in ("v01", "v02")] == [of_b["brand_index"]] * 2
    assert before["v01"]["brand_index"] != of_b["brand_index"]

    # All is once more what it was at first: late rows of before keep what they were when they came. Of their date no
    # report may say that those tables make its rows.
    items, users = then
    shown.append(_cafe(29, 7, "w", "a"))
    assert list(restate(spark, logs("back"), lake, settings, watermark=WATERMARK)[0]) == [str(DATES[1])]
    again = rows(lake)
    assert {key: {name: row[name] for name in OWNED} for key, row in found.items()} == {
        key: {name: again[key][name] for name in OWNED} for key in found
    }
    of_item = set(OWNED) - {"city_index", "spent_scaled"}
    assert {name: again["v07"][name] for name in of_item} == {name: before["v01"][name] for name in of_item}
    items["a"]["price"] = 11.0
    # A date that is named is built anew, with the tables of now.
    run(1, "anew", lake)
    assert {row["price_scaled"] for row in rows(lake).values() if row["item_id"] == "a"} == {1.0, 11.0}
    assert rows(lake)["v01"]["price_scaled"] == 1.0


def test_dates_that_are_there_are_restated_and_those_behind_them_built(spark: SparkSession, tmp_path: Path) -> None:
    """As every night: of two days asked for, day 0 is there, with the catalogue of its night, and day 1 is new."""
    shown = [_cafe(1, 1, "u", "a"), _cafe(2, 2, "w", "a")]
    clicks = [{"click_id": "c1", "impression_id": "v01", "user_id": "u", "item_id": "a"}]
    clicks[0] |= {"event_time": moment(62 * MINUTE), "ingest_time": moment(62 * MINUTE)}  # type: ignore[dict-item]

    def night(name: str, first: int, last: int, price: float) -> tuple[dict[str, tuple[float, float]], list[str]]:
        """(price, click) of each row of the lake, and what was said."""
        item = {"item_id": "a", "brand": "plain", "price": price, "stock": 1.0, "tags": None, "title": "tea"}
        tables = {"users": [{"user_id": "u", "city": "rome", "spent": 0.0}], "items": [item]}
        orders = [{"order_id": None, "user_id": "u", "item_id": "a", "event_time": moment(0)}]
        logs = write_logs(
            {"search_impressions": shown, "search_clicks": clicks, "orders": orders} | tables, tmp_path / name
        )  # type: ignore[arg-type]
        lines: list[str] = []
        lake = tmp_path / "lake"
        request = BuildRequest(logs=str(logs), lake=Lake(str(lake)), first=DATES[first], last=DATES[last])
        add_samples(spark, settings, request, Progress(write=lines.append))
        found = rows_of(lake / "samples")
        return {row["impression_id"]: (row["price_scaled"], row["is_click"]) for row in found}, lines

    settings = replace(CAFE, limits=replace(CAFE.limits, max_reject_share=1.0))
    found, lines = night("first", 0, 0, price=1.0)
    assert found == {"v01": (1.0, 1.0), "v02": (1.0, 0.0)}
    assert not any("changed" in line for line in lines), "nothing was there: all is built"
    late = {"click_id": "c2", "impression_id": "v02", "user_id": "w", "item_id": "a"}
    clicks.append(late | {"event_time": moment(122 * MINUTE), "ingest_time": moment(1440 * MINUTE)})  # type: ignore[arg-type]
    shown.append(_cafe(25, 3, "u", "a"))
    found, lines = night("second", 0, 1, price=9.0)
    assert found == {"v01": (1.0, 1.0), "v02": (1.0, 1.0), "v03": (9.0, 0.0)}
    assert any(f"{DATES[0]}: changed" in line and "labels" in line for line in lines)
