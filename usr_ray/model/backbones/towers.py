"""Many MLPs of one shape as one batched product: the experts and the towers of the backbones.

Shape letters: N stacked MLPs, B rows, I inputs, O outputs, S scenarios, T tasks, C = S * T cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from usr_ray.schema import TASKS

NUM_TASKS = len(TASKS)


def he_uniform_(weight_XIO: Tensor) -> None:
    """Start of a layer before ReLU, fan-in I of weights (.., I, O), as in model/mlp.py."""
    bound = math.sqrt(6 / weight_XIO.shape[-2])
    nn.init.uniform_(weight_XIO, -bound, bound)


def glorot_uniform_(weight_XIO: Tensor) -> None:
    """Start of a layer without activation, weights (.., I, O), as in model/mlp.py."""
    bound = math.sqrt(6 / (weight_XIO.shape[-2] + weight_XIO.shape[-1]))
    nn.init.uniform_(weight_XIO, -bound, bound)


class StackedMLP(nn.Module):
    """N independent MLPs of one shape, ReLU and dropout after each hidden layer.

    One batched product a layer in place of N small ones. All N run on every row: the parameters of a scenario that
    is absent from a batch are in the graph and get a zero gradient.

    Starts as model/mlp.py does: He-uniform hidden weights, Glorot-uniform output weights, zero biases.

    Args:
        num_stacked: N.
        input_dim: I of the first layer.
        hidden: widths of the hidden layers; may be empty when `output_dim` is given.
        output_dim: width of a last linear layer without activation; None: the last hidden layer is the output.
        dropout: share of hidden units dropped in training.
    """

    def __init__(
        self, num_stacked: int, input_dim: int, hidden: Sequence[int], output_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [input_dim, *hidden, *([] if output_dim is None else [output_dim])]
        self.num_hidden = len(hidden)
        self.output_dim = widths[-1]
        self.dropout = nn.Dropout(dropout)
        self.weights_NIO = nn.ParameterList(torch.empty(num_stacked, i, o) for i, o in itertools.pairwise(widths))
        self.biases_N1O = nn.ParameterList(torch.zeros(num_stacked, 1, o) for o in widths[1:])
        for layer, weight_NIO in enumerate(self.weights_NIO):
            (he_uniform_ if layer < self.num_hidden else glorot_uniform_)(weight_NIO)

    def forward(self, x: Tensor) -> Tensor:
        """(N, B, output_dim) of an input (B, I) shared by all, or (N, B, I) with one for each."""
        h_NBI = x
        for layer, (weight_NIO, bias_N1O) in enumerate(zip(self.weights_NIO, self.biases_N1O, strict=True)):
            is_shared = h_NBI.dim() == 2
            h_NBI = (_shared_layer if is_shared else _own_layer)(h_NBI, weight_NIO, bias_N1O)
            if layer < self.num_hidden:
                h_NBI = self.dropout(torch.relu(h_NBI))
        return h_NBI


def _shared_layer(x_BI: Tensor, weight_NIO: Tensor, bias_N1O: Tensor) -> Tensor:
    """(N, B, O) of one input for all N: one wide product, where a batched one would first copy the input N times."""
    wide_IM = weight_NIO.transpose(0, 1).flatten(1)
    h_BNO = torch.addmm(bias_N1O.flatten(), x_BI, wide_IM).unflatten(1, (weight_NIO.shape[0], -1))
    return h_BNO.transpose(0, 1)


def _own_layer(x_NBI: Tensor, weight_NIO: Tensor, bias_N1O: Tensor) -> Tensor:
    return torch.baddbmm(bias_N1O, x_NBI, weight_NIO)


class CellTowers(nn.Module):
    """logit_c = T_c(h_c): one tower for each (scenario, task) cell, of which each row keeps its own scenario's."""

    def __init__(self, num_scenarios: int, input_dim: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.num_scenarios = num_scenarios
        self.towers = StackedMLP(num_scenarios * NUM_TASKS, input_dim, hidden, output_dim=1, dropout=dropout)

    def forward(self, h: Tensor, scenario_B: Tensor) -> Tensor:
        """Logits (B, T) of an input (B, I) shared by all cells, or (C, B, I) with one for each."""
        logits_BC = self.towers(h).squeeze(-1).transpose(0, 1)
        return select_scenario(logits_BC.unflatten(1, (self.num_scenarios, NUM_TASKS)), scenario_B)


def select_scenario(values_BSX: Tensor, scenario_B: Tensor) -> Tensor:
    """values[b, scenario[b]] of each row: (B, S, ...) -> (B, ...), without a loop and without a branch on the data."""
    shape = values_BSX.shape
    index_B1X = scenario_B.view(-1, *[1] * (len(shape) - 1)).expand(-1, 1, *shape[2:])
    return values_BSX.gather(1, index_B1X).squeeze(1)
