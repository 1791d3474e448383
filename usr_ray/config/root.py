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

from usr_ray.config.etl import (
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
from usr_ray.config.fields import ConfigError, build, complete, override_key, parse_dates, parse_duration_us, require
from usr_ray.config.logs import LogConfig, OnlineConfig, log_names
from usr_ray.config.model import ModelConfig
from usr_ray.config.tune import TuneConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which dates are for fitting and training, which are held out."""

    train_dates: str = ""
    """'A:B', both included. Vocabularies are fitted on these dates and training reads these dates."""
    eval_dates: str = ""
    """'A:B', held out; after train_dates."""
    table_version: int = -1
    """Version of the samples table to train on; -1: the newest when the run starts. The run then stays on it."""
    mature_only: bool = True
    """Read only rows whose labels are final (is_mature); for training, final at the end of train_dates."""

    def __post_init__(self) -> None:
        require(
            self.table_version >= -1, f"data.table_version must be -1 (newest) or a version, got {self.table_version}"
        )
        for key in ("train_dates", "eval_dates"):
            if getattr(self, key):
                parse_dates(getattr(self, key), where=f"data.{key}")
        if self.train_dates and self.eval_dates:
            train_last = parse_dates(self.train_dates, where="data.train_dates")[1]
            eval_first = parse_dates(self.eval_dates, where="data.eval_dates")[0]
            require(
                train_last < eval_first,
                f"data.eval_dates ({self.eval_dates}) must start after data.train_dates "
                f"({self.train_dates}) end: a held-out date must not be trained on",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    seed: int = 0
    num_epochs: int = 1
    global_batch_size: int = 1024
    """Rows of one step over all workers: the same batches whatever the number of workers."""
    order: str = "shuffled"
    """'shuffled': a permutation of the row groups and rows; 'by_date': dates in order, shuffled inside each."""
    learning_rate: float = 0.001
    """AdamW on the dense part."""
    weight_decay: float = 0.0
    embedding_optimizer: str = "rowwise_adagrad"
    """'rowwise_adagrad' or 'rowwise_adam': formulae in docs/embeddings.md."""
    embedding_strategy: str = "replicated"
    """'replicated': every worker holds all tables; 'sharded': each holds its share of the rows (docs/embeddings.md)."""
    embedding_learning_rate: float = 0.03
    """Of the tables; Adam wants less than Adagrad, for example 0.003."""
    embedding_weight_decay: float = 0.0
    """L2 on the rows touched in a step."""
    warmup_steps: int = 0
    """Steps over which both learning rates grow linearly to their value."""
    schedule: str = "none"
    """After the warm-up both rates stay ('none'), or fall to 0 at the run's end along a half 'cosine' or a line
    ('linear'). A larger num_epochs moves the end, and so raises the rates of a run that goes on."""
    warm_start: str = ""
    """Run directory (its best checkpoint, else its newest) or checkpoint to take model and tables from; '': fresh ones.
    Tables that grew since get fresh rows behind the old ones."""
    warm_start_optimizer: bool = True
    """Take the state of both optimisers too; False: model and tables alone."""
    precision: str = "float32"
    """'float32', or 'bf16': autocast of the dense part; weights, tables, log probabilities and loss stay float32."""
    compile: bool = False
    """torch.compile the dense part."""
    gradient_clip: float = 10.0
    """Global norm of the dense gradients; 0: off."""
    checkpoint_every_steps: int = 50
    keep_checkpoints: int = 3
    log_every_steps: int = 10
    reader_threads: int = 2
    reader_shards: int = 1
    """Spans of a block of rows that are shuffled apart. With the number of workers here, or a multiple of it, each
    worker decodes only its own part of a large table; with 1 every worker decodes every row. Part of the order."""
    reader_cache: str = ""
    """Folder on a local disk for decoded row groups, for epochs after the first; '': none."""
    evaluate_every_epochs: int = 1
    """Epochs from one evaluation on eval_dates to the next; the last epoch always has one."""
    early_stopping: bool = False
    """Keep the weights of the epoch with the best mean log loss on eval_dates, and stop when it grows."""

    def __post_init__(self) -> None:
        for key in (
            "num_epochs",
            "global_batch_size",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "log_every_steps",
            "reader_threads",
            "reader_shards",
            "learning_rate",
            "evaluate_every_epochs",
            "embedding_learning_rate",
        ):
            require(getattr(self, key) > 0, f"train.{key} must be positive, got {getattr(self, key)}")
        require(
            self.global_batch_size % self.reader_shards == 0,
            f"train.reader_shards ({self.reader_shards}) must divide train.global_batch_size "
            f"({self.global_batch_size})",
        )
        require(
            self.order in ("shuffled", "by_date"), f"train.order must be 'shuffled' or 'by_date', got {self.order!r}"
        )
        require(
            self.schedule in ("none", "cosine", "linear"),
            f"train.schedule must be 'none', 'cosine' or 'linear', got {self.schedule!r}",
        )
        for key, choices in (
            ("embedding_optimizer", ("rowwise_adagrad", "rowwise_adam")),
            ("embedding_strategy", ("replicated", "sharded")),
        ):
            require(
                getattr(self, key) in choices,
                f"train.{key} must be '{choices[0]}' or '{choices[1]}', got {getattr(self, key)!r}",
            )
        require(
            self.embedding_strategy == "replicated" or self.embedding_optimizer == "rowwise_adagrad",
            "train.embedding_optimizer 'rowwise_adam' needs train.embedding_strategy 'replicated': FBGEMM has no "
            "row-wise Adam with this formula; set rowwise_adagrad or replicated",
        )
        require(
            self.precision in ("float32", "bf16"),
            f"train.precision must be 'float32' or 'bf16', got {self.precision!r}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """Ray Train's workers."""

    num_workers: int = 2
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    max_failures: int = 3
    """Worker losses survived before the run gives up; each restarts from the newest checkpoint."""
    timeout: str = "5 minutes"
    """A collective that takes longer is a failure, not a hang."""
    dashboard: bool = True
    """Whether a Ray that the job starts for itself has a dashboard (about 1 GB of memory)."""

    def __post_init__(self) -> None:
        require(self.num_workers > 0, f"ray.num_workers must be positive, got {self.num_workers}")
        parse_duration_us(self.timeout, where="ray.timeout")


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
        strays = sorted(set(self.query_scenarios) - set(self.scenarios))
        # The default names "search" for the usual pair; a list without search simply has no queries then.
        require(
            not strays or self.query_scenarios == ("search",),
            f"query_scenarios names {', '.join(strays)}, not among scenarios: {', '.join(self.scenarios)}",
        )
        strays = sorted(set(self.labels.no_order_scenarios) - set(self.scenarios))
        require(
            not strays,
            f"labels.no_order_scenarios names {', '.join(strays)}, not among scenarios: {', '.join(self.scenarios)}",
        )
        group = self.model.contrastive.group_size
        require(
            self.train.global_batch_size % group == 0,
            f"train.global_batch_size ({self.train.global_batch_size}) must be a multiple of "
            f"model.contrastive.group_size ({group})",
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, as saved in config.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def completed(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """`raw` as an earlier version saved it, with the defaults of keys that have come since; nothing is checked."""
        return complete(raw, cls().to_dict())

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
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {path}: not TOML ({error})") from error
    for override in overrides:
        override_key(raw, override)
    return Config.from_dict(raw)
