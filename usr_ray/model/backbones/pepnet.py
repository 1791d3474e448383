"""PEPNet: gates from the scenario on the input, gates from the row on every hidden layer. Source: Chang et al.,
"PEPNet: Parameter and Embedding Personalized Network for Infusing with Personalized Prior Information" (KDD'23),
section 3.

    gate unit  G(c) = 2 sigmoid(W' relu(W c + b) + b')
    EPNet      x' = G([e_k ; sg(x)]) * x
    PPNet      h_t^0 = x';  h_t^l = G_t^l([trigger ; sg(x')]) * relu(W_t^l h_t^(l-1) + b_t^l)
    logit_t = w_t . h_t^L + c_t

sg stops the gradient, so that a gate learns from its row's embeddings without moving them. A tower for each task serves
all scenarios. The paper's condition of PPNet is the embeddings of user, item and author; they stand in x', and the
trigger stands beside it here (ours: the interface knows no ids).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from usr_ray.config import ModelConfig
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.model.backbones.towers import NUM_TASKS
from usr_ray.model.mlp import MLP


class PEPNet(Backbone):
    """A gated input under a gated tower of `hidden` and then `tower_hidden` widths for each task."""

    def __init__(self, config: ModelConfig, dims: BackboneDims) -> None:
        super().__init__()
        condition_dim = dims.trigger_dim + dims.input_dim
        self.input_gate = GateUnit(dims.scenario_dim + dims.input_dim, config.pepnet_hidden, dims.input_dim)
        self.towers = nn.ModuleList(GatedTower(config, dims.input_dim, condition_dim) for _ in range(NUM_TASKS))

    def forward(self, inputs: BackboneInput) -> Tensor:
        """Logits (B, T)."""
        x_BD = inputs.x_BD
        gate_BD = self.input_gate(torch.cat([inputs.scenario_embedding_BE, x_BD.detach()], dim=-1))
        x_BD = gate_BD * x_BD
        condition_BC = torch.cat([inputs.trigger_BZ, x_BD.detach()], dim=-1)
        return torch.cat([tower(x_BD, condition_BC) for tower in self.towers], dim=-1)


class GatedTower(nn.Module):
    """Layers of `hidden` and `tower_hidden` widths, each scaled by a gate of its own, and a linear logit."""

    def __init__(self, config: ModelConfig, input_dim: int, condition_dim: int) -> None:
        super().__init__()
        widths = (*config.hidden, *config.tower_hidden)
        self.layers = nn.ModuleList(
            MLP(before, (width,), dropout=config.dropout)
            for before, width in zip((input_dim, *widths), widths, strict=False)
        )
        self.gates = nn.ModuleList(GateUnit(condition_dim, config.pepnet_hidden, width) for width in widths)
        self.output = MLP(widths[-1], (), 1)

    def forward(self, h_BI: Tensor, condition_BC: Tensor) -> Tensor:
        """(B, I) -> logit (B, 1)."""
        for layer, gate in zip(self.layers, self.gates, strict=True):
            h_BI = gate(condition_BC) * layer(h_BI)
        logit_B1: Tensor = self.output(h_BI)
        return logit_B1


class GateUnit(nn.Module):
    """2 sigmoid(MLP(condition)): between 0 and 2, near 1 at the start."""

    def __init__(self, condition_dim: int, hidden: int, output_dim: int) -> None:
        super().__init__()
        self.mlp = MLP(condition_dim, (hidden,), output_dim)

    def forward(self, condition_BC: Tensor) -> Tensor:
        """(B, C) -> (B, output_dim)."""
        return 2 * torch.sigmoid(self.mlp(condition_BC))
