"""What the session says of a machine without the right Java or packages; and what a build prints. No JVM is started."""

from __future__ import annotations

from importlib import metadata

import pytest

import etl.session as session
from etl.report import Funnel, SampleCounts, funnel_lines, warnings_of
from usr_ray.config import UserError

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


COUNTS = SampleCounts(
    {("2026-01-01", "search"): Funnel(100, 20, 5, 40, 10, 0), ("2026-01-02", "search"): Funnel(100, 20, 5, 40, 5, 7),
     ("2026-01-01", "feed"): Funnel(10, 2, 0, 2, 0, 0)}, {}, {},
)  # fmt: skip


def test_the_funnel_adds_up_dates_per_scenario() -> None:
    header, search, feed = (line.split() for line in funnel_lines(COUNTS, ["search", "feed"]))
    assert header[:4] == ["scenario", "impressions", "clicks", "orders"]
    assert search == ["search", "200", "40", "10", "80", "15", "7", "0.5000", "0.6667"]
    assert feed == ["feed", "10", "2", "0", "2", "0", "0", "1.0000", "-"]


def test_a_global_label_that_says_nothing_new_is_warned_of() -> None:
    assert len(warnings_of(COUNTS, ["search"])) == 0
    (warning,) = warnings_of(COUNTS, ["search", "feed"])
    assert warning.startswith("feed: P(is_click | is_click_global) = 1.0000 > 0.98")


def test_no_mature_row_is_warned_of() -> None:
    immature = SampleCounts({("2026-01-01", "search"): Funnel(100, 20, 5, 40, 10, 0)}, {}, {})
    assert "no row is mature" in warnings_of(immature, ["search"])[-1]
