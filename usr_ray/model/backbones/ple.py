"""PLE: own experts for each cell beside shared ones, extracted over levels. Source: Tang et al., "Progressive Layered
Extraction (PLE): A Novel Multi-Task Learning Model for Personalized Recommendations" (RecSys'20), equations 1 to 6.

    each level:              x_c <- softmax(W_c x_c) . [E_c(x_c) ; E_S(x_S)]
    each level but the last: x_S <- softmax(W_S x_S) . [E_1(x_1) ; .. ; E_C(x_C) ; E_S(x_S)], all experts
    logit_c = T_c(x_c)

All right-hand sides are the level's inputs. One level is CGC. The gates are linear, without bias.
Shape letters: C cells, N experts of one cell, M shared experts,
G experts a gate chooses from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from usr_ray.config import ModelConfig
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.model.backbones.towers import NUM_TASKS, CellTowers, StackedMLP, gate_shares, glorot_uniform_, shares_of


class ExtractionLevel(nn.Module):
    """One level of CGC: `num_task_experts` experts of each cell, `num_experts` shared ones, and their gates.

    Args:
        input_dim: width of x_c, and of x_S as well.
        is_last: the last level has no shared gate, for nothing would read it.
    """

    def __init__(self, config: ModelConfig, num_cells: int, input_dim: int, *, is_last: bool) -> None:
        super().__init__()
        self.num_task_experts = config.num_task_experts
        num_own, num_shared = num_cells * config.num_task_experts, config.num_experts
        self.task_experts = StackedMLP(num_own, input_dim, config.hidden, dropout=config.dropout)
        self.shared_experts = StackedMLP(num_shared, input_dim, config.hidden, dropout=config.dropout)
        self.output_dim = self.task_experts.output_dim
        self.task_gates_CIG = nn.Parameter(torch.empty(num_cells, input_dim, config.num_task_experts + num_shared))
        glorot_uniform_(self.task_gates_CIG)
        self.shared_gate_IG: nn.Parameter | None = None
        if not is_last:
            self.shared_gate_IG = nn.Parameter(torch.empty(input_dim, num_own + num_shared))
            glorot_uniform_(self.shared_gate_IG)

    def forward(self, cells: Tensor, shared_BI: Tensor) -> tuple[Tensor, Tensor]:
        """The cells' (B, C, H) and the shared (B, H) outputs of a level.

        Args:
            cells: x_c, (B, C, I); or (B, I) in the first level, where all cells see the same input.
            shared_BI: x_S. The last level gives it back unchanged.
        """
        gates_CIG = self.task_gates_CIG
        if cells.dim() == 2:
            expert_inputs = cells
            shares_BCG = gate_shares(cells, gates_CIG)
        else:  # expert n of cell c is number c * N + n of the stack
            expert_inputs = cells.repeat_interleave(self.num_task_experts, dim=1)
            shares_BCG = shares_of(torch.einsum("bci,cig->bcg", cells, gates_CIG))
        own_BCNH = self.task_experts(expert_inputs).unflatten(1, (-1, self.num_task_experts))
        shared_BMH = self.shared_experts(shared_BI)
        own_BCN, common_BCM = shares_BCG.split([self.num_task_experts, shared_BMH.shape[1]], dim=2)
        cells_BCH = torch.einsum("bcn,bcnh->bch", own_BCN, own_BCNH) + torch.bmm(common_BCM, shared_BMH)
        if self.shared_gate_IG is None:
            return cells_BCH, shared_BI
        all_BGH = torch.cat([own_BCNH.flatten(1, 2), shared_BMH], dim=1)
        shares_BG = (shared_BI @ self.shared_gate_IG).softmax(dim=-1)
        return cells_BCH, torch.einsum("bg,bgh->bh", shares_BG, all_BGH)


class PLE(Backbone):
    """`num_levels` extraction levels under a tower of `tower_hidden` widths for each cell."""

    def __init__(self, config: ModelConfig, dims: BackboneDims) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        width = dims.input_dim
        for level in range(config.num_levels):
            is_last = level == config.num_levels - 1
            self.levels.append(ExtractionLevel(config, dims.num_scenarios * NUM_TASKS, width, is_last=is_last))
            width = config.hidden[-1]
        self.towers = CellTowers(dims.num_scenarios, width, config.tower_hidden, config.dropout)

    def forward(self, inputs: BackboneInput) -> Tensor:
        """Logits (B, T)."""
        cells, shared_BI = inputs.x_BD, inputs.x_BD
        for level in self.levels:
            cells, shared_BI = level(cells, shared_BI)
        logits_BT: Tensor = self.towers(cells, inputs.scenario_B)
        return logits_BT
