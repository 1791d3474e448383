"""Kill -9 at any moment leaves the old or the new version whole, and the rerun ends where an undisturbed build ends.

Two moments, either side of the one commit: while data files of a first build are being written, and after the commit of
a restatement. `python -m tests.spark.killed_build --kills 30 --work DIR` kills restatements in all four stretches.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from tests.spark.conftest import Restated
from tests.spark.killed_build import (
    DATES,
    FIRST,
    LAST,
    RESTATE,
    Reader,
    Watch,
    build,
    content,
    digest,
    killed_at,
    restate,
    rows,
)
from usr_ray.data.manifest import build_manifest
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.schema import SAMPLES

pytestmark = pytest.mark.spark


# The test below kills after the commit; tests/spark/test_sample_commits.py has a build that stops before it, with files
# on the disk that no commit names, and the build that comes next.
@pytest.mark.slow
def test_a_build_that_is_killed_leaves_nothing_or_all(
    spark: SparkSession, wide_logs: Path, narrow_lake: Path, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    killed_at(Watch(lake).data_files_are_written, wide_logs, lake, *DATES)
    assert rows(lake, SAMPLES) == []
    # The next build finds what the dead one left behind.
    build(spark, wide_logs, lake)
    assert content(lake) == content(narrow_lake)


def test_a_restatement_that_is_killed_leaves_the_old_or_the_new_version_whole(
    spark: SparkSession, narrow_lake: Path, restated: Restated, late_logs: Path, tmp_path: Path
) -> None:
    lake = Path(shutil.copytree(narrow_lake, tmp_path / "lake"))
    old, new = rows(narrow_lake, SAMPLES), rows(restated.lake, SAMPLES)
    assert old != new
    manifest = build_manifest(lake, dates=(FIRST, LAST))

    with Reader(lake) as reader:
        killed_at(Watch(lake).samples_are_committed, late_logs, lake, *RESTATE)
        assert rows(lake, SAMPLES) == new
        restate(spark, late_logs, lake)
    assert content(lake) == content(restated.lake)
    # Two dates changed in one commit: whoever read all the while saw both or neither.
    assert reader.seen == [digest(old), digest(new)]
    assert reader.num_reads > 20

    # A trainer that was pinned before all this reads on, row for row.
    samples = SampleReader(
        manifest,
        Reading(global_batch_size=32, group_size=32, rank=0, world_size=1, seed=0, order="file", mature_only=False),
    )
    numbers = [n for batch in samples.batches(0) for n in batch.row_number_B.tolist() if n >= 0]
    assert numbers == list(range(len(old)))
