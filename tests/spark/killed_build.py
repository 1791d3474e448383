"""Builds in a process of their own that are killed (SIGKILL) at chosen or random moments, and what is left of them.

    python -m tests.spark.killed_build --kills 30 --work DIR

kills as many restatements at random moments, most of them while something is being written, runs each again to its
end, and compares every table with that of a build that nobody disturbed. `test_build_killed.py` has chosen moments.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime as dt
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import deltalake
from deltalake.exceptions import TableNotFoundError
from pyspark.sql import SparkSession

from etl.build.restate import RestateRequest, restate_samples
from etl.build.samples import BuildRequest, Progress, build_samples
from etl.lake.tables import Lake
from etl.session import build_spark
from tests.spark.shop import DAYS, MINUTE, START, Shop, logs_of, random_shop, write_logs
from usr_ray.config import load_config
from usr_ray.schema import REJECTS, REPORTS, SAMPLES, VOCABULARIES

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = (
    'scenarios=["search","feed"]',
    'query_scenarios=["search"]',
    'labels.click_window="30 minutes"',
    'labels.order_window="300 minutes"',
    'labels.global_window="60 minutes"',
    "histories.length=4",
    "vocabulary.min_count=2",
    "limits.max_reject_share=1",
)
"""Two of the shop's scenarios and no features: what is tested does not depend on how wide a row is."""
SETTINGS = load_config(None, OVERRIDES)
FIRST, LAST = START.date(), START.date() + dt.timedelta(days=DAYS - 1)
DATES, RESTATE = ("--dates", f"{FIRST}:{LAST}"), ("--restate",)
WATERMARK = START + dt.timedelta(days=3, hours=12)
QUIET = Progress(write=lambda line: None)
READ_EVERY_S = 0.25
Point = Callable[[], bool]


def worlds() -> tuple[Shop, Shop]:
    """A small shop, and the same shop later: an order of day 1 known late on day 2, a duplicate, a click of nothing.

    Without duplicates that are days apart, which a build on the state does not see.
    """
    shop = random_shop(5, num_impressions=150)
    for rows in (shop.world.impressions, shop.world.clicks, shop.world.orders):
        first: dict[str, int] = {}
        for row in rows:
            first[row["id"]] = min(row["time"], first.get(row["id"], row["time"]))
        rows[:] = [row for row in rows if row["time"] - first[row["id"]] < 12 * 60 * MINUTE]
    late = copy.deepcopy(shop)
    day = 24 * 60 * MINUTE
    shown = next(i for i in late.world.impressions if day < i["time"] < 1.4 * day and i["scenario"] == 1)
    late.world.click("late", shown["user"], shown["item"], 1, shown["time"] + MINUTE, shown["id"], known=int(2.9 * day))
    late.world.order("late", shown["user"], shown["item"], shown["time"] + 2 * MINUTE, known=int(2.9 * day))
    late.world.orders.append(dict(late.world.orders[-1]))
    late.world.click("wild", shown["user"], "no such item", 1, 10 * MINUTE)
    return shop, late


def start(logs: Path, lake: Path, *what: str) -> subprocess.Popen[str]:
    """jobs/build_samples.py in a session of its own."""
    overrides = [word for override in OVERRIDES for word in ("--set", override)]
    command = [
        sys.executable,
        "jobs/build_samples.py",
        "--logs",
        str(logs),
        "--lake",
        str(lake),
        "--watermark",
        WATERMARK.isoformat(),
        *what,
        *overrides,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the driver, its JVM and the Python workers: they have groups of their own but share the session."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == process.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    process.communicate()


def killed_at(point: Point, logs: Path, lake: Path, *what: str) -> None:
    """Run a build and kill it as soon as `point()` holds.

    Raises:
        AssertionError: it ended before it came to the point.
    """
    process = start(logs, lake, *what)
    try:
        while not point():
            assert process.poll() is None, f"ended before that point:\n{process.communicate()[0]}"
            time.sleep(0.001)
    finally:
        kill(process)
    assert process.returncode == -signal.SIGKILL


class Watch:
    """Moments of a build, seen from outside: by what has changed in its lake since this object was made."""

    def __init__(self, lake: Path) -> None:
        self._lake = lake
        self._files, self._commits, self._reports = self._data_files(), self._logs(), self._report_texts()

    def data_files_are_written(self) -> bool:
        """Some data files of the samples are on the disk, or on their way."""
        return self._data_files() > self._files

    def samples_are_committed(self) -> bool:
        """The commit that brings rows is there; rejects and reports are not."""
        return any('"add":' in path.read_text() for path in self._logs() - self._commits)

    def reports_are_written(self) -> bool:
        """At least one report is another."""
        return self._report_texts() != self._reports

    def _data_files(self) -> set[Path]:
        return set((self._lake / SAMPLES).glob("impression_date=*/*.parquet"))

    def _logs(self) -> set[Path]:
        return set((self._lake / SAMPLES / "_delta_log").glob("*.json"))

    def _report_texts(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self._lake / REPORTS).glob("*.json")}


def rows(lake: Path, table: str) -> list[str]:
    """All rows of a table as a trainer's library reads them, in an order of their own."""
    return sorted(str(row) for row in deltalake.DeltaTable(str(lake / table)).to_pyarrow_table().to_pylist())


def content(lake: Path) -> dict[str, list[str]]:
    """Everything of a lake that must not depend on how often a build was killed."""
    found = {table: rows(lake, table) for table in (SAMPLES, REJECTS, VOCABULARIES)}
    reports = {path.name: json.loads(path.read_text()) for path in sorted((lake / REPORTS).glob("*.json"))}
    for report in reports.values():
        report.pop("table_version")
    return found | {REPORTS: [json.dumps(reports, sort_keys=True)]}


def digest(lines: list[str]) -> str:
    """A name for some rows."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Reader(threading.Thread):
    """Reads the samples whenever a file of theirs has come or gone, and now and then; `seen`: digests of what it got.

    To look costs little and to read a third of a core: what would be read between two looks that are alike is the same.
    """

    def __init__(self, lake: Path) -> None:
        super().__init__(daemon=True)
        self.seen: list[str] = []
        self.num_reads = 0
        self._lake, self._stop_asked = lake, threading.Event()

    def run(self) -> None:
        """Read until stopped."""
        files: set[Path] = set()
        read_at = 0.0
        while not self._stop_asked.is_set():
            now_there = set((self._lake / SAMPLES).rglob("*"))
            if now_there != files or time.monotonic() > read_at + READ_EVERY_S:
                files, read_at = now_there, time.monotonic()
                with contextlib.suppress(TableNotFoundError):
                    now = digest(rows(self._lake, SAMPLES))
                    self.num_reads += 1
                    if not self.seen or self.seen[-1] != now:
                        self.seen.append(now)
            time.sleep(0.01)

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()


def build(spark: SparkSession, logs: Path, lake: Path) -> None:
    """Build all dates in this process, undisturbed."""
    request = BuildRequest(logs=str(logs), lake=Lake(str(lake)), first=FIRST, last=LAST, watermark=WATERMARK)
    build_samples(spark, SETTINGS, request, QUIET)


def restate(spark: SparkSession, logs: Path, lake: Path, progress: Progress = QUIET) -> dict[str, list[str]]:
    """Restate in this process, undisturbed; what that touched."""
    request = RestateRequest(logs=str(logs), lake=Lake(str(lake)), watermark=WATERMARK)
    return restate_samples(spark, SETTINGS, request, progress)


def main() -> None:
    """Kill at random moments, without a test runner."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work: Path = arguments.work
    shop, late = worlds()
    logs, late_logs = write_logs(logs_of(shop), work / "logs"), write_logs(logs_of(late), work / "late")
    spark = build_spark("kills", {"spark.master": "local[2]", "spark.log.level": "ERROR"})
    build(spark, logs, work / "old")
    shutil.copytree(work / "old", work / "new")
    restate(spark, late_logs, work / "new")
    old, new = content(work / "old"), content(work / "new")
    assert old[SAMPLES] != new[SAMPLES]
    draw, outcomes = random.Random(arguments.seed), {"old": 0, "new": 0}
    for n in range(arguments.kills):
        lake = work / f"killed-{n}"  # a path of its own: Spark here remembers what it saw under a path
        shutil.copytree(work / "old", lake)
        watch, delay_s = Watch(lake), draw.uniform(0, 2)
        after = draw.choice(["start", "data files", "commit", "first report"])
        points = {
            "start": lambda: True,
            "data files": watch.data_files_are_written,
            "commit": watch.samples_are_committed,
            "first report": watch.reports_are_written,
        }
        if after == "start":
            delay_s *= 10
        process = start(late_logs, lake, *RESTATE)
        with Reader(lake) as reader:
            while process.poll() is None and not points[after]():
                time.sleep(0.001)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=delay_s)
            kill(process)
        names = {digest(old[SAMPLES]): "old", digest(new[SAMPLES]): "new"}
        assert set(reader.seen) <= set(names), "a reader saw a mixture"
        left = names[digest(rows(lake, SAMPLES))]
        outcomes[left] += 1
        restate(spark, late_logs, lake)
        again = content(lake)
        assert again == new, [table for table in new if again[table] != new[table]]
        print(
            f"kill {n + 1}, {delay_s:.2f} s after the {after} (exit {process.returncode}): {left} version, "
            f"{reader.num_reads} reads; the rerun gave the table of an undisturbed build",
            flush=True,
        )
        shutil.rmtree(lake)
    print(f"{arguments.kills} kills: {outcomes['old']} left the old version, {outcomes['new']} the new one")


if __name__ == "__main__":
    main()
