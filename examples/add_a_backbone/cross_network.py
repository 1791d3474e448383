"""A backbone of one's own: DCN-V2. Source: Wang et al., "DCN V2" (WWW'21), equation 1, the parallel structure.

    x_(l+1) = x_0 * (W_l x_l + b_l) + x_l;  h = [x_L ; MLP(x_0)];  logit_c = T_c(h)

All that the package asks of a backbone is here: `__init__(config, dims)`, and `forward`, which gives every row the
logits of its own scenario. Shape letters: B rows, D width of the input, H width of h, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from usr_ray.config import ModelConfig
from usr_ray.model.backbones import Backbone, BackboneDims, BackboneInput
from usr_ray.model.backbones.towers import CellTowers
from usr_ray.model.mlp import MLP


class CrossNetwork(Backbone):
    """`backbone_options.num_cross_layers` (2) cross layers beside an MLP of `hidden`; a tower for each cell."""

    def __init__(self, config: ModelConfig, dims: BackboneDims) -> None:
        super().__init__()
        num_layers = int(config.backbone_options.get("num_cross_layers", 2))
        self.cross = nn.ModuleList(nn.Linear(dims.input_dim, dims.input_dim) for _ in range(num_layers))
        self.deep = MLP(dims.input_dim, config.hidden, dropout=config.dropout)
        # One tower for each (scenario, task); CellTowers computes all and each row keeps its scenario's, so that every
        # parameter takes part in every batch, as the interface asks.
        self.towers = CellTowers(
            dims.num_scenarios, dims.input_dim + self.deep.output_dim, config.tower_hidden, config.dropout
        )

    def forward(self, inputs: BackboneInput) -> Tensor:
        """Logits (B, T)."""
        x_BD = inputs.x_BD
        for layer in self.cross:
            x_BD = inputs.x_BD * layer(x_BD) + x_BD
        h_BH = torch.cat([x_BD, self.deep(inputs.x_BD)], dim=1)
        logits_BT: Tensor = self.towers(h_BH, inputs.scenario_B)
        return logits_BT
