"""STAR: one network whose weights are shared ones times the scenario's. Source: Sheng et al., "One Model to Serve All:
Star Topology Adaptive Recommender for Multi-Domain CTR Prediction" (CIKM'21), equations 3 to 9.

    z' = (gamma gamma_k) (z - mu_k) / sqrt(var_k + eps) + (beta + beta_k)       partitioned normalisation of the input
    h <- relu((W (.) W_k) h + b + b_k)                                          star layers; none of both on the logit
    logit_t = star_t(z') + aux([e_k ; x])_t

The bottom's star layers serve both tasks, the towers' are each task's own (ours: the paper has one task). Start: W
Glorot, W_k = 1, b = b_k = 0, gamma = gamma_k = 1, beta = beta_k = 0. Shape letters: S scenarios, N stacked networks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from usr_ray.config import ModelConfig
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.model.backbones.towers import NUM_TASKS, glorot_uniform_, select_scenario
from usr_ray.model.mlp import MLP


class STAR(Backbone):
    """Partitioned normalisation, star layers of `hidden` widths, star towers of `tower_hidden`, auxiliary network."""

    def __init__(self, config: ModelConfig, dims: BackboneDims) -> None:
        super().__init__()
        self.normalisation = PartitionedNormalisation(dims.num_scenarios, dims.input_dim)
        self.bottom = StarMLP(dims.num_scenarios, dims.input_dim, config.hidden, dropout=config.dropout)
        self.towers = StarMLP(
            dims.num_scenarios, config.hidden[-1], config.tower_hidden, 1, num_stacked=NUM_TASKS, dropout=config.dropout
        )
        self.auxiliary = MLP(dims.scenario_dim + dims.input_dim, config.tower_hidden, NUM_TASKS, config.dropout)

    def forward(self, inputs: BackboneInput) -> Tensor:
        """Logits (B, T). In training under torch.distributed every rank must call it: statistics are all-reduced."""
        z_BI = self.normalisation(inputs.x_BD, inputs.scenario_B, inputs.weights_B)
        h_B1H = self.bottom(z_BI.unsqueeze(1), inputs.scenario_B)
        star_BT = self.towers(h_B1H.expand(-1, NUM_TASKS, -1), inputs.scenario_B).squeeze(-1)
        auxiliary_BT: Tensor = self.auxiliary(torch.cat([inputs.scenario_embedding_BE, inputs.x_BD], dim=-1))
        return star_BT + auxiliary_BT


class StarMLP(nn.Module):
    """N networks of star layers, ReLU and dropout after each of `hidden`, none on a last layer of `output_dim`."""

    def __init__(
        self,
        num_scenarios: int,
        input_dim: int,
        hidden: tuple[int, ...],
        output_dim: int | None = None,
        *,
        num_stacked: int = 1,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [*hidden, *([] if output_dim is None else [output_dim])]
        self.num_hidden = len(hidden)
        self.layers = nn.ModuleList()
        for width in widths:
            self.layers.append(StarLinear(num_stacked, num_scenarios, input_dim, width))
            input_dim = width
        self.dropout = nn.Dropout(dropout)

    def forward(self, h_BNI: Tensor, scenario_B: Tensor) -> Tensor:
        """(B, N, I) -> (B, N, O)."""
        for number, layer in enumerate(self.layers):
            h_BNI = layer(h_BNI, scenario_B)
            if number < self.num_hidden:
                h_BNI = self.dropout(torch.relu(h_BNI))
        return h_BNI


class StarLinear(nn.Module):
    """y = (W (.) W_k) x + b + b_k for each of N stacked networks."""

    def __init__(self, num_stacked: int, num_scenarios: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.weight_NIO = nn.Parameter(torch.empty(num_stacked, input_dim, output_dim))
        glorot_uniform_(self.weight_NIO)
        self.weight_SNIO = nn.Parameter(torch.ones(num_scenarios, num_stacked, input_dim, output_dim))
        self.bias_NO = nn.Parameter(torch.zeros(num_stacked, output_dim))
        self.bias_SNO = nn.Parameter(torch.zeros(num_scenarios, num_stacked, output_dim))

    def forward(self, x_BNI: Tensor, scenario_B: Tensor) -> Tensor:
        """(B, N, I) -> (B, N, O), each row with its own scenario's weights."""
        # All scenarios' weights on every row, then the row's own: S small products beat gathering I x O weights a row.
        all_BSNO = torch.einsum("bni,snio->bsno", x_BNI, self.weight_NIO * self.weight_SNIO)
        return select_scenario(all_BSNO + (self.bias_NO + self.bias_SNO), scenario_B)


class PartitionedNormalisation(nn.Module):
    """Normalisation over the rows of each scenario apart, by moving statistics in evaluation.

    In training mu_k and var_k (divided by n) are those of scenario k's rows of the whole step: over all ranks when
    torch.distributed is initialised, with gradients through the reduction as in SyncBatchNorm. Rows of weight 0 take no
    part. A scenario absent from the step keeps its moving statistics, and its padding rows are normalised by them.

    The moving statistics are plain averages of the first 1 / momentum steps a scenario was present in and exponential
    ones afterwards (ours), so that a rare scenario does not drag the start values (0 and 1) along. Moving variances are
    the unbiased ones; a step with a single row of k updates the mean only. Statistics are float32 or wider.
    """

    eps, momentum = 1e-5, 0.1
    moving_mean_SI: Tensor
    moving_var_SI: Tensor
    num_updates_S: Tensor

    def __init__(self, num_scenarios: int, num_features: int) -> None:
        super().__init__()
        self.gamma_I = nn.Parameter(torch.ones(num_features))
        self.gamma_SI = nn.Parameter(torch.ones(num_scenarios, num_features))
        self.beta_I = nn.Parameter(torch.zeros(num_features))
        self.beta_SI = nn.Parameter(torch.zeros(num_scenarios, num_features))
        self.register_buffer("moving_mean_SI", torch.zeros(num_scenarios, num_features))
        self.register_buffer("moving_var_SI", torch.ones(num_scenarios, num_features))
        self.register_buffer("num_updates_S", torch.zeros(num_scenarios, dtype=torch.int64))

    def forward(self, x_BI: Tensor, scenario_B: Tensor, weights_B: Tensor) -> Tensor:
        """(B, I) -> (B, I), the dtype of x_BI."""
        wide_BI = x_BI.to(self.moving_mean_SI.dtype)
        mean_SI, var_SI = self.moving_mean_SI, self.moving_var_SI
        if self.training:
            mean_SI, var_SI = self._step_statistics(wide_BI, scenario_B, weights_B)
        scale_SI = self.gamma_I * self.gamma_SI * torch.rsqrt(var_SI + self.eps)
        shift_SI = self.beta_I + self.beta_SI
        normalised_BI = (wide_BI - mean_SI[scenario_B]) * scale_SI[scenario_B] + shift_SI[scenario_B]
        return normalised_BI.to(x_BI.dtype)

    def _step_statistics(self, x_BI: Tensor, scenario_B: Tensor, weights_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (S, I) of the step's rows of each scenario; moves the moving statistics."""
        num_scenarios = self.num_updates_S.shape[0]
        counts_B1 = (weights_B > 0).to(x_BI.dtype).unsqueeze(1)
        # Two sums, the second about the mean: E[x^2] - E[x]^2 cancels in float32 when |mean| is large.
        counted = torch.cat([x_BI * counts_B1, counts_B1], dim=1)
        sums = _sum_by_scenario(counted, scenario_B, num_scenarios)
        count_S1 = sums[:, -1:].detach()
        mean_SI = sums[:, :-1] / count_S1.clamp(min=1)
        squares_BI = (x_BI - mean_SI[scenario_B]).square() * counts_B1
        var_SI = _sum_by_scenario(squares_BI, scenario_B, num_scenarios) / count_S1.clamp(min=1)
        self._move(count_S1, mean_SI.detach(), var_SI.detach())
        is_present_S1 = count_S1 > 0
        return (
            torch.where(is_present_S1, mean_SI, self.moving_mean_SI),
            torch.where(is_present_S1, var_SI, self.moving_var_SI),
        )

    @torch.no_grad()
    def _move(self, count_S1: Tensor, mean_SI: Tensor, var_SI: Tensor) -> None:
        self.num_updates_S += (count_S1 > 0).squeeze(1)
        rate_S1 = (1 / self.num_updates_S.clamp(min=1).to(mean_SI.dtype)).clamp(min=self.momentum).unsqueeze(1)
        unbiased_SI = var_SI * count_S1 / (count_S1 - 1).clamp(min=1)
        self.moving_mean_SI.lerp_(mean_SI, rate_S1 * (count_S1 > 0))
        self.moving_var_SI.lerp_(unbiased_SI, rate_S1 * (count_S1 > 1))


def _sum_by_scenario(x_BI: Tensor, scenario_B: Tensor, num_scenarios: int) -> Tensor:
    """Sums (S, I) of the rows of each scenario over all ranks, differentiable."""
    sums_SI = x_BI.new_zeros(num_scenarios, x_BI.shape[1]).index_add(0, scenario_B, x_BI)
    if dist.is_available() and dist.is_initialized():
        sums_SI = _AllReduceSum.apply(sums_SI)
    return sums_SI


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Each rank's result enters each rank's loss, so the gradient is the sum over ranks as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
