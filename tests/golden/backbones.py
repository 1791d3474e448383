"""Golden losses of the backbones: a short seeded training of each, in float64.

A refactor leaves them as they are. After a change that is meant to change them, write them anew and say why:

    python -m tests.golden.backbones
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tests.unit.backbone_batches import ALL, INPUT_DIM, SCENARIO_DIM, SMALL, TRIGGER_DIM, batch_of
from usr_ray.model.backbones import BackboneDims, build_backbone

GOLDEN = Path(__file__).with_name("backbones.json")
NUM_STEPS = 6


def losses(name: str) -> list[float]:
    """Mean CTR and CTCVR cross-entropy before each of NUM_STEPS SGD steps, then once in evaluation."""
    torch.manual_seed(11)
    backbone = build_backbone(
        replace(SMALL, backbone=name),
        BackboneDims(input_dim=INPUT_DIM, scenario_dim=SCENARIO_DIM, trigger_dim=TRIGGER_DIM, num_scenarios=3),
    ).double()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05, momentum=0.9)
    measured = []
    for step in range(NUM_STEPS + 1):
        inputs = batch_of([(row * row + step) % 3 for row in range(32)], seed=step)
        labels_BT = torch.stack([inputs.x_BD[:, 0] > 0, inputs.x_BD[:, 1] > inputs.x_BD[:, 2]], dim=1).double()
        backbone.train(step < NUM_STEPS)
        loss = nn.functional.binary_cross_entropy_with_logits(backbone(inputs), labels_BT)
        measured.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return measured


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in ALL}, indent=2) + "\n", encoding="utf-8")
