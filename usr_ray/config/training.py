"""Configuration of a training: its dates, the loop, Ray Train's workers, the search. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from usr_ray.config.fields import COUNT, FINITE, SEED, choice, duration, number, parse_dates, require


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which dates are for fitting and training, which are held out."""

    train_dates: str = ""
    """'A:B', both included. Vocabularies are fitted on these dates, and training reads them."""
    eval_dates: str = ""
    """'A:B', held out; after train_dates."""
    allow_missing_dates: bool = False
    """Take the dates that are there where others of those asked for have no rows (--allow-missing-dates)."""
    table_version: int = number(-1, "[-1, 9223372036854775807]")
    """Version of the samples table to train on; -1: the newest when the run starts. The run then stays on it."""
    mature_only: bool = True
    """Train only on rows whose labels were final at the end of train_dates (and are: is_mature); off: on every row.
    Evaluations take only rows whose labels are final, either way."""
    final_labels: str = choice("all", "clicks")
    """Which labels of a row must be final at the end of train_dates for training to count it: 'all', or 'clicks': its
    orders take part in the loss only where they are final too. Of use with mature_only; held-out rows want all."""
    only_scenario: str = ""
    """Train and evaluate on the rows and the histories of this scenario alone, as if there were no other; '': on all.
    Global labels (GLMT) and counters of all scenarios are refused with it, since they know the others. For comparisons
    (study joint): such a run is not exported and scores nothing."""

    def __post_init__(self) -> None:
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

    seed: int = number(0, SEED)
    num_epochs: int = number(1, COUNT)
    global_batch_size: int = number(1024, "[1, 16777216]")
    """Rows of one step over all workers: the same batches whatever the number of workers."""
    order: str = choice("shuffled", "by_date")
    """'shuffled': a permutation of the row groups and rows; 'by_date': dates in order, shuffled inside each."""
    learning_rate: float = number(0.001, "(0, 1000]")
    """AdamW on the dense part."""
    weight_decay: float = number(0.0, "[0, 1000]")
    """AdamW's, of the dense part but for biases, norms and factors that begin at 1 (training.optimizers.is_decayed)."""
    embedding_optimizer: str = choice("rowwise_adagrad", "rowwise_adam")
    """'rowwise_adagrad' or 'rowwise_adam': formulae in docs/embeddings.md."""
    embedding_strategy: str = choice("replicated", "sharded")
    """'replicated': every worker holds all tables; 'sharded': each holds its share of the rows (docs/embeddings.md)."""
    embedding_learning_rate: float = number(0.03, "(0, 1000]")
    """Learning rate of the tables; Adam wants less than Adagrad, for example 0.003."""
    embedding_weight_decay: float = number(0.0, "[0, 1000]")
    """L2 on the rows touched in a step."""
    warmup_steps: int = number(0, "[0, 1000000000]")
    """Steps over which both learning rates grow linearly to their value."""
    schedule: str = choice("none", "cosine", "linear")
    """After the warm-up both rates stay ('none'), or fall to 0 at the run's end along a half 'cosine' or a line
    ('linear'). A larger num_epochs moves the end, and so raises the rates of a run that goes on."""
    warm_start: str = ""
    """Run directory (its best checkpoint, else its newest) or checkpoint to take model and tables from; '': fresh ones.
    Tables that grew since get fresh rows behind the old ones."""
    warm_start_optimizer: bool = True
    """Take the state of both optimisers too; False: model and tables alone."""
    precision: str = choice("float32", "bf16")
    """'float32', or 'bf16': autocast of the dense part; weights, tables, log probabilities and loss stay float32."""
    compile: bool = False
    """torch.compile the dense part."""
    gradient_clip: float = number(10.0, "[0, 1e9]")
    """Global norm of the dense gradients; 0: off."""
    average: float = number(0.0, "[0, 1)")
    """Evaluate, export and score averages of the weights over the last steps, some 1 / (1 - average) of them (0.99: a
    hundred), the tables' among them (docs/learning.md); 0: the last step's weights. Goes with a larger
    embedding_learning_rate than without."""
    checkpoint_every_steps: int = number(50, COUNT)
    keep_checkpoints: int = number(3, COUNT)
    log_every_steps: int = number(10, COUNT)
    reader_threads: int = number(2, "[1, 1024]")
    reader_shards: int = number(1, "[1, 65536]")
    """Spans of a block of rows that are shuffled apart. With the number of workers here, or a multiple of it, each
    worker decodes only its own part of a large table; with 1 every worker decodes every row. Part of the order."""
    reader_cache: str = ""
    """Folder on each worker's local disk for decoded row groups, for epochs after the first and later runs of the same
    rows; each set of rows has a subfolder, which stays until somebody deletes it. '': none."""
    evaluate_every_epochs: int = number(1, COUNT)
    """Epochs from one evaluation on eval_dates to the next; the last epoch always has one."""
    early_stopping: bool = False
    """Keep the weights of the epoch with the best mean log loss on eval_dates, and stop when it grows."""

    def __post_init__(self) -> None:
        require(
            self.global_batch_size % self.reader_shards == 0,
            f"train.reader_shards ({self.reader_shards}) must divide train.global_batch_size "
            f"({self.global_batch_size})",
        )
        require(
            self.embedding_strategy == "replicated" or self.embedding_optimizer == "rowwise_adagrad",
            "train.embedding_optimizer 'rowwise_adam' needs train.embedding_strategy 'replicated': FBGEMM has no "
            "row-wise Adam with this formula; set rowwise_adagrad or replicated",
        )
        require(
            self.embedding_strategy == "replicated" or self.average == 0,
            f"train.average {self.average} needs train.embedding_strategy 'replicated': FBGEMM changes the rows of "
            "sharded tables where their averages cannot follow; set train.average=0 or replicated",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """Ray Train's workers."""

    num_workers: int = number(2, "[0, 100000]")
    """0: one rank in the job's own process, without Ray: what is small starts in seconds, and nothing restarts it."""
    use_gpu: bool = False
    cpus_per_worker: float = number(1.0, "[0.01, 1024]")
    max_failures: int = number(3, "[-1, 1000000000]")
    """Worker losses survived before the run gives up; each restarts from the newest checkpoint."""
    timeout: str = duration("5 minutes", "1 s", "30 days")
    """A collective that takes longer is a failure, not a hang."""
    dashboard: bool = True
    """Whether a Ray that the job starts for itself has a dashboard (about 1 GB of memory)."""


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
    """The search for hyper-parameters of jobs/tune.py (docs/studies.md, Tuning)."""

    search: str = choice(*SEARCHES)
    """'random', or 'optuna': its tree-structured Parzen estimator learns from ended trials (extra [optuna])."""
    num_trials: int = number(16, "[1, 100000]")
    """Combinations to try; the first is the configuration as given, where the space holds it."""
    metric: str = choice(*METRICS)
    """Metric that chooses: 'log_loss' (mean of the tasks), 'ctr_auc' or 'ctcvr_auc' (mean of the scenarios)."""
    choose_days: int = number(1, "[1, 3660]")
    """Last days of data.train_dates that choose: trials train on the days before, data.eval_dates is not used."""
    grace_epochs: int = number(1, COUNT)
    """Epochs that every trial gets before ASHA may stop the worse ones."""
    reduction: int = number(3, "[2, 1000]")
    """ASHA keeps one trial in this many at each rung."""
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
