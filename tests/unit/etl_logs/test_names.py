"""A log that is missing is refused before a JVM starts, and only such a one."""

from __future__ import annotations

from pathlib import Path

import pytest

from etl.checks import DataCheckError
from etl.logs.names import check_logs_there
from jobs.build_samples import parse
from usr_ray.config import Config, load_config

pytestmark = pytest.mark.unit
WORLD = ["search_impressions", "search_clicks.parquet", "feed_impressions", "feed_clicks", "orders.csv.gz"]
TOML = 'scenarios = ["search", "feed"]\nquery_scenarios = ["search"]\n'


def load(place: Path, text: str) -> Config:
    (place / "shop.toml").write_text(text)
    return load_config(place / "shop.toml")


def folder_of(place: Path, names: list[str]) -> str:
    for name in names:
        (place / name).mkdir()
    return str(place)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (WORLD, "", None),
        (
            WORLD[:3] + WORLD[4:],
            "",
            "log feed_clicks: is missing in .*, which holds: feed_impressions, .*; add a",
        ),
        (WORLD[:4], "", "log orders: is missing in "),
        ([*WORLD[:4], "feed_orders"], "", None),
        (WORLD[:4], '[labels]\nno_order_scenarios = ["search", "feed"]\n', None),
        (WORLD[1:], "", "log search_impressions: is missing in "),
        (WORLD[1:], '[logs.search_impressions]\npath = "elsewhere/*.csv"\n', None),
        ([*WORLD, "orders"], "", r"log orders: .* has orders and orders.csv.gz; keep one of them"),
        (WORLD, '[features]\nuser_categories = ["city"]\n', "log users: is missing in "),
        ([*WORLD, "users"], '[features]\nuser_categories = ["city"]\n', None),
        (WORLD, '[features]\nitem_tags = ["labels"]\n', "log items: is missing in "),
        ([*WORLD, "notes.txt", "search_clicks.bak"], "", None),
        ([], "", "log search_impressions: is missing in .*, which holds: nothing; add a folder or file"),
    ],
)
def test_a_missing_log_is_named(tmp_path: Path, names: list[str], more: str, message: str | None) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    root, config = folder_of(logs, names), load(tmp_path, TOML + more)
    if message is None:
        check_logs_there(config, root)
        return
    with pytest.raises(DataCheckError, match=message):
        check_logs_there(config, root)


def test_the_job_looks_before_it_starts_a_jvm(tmp_path: Path) -> None:
    config = tmp_path / "shop.toml"
    config.write_text(TOML)
    logs = tmp_path / "logs"
    logs.mkdir()
    words = ["--config", str(config), "--logs", folder_of(logs, WORLD[:4]), "--lake", str(tmp_path / "lake")]
    with pytest.raises(DataCheckError, match="log orders: is missing"):
        parse([*words, "--dates", "2026-01-01"])
