"""APG: layers whose small core is generated for each row. Source: Yan et al., "APG: Adaptive Parameter Generation
Network for Click-Through Rate Prediction" (NeurIPS'22), equations 3 to 9.

    y = act(U (S (V x)) + b);   S = reshape(MLP(z)), K x K;   z = [e_k ; trigger]
    U = U_1 U_2, V = V_1 V_2 with inner size P >= K in training, folded into one matrix each for serving

Between the factors there is neither bias nor activation. All hidden layers, of the bottom and of each task's tower,
are such layers; the logit is a plain linear layer (rank K means nothing at width 1). S starts as I plus a term
of z of the same size (ours: by the start of the MLP's last layer), so that the signal passes from the first step.
Shape letters: K rank, Z condition.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from usr_ray.config import ModelConfig
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.model.backbones.towers import NUM_TASKS
from usr_ray.model.mlp import MLP


class APG(Backbone):
    """Generated layers of `hidden` widths, then for each task of `tower_hidden` widths and a linear logit."""

    def __init__(self, config: ModelConfig, dims: BackboneDims) -> None:
        super().__init__()
        condition_dim = dims.scenario_dim + dims.trigger_dim
        width = config.hidden[-1]
        self.bottom = GeneratedMLP(config, dims.input_dim, config.hidden, condition_dim)
        self.towers = nn.ModuleList(
            GeneratedMLP(config, width, config.tower_hidden, condition_dim) for _ in range(NUM_TASKS)
        )
        tower_width = config.tower_hidden[-1] if config.tower_hidden else width
        self.outputs = nn.ModuleList(MLP(tower_width, (), 1) for _ in range(NUM_TASKS))

    def forward(self, inputs: BackboneInput) -> Tensor:
        """Logits (B, T)."""
        condition_BZ = torch.cat([inputs.scenario_embedding_BE, inputs.trigger_BZ], dim=-1)
        h_BH = self.bottom(inputs.x_BD, condition_BZ)
        logits = [output(tower(h_BH, condition_BZ)) for tower, output in zip(self.towers, self.outputs, strict=True)]
        return torch.cat(logits, dim=-1)

    def fold(self) -> None:
        """Multiply the over-parameterised products out, in place: the same outputs, fewer parameters, for serving."""
        for module in self.modules():
            if isinstance(module, FactoredMatrix):
                module.fold()


class GeneratedMLP(nn.Module):
    """GeneratedLinear, ReLU and dropout for each of `hidden`."""

    def __init__(self, config: ModelConfig, input_dim: int, hidden: tuple[int, ...], condition_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for width in hidden:
            self.layers.append(
                GeneratedLinear(
                    input_dim,
                    width,
                    condition_dim,
                    rank=config.apg_rank,
                    inner_dim=config.apg_over_parameterisation,
                    hidden=config.apg_hidden,
                )
            )
            input_dim = width
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BI: Tensor, condition_BZ: Tensor) -> Tensor:
        """(B, I) -> (B, hidden[-1])."""
        for layer in self.layers:
            h_BI = self.dropout(torch.relu(layer(h_BI, condition_BZ)))
        return h_BI


class GeneratedLinear(nn.Module):
    """y = U (S (V x)) + b with S = reshape(MLP(z)).

    Args:
        condition_dim: width of z.
        rank: K.
        inner_dim: P, inner size of U and V, at least K.
        hidden: hidden widths of the MLP that gives S.
    """

    def __init__(
        self, input_dim: int, output_dim: int, condition_dim: int, *, rank: int, inner_dim: int, hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.rank = rank
        self.v_IK = FactoredMatrix(input_dim, inner_dim, rank)
        self.u_KO = FactoredMatrix(rank, inner_dim, output_dim)
        self.bias_O = nn.Parameter(torch.zeros(output_dim))
        self.to_core = MLP(condition_dim, hidden, rank * rank)
        last = cast(nn.Linear, self.to_core.layers[-1])
        with torch.no_grad():
            last.weight.div_(math.sqrt(rank))
            last.bias.copy_(torch.eye(rank).flatten())

    def forward(self, x_BI: Tensor, condition_BZ: Tensor) -> Tensor:
        """(B, I) and (B, Z) -> (B, O)."""
        core_BKK = self.to_core(condition_BZ).unflatten(-1, (self.rank, self.rank))
        # One after the other: U S V is never built for a row.
        inner_B1K = torch.bmm((x_BI @ self.v_IK()).unsqueeze(1), core_BKK.transpose(1, 2))
        return inner_B1K.squeeze(1) @ self.u_KO() + self.bias_O


class FactoredMatrix(nn.Module):
    """An (I, O) matrix trained as a product (I, P) (P, O), which `fold` multiplies out."""

    def __init__(self, input_dim: int, inner_dim: int, output_dim: int) -> None:
        super().__init__()
        self.factors = nn.ParameterList([torch.empty(input_dim, inner_dim), torch.empty(inner_dim, output_dim)])
        for factor in self.factors:
            # Variance 1 / fan-in keeps the size of x through the chain.
            nn.init.normal_(factor, std=1 / math.sqrt(factor.shape[0]))

    def forward(self) -> Tensor:
        """The matrix (I, O)."""
        product = self.factors[0]
        for factor in self.factors[1:]:
            product = product @ factor
        return product

    @torch.no_grad()
    def fold(self) -> None:
        """Replace the factors by their product."""
        self.factors = nn.ParameterList([self.forward()])
