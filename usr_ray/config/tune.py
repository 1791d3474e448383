"""Configuration of the search for hyper-parameters (docs/studies.md, Tuning). Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from usr_ray.config.fields import require

SEARCHES = ("random", "optuna")
SPACE_KINDS = ("log_uniform", "uniform", "int", "choice")
METRICS = {"log_loss": "min", "ctr_auc": "max", "ctcvr_auc": "max"}
"""What train.train reports after each epoch (train_meter.summarise) -> which way is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceConfig:
    """Values of one key that are tried."""

    kind: str = ""
    """'log_uniform' or 'uniform' (from low to high), 'int' (whole, both ends included), 'choice' (of values)."""
    low: float = 0.0
    high: float = 0.0
    values: tuple[str | int | float | bool, ...] = ()

    def check(self, where: str) -> None:
        """Raise ConfigError, naming `where`, unless values can be drawn."""
        require(self.kind in SPACE_KINDS, f"{where}.kind must be one of {', '.join(SPACE_KINDS)}, got {self.kind!r}")
        if self.kind == "choice":
            require(bool(self.values), f"{where}.values is empty; name the values to choose from")
            return
        require(not self.values, f"{where}.values is for kind 'choice'; give low and high")
        require(self.low < self.high, f"{where}: low ({self.low:g}) must be below high ({self.high:g})")
        require(
            self.kind != "log_uniform" or self.low > 0,
            f"{where}.low must be positive for log_uniform, got {self.low:g}",
        )
        require(
            self.kind != "int" or (self.low.is_integer() and self.high.is_integer()),
            f"{where}: low and high must be whole numbers for int, got {self.low:g} and {self.high:g}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """jobs/tune.py."""

    search: str = "random"
    """'random', or 'optuna': its tree-structured Parzen estimator learns from ended trials (extra [optuna])."""
    num_trials: int = 16
    """Combinations that are tried; the first is the configuration as it is, where the space holds it."""
    metric: str = "log_loss"
    """On the choosing dates: 'log_loss' (mean of the tasks), 'ctr_auc' or 'ctcvr_auc' (mean of the scenarios)."""
    choose_days: int = 1
    """Last days of data.train_dates that choose: trials train on the days before, data.eval_dates is not looked at."""
    grace_epochs: int = 1
    """Epochs that ASHA leaves every trial before it may stop the worse ones."""
    reduction: int = 3
    """ASHA goes on with one trial in so many at each rung."""
    max_concurrent: int = 0
    """Trials at once; 0: as many as the cluster's CPUs (or GPUs) hold."""
    seed: int = 0
    """Of the draws; all trials train with train.seed."""
    final_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds with which the chosen and the given configuration are compared on data.eval_dates."""
    space: Mapping[str, SpaceConfig] = field(default_factory=dict)
    """Dotted path -> values: [tune.space."train.learning_rate"]."""

    def __post_init__(self) -> None:
        require(self.search in SEARCHES, f"tune.search must be one of {', '.join(SEARCHES)}, got {self.search!r}")
        for key in ("num_trials", "choose_days", "grace_epochs"):
            require(getattr(self, key) > 0, f"tune.{key} must be positive, got {getattr(self, key)}")
        require(self.reduction > 1, f"tune.reduction must be at least 2, got {self.reduction}")
        require(self.max_concurrent >= 0, f"tune.max_concurrent must not be negative, got {self.max_concurrent}")
        require(self.metric in METRICS, f"tune.metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        require(
            bool(self.final_seeds) and min(self.final_seeds) >= 0,
            f"tune.final_seeds must name at least one seed, none negative, got {self.final_seeds}",
        )
        for path, space in self.space.items():
            space.check(f"tune.space.{path}")
