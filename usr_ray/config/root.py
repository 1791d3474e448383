"""One configuration for a whole run: TOML file + `--set a.b=c` -> nested frozen dataclasses. Standard library only.

Every key is checked once, here; modules get the dataclass they need as an argument and read no environment.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from usr_ray.config.counters import COUNTER_IDS, CounterConfig, CountersConfig, counter_columns
from usr_ray.config.etl import (
    REJECT_REASONS,
    FeaturesConfig,
    HistoriesConfig,
    JdSearchConfig,
    KuaiRandConfig,
    KuaiSarConfig,
    KuaiSearchConfig,
    LabelsConfig,
    LimitsConfig,
    SimulatedConfig,
    VocabularyConfig,
)
from usr_ray.config.fields import ConfigError, build, complete, override_key, require
from usr_ray.config.logs import LogConfig, OnlineConfig, log_names
from usr_ray.config.model import ModelConfig
from usr_ray.config.training import DataConfig, RayConfig, TrainConfig, TuneConfig

_BEFORE: dict[str, Any] = {
    "model": {"contrastive": {"every_nth_group": 1}},
    "counters": {"windows": ["1d", "7d", "all"]},
}
"""Keys whose default is not what a version without them did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything one run needs; jobs/configs/*.toml are whole runs."""

    scenarios: tuple[str, ...] = ("search", "recommendation")
    query_scenarios: tuple[str, ...] = ("search",)
    """Scenarios whose impressions carry a query."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    logs: Mapping[str, LogConfig] = field(default_factory=dict)
    """Logs that are made from the shop's own files; the others are entries of the --logs folder."""
    histories: HistoriesConfig = field(default_factory=HistoriesConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    counters: CountersConfig = field(default_factory=CountersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    simulated: SimulatedConfig = field(default_factory=SimulatedConfig)
    kuairand: KuaiRandConfig = field(default_factory=KuaiRandConfig)
    kuaisearch: KuaiSearchConfig = field(default_factory=KuaiSearchConfig)
    kuaisar: KuaiSarConfig = field(default_factory=KuaiSarConfig)
    jdsearch: JdSearchConfig = field(default_factory=JdSearchConfig)

    def __post_init__(self) -> None:
        require(bool(self.scenarios), "scenarios is empty; name at least one")
        require(len(set(self.scenarios)) == len(self.scenarios), f"scenarios has doubles: {list(self.scenarios)}")
        for name in self.scenarios:
            # The name becomes part of column and log names, so it is never quoted into SQL.
            require(
                re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None,
                f"scenarios: {name!r} must be lower-case letters, digits and '_'",
            )
            require(name not in ("global", "all"), f"scenarios: {name!r} is the name of a total in metrics.json")
        known = log_names(self.scenarios)
        unknown = sorted(set(self.logs) - set(known))
        require(
            not unknown,
            f"unknown log 'logs.{''.join(unknown[:1])}'; with these scenarios there can be: {', '.join(known)}",
        )
        for name, log in self.logs.items():
            log.check(f"logs.{name}")
        unknown = sorted(set(self.limits.max_reject_shares) - set(known))
        require(
            not unknown,
            f"unknown log 'limits.max_reject_shares.{''.join(unknown[:1])}'; there can be: {', '.join(known)}",
        )
        strays = sorted(set(self.query_scenarios) - set(self.scenarios))
        # The default names "search" for the usual pair; a list without search simply has no queries then.
        require(
            not strays or self.query_scenarios == ("search",),
            f"query_scenarios names {', '.join(strays)}, not among scenarios: {', '.join(self.scenarios)}",
        )
        require(
            self.data.only_scenario in ("", *self.scenarios),
            f"data.only_scenario {self.data.only_scenario!r} is not among scenarios: {', '.join(self.scenarios)}",
        )
        strays = sorted(set(self.labels.no_order_scenarios) - set(self.scenarios))
        require(
            not strays,
            f"labels.no_order_scenarios names {', '.join(strays)}, not among scenarios: {', '.join(self.scenarios)}",
        )
        require(
            self.data.final_labels == "all" or self.labels.order_without_click == "reject",
            "data.final_labels 'clicks' needs labels.order_without_click 'reject': with 'credit_impression' an order "
            "makes a click, so clicks are final no sooner than orders; set data.final_labels to 'all'",
        )
        self._check_counters()
        require(
            self.model.wide or not self.features.crosses,
            "features.crosses is for the first-order part; set model.wide=true, or leave the crosses out",
        )
        has_queries = bool(set(self.query_scenarios) & set(self.scenarios))
        for key in ("query_terms", "query_tags"):
            require(
                has_queries or not getattr(self.features, key),
                f"features.{key}: no scenario has queries ({', '.join(self.scenarios)}); name one in "
                "query_scenarios, or take the key out",
            )
        group = self.model.contrastive.group_size
        require(
            self.train.global_batch_size % group == 0,
            f"train.global_batch_size ({self.train.global_batch_size}) must be a multiple of "
            f"model.contrastive.group_size ({group})",
        )

    def _check_counters(self) -> None:
        features = self.features
        keys = (*COUNTER_IDS, *features.user_categories, *features.item_categories, *features.context_categories)
        for name, counter in self.every_counter.items():
            strays = sorted(set(counter.keys) - set(keys))
            require(
                not strays,
                f"counters.{name}.keys: {', '.join(strays)} is no id or category; there can be: {', '.join(keys)}",
            )
        columns = [column for name, counter in self.every_counter.items() for column in counter_columns(name, counter)]
        numbers = (*features.user_numbers, *features.item_numbers, *features.context_numbers)
        names = [name.lower() for name in (*keys, *numbers, *columns)]
        twice = [column for column in columns if names.count(column.lower()) > 1]
        require(not twice, f"features: '{''.join(twice[:1])}' is a column of [counters]; call the feature another name")

    def check_effect(self) -> None:
        """ConfigError on settings that would have no effect, or another than they are meant for. Not asked of saved
        configurations: older runs stay readable.
        """
        self._check_only_scenario()
        usual = CountersConfig()
        for key in ("windows", "events"):
            require(
                self.counters.defaults or getattr(self.counters, key) == getattr(usual, key),
                f"counters.{key}: is of the default counters, which are off; set counters.defaults=true, or {key} in "
                "each [counters.NAME]",
            )
        categories = self.features.item_categories
        twice = next((f"{name}_scenario" for name in categories if f"{name}_scenario" in categories), "")
        require(
            not (self.counters.defaults and twice),
            f"counters.defaults: two of the default counters would be user_{twice}; call the category {twice} "
            "another name",
        )
        has_queries = bool(set(self.query_scenarios) & set(self.scenarios))
        by_query = [name for name, counter in self.counters.named.items() if "query" in counter.keys]
        require(
            has_queries or not by_query,
            f"counters.{''.join(by_query[:1])}: counts by query, and no scenario has queries "
            f"({', '.join(self.scenarios)}); name one in query_scenarios, or take the counter out",
        )
        for log, shares in self.limits.max_reject_shares.items():
            strays = sorted(set(shares) - set(REJECT_REASONS))
            require(
                not strays,
                f"limits.max_reject_shares.{log}.{''.join(strays[:1])}: no such reason; choose from: "
                f"{', '.join(REJECT_REASONS)}",
            )

    def _check_only_scenario(self) -> None:
        """Refuse what would bring the other scenarios into a model of one."""
        if not self.data.only_scenario:
            return
        require(
            not self.model.multitask.enabled,
            "data.only_scenario: a global label is a click or an order in any scenario, so that the model would learn "
            "from the others; set model.multitask.enabled=false",
        )
        strays = [name for name, counter in self.every_counter.items() if not counter.per_scenario]
        require(
            not strays,
            f"data.only_scenario: counters.{''.join(strays[:1])} counts in all scenarios; build a table whose counters "
            "have per_scenario=true (the default ones have not), or none",
        )
        require(
            self.model.scenario_weights == "equal",
            "data.only_scenario: model.scenario_weights 'rows' weighs scenarios against one another, and one is left; "
            "set it to 'equal'",
        )

    @property
    def order_wait_us(self) -> int:
        """How much later than its clicks a row's orders are final, where training counts the row as of its clicks."""
        return self.labels.order_window_us if self.data.final_labels == "clicks" else 0

    @property
    def every_counter(self) -> dict[str, CounterConfig]:
        """Name -> counter: those of [counters.NAME], and the default ones where they are wanted."""
        has_queries = bool(set(self.query_scenarios) & set(self.scenarios))
        return self.counters.every(self.features.item_categories, has_queries=has_queries)

    @property
    def cvr_without(self) -> tuple[str, ...]:
        """Scenarios whose clicks are no trials of a `cvr` over all scenarios: no log records their orders."""
        over_all = any(not one.per_scenario and "cvr" in one.columns for one in self.every_counter.values())
        return tuple(s for s in self.scenarios if over_all and s in self.labels.no_order_scenarios)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, as saved in config.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def row_meaning(self) -> dict[str, Any]:
        """The keys that decide what a row of the samples means; min_count is not one: it only adds ids."""
        raw = self.to_dict()
        meaning = {key: raw[key] for key in ("scenarios", "query_scenarios", "labels", "histories")}
        meaning["features"] = json.loads(json.dumps(self.features.row_meaning()))
        # "60 minutes" is "1 hour", and an empty global window is the click window.
        for name in ("click_window", "order_window", "global_window", "clock_skew"):
            seconds = getattr(self.labels, f"{name}_us") / 1e6
            short = f"{seconds:g}"  # as older tables have it; six digits do not tell 2592000 s from 2592001
            meaning["labels"][name] = (short if float(short) == seconds else repr(seconds)) + " s"
        if self.limits.max_user_events_per_day:
            meaning["limits"] = {"max_user_events_per_day": self.limits.max_user_events_per_day}
        if self.every_counter:  # by what they are, however they were asked for
            counters = {name: dataclasses.asdict(counter) for name, counter in self.every_counter.items()}
            meaning["counters"] = json.loads(json.dumps({"prior": self.counters.prior, **counters}))
        if self.cvr_without:
            meaning["cvr_without"] = [*self.cvr_without]
        meaning["vocabulary"] = {"kind": self.vocabulary.kind}
        if self.vocabulary.kind == "hash":
            meaning["vocabulary"]["num_buckets"] = self.vocabulary.num_buckets
        return meaning

    def key_of(self, meaning: str) -> str:
        """The key to set for an entry of `row_meaning`, both by dotted path: default counters share two of theirs."""
        found = re.fullmatch(r"counters\.(\w+)\.(windows|events)", meaning)
        is_default = found and found[1] in self.every_counter and found[1] not in self.counters.named
        return f"counters.{found[2]}" if found and is_default else meaning

    @classmethod
    def completed(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """`raw` as an earlier version saved it, with keys that have come since as it meant them; nothing is checked."""
        usual = cls().to_dict()
        found = complete(complete(raw, _BEFORE), usual)
        counters = found["counters"]
        if isinstance(counters, dict) and not counters["defaults"]:  # the default was another one, and without effect
            counters["windows"] = usual["counters"]["windows"]
        return found

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """Inverse of `to_dict`; ConfigError on an unknown key or a value of the wrong type."""
        return build(cls, raw, path="")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a TOML file (None: the defaults) with `a.b=c` overrides applied in order.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, a value has the wrong type or range.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); name a TOML file") from error
        except ValueError as error:
            raise ConfigError(f"--config {path}: not TOML ({error})") from error
    for override in overrides:
        override_key(raw, override)
    config = Config.from_dict(raw)
    config.check_effect()
    return config
