"""Configuration of the search for hyper-parameters (docs/studies.md, Tuning). Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from usr_ray.config.fields import COUNT, FINITE, SEED, choice, number, require

SEARCHES = ("random", "optuna")
SPACE_KINDS = ("log_uniform", "uniform", "int", "choice")
METRICS = {"log_loss": "min", "ctr_auc": "max", "ctcvr_auc": "max"}
"""What training reports after each epoch (training/monitor.summarise) -> which way is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceConfig:
    """Values of one key that are tried."""

    kind: str = ""
    """'log_uniform' or 'uniform' (from low to high), 'int' (whole, both ends included), 'choice' (of values)."""
    low: float = number(0.0, FINITE)
    high: float = number(0.0, FINITE)
    values: tuple[str | int | float | bool, ...] = number((), FINITE)

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

    search: str = choice(*SEARCHES)
    """'random', or 'optuna': its tree-structured Parzen estimator learns from ended trials (extra [optuna])."""
    num_trials: int = number(16, "[1, 100000]")
    """Combinations to try; the first is the configuration as given, where the space holds it."""
    metric: str = choice(*METRICS)
    """On the choosing dates: 'log_loss' (mean of the tasks), 'ctr_auc' or 'ctcvr_auc' (mean of the scenarios)."""
    choose_days: int = number(1, "[1, 3660]")
    """Last days of data.train_dates that choose: trials train on the days before, data.eval_dates is not used."""
    grace_epochs: int = number(1, COUNT)
    """Epochs that every trial gets before ASHA may stop the worse ones."""
    reduction: int = number(3, "[2, 1000]")
    """ASHA keeps one trial in so many at each rung."""
    max_concurrent: int = number(0, "[0, 100000]")
    """Trials at once; 0: as many as the cluster's CPUs (or GPUs) hold."""
    seed: int = number(0, SEED)
    """Seed of the draws; all trials train with train.seed."""
    final_seeds: tuple[int, ...] = number((0, 1, 2, 3, 4), SEED)
    """Seeds with which the chosen and the given configuration are compared on data.eval_dates."""
    space: Mapping[str, SpaceConfig] = field(default_factory=dict)
    """Dotted path -> values: [tune.space."train.learning_rate"]."""

    def __post_init__(self) -> None:
        require(bool(self.final_seeds), "tune.final_seeds is empty; name at least one seed")
        for path, space in self.space.items():
            space.check(f"tune.space.{path}")
