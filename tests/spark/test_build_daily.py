"""A build of one date reads the state of earlier dates and equals a build from all logs; when all is read again."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from pathlib import Path

import deltalake
import pytest
from pyspark.sql import SparkSession

from etl.build.state import State, find_state
from etl.lake.tables import Lake
from tests.spark.conftest import HASHED, build_wide
from tests.spark.shop import CONFIG
from tests.spark.test_build_samples import DATES, rows_of
from usr_ray.config import load_config
from usr_ray.data.by_id import read_item_features
from usr_ray.data.manifest import build_manifest

pytestmark = pytest.mark.spark

ALL = "no state of earlier dates: all logs are read"


def said(lines: list[str]) -> str:
    """What a job says of the state."""
    return next(line.partition("] ")[2] for line in lines if "logs are read" in line)


def content(lake: Path, dates: list[dt.date]) -> dict[str, list[str]]:
    """The state, and what the lake has of some dates, besides rejects without one."""
    of_dates = {"samples": "impression_date", "rejects": "date"}
    found = {
        table: sorted(str(row) for row in rows_of(lake / table) if row[column] in (*dates, None))
        for table, column in of_dates.items()
    }
    for date in dates:
        report = json.loads((lake / "reports" / f"{date}.json").read_text())
        del report["table_version"]
        found[f"{date}"] = [json.dumps(report, sort_keys=True)]
    return found | {"state": sorted(str(row) for row in rows_of(lake / "state"))}


@pytest.fixture(scope="module")
def base(spark: SparkSession, wide_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake with days 0 and 1, without a table of the items' features."""
    path = tmp_path_factory.mktemp("base") / "lake"
    off = "features.history_item_features=[]"
    assert said(build_wide(spark, wide_logs, path, *HASHED, off, first=0, last=1)) == ALL
    return path


@pytest.fixture(scope="module")
def daily(spark: SparkSession, wide_logs: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and day 3 with one."""
    path = Path(shutil.copytree(base, tmp_path_factory.mktemp("daily") / "lake"))
    # The gap, day 2, is read from the logs: 30 + 300 minutes and a day before it.
    found = said(build_wide(spark, wide_logs, path, *HASHED, first=3, last=3))
    assert found == "events before 2026-01-03 are known; the logs are read from 2026-01-01T18:30:00+00:00 on"
    return path


def test_a_date_built_on_the_state_equals_one_built_from_all_logs(base: Path, daily: Path, hashed_lake: Path) -> None:
    """Vocabularies that grow on the state: tests/spark/test_many_scenarios.py."""
    dates = [DATES[0], DATES[1], DATES[3]]
    assert content(daily, dates) == content(hashed_lake, dates)
    assert len(content(daily, [])["state"]) > len(content(base, [])["state"])


def test_a_lake_without_features_of_items_gets_them_with_its_next_date(
    base: Path, daily: Path, hashed_lake: Path
) -> None:
    assert not (base / "item_features").exists()
    manifest = build_manifest(base, dates=None)
    assert manifest.spec.history_item_features == ()
    assert "history_item_features" not in manifest.spec.to_json(), "as before there was such a key"
    assert read_item_features(manifest).shape[1] == 0
    assert build_manifest(daily, dates=None).spec.history_item_features == ("brand",)
    tables = [sorted(map(str, rows_of(lake / "item_features"))) for lake in (daily, hashed_lake)]
    assert tables[0] == tables[1] != []


def test_a_state_that_somebody_changed_is_not_trusted(spark: SparkSession, base: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(base, tmp_path / "lake"))
    lake, settings = Lake(str(path)), load_config(None, (*CONFIG, *HASHED))
    spark.sql(f"OPTIMIZE delta.`{path}/state`")
    found = find_state(spark, settings, lake, DATES[3])
    assert (found.since, found.complete_until) == (DATES[2], DATES[1])
    assert find_state(spark, settings, lake, DATES[0]).since == DATES[0]
    longer = load_config(None, (*CONFIG, *HASHED, "histories.length=9"))
    assert find_state(spark, longer, lake, DATES[3]) == State()
    spark.sql(f"ALTER TABLE delta.`{path}/state` SET TBLPROPERTIES ('my.note' = 'x')")
    spark.sql(f"ALTER TABLE delta.`{path}/state` UNSET TBLPROPERTIES ('my.note')")
    trusted = find_state(spark, settings, lake, DATES[3])
    assert trusted.since == DATES[2]
    spark.sql(f"DELETE FROM delta.`{path}/state` WHERE part = 'event'")
    assert find_state(spark, settings, lake, DATES[3]) == State()
    deltalake.DeltaTable(f"{path}/state").restore(trusted.version)
    restored = find_state(spark, settings, lake, DATES[3])
    assert (restored.since, restored.version) == (DATES[2], (trusted.version or 0) + 2)
