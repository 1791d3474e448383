"""One small shop worked by hand: every label, time, history, id, reject and count of the lake that Spark writes."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.lake.tables import Lake
from tests.spark.test_build_samples import rows_of
from usr_ray.config import Config, load_config

pytestmark = pytest.mark.spark

DAY = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
TIME = pa.timestamp("us", tz="UTC")
FIRST, LAST = dt.date(2026, 1, 1), dt.date(2026, 1, 3)
LATE = dt.datetime(2026, 1, 10, tzinfo=dt.UTC)


def at(hours: float, day: int = 1) -> dt.datetime:
    return DAY + dt.timedelta(days=day - 1, hours=hours)


# Windows: click 1 h, order 24 h, global 1 h.
SEARCH = [
    # id, request, user, item, time, position, query
    ("s1", "q1", "ann", "tea", at(10), 1, "hot drinks"),
    ("s2", "q1", "ann", "mug", at(10), 2, "hot drinks"),
    ("s3", "q2", "bob", "tea", at(12), 1, "tea"),
    ("s3", "q2", "bob", "tea", at(12), 1, "tea"),  # an exact duplicate
    ("s4", "q3", "ann", "tea", at(9, day=2), 1, "tea"),
]
FEED = [
    ("r1", "f1", "ann", "tea", at(10.5), 1, None),  # the same item half an hour later
    ("r2", "f2", "bob", "mug", at(12.5), None, None),
    ("r3", "f3", "cat", "jam", at(8, day=3), 1, None),  # a user and an item of the held-out date alone
]
SEARCH_CLICKS = [
    ("c1", "s1", "ann", "tea", at(11)),  # at the window's very end: counts
    ("c2", "s2", "ann", "mug", at(11) + dt.timedelta(microseconds=1)),  # a microsecond too late: rejected
    ("c3", None, "bob", "tea", at(12.25)),  # names no impression: the last of (bob, tea, search)
]
FEED_CLICKS = [("d1", "r2", "bob", "mug", at(12.6))]
ORDERS = [
    ("o1", "ann", "tea", at(11, day=2)),  # 24 h after c1, the window's very end: belongs to s1
    ("o2", "bob", "jam", at(13)),  # never clicked: rejected
    ("o3", "bob", "mug", at(13)),
]


def write(folder: Path, name: str, rows: list[tuple[Any, ...]], columns: list[str]) -> None:
    types = {"event_time": TIME, "position": pa.int32()}
    data = {c: pa.array([row[n] for row in rows], types.get(c, pa.string())) for n, c in enumerate(columns)}
    (folder / name).mkdir(parents=True)
    pq.write_table(pa.table(data), folder / name / "part.parquet")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    shown = ["impression_id", "request_id", "user_id", "item_id", "event_time", "position", "query"]
    write(folder, "search_impressions", SEARCH, shown)
    write(folder, "recommendation_impressions", FEED, shown)
    write_clicks_and_orders(folder, ORDERS)
    return folder


def write_clicks_and_orders(folder: Path, orders: list[tuple[Any, ...]]) -> None:
    clicked = ["click_id", "impression_id", "user_id", "item_id", "event_time"]
    write(folder, "search_clicks", SEARCH_CLICKS, clicked)
    write(folder, "recommendation_clicks", FEED_CLICKS, clicked)
    write(folder, "orders", orders, ["order_id", "user_id", "item_id", "event_time"])


def config(*overrides: str) -> Config:
    dates = ["data.train_dates='2026-01-01:2026-01-02'", "data.eval_dates='2026-01-03'", "vocabulary.min_count=1"]
    dates.append("limits.max_reject_share=1")  # one row of every kind of reject
    return load_config(None, [*dates, *overrides])


def build(spark: SparkSession, logs: Path, lake: Path, *overrides: str, **request: Any) -> Path:
    given = {"first": FIRST, "last": LAST, "watermark": LATE} | request
    build_samples(
        spark,
        config(*overrides),
        BuildRequest(logs=str(logs), lake=Lake(str(lake)), **given),
        Progress(write=lambda line: None),
    )
    return lake


@pytest.fixture(scope="module")
def lake(spark: SparkSession, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under a relative path, up to 25 hours after bob's last impression in search."""
    folder = tmp_path_factory.mktemp("lake")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build(spark, logs, Path("here/lake"), watermark=at(12) + dt.timedelta(hours=25))
    return folder / "here" / "lake"


def rows_by_id(lake: Path) -> dict[str, dict[str, Any]]:
    return {row["impression_id"]: row for row in rows_of(lake / "samples")}


def test_labels_are_those_worked_by_hand(lake: Path) -> None:
    found = {
        name: tuple(row[label] for label in ("is_click", "is_order", "is_click_global", "is_order_global"))
        for name, row in rows_by_id(lake).items()
    }
    assert found == {
        "s1": (1, 1, 1, 1),  # c1 and its order o1
        "s2": (0, 0, 0, 0),  # c2 came too late
        "s3": (1, 0, 1, 0),  # c3; bob ordered a mug, no tea
        "s4": (0, 0, 0, 0),  # o1 credits one click, yesterday's
        "r1": (0, 0, 1, 1),  # ann clicked the same tea in search at 11, and ordered it
        "r2": (1, 1, 1, 1),
        "r3": (0, 0, 0, 0),
    }


def test_times_dates_and_raw_ids_stay_beside_the_labels(lake: Path) -> None:
    rows = rows_by_id(lake)

    def utc(value: dt.datetime | None) -> dt.datetime | None:
        return value and value.replace(tzinfo=dt.UTC)

    assert (utc(rows["s1"]["click_time"]), utc(rows["s1"]["order_time"])) == (at(11), at(11, day=2))
    assert (rows["s2"]["click_time"], rows["r1"]["click_time"], rows["s3"]["order_time"]) == (None, None, None)
    assert {name: row["impression_date"].isoformat() for name, row in rows.items() if name in ("s1", "s4", "r3")} == {
        "s1": "2026-01-01",
        "s4": "2026-01-02",
        "r3": "2026-01-03",
    }
    assert [rows["r1"][c] for c in ("user_id", "item_id", "query", "scenario", "position")] == [
        "ann",
        "tea",
        None,
        "recommendation",
        1,
    ]
    assert rows["r2"]["position"] is None
    assert rows["s1"]["request_key"] == rows["s2"]["request_key"] != rows["s3"]["request_key"]


def test_histories_hold_what_was_done_strictly_before(lake: Path) -> None:
    rows = rows_by_id(lake)
    tea = rows["s1"]["item_id_index"]
    hot, plain = rows["s1"]["query_index"], rows["s3"]["query_index"]
    # s4, ann on day 2 at 09:00: the click c1 of day 1 at 11:00, 22 hours before; the order comes later.
    assert rows["s4"]["search_history_item_ids"] == [tea]
    assert rows["s4"]["search_history_actions"] == [1]
    assert rows["s4"]["search_history_ages_s"] == [22 * 3600.0]
    assert rows["s4"]["search_history_query_ids"] == [hot]
    assert rows["s4"]["recommendation_history_item_ids"] == []
    # r2, bob at 12:30: c3 at 12:15 is 900 s old.
    assert (rows["r2"]["search_history_item_ids"], rows["r2"]["search_history_ages_s"]) == ([tea], [900.0])
    assert rows["r2"]["search_history_query_ids"] == [plain]
    for name in ("s1", "s2", "s3", "r1", "r3"):
        assert rows[name]["search_history_item_ids"] == rows[name]["recommendation_history_item_ids"] == []


def test_vocabularies_know_the_training_dates_only(lake: Path) -> None:
    entries = rows_of(lake / "vocabularies")
    items = {e["value"]: (e["id"], e["count"]) for e in entries if e["feature"] == "item_id"}
    assert items == {"tea": (2, 4), "mug": (3, 2)}  # by falling count, unique impressions of days 1 and 2
    users = {e["value"]: e["id"] for e in entries if e["feature"] == "user_id"}
    assert users == {"ann": 2, "bob": 3}
    rows = rows_by_id(lake)
    assert (rows["r3"]["user_id_index"], rows["r3"]["item_id_index"]) == (1, 1)  # cat and jam: unknown
    assert rows["r3"]["query_index"] == rows["r1"]["query_index"] == 0  # no query: padding


def test_rejects_and_the_account_add_up(lake: Path) -> None:
    rejects = {
        (r["log"], json.loads(r["row"]).get("click_id") or json.loads(r["row"]).get("order_id")): r["reason"]
        for r in rows_of(lake / "rejects")
    }
    assert set(rejects) == {("search_clicks", "c2"), ("orders", "o2")}
    assert len(set(rejects.values())) == 2
    reports = {p.stem: json.loads(p.read_text()) for p in (lake / "reports").glob("*.json")}
    assert set(reports) == {"2026-01-01", "2026-01-02", "2026-01-03"}
    first = reports["2026-01-01"]
    assert first["samples"] == 5
    assert first["rows"]["search_impressions"] == {"rows_in": 4, "duplicates": 1, "rejects": 0, "used": 3}
    assert first["rows"]["search_clicks"] == {"rows_in": 3, "duplicates": 0, "rejects": 1, "used": 2}
    assert all(set(report["rows"]) == set(first["rows"]) for report in reports.values())
    assert reports["2026-01-03"]["rows"]["search_clicks"] == {"rows_in": 0, "duplicates": 0, "rejects": 0, "used": 0}
    search = first["scenarios"]["search"]
    assert (search["impressions"], search["clicks"], search["orders"], search["clicks_global"]) == (3, 2, 1, 2)
    feed = first["scenarios"]["recommendation"]
    assert feed["p_click_given_click_global"] == pytest.approx(1 / 2)  # r1 and r2 are clicked somewhere, r2 here


def test_maturity_counts_the_windows_to_the_watermark(lake: Path) -> None:
    mature = {name: row["is_mature"] for name, row in rows_by_id(lake).items()}
    # 25 h after 12:00 is the watermark itself: closed at both ends.
    assert mature == {"s1": True, "s2": True, "r1": True, "s3": True, "r2": False, "s4": False, "r3": False}


def test_delta_itself_refuses_labels_out_of_order(spark: SparkSession, lake: Path) -> None:
    # s2 was never clicked: an order of it breaks is_order <= is_click.
    bad = (
        spark.read.format("delta")
        .load(str(lake / "samples"))
        .filter("impression_id = 's2'")
        .withColumn("is_order", F.lit(1.0).cast("float"))
    )
    with pytest.raises(Exception, match=r"CHECK|constraint"):
        bad.write.format("delta").mode("append").save(str(lake / "samples"))


def test_the_other_rules_of_labels_a_day_for_the_global_one_and_orders_that_credit_an_impression(
    spark: SparkSession, tmp_path: Path
) -> None:
    """The shop with dan, who is shown tea in both scenarios and orders it without a click."""
    shown = ["impression_id", "request_id", "user_id", "item_id", "event_time", "position", "query"]
    more = {
        "search_impressions": [*SEARCH, ("s5", "q5", "dan", "tea", at(10), 1, "tea")],
        "recommendation_impressions": [*FEED, ("r4", "f4", "dan", "tea", at(11), 1, None)],
    }
    for name, rows in more.items():
        write(tmp_path / "logs", name, rows, shown)
    write_clicks_and_orders(tmp_path / "logs", [*ORDERS, ("o4", "dan", "tea", at(12))])
    rules = ("labels.global_span=day", "labels.order_without_click=credit_impression")
    rows = rows_by_id(build(spark, tmp_path / "logs", tmp_path / "lake", *rules))
    found = {n: tuple(row[c] for c in ("is_click", "is_order", "is_click_global")) for n, row in rows.items()}
    assert found == {
        "s1": (1, 1, 1),
        "s2": (0, 0, 0),
        "s3": (1, 0, 1),  # bob's, as r2 on the same day, but other items
        "s4": (0, 0, 0),  # another day than the click c1
        "r1": (0, 0, 1),
        "r2": (1, 1, 1),
        "r3": (0, 0, 0),
        "s5": (0, 0, 0),  # the order makes r4 clicked, but is no click that others could share
        "r4": (1, 1, 1),  # the last that dan was shown
    }
