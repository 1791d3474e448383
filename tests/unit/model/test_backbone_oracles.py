"""SharedBottom, MMoE and PLE against torch-rechub with the same weights: logits and gradients in float64.

torch-rechub has tasks and no scenarios: its task c is our (scenario, task) cell c = scenario * 2 + task. Its MLPs put
a BatchNorm1d after each linear layer and a bias on each gate; those are taken out, as the papers have neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.unit.backbone_batches import INPUT_DIM, SMALL, batch_of, small_backbone, weighted_sum
from usr_ray.model.backbones import Backbone
from usr_ray.model.backbones.mmoe import MMoE
from usr_ray.model.backbones.ple import PLE
from usr_ray.model.backbones.shared_bottom import SharedBottom
from usr_ray.model.backbones.towers import StackedMLP

pytestmark = pytest.mark.unit
pytest.importorskip("torch_rechub", reason="the oracle torch-rechub is a test-only dependency: pip install '.[dev]'")

from torch_rechub.basic.features import DenseFeature  # noqa: E402
from torch_rechub.models.multi_task import MMOE as RechubMMoE  # noqa: E402, N811
from torch_rechub.models.multi_task import PLE as RechubPLE  # noqa: E402, N811
from torch_rechub.models.multi_task import SharedBottom as RechubSharedBottom  # noqa: E402

FEATURES = [DenseFeature(f"x{n}") for n in range(INPUT_DIM)]
Pair = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]
"""A parameter of ours, one of torch-rechub's, and the slice and layout of ours that is theirs."""


def linear_pairs(weight: Tensor, bias: Tensor | None, linear: nn.Linear, member: int) -> Iterator[Pair]:
    yield weight, linear.weight, lambda ours: ours[member].T
    if bias is not None:
        yield bias, linear.bias, lambda ours: ours[member, 0]


def stack_pairs(stack: StackedMLP, modules: list[nn.Module]) -> Iterator[Pair]:
    assert stack.weights_NIO[0].shape[0] == len(modules)
    for member, module in enumerate(modules):
        linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        for weight, bias, linear in zip(stack.weights_NIO, stack.biases_N1O, linears, strict=True):
            yield from linear_pairs(weight, bias, linear, member)


def gate_pairs(gates_CIG: Tensor, modules: list[nn.Module]) -> Iterator[Pair]:
    for member, module in enumerate(modules):
        yield from linear_pairs(gates_CIG, None, module.mlp[0], member)


def shared_bottom_pairs(ours: Backbone, theirs: nn.Module) -> Iterator[Pair]:
    assert isinstance(ours, SharedBottom)
    linears = zip(linears_of(ours.bottom), linears_of(theirs.bottom_mlp), strict=True)
    for our_linear, their_linear in linears:
        yield our_linear.weight, their_linear.weight, lambda weight: weight
        yield our_linear.bias, their_linear.bias, lambda bias: bias
    yield from stack_pairs(ours.towers.towers, list(theirs.towers))


def mmoe_pairs(ours: Backbone, theirs: nn.Module) -> Iterator[Pair]:
    assert isinstance(ours, MMoE)
    yield from stack_pairs(ours.experts, list(theirs.experts))
    yield from gate_pairs(ours.gates_CIG, list(theirs.gates))
    yield from stack_pairs(ours.towers.towers, list(theirs.towers))


def ple_pairs(ours: Backbone, theirs: nn.Module) -> Iterator[Pair]:
    assert isinstance(ours, PLE)
    for level, cgc in zip(ours.levels, theirs.cgc_layers, strict=True):
        yield from stack_pairs(level.task_experts, list(cgc.experts_specific))
        yield from stack_pairs(level.shared_experts, list(cgc.experts_shared))
        yield from gate_pairs(level.task_gates_CIG, list(cgc.gates_specific))
        if level.shared_gate_IG is not None:
            yield level.shared_gate_IG, cgc.gate_shared.mlp[0].weight, lambda gate: gate.T
    yield from stack_pairs(ours.towers.towers, list(theirs.towers))


def linears_of(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


class Given(nn.Module):
    """In place of torch-rechub's EmbeddingLayer, which casts dense features to float32."""

    def forward(self, x_BI: Tensor, features: object, squeeze_dim: bool) -> Tensor:
        return x_BI


def rechub(name: str, num_cells: int) -> nn.Module:
    """torch-rechub's model of the sizes SMALL, task type "regression" (the logit itself), without its additions."""
    types = ["regression"] * num_cells
    towers = [{"dims": list(SMALL.tower_hidden)} for _ in range(num_cells)]
    hidden = {"dims": list(SMALL.hidden)}
    if name == "shared_bottom":
        model = RechubSharedBottom(FEATURES, types, hidden, towers)
    elif name == "mmoe":
        model = RechubMMoE(FEATURES, types, SMALL.num_experts, hidden, towers)
    else:
        model = RechubPLE(FEATURES, types, SMALL.num_levels, SMALL.num_task_experts, SMALL.num_experts, hidden, towers)
    model.embedding = Given()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for place, layer in enumerate(sequence):
            if isinstance(layer, nn.BatchNorm1d):
                sequence[place] = nn.Identity()
            if isinstance(layer, nn.Softmax):
                nn.init.zeros_(sequence[0].bias)
    return model.double()


PAIRS = {"shared_bottom": shared_bottom_pairs, "mmoe": mmoe_pairs, "ple": ple_pairs}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("num_scenarios", [1, 3])
def test_logits_and_gradients_equal_torch_rechub(name: str, num_scenarios: int) -> None:
    ours, theirs = small_backbone(name, num_scenarios=num_scenarios), rechub(name, num_scenarios * 2)
    pairs = list(PAIRS[name](ours, theirs))
    assert {id(mine) for mine, _, _ in pairs} == {id(parameter) for parameter in ours.parameters()}
    with torch.no_grad():
        for mine, oracle, layout in pairs:
            oracle.copy_(layout(mine))
    inputs = batch_of([row % num_scenarios for row in (0, 1, 2, 4, 3, 2, 5, 1, 7)])
    logits_BT = ours(inputs)
    cells_BC = theirs(inputs.x_BD)
    expected_BT = torch.stack([cells_BC[b, 2 * k : 2 * k + 2] for b, k in enumerate(inputs.scenario_B.tolist())])
    torch.testing.assert_close(logits_BT, expected_BT, rtol=1e-11, atol=1e-12)
    weighted_sum(logits_BT, inputs).backward()
    weighted_sum(expected_BT, inputs).backward()
    for mine, oracle, layout in pairs:
        assert mine.grad is not None
        torch.testing.assert_close(layout(mine.grad), oracle.grad, rtol=1e-10, atol=1e-11)
