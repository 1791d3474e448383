"""MMoE: shared experts, one gate for each cell. Source: Ma et al., "Modeling Task Relationships in Multi-task Learning
with Multi-gate Mixture-of-Experts" (KDD'18), equations 4 to 6.

    f_c = sum_i softmax(W_c x)_i E_i(x);  logit_c = T_c(f_c)

The gates are linear, without bias. Shape letters: G experts, C cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from usr_ray.config import ModelConfig
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.model.backbones.towers import NUM_TASKS, CellTowers, StackedMLP, gate_shares, glorot_uniform_


class MMoE(Backbone):
    """`num_experts` experts of `hidden` widths; a gate and a tower of `tower_hidden` widths for each cell."""

    def __init__(self, config: ModelConfig, dims: BackboneDims) -> None:
        super().__init__()
        self.experts = StackedMLP(config.num_experts, dims.input_dim, config.hidden, dropout=config.dropout)
        num_cells = dims.num_scenarios * NUM_TASKS
        self.gates_CIG = nn.Parameter(torch.empty(num_cells, dims.input_dim, config.num_experts))
        glorot_uniform_(self.gates_CIG)
        self.towers = CellTowers(dims.num_scenarios, self.experts.output_dim, config.tower_hidden, config.dropout)

    def forward(self, inputs: BackboneInput) -> Tensor:
        """Logits (B, T)."""
        experts_BGH = self.experts(inputs.x_BD)
        mixed_BCH = torch.bmm(gate_shares(inputs.x_BD, self.gates_CIG), experts_BGH)
        logits_BT: Tensor = self.towers(mixed_BCH, inputs.scenario_B)
        return logits_BT
