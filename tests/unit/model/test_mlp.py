"""The stack of dense layers that everything shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from usr_ray.model.mlp import MLP

pytestmark = pytest.mark.unit


def test_hidden_layers_are_activated_and_the_output_is_not() -> None:
    mlp = MLP(2, (2,), 1)
    hidden, _, output = mlp.layers
    with torch.no_grad():
        hidden.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        output.weight.copy_(torch.tensor([[2.0, -3.0]]))
        output.bias.fill_(0.5)
    # relu(4) = 4 and relu(-1) = 0; relu(-2) = 0 and relu(5) = 5.
    assert mlp(torch.tensor([[4.0, 1.0], [-2.0, -5.0]])).tolist() == [[8.5], [-14.5]]


def test_without_an_output_layer_the_last_hidden_layer_is_the_output() -> None:
    mlp = MLP(3, (5, 4))
    assert mlp.output_dim == 4
    assert (mlp(torch.randn(20, 3)) >= 0).all()
    assert MLP(3, ()).output_dim == 3
    x = torch.randn(2, 3)
    assert torch.equal(MLP(3, ())(x), x)


def test_relu_and_dropout_follow_each_hidden_layer() -> None:
    kinds = [type(layer) for layer in MLP(3, (5, 4), 1, dropout=0.1).layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]


def test_biases_start_at_zero_and_hidden_weights_keep_the_size_of_the_signal() -> None:
    torch.manual_seed(0)
    mlp = MLP(400, (400, 400))
    assert not any(layer.bias.any() for layer in mlp.layers if isinstance(layer, nn.Linear))
    assert mlp(torch.randn(200, 400)).square().mean().item() == pytest.approx(1.0, rel=0.2)
