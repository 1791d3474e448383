"""What the session says of a machine without the right Java or packages; and what a build prints. No JVM is started."""

from __future__ import annotations

import datetime as dt
import os
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

import etl.session as session
from etl.build.account import Account
from etl.build.report import Funnel, SampleCounts, date_report, funnel_lines, owners_with_gaps, warnings_of
from etl.build.silence import Hour
from etl.features.vocabulary import feature_spec
from etl.jvm import take_installed_pyspark
from usr_ray.config import Config, UserError, load_config
from usr_ray.schema import FeatureSpec

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "none"), ('java version "1.8.0_392"', "Java 8"), ('openjdk version "11.0.2" 2019', "Java 11")],
)
def test_an_old_or_missing_java_is_named_with_the_way_out(text: str, found: str) -> None:
    with pytest.raises(UserError, match=f"java: found {found}, needed JDK 17 or newer; install it"):
        session._check_java(text)


@pytest.mark.parametrize("text", ['openjdk version "17.0.15" 2025-04-15', 'openjdk version "21" 2023-09-19'])
def test_a_new_java_is_fine(text: str) -> None:
    session._check_java(text)


def test_pyspark_is_the_installed_one_only_where_spark_is_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, other = tmp_path / "site-packages", tmp_path / "spark"
    for folder in (packages / "py4j", packages / "pyspark" / "python" / "lib", other / "python" / "lib"):
        folder.mkdir(parents=True)
    (tmp_path / "spark-distribution").symlink_to(packages / "pyspark")
    for home, places in (
        (packages / "pyspark", ["python/lib/pyspark.zip", "python/lib/py4j-src.zip", "jars/spark-core.jar"]),
        (tmp_path / "spark-distribution", ["python/lib/pyspark.zip"]),
    ):
        given = [str(tmp_path), *(f"{home}/{place}" for place in places), "/another.zip", str(packages)]
        monkeypatch.setattr(sys, "path", [*given])
        monkeypatch.setenv("SPARK_HOME", str(home))
        take_installed_pyspark()
        assert sys.path == [str(tmp_path), "/another.zip", str(packages)]
    for spark_home in (str(other), ""):
        given = [f"{other}/python/lib/pyspark.zip", str(packages)]
        monkeypatch.setattr(sys, "path", [*given])
        monkeypatch.setenv("SPARK_HOME", spark_home)
        take_installed_pyspark()
        assert sys.path == given
    os.rmdir(packages / "py4j")
    given = [f"{packages}/pyspark/python/lib/pyspark.zip", str(packages)]
    monkeypatch.setattr(sys, "path", [*given])
    monkeypatch.setenv("SPARK_HOME", str(packages / "pyspark"))
    take_installed_pyspark()
    assert sys.path == given


@pytest.mark.parametrize(("package", "version"), [("pyspark", "4.3.0"), ("delta-spark", "4.4.1"), ("pyspark", None)])
def test_another_pyspark_or_delta_is_named(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    real = metadata.version

    def fake(name: str) -> str:
        if name == package and version is None:
            raise metadata.PackageNotFoundError(name)
        return version if name == package and version else real(name)

    monkeypatch.setattr(session.metadata, "version", fake)
    with pytest.raises(UserError, match=f"{package}: found {version or 'none'}, needed 4[.].*pip install"):
        session._check_packages()


LATER = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
COUNTS = SampleCounts(
    {
        ("2026-01-01", "search"): Funnel(100, 20, 5, 40, 10, 0),
        ("2026-01-02", "search"): Funnel(100, 20, 5, 40, 5, 7),
        ("2026-01-01", "feed"): Funnel(10, 2, 0, 2, 0, 0),
    },
    {},
    {},
)


def config_of(*scenarios: str, no_orders: str = "[]") -> Config:
    names = ", ".join(f'"{name}"' for name in scenarios)
    return load_config(None, [f"scenarios=[{names}]", f"labels.no_order_scenarios={no_orders}"])


def spec_of(*scenarios: str, no_orders: str = "[]") -> FeatureSpec:
    return feature_spec(config_of(*scenarios, no_orders=no_orders))


def test_the_funnel_adds_up_dates_per_scenario() -> None:
    header, search, feed = (line.split() for line in funnel_lines(COUNTS, spec_of("search", "feed")))
    assert header[:4] == ["scenario", "impressions", "clicks", "orders"]
    assert search == ["search", "200", "40", "10", "80", "15", "7", "0.5000", "0.6667"]
    assert feed == ["feed", "10", "2", "0", "2", "0", "0", "1.0000", "-"]


def test_a_global_label_that_says_nothing_new_is_warned_of() -> None:
    assert len(warnings_of(COUNTS, spec_of("search"), ["orders"], LATER)) == 0
    (warning,) = warnings_of(COUNTS, spec_of("search", "feed"), ["orders"], LATER)
    assert warning.startswith("feed: P(is_click | is_click_global) = 1.0000 > 0.98")


def test_a_feature_that_no_impression_has_is_warned_of() -> None:
    """As where users.csv has 1.0 and the impressions 1: every join finds nothing, and null is a value like others."""
    overrides = ('scenarios=["search","feed"]', 'query_scenarios=["search"]', 'features.user_categories=["city"]')
    numbers = ('features.user_numbers=["age"]', 'features.context_numbers=["depth"]')
    spec = feature_spec(load_config(None, (*overrides, *numbers)))
    days = ("2026-01-01", "2026-01-02")
    present = {(day, name): 0 for day in days for name in ("city", "age", "depth", "query")}
    counts = replace(COUNTS, present=present | {("2026-01-02", "depth"): 1})
    lines = [
        warning for warning in warnings_of(counts, spec, ["orders"], LATER) if "no impression has a value" in warning
    ]
    assert [line.partition(":")[0] for line in lines] == ["query", "city", "age"]
    assert "look at the column in the impressions logs" in lines[0]
    assert "compare user_id in users with that of the impressions (1 and 1.0" in lines[1]
    no_queries = [
        line for line in warnings_of(counts, replace(spec, query_scenarios=()), ["orders"], LATER) if "query" in line
    ]
    assert not no_queries
    # 210 impressions: each user has an age, or there may be users without a row.
    assert owners_with_gaps(counts, spec) == ["user"]
    for ages, owners in (((110, 99), ["user"]), ((110, 100), [])):
        of_users = {(day, "age"): number for day, number in zip(days, ages, strict=True)}
        assert owners_with_gaps(replace(counts, present=present | of_users), spec) == owners
    ids = {("2026-01-01", "user_id"): 210, ("2026-01-01", "item_id"): 210}
    assert owners_with_gaps(replace(counts, present=ids), spec_of("search", "feed")) == [], "there is no table"


def test_no_mature_row_is_warned_of() -> None:
    immature = SampleCounts({("2026-01-01", "search"): Funnel(100, 20, 5, 40, 10, 0)}, {}, {})
    assert "no row is mature" in warnings_of(immature, spec_of("search"), ["search_orders"], LATER)[-1]


def test_hours_without_a_click_are_among_the_warnings() -> None:
    hours = {
        (dt.datetime(2026, 1, 1, number, tzinfo=dt.UTC), "search"): Hour(100, 20 * (number < 12), 0, 0)
        for number in range(24)
    }
    counts = replace(COUNTS, hours=hours)
    (line,) = warnings_of(counts, spec_of("search"), ["orders"], dt.datetime(2026, 1, 2, tzinfo=dt.UTC))
    assert line.startswith(
        "search: none of the 1,200 impressions from 2026-01-01 12:00 to 2026-01-02 00:00 was clicked"
    )
    assert not warnings_of(counts, spec_of("search"), ["orders"], dt.datetime(2026, 1, 1, 13, tzinfo=dt.UTC))


def test_orders_that_no_log_knows_are_a_dash_and_no_zero() -> None:
    config, spec = config_of("search", "feed", no_orders='["feed"]'), spec_of("search", "feed", no_orders='["feed"]')
    *_, feed, note = funnel_lines(COUNTS, spec)
    assert feed.split() == ["feed", "10", "2", "-", "2", "-", "0", "1.0000", "-"]
    assert note == "no orders in this source: feed (CTCVR is not trained there)"
    report = date_report("2026-01-01", account=Account(), counts=COUNTS, config=config, spec=spec, build={})
    unknown = ("orders", "orders_global", "order_rate", "order_rate_global", "p_order_given_order_global")
    assert {key for key, value in report["scenarios"]["feed"].items() if value is None} == set(unknown)
    assert all(report["scenarios"]["search"][key] is not None for key in unknown)


def test_a_scenario_whose_orders_no_log_holds_is_warned_of_unless_that_is_said() -> None:
    of_feed = [w for w in warnings_of(COUNTS, spec_of("search", "feed"), ["search_orders"], LATER) if "no log" in w]
    assert of_feed == [
        "feed: no log holds its orders, so is_order is 0 on every row and will be trained on; if they are "
        "not known rather than none, name it in labels.no_order_scenarios"
    ]
    said = spec_of("search", "feed", no_orders='["feed"]')
    assert not any("no log" in w for w in warnings_of(COUNTS, said, ["search_orders"], LATER))
    every = spec_of("search", "feed", no_orders='["search", "feed"]')
    assert not any("order" in w for w in warnings_of(COUNTS, every, [], LATER))
