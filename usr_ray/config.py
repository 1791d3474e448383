"""One configuration for a whole run: TOML file + `--set a.b=c` -> nested frozen dataclasses. Standard library only.

Every key is checked once, here; modules get the dataclass they need as an argument and read no environment.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BACKBONES = ("shared_bottom", "mmoe", "ple", "star", "m2m", "apg")


class UserError(Exception):
    """A mistake of the user's: one clear line (where, found, needed, way out); jobs exit with code 2."""


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


DAY_US = 86_400_000_000
_UNITS_US = {
    "us": 1, "microsecond": 1, "ms": 1000, "millisecond": 1000, "s": 1_000_000, "second": 1_000_000,
    "m": 60_000_000, "min": 60_000_000, "minute": 60_000_000, "h": 3_600_000_000, "hour": 3_600_000_000,
    "d": DAY_US, "day": DAY_US,
}  # fmt: skip


def parse_duration_us(text: str, *, where: str) -> int:
    """Microseconds of a duration such as "1 hour", "24 hours", "90s" or "0 s"; ConfigError naming `where` otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    unit = match and (_UNITS_US.get(match[2]) or _UNITS_US.get(match[2].removesuffix("s")))
    if not match or not unit:
        raise ConfigError(f"{where}: {text!r} is not a duration; write a number and a unit, for example '24 hours'")
    return round(float(match[1]) * unit)


def parse_date(text: str, *, where: str) -> dt.date:
    """The date of "YYYY-MM-DD"; ConfigError naming `where` otherwise."""
    try:
        return dt.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is not a date; write YYYY-MM-DD") from error


def parse_dates(text: str, *, where: str) -> tuple[dt.date, dt.date]:
    """First and last date (both included) of "A:B" or "A"; ConfigError when empty, malformed or reversed."""
    first_text, _, last_text = text.partition(":")
    first = parse_date(first_text, where=where)
    last = parse_date(last_text, where=where) if last_text else first
    if last < first:
        raise ConfigError(f"{where}: the range {text!r} is empty; the first date must not be after the last")
    return first, last


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsConfig:
    """Attribution windows and the meaning of the global labels (contract, section 2)."""

    click_window: str = "1 hour"
    """W_c: a click counts this long after its impression, both ends included."""
    order_window: str = "24 hours"
    """W_o: an order counts this long after its click."""
    global_window: str = ""
    """W_g >= W_c; empty: the click window."""
    global_span: str = "window"
    """'window': [t, t + W_g]; 'day': the impression's UTC day."""
    clock_skew: str = "0 s"
    """How far before its impression a click (or before its click an order) may be stamped."""
    order_without_click: str = "reject"
    """'reject', or 'credit_impression'."""

    def __post_init__(self) -> None:
        _require(self.global_span in ("window", "day"),
                 f"labels.global_span must be 'window' or 'day', got {self.global_span!r}")  # fmt: skip
        _require(self.order_without_click in ("reject", "credit_impression"),
                 "labels.order_without_click must be 'reject' or 'credit_impression', "
                 f"got {self.order_without_click!r}")  # fmt: skip
        for key in ("click_window", "order_window", "clock_skew"):
            parse_duration_us(getattr(self, key), where=f"labels.{key}")
        _require(self.global_window_us >= self.click_window_us,
                 f"labels.global_window ({self.global_window}) must not be shorter than "
                 f"labels.click_window ({self.click_window})")  # fmt: skip

    @property
    def click_window_us(self) -> int:
        """W_c in microseconds."""
        return parse_duration_us(self.click_window, where="labels.click_window")

    @property
    def order_window_us(self) -> int:
        """W_o in microseconds."""
        return parse_duration_us(self.order_window, where="labels.order_window")

    @property
    def global_window_us(self) -> int:
        """W_g in microseconds."""
        return parse_duration_us(self.global_window or self.click_window, where="labels.global_window")

    @property
    def clock_skew_us(self) -> int:
        """Tolerated clock skew in microseconds."""
        return parse_duration_us(self.clock_skew, where="labels.clock_skew")


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoriesConfig:
    """What the user had done before (contract, section 3)."""

    length: int = 50
    """Newest events kept per scenario."""

    def __post_init__(self) -> None:
        _require(self.length > 0, f"histories.length must be positive, got {self.length}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyConfig:
    """How raw ids become rows of an embedding table."""

    kind: str = "fit"
    """'fit': the vocabularies table; 'hash': a hash of the value into num_buckets, no table."""
    min_count: int = 2
    """Impressions of a value in the training dates before it gets an id of its own."""
    num_buckets: int = 1_048_576
    """Rows of every table under kind = 'hash', padding and unknown included."""

    def __post_init__(self) -> None:
        _require(self.kind in ("fit", "hash"), f"vocabulary.kind must be 'fit' or 'hash', got {self.kind!r}")
        _require(self.min_count > 0, f"vocabulary.min_count must be positive, got {self.min_count}")
        _require(self.num_buckets > 2, f"vocabulary.num_buckets must be above 2, got {self.num_buckets}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """Feature columns beyond user_id, item_id and query. Categories get a vocabulary; numbers sign(x) * log1p(|x|)."""

    user_categories: tuple[str, ...] = ()
    user_numbers: tuple[str, ...] = ()
    item_categories: tuple[str, ...] = ()
    item_numbers: tuple[str, ...] = ()
    context_categories: tuple[str, ...] = ()
    context_numbers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [name for f in dataclasses.fields(self) for name in getattr(self, f.name)]
        doubled = sorted({name for name in names if names.count(name) > 1})
        _require(not doubled, f"features: {', '.join(doubled)} named more than once; rename the column in one log")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which dates are for fitting and training, which are held out."""

    train_dates: str = ""
    """'A:B', both included. Vocabularies are fitted on these dates and training reads these dates."""
    eval_dates: str = ""
    """'A:B', held out; after train_dates."""
    mature_only: bool = True
    """Read only rows whose labels are final (is_mature); for training, final at the end of train_dates."""

    def __post_init__(self) -> None:
        for key in ("train_dates", "eval_dates"):
            if getattr(self, key):
                parse_dates(getattr(self, key), where=f"data.{key}")
        if self.train_dates and self.eval_dates:
            train_last = parse_dates(self.train_dates, where="data.train_dates")[1]
            eval_first = parse_dates(self.eval_dates, where="data.eval_dates")[0]
            _require(train_last < eval_first,
                     f"data.eval_dates ({self.eval_dates}) must start after data.train_dates "
                     f"({self.train_dates}) end: a held-out date must not be trained on")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedConfig:
    """The simulated source: a world whose click and order probabilities are known (etl/sources/simulated.py)."""

    seed: int = 2026
    num_impressions: int = 200_000
    num_days: int = 8
    first_date: str = "2026-01-01"
    num_users: int = 4_000
    num_items: int = 2_000
    num_queries: int = 300
    num_categories: int = 40
    similarity: float = 0.5
    """0: tastes in the scenarios are unrelated; 1: they are the same."""
    cross_exposure: float = 0.3
    """Share of impressions whose item the user also meets in another scenario inside the global window."""
    global_noise: float = 0.0
    """Share of clicks logged for cross exposures that carry no information (degrades the global labels)."""
    duplicate_rate: float = 0.01
    """Share of log rows written twice, as real collectors do."""
    late_rate: float = 0.01
    """Share of clicks and orders outside their windows, so that they are rejected."""

    def __post_init__(self) -> None:
        for key in ("num_impressions", "num_days", "num_users", "num_items", "num_queries", "num_categories"):
            _require(getattr(self, key) > 0, f"simulated.{key} must be positive, got {getattr(self, key)}")
        for key in ("similarity", "cross_exposure", "global_noise", "duplicate_rate", "late_rate"):
            _require(0 <= getattr(self, key) <= 1, f"simulated.{key} must be in [0, 1], got {getattr(self, key)}")
        parse_date(self.first_date, where="simulated.first_date")


@dataclass(frozen=True, kw_only=True, slots=True)
class KuaiRandConfig:
    """KuaiRand's mapping onto the contract (etl/sources/kuairand.py)."""

    order_column: str = "long_view"
    """Post-click action that stands in for an order."""
    tab_groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Scenario name -> tabs; every tab not named goes to the last scenario. Empty: the documented default groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KuaiSearchConfig:
    """KuaiSearch's mapping onto the contract (etl/sources/kuaisearch.py)."""

    base_time: str = "2025-01-01T00:00:00Z"
    """time_index 0 becomes this instant; one step becomes `step`. The unit of time_index is not documented."""
    step: str = "60 s"


@dataclass(frozen=True, kw_only=True, slots=True)
class InterestConfig:
    """IE (method, section 3)."""

    enabled: bool = True
    rank: int = 8
    """K: size of the generated core S_X^k."""
    over_parameterisation: int = 32
    """Inner size of the products that U and V are folded from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """FG (method, section 3)."""

    enabled: bool = True
    hidden: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class MultitaskConfig:
    """GLMT (method, section 3)."""

    enabled: bool = True
    variant: str = "A"
    """A: p_ctcvr,k = p_ctcvr,g sig(b_k); B: p_ctcvr,k = p_ctr,k sig(b_k)."""
    alpha: float = 0.5
    """Weight of the global tasks in the loss."""

    def __post_init__(self) -> None:
        _require(self.variant in ("A", "B"), f"model.multitask.variant must be 'A' or 'B', got {self.variant!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """CL on i and on f (method, section 3)."""

    interest_weight: float = 0.02
    """l1; 0 switches CL(i) off."""
    feature_weight: float = 0.02
    """l2; 0 switches CL(f) off."""
    temperature: float = 0.2
    """tau."""
    group_size: int = 128
    """Rows whose vectors serve one another as negatives: fixed, so that the loss does not depend on the workers."""
    mask_rate: float = 0.2
    """Share of history events (and of features) masked in the twin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """USR round a backbone."""

    backbone: str = "shared_bottom"
    embedding_dim: int = 16
    """d."""
    trigger_dim: int = 16
    hidden: tuple[int, ...] = (128, 64)
    """Bottom or expert MLP."""
    tower_hidden: tuple[int, ...] = (32,)
    dropout: float = 0.0
    num_experts: int = 4
    """Experts of MMoE and M2M; shared experts of PLE."""
    num_task_experts: int = 1
    """Experts of each cell in PLE."""
    num_levels: int = 2
    """PLE's levels; meta tower depth of M2M."""
    apg_rank: int = 8
    apg_over_parameterisation: int = 64
    interest: InterestConfig = field(default_factory=InterestConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    multitask: MultitaskConfig = field(default_factory=MultitaskConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)

    def __post_init__(self) -> None:
        _require(self.backbone in BACKBONES,
                 f"model.backbone {self.backbone!r} is not known; choose from: {', '.join(BACKBONES)}")  # fmt: skip
        _require(self.embedding_dim > 0, f"model.embedding_dim must be positive, got {self.embedding_dim}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    seed: int = 0
    num_epochs: int = 1
    global_batch_size: int = 4096
    """Rows of one step over all workers: the same batches whatever the number of workers."""
    order: str = "shuffled"
    """'shuffled': a permutation of the row groups and rows; 'by_date': dates in order, shuffled inside each."""
    learning_rate: float = 0.002
    """AdamW on the dense part."""
    weight_decay: float = 0.0
    embedding_learning_rate: float = 0.05
    """Row-wise Adagrad on the tables."""
    embedding_weight_decay: float = 0.0
    """L2 on the rows touched in a step."""
    warmup_steps: int = 0
    gradient_clip: float = 10.0
    """Global norm of the dense gradients; 0: off."""
    checkpoint_every_steps: int = 50
    keep_checkpoints: int = 3
    log_every_steps: int = 10
    reader_threads: int = 2
    early_stopping: bool = False
    """Keep the weights of the epoch with the best mean log loss on eval_dates, and stop when it grows."""

    def __post_init__(self) -> None:
        for key in ("num_epochs", "global_batch_size", "checkpoint_every_steps", "keep_checkpoints",
                    "log_every_steps", "reader_threads", "learning_rate", "embedding_learning_rate"):  # fmt: skip
            _require(getattr(self, key) > 0, f"train.{key} must be positive, got {getattr(self, key)}")
        _require(self.order in ("shuffled", "by_date"),
                 f"train.order must be 'shuffled' or 'by_date', got {self.order!r}")  # fmt: skip


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

    def __post_init__(self) -> None:
        _require(self.num_workers > 0, f"ray.num_workers must be positive, got {self.num_workers}")
        parse_duration_us(self.timeout, where="ray.timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything one run needs; jobs/configs/*.toml are whole runs."""

    scenarios: tuple[str, ...] = ("search", "recommendation")
    query_scenarios: tuple[str, ...] = ("search",)
    """Scenarios whose impressions carry a query."""
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    histories: HistoriesConfig = field(default_factory=HistoriesConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    simulated: SimulatedConfig = field(default_factory=SimulatedConfig)
    kuairand: KuaiRandConfig = field(default_factory=KuaiRandConfig)
    kuaisearch: KuaiSearchConfig = field(default_factory=KuaiSearchConfig)

    def __post_init__(self) -> None:
        _require(bool(self.scenarios), "scenarios is empty; name at least one")
        _require(len(set(self.scenarios)) == len(self.scenarios), f"scenarios has doubles: {list(self.scenarios)}")
        for name in self.scenarios:
            # The name becomes part of column and log names, so it is never quoted into SQL.
            _require(re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None,
                     f"scenarios: {name!r} must be lower-case letters, digits and '_'")  # fmt: skip
            _require(name not in ("global", "all"), f"scenarios: {name!r} is the name of a total in metrics.json")
        group = self.model.contrastive.group_size
        _require(self.train.global_batch_size % group == 0,
                 f"train.global_batch_size ({self.train.global_batch_size}) must be a multiple of "
                 f"model.contrastive.group_size ({group})")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, as saved in config.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """Inverse of `to_dict`; ConfigError on an unknown key or a value of the wrong type."""
        return _build(cls, raw, path="")


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
        _override(raw, override)
    return Config.from_dict(raw)


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: write it as section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.strip().split(".")
    for section in sections:
        child = raw.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
        raw = child
    raw[last] = value


def _build(kind: type, raw: Any, *, path: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} must be a section, got {raw!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(raw) - set(hints))
    if unknown:
        where = f"{path}." if path else ""
        owner = path or "the configuration"
        raise ConfigError(f"unknown key '{where}{unknown[0]}'; {owner} has: {', '.join(hints)}")
    values = {k: _convert(hints[k], v, path=f"{path}.{k}" if path else k) for k, v in raw.items()}
    return kind(**values)


def _convert(hint: Any, value: Any, *, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path=path)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, v, path=f"{path}[{n}]") for n, v in enumerate(value))
    if origin is not None and not isinstance(hint, types.UnionType):  # Mapping[str, X]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a section, got {value!r}")
        inner = typing.get_args(hint)[1]
        return {str(k): _convert(inner, v, path=f"{path}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path} must be {_NAMES.get(hint, hint)}, got {value!r}")
    return value


_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
