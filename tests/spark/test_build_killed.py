"""Kill -9 at any moment leaves the old or the new version whole, and the rerun ends where an undisturbed build ends.

Two moments, either side of the one commit: while data files of a first build are being written, and after the commit of
a restatement. `python -m tests.spark.killed_build --kills 30 --work DIR` kills restatements in all four stretches.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

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
    worlds,
)
from tests.spark.shop import logs_of, write_logs
from usr_ray.data.manifest import build_manifest
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.schema import SAMPLES

pytestmark = pytest.mark.spark


@dataclass(frozen=True)
class Lakes:
    """Logs of two moments, and the lakes that builds which nobody disturbed made of them."""

    logs: Path
    late_logs: Path
    old: Path
    new: Path


@pytest.fixture(scope="module")
def lakes(spark: SparkSession, narrow_logs: Path, narrow_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Lakes:
    work = tmp_path_factory.mktemp("killed")
    found = Lakes(narrow_logs, write_logs(logs_of(worlds()[1]), work / "late"), narrow_lake, work / "new")
    shutil.copytree(found.old, found.new)
    restate(spark, found.late_logs, found.new)
    assert content(found.old)[SAMPLES] != content(found.new)[SAMPLES]
    return found


# The test below kills after the commit; tests/spark/test_sample_commits.py has a build that stops before it, with files
# on the disk that no commit names, and the build that comes next.
@pytest.mark.slow
def test_a_build_that_is_killed_leaves_nothing_or_all(spark: SparkSession, lakes: Lakes, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    killed_at(Watch(lake).data_files_are_written, lakes.logs, lake, *DATES)
    assert rows(lake, SAMPLES) == []
    # The next build finds what the dead one left behind.
    build(spark, lakes.logs, lake)
    assert content(lake) == content(lakes.old)


def test_a_restatement_that_is_killed_leaves_the_old_or_the_new_version_whole(
    spark: SparkSession, lakes: Lakes, tmp_path: Path
) -> None:
    lake = Path(shutil.copytree(lakes.old, tmp_path / "lake"))
    old, new = rows(lakes.old, SAMPLES), rows(lakes.new, SAMPLES)
    manifest = build_manifest(lake, dates=(FIRST, LAST))

    with Reader(lake) as reader:
        killed_at(Watch(lake).samples_are_committed, lakes.late_logs, lake, *RESTATE)
        assert rows(lake, SAMPLES) == new
        restate(spark, lakes.late_logs, lake)
    assert content(lake) == content(lakes.new)
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
