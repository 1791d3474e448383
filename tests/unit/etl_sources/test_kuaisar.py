"""KuaiSAR: hand-written files in the release's byte format."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from etl.sources import kuaisar, writer
from tests.unit.plain_attribution import attribute, ingest, read_rows
from usr_ray.config import UserError
from usr_ray.config.terms import terms_of

pytestmark = pytest.mark.unit

FILES = {
    # Column order as in the release; numbers as pandas writes them; times in Beijing.
    "rec_inter.csv": """\
user_id,item_id,duration_ms,playing_time,timestamp,forward,like,follow,search_item_related,search,click,time
1,700,45400.0,60792.0,1684742000123.0,0,1,0,0,0,1,2023-05-22 15:53:20
1,701,9000.0,0.0,1684742000123.0,0,0,0,0,0,0,2023-05-22 15:53:20
1,700,45400.0,60792.0,1684742000123.0,0,1,0,0,0,1,2023-05-22 15:53:20
2,700,45400.0,10.0,1.684742e+12,1,1,0,0,1,0,2023-05-22 15:53:20
2,702,45400.0,10.0,,0,0,0,0,0,1,
NA,702,45400.0,10.0,1684742000124,0,0,0,0,0,1,2023-05-22 15:53:20
""",
    "src_inter.csv": """\
keyword,item_id,click_cnt,search_session_id,item_type,user_id,search_session_timestamp,search_source,search_session_time
"[20, 34, 3]",103656000000,2,1,VIDEO,1,1684763932919,USER_INPUT,2023-05-22 21:58:52
"[7]",700,0,2,VIDEO,2,1684763932920.0,USER_INPUT,2023-05-22 21:58:52
"[20, 34, 3]",700,0,1,LIVE,1,1684763932919,USER_INPUT,2023-05-22 21:58:52
"[]",701,1,3,VIDEO,2,1684763932921,USER_INPUT,2023-05-22 21:58:52
""",
    "user_features.csv": """\
user_id,onehot_feat1,onehot_feat2,search_active_level,reco_active_level
1,0,7,2,5
2,2,,0,1
""",
    "item_features.csv": """\
item_id,caption,author_id,item_type,upload_time,upload_type,music_id,first_level_category_id,first_level_category_name,\
first_level_category_name_en,second_level_category_id,second_level_category_name,second_level_category_name_en,\
third_level_category_id,third_level_category_name,third_level_category_name_en,fourth_level_category_id,\
fourth_level_category_name,fourth_level_category_name_en
700,"[1, 213,
24]",10,NORMAL,2023-04-22,LongImport,5,9,搞笑,Funny,136,搞笑段子,Funny joke,0,空,empty,0,空,empty
701,"[]",0,NORMAL,1970-01-01,,5,9,"搞笑, ""真"" 1",Funny,136,x,y,0,空,empty,0,空,empty
""",
}


def hand_written(folder: Path, **changed: str) -> Path:
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(changed.get(name.removesuffix(".csv"), text), encoding="utf-8")
    return folder


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return ingest("kuaisar", hand_written(tmp_path / "in"), tmp_path / "logs")


def test_recommendation_rows(logs: Path) -> None:
    at = 1_684_742_000_123_000
    shown = read_rows(logs, "recommendation_impressions")
    assert [(r["impression_id"], r["request_id"], r["event_time"]) for r in shown] == [
        ("r-1-700-1684742000123", "1-1684742000123", at),
        ("r-1-701-1684742000123", "1-1684742000123", at),
        ("r-1-700-1684742000123", "1-1684742000123", at),  # an exact duplicate stays one
        ("r-2-700-1684742000000", "2-1684742000000", at - 123_000),
        (None, None, None),  # no time and no user: for the ETL to reject
        (None, None, at + 1_000),
    ]
    assert {(r["position"], r["query"]) for r in shown} == {(None, None)}
    assert [r["impression_id"] for r in read_rows(logs, "recommendation_clicks")] == [
        "r-1-700-1684742000123",
        "r-1-700-1684742000123",
        None,
        None,
    ]
    # The like of a row that was not clicked stays: the ETL counts it.
    orders = [(r["order_id"], r["event_time"]) for r in read_rows(logs, "recommendation_orders")]
    assert orders == [("r-1-700-1684742000123", at)] * 2 + [("r-2-700-1684742000000", at - 123_000)]


def test_search_rows(logs: Path) -> None:
    at = 1_684_763_932_919_000
    shown = read_rows(logs, "search_impressions")
    assert [(r["impression_id"], r["request_id"], r["item_id"], r["query"], r["event_time"]) for r in shown] == [
        ("s-1-1-103656000000", "1-1", "103656000000", "20 34 3", at),
        ("s-2-2-700", "2-2", "700", "7", at + 1_000),
        ("s-1-1-700", "1-1", "700", "20 34 3", at),
        ("s-2-3-701", "2-3", "701", "", at + 2_000),
    ]
    assert [r["impression_id"] for r in read_rows(logs, "search_clicks")] == ["s-1-1-103656000000", "s-2-3-701"]
    assert terms_of(shown[0]["query"]) == ["20", "34", "3"]
    assert not (logs / "search_orders").exists()  # unknown, which is not the same as none
    assert not (logs / "orders").exists()


def test_labels_follow(tmp_path: Path) -> None:
    bad_rows = FILES["rec_inter.csv"].splitlines(keepends=True)[:-2]
    folder = hand_written(tmp_path / "in", rec_inter="".join(bad_rows))
    logs = ingest("kuaisar", folder, tmp_path / "logs", "kuaisar.order_column=forward")
    hour_us = 3_600_000_000
    windows = {"click_us": hour_us, "order_us": hour_us, "global_us": 12 * hour_us}
    labels = attribute(logs, ["recommendation"], **windows, orders_by_scenario=True)
    assert labels.is_click == {"r-1-700-1684742000123"}
    assert labels.is_order == set()
    assert [o["order_id"] for o in labels.rejected_orders] == ["r-2-700-1684742000000"]


def test_features(logs: Path) -> None:
    users = pq.read_table(logs / "users")
    assert users.column_names == ["user_id", *kuaisar.USER_CATEGORIES, "rec_active_level"]
    assert [list(row.values()) for row in users.to_pylist()] == [["1", "0", "7", "2", "5"], ["2", "2", None, "0", "1"]]
    first, second = read_rows(logs, "items")
    assert first == {
        "item_id": "700",
        "author_id": "10",
        "item_type": "NORMAL",
        "upload_type": "LongImport",
        "first_level_category_id": "9",
        "second_level_category_id": "136",
        "third_level_category_id": "0",
        "fourth_level_category_id": "0",
        "caption": "[1, 213,\n24]",
    }
    assert terms_of(first["caption"]) == ["1", "213", "24"]
    assert terms_of(second["caption"]) == []
    assert (second["author_id"], second["upload_type"]) == (None, None)


def test_files_of_many_blocks_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, row, *_ = FILES["rec_inter.csv"].splitlines()
    rows = [row.replace("1,700", f"{n},{n % 7}", 1) for n in range(3_000)]
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 10_000)
    monkeypatch.setattr(writer, "_PROGRESS_EVERY", 1_000)
    folder = hand_written(tmp_path / "in", rec_inter="\n".join([header, *rows]) + "\n")
    logs = ingest("kuaisar", folder, tmp_path / "logs")
    shown = pq.read_table(logs / "recommendation_impressions")
    assert shown["user_id"].to_pylist() == [str(n) for n in range(3_000)]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = hand_written(tmp_path / "in", src_inter="user_id,item_id\n1,2\n")
    with pytest.raises(UserError, match=r"src_inter.csv: no column keyword, click_cnt, search_session_id, search_ses"):
        ingest("kuaisar", folder, tmp_path / "logs")
    (folder / "item_features.csv").unlink()
    with pytest.raises(UserError, match=r"no item table \(item_features\*.csv\)"):
        ingest("kuaisar", folder, tmp_path / "logs")
    with pytest.raises(UserError, match=r"source kuaisar writes \['search', 'recommendation'\]"):
        ingest("kuaisar", folder, tmp_path / "logs", 'scenarios=["feed"]')
    assert not (tmp_path / "logs").exists()


def test_orders_of_search_that_nobody_logged_are_said_unless_the_configuration_says_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hand_written(tmp_path / "in")
    ingest("kuaisar", folder, tmp_path / "logs")
    assert 'no log search_orders: set labels.no_order_scenarios = ["search"]' in capsys.readouterr().err
    ingest("kuaisar", folder, tmp_path / "again", 'labels.no_order_scenarios=["search"]')
    assert "search_orders" not in capsys.readouterr().err
