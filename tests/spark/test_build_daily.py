"""A build of one date reads the state of earlier dates and equals a build from all logs; when all is read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import deltalake
import pytest
from pyspark.sql import SparkSession

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.build.state import State, find_state
from etl.lake.tables import Lake
from tests.spark.shop import CONFIG, Shop, logs_of, random_shop, write_logs
from tests.spark.test_build_samples import DATES, WATERMARK, rows_of
from usr_ray.config import load_config

pytestmark = pytest.mark.spark

ALL = "no state of earlier dates: all logs are read"


def build(spark: SparkSession, logs: Path, lake: Path, first: int, last: int, *overrides: str) -> str:
    """Build days first..last; what the job says of the state."""
    lines: list[str] = []
    request = BuildRequest(
        logs=str(logs), lake=Lake(str(lake)), first=DATES[first], last=DATES[last], watermark=WATERMARK
    )
    settings = load_config(None, (*CONFIG, "vocabulary.min_count=9", *overrides))
    build_samples(spark, settings, request, Progress(write=lines.append))
    return next(line.partition("] ")[2] for line in lines if "logs are read" in line)


def content(lake: Path) -> dict[str, list[str]]:
    found = {
        table: sorted(str(row) for row in rows_of(lake / table))
        for table in ("samples", "rejects", "vocabularies", "state")
    }
    for path in sorted((lake / "reports").glob("*.json")):
        report = json.loads(path.read_text())
        del report["table_version"]
        found[path.stem] = [json.dumps(report, sort_keys=True)]
    return found


@pytest.fixture(scope="module")
def shop() -> Shop:
    return random_shop(23, num_impressions=200)


@pytest.fixture(scope="module")
def logs(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_logs(logs_of(shop), tmp_path_factory.mktemp("daily") / "logs")


@pytest.fixture(scope="module")
def base(spark: SparkSession, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake with days 0 and 1."""
    path = tmp_path_factory.mktemp("base") / "lake"
    assert build(spark, logs, path, 0, 1) == ALL
    return path


def test_a_date_built_on_the_state_equals_one_built_from_all_logs(
    spark: SparkSession, logs: Path, base: Path, tmp_path: Path
) -> None:
    daily, whole = tmp_path / "daily", tmp_path / "whole"
    for lake in (daily, whole):
        shutil.copytree(base, lake)
    shutil.rmtree(whole / "state")
    assert build(spark, logs, whole, 3, 3) == ALL
    # The gap, day 2, is read from the logs: 30 + 300 minutes and a day before it.
    said = build(spark, logs, daily, 3, 3)
    assert said == "events before 2026-01-03 are known; the logs are read from 2026-01-01T18:30:00+00:00 on"
    assert content(daily) == content(whole)
    assert len(content(daily)["state"]) > len(content(base)["state"])


def test_a_state_that_somebody_changed_is_not_trusted(
    spark: SparkSession, logs: Path, base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lake"
    shutil.copytree(base, path)
    lake, settings = Lake(str(path)), load_config(None, CONFIG)
    before = content(path)
    assert build(spark, logs, path, 1, 1).startswith("events before 2026-01-02 are known")
    assert content(path) == before
    spark.sql(f"OPTIMIZE delta.`{path}/state`")
    found = find_state(spark, settings, lake, DATES[3])
    assert (found.since, found.complete_until) == (DATES[2], DATES[1])
    assert find_state(spark, settings, lake, DATES[0]).since == DATES[0]
    assert find_state(spark, load_config(None, (*CONFIG, "histories.length=9")), lake, DATES[3]) == State()
    spark.sql(f"ALTER TABLE delta.`{path}/state` SET TBLPROPERTIES ('my.note' = 'x')")
    spark.sql(f"ALTER TABLE delta.`{path}/state` UNSET TBLPROPERTIES ('my.note')")
    trusted = find_state(spark, settings, lake, DATES[3])
    assert trusted.since == DATES[2]
    spark.sql(f"DELETE FROM delta.`{path}/state` WHERE part = 'event'")
    assert find_state(spark, settings, lake, DATES[3]) == State()
    deltalake.DeltaTable(f"{path}/state").restore(trusted.version)
    restored = find_state(spark, settings, lake, DATES[3])
    assert (restored.since, restored.version) == (DATES[2], (trusted.version or 0) + 2)


def test_a_giant_user_s_day_is_taken_out_and_listed(
    spark: SparkSession, shop: Shop, logs: Path, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    build(spark, logs, lake, 0, 3, "limits.max_user_events_per_day=10")
    capped = [row for row in rows_of(lake / "rejects") if row["reason"] == "over_user_limit"]
    days = {(json.loads(row["row"])["user_id"], row["date"]) for row in capped}
    assert 0 < len(days) < 40
    rows = rows_of(lake / "samples")
    assert not days & {(row["user_id"], row["impression_date"]) for row in rows}
    shown = sum(json.loads(row["row"])["rows"] for row in capped if row["log"].endswith("impressions"))
    unique = {i["id"] for i in shop.world.impressions}
    assert len(rows) + shown == len(unique)
    reports = [json.loads(path.read_text())["rejects"] for path in (lake / "reports").glob("*.json")]
    counted = sum(of_log.get("over_user_limit", 0) for report in reports for of_log in report.values())
    assert counted == sum(json.loads(row["row"])["rows"] for row in capped if row["date"] in DATES)
