"""`[counters]`: counts of past impressions, clicks and orders by keys of a row, as features. Standard library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from usr_ray.config.fields import number, require

COUNTER_IDS = ("user_id", "item_id", "query")
"""Ids that may be counted by, besides categories."""
COUNTED = ("impressions", "clicks", "orders")
"""What is counted, in the order of the columns."""
_RATES = {"ctr": ("impressions", "clicks"), "cvr": ("clicks", "orders")}
"""Rate -> what it is out of, and what it is of."""
ALL_DAYS = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterConfig:
    """`[counters.NAME]`: what is counted, by what, over which days before the row's own."""

    keys: tuple[str, ...] = ()
    windows: tuple[str, ...] = (ALL_DAYS,)
    """Shorter windows besides gained nothing wherever they were tried (docs/learning.md)."""
    events: tuple[str, ...] = COUNTED
    """Counts; two that make a rate bring that rate too. "ctr" and "cvr" are the rates without their counts."""
    per_scenario: bool = True
    """The row's scenario is one more key."""

    def check(self, where: str) -> None:
        """ConfigError naming `where` on a key, window or event that cannot be."""
        require(
            bool(self.keys) and len(set(self.keys)) == len(self.keys),
            f"{where}.keys must name what is counted by, each once, such as ['user_id', 'item_id'], got "
            f"{list(self.keys)}",
        )
        _check_columns(where, self.windows, self.events)

    @staticmethod
    def days(window: str) -> int | None:
        """Days of a window; None: all days before."""
        return None if window == ALL_DAYS else int(window[:-1])

    @property
    def columns(self) -> tuple[str, ...]:
        """What has a column in each window: the counts, then the rates."""
        rates = [name for name, counts in _RATES.items() if name in self.events or set(counts) <= set(self.events)]
        return (*(event for event in self.events if event in COUNTED), *rates)


def _check_columns(where: str, windows: Sequence[str], events: Sequence[str]) -> None:
    """ConfigError naming `where` on a window or an event that cannot be."""
    good = [re.fullmatch(rf"{ALL_DAYS}|[1-9]\d{{0,2}}d", w) and (CounterConfig.days(w) or 0) <= 366 for w in windows]
    require(
        bool(windows) and all(good) and len(set(windows)) == len(windows),
        f"{where}.windows must name days, each once, such as '1d', '7d' (at most '366d') or '{ALL_DAYS}', "
        f"got {list(windows)}",
    )
    require(
        bool(events) and set(events) <= {*COUNTED, *_RATES} and len(set(events)) == len(events),
        f"{where}.events must name some of {', '.join((*COUNTED, *_RATES))}, each once, got {list(events)}",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CountersConfig:
    """Counters of past days (docs/tables.md, counters); none by default."""

    prior: float = number(20.0, "(0, 1e9]")
    """Impressions (clicks) at the scenario's own rate that every ctr (cvr) begins with."""
    warmup_days: int = number(0, "[0, 366]")
    """How many of the first counted days, which have none behind them, are not trained on."""
    defaults: bool = False
    """Counters of user, item, query, user x each item category, and query x item: over all scenarios, and of each."""
    windows: tuple[str, ...] = (ALL_DAYS,)
    """Windows of the default counters."""
    events: tuple[str, ...] = COUNTED
    """Events that the default counters count."""
    named: Mapping[str, CounterConfig] = field(default_factory=dict, metadata={"takes_sections": True})
    """Every other section [counters.NAME]."""

    def __post_init__(self) -> None:
        _check_columns("counters", self.windows, self.events)
        for name, counter in self.named.items():
            require(
                re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None,
                f"counters: {name!r} must be lower-case letters, digits and '_': it is part of column names",
            )
            counter.check(f"counters.{name}")

    def every(self, item_categories: Sequence[str], *, has_queries: bool) -> dict[str, CounterConfig]:
        """Name -> counter, the default ones first where they are wanted; one of the same name takes its place.

        Args:
            item_categories: as in the features; each has a default counter with the user.
            has_queries: some scenario has; else there is no default counter by query.
        """
        usual: dict[str, tuple[str, ...]] = {}
        if self.defaults:
            usual = {"user": ("user_id",), "item": ("item_id",)}
            usual |= {f"user_{name}": ("user_id", name) for name in item_categories}
            usual |= {"query": ("query",), "query_item": ("query", "item_id")} if has_queries else {}
        own = {"windows": self.windows, "events": self.events}
        found = {
            f"{name}{'_scenario' if per_scenario else ''}": CounterConfig(keys=keys, per_scenario=per_scenario, **own)
            for name, keys in usual.items()
            for per_scenario in (False, True)
        }
        return found | dict(self.named)


COUNTER_COLUMN = re.compile(r"(counter_.+)_(?:\d+d|all)_[a-z]+")
"""Matches a column whole; its group is what all columns of the counter begin with."""


def counter_columns(name: str, counter: CounterConfig) -> list[str]:
    """Columns of a counter in the samples, window by window."""
    return [f"counter_{name}_{window}_{what}" for window in counter.windows for what in counter.columns]
