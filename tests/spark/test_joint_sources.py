"""KuaiSAR and JDsearch all the way: their files -> logs -> samples, counted again with pandas -> a few steps."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyspark.sql import SparkSession

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.checks import DataCheckError
from etl.lake.tables import Lake
from etl.logs.events import event_logs
from etl.logs.files import LogFolder
from etl.sources import SOURCES, LogWriter
from usr_ray.config import Config, load_config, parse_dates
from usr_ray.data.manifest import build_manifest
from usr_ray.training.loop import TrainResult, train
from usr_ray.training.monitor import Monitor
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.spark

ROOT = Path(__file__).resolve().parents[2]
REAL_JDSEARCH = ROOT.parent / "shared" / "data" / "jdsearch-sample"
SMALL_MODEL = (
    "train.global_batch_size=64",
    "model.contrastive.group_size=32",
    "train.log_every_steps=1",
    "model.hidden=[8]",
    "model.embedding_dim=4",
    "model.trigger_dim=4",
    "train.reader_threads=1",
)
DAY_MS = 86_400_000
FIRST_MS = 1_685_548_800_000  # 2023-05-31T16:00:00Z: 1 June in Beijing
KUAISAR_DATES = "2023-05-31:2023-06-03"


class Steps(Monitor):
    """Keeps the names and numbers of the last step."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def on_step(self, step: int, metrics: Any) -> None:
        self.last = dict(metrics) | {"step": step}


def ingest(source: str, folder: Path, logs: Path, config: Config) -> None:
    with LogWriter(logs) as writer:
        SOURCES[source](folder, writer, config)
        writer.commit({})


def build(spark: SparkSession, config: Config, logs: Path, lake: Path, dates: str) -> list[str]:
    first, last = parse_dates(dates, where="dates")
    lines: list[str] = []
    request = BuildRequest(logs=str(logs), lake=Lake(str(lake)), first=first, last=last)
    build_samples(spark, config, request, Progress(write=lines.append))
    return lines


def run_steps(config: Config, lake: Path, run_dir: Path) -> tuple[TrainResult, dict[str, float]]:
    torch.set_num_threads(1)
    parts = [
        build_manifest(lake, dates=parse_dates(d, where="dates"), allow_missing=config.data.allow_missing_dates)
        for d in (config.data.train_dates, config.data.eval_dates)
    ]
    steps = Steps()
    result = train(
        config, LocalWorker("cpu"), train_manifest=parts[0], eval_manifest=parts[1], run_dir=run_dir, monitor=steps
    )
    return result, steps.last


def labels_of(lake: Path) -> pd.DataFrame:
    """Labels of the samples table, by scenario and impression_id."""
    names = ["is_click", "is_order", "is_click_global", "is_order_global"]
    frames = [
        pq.read_table(path, columns=["impression_id", "scenario", *names], partitioning=None).to_pandas()
        for path in (lake / "samples").glob("*/*.parquet")
    ]
    return pd.concat(frames).set_index("impression_id").sort_index()


# KuaiSAR: the release's bytes, made by hand (nobody may copy its rows)


def beijing(time_ms: int) -> str:
    return f"{dt.datetime.fromtimestamp(time_ms / 1000, dt.timezone(dt.timedelta(hours=8))):%Y-%m-%d %H:%M:%S}"


def write_kuaisar(folder: Path, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Three Beijing days of few users and items who meet often; returns the rows that have user, item and time."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    searched, lines = [], []
    for session in range(120):
        user, time_ms = int(rng.integers(1, 25)), FIRST_MS + int(rng.integers(3 * DAY_MS))
        words = "[]" if session % 9 == 0 else f"[{session % 7}, {session % 5}]"
        for item in rng.choice(np.arange(700, 730), size=4, replace=False):
            count = int(rng.choice([0, 0, 1, 3]))
            searched.append((session, user, int(item), time_ms, count))
            lines.append(f'"{words}",{item},{count},{session},VIDEO,{user},{time_ms},USER_INPUT,{beijing(time_ms)}')
    order = rng.permutation(len(lines))  # the rows of a session are not contiguous
    header = (
        "keyword,item_id,click_cnt,search_session_id,item_type,user_id,search_session_timestamp,search_source,"
        "search_session_time"
    )
    (folder / "src_inter.csv").write_text("\n".join([header, *(lines[n] for n in order)]) + "\n", encoding="utf-8")

    watched = [
        (
            int(rng.integers(1, 25)),
            int(rng.integers(700, 730)),
            FIRST_MS + int(rng.integers(3 * DAY_MS)),
            int(rng.random() < 0.5),
            int(rng.random() < 0.3),
        )
        for _ in range(700)
    ]
    # Ten minutes after every second search its first item is watched, and liked half the time: the scenarios meet.
    watched += [(user, item, ms + 600_000, 1, session // 2 % 2) for session, user, item, ms, _ in searched[::8]]
    lines = []
    for n, (user, item, time_ms, click, like) in enumerate(watched):
        # pandas wrote the release: numbers of a column with gaps are floats.
        stamp = f"{time_ms}.0" if n % 3 else str(time_ms)
        lines.append(
            f"{user},{item},45400.0,{int(rng.integers(9))}.0,{stamp},0,{like},0,0,0,{click},{beijing(time_ms)}"
        )
    lines += lines[:20]  # logged twice
    lines += ["3,700,45400.0,10.0,,0,1,0,0,0,1,", f"NA,701,9000.0,0.0,{FIRST_MS},0,1,0,0,0,1,{beijing(FIRST_MS)}"]
    header = (
        "user_id,item_id,duration_ms,playing_time,timestamp,forward,like,follow,search_item_related,search,click,time"
    )
    (folder / "rec_inter.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")

    users = "\n".join(f"{u},{u % 3},{u % 5},{u % 4},{u % 2}" for u in range(1, 20))
    (folder / "user_features.csv").write_text(
        f"user_id,onehot_feat1,onehot_feat2,search_active_level,reco_active_level\n{users}\n", encoding="utf-8"
    )
    levels = ",".join(
        f"{n}_level_category_{what}"
        for n in ("first", "second", "third", "fourth")
        for what in ("id", "name", "name_en")
    )
    items = "\n".join(
        f'{i},"[1,\n3]",{i % 6},NORMAL,2023-04-22,LongImport,5,{i % 4},搞笑,"Fun, ny",{i % 3},x,y,0,空,empty,0,空,empty'
        for i in range(700, 725)
    )
    (folder / "item_features.csv").write_text(
        f"item_id,caption,author_id,item_type,upload_time,upload_type,music_id,{levels}\n{items}\n", encoding="utf-8"
    )
    return (
        pd.DataFrame(watched, columns=["user", "item", "ms", "click", "like"]),
        pd.DataFrame(searched, columns=["session", "user", "item", "ms", "count"]),
    )


def kuaisar_labels(watched: pd.DataFrame, searched: pd.DataFrame, *, window_ms: int, global_ms: int) -> pd.DataFrame:
    """The labels of rows whose click and like stand at the row's own time; pandas' as-of joins, no more."""
    pair, by_time = ["user", "item"], {"on": "ms", "by": ["user", "item"]}
    rec = watched.groupby([*pair, "ms"], as_index=False).max()  # a row logged twice, or a twin that was clicked
    rec["id"] = "r-" + rec.user.astype(str) + "-" + rec.item.astype(str) + "-" + rec.ms.astype(str)
    src = searched.assign(click=(searched["count"] > 0).astype(int), like=0, scenario="search")
    src["id"] = "s-" + src.user.astype(str) + "-" + src.session.astype(str) + "-" + src.item.astype(str)
    rec["scenario"] = "recommendation"
    rows = pd.concat([rec, src])[[*pair, "ms", "click", "like", "id", "scenario"]].sort_values("ms")
    clicks = rec[rec.click == 1].sort_values("ms").assign(clicked_id=lambda c: c.id)[[*pair, "ms", "clicked_id"]]
    likes = rec[rec.like == 1].sort_values("ms")[[*pair, "ms"]]
    credited = pd.merge_asof(likes, clicks, **by_time, tolerance=window_ms)["clicked_id"].dropna()
    rows["is_order"] = rows.id.isin(set(credited)).astype(float)
    every_click = rows[rows.click == 1].assign(seen=1)[[*pair, "ms", "seen"]]
    every_order = rows[rows.is_order == 1].assign(bought=1)[[*pair, "ms", "bought"]]
    later = {"direction": "forward", "tolerance": global_ms, **by_time}
    rows = pd.merge_asof(pd.merge_asof(rows, every_click, **later), every_order, **later)
    result = rows.assign(
        is_click=rows.click.astype(float), is_click_global=rows.seen.fillna(0), is_order_global=rows.bought.fillna(0)
    )
    names = ["scenario", "is_click", "is_order", "is_click_global", "is_order_global"]
    return result.set_index("id")[names].sort_index()


def test_kuaisar_from_its_bytes_to_trained_steps(spark: SparkSession, tmp_path: Path) -> None:
    watched, searched = write_kuaisar(tmp_path / "in")
    dates = ('data.train_dates="2023-05-31:2023-06-02"', 'data.eval_dates="2023-06-03"')
    # Few users and items, at random: many likes lie before or long after the click that another row of the pair has.
    overrides = (*dates, "limits.max_reject_share=0.2", *SMALL_MODEL)
    config = load_config(ROOT / "jobs" / "configs" / "kuaisar.toml", overrides)
    ingest("kuaisar", tmp_path / "in", tmp_path / "logs", config)
    lines = build(spark, config, tmp_path / "logs", tmp_path / "lake", KUAISAR_DATES)

    expected = kuaisar_labels(watched, searched, window_ms=30 * 60_000, global_ms=60 * 60_000)
    found = labels_of(tmp_path / "lake")
    assert len(found) == len(expected) > 1_100
    pd.testing.assert_frame_equal(found.astype(dict.fromkeys(found.columns[1:], float)), expected, check_names=False)
    of_search, of_rec = (expected[expected.scenario == s] for s in ("search", "recommendation"))
    assert (of_search.is_click_global > of_search.is_click).any(), "watched after it was searched for"
    assert of_rec.is_order.sum() > 50 and of_search.is_order_global.sum() > 0  # noqa: PT018

    reports = [json.loads(p.read_text()) for p in sorted((tmp_path / "lake" / "reports").glob("*.json"))]
    assert sum(r["scenarios"]["recommendation"]["orders"] for r in reports) == of_rec.is_order.sum()
    assert {r["scenarios"]["search"][key] for r in reports for key in ("orders", "orders_global", "order_rate")} == {
        None
    }
    assert sum(r["rows"]["recommendation_impressions"]["duplicates"] for r in reports) == 20
    assert reports[0]["undated"]["rejects"]["recommendation_impressions"] == {"null_impression_id": 1}
    assert any(line.startswith("no orders in this source: search") for line in lines)
    assert not any("no log holds its orders" in line for line in lines)

    result, last = run_steps(config, tmp_path / "lake", tmp_path / "run")
    assert result.status == "finished" and last["step"] >= 10  # noqa: PT018
    assert "loss/search/ctcvr" not in last
    assert last["loss/recommendation/ctcvr"] > 0
    metrics = result.evaluation.metrics  # type: ignore[union-attr]
    assert metrics["search"]["ctcvr"]["log_loss"] is metrics["search"]["ctcvr"]["auc"] is None
    assert metrics["search"]["ctcvr"]["num_unknown"] == metrics["search"]["ctr"]["num_samples"] > 0
    assert metrics["all"]["ctcvr"]["num_samples"] == metrics["recommendation"]["ctr"]["num_samples"] > 0


def test_a_log_of_orders_that_the_configuration_denies_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    config = load_config(None, ['labels.no_order_scenarios=["search"]'])
    for log in ("search_orders", "orders"):
        folder = tmp_path / log
        (folder / log).mkdir(parents=True)
        pq.write_table(pa.table({"order_id": ["o"]}), folder / log / "a.parquet")
        with pytest.raises(DataCheckError, match=f"log {log}: gives orders to search, of which labels.no_order_scen"):
            event_logs(config, LogFolder(spark, str(folder)))
    (tmp_path / "none").mkdir()
    nobody = load_config(None, ['labels.no_order_scenarios=["search", "recommendation"]'])
    logs = event_logs(nobody, LogFolder(spark, str(tmp_path / "none")))
    assert {log.name.partition("_")[2] for log in logs} == {"impressions", "clicks"}
    with pytest.raises(DataCheckError, match="log orders: is missing"):
        event_logs(config, LogFolder(spark, str(tmp_path / "none")))


# Every real row and its labels without Spark: tests/unit/etl_sources/test_jdsearch.py; from bytes to steps: above.
@pytest.mark.slow
@pytest.mark.skipif(not REAL_JDSEARCH.is_dir(), reason="the real logs are not beside the project (shared/data)")
def test_jdsearch_from_real_rows_to_trained_steps(spark: SparkSession, tmp_path: Path) -> None:
    # The sample has a few searches, and days are drawn: two of the eight have one.
    words = ("vocabulary.min_count=1", "data.allow_missing_dates=true", *SMALL_MODEL)
    config = load_config(ROOT / "jobs" / "configs" / "jdsearch.toml", words)
    ingest("jdsearch", REAL_JDSEARCH, tmp_path / "logs", config)
    build(spark, config, tmp_path / "logs", tmp_path / "lake", "2022-11-01:2022-11-08")

    raw = pd.read_csv(REAL_JDSEARCH / "user_behavior_data_sample.txt", sep="\t", dtype=str)
    candidates = raw.assign(item=raw.candidate_wid_list.str.split("_"), label=raw.candidate_label_list.str.split("_"))
    candidates = candidates[["query", "item", "label"]].explode(["item", "label"])
    rows = pd.concat(
        pq.read_table(p, partitioning=None).to_pandas() for p in (tmp_path / "lake").glob("samples/*/*.parquet")
    )
    assert set(rows.scenario) == {"search"}, "what is not searched for is in the histories alone"
    wanted = {(int(user), item): float(label) for user, item, label in candidates[["item", "label"]].itertuples()}
    assert len(wanted) == len(rows) == 172
    for row in rows.itertuples():
        label = wanted[int(row.user_id), row.item_id]
        assert (row.is_click, row.is_order) == (float(label >= 1), float(label == 3))
        assert (row.is_click_global, row.is_order_global) == (row.is_click, row.is_order)
        assert row.is_mature, "windows of no length: the newest day is final too"
        assert row.query == raw["query"][int(row.user_id)].replace("\x18", " ")

    for user, row in raw.iterrows():
        kinds = pd.DataFrame({"query": row.history_qry_list.split("_"), "kind": row.history_type_list.split("_")})
        # A bought event is a click and an order; every other one a click.
        events = {s: kinds[(kinds["query"] != "-1") == (s == "search")] for s in ("search", "recommendation")}
        mine = rows[rows.user_id == str(user)].iloc[0]
        gaps = [float(gap) for gap in row.history_time_list.split("_")]
        days = (mine.event_time - pd.Timestamp("2022-11-01", tz="UTC")).total_seconds()
        for scenario, part in events.items():
            # Newest last; of one time, the clicks before the orders.
            expected = sorted(
                (-sum(gaps[place + 1 :]) - days, action)
                for place, kind in part.kind.items()
                for action in ((1, 2) if kind == "ORD" else (1,))
            )
            assert mine[f"{scenario}_history_actions"].tolist() == [action for _, action in expected]
            assert mine[f"{scenario}_history_ages_s"].tolist() == pytest.approx([-since for since, _ in expected])

    products = pd.read_csv(REAL_JDSEARCH / "product_meta_data_sample.txt", sep="\t", dtype=str, quoting=3)
    known = rows.item_id.isin(set(products.wid))
    assert known.sum() > 100
    assert (rows.loc[~known, ["brand_id_index", "shop_id_index"]] == 0).all().all(), "a missing product has no features"
    result, last = run_steps(config, tmp_path / "lake", tmp_path / "run")
    assert (result.status, last["step"]) == ("finished", 2)
    metrics = result.evaluation.metrics  # type: ignore[union-attr]
    held_out = rows[rows.event_time >= pd.Timestamp("2022-11-07", tz="UTC")]
    assert metrics["search"]["ctr"]["num_samples"] == len(held_out) > 0
    assert metrics["search"]["ctr"]["num_positives"] == held_out.is_click.sum() == 2
    assert metrics["recommendation"]["ctr"]["num_samples"] == 0
