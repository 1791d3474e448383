"""MLP: the one stack of dense layers that the extractor, the generator, the heads and the backbones use.

Shape letters: B rows (any leading shape), I inputs, O outputs.
"""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear -> ReLU (-> dropout) for each hidden size, then a plain Linear when `output_dim` is given.

    With `output_dim` None the last hidden layer, activated, is the output. Hidden weights start He-uniform and the
    output layer Glorot-uniform, biases zero, from torch's default generator.

    Args:
        input_dim: size of the last axis of the input.
        hidden: sizes of the hidden layers; may be empty, and with `output_dim` None the MLP is then the identity.
        output_dim: size of the output layer, which has no activation: logits take both signs.
    """

    def __init__(
        self,
        input_dim: int,
        hidden: tuple[int, ...],
        output_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = input_dim
        for size in hidden:
            linear = nn.Linear(width, size)
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = size
        if output_dim is not None:
            linear = nn.Linear(width, output_dim)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            width = output_dim
        self.layers = nn.Sequential(*layers)
        self.output_dim = width
        """Size of the last axis of the output."""

    def forward(self, x_BI: Tensor) -> Tensor:
        """(..., input_dim) -> (..., self.output_dim)."""
        return self.layers(x_BI)
