"""--restate: late events change the dates they touch and no others, and the table equals a full rebuild."""

from __future__ import annotations

import collections
import copy
import datetime as dt
import json
import shutil
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


def test_a_lake_without_reports_has_nothing_to_restate(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(DataCheckError, match=r"--restate: .* has no reports .*; build them with --dates"):
        restate(spark, tmp_path, tmp_path / "lake")
    assert not (tmp_path / "lake").exists()
