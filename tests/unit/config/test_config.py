"""The configuration: what is read, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from usr_ray.config import (
    DAY_US,
    Config,
    ConfigError,
    UserError,
    load_config,
    parse_date,
    parse_dates,
    parse_duration_us,
)
from usr_ray.config.fields import Range, parse_instant_us

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "jobs" / "configs").glob("*.toml"))


def test_defaults_are_valid_and_survive_json() -> None:
    config = load_config(None)
    assert config.scenarios == ("search", "recommendation")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid_and_survives_json(path: Path) -> None:
    config = load_config(path)
    assert Config.from_dict(config.to_dict()) == config
    assert set(config.query_scenarios) <= set(config.scenarios)
    assert config.data.train_dates
    assert config.data.eval_dates


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'scenarios = ["feed"]\n[train]\nnum_epochs = 3\nlearning_rate = 0.5\n[kuairand.tab_groups]\nmain = [1]\n'
    )
    config = load_config(
        file,
        [
            "train.num_epochs=5",
            "train.num_epochs=7",
            "model.backbone=ple",
            "train.weight_decay=1",
            'scenarios=["a", "b"]',
            "kuairand.tab_groups.rest=[0, 2]",
            "data.train_dates=2026-01-01:2026-01-02",
        ],
    )
    assert config.train.num_epochs == 7
    assert config.train.learning_rate == 0.5
    assert config.model.backbone == "ple"
    assert config.train.weight_decay == 1.0
    assert isinstance(config.train.weight_decay, float)
    assert config.scenarios == ("a", "b")
    assert config.kuairand.tab_groups == {"main": (1,), "rest": (0, 2)}
    assert config.data.train_dates == "2026-01-01:2026-01-02"


def test_a_bare_date_is_read_as_text(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[data]\ntrain_dates = 2026-01-01\n")
    config = load_config(file, ["data.eval_dates=2026-01-02", "kuaisearch.base_time=2026-01-01T00:00:00Z"])
    assert (config.data.train_dates, config.data.eval_dates) == ("2026-01-01", "2026-01-02")
    assert config.kuaisearch.base_time_us == 1_767_225_600_000_000


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(None).train.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "us"),
    [
        ("1 hour", 3_600_000_000),
        ("24 hours", DAY_US),
        ("0 s", 0),
        ("90s", 90_000_000),
        ("1.5 min", 90_000_000),
        (" 2 days ", 2 * DAY_US),
        ("250ms", 250_000),
        ("7 us", 7),
        ("3 m", 180_000_000),
        ("1 day", 86_400_000_000),
    ],
)
def test_durations(text: str, us: int) -> None:
    assert parse_duration_us(text, where="x") == us


def test_windows_mean_the_same_to_the_microsecond_and_as_older_tables_have_them() -> None:
    def meant(window: str) -> str:
        return load_config(None, (f'labels.order_window="{window}"',)).row_meaning()["labels"]["order_window"]

    assert (meant("1 hour"), meant("60 min"), meant("30 days")) == ("3600 s", "3600 s", "2.592e+06 s")
    assert len({meant(window) for window in ("30 days", "2592001 s", "2592000000001 us", "1 s", "1000001 us")}) == 5


@pytest.mark.parametrize("text", ["", "hour", "1", "-1 hour", "1 fortnight", "1 hour 5 minutes", "1e3 s", "one hour"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    message = f"labels.x: {text!r} is not a duration; write a number and a unit, for example '24 hours'"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse_duration_us(text, where="labels.x")


def test_dates_and_ranges() -> None:
    assert parse_date("2026-02-28", where="x").isoformat() == "2026-02-28"
    assert [d.isoformat() for d in parse_dates("2026-01-01:2026-01-07", where="x")] == ["2026-01-01", "2026-01-07"]
    assert [d.isoformat() for d in parse_dates("2026-01-01", where="x")] == ["2026-01-01", "2026-01-01"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2026-02-30", "--dates: '2026-02-30' is not a date; write YYYY-MM-DD"),
        ("", "--dates: '' is not a date; write YYYY-MM-DD"),
        ("2026-01-01:", "--dates: '2026-01-01:' has no last date; write A:B, or A alone for one day"),
        (
            "2026-01-02:2026-01-01",
            "--dates: the range '2026-01-02:2026-01-01' is empty; the first date must not be after the last",
        ),
    ],
)
def test_what_is_no_range_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse_dates(text, where="--dates")


def test_instants_need_a_zone() -> None:
    assert parse_instant_us("1970-01-01T02:00:01+02:00", where="x") == 1_000_000
    with pytest.raises(ConfigError, match=r"^x: 'noon' is not a time; write YYYY-MM-DDTHH:MM:SSZ$"):
        parse_instant_us("noon", where="x")
    with pytest.raises(ConfigError, match=r"^x: '2026-01-01T00:00:00' has no time zone; end it with Z for UTC$"):
        parse_instant_us("2026-01-01T00:00:00", where="x")


def keys_of(kind: type, prefix: str = "") -> Iterator[tuple[str, str, dataclasses.Field[Any]]]:
    """(dotted path, type, field) of every value of a configuration; a section in a mapping is called 'name'."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = [hints[field.name], *typing.get_args(hints[field.name])]
        path = f"{prefix}{field.name}"
        nested = [hint for hint in inner if dataclasses.is_dataclass(hint)]
        if nested:
            yield from keys_of(nested[0], f"{path}.{'name.' * (len(inner) > 1)}")  # type: ignore[arg-type]
        else:
            yield path, str(field.type), field


KEYS = {path: (kind, field) for path, kind, field in keys_of(Config)}
NUMBERS = {path: field for path, (kind, field) in KEYS.items() if re.search(r"\b(int|float)\b", kind)}


def test_every_number_of_the_configuration_has_a_range() -> None:
    assert len(NUMBERS) > 70
    assert [path for path, field in NUMBERS.items() if "range" not in field.metadata] == []
    for path, field in NUMBERS.items():
        low, high = field.metadata["range"].low, field.metadata["range"].high
        assert math.isfinite(low), path
        assert low < high < math.inf, path


def refused(override: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    return str(error.value)


def single(path: str) -> bool:
    """True for a key of one number; the space of a search and the logs are sections that others need keys beside."""
    return KEYS[path][0] in ("int", "float") and ".name." not in path


@pytest.mark.parametrize("path", [path for path in NUMBERS if single(path)])
def test_a_number_outside_its_range_is_refused_and_its_ends_are_not(path: str) -> None:
    within, kind = NUMBERS[path].metadata["range"], KEYS[path][0]
    outside = [within.low - 1, within.high + 1 if kind == "int" else within.high * 2 + 1, "-" + "9" * 20, "9" * 330]
    outside += ["nan", "inf", "-inf"] * (kind == "float")
    for value in outside:
        message = refused(f"{path}={value}")
        assert message.startswith(f"{path} must be in {within.text}, got "), value
    for end, value in ((within.text[0], within.low), (within.text[-1], within.high)):
        if end in "()":
            assert refused(f"{path}={value}").startswith(f"{path} must be in {within.text}, got ")
        else:
            message = ""
            try:
                load_config(None, [f"{path}={value}"])
            except ConfigError as error:
                message = str(error)  # what another key asks of it
            assert "must be in" not in message, path


CHOICES = {path: field for path, (_, field) in KEYS.items() if "choices" in field.metadata and ".name." not in path}


@pytest.mark.parametrize("path", CHOICES)
def test_a_word_that_is_no_choice_is_refused_with_those_there_are(path: str) -> None:
    *words, last = map(repr, CHOICES[path].metadata["choices"])
    assert refused(f"{path}=strange") == f"{path} must be {', '.join(words)} or {last}, got 'strange'"


def test_ranges_are_read_as_they_are_written() -> None:
    half = Range.of("[0, 1)")
    assert [value in half for value in (-0.001, 0, 0.5, 1, float("nan"))] == [False, True, True, False, False]
    assert [value in Range.of("(0, 2]") for value in (0, 1, 2, 3)] == [False, True, True, False]
    assert Range.of("[1, 9223372036854775807]").high == 2**63 - 1  # whole numbers stay exact


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ray.timeout=0 s", "ray.timeout must be between 1 s and 30 days, got '0 s'"),
        ("labels.order_window=99999999999999 days", "labels.order_window must be between 0 s and 366 days, got"),
        (f"labels.order_window={'9' * 400} days", "labels.order_window must be between 0 s and 366 days, got"),
        ("model.backbone_options.depth=nan", "model.backbone_options.depth must be in [-1e300, 1e300], got nan"),
        ("kuairand.tab_groups.a=[1, -1]", "kuairand.tab_groups.a[1] must be in [0, 1000000000], got -1"),
        ("tune.final_seeds=[0, -1]", "tune.final_seeds[1] must be in [0, 4294967295], got -1"),
        ("tune.space.seed={kind='uniform',low=0,high=inf}", "tune.space.seed.high must be in [-1e300, 1e300], got inf"),
        ("tune.space.seed={kind='choice',values=[nan]}", "tune.space.seed.values[0] must be in [-1e300, 1e300], got"),
        ("logs.orders.constants.price=inf", "logs.orders.constants.price must be in [-1e300, 1e300], got inf"),
        (
            "data.train_dates=0001-01-01",
            "data.train_dates: '0001-01-01' is not a date from 1970 to 2199; write YYYY-MM-DD",
        ),
        (
            "data.train_dates=9999-12-31",
            "data.train_dates: '9999-12-31' is not a date from 1970 to 2199; write YYYY-MM-DD",
        ),
    ],
)
def test_numbers_that_make_no_sense_are_refused(override: str, message: str) -> None:
    assert refused(override).startswith(message)


REFUSED = [
    # Reading values
    ("train.learning_rat=1", "unknown key 'train.learning_rat'; train has: seed, num_epochs, global_batch_size"),
    ("trian.seed=1", "unknown key 'trian'; the configuration has: scenarios, query_scenarios, labels"),
    ("model.interest.ranks=1", "unknown key 'model.interest.ranks'; model.interest has: enabled, rank"),
    ("train=3", "train must be a section, got 3"),
    ("kuairand.tab_groups=3", "kuairand.tab_groups must be a section, got 3"),
    ("train.seed=x", "train.seed must be a whole number, got 'x'"),
    ("train.seed=1.5", "train.seed must be a whole number, got 1.5"),
    ("train.seed=true", "train.seed must be a whole number, got True"),
    ("train.learning_rate=fast", "train.learning_rate must be a number, got 'fast'"),
    ("train.learning_rate=true", "train.learning_rate must be a number, got True"),
    ("ray.use_gpu=1", "ray.use_gpu must be true or false, got 1"),
    ("model.backbone=3", "model.backbone must be a string, got 3"),
    ("model.hidden=64", "model.hidden must be a list, got 64"),
    ('model.hidden=["a"]', "model.hidden[0] must be a whole number, got 'a'"),
    ("kuairand.tab_groups.main=1", "kuairand.tab_groups.main must be a list, got 1"),
    ("train.seed", "--set 'train.seed': write it as section.key=value"),
    ("=3", "--set '=3': write it as section.key=value"),
    # Scenarios
    (
        'labels.no_order_scenarios=["feed"]',
        "labels.no_order_scenarios names feed, not among scenarios: search, recommendation",
    ),
    ('data.only_scenario="feed"', "data.only_scenario 'feed' is not among scenarios: search, recommendation"),
    ("scenarios=[]", "scenarios is empty; name at least one"),
    ('scenarios=["a", "a"]', "scenarios has doubles: ['a', 'a']"),
    ('scenarios=["Search"]', "scenarios: 'Search' must be lower-case letters, digits and '_'"),
    ("""scenarios=["a'; drop"]""", "must be lower-case letters, digits and '_'"),
    ('scenarios=["global"]', "scenarios: 'global' is the name of a total in metrics.json"),
    ('scenarios=["all"]', "scenarios: 'all' is the name of a total in metrics.json"),
    # Labels and data
    ("labels.click_window=soon", "labels.click_window: 'soon' is not a duration"),
    ("labels.order_window=1", "labels.order_window must be a string, got 1"),
    ("labels.clock_skew=a bit", "labels.clock_skew: 'a bit' is not a duration"),
    ("labels.global_window=later", "labels.global_window: 'later' is not a duration"),
    (
        "labels.global_window=5 minutes",
        "labels.global_window (5 minutes) must not be shorter than labels.click_window (1 hour)",
    ),
    ("data.train_dates=yesterday", "data.train_dates: 'yesterday' is not a date; write YYYY-MM-DD"),
    ("data.eval_dates=2026-01-02:2026-01-01", "data.eval_dates: the range '2026-01-02:2026-01-01' is empty"),
    # Sources
    ("simulated.num_impressions=7", "simulated.num_impressions (7) must not be below simulated.num_days (8)"),
    ("simulated.num_categories=2000", "simulated.num_items (1000) must not be below simulated.num_categories (2000)"),
    ("simulated.num_queries=5", "simulated.num_queries (5) must not be below simulated.num_categories (24)"),
    ("simulated.first_date=today", "simulated.first_date: 'today' is not a date; write YYYY-MM-DD"),
    ("kuaisearch.step=0 s", "kuaisearch.step must be between 1 us and 366 days, got '0 s'"),
    ("kuaisearch.base_time=today", "kuaisearch.base_time: 'today' is not a time"),
    (
        "jdsearch.base_time=2022-11-01T01:00:00Z",
        "jdsearch.base_time must be midnight UTC, got '2022-11-01T01:00:00+00:00': no history may share its date",
    ),
    ("jdsearch.base_time=then", "jdsearch.base_time: 'then' is not a time"),
    # Model
    (
        "model.backbone=dnn",
        "model.backbone 'dnn' is not known; choose from: shared_bottom, mmoe, ple, star, m2m, apg, pepnet; "
        "or name a class of your own as module:Class",
    ),
    ("model.backbone=mine:", "model.backbone 'mine:' is not known"),
    (
        "model.backbone_options.depth=2",
        "model.backbone_options is for a backbone of your own (module:Class), got 'shared_bottom'; leave it out",
    ),
    ("model.hidden=[]", "model.hidden is empty; give at least one width, for example [64]"),
    ("model.hidden=[64, 0]", "model.hidden[1] must be in [1, 65536], got 0"),
    ("model.tower_hidden=[-1]", "model.tower_hidden[0] must be in [1, 65536], got -1"),
    ("model.apg_rank=65", "model.apg_over_parameterisation (64) must not be below model.apg_rank (65)"),
    ("model.interest.rank=33", "model.interest.over_parameterisation (32) must not be below model.interest.rank (33)"),
    # Training
    (
        "train.global_batch_size=1000",
        "train.global_batch_size (1000) must be a multiple of model.contrastive.group_size (128)",
    ),
    ("ray.timeout=long", "ray.timeout: 'long' is not a duration"),
]


def test_clicks_that_orders_make_are_not_final_before_orders() -> None:
    overrides = ["data.final_labels=clicks", "labels.order_window=2 hours"]
    assert load_config(None, overrides).order_wait_us == 7_200_000_000
    assert load_config(None, overrides[1:]).order_wait_us == 0
    message = (
        "data.final_labels 'clicks' needs labels.order_without_click 'reject': with 'credit_impression' an order "
        "makes a click, so clicks are final no sooner than orders; set data.final_labels to 'all'"
    )
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*overrides, "labels.order_without_click=credit_impression"])


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[override for override, _ in REFUSED])
def test_what_cannot_be_used_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_config(None, [override])
    assert isinstance(error.value, UserError)
    assert "\n" not in str(error.value)


def test_several_keys_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--set 'train.seed.x=1': 'seed' is a value, not a section$"):
        load_config(None, ["train.seed=1", "train.seed.x=1"])
    with pytest.raises(ConfigError, match=r"^data.eval_dates \(2026-01-02\) must start after data.train_dates "):
        load_config(None, ["data.train_dates=2026-01-01:2026-01-02", "data.eval_dates=2026-01-02"])
    with pytest.raises(ConfigError, match=r"^features: tab named more than once; rename the column in one log$"):
        load_config(None, ['features.user_categories=["tab"]', 'features.context_numbers=["tab"]'])
    with pytest.raises(ConfigError, match=r"^kuairand.tab_groups: tab 1, 3 is in more than one group$"):
        load_config(None, ["kuairand.tab_groups.a=[1, 3]", "kuairand.tab_groups.b=[3, 2, 1]"])


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"none.toml: cannot be read \(No such file or directory\); name a TOML file$"
    ):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ConfigError, match=r"bad.toml: not TOML \("):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    with pytest.raises(ConfigError, match=r"latin.toml: not TOML \("):
        load_config(tmp_path / "latin.toml")


def test_windows_in_microseconds() -> None:
    labels = load_config(None, ["labels.click_window=2 hours", "labels.clock_skew=3 s"]).labels
    assert (labels.click_window_us, labels.order_window_us) == (7_200_000_000, DAY_US)
    assert labels.global_window_us == labels.click_window_us  # empty: the click window
    assert labels.clock_skew_us == 3_000_000


@pytest.mark.integration
def test_the_configuration_needs_the_standard_library_alone() -> None:
    script = (
        "import sys, usr_ray.config\n"
        "outside = {m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names) - {'usr_ray', '__main__'}\n"
        "assert not outside, outside"
    )
    subprocess.run([sys.executable, "-S", "-c", script], check=True, cwd=ROOT)
