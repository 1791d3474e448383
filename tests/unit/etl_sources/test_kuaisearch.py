"""KuaiSearch: the real demo sessions counted again, and hand-written sessions with the traps of the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from etl.sources import kuaisearch
from tests.unit.plain_attribution import attribute, ingest, read_rows
from usr_ray.config import UserError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data" / "kuaisearch-demo"
ONE_SCENARIO = 'scenarios=["search"]'
BASE_US = 1_735_689_600_000_000  # 2025-01-01T00:00:00Z
MINUTE_US = 60_000_000


def session(number: int = 1, **values: Any) -> dict[str, Any]:
    return {
        "user_id": 5,
        "session_id": number,
        "impressed_item_ids": [30, 10, 20],
        "clicked_item_ids": [],
        "purchased_item_ids": [],
        "time_index": 100,
        "query": "外套",
        "split": "train",
    } | values


def hand_written(folder: Path, *sessions: Any) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in sessions]
    (folder / "recall.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def written(tmp_path: Path, *sessions: Any, overrides: tuple[str, ...] = ()) -> Path:
    folder = hand_written(tmp_path / "in", *sessions)
    return ingest("kuaisearch", folder, tmp_path / "logs", ONE_SCENARIO, *overrides)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real logs are not beside the project")
@pytest.mark.parametrize("chunk", [200_000, 500])
def test_every_real_session_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(kuaisearch, "IMPRESSIONS_PER_CHUNK", chunk)
    logs = ingest("kuaisearch", REAL, tmp_path / "logs", file=ROOT / "jobs" / "configs" / "kuaisearch.toml")
    sessions = [json.loads(line) for line in (REAL / "recall.jsonl").open(encoding="utf-8")]
    assert (
        pq.read_table(logs / "search_impressions").num_rows
        == sum(len(s["impressed_item_ids"]) for s in sessions)
        == 11_069
    )
    assert pq.read_table(logs / "search_clicks").num_rows == sum(len(s["clicked_item_ids"]) for s in sessions) == 278
    assert pq.read_table(logs / "orders").num_rows == 7
    labels = attribute(logs, ["search"], click_us=10 * MINUTE_US, order_us=60 * MINUTE_US, global_us=10 * MINUTE_US)
    clicked = {(str(s["session_id"]), str(item)) for s in sessions for item in s["clicked_item_ids"]}
    bought = {(str(s["session_id"]), str(item)) for s in sessions for item in s["purchased_item_ids"]}
    assert {(labels.impressions[i]["request_id"], labels.impressions[i]["item_id"]) for i in labels.is_click} == clicked
    found = {(labels.impressions[i]["request_id"], labels.impressions[i]["item_id"]) for i in labels.is_order}
    assert found == bought & clicked
    assert [(o["order_id"], o["item_id"]) for o in labels.rejected_orders] == [
        ("173", "26833")
    ]  # bought, never clicked
    assert labels.rejected_clicks == []


def test_a_session_becomes_impressions_in_display_order(tmp_path: Path) -> None:
    logs = written(tmp_path, session(clicked_item_ids=[10], purchased_item_ids=[10]), "", session(2, time_index=101))
    shown = read_rows(logs, "search_impressions")
    assert [(r["impression_id"], r["item_id"], r["position"]) for r in shown] == [
        ("1-0", "30", 0),
        ("1-1", "10", 1),
        ("1-2", "20", 2),
        ("2-0", "30", 0),
        ("2-1", "10", 1),
        ("2-2", "20", 2),
    ]
    assert {(r["request_id"], r["user_id"], r["query"], r["event_time"]) for r in shown} == {
        ("1", "5", "外套", BASE_US + 100 * MINUTE_US),
        ("2", "5", "外套", BASE_US + 101 * MINUTE_US),
    }
    at = BASE_US + 100 * MINUTE_US
    assert read_rows(logs, "search_clicks") == [
        {"click_id": "1-10", "impression_id": "1-1", "user_id": "5", "item_id": "10", "event_time": at + 15_000_000}
    ]
    assert read_rows(logs, "orders") == [
        {"order_id": "1", "user_id": "5", "item_id": "10", "event_time": at + 30_000_000}
    ]


def test_oddities_are_kept_for_the_etl_to_count(tmp_path: Path) -> None:
    odd = session(impressed_item_ids=[7, 8, 7], clicked_item_ids=[7, 7, 99], purchased_item_ids=[8], query="")
    logs = written(tmp_path, odd)
    # Shown twice: clicked where it stands first. Not shown: a click without impression. Bought unclicked: an order.
    assert [(c["click_id"], c["impression_id"]) for c in read_rows(logs, "search_clicks")] == [
        ("1-7", "1-0"),
        ("1-99", None),
    ]
    assert [o["item_id"] for o in read_rows(logs, "orders")] == ["8"]
    assert {r["query"] for r in read_rows(logs, "search_impressions")} == {""}


def test_base_time_and_step_are_configurable(tmp_path: Path) -> None:
    settings = ("kuaisearch.base_time=2024-06-01T02:00:00+02:00", "kuaisearch.step=2 s")
    logs = written(tmp_path, session(clicked_item_ids=[20]), overrides=settings)
    at = 1_717_200_000_000_000 + 200_000_000  # 2024-06-01T00:00:00Z, 100 steps of 2 s
    assert read_rows(logs, "search_impressions")[0]["event_time"] == at
    assert read_rows(logs, "search_clicks")[0]["event_time"] == at + 500_000


def test_features_are_written_only_when_ids_are_one_numbering(tmp_path: Path) -> None:
    folder = hand_written(tmp_path / "in", session())
    user = {
        "user_id": 5,
        "gender": "F",
        "age_bucket": "31-40",
        "fre_country": "x",
        "fre_province": None,
        "fre_city": "y",
    }
    item = {
        "item_id": 30,
        "item_title": "t",
        "brand_name": "x",
        "brand_id": 1,
        "seller_id": 2,
        "category_level1_id": 3,
        "category_level2_id": 4,
        "category_level3_id": 0,
    }
    (folder / "users.jsonl").write_text(json.dumps(user) + "\n")
    (folder / "items.jsonl").write_text(json.dumps(item) + "\n")
    plain = ingest("kuaisearch", folder, tmp_path / "plain", ONE_SCENARIO)
    assert sorted(path.name for path in plain.iterdir()) == [
        "_ingest.json",
        "orders",
        "search_clicks",
        "search_impressions",
    ]
    joined = ingest("kuaisearch", folder, tmp_path / "joined", ONE_SCENARIO, "kuaisearch.write_features=true")
    assert read_rows(joined, "users") == [
        {"user_id": "5", "gender": "F", "age_bucket": "31-40", "fre_province": None, "fre_city": "y"}
    ]
    assert read_rows(joined, "items") == [
        {
            "item_id": "30",
            "brand_id": "1",
            "seller_id": "2",
            "category_level1_id": "3",
            "category_level2_id": "4",
            "category_level3_id": "0",
            "item_title": "t",
            "brand_name": "x",
        }
    ]
    (folder / "items.jsonl").write_text('{"item_id": 30}\n')
    with pytest.raises(UserError, match=r"items.jsonl: no column brand_id, seller_id"):
        ingest("kuaisearch", folder, tmp_path / "bad", ONE_SCENARIO, "kuaisearch.write_features=true")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((session(), "{not json"), r"recall.jsonl: line 2 is not JSON .*; write one object a line"),
        ((session(user_id="NA"),), r"line 1: user_id must be a whole number, got 'NA'; see KuaiSearch's recall.jsonl"),
        (({"user_id": 1},), r"line 1: session_id must be a whole number, got 'None'"),
        ((session(clicked_item_ids="[1]"),), r"line 1: clicked_item_ids must be a list, got '\[1\]'"),
        (([1],), r"line 1: user_id must be a whole number"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, lines: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        written(tmp_path, *lines)
    assert not (tmp_path / "logs").exists()


def test_other_scenarios_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source kuaisearch writes \['search'\]"):
        ingest("kuaisearch", hand_written(tmp_path / "in", session()), tmp_path / "logs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no session log \(recall\*.jsonl\)"):
        ingest("kuaisearch", tmp_path / "empty", tmp_path / "logs", ONE_SCENARIO)
