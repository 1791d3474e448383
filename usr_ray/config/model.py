"""Configuration of USR and its backbones (method, sections 3 and 4). Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from usr_ray.config.fields import FINITE, SIZE, choice, number, require

BACKBONES = ("shared_bottom", "mmoe", "ple", "star", "m2m", "apg", "pepnet")
_OWN_BACKBONE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True, slots=True)
class InterestConfig:
    """IE (method, section 3)."""

    enabled: bool = True
    rank: int = number(8, SIZE)
    """K: size of the generated core S_X^k."""
    over_parameterisation: int = number(32, SIZE)
    """Inner size of the products that U and V are folded from."""

    def __post_init__(self) -> None:
        require(
            self.over_parameterisation >= self.rank,
            f"model.interest.over_parameterisation ({self.over_parameterisation}) must not be below "
            f"model.interest.rank ({self.rank}): the product would lose rank",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """FG (method, section 3)."""

    enabled: bool = True
    hidden: int = number(64, SIZE)


@dataclass(frozen=True, kw_only=True, slots=True)
class MultitaskConfig:
    """GLMT (method, section 3)."""

    enabled: bool = True
    variant: str = choice("A", "B")
    """A: p_ctcvr,k = p_ctcvr,g sig(b_k); B: p_ctcvr,k = p_ctr,k sig(b_k)."""
    alpha: float = number(0.1, "[0, 1000]")
    """Weight of the global tasks in the loss."""
    hidden: tuple[int, ...] = number((64, 32), SIZE)
    """MLP of the global heads, on the joined views."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """CL on i and on f (method, section 3)."""

    interest_weight: float = number(0.02, "[0, 1000]")
    """l1; 0 switches CL(i) off."""
    feature_weight: float = number(0.02, "[0, 1000]")
    """l2; 0 switches CL(f) off."""
    temperature: float = number(0.2, "[0.002, 1000]")  # e^(1 / tau), of which the loss adds up many, must be a number
    """tau."""
    group_size: int = number(128, "[1, 1048576]")
    """Rows whose vectors serve one another as negatives: fixed, so that the loss does not depend on the workers."""
    every_nth_group: int = number(4, "[1, 1048576]")
    """Which groups take part, by their number in the global batch: 1, all; 4, the first of every four. The twins and
    products of the others are not computed. The losses are means over the rows that take part: their weights stay."""
    mask_rate: float = number(0.2, "(0, 1)")
    """Share of history events (and of features) masked in the twin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """USR around a backbone."""

    backbone: str = "shared_bottom"
    """One of BACKBONES, or "module:Class" of your own (examples/add_a_backbone), importable on every machine."""
    backbone_options: Mapping[str, float] = number({}, FINITE)
    """Numbers for a backbone of your own; the seven have keys of their own below."""
    embedding_dim: int = number(16, SIZE)
    """d."""
    trigger_dim: int = number(16, SIZE)
    recent_queries: int = number(10, SIZE)
    """Newest past queries whose mean stands for the query in a query scenario's view of a row without one."""
    event_sides: bool = True
    """Events of histories and the target carry the item's categories beside its id, as far as the table has them."""
    interactions: bool = True
    """Products user * item, query * item and history * item among the features (usr_ray/model/inputs.py)."""
    interaction_hidden: int = number(32, "[0, 65536]")
    """Hidden units of the small tower that each side passes before the products; 0: none."""
    interaction_histories: str = choice("all", "each")
    """Histories whose mean item is multiplied with the item: 'all': the events of all scenarios together; 'each':
    those of each scenario besides, since what a user likes may differ between them."""
    wide: bool = False
    """A first-order part beside the network: one weight a head for each value of the categories, of the categories by
    scenario, and of features.crosses, added to the logits (usr_ray/model/wide.py)."""
    wide_buckets: int = number(1 << 18, "[2, 16777216]")
    """Rows of the one table of those weights; values are hashed into it."""
    wide_l2: float = number(10.0, "[0, 1000]")
    """Weight decay of those weights, as train.weight_decay is of the other matrices."""
    scenario_weights: str = choice("equal", "rows")
    """'equal': every scenario counts the same in the loss, however few rows it has; 'rows': each row does."""
    hidden: tuple[int, ...] = number((128, 64), SIZE)
    """Bottom or expert MLP."""
    tower_hidden: tuple[int, ...] = number((32,), SIZE)
    dropout: float = number(0.0, "[0, 1)")
    num_experts: int = number(4, "[1, 1024]")
    """Experts of MMoE and M2M; shared experts of PLE."""
    num_task_experts: int = number(1, "[1, 1024]")
    """Experts of each cell in PLE."""
    num_levels: int = number(2, "[1, 64]")
    """PLE's levels; 1 is CGC."""
    meta_depth: int = number(2, "[1, 64]")
    """Layers of M2M's meta tower."""
    meta_view_dim: int = number(16, SIZE)
    """Width of M2M's task view T_t and scenario view s."""
    apg_rank: int = number(8, SIZE)
    """K: size of the generated core S of APG."""
    apg_over_parameterisation: int = number(64, SIZE)
    """P >= K: inner size of the products that APG's U and V are folded from."""
    apg_hidden: tuple[int, ...] = number((32,), SIZE)
    """Hidden layers of the MLP that gives APG's S."""
    pepnet_hidden: int = number(64, SIZE)
    """Hidden units of each of PEPNet's gates."""
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
        require(bool(self.hidden), "model.hidden is empty; give at least one width, for example [64]")
        require(
            self.apg_over_parameterisation >= self.apg_rank,
            f"model.apg_over_parameterisation ({self.apg_over_parameterisation}) must not be below "
            f"model.apg_rank ({self.apg_rank}): the product would lose rank",
        )

    @property
    def has_twins(self) -> bool:
        """Rows pass twice, for a contrastive loss."""
        on_interest = self.interest.enabled and self.contrastive.interest_weight > 0
        return on_interest or (self.generator.enabled and self.contrastive.feature_weight > 0)
