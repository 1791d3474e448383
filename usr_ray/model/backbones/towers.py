"""Many MLPs of one shape side by side: the experts and the towers of the backbones, and the shares of experts.

Shape letters: N stacked MLPs, B rows, I inputs, O outputs, S scenarios, T tasks, C = S * T cells, G experts,
M = N * I or N * O, the vectors of a row side by side.
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

    A row's N vectors lie side by side in memory. All N run on every row: the parameters of a scenario that
    is absent from a batch are in the graph and get a zero gradient.

    Starts as model/mlp.py does: He-uniform hidden weights, Glorot-uniform output weights, zero biases.

    Args:
        hidden: widths of the hidden layers; may be empty when `output_dim` is given.
        output_dim: width of a last linear layer without activation; None: the last hidden layer is the output.
    """

    def __init__(
        self,
        num_stacked: int,
        input_dim: int,
        hidden: Sequence[int],
        output_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
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
        """(B, N, output_dim) of an input (B, I) shared by all, or (B, N, I) with one for each."""
        is_shared, h_BM = x.dim() == 2, x.flatten(1)
        for layer, (weight_NIO, bias_N1O) in enumerate(zip(self.weights_NIO, self.biases_N1O, strict=True)):
            h_BM = (_shared_layer if is_shared and layer == 0 else _own_layer)(h_BM, weight_NIO, bias_N1O)
            if layer < self.num_hidden:
                h_BM = self.dropout(torch.relu(h_BM))
        return h_BM.unflatten(1, (-1, self.output_dim))


def _shared_layer(x_BI: Tensor, weight_NIO: Tensor, bias_N1O: Tensor) -> Tensor:
    """(B, N O) of one input for all N: one wide product, where a batched one would first copy the input N times."""
    return torch.addmm(bias_N1O.flatten(), x_BI, side_by_side(weight_NIO))


def _own_layer(x_BM: Tensor, weight_NIO: Tensor, bias_N1O: Tensor) -> Tensor:
    """(B, N O) of inputs (B, N I)."""
    x_NBI = x_BM.unflatten(1, (weight_NIO.shape[0], -1)).transpose(0, 1)
    return torch.baddbmm(bias_N1O, x_NBI, weight_NIO).transpose(0, 1).flatten(1)


def side_by_side(weight_NIO: Tensor) -> Tensor:
    """(I, N O): N linear maps of one input as one."""
    return weight_NIO.transpose(0, 1).flatten(1)


def gate_shares(x_BI: Tensor, gates_CIG: Tensor) -> Tensor:
    """The weight of each expert in each cell, (B, C, G), by linear gates on one input of all cells."""
    return shares_of((x_BI @ side_by_side(gates_CIG)).unflatten(1, gates_CIG.shape[::2]))


def shares_of(logits_BCG: Tensor) -> Tensor:
    """Softmax over the experts, (B, C, G).

    With the rows last in memory: over the few experts of one cell at a time it takes three times as long.
    """
    return logits_BCG.permute(1, 2, 0).contiguous().softmax(dim=1).permute(2, 0, 1).contiguous()


class CellTowers(nn.Module):
    """logit_c = T_c(h_c): one tower for each (scenario, task) cell, of which each row keeps its own scenario's."""

    def __init__(self, num_scenarios: int, input_dim: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.num_scenarios = num_scenarios
        self.towers = StackedMLP(num_scenarios * NUM_TASKS, input_dim, hidden, output_dim=1, dropout=dropout)

    def forward(self, h: Tensor, scenario_B: Tensor) -> Tensor:
        """Logits (B, T) of an input (B, I) shared by all cells, or (B, C, I) with one for each."""
        logits_BC = self.towers(h).squeeze(-1)
        return select_scenario(logits_BC.unflatten(1, (self.num_scenarios, NUM_TASKS)), scenario_B)


def select_scenario(values_BSX: Tensor, scenario_B: Tensor) -> Tensor:
    """values[b, scenario[b]] of each row: (B, S, ...) -> (B, ...), without a loop and without a branch on the data.

    Whole rows are taken: the backward of `gather` adds number by number, up to twice as slow.
    """
    num_rows, num_scenarios = values_BSX.shape[:2]
    if num_scenarios == 1:
        return values_BSX[:, 0]
    row_B = torch.arange(num_rows, device=scenario_B.device)
    # As the values lie in memory, one scenario after the other or row by row. A program's tensors have no strides.
    if not torch.compiler.is_exporting() and values_BSX.stride(0) < values_BSX.stride(1):
        return values_BSX.transpose(0, 1).flatten(0, 1).index_select(0, scenario_B * num_rows + row_B)
    return values_BSX.flatten(0, 1).index_select(0, row_B * num_scenarios + scenario_B)
