"""The [logs.<log>] sections: what is read, what is refused, and strptime patterns in Spark's words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from usr_ray.config import Config, ConfigError, load_config
from usr_ray.config.logs import log_names, spark_time_pattern

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "own_logs" / "own_logs.toml"


def test_the_worked_example_is_read_and_survives_being_saved() -> None:
    config = load_config(EXAMPLE)
    assert config.logs["search_impressions"].columns["request_id"] == ("visit", "page")
    assert config.logs["search_impressions"].where == {"action": "view", "surface": "search"}
    assert config.logs["feed_clicks"].constants == {"impression_id": ""}
    assert Config.from_dict(config.to_dict()) == config


def test_a_value_is_text_a_number_or_a_list() -> None:
    config = load_config(None, ["logs.orders.where={kind=3, state=['paid', 'sent'], test=false}"])
    assert config.logs["orders"].where == {"kind": 3, "state": ("paid", "sent"), "test": False}


def test_every_scenario_has_its_logs() -> None:
    assert log_names(["search", "feed"]) == [
        "search_impressions",
        "search_clicks",
        "search_orders",
        "feed_impressions",
        "feed_clicks",
        "feed_orders",
        "orders",
        "users",
        "items",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("logs.serch_clicks.path=x", "unknown log 'logs.serch_clicks'; with these scenarios there can be: search_impr"),
        (
            "logs.orders.colums={a='b'}",
            "unknown key 'logs.orders.colums'; logs.orders has: path, format, separator, quote, enc",
        ),
        ("logs.orders.format=xlsx", "logs.orders.format must be '', 'parquet', 'delta', 'csv' or 'json', got 'xlsx'"),
        ("logs.orders.encoding=latin-99", "logs.orders.encoding 'latin-99' is unknown; write it as 'UTF-8' or 'ISO-8"),
        ("logs.orders.separator=';;'", "logs.orders.separator must be one character, got ';;'"),
        (
            "logs.orders.quote=','",
            "logs.orders: quote and separator are both ','; set another quote, or '' for files w",
        ),
        ("logs.orders.quote=none", "logs.orders.quote must be one character, or '' for none, got 'none'"),
        (
            "logs.orders.time_format=seconds",
            "logs.orders.time_format must be 'iso', 's', 'ms', 'us', 'ns' or a pattern",
        ),
        ("logs.orders.time_format='%Q'", "logs.orders.time_format must be 'iso'"),
        ("logs.orders.time_format='%d.%m.%Y %I:%M'", "got '%d.%m.%Y %I:%M': %I without %p is an hour of the morning"),
        ("logs.orders.time_zone=Berlin", "logs.orders.time_zone 'Berlin' is unknown; write it as 'Europe/Berlin'"),
        ("logs.orders.time_zone=Asia/Shangai", "time_zone 'Asia/Shangai' is unknown; write it as 'Asia/Shanghai'"),
        (
            "logs.orders.time_zone=UTC+8",
            "logs.orders.time_zone 'UTC+8' is unknown; write it as 'UTC' or 'Europe/Berlin'",
        ),
        ("logs.orders.columns={order_id=''}", "logs.orders.columns.order_id is empty; name at least one"),
        ("logs.orders.columns={order_id=[]}", "logs.orders.columns.order_id is empty; name at least one"),
        ("logs.orders.where={kind=''}", "logs.orders.where.kind is empty; name at least one"),
        ("logs.orders.columns={event_time=['day','hour']}", "logs.orders.columns.event_time must be one column"),
        ("logs.orders.constants={event_time=''}", "logs.orders.constants.event_time would be the time of every row"),
        (
            "logs.orders.where={kind=1.5}",
            "logs.orders.where.kind must be a string or a whole number or true or false or a l",
        ),
    ],
)
def test_what_a_mapping_cannot_mean_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


def test_a_column_is_mapped_once() -> None:
    with pytest.raises(ConfigError, match=r"logs.orders: item_id is in columns and in constants; keep one of them"):
        load_config(None, ["logs.orders.columns={item_id='sku'}", "logs.orders.constants={item_id='1'}"])


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("%d.%m.%Y %H:%M:%S", "d'.'M'.'y' 'H':'m':'s"),
        ("%Y%m%d", "yyyyMMdd"),
        ("%Y-%m-%dT%H:%M:%S.%f%z", "y'-'M'-'d'T'H':'m':'s'.'SSSSSS[XXX][XX][X]"),
        ("%d o'clock %%", "d' o''clock ''%'"),
        ("%b %d %y %I %p", "MMM' 'd' 'yy' 'h' 'a"),
    ],
)
def test_strptime_patterns_become_sparks(text: str, pattern: str) -> None:
    assert spark_time_pattern(text) == pattern


@pytest.mark.parametrize("text", ["", "ms", "%Q", "%"])
def test_patterns_without_a_known_code_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="%"):
        spark_time_pattern(text)


def test_a_zone_that_is_known_costs_no_look_at_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoneinfo.available_timezones", None)
    assert load_config(None, ["logs.orders.time_zone=Asia/Shanghai"]).logs["orders"].time_zone == "Asia/Shanghai"
