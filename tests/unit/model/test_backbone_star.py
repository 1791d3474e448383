"""STAR's partitioned normalisation by hand, and all backbones on two ranks against one rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.backbone_batches import ALL, batch_of, rows, small_backbone
from tests.unit.two_ranks import run_ranks
from usr_ray.model.backbones.star import PartitionedNormalisation
from usr_ray.training.worker import LocalWorker, Worker

pytestmark = pytest.mark.unit
# Rank 0 gets the first half. Scenario 2 is on rank 0 alone, scenario 3 nowhere but in rank 1's padding.
SCENARIOS = [0, 1, 2, 2, 0, 1, 0, 1, 1, 0, 3, 0]
PADDING = 2


def normalise(
    layer: PartitionedNormalisation, values: list[float], scenarios: list[int], padding: int = 0
) -> list[float]:
    weights_B = torch.ones(len(values), dtype=torch.float64)
    weights_B[len(values) - padding :] = 0
    x_B1 = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    normalised: list[float] = layer(x_B1, torch.tensor(scenarios), weights_B).squeeze(1).tolist()
    return normalised


def test_each_scenario_is_normalised_over_its_own_rows() -> None:
    layer = PartitionedNormalisation(2, 1).double()
    layer.eps = 0.0
    with torch.no_grad():
        layer.gamma_I.fill_(3)
        layer.gamma_SI.copy_(torch.tensor([[1.0], [2.0]]))
        layer.beta_I.fill_(0.5)
        layer.beta_SI.copy_(torch.tensor([[0.0], [4.0]]))
    # Scenario 0: 1, 3 (mean 2, variance 1); scenario 1: 10, 20, 30 (mean 20, variance 200 / 3).
    found = normalise(layer, [1, 10, 3, 20, 30], [0, 1, 0, 1, 1])
    spread = 10 / math.sqrt(200 / 3)
    assert found == pytest.approx([3 * -1 + 0.5, 6 * -spread + 4.5, 3 * 1 + 0.5, 4.5, 6 * spread + 4.5])
    assert layer.moving_mean_SI.squeeze(1).tolist() == pytest.approx([2, 20])
    assert layer.moving_var_SI.squeeze(1).tolist() == pytest.approx([2, 100])  # unbiased: 2 / 1, 200 / 2


def test_evaluation_uses_moving_statistics_and_leaves_them() -> None:
    layer = PartitionedNormalisation(2, 1).double()
    layer.eps = 0.0
    normalise(layer, [1, 10, 3, 20, 30], [0, 1, 0, 1, 1])
    layer.eval()
    assert normalise(layer, [2, 30, 4], [0, 1, 0]) == pytest.approx([0, 1, math.sqrt(2)])
    assert layer.moving_mean_SI.squeeze(1).tolist() == pytest.approx([2, 20])
    assert layer.num_updates_S.tolist() == [1, 1]


def test_moving_statistics_are_plain_means_first_and_exponential_later() -> None:
    layer = PartitionedNormalisation(1, 1).double()
    layer.momentum = 0.25
    expected_mean, expected_var = 0.0, 1.0
    for step in range(1, 9):
        low, high = float(step * step), float(step * step + 2 * step)
        normalise(layer, [low, high], [0, 0])
        rate = max(1 / step, 0.25)
        expected_mean += rate * ((low + high) / 2 - expected_mean)
        expected_var += rate * ((high - low) ** 2 / 2 - expected_var)
    assert layer.moving_mean_SI.item() == pytest.approx(expected_mean)
    assert layer.moving_var_SI.item() == pytest.approx(expected_var)


def test_a_scenario_absent_from_a_step_changes_nothing() -> None:
    layer = PartitionedNormalisation(2, 1).double()
    layer.eps = 0.0
    normalise(layer, [1, 3], [1, 1])
    # Scenario 1 is here as padding only: it keeps mean 2 and variance 2, and its padding row is normalised by them.
    found = normalise(layer, [5, 9, 4], [0, 0, 1], padding=1)
    assert found == pytest.approx([-1, 1, 2 / math.sqrt(2)])
    assert layer.moving_mean_SI.squeeze(1).tolist() == pytest.approx([7, 2])
    assert layer.moving_var_SI.squeeze(1).tolist() == pytest.approx([8, 2])
    assert layer.num_updates_S.tolist() == [1, 1]


def test_a_single_row_moves_the_mean_but_not_the_variance() -> None:
    layer = PartitionedNormalisation(1, 1).double()
    assert normalise(layer, [7], [0]) == [0]
    assert layer.moving_mean_SI.item() == 7
    assert layer.moving_var_SI.item() == 1


def test_variance_is_exact_in_float32_far_from_zero() -> None:
    torch.manual_seed(0)
    layer = PartitionedNormalisation(1, 1)
    x_B1 = 10_000 + torch.randn(4096, 1)
    layer(x_B1, torch.zeros(4096, dtype=torch.int64), torch.ones(4096))
    assert layer.moving_var_SI.item() == pytest.approx(x_B1.double().var().item(), rel=1e-3)


def test_statistics_stay_float32_under_half_precision_inputs() -> None:
    layer = PartitionedNormalisation(1, 1)
    x_B1 = torch.full((512, 1), 3.0, dtype=torch.bfloat16)
    assert layer(x_B1, torch.zeros(512, dtype=torch.int64), torch.ones(512)).dtype == torch.bfloat16
    assert layer.moving_mean_SI.dtype == torch.float32
    assert layer.moving_mean_SI.item() == 3.0  # a bfloat16 sum of 512 threes stops at 512 * 1.5


# Two ranks


def two_steps(worker: Worker, rows_of_rank: slice) -> dict[str, Tensor]:
    """Two SGD steps of every backbone on this rank's rows: logits, gradients and buffers after each."""
    outcome: dict[str, Tensor] = {}
    for name in ALL:
        backbone = small_backbone(name, num_scenarios=4)
        model = worker.wrap_model(backbone)
        for step in range(2):
            inputs = batch_of(SCENARIOS, seed=step, padding=PADDING)
            coefficients_BT = torch.linspace(-1, 2, 2 * len(SCENARIOS), dtype=torch.float64).view(-1, 2)
            x_BD = inputs.x_BD[rows_of_rank].clone().requires_grad_()
            mine = replace(rows(inputs, rows_of_rank), x_BD=x_BD)
            logits_BT = model(mine)
            # Squared, so that a rank's gradient depends on its logits and not on the coefficients alone.
            loss = (logits_BT.square() * coefficients_BT[rows_of_rank] * mine.weights_B.unsqueeze(1)).sum()
            backbone.zero_grad(set_to_none=True)
            loss.backward()
            assert x_BD.grad is not None
            outcome |= {f"{name}.{step}.rows.logits": logits_BT, f"{name}.{step}.rows.x_gradient": x_BD.grad}
            with torch.no_grad():
                for key, parameter in backbone.named_parameters():
                    assert parameter.grad is not None
                    outcome[f"{name}.{step}.gradient.{key}"] = parameter.grad.clone()
                    parameter.sub_(parameter.grad, alpha=1e-3)
            outcome |= {f"{name}.{step}.buffer.{key}": value.clone() for key, value in backbone.named_buffers()}
    return outcome


def half_of_the_rows(worker: LocalWorker, folder: Path) -> dict[str, Tensor]:
    half = len(SCENARIOS) // 2
    return two_steps(worker, slice(worker.rank * half, (worker.rank + 1) * half))


@pytest.mark.integration
def test_two_ranks_on_half_batches_equal_one_rank_on_the_whole(tmp_path: Path) -> None:
    first, second = run_ranks(half_of_the_rows, 2, tmp_path)
    whole = two_steps(LocalWorker("cpu"), slice(0, len(SCENARIOS)))
    assert whole.keys() == first.keys() == second.keys()
    for key, wanted in whole.items():
        found = torch.cat([first[key], second[key]]) if ".rows." in key else first[key]
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
        if ".rows." not in key:
            torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)
