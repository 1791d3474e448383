"""FG: gates by hand, their start, and the stopped gradient."""

from __future__ import annotations

import math

import pytest
import torch

from usr_ray.model.generator import FeatureGenerator

pytestmark = pytest.mark.unit


def hand_made() -> FeatureGenerator:
    """Two features, one hidden unit: h = relu(z + f_1 - f_2 + 0.5), gates 2 sig(h) and 2 sig(-2 h)."""
    fg = FeatureGenerator(1, 2, 1).double()
    with torch.no_grad():
        fg.trigger_layer.weight.copy_(torch.tensor([[1.0]]))
        fg.trigger_layer.bias.copy_(torch.tensor([0.5]))
        fg.feature_layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
        fg.gate_layer.weight.copy_(torch.tensor([[1.0], [-2.0]]))
    return fg


def test_features_are_scaled_by_each_views_gates() -> None:
    f_BC = torch.tensor([[3.0, 2.0]], dtype=torch.float64)
    z_BVZ = torch.tensor([[[0.5], [-4.0]]], dtype=torch.float64)
    gated_BVC = hand_made()(z_BVZ, f_BC)
    sig = lambda a: 1 / (1 + math.exp(-a))  # noqa: E731
    # View 0: h = 0.5 + 3 - 2 + 0.5 = 2. View 1: relu(-2.5) = 0, so both gates are 1.
    expected = [[[3 * 2 * sig(2), 2 * 2 * sig(-4)], [3.0, 2.0]]]
    torch.testing.assert_close(gated_BVC, torch.tensor(expected, dtype=torch.float64))


def test_no_gradient_reaches_the_features_through_the_gates() -> None:
    f_BC = torch.tensor([[3.0, 2.0]], dtype=torch.float64, requires_grad=True)
    gated_BVC = hand_made()(torch.tensor([[[0.5]]], dtype=torch.float64), f_BC)
    gated_BVC.sum().backward()
    torch.testing.assert_close(f_BC.grad, (gated_BVC[:, 0] / f_BC).detach())


def test_every_gate_starts_at_one() -> None:
    torch.manual_seed(0)
    f_BC = torch.randn(5, 7)
    gated_BVC = FeatureGenerator(3, 7, 4)(torch.randn(5, 2, 3), f_BC)
    torch.testing.assert_close(gated_BVC, f_BC.unsqueeze(1).expand(-1, 2, -1))


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    fg = FeatureGenerator(3, 4, 5).double()
    torch.nn.init.normal_(fg.gate_layer.weight)
    f_BC = torch.randn(2, 4, dtype=torch.float64)
    z_BVZ = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: fg(z, f_BC), z_BVZ)
