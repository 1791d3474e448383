"""KuaiRand: real files counted again with pandas, and hand-written rows in the release's CSV format."""

from __future__ import annotations

import datetime as dt
import math
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from etl.sources.kuairand import DEFAULT_TAB_GROUPS
from tests.unit.plain_attribution import attribute, ingest, read_rows
from usr_ray.config import UserError, load_config

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data" / "kuairand-pure"
CONFIG = ROOT / "jobs" / "configs" / "kuairand.toml"
LOG_START = dt.datetime(2022, 4, 24, tzinfo=dt.UTC)
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason="the real logs are not beside the project")

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{n}" for n in range(18))
)
VIDEO_HEADER = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)
NOTHING_EARLIER = {"item_earlier_impressions": 0.0, "item_earlier_long_view_log_odds": 0.0}
FULL_SCENARIOS = 'scenarios=["main", "tab_0", "tab_4", "rest"]'


@pytest.fixture(scope="module")
def real_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingest("kuairand", REAL, tmp_path_factory.mktemp("kuairand") / "logs", file=CONFIG)


@pytest.fixture(scope="module")
def raw() -> pd.DataFrame:
    frame = pd.read_parquet(REAL / "rec_20220425_20220430.parquet")
    groups = {tab: name for name, tabs in DEFAULT_TAB_GROUPS.items() for tab in tabs}
    return frame.assign(scenario=frame["tab"].map(groups).fillna("rest"))


def in_the_log(logs: Path, name: str) -> pa.Table:
    """Rows that are no long view from before the log."""
    table = pq.read_table(logs / name)
    return table.filter(pc.greater_equal(table["event_time"], pa.scalar(LOG_START, table["event_time"].type)))


@needs_real_files
def test_every_real_row_is_accounted_for(real_logs: Path, raw: pd.DataFrame) -> None:
    assert len(raw) == 94_784
    for scenario, rows in raw.groupby("scenario"):
        shown = in_the_log(real_logs, f"{scenario}_impressions")
        assert shown.num_rows == len(rows)
        assert len(set(shown["impression_id"].to_pylist())) == len(
            rows[["user_id", "video_id", "time_ms", "tab"]].drop_duplicates()
        )
        assert in_the_log(real_logs, f"{scenario}_clicks").num_rows == int(rows["is_click"].sum())
        assert in_the_log(real_logs, f"{scenario}_orders").num_rows == int(rows["long_view"].sum())
    assert pq.read_table(real_logs / "users").num_rows == 27_285
    assert pq.read_table(real_logs / "items").num_rows == 7_583


@needs_real_files
def test_attribution_gives_back_the_real_columns(real_logs: Path, raw: pd.DataFrame) -> None:
    minute_us = 60_000_000
    scenarios = ["tab_0", "tab_4", "rest"]  # a quarter of the rows: the slow reference takes seconds for "main"
    raw = raw[raw["scenario"].isin(scenarios)]
    labels = attribute(
        real_logs,
        scenarios,
        click_us=30 * minute_us,
        order_us=30 * minute_us,
        global_us=60 * minute_us,
        orders_by_scenario=True,
    )
    key = ["user_id", "video_id", "time_ms", "tab"]
    best = raw.groupby(key, as_index=False)[["is_click", "long_view"]].max()  # rows logged twice count once
    ids = best[key].astype(str).agg("-".join, axis=1)
    assert set(labels.impressions) == set(ids)
    assert labels.is_click == set(ids[best["is_click"] == 1])
    assert labels.is_order == set(ids[(best["is_click"] == 1) & (best["long_view"] == 1)])
    # A long view without a click is nobody's: rejected, never a label.
    assert {order["order_id"] for order in labels.rejected_orders} == set(
        ids[(best["is_click"] == 0) & (best["long_view"] == 1)]
    )
    assert len(labels.rejected_orders) == 73
    assert labels.rejected_clicks == []


@needs_real_files
def test_real_times_and_requests(real_logs: Path, raw: pd.DataFrame) -> None:
    shown = pq.read_table(real_logs / "tab_4_impressions").to_pandas()
    rows = raw[raw["scenario"] == "tab_4"]
    assert (shown["event_time"] == pd.to_datetime(rows["time_ms"].to_numpy(), unit="ms", utc=True)).all()
    assert shown["request_id"].nunique() == len(rows[["user_id", "time_ms"]].drop_duplicates())
    assert shown["position"].isna().all()
    assert shown["query"].isna().all()


@needs_real_files
def test_features_hold_profiles_and_nothing_that_follows_from_outcomes(real_logs: Path) -> None:
    users, items = pq.read_table(real_logs / "users"), pq.read_table(real_logs / "items")
    config = load_config(CONFIG).features
    assert set(config.user_categories) | set(config.user_numbers) <= set(users.column_names)
    assert set(config.item_categories) | set(config.item_numbers) <= set(items.column_names)
    for name in (*users.column_names, *items.column_names):
        if "_earlier_" in name:  # counted before the log begins: test_what_users_did_before_the_log_...
            continue
        assert not any(word in name for word in ("click", "like", "view", "watch", "play", "finish", "show"))
    assert users["follow_user_num"][:2].to_pylist() == [514.0, 457.0]
    assert items["video_duration_s"][:2].to_pylist() == [87.433, 218.066]
    assert items["video_duration_s"].null_count == 239
    assert items["tag"].null_count == 96


def hand_written(folder: Path, *rows: str, header: str = LOG_HEADER) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "log_standard_4_22_to_5_08_pure.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "user_features_pure.csv").write_text(
        f'{USER_HEADER}\n0,full_active,0,0,1,5,"(0,10]",0,0,0,0,107,61-90{",0" * 18}\n'
    )
    (folder / "video_features_basic_pure.csv").write_text(
        f'{VIDEO_HEADER}\n7,11,NORMAL,2022-04-10,LongImport,0.0,5000.0,720.0,1280.0,99,9.0,"39,2"\n8,,AD,2022-04-10,,0.0,,,,,,\n'
    )
    return folder


def row(
    *,
    user: int = 0,
    video: int = 7,
    ms: int,
    click: int = 1,
    view: int = 1,
    like: int = 0,
    play: int,
    tab: int = 1,
    hour: int = 0,
) -> str:
    return f"{user},{video},20220425,{hour},{ms},{click},{like},0,0,0,0,{view},{play},9000,0,0,0,0,{tab}"


def order_times(logs: Path, scenario: str) -> dict[str, int]:
    return {r["order_id"]: r["event_time"] for r in read_rows(logs, f"{scenario}_orders")}


def test_an_action_is_known_after_the_playing_time_but_before_the_next_click_of_the_pair(tmp_path: Path) -> None:
    rows = (
        row(ms=1_000, play=60_000),  # opened again after 9 s: known just before
        row(ms=10_000, play=500),
        row(ms=20_000, play=-1),  # a negative playing time is no time
        row(ms=1_000, play=60_000, tab=4),  # another scenario: its own clicks
        row(ms=1_000, play=60_000, video=8),  # another video
        row(ms=30_000, play=2_000, click=0),  # no click, an action all the same
    )
    logs = ingest("kuairand", hand_written(tmp_path / "in", *rows), tmp_path / "logs", FULL_SCENARIOS)
    assert order_times(logs, "main") == {
        "0-7-1000-1": 9_999_999,
        "0-7-10000-1": 10_500_000,
        "0-7-20000-1": 20_000_000,
        "0-8-1000-1": 61_000_000,
        "0-7-30000-1": 32_000_000,
    }
    assert order_times(logs, "tab_4") == {"0-7-1000-4": 61_000_000}


def test_a_row_logged_twice_with_another_hour_stays_a_duplicate(tmp_path: Path) -> None:
    rows = (row(ms=1_000, play=5_000, hour=0), row(ms=1_000, play=5_000, hour=100), row(ms=3_000, play=1))
    logs = ingest("kuairand", hand_written(tmp_path / "in", *rows), tmp_path / "logs", FULL_SCENARIOS)
    for log in ("main_impressions", "main_clicks", "main_orders"):
        first, second, _ = read_rows(logs, log)
        assert first == second
    assert order_times(logs, "main") == {"0-7-1000-1": 2_999_999, "0-7-3000-1": 3_001_000}


def test_groups_and_action_are_configurable(tmp_path: Path) -> None:
    rows = (
        row(ms=1, play=1, like=1),
        row(ms=2, play=1, tab=9),
        row(ms=3, play=1, tab=5, like=1),
        row(ms=4, play=1, tab=3),
    )
    settings = [
        'scenarios=["far", "near"]',
        "kuairand.tab_groups.near=[1]",
        "kuairand.tab_groups.far=[5, 3]",
        "kuairand.order_column=is_like",
    ]
    logs = ingest("kuairand", hand_written(tmp_path / "in", *rows), tmp_path / "logs", *settings)
    assert [r["impression_id"] for r in read_rows(logs, "far_impressions")] == ["0-7-3-5", "0-7-4-3"]
    assert [r["impression_id"] for r in read_rows(logs, "near_impressions")] == [
        "0-7-1-1",
        "0-7-2-9",
    ]  # 9: the last one
    assert [r["order_id"] for r in read_rows(logs, "near_orders")] == ["0-7-1-1"]
    assert read_rows(logs, "items") == [
        {
            "item_id": "7",
            "author_id": "11",
            "video_type": "NORMAL",
            "upload_type": "LongImport",
            "music_id": "99",
            "music_type": "9.0",
            "tag": "39",
            "tags": ["39", "2"],
            "video_duration_s": 5.0,
            **NOTHING_EARLIER,
        },
        {
            "item_id": "8",
            "author_id": None,
            "video_type": "AD",
            "upload_type": None,
            "music_id": None,
            "music_type": None,
            "tag": None,
            "tags": None,
            "video_duration_s": None,
            **NOTHING_EARLIER,
        },
    ]
    (user,) = read_rows(logs, "users")
    assert (user["follow_user_num_range"], user["register_days"]) == ("(0,10]", 107.0)


def test_what_users_did_before_the_log_is_history_and_counts(tmp_path: Path) -> None:
    folder = hand_written(tmp_path / "in", row(ms=86_400_000 * 3 + 5_000, play=1))
    hour_ms, evening_ms = 3_600_000, 86_400_000 * 3 - 3_600_000
    # User 0 was last active on the log's first UTC day, which is built: its events move to the evening before.
    sequences = {
        "user_id": [0, 5],
        "history_len": [70, 2],
        "last_time_ms": [86_400_000 * 3 + 1, 4_000],
        "watch_seq": [[7, 8, 7], [8, 8]],
        "long_watch_seq": [[9, 8, 7], [8]],
        "like_seq": [[], [8]],
    }
    pq.write_table(pa.table(sequences), folder / "user_sequences_until_1970.parquet")
    logs = ingest("kuairand", folder, tmp_path / "logs", FULL_SCENARIOS)
    for log, key in (("main_impressions", "impression_id"), ("main_clicks", "click_id"), ("main_orders", "order_id")):
        events = [r for r in read_rows(logs, log) if "earlier" in r[key]]
        assert [(r["user_id"], r["item_id"], r["event_time"] // 1000) for r in events] == [
            ("0", "9", evening_ms - 2 * hour_ms),
            ("0", "8", evening_ms - hour_ms),
            ("0", "7", evening_ms),
            ("5", "8", 4_000),
        ]
    assert len(read_rows(logs, "tab_4_impressions")) == 0
    # Of the five in watch_seq two are no long view (below); each stands in its list's place before the evening.
    whole = ingest("kuairand", folder, tmp_path / "whole", FULL_SCENARIOS, "kuairand.all_earlier_impressions=true")
    more = [r for r in read_rows(whole, "main_impressions") if r not in read_rows(logs, "main_impressions")]
    assert [(r["user_id"], r["item_id"], r["event_time"] // 1000) for r in more] == [
        ("0", "7", evening_ms - 2 * hour_ms),
        ("5", "8", 4_000 - hour_ms),
    ]
    assert read_rows(whole, "main_clicks") == read_rows(logs, "main_clicks")
    # Read from the newest end, the impressions are: 7 long, 8 long, 7 not (9 is in the way); 8 long, 8 not. So 3 of 5
    # are long; with one more of each, ten impressions at 4 / 7 come on top.
    long, other = 10 * 4 / 7, 10 * 3 / 7
    assert (user := read_rows(logs, "users")[0])["user_earlier_impressions"] == 70.0
    assert user["user_earlier_long_view_log_odds"] == pytest.approx(math.log((2 + long) / (1 + other)))
    first, second = read_rows(logs, "items")
    assert (first["item_earlier_impressions"], second["item_earlier_impressions"]) == (2.0, 3.0)
    assert first["item_earlier_long_view_log_odds"] == pytest.approx(math.log((1 + long) / (1 + other)))
    assert second["item_earlier_long_view_log_odds"] == pytest.approx(math.log((2 + long) / (1 + other)))


def test_an_action_that_is_no_long_view_has_no_earlier_orders(tmp_path: Path) -> None:
    folder = hand_written(tmp_path / "in", row(ms=86_400_000 * 3, play=1, like=1))
    sequences = {"user_id": [0], "history_len": [1], "last_time_ms": [9], "watch_seq": [[7]], "long_watch_seq": [[7]]}
    pq.write_table(pa.table(sequences), folder / "user_sequences_until_1970.parquet")
    logs = ingest("kuairand", folder, tmp_path / "logs", FULL_SCENARIOS, "kuairand.order_column=is_like")
    assert len(read_rows(logs, "main_clicks")) == 2
    assert len(read_rows(logs, "main_orders")) == 1


def refused(tmp_path: Path, input_dir: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        ingest("kuairand", input_dir, tmp_path / "logs", *(overrides or [FULL_SCENARIOS]))
    assert not (tmp_path / "logs").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = hand_written(tmp_path / "in", row(ms=1, play=1))
    message = refused(tmp_path, folder, FULL_SCENARIOS, "kuairand.order_column=is_bought")
    assert "log_standard_4_22_to_5_08_pure.csv: no column is_bought; it has: user_id, video_id" in message
    message = refused(tmp_path, folder, 'scenarios=["search", "recommendation"]')
    assert "source kuairand writes ['main', 'tab_0', 'tab_4', 'rest']" in message
    assert "start from jobs/configs/kuairand.toml" in message
    pq.write_table(pa.table({"user_id": [1]}), folder / "user_sequences_until_1970.parquet")
    assert "user_sequences_until_1970.parquet: no column history_len, last_time_ms" in refused(tmp_path, folder)
    (folder / "user_sequences_until_1970.parquet").unlink()
    hand_written(folder, ",7,20220425,0,5,1,0,0,0,0,0,1,1,9000,0,0,0,0,1")
    assert "column user_id has 1 empty values; every row needs one" in refused(tmp_path, folder)
    (folder / "video_features_basic_pure.csv").write_text("video_id,tag\n1,2\n")
    assert "video_features_basic_pure.csv: no column author_id, video_type" in refused(tmp_path, folder)
    (folder / "user_features_pure.csv").unlink()
    assert "no user table (user_features*.csv)" in refused(tmp_path, folder)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    folder = hand_written(tmp_path / "in", row(ms=1, play=1))
    (log,) = folder.glob("log_standard*.csv")
    whole, users = log.read_bytes(), folder / "user_features_pure.csv"
    head, first = whole.splitlines(keepends=True)[:2]
    for path, content, problem in (
        (folder / "user_sequences_until_1970.parquet", b"PAR1 and no more", "Parquet magic bytes not found in footer"),
        (log, whole + b"1,2\n", "Expected 19 columns, got 2"),
        (log, head + b"soon," + first.partition(b",")[2], "Failed to parse string: 'soon' as a scalar of type int64"),
        (users, users.read_bytes().replace(b"user_id", b"user_\xff"), "'utf-8' codec can't decode byte 0xff"),
        (users, users.read_bytes() + b"9,9\n", "CSV parse error: Row #3: Expected 31 columns, got 2"),
    ):
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        message = refused(tmp_path, folder)
        assert message.startswith(f"{path}: cannot be read (")
        assert problem in message
        assert message.endswith("; unpack the data set anew")
        path.unlink() if before is None else path.write_bytes(before)
