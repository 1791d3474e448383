"""Configuration of USR and its backbones (method, sections 3 and 4). Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from usr_ray.config.fields import require

BACKBONES = ("shared_bottom", "mmoe", "ple", "star", "m2m", "apg")
_OWN_BACKBONE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True, slots=True)
class InterestConfig:
    """IE (method, section 3)."""

    enabled: bool = True
    rank: int = 8
    """K: size of the generated core S_X^k."""
    over_parameterisation: int = 32
    """Inner size of the products that U and V are folded from."""

    def __post_init__(self) -> None:
        for key in ("rank", "over_parameterisation"):
            require(getattr(self, key) > 0, f"model.interest.{key} must be positive, got {getattr(self, key)}")
        require(
            self.over_parameterisation >= self.rank,
            f"model.interest.over_parameterisation ({self.over_parameterisation}) must not be below "
            f"model.interest.rank ({self.rank}): the product would lose rank",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """FG (method, section 3)."""

    enabled: bool = True
    hidden: int = 64

    def __post_init__(self) -> None:
        require(self.hidden > 0, f"model.generator.hidden must be positive, got {self.hidden}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MultitaskConfig:
    """GLMT (method, section 3)."""

    enabled: bool = True
    variant: str = "A"
    """A: p_ctcvr,k = p_ctcvr,g sig(b_k); B: p_ctcvr,k = p_ctr,k sig(b_k)."""
    alpha: float = 0.1
    """Weight of the global tasks in the loss."""
    hidden: tuple[int, ...] = (64, 32)
    """MLP of the global heads, on the joined views."""

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"model.multitask.alpha must not be negative, got {self.alpha}")
        require(self.variant in ("A", "B"), f"model.multitask.variant must be 'A' or 'B', got {self.variant!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """CL on i and on f (method, section 3)."""

    interest_weight: float = 0.02
    """l1; 0 switches CL(i) off."""
    feature_weight: float = 0.02
    """l2; 0 switches CL(f) off."""
    temperature: float = 0.2
    """tau, at least 0.002."""
    group_size: int = 128
    """Rows whose vectors serve one another as negatives: fixed, so that the loss does not depend on the workers."""
    mask_rate: float = 0.2
    """Share of history events (and of features) masked in the twin."""

    def __post_init__(self) -> None:
        for key in ("interest_weight", "feature_weight"):
            require(getattr(self, key) >= 0, f"model.contrastive.{key} must not be negative, got {getattr(self, key)}")
        for key in ("temperature", "group_size"):
            require(getattr(self, key) > 0, f"model.contrastive.{key} must be positive, got {getattr(self, key)}")
        # e^(1 / tau), of which the loss adds up many, must be a number.
        require(
            self.temperature >= 0.002, f"model.contrastive.temperature must be at least 0.002, got {self.temperature}"
        )
        require(0 < self.mask_rate < 1, f"model.contrastive.mask_rate must be in (0, 1), got {self.mask_rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """USR round a backbone."""

    backbone: str = "shared_bottom"
    """One of BACKBONES, or "module:Class" of your own (examples/add_a_backbone), importable on every machine."""
    backbone_options: Mapping[str, float] = field(default_factory=dict)
    """Numbers for a backbone of your own; the six have keys of their own below."""
    embedding_dim: int = 16
    """d."""
    trigger_dim: int = 16
    recent_queries: int = 10
    """Newest past queries whose mean stands for the query in a query scenario's view of a row without one."""
    interactions: bool = True
    """Products user * item, query * item and history * item among the features (usr_ray/model/inputs.py)."""
    scenario_weights: str = "equal"
    """'equal': every scenario counts the same in the loss, however few rows it has; 'rows': each row does."""
    hidden: tuple[int, ...] = (128, 64)
    """Bottom or expert MLP."""
    tower_hidden: tuple[int, ...] = (32,)
    dropout: float = 0.0
    num_experts: int = 4
    """Experts of MMoE and M2M; shared experts of PLE."""
    num_task_experts: int = 1
    """Experts of each cell in PLE."""
    num_levels: int = 2
    """PLE's levels; 1 is CGC."""
    meta_depth: int = 2
    """Layers of M2M's meta tower."""
    meta_view_dim: int = 16
    """Width of M2M's task view T_t and scenario view s."""
    apg_rank: int = 8
    """K: size of the generated core S of APG."""
    apg_over_parameterisation: int = 64
    """P >= K: inner size of the products that APG's U and V are folded from."""
    apg_hidden: tuple[int, ...] = (32,)
    """Hidden layers of the MLP that gives APG's S."""
    interest: InterestConfig = field(default_factory=InterestConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    multitask: MultitaskConfig = field(default_factory=MultitaskConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)

    def __post_init__(self) -> None:
        is_own = _OWN_BACKBONE.fullmatch(self.backbone) is not None
        require(
            self.backbone in BACKBONES or is_own,
            f"model.backbone {self.backbone!r} is not known; choose from: {', '.join(BACKBONES)}; or name a class "
            "of your own as module:Class",
        )
        require(
            is_own or not self.backbone_options,
            f"model.backbone_options is for a backbone of your own (module:Class), got {self.backbone!r}; leave it out",
        )
        for key in (
            "embedding_dim",
            "trigger_dim",
            "recent_queries",
            "num_experts",
            "num_task_experts",
            "num_levels",
            "meta_depth",
            "meta_view_dim",
            "apg_rank",
        ):
            require(getattr(self, key) > 0, f"model.{key} must be positive, got {getattr(self, key)}")
        for key in ("hidden", "tower_hidden", "apg_hidden"):
            widths = getattr(self, key)
            require(all(width > 0 for width in widths), f"model.{key} must hold positive widths, got {list(widths)}")
        require(
            self.scenario_weights in ("equal", "rows"),
            f"model.scenario_weights must be 'equal' or 'rows', got {self.scenario_weights!r}",
        )
        require(bool(self.hidden), "model.hidden is empty; give at least one width, for example [64]")
        require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), got {self.dropout}")
        require(
            self.apg_over_parameterisation >= self.apg_rank,
            f"model.apg_over_parameterisation ({self.apg_over_parameterisation}) must not be below "
            f"model.apg_rank ({self.apg_rank}): the product would lose rank",
        )
