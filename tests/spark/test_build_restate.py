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
from tests.spark.killed_build import OVERRIDES
from tests.spark.shop import CONFIG, MINUTE, WINDOWS, Shop, logs_of, micros, moment, write_logs
from tests.spark.test_build_samples import DATES, WATERMARK, rows_of
from usr_ray.config import Config, load_config

pytestmark = pytest.mark.spark

DAY = 24 * 60 * MINUTE
SETTINGS = load_config(None, (*CONFIG, "vocabulary.min_count=2"))
NARROW = load_config(None, (*OVERRIDES, 'labels.global_window="60 minutes"'))
"""Two scenarios and no features, for what does not depend on how wide a row is."""


def build(spark: SparkSession, logs: Path, lake: Path, settings: Config, first: dt.date = DATES[0]) -> None:
    request = BuildRequest(logs=str(logs), lake=Lake(str(lake)), first=first, last=DATES[3], watermark=WATERMARK)
    build_samples(spark, settings, request, Progress(write=lambda line: None))


def restate(
    spark: SparkSession, logs: Path, lake: Path, settings: Config, **more: object
) -> tuple[dict[str, list[str]], list[str]]:
    lines: list[str] = []
    request = RestateRequest(logs=str(logs), lake=Lake(str(lake)), **({"watermark": WATERMARK} | more))  # type: ignore[arg-type]
    return restate_samples(spark, settings, request, Progress(write=lines.append)), lines


def content(lake: Path, table: str) -> list[str]:
    return sorted(str(row) for row in rows_of(lake / table))


def files(lake: Path) -> set[str]:
    return set(deltalake.DeltaTable(str(lake / "samples")).file_uris())


def reports(lake: Path) -> dict[str, dict]:
    found = {path.stem: json.loads(path.read_text()) for path in (lake / "reports").glob("*.json")}
    for report in found.values():
        report.pop("table_version")
    return found


def changed_dates(before: Shop, after: Shop) -> dict[str, list[str]]:
    """Date -> what of its rows differs, as the oracle says."""
    old, new = (
        expected(s.world, WINDOWS, num_scenarios=3, length=4, watermark=micros(WATERMARK)).samples
        for s in (before, after)
    )
    dates = {i["id"]: str(moment(i["time"]).date()) for i in unique(before.world.impressions, ("id",))}
    found: dict[str, set[str]] = collections.defaultdict(set)
    for key, row in new.items():
        for name, value in row.items():
            if old[key][name] != value:
                found[dates[key]].add("histories" if name == "histories" else "labels")
    return {date: sorted(names, reverse=True) for date, names in sorted(found.items())}


@pytest.fixture(scope="module")
def shop(wide_shop: Shop) -> Shop:
    return wide_shop


@pytest.fixture(scope="module")
def narrow(shop: Shop) -> Shop:
    """The shop without its third scenario."""
    result = copy.deepcopy(shop)
    for rows in (result.world.impressions, result.world.clicks, result.world.orders):
        rows[:] = [row for row in rows if row["scenario"] != 2]
    return result


@pytest.fixture(scope="module")
def built_narrow(spark: SparkSession, narrow: Shop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    work = tmp_path_factory.mktemp("restate")
    logs = write_logs(logs_of(narrow), work / "logs")
    build(spark, logs, work / "lake", NARROW)
    return logs, work / "lake"


@pytest.fixture(scope="module")
def late(shop: Shop) -> Shop:
    """The shop some days later: an order of day 1 that became known late on day 2, a duplicate, a click of nothing."""
    result = copy.deepcopy(shop)
    world = result.world
    shown = next(i for i in world.impressions if DAY < i["time"] < 1.4 * DAY and i["scenario"] == 1)
    world.click("late", shown["user"], shown["item"], 1, shown["time"] + MINUTE, shown["id"], known=int(2.9 * DAY))
    world.order("late", shown["user"], shown["item"], shown["time"] + 2 * MINUTE, known=int(2.9 * DAY))
    world.orders.append(dict(world.orders[-1]))
    world.click("wild", shown["user"], "no such item", 1, 10 * MINUTE)
    return result


def test_late_events_change_the_touched_dates_and_equal_a_full_rebuild(
    spark: SparkSession, shop: Shop, late: Shop, wide_lake: Path, tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"
    lake = Path(shutil.copytree(wide_lake, tmp_path / "lake"))
    first_files = files(lake)

    late_logs = write_logs(logs_of(late), tmp_path / "late")
    touched, lines = restate(spark, late_logs, lake, SETTINGS)
    # Exactly the dates whose rows the late events change: day 1 has the impression. Day 0 only has another reject.
    assert touched == changed_dates(shop, late)
    assert touched[str(DATES[1])] == ["labels"]
    assert ["histories"] in touched.values()
    assert any(line.endswith(f"{DATES[1]}: changed labels") for line in lines)
    kept = {file for file in first_files if not any(f"impression_date={date}" in file for date in touched)}
    assert any(f"impression_date={DATES[0]}" in file for file in kept)
    assert files(lake) & first_files == kept

    build(spark, late_logs, fresh, SETTINGS)
    for table in ("samples", "rejects", "vocabularies", "state"):
        assert content(lake, table) == content(fresh, table), table
    assert reports(lake) == reports(fresh)
    versions = [deltalake.DeltaTable(str(lake / table)).version() for table in ("samples", "state")]
    touched, lines = restate(spark, late_logs, lake, SETTINGS)
    assert touched == {}
    assert lines[-1].endswith("nothing to restate in 4 dates")
    assert [deltalake.DeltaTable(str(lake / table)).version() for table in ("samples", "state")] == versions


def test_a_later_watermark_restates_the_dates_it_closes(
    spark: SparkSession, narrow: Shop, built_narrow: tuple[Path, Path], tmp_path: Path
) -> None:
    logs, later = built_narrow[0], WATERMARK.replace(day=9)
    lake = Path(shutil.copytree(built_narrow[1], tmp_path / "lake"))
    touched, _ = restate(spark, logs, lake, NARROW, watermark=later)
    # Labels close six hours after the impression: up to noon of day 3, days 0 and 1 were final, and day 2 was too.
    assert touched == {str(DATES[3]): ["final_until"]}
    assert restate(spark, logs, lake, NARROW, watermark=later, first=DATES[0], last=DATES[1])[0] == {}
    wanted = expected(narrow.world, WINDOWS, num_scenarios=2, length=4, watermark=micros(later)).samples
    found = {row["impression_id"]: row for row in rows_of(lake / "samples")}
    assert found.keys() == wanted.keys()
    labels = ("is_click", "is_order", "is_click_global", "is_order_global", "is_mature")
    for key, want in wanted.items():
        assert [found[key][name] for name in labels] == [want[name] for name in labels], key
        assert want["is_mature"], key
        for scenario, events in zip(("search", "feed"), want["histories"], strict=True):
            assert found[key][f"{scenario}_history_actions"] == [event[2] for event in events], key
    # The earlier watermark would touch day 3 again; a date that was deleted does not come back.
    deltalake.DeltaTable(str(lake / "samples")).delete(f"impression_date >= '{DATES[3]}'")
    touched, lines = restate(spark, logs, lake, NARROW)
    assert touched == {}
    assert f"{DATES[3]}: no longer in the samples, so not restated" in lines


def test_dates_whose_logs_are_gone_are_kept_and_those_after_them_can_be_restated(
    spark: SparkSession, narrow: Shop, built_narrow: tuple[Path, Path], tmp_path: Path
) -> None:
    lake, fresh = Path(shutil.copytree(built_narrow[1], tmp_path / "lake")), tmp_path / "fresh"
    late = copy.deepcopy(narrow)
    shown = next(i for i in late.world.impressions if 3.2 * DAY < i["time"] < 3.4 * DAY and i["scenario"] == 1)
    late.world.click("late", shown["user"], shown["item"], 1, shown["time"] + MINUTE, shown["id"], known=int(3.9 * DAY))
    logs = logs_of(late)
    # What day 3 needs: 30 + 300 minutes and a day before it.
    cut = moment(int(1.75 * DAY) + 30 * MINUTE)
    kept = {
        log: [row for row in rows if not row.get("event_time") or row["event_time"] >= cut]
        for log, rows in logs.items()
    }
    short = write_logs(kept, tmp_path / "short")

    before = {table: content(lake, table) for table in ("samples", "state")}
    refusal = (
        r"no row any more of 2026-01-01.*, which \S+ was built from and would lose; .* --dates 2026-01-04:2026-01-04 "
    )
    with pytest.raises(DataCheckError, match=refusal):
        restate(spark, short, lake, NARROW)
    assert {table: content(lake, table) for table in before} == before

    touched, _ = restate(spark, short, lake, NARROW, first=DATES[3], last=DATES[3])
    assert touched == changed_dates(narrow, late)
    assert set(touched) == {str(DATES[3])}
    build(spark, write_logs(logs, tmp_path / "whole"), fresh, NARROW)
    for table in ("samples", "rejects", "vocabularies", "state"):
        assert content(lake, table) == content(fresh, table), table
    assert reports(lake) == reports(fresh)
    shutil.rmtree(fresh / "state")
    before = {table: content(fresh, table) for table in ("samples", "vocabularies")}
    with pytest.raises(
        DataCheckError, match=r"of 2026-01-01.*these dates need again without a state; .* \(RESTORE\), or"
    ):
        build(spark, short, fresh, NARROW, first=DATES[3])
    assert {table: content(fresh, table) for table in before} == before
    state = deltalake.DeltaTable(str(lake / "state")).version()
    assert restate(spark, short, lake, NARROW, first=DATES[3], last=DATES[3])[0] == {}
    assert deltalake.DeltaTable(str(lake / "state")).version() == state, "nothing new, nothing written"


def test_a_lake_without_reports_has_nothing_to_restate(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(DataCheckError, match=r"--restate: .* has no reports .*; build them with --dates"):
        restate(spark, tmp_path, tmp_path / "lake", SETTINGS)
    assert not (tmp_path / "lake").exists()
