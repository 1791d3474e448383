"""--restate: late events change the dates they touch and no others, and the table equals a full rebuild."""

from __future__ import annotations

import collections
import copy
import datetime as dt
import json
import shutil
from dataclasses import replace
from pathlib import Path

import deltalake
import pytest
from pyspark.sql import SparkSession

from etl.build.restate import RestateRequest, restate_samples
from etl.build.samples import BuildRequest, Progress, build_samples
from etl.checks import DataCheckError
from etl.lake.tables import Lake
from tests.etl_oracle import expected, unique
from tests.spark.conftest import Restated
from tests.spark.killed_build import QUIET, SETTINGS, WATERMARK, worlds
from tests.spark.shop import MINUTE, WINDOWS, Shop, logs_of, micros, moment, write_logs
from tests.spark.test_build_samples import DATES, rows_of

pytestmark = pytest.mark.spark

DAY = 24 * 60 * MINUTE
LATER = WATERMARK.replace(day=9)


def build(spark: SparkSession, logs: Path, lake: Path, first: dt.date = DATES[0]) -> None:
    request = BuildRequest(logs=str(logs), lake=Lake(str(lake)), first=first, last=DATES[3], watermark=LATER)
    build_samples(spark, SETTINGS, request, QUIET)


def restate(
    spark: SparkSession, logs: Path, lake: Path, **more: dt.date | dt.datetime
) -> tuple[dict[str, list[str]], list[str]]:
    lines: list[str] = []
    request = RestateRequest(logs=str(logs), lake=Lake(str(lake)), **({"watermark": WATERMARK} | more))  # type: ignore[arg-type]
    return restate_samples(spark, SETTINGS, request, Progress(write=lines.append)), lines


def content(lake: Path, table: str) -> list[str]:
    return sorted(str(row) for row in rows_of(lake / table))


def files(lake: Path) -> set[Path]:
    return {Path(path) for path in deltalake.DeltaTable(str(lake / "samples")).file_uris()}


def reports(lake: Path) -> dict[str, dict]:
    """But for what says when a date was built."""
    found = {path.stem: json.loads(path.read_text()) for path in (lake / "reports").glob("*.json")}
    for report in found.values():
        report.pop("table_version")
        report.pop("watermark")
    return found


def changed_dates(before: Shop, after: Shop) -> dict[str, list[str]]:
    """Date -> what of the rows of its two scenarios differs, as the oracle says."""
    worlds = [copy.deepcopy(shop.world) for shop in (before, after)]
    for world in worlds:
        for rows in (world.impressions, world.clicks, world.orders):
            rows[:] = [row for row in rows if row["scenario"] != 2]
    old, new = (expected(w, WINDOWS, num_scenarios=2, length=4, watermark=micros(WATERMARK)).samples for w in worlds)
    dates = {i["id"]: str(moment(i["time"]).date()) for i in unique(worlds[0].impressions, ("id",))}
    found: dict[str, set[str]] = collections.defaultdict(set)
    for key, row in new.items():
        for name, value in row.items():
            if old[key][name] != value:
                found[dates[key]].add("histories" if name == "histories" else "labels")
    return {date: sorted(names, reverse=True) for date, names in sorted(found.items())}


def test_late_events_change_the_touched_dates_and_no_others(narrow_lake: Path, restated: Restated) -> None:
    lake, touched, lines = restated.lake, restated.touched, restated.lines
    # Exactly the dates whose rows the late events change: day 1 has the impression. Day 0 only has another reject.
    assert touched == changed_dates(*worlds())
    assert touched[str(DATES[1])] == ["labels"]
    assert ["histories"] in touched.values()
    assert any(line.endswith(f"{DATES[1]}: changed labels") for line in lines)
    old = {file.relative_to(narrow_lake) for file in files(narrow_lake)}
    kept = {file for file in old if not any(f"impression_date={date}" in str(file) for date in touched)}
    assert any(f"impression_date={DATES[0]}" in str(file) for file in kept)
    assert {file.relative_to(lake) for file in files(lake)} & old == kept


def test_a_lake_restated_step_by_step_equals_a_full_rebuild(
    spark: SparkSession, restated: Restated, tmp_path: Path
) -> None:
    """Late rows of day 1, then of day 3 from logs that no longer reach back further, then a later watermark."""
    lake, fresh = Path(shutil.copytree(restated.lake, tmp_path / "lake")), tmp_path / "fresh"
    before = worlds()[1]
    late = copy.deepcopy(before)
    shown = next(i for i in late.world.impressions if 3.2 * DAY < i["time"] < 3.4 * DAY and i["scenario"] == 1)
    late.world.click(
        "later", shown["user"], shown["item"], 1, shown["time"] + MINUTE, shown["id"], known=int(3.9 * DAY)
    )
    logs = logs_of(late)
    # What day 3 needs: 30 + 300 minutes and a day before it.
    cut = moment(int(1.75 * DAY) + 30 * MINUTE)
    kept = {
        log: [row for row in rows if not row.get("event_time") or row["event_time"] >= cut]
        for log, rows in logs.items()
    }
    whole, short = write_logs(logs, tmp_path / "whole"), write_logs(kept, tmp_path / "short")

    tables = {table: content(lake, table) for table in ("samples", "state")}
    refusal = (
        r"no row any more of 2026-01-01.*, which \S+ was built from and would lose; .* --dates 2026-01-04:2026-01-04 "
    )
    with pytest.raises(DataCheckError, match=refusal):
        restate(spark, short, lake)
    assert {table: content(lake, table) for table in tables} == tables
    touched, _ = restate(spark, short, lake, first=DATES[3], last=DATES[3])
    assert touched == changed_dates(before, late)
    assert set(touched) == {str(DATES[3])}
    # Labels close six hours after the impression: up to noon of day 3, days 0 and 1 were final, and day 2 was too.
    assert restate(spark, whole, lake, watermark=LATER)[0] == {str(DATES[3]): ["final_until"]}
    told = {date: json.loads((lake / "reports" / f"{date}.json").read_text())["watermark"] for date in DATES}
    assert told == dict.fromkeys(DATES[:3], WATERMARK.isoformat()) | {DATES[3]: LATER.isoformat()}

    build(spark, whole, fresh)
    for table in ("samples", "rejects", "vocabularies", "state"):
        assert content(lake, table) == content(fresh, table), table
    assert reports(lake) == reports(fresh)
    assert all(row["is_mature"] for row in rows_of(lake / "samples"))
    shutil.rmtree(fresh / "state")
    tables = {table: content(fresh, table) for table in ("samples", "vocabularies")}
    with pytest.raises(
        DataCheckError, match=r"of 2026-01-01.*these dates need again without a state; .* \(RESTORE\), or"
    ):
        build(spark, short, fresh, first=DATES[3])
    assert {table: content(fresh, table) for table in tables} == tables

    # The earlier watermark would touch day 3 again; a date that was deleted does not come back.
    deltalake.DeltaTable(str(lake / "samples")).delete(f"impression_date >= '{DATES[3]}'")
    versions = [deltalake.DeltaTable(str(lake / table)).version() for table in ("samples", "state")]
    touched, lines = restate(spark, whole, lake)
    assert touched == {}
    assert f"{DATES[3]}: no longer in the samples, so not restated" in lines
    assert lines[-1].endswith("nothing to restate in 3 dates")
    assert [deltalake.DeltaTable(str(lake / table)).version() for table in ("samples", "state")] == versions


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
    before = rows(lake)
    assert {before[key]["price_scaled"] for key in ("v01", "v03")} == {1.0}

    # Nothing has changed but the watermark: the rows are made anew and are what they were.
    touched, _ = restate(spark, tmp_path / "then", lake, settings, watermark=moment(30 * 60 * MINUTE))
    assert touched == {str(DATES[0]): ["final_until"], str(DATES[1]): ["final_until"]}
    made_again = {key: row | {"is_mature": False} for key, row in rows(lake).items()}
    assert made_again == {key: row | {"is_mature": False} for key, row in before.items()}

    items |= {"a": {"brand": "other", "price": 9.0, "stock": 90.0, "tags": ["y"], "title": "coffee"}}
    items |= {"new": {"brand": "other", "price": 4.0, "stock": None, "tags": ["x"], "title": "tea"}}
    users |= {"u": {"city": None, "spent": 7.0}, "w": {"city": "rome", "spent": 8.0}}
    touched, _ = restate(spark, logs("changed"), lake, settings, watermark=WATERMARK)
    assert list(touched) == [str(DATES[0]), str(DATES[1])]
    kept = rows(lake)
    assert {key: row | {"is_mature": False} for key, row in kept.items()} == made_again
    assert all(row["is_mature"] for row in kept.values())

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

    # Items change once more: late rows of before keep what they were when they came.
    items["a"]["price"], users["w"]["spent"] = 11.0, 12.0
    shown.append(_cafe(29, 7, "w", "a"))
    assert list(restate(spark, logs("again"), lake, settings, watermark=WATERMARK)[0]) == [str(DATES[1])]
    again = rows(lake)
    assert {key: {name: row[name] for name in OWNED} for key, row in found.items()} == {
        key: {name: again[key][name] for name in OWNED} for key in found
    }
    assert (again["v07"]["price_scaled"], again["v07"]["spent_scaled"]) == (11.0, 12.0)
    items["a"]["price"] = 9.0  # as on the day before: which of its rows were made with that, no report says
    shown.append(_cafe(30, 8, "w", "b"))
    assert list(restate(spark, logs("back"), lake, settings, watermark=WATERMARK)[0]) == [str(DATES[1])]
    assert rows(lake)["v07"]["price_scaled"] == 11.0
    # A date that is named is built anew, with the tables of now.
    run(1, "anew", lake)
    assert {row["price_scaled"] for row in rows(lake).values() if row["item_id"] == "a"} == {1.0, 9.0}
    assert rows(lake)["v01"]["price_scaled"] == 1.0


def test_a_lake_without_reports_has_nothing_to_restate(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(DataCheckError, match=r"--restate: .* has no reports .*; build them with --dates"):
        restate(spark, tmp_path, tmp_path / "lake")
    assert not (tmp_path / "lake").exists()
