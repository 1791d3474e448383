"""Batches and sizes the backbone tests share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from usr_ray.config import BACKBONES, ModelConfig
from usr_ray.model.backbones import Backbone, BackboneDims, BackboneInput, build_backbone

torch.set_num_threads(1)  # rows this small are slower on more threads
INPUT_DIM, SCENARIO_DIM, TRIGGER_DIM = 6, 3, 4
SMALL = ModelConfig(
    hidden=(8, 5),
    tower_hidden=(4,),
    num_experts=3,
    num_task_experts=2,
    num_levels=2,
    meta_depth=2,
    meta_view_dim=4,
    apg_rank=3,
    apg_over_parameterisation=7,
    apg_hidden=(5,),
    pepnet_hidden=5,
)
ALL = BACKBONES


def small_backbone(name: str, *, num_scenarios: int = 3, seed: int = 0, config: ModelConfig = SMALL) -> Backbone:
    """A float64 backbone with every parameter moved off its start, so that ones and zeros hide nothing."""
    torch.manual_seed(seed)
    backbone = build_backbone(
        replace(config, backbone=name),
        BackboneDims(
            input_dim=INPUT_DIM, scenario_dim=SCENARIO_DIM, trigger_dim=TRIGGER_DIM, num_scenarios=num_scenarios
        ),
    ).double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return backbone


def batch_of(scenarios: list[int], *, seed: int = 1, padding: int = 0) -> BackboneInput:
    """Random float64 rows of the given scenarios; the last `padding` of them have weight 0."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(scenarios)

    def draw(width: int) -> Tensor:
        return torch.randn(num_rows, width, generator=generator, dtype=torch.float64)

    weights_B = torch.ones(num_rows, dtype=torch.float64)
    weights_B[num_rows - padding :] = 0
    return BackboneInput(
        x_BD=draw(INPUT_DIM),
        scenario_B=torch.tensor(scenarios),
        scenario_embedding_BE=draw(SCENARIO_DIM),
        trigger_BZ=draw(TRIGGER_DIM),
        weights_B=weights_B,
    )


def rows(inputs: BackboneInput, index: Tensor | slice) -> BackboneInput:
    """The rows `index` of a batch."""
    return BackboneInput(
        x_BD=inputs.x_BD[index],
        scenario_B=inputs.scenario_B[index],
        scenario_embedding_BE=inputs.scenario_embedding_BE[index],
        trigger_BZ=inputs.trigger_BZ[index],
        weights_B=inputs.weights_B[index],
    )


def weighted_sum(logits_BT: Tensor, inputs: BackboneInput) -> Tensor:
    """A scalar that gives each real row and task another weight, and padding none."""
    coefficients_BT = torch.linspace(-1, 2, logits_BT.numel(), dtype=logits_BT.dtype).view_as(logits_BT)
    return (logits_BT * coefficients_BT * inputs.weights_B.unsqueeze(1)).sum()
