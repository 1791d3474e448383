"""Counts of an experiment by Spark against a plain count, and the job on the example shop."""

from __future__ import annotations

import csv
import datetime as dt
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from etl.build.experiment import ALL, combinations, experiment_counts, user_counts
from etl.lake.tables import Lake
from jobs import online_report
from tests.spark.conftest import EXAMPLE
from usr_ray.config import Config, UserError, load_config
from usr_ray.evaluation.experiment import counts_of, experiment_report
from usr_ray.schema import EXPERIMENT_ORDERS

pytestmark = pytest.mark.spark

DATES = (dt.date(2026, 3, 28), dt.date(2026, 3, 30))


@pytest.fixture
def lake(example_lake: Path) -> Path:
    return example_lake


def test_counts_are_those_of_a_plain_count(spark: SparkSession) -> None:
    rng = random.Random(3)
    home = {f"u{n}": rng.choice(["A", "B", "B", "C"]) for n in range(60)}
    rows = []
    for n in range(900):
        user = rng.choice(list(home))
        bucket = None if user < "u15" or rng.random() < 0.1 else home[user]
        if user in ("u30", "u31") and rng.random() < 0.5:
            bucket = "A" if bucket == "B" else "B"
        click = int(rng.random() < 0.2)
        order = click * int(rng.random() < 0.4)
        rows.append(
            (rng.choice(["search", "feed"]), f"i{n}", user, float(click), float(order), rng.random() < 0.9, bucket)
        )
    samples = spark.createDataFrame(
        [row[:6] for row in rows],
        "scenario string, impression_id string, user_id string, is_click float, is_order float, is_mature boolean",
    )
    # A log without a row for an impression without a bucket, or with a row that has none, is the same.
    known = [(r[0], r[1], r[6], r[6]) for n, r in enumerate(rows) if r[6] is not None or n % 2]
    buckets = spark.createDataFrame(known, "scenario string, impression_id string, low string, high string")
    users = user_counts(samples, buckets, ["search", "feed"], mature_only=True)
    found = counts_of(combinations(users, ["search", "feed"], {"A": 1, "B": 1}, no_orders=["search"]).toArrow())

    seen = defaultdict(set)
    for row in rows:
        seen[row[2]].add(row[6])
    in_experiment = {
        user: max(s - {None}) for user, s in seen.items() if len(s - {None}) == 1 and s - {None} <= {"A", "B"}
    }
    found.cells["feed"], of_feed = found.cells[EXPERIMENT_ORDERS], found.cells["feed"]  # all that logs orders
    assert sum(of_feed["A"].users_K) == found.cells["feed"]["A"].num_users
    for scenario in ("search", "feed", ALL):
        for bucket in ("A", "B"):
            plain = defaultdict(lambda: [0, 0, 0])
            for place, _, user, click, order, mature, own in rows:
                if in_experiment.get(user) == bucket and own and mature and scenario in (place, ALL):
                    for side, value in enumerate((1, int(click), int(order))):
                        plain[user][side] += value
            cell = found.cells[scenario][bucket]
            counts = np.stack([cell.impressions_K, cell.clicks_K, cell.orders_K], axis=1)
            spread = map(tuple, np.repeat(counts, cell.users_K, axis=0).tolist())
            assert sorted(spread) == sorted(map(tuple, plain.values()))
    assert found.several_buckets == sum(len(s - {None}) > 1 for s in seen.values()) > 0
    assert found.no_bucket == sum(s == {None} for s in seen.values()) > 0
    assert found.unplanned == {"C": sum(s - {None} == {"C"} for s in seen.values())}
    inside = [row for row in rows if row[2] in in_experiment]
    assert found.impressions_not_mature == sum(bool(row[6]) and not row[5] for row in inside)
    assert found.impressions_without_bucket == sum(row[6] is None for row in inside)


def test_the_job_reports_the_example_shop(
    spark: SparkSession, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SparkSession, "stop", lambda self: None)  # the other tests' session
    online_report.main(
        [
            "--config",
            str(EXAMPLE / "own_logs.toml"),
            "--logs",
            str(EXAMPLE),
            "--lake",
            str(lake),
            "--dates",
            "2026-03-28:2026-03-30",
            "--output",
            str(tmp_path / "out"),
            "--control",
            "blue",
        ]
    )
    report = json.loads((tmp_path / "out" / "online.json").read_text())
    users: dict[str, set[str]] = defaultdict(set)
    clickers: dict[str, set[str]] = defaultdict(set)
    for path in (EXAMPLE / "events").glob("*.csv"):
        for row in csv.DictReader(path.open(newline=""), delimiter=";"):
            (users if row["action"] == "view" else clickers)[row["group"]].add(row["customer"])
    for bucket, cells in report["buckets"].items():
        assert cells[ALL]["num_users"] == len(users[bucket])
        assert cells[ALL]["uctr"]["value"] == len(clickers[bucket]) / len(users[bucket])
    assert report["control"] == "blue"
    assert set(report["sample_ratio"]) == {ALL, "search", "feed"}
    printed = capsys.readouterr().out
    assert printed.startswith("This reports an experiment that another system has run")
    assert "of 12 comparisons that can have one" in printed
    assert (tmp_path / "out" / "online.html").read_text().startswith("<!doctype html>")


def reported(spark: SparkSession, config: Config, lake: Path, dates: tuple[dt.date, dt.date]) -> None:
    rows, left_out, used = experiment_counts(spark, config, logs=str(EXAMPLE), lake=Lake(str(lake)), dates=dates)
    experiment_report(counts_of(rows, left_out), config.online, dates=used)


def test_an_experiment_that_is_not_there_is_one_line(spark: SparkSession, lake: Path, tmp_path: Path) -> None:
    config = load_config(EXAMPLE / "own_logs.toml")
    for overrides, place, dates, message in (
        (
            ["online.bucket_column=arm"],
            lake,
            DATES,
            r"--bucket-column arm: is in no impressions log \(search_impressions has",
        ),
        ([], tmp_path, DATES, r"--lake \S+: has no samples table; run jobs/build_samples.py first"),
        (
            [],
            lake,
            (dt.date(2031, 1, 1), dt.date(2031, 1, 2)),
            r"--dates 2031-01-01:2031-01-02: 2 of these 2 dates have no rows",
        ),
        (["online.shares={x=1,y=1}"], lake, DATES, r"unplanned buckets: \{'blue': \d, 'green': \d\}"),
    ):
        config = load_config(EXAMPLE / "own_logs.toml", overrides)
        with pytest.raises(UserError, match=message):
            reported(spark, config, place, dates)
