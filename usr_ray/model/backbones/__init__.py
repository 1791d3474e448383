"""The seven backbones, and your own, behind one interface: BackboneInput in, the row's own logits (B, T) out."""

from __future__ import annotations

from collections.abc import Callable

from usr_ray.config import ModelConfig
from usr_ray.model.backbones.apg import APG
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.model.backbones.m2m import M2M
from usr_ray.model.backbones.mmoe import MMoE
from usr_ray.model.backbones.own import OwnBackboneError, check_backbone, own_backbone
from usr_ray.model.backbones.pepnet import PEPNet
from usr_ray.model.backbones.ple import PLE
from usr_ray.model.backbones.shared_bottom import SharedBottom
from usr_ray.model.backbones.star import STAR

__all__ = ["Backbone", "BackboneDims", "BackboneInput", "OwnBackboneError", "build_backbone", "check_own_backbone"]

_KINDS: dict[str, Callable[[ModelConfig, BackboneDims], Backbone]] = {
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "star": STAR,
    "m2m": M2M,
    "apg": APG,
    "pepnet": PEPNet,
}


def build_backbone(config: ModelConfig, dims: BackboneDims) -> Backbone:
    """The backbone that `config.backbone` names, with weights drawn from torch's global generator.

    Raises:
        OwnBackboneError: there is no such module or class, or it is no Backbone.
    """
    kind = _KINDS.get(config.backbone) or own_backbone(config.backbone)
    return kind(config, dims)


def check_own_backbone(config: ModelConfig, *, num_scenarios: int) -> None:
    """Refuse a backbone of the user's that breaks the interface, on a few rows, before any process starts.

    Raises:
        OwnBackboneError: as `build_backbone`, or it does not do what `Backbone` promises.
    """
    if config.backbone not in _KINDS:
        check_backbone(config, own_backbone(config.backbone), num_scenarios=num_scenarios)
