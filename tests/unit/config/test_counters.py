"""`[counters]`: sections of any name, what they stand for in the columns, and each mistake as one line."""

from __future__ import annotations

import datetime as dt
import json

import pytest

from etl.build.inputs import make_plan
from etl.build.state import State, write_sums
from etl.checks import DataCheckError
from etl.features.encoding import pack_features
from etl.features.vocabulary import feature_spec
from etl.lake.tables import Lake, check_meaning
from usr_ray.config import Config, ConfigError, load_config
from usr_ray.schema import CONFIG_PROPERTY

pytestmark = pytest.mark.unit


def test_any_section_is_a_counter_and_names_its_columns() -> None:
    config = load_config(None, ('counters.shelf.keys=["item_id"]', 'counters.shelf.windows=["all","7d"]'))
    assert Config.from_dict(config.to_dict()) == config
    counts = ("impressions", "clicks", "orders", "ctr", "cvr")
    wanted = [f"counter_shelf_{window}_{what}" for window in ("all", "7d") for what in counts]
    assert [(f.name, f.column, f.owner) for f in feature_spec(config).dense] == [(c, c, "item") for c in wanted]
    config = load_config(
        None, ('counters.q.keys=["query"]', 'counters.q.windows=["1d"]', 'counters.q.events=["orders","clicks"]')
    )
    assert [f.name for f in feature_spec(config).dense] == [
        "counter_q_1d_orders",
        "counter_q_1d_clicks",
        "counter_q_1d_cvr",
    ]


def test_a_rate_can_be_had_without_its_counts() -> None:
    asked = ('counters.q.keys=["query"]', 'counters.q.windows=["1d","all"]', 'counters.q.events=["cvr","clicks","ctr"]')
    want = ["counter_q_1d_clicks", "counter_q_1d_ctr", "counter_q_1d_cvr"]
    want += [column.replace("1d", "all") for column in want]
    assert [f.column for f in feature_spec(load_config(None, asked)).dense] == want


def test_the_default_ones_of_which_any_may_be_another() -> None:
    brand = 'features.item_categories=["brand"]'
    config = load_config(
        None, ("counters.defaults=true", brand, 'counters.item.keys=["item_id"]', 'counters.item.windows=["1d"]')
    )
    every = config.every_counter
    assert [(name, c.keys, c.per_scenario) for name, c in every.items()] == [
        ("user", ("user_id",), False),
        ("user_scenario", ("user_id",), True),
        ("item", ("item_id",), True),
        ("item_scenario", ("item_id",), True),
        ("user_brand", ("user_id", "brand"), False),
        ("user_brand_scenario", ("user_id", "brand"), True),
        ("query", ("query",), False),
        ("query_scenario", ("query",), True),
        ("query_item", ("query", "item_id"), False),
        ("query_item_scenario", ("query", "item_id"), True),
    ]
    assert every["item"].windows == ("1d",)
    owners = {f.name: f.owner for f in feature_spec(config).dense}
    assert owners["counter_user_brand_all_ctr"] == owners["counter_query_item_all_cvr"] == "item"
    assert (owners["counter_user_all_orders"], owners["counter_query_all_ctr"]) == ("user", "query")
    without = load_config(None, ("counters.defaults=true", "query_scenarios=[]")).every_counter
    assert list(without) == ["user", "user_scenario", "item", "item_scenario"]
    assert not load_config(None).every_counter


def test_windows_and_events_of_the_default_ones_alone() -> None:
    asked = ("counters.defaults=true", "query_scenarios=[]", 'counters.windows=["all"]', 'counters.events=["ctr"]')
    named = ('counters.a.keys=["item_id"]', 'counters.a.windows=["7d"]')
    config = load_config(None, (*asked, *named))
    assert [f.column for f in feature_spec(config).dense] == [
        "counter_user_all_ctr",
        "counter_user_scenario_all_ctr",
        "counter_item_all_ctr",
        "counter_item_scenario_all_ctr",
        *(f"counter_a_7d_{what}" for what in ("impressions", "clicks", "orders", "ctr", "cvr")),
    ]
    counters = config.row_meaning()["counters"]
    assert counters["user"] == {"keys": ["user_id"], "windows": ["all"], "events": ["ctr"], "per_scenario": False}
    assert set(counters) == {"prior", "user", "user_scenario", "item", "item_scenario", "a"}


def test_without_counters_a_build_does_nothing_for_them() -> None:
    config = load_config(None)
    assert make_plan(config, ()).counted == ()
    assert pack_features(config) == ("user_id", "item_id", "query")
    # No session, no table: nothing is looked at.
    assert write_sums(None, config, Lake("nowhere"), State(), None, {}, dt.date(2026, 1, 1)) is None


def test_keys_are_ids_and_categories_of_every_owner() -> None:
    names = ("user_id", "item_id", "query", "city", "brand", "device")
    keys = ",".join(f'"{name}"' for name in names)
    categories = [
        f'features.{o}_categories=["{n}"]' for o, n in zip(("user", "item", "context"), names[3:], strict=True)
    ]
    config = load_config(None, (*categories, f"counters.a.keys=[{keys}]", 'counters.b.keys=["device"]'))
    assert make_plan(config, ()).counted == (
        ("user_id", "item_id", "query", "owned:city", "owned:brand", "context:device"),
        ("context:device",),
    )
    assert {f.owner for f in feature_spec(config).dense if f.name.startswith("counter_b")} == {"context"}


def test_what_is_counted_decides_what_a_row_means_and_the_warm_up_does_not() -> None:
    assert "counters" not in load_config(None, ("counters.warmup_days=2",)).row_meaning()
    by_name = load_config(None, ('counters.a.keys=["item_id"]', "counters.prior=3"))
    meaning = by_name.row_meaning()["counters"]
    assert meaning == {
        "prior": 3.0,
        "a": {
            "keys": ["item_id"],
            "windows": ["all"],
            "events": ["impressions", "clicks", "orders"],
            "per_scenario": True,
        },
    }


@pytest.mark.parametrize(
    ("counter", "wanted"),
    [
        (('counters.a.keys=["item_id"]', "counters.a.per_scenario=false"), ["feed"]),
        (("counters.defaults=true",), ["feed"]),
        (('counters.a.keys=["item_id"]',), None),
        (('counters.a.keys=["item_id"]', "counters.a.per_scenario=false", 'counters.a.events=["clicks"]'), None),
        ((), None),
    ],
)
def test_scenarios_whose_orders_are_unknown_are_in_no_cvr_over_all(
    counter: tuple[str, ...], wanted: list[str] | None
) -> None:
    """A lake of before, whose cvr has them, has another meaning; lakes without one keep theirs."""
    shop = ('scenarios=["search","feed"]', 'labels.no_order_scenarios=["feed"]')
    assert load_config(None, (*shop, *counter)).row_meaning().get("cvr_without") == wanted
    assert "cvr_without" not in load_config(None, counter).row_meaning()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ('counters.a.keys=["user_id","brand"]', 'features.context_categories=["device"]'),
            r"counters.a.keys: brand is no id or category; there can be: user_id, item_id, query, device$",
        ),
        (
            ('counters.a.keys=["user_id","user_id"]',),
            r"counters.a.keys must name what is counted by, each once, .* got \['user_id', 'user_id'\]",
        ),
        (("counters.a.per_scenario=false",), r"counters.a.keys must name what is counted by, .* got \[\]"),
        (('counters.a.keys=["query"]', 'counters.a.windows=["0d"]'), r"counters.a.windows must name days, each once"),
        (('counters.a.keys=["query"]', 'counters.a.windows=["367d"]'), r"at most '366d'\) or 'all', got \['367d'\]"),
        (
            ('counters.a.keys=["query"]', 'counters.a.windows=["1d","1d"]'),
            r"counters.a.windows must name days, each once",
        ),
        (('counters.a.keys=["query"]', "counters.a.windows=[]"), r"counters.a.windows must name days, each once"),
        (
            ('counters.a.keys=["query"]', 'counters.a.events=["views"]'),
            r"counters.a.events must name some of impressions, clicks, orders, ctr, cvr, each once, got \['views'\]",
        ),
        (
            ('counters.events=["ctr","ctr"]',),
            r"^counters.events must name some of impressions, .* got \['ctr', 'ctr'\]",
        ),
        (
            ('counters.windows=["7d"]', 'counters.a.keys=["item_id"]'),
            r"^counters.windows: is of the default counters, which are off; set counters.defaults=true, or windows in",
        ),
        (('counters.events=["ctr"]',), r"^counters.events: is of the default counters, which are off; .* or events in"),
        (
            ('counters.a.keys=["query", "user_id"]', "query_scenarios=[]"),
            r"^counters.a: counts by query, and no scenario has queries \(search, recommendation\); name one in",
        ),
        (
            ("counters.defaults=true", 'features.item_categories=["brand", "brand_scenario"]'),
            r"^counters.defaults: two of the default counters would be user_brand_scenario; call the cat",
        ),
        (('counters.windows=["a week"]',), r"^counters.windows must name days, each once, .* got \['a week'\]"),
        (
            ('counters.a.keys=["query"]', "counters.a.window=1"),
            r"unknown key 'counters.a.window'; counters.a has: keys, windows",
        ),
        (('counters.A-b.keys=["query"]',), r"counters: 'A-b' must be lower-case letters, digits and '_'"),
        (
            ("counters.priro=3",),
            r"unknown key 'counters.priro'; counters has: prior, warmup_days, defaults, windows, events, "
            r"\[counters.NAME\]; did you mean 'counters.prior'\?",
        ),
        (("counters.prior=0",), r"counters.prior must be in \(0, 1e9\], got 0"),
        (
            ('counters.a.keys=["query"]', 'features.user_numbers=["Counter_a_all_clicks"]'),
            r"features: 'counter_a_all_clicks' is a column of \[counters\]; call the feature another name",
        ),
    ],
)
def test_mistakes_are_one_line(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"^data.only_scenario: a global label is a click or an order in any scenario, so that .*; set model"),
        (
            ("model.multitask.enabled=false", "counters.defaults=true"),
            r"^data.only_scenario: counters.user counts in all scenarios; build a table whose counters have ",
        ),
        (
            ("model.multitask.enabled=false", 'counters.a.keys=["item_id"]', 'model.scenario_weights="rows"'),
            r"^data.only_scenario: model.scenario_weights 'rows' weighs scenarios against one another, and one is left",
        ),
    ],
)
def test_a_model_of_one_scenario_learns_nothing_of_the_others(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ('data.only_scenario="search"', *overrides))
    load_config(None, ('data.only_scenario=""', *overrides))
    asked = ('data.only_scenario="search"', "model.multitask.enabled=false", 'counters.a.keys=["item_id"]')
    assert Config.from_dict(load_config(None, asked).to_dict()).data.only_scenario == "search"


def test_a_lake_of_three_windows_names_the_key_to_set() -> None:
    """The default of earlier versions: neither a build nor a training takes other columns without a word."""
    old = load_config(None, ("counters.defaults=true", 'counters.windows=["1d", "7d", "all"]'))
    now = load_config(None, ("counters.defaults=true",))
    table = {CONFIG_PROPERTY: json.dumps(old.row_meaning(), sort_keys=True)}
    told = (
        r'built with counters.windows = \["1d", "7d", "all"\], the configuration has \["all"\]; .*: take the old value'
    )
    with pytest.raises(DataCheckError, match=told):
        check_meaning("lake/samples", table, now)
    check_meaning("lake/samples", table, old)
    named = load_config(None, ('counters.item.keys=["item_id"]', 'counters.item.windows=["1d"]'))
    table = {CONFIG_PROPERTY: json.dumps(named.row_meaning(), sort_keys=True)}
    with pytest.raises(DataCheckError, match=r'counters.item.windows = \["1d"\], the configuration has \["all"\]'):
        check_meaning("lake/samples", table, load_config(None, ('counters.item.keys=["item_id"]',)))
    with pytest.raises(DataCheckError, match=r"built with counters, .* has none; .* the old \[counters\] "):
        check_meaning("lake/samples", table, load_config(None))
    without = {CONFIG_PROPERTY: json.dumps(load_config(None).row_meaning(), sort_keys=True)}
    with pytest.raises(DataCheckError, match=r"built without counters, the configuration has some; .* leave them out "):
        check_meaning("lake/samples", without, named)


@pytest.mark.parametrize("is_named", [True, False])
def test_a_run_of_an_earlier_version_keeps_its_windows(is_named: bool) -> None:
    """A configuration that names none had three; one without default counters is no other run for it."""
    three = ("1d", "7d", "all")
    saved = load_config(None, ("counters.defaults=true", f"counters.windows={json.dumps(three)}")).to_dict()
    if not is_named:
        del saved["counters"]["windows"]
    assert Config.from_dict(Config.completed(saved)).counters.windows == three
    saved["counters"]["defaults"] = False
    assert Config.completed(saved) == load_config(None).to_dict()


def test_what_has_no_effect_is_refused_of_the_user_and_read_of_an_older_run() -> None:
    saved = load_config(None, ("counters.defaults=true", 'counters.windows=["1d"]')).to_dict()
    saved["counters"]["defaults"] = False
    assert Config.from_dict(saved).counters.windows == ("1d",)
