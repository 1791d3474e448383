"""M2M: weights generated from the scenario, in the attention over experts and in the towers. Source: Zhang et al.,
"Leaving No One Behind: A Multi-Scenario Multi-Task Meta Learning Approach for Advertiser Modeling" (WSDM'22).

    experts       E_i(x);  task view  T_t = MLP(e_t);  scenario view  s = MLP([e_k ; trigger])
    meta unit     Meta(h) = LeakyReLU(reshape(V_w s + v_w) h + V_b s + v_b)
    attention     a_{t,i} = v^T Meta([E_i ; T_t]);  alpha_t = softmax over the experts i;  L_t = sum_i alpha_{t,i} E_i
    tower         L_t <- LeakyReLU(Meta(L_t) + L_t), `meta_depth` times
    logit_t = w_t . L_t + c_t

The attention and each layer of the tower have a meta unit of their own, which serves both tasks.
Shape letters: P view, G experts, H expert output, O meta output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from usr_ray.config import ModelConfig
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.model.backbones.towers import NUM_TASKS, StackedMLP, glorot_uniform_
from usr_ray.model.mlp import MLP


class M2M(Backbone):
    """`num_experts` experts of `hidden` widths, meta attention over them, meta towers of `meta_depth` layers."""

    def __init__(self, config: ModelConfig, dims: BackboneDims) -> None:
        super().__init__()
        view_dim = config.meta_view_dim
        self.experts = StackedMLP(config.num_experts, dims.input_dim, config.hidden, dropout=config.dropout)
        width = self.experts.output_dim
        self.task_embedding_TP = nn.Parameter(torch.randn(NUM_TASKS, view_dim))
        self.task_view = MLP(view_dim, (view_dim,), view_dim)
        self.scenario_view = MLP(dims.scenario_dim + dims.trigger_dim, (view_dim,), view_dim)
        self.attention = MetaAttention(view_dim, width)
        self.towers = nn.ModuleList(MetaUnit(view_dim, width, width) for _ in range(config.meta_depth))
        self.output_weight_TH = nn.Parameter(torch.empty(NUM_TASKS, width))
        self.output_bias_T = nn.Parameter(torch.zeros(NUM_TASKS))
        glorot_uniform_(self.output_weight_TH.unsqueeze(-1))

    def forward(self, inputs: BackboneInput) -> Tensor:
        """Logits (B, T)."""
        experts_BGH = self.experts(inputs.x_BD)
        view_BP = self.scenario_view(torch.cat([inputs.scenario_embedding_BE, inputs.trigger_BZ], dim=-1))
        h_BTH = self.attention(experts_BGH, self.task_view(self.task_embedding_TP), view_BP)
        for meta in self.towers:
            h_BTH = nn.functional.leaky_relu(meta(h_BTH, view_BP) + h_BTH)
        return (h_BTH * self.output_weight_TH).sum(dim=-1) + self.output_bias_T


class MetaUnit(nn.Module):
    """One layer whose weights are generated from the scenario view of the row."""

    def __init__(self, view_dim: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.shape = (output_dim, input_dim)
        self.to_weight = nn.Linear(view_dim, output_dim * input_dim)
        self.to_bias = nn.Linear(view_dim, output_dim)
        # v_w, and V_w s of a view of unit size, give half of the variance of a He-uniform generated layer each.
        bound = math.sqrt(3 / input_dim)
        nn.init.uniform_(self.to_weight.bias, -bound, bound)
        nn.init.uniform_(self.to_weight.weight, -bound / math.sqrt(view_dim), bound / math.sqrt(view_dim))
        nn.init.zeros_(self.to_bias.weight)
        nn.init.zeros_(self.to_bias.bias)

    def generate(self, view_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (B, O, I) and bias (B, O) of each row."""
        return self.to_weight(view_BP).unflatten(-1, self.shape), self.to_bias(view_BP)

    def forward(self, h_BNI: Tensor, view_BP: Tensor) -> Tensor:
        """(B, N, I) -> (B, N, O): the row's layer on each of its N vectors."""
        weight_BOI, bias_BO = self.generate(view_BP)
        return nn.functional.leaky_relu(torch.bmm(h_BNI, weight_BOI.transpose(1, 2)) + bias_BO.unsqueeze(1))


class MetaAttention(nn.Module):
    """L_t = sum_i softmax_i(v^T Meta([E_i ; T_t])) E_i, within the row: never over the batch."""

    def __init__(self, view_dim: int, expert_dim: int) -> None:
        super().__init__()
        self.split = [expert_dim, view_dim]
        self.meta = MetaUnit(view_dim, expert_dim + view_dim, view_dim)
        self.score_O = nn.Parameter(torch.empty(view_dim))
        glorot_uniform_(self.score_O.unsqueeze(-1))

    def forward(self, experts_BGH: Tensor, task_view_TP: Tensor, view_BP: Tensor) -> Tensor:
        """Task representations (B, T, H)."""
        weight_BOI, bias_BO = self.meta.generate(view_BP)
        # W [E_i ; T_t] = W_E E_i + W_T T_t: G + T products per row instead of G * T.
        expert_weight_BOH, task_weight_BOP = weight_BOI.split(self.split, dim=-1)
        of_experts_BGO = torch.bmm(experts_BGH, expert_weight_BOH.transpose(1, 2))
        of_tasks_BTO = torch.einsum("bop,tp->bto", task_weight_BOP, task_view_TP) + bias_BO.unsqueeze(1)
        hidden_BTGO = nn.functional.leaky_relu(of_experts_BGO.unsqueeze(1) + of_tasks_BTO.unsqueeze(2))
        alpha_BTG = (hidden_BTGO @ self.score_O).softmax(dim=-1)
        return torch.bmm(alpha_BTG, experts_BGH)
