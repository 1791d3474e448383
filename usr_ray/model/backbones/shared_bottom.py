"""SharedBottom: one bottom for all, one tower for each cell. Source: Caruana, "Multitask Learning" (1997).

h = MLP(x);  logit_c = T_c(h)
"""

from __future__ import annotations

from torch import Tensor

from usr_ray.config import ModelConfig
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.model.backbones.towers import CellTowers
from usr_ray.model.mlp import MLP


class SharedBottom(Backbone):
    """One MLP of `hidden` widths under a tower of `tower_hidden` widths for each (scenario, task) cell."""

    def __init__(self, config: ModelConfig, dims: BackboneDims) -> None:
        super().__init__()
        self.bottom = MLP(dims.input_dim, config.hidden, dropout=config.dropout)
        self.towers = CellTowers(dims.num_scenarios, self.bottom.output_dim, config.tower_hidden, config.dropout)

    def forward(self, inputs: BackboneInput) -> Tensor:
        """Logits (B, T)."""
        logits_BT: Tensor = self.towers(self.bottom(inputs.x_BD), inputs.scenario_B)
        return logits_BT
