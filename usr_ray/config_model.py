"""Configuration of USR and its backbones (method, sections 3 and 4). Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from usr_ray.config_fields import require

BACKBONES = ("shared_bottom", "mmoe", "ple", "star", "m2m", "apg")


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
        require(self.variant in ("A", "B"), f"model.multitask.variant must be 'A' or 'B', got {self.variant!r}")


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
        require(self.backbone in BACKBONES,
                 f"model.backbone {self.backbone!r} is not known; choose from: {', '.join(BACKBONES)}")  # fmt: skip
        require(self.embedding_dim > 0, f"model.embedding_dim must be positive, got {self.embedding_dim}")
