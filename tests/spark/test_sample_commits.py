"""Files that the Python workers write: what Delta is told of them, who may interfere, and Spark's writer beside."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import deltalake
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from etl.build.account import Account
from etl.build.commits import Replacement, _takes_files, replace_samples
from etl.build.sample_files import FILES
from etl.build.samples import BuildRequest, build_samples, row_plan
from etl.checks import DataCheckError
from etl.features.vocabulary import feature_spec
from etl.jvm import table_properties, table_version
from etl.lake.tables import Lake, any_date_condition, replace_dates
from tests.spark.killed_build import FIRST, LAST, QUIET, SETTINGS, WATERMARK, worlds
from tests.spark.shop import logs_of, write_logs
from usr_ray.schema import PARTITION_COLUMN, SAMPLES

pytestmark = pytest.mark.spark

DAY = dt.timedelta(days=1)


def build(spark: SparkSession, logs: Path, lake: str, first: dt.date = FIRST, last: dt.date = LAST) -> None:
    request = BuildRequest(logs=str(logs), lake=Lake(lake), first=first, last=last, watermark=WATERMARK)
    build_samples(spark, SETTINGS, request, QUIET)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_logs(logs_of(worlds()[0]), tmp_path_factory.mktemp("commits") / "logs")


@pytest.fixture(scope="module")
def lake(spark: SparkSession, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commits") / "lake"
    build(spark, logs, str(path))
    return path


def adds(table: Path) -> list[dict[str, Any]]:
    """Files that commits of a table have added."""
    lines = [line for path in sorted((table / "_delta_log").glob("*.json")) for line in path.read_text().splitlines()]
    return [action["add"] for action in map(json.loads, lines) if "add" in action]


def rows(table: Path) -> list[dict[str, Any]]:
    found = deltalake.DeltaTable(str(table)).to_pyarrow_table()
    return found.sort_by("impression_id").to_pylist()


def test_both_writers_make_the_same_rows_statistics_and_reports(
    spark: SparkSession, logs: Path, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:  # as if the lake were in an object store
        patched.setattr("etl.build.commits._takes_files", lambda path, properties: False)
        build(spark, logs, f"{tmp_path}/lake")
    of_spark, of_workers = adds(tmp_path / "lake" / SAMPLES), adds(lake / SAMPLES)
    assert {"c000" in file["path"] for file in of_spark} == {True}  # named by Spark's writer
    assert {"c000" in file["path"] for file in of_workers} == {False}
    assert rows(tmp_path / "lake" / SAMPLES) == rows(lake / SAMPLES)
    ends = ["event_time", "scenario_index"]
    for file in (*of_spark, *of_workers):
        stats = json.loads(file["stats"])
        assert sorted(stats) == ["maxValues", "minValues", "nullCount", "numRecords"]
        assert [sorted(stats[name]) for name in ("maxValues", "minValues", "nullCount")] == [ends] * 3
    dates = [{file["partitionValues"][PARTITION_COLUMN] for file in files} for files in (of_spark, of_workers)]
    assert dates[0] == dates[1]
    for path in sorted((lake / "reports").iterdir()):
        other = json.loads((tmp_path / "lake" / "reports" / path.name).read_text())
        assert json.loads(path.read_text()) == other, path.name


def test_delta_knows_what_is_in_each_file(spark: SparkSession, lake: Path) -> None:
    table = lake / SAMPLES
    for file in adds(table):
        path = table / file["path"]
        found, stats = pq.read_table(path, partitioning=None), json.loads(file["stats"])
        assert file["size"] == path.stat().st_size
        assert stats["numRecords"] == found.num_rows > 0
        assert stats["nullCount"] == {"event_time": 0, "scenario_index": 0}
        for end, pick in (("minValues", min), ("maxValues", max)):
            time = pick(found["event_time"].to_pylist())
            assert stats[end]["scenario_index"] == pick(found["scenario_index"].to_pylist())
            # In milliseconds, cut; the shop's times are whole minutes, its duplicates a microsecond off.
            assert dt.datetime.fromisoformat(stats[end]["event_time"]) == time.replace(
                microsecond=time.microsecond // 1000 * 1000
            )
        dates = {time.date().isoformat() for time in found["event_time"].to_pylist()}
        assert dates == {file["partitionValues"][PARTITION_COLUMN]}
    # Delta itself skips by them: one day's evening is in one date's files.
    evening = f"event_time >= TIMESTAMP'{FIRST} 22:00:00' AND event_time < TIMESTAMP'{FIRST + DAY} 00:00:00'"
    frame = spark.read.format("delta").load(str(table)).filter(evening)
    scanned = [line for line in frame._jdf.queryExecution().executedPlan().toString().splitlines() if "Scan" in line]
    assert scanned
    assert frame.count() == sum(
        1 for row in rows(table) if str(row["event_time"])[:13] >= f"{FIRST} 22" and row["impression_date"] == FIRST
    )


def test_a_date_that_is_built_again_replaces_its_files_alone(spark: SparkSession, logs: Path, lake: Path) -> None:
    table = lake / SAMPLES
    before, files = rows(table), set(deltalake.DeltaTable(str(table)).file_uris())
    build(spark, logs, str(lake), FIRST + DAY, FIRST + DAY)
    after = set(deltalake.DeltaTable(str(table)).file_uris())
    changed = {Path(path).parent.name for path in files ^ after}
    assert changed == {f"{PARTITION_COLUMN}={FIRST + DAY}"}
    assert rows(table) == before
    # What left the table is still on the disk for those who read the version before.
    assert all(Path(path).exists() for path in files)


def test_another_writer_of_the_same_dates_is_noticed_one_of_other_dates_is_not(spark: SparkSession, lake: Path) -> None:
    path = str(lake / SAMPLES)
    condition = any_date_condition(PARTITION_COLUMN, [FIRST])
    some = spark.read.format("delta").load(path)

    def commit_beside(date: dt.date) -> int:
        mine = Replacement(spark, path, condition)
        its = any_date_condition(PARTITION_COLUMN, [date])
        replace_dates(some.filter(its), path, its)
        return mine.commit([])

    before = rows(lake / SAMPLES)
    with pytest.raises(DataCheckError, match=r"/samples: another job has changed this table since this build began"):
        commit_beside(FIRST)
    assert rows(lake / SAMPLES) == before
    version = commit_beside(LAST)
    assert version == table_version(spark, path)
    assert rows(lake / SAMPLES) == [row for row in before if row[PARTITION_COLUMN] != FIRST]


def test_a_row_that_breaks_a_rule_of_the_table_stops_the_build_before_its_commit(
    spark: SparkSession, lake: Path
) -> None:
    """No logs lead to such rows: a stand-in for the packs says that the workers have found some."""
    file = dict.fromkeys(FILES.names) | {"date": f"{LAST}", "broken": "is_order_le_is_click"}
    found = spark.createDataFrame(
        [file],
        "path string, date string, size bigint, modified_ms bigint, num_rows bigint, "
        "stats string, counts string, broken string",
    )

    class Packs:
        def mapInArrow(self, *_: Any) -> Any:
            return found

    plan = row_plan(SETTINGS, feature_spec(SETTINGS, {}), Account(), WATERMARK, [])
    version = table_version(spark, str(lake / SAMPLES))
    with pytest.raises(DataCheckError, match=rf"rows of {LAST} break the table's rule is_order_le_is_click: .*"):
        replace_samples(spark, str(lake / SAMPLES), Packs(), plan, [LAST])  # type: ignore[arg-type]
    assert table_version(spark, str(lake / SAMPLES)) == version


def test_a_rule_that_somebody_added_and_an_object_store_are_left_to_sparks_writer(
    spark: SparkSession, lake: Path
) -> None:
    path = str(lake / SAMPLES)
    properties = table_properties(spark, path)
    assert _takes_files(path, properties)
    assert not _takes_files("s3a://shop/lake/samples", properties)
    spark.sql(f"ALTER TABLE delta.`{path}` ADD CONSTRAINT no_far_position CHECK (position IS NULL OR position < 1000)")
    assert not _takes_files(path, table_properties(spark, path))
