"""JDsearch: the real sample, read again by hand, and hand-written rows."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from etl.sources import jdsearch
from tests.unit.plain_attribution import attribute, ingest, read_rows
from usr_ray.config import UserError
from usr_ray.config.terms import terms_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data" / "jdsearch-sample"
DAY_US, SECOND_US = 86_400_000_000, 1_000_000
BASE_US = 1_667_260_800_000_000  # 2022-11-01T00:00:00Z
HEADER = (
    "query\tcandidate_wid_list\tcandidate_label_list\thistory_qry_list\thistory_wid_list\thistory_type_list\t"
    "history_time_list"
)
PRODUCTS = (
    "wid\tname\tbrand_id\tbrand_name\tcate_id_1\tcate_name_1\tcate_id_2\tcate_name_2\tcate_id_3\tcate_name_3\tcate_id_4\t"
    "cate_name_4\tshop_id\n"
    'w1\ta"b\x18c\tb1\tx\tc1\tx\tc2\tx\tc3\tx\t\tx\ts1\n'
)
SEARCH_ROW = "5\x187\tw1_w2_w3_w4\t3.0_2.0_1.0_0.0\t-1_9\x188_-1\tw1_w5_w1\tCLICK_ORD_CART\t0_50_7_100"


def hand_written(folder: Path, *rows: str, header: str = HEADER) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "user_behavior_data.txt").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    (folder / "product_meta_data.txt").write_text(PRODUCTS, encoding="utf-8")
    return folder


def test_candidates_become_a_search_in_an_order_that_tells_nothing(tmp_path: Path) -> None:
    logs = ingest("jdsearch", hand_written(tmp_path / "in", SEARCH_ROW), tmp_path / "logs", "jdsearch.num_days=1")
    shown = [r for r in read_rows(logs, "search_impressions") if "h" not in r["impression_id"]]
    assert {r["item_id"] for r in shown} == {"w1", "w2", "w3", "w4"}
    assert {(r["request_id"], r["user_id"], r["query"], r["event_time"], r["position"]) for r in shown} == {
        ("0", "0", "5 7", BASE_US, None)
    }
    labels = attribute(logs, ["search"], click_us=1, order_us=1, global_us=1, orders_by_scenario=True)
    clicked = {labels.impressions[i]["item_id"] for i in labels.is_click if "h" not in i}
    ordered = {labels.impressions[i]["item_id"] for i in labels.is_order if "h" not in i}
    assert clicked == {"w1", "w2", "w3"}  # bought, put in the cart, clicked
    assert ordered == {"w1"}


def test_history_events_keep_their_gaps_and_end_before_the_first_search(tmp_path: Path) -> None:
    logs = ingest("jdsearch", hand_written(tmp_path / "in", SEARCH_ROW), tmp_path / "logs", "jdsearch.num_days=8")
    events = {
        r["impression_id"]: (s, r["item_id"], r["query"], (r["event_time"] - BASE_US) // SECOND_US)
        for s in ("search", "recommendation")
        for r in read_rows(logs, f"{s}_impressions")
        if "h" in r["impression_id"]
    }
    assert events == {
        "0-h2": ("recommendation", "w1", None, -100),
        "0-h1": ("search", "w5", "9 8", -107),
        "0-h0": ("recommendation", "w1", None, -157),
    }
    assert [r["order_id"] for r in read_rows(logs, "search_orders") if "h" in r["order_id"]] == ["0-h1"]
    assert read_rows(logs, "recommendation_orders") == []
    labels = attribute(logs, ["search", "recommendation"], click_us=1, order_us=1, global_us=1, orders_by_scenario=True)
    assert set(events) <= labels.is_click  # so the ETL takes them into the histories
    assert labels.rejected_clicks == labels.rejected_orders == []


def test_an_event_without_a_gap_still_lies_before_the_search(tmp_path: Path) -> None:
    row = "5\tw1\t0.0\t-1\tw2\tCLICK\t0_0"
    logs = ingest("jdsearch", hand_written(tmp_path / "in", row), tmp_path / "logs")
    (event,) = read_rows(logs, "recommendation_impressions")
    assert event["event_time"] == BASE_US - SECOND_US


def test_searches_are_spread_over_the_days_and_shuffled_anew_for_each_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jdsearch, "ROWS_PER_CHUNK", 7)
    monkeypatch.setattr(jdsearch, "PROGRESS_EVERY", 100)
    items = [f"w{n}" for n in range(10)]
    row = f"5\t{'_'.join(items)}\t{'_'.join(['1.0'] + ['0.0'] * 9)}\t\t\t\t"
    logs = ingest("jdsearch", hand_written(tmp_path / "in", *[row] * 400), tmp_path / "logs", "jdsearch.num_days=4")
    shown = read_rows(logs, "search_impressions")
    assert len(shown) == 4_000
    days = [(r["event_time"] - BASE_US) / DAY_US for r in shown[::10]]
    assert set(days) == {0, 1, 2, 3}
    assert min(days.count(day) for day in range(4)) > 70
    places = [n % 10 for n, r in enumerate(shown) if r["item_id"] == "w0"]  # where the clicked candidate stands
    assert min(places.count(place) for place in range(10)) > 20
    again = ingest("jdsearch", tmp_path / "in", tmp_path / "again", "jdsearch.num_days=4")
    assert read_rows(again, "search_impressions") == shown


@pytest.mark.skipif(not REAL.is_dir(), reason="the real logs are not beside the project")
def test_every_real_row_is_accounted_for(tmp_path: Path) -> None:
    logs = ingest("jdsearch", REAL, tmp_path / "logs")
    with (REAL / "user_behavior_data_sample.txt").open(encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    candidates = sum(len(row[1].split("_")) for row in rows)
    events = [query for row in rows for query in row[3].split("_")]
    assert (candidates, len(events)) == (172, 48)
    asked = sum(query != "-1" for query in events)
    assert pq.read_table(logs / "search_impressions").num_rows == candidates + asked
    assert pq.read_table(logs / "recommendation_impressions").num_rows == len(events) - asked
    labels = attribute(logs, ["search", "recommendation"], click_us=1, order_us=1, global_us=1, orders_by_scenario=True)
    clicked_candidates = [i for i in labels.is_click if "h" not in i]
    assert len(clicked_candidates) == sum(label == "1.0" for row in rows for label in row[2].split("_")) == 4
    assert len(labels.is_order) == sum(kind == "ORD" for row in rows for kind in row[5].split("_")) == 9
    assert labels.rejected_clicks == labels.rejected_orders == []
    queries = {r["query"] for r in read_rows(logs, "search_impressions") if r["user_id"] == "1"}
    assert queries == {"2437437 60677689 39206305"}
    times = pq.read_table(logs / "search_impressions")["event_time"].to_pylist()
    assert {t.time() for t in times if t >= dt.datetime(2022, 11, 1, tzinfo=dt.UTC)} == {dt.time()}
    items = pq.read_table(logs / "items")
    assert items.num_rows == 409
    assert items.column_names == ["item_id", *jdsearch.PRODUCT_COLUMNS]
    with (REAL / "product_meta_data_sample.txt").open(encoding="utf-8") as file:
        named = {wid: (name, brand) for wid, name, _, brand, *_ in (line.split("\t") for line in file)}
    for item in items.to_pylist():  # term ids, as published: a query's words are among them
        name, brand = named[item["item_id"]]
        assert terms_of(item["name"]) == list(dict.fromkeys(name.split("\x18")))
        assert terms_of(item["brand_name"] or "") == list(dict.fromkeys(filter(None, brand.split("\x18"))))
    terms = {term for item in items.to_pylist() for term in terms_of(item["name"])}
    asked = {term for query in events if query != "-1" for term in query.split("\x18")}
    assert asked & terms


def test_products_with_quotes_and_gaps(tmp_path: Path) -> None:
    logs = ingest("jdsearch", hand_written(tmp_path / "in", SEARCH_ROW), tmp_path / "logs")
    assert read_rows(logs, "items") == [
        {
            "item_id": "w1",
            "brand_id": "b1",
            "cate_id_1": "c1",
            "cate_id_2": "c2",
            "cate_id_3": "c3",
            "cate_id_4": None,
            "shop_id": "s1",
            "name": 'a"b\x18c',
            "brand_name": "x",
        }
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("5\tw1_w2\t1.0\t\t\t\t", r"line 2: lists of different lengths \(candidates 2, labels 1, history queries 0"),
        ("5\tw1\t1.0\t-1\tw1\tCLICK\t0", r"items 1, types 1, gaps 1\); a candidate needs a label, an event a query"),
        ("5\tw1\tyes\t\t\t\t", r"line 2: labels and gaps must be numbers \(could not convert string to float: 'yes'\)"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ingest("jdsearch", hand_written(tmp_path / "in", row), tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"user_behavior_data.txt: no column candidate_wid_list"):
        ingest("jdsearch", hand_written(tmp_path / "in", header="query\tx"), tmp_path / "logs")
    hand_written(tmp_path / "in", SEARCH_ROW)
    (tmp_path / "in" / "product_meta_data.txt").write_text("wid\tname\n")
    with pytest.raises(UserError, match=r"product_meta_data.txt: no column brand_id, cate_id_1"):
        ingest("jdsearch", tmp_path / "in", tmp_path / "logs")
    (tmp_path / "in" / "product_meta_data.txt").unlink()
    with pytest.raises(UserError, match=r"no product table \(product_meta_data\*.txt\)"):
        ingest("jdsearch", tmp_path / "in", tmp_path / "logs")
    with pytest.raises(UserError, match=r"source jdsearch writes \['search', 'recommendation'\]"):
        ingest("jdsearch", tmp_path / "in", tmp_path / "logs", 'scenarios=["search"]')
