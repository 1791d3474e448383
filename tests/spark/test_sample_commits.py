"""Commits of the samples: one date is replaced alone, who interferes is noticed, and every row keeps the rules."""

from __future__ import annotations

import datetime as dt
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.build.samples import BuildRequest, build_samples
from etl.checks import DataCheckError
from etl.jvm import table_version
from etl.lake.tables import Lake, any_date_condition, replace_dates
from tests.spark.killed_build import FIRST, LAST, QUIET, SETTINGS, WATERMARK
from usr_ray.schema import PARTITION_COLUMN, SAMPLES

pytestmark = pytest.mark.spark


def build(spark: SparkSession, logs: Path, lake: str, first: dt.date = FIRST, last: dt.date = LAST) -> None:
    request = BuildRequest(logs=str(logs), lake=Lake(lake), first=first, last=last, watermark=WATERMARK)
    build_samples(spark, SETTINGS, request, QUIET)


@pytest.fixture(scope="module")
def logs(wide_logs: Path) -> Path:
    return wide_logs


@pytest.fixture(scope="module")
def lake(narrow_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(narrow_lake, tmp_path_factory.mktemp("commits") / "lake"))


def rows(table: Path) -> list[dict[str, Any]]:
    found = deltalake.DeltaTable(str(table)).to_pyarrow_table()
    return found.sort_by("impression_id").to_pylist()


def waiting(frame: DataFrame, folder: Path) -> DataFrame:
    """The frame, whose first task says that it has begun and then waits until it may go on."""

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        (folder / "begun").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        yield from batches

    return frame.coalesce(1).mapInArrow(run, frame.schema)


def test_another_writer_of_the_same_dates_is_noticed_one_of_other_dates_is_not(
    spark: SparkSession, lake: Path, tmp_path: Path
) -> None:
    path = str(lake / SAMPLES)
    of_first = any_date_condition(PARTITION_COLUMN, [FIRST])
    some = spark.read.format("delta").load(path)

    def write_beside(date: dt.date) -> None:
        """Replace the first date, and another date while its rows are on their way."""
        folder = tmp_path / f"{date}"
        folder.mkdir()
        found: list[BaseException] = []

        def write() -> None:
            try:
                replace_dates(waiting(some.filter(of_first), folder), path, of_first)
            except BaseException as error:
                found.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            while not (folder / "begun").exists():
                assert writer.is_alive(), found
                time.sleep(0.01)
            its = any_date_condition(PARTITION_COLUMN, [date])
            replace_dates(some.filter(its), path, its)
        finally:
            (folder / "go").touch()
            writer.join()
        if found:
            raise found[0]

    before, version = rows(lake / SAMPLES), table_version(spark, path)
    with pytest.raises(DataCheckError, match=r"/samples: another job has changed this table since this build began"):
        write_beside(FIRST)
    assert (rows(lake / SAMPLES), table_version(spark, path)) == (before, version + 1)
    write_beside(LAST)
    assert (rows(lake / SAMPLES), table_version(spark, path)) == (before, version + 3)


BAD = {
    "is_click_is_0_or_1": {"is_click": 0.5, "is_order": 0.0, "is_click_global": 1.0},
    "is_order_le_is_click": {"is_click": 0.0, "is_order": 1.0, "is_click_global": 1.0, "is_order_global": 1.0},
    "is_click_le_is_click_global": {"is_click": 1.0, "is_order": 0.0, "is_click_global": 0.0, "is_order_global": 0.0},
    "user_id IS NOT NULL": {"user_id": None},
}


@pytest.mark.parametrize("rule", BAD)
def test_a_row_that_breaks_a_rule_of_the_table_stops_the_build_before_its_commit(
    spark: SparkSession, lake: Path, rule: str
) -> None:
    """No logs lead to such rows: they are made of good ones."""
    path = str(lake / SAMPLES)
    condition = any_date_condition(PARTITION_COLUMN, [LAST])
    good = spark.read.format("delta").load(path).filter(condition)
    kinds = {field.name: field.dataType for field in good.schema}
    bad = good.withColumns({name: F.lit(value).cast(kinds[name]) for name, value in BAD[rule].items()})
    version = table_version(spark, path)
    with pytest.raises(DataCheckError, match=rf"/samples: a row breaks the table's rule {rule}; nothing of it was"):
        replace_dates(bad, path, condition)
    assert table_version(spark, path) == version


def test_a_rule_that_somebody_added_holds_for_builds_too_and_what_was_left_is_no_row_of_the_next(
    spark: SparkSession, logs: Path, lake: Path, narrow_lake: Path
) -> None:
    path = str(lake / SAMPLES)
    # Holds for what is there, as a constraint must, and for none of what a build of the first date brings.
    replace_dates(spark.read.format("delta").load(path).limit(0), path, any_date_condition(PARTITION_COLUMN, [FIRST]))
    rule = f"{PARTITION_COLUMN} > DATE'{FIRST}'"
    spark.sql(f"ALTER TABLE delta.`{path}` ADD CONSTRAINT not_the_first CHECK ({rule})")
    before = rows(lake / SAMPLES)
    with pytest.raises(DataCheckError, match=r"a row breaks the table's rule not_the_first; .* drop the rule if it is"):
        build(spark, logs, str(lake), FIRST, FIRST)
    assert rows(lake / SAMPLES) == before

    # The next build finds what one left behind that came no further than its data files.
    spark.sql(f"ALTER TABLE delta.`{path}` DROP CONSTRAINT not_the_first")
    folder = lake / SAMPLES / f"{PARTITION_COLUMN}={FIRST}"
    whole = next((narrow_lake / SAMPLES / folder.name).glob("*.parquet"))
    shutil.copy(whole, folder / "part-00000-of-a-dead-build.zstd.parquet")
    (folder / "part-00001-of-a-dead-build.zstd.parquet").write_bytes(whole.read_bytes()[:1000])
    build(spark, logs, str(lake), FIRST, FIRST)
    assert rows(lake / SAMPLES) == rows(narrow_lake / SAMPLES)
