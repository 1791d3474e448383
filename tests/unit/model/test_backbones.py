"""What all backbones promise: own scenario's logits, rows apart, every parameter trained, nothing from padding."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.unit.backbone_batches import ALL, SMALL, batch_of, rows, small_backbone, weighted_sum
from usr_ray.config import Config, ConfigError, ModelConfig
from usr_ray.model.backbones import Backbone, BackboneDims, BackboneInput, build_backbone
from usr_ray.model.backbones.towers import select_scenario

pytestmark = pytest.mark.unit
MIXED = [0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 2, 1]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("num_scenarios", [1, 2, 8])
def test_any_number_of_scenarios_gives_two_finite_logits_a_row(name: str, num_scenarios: int) -> None:
    backbone = small_backbone(name, num_scenarios=num_scenarios)
    logits_BT = backbone(batch_of([row % num_scenarios for row in range(11)]))
    assert logits_BT.shape == (11, 2)
    assert logits_BT.dtype == torch.float64
    assert logits_BT.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_in_evaluation_a_row_alone_scores_as_in_a_batch(name: str) -> None:
    backbone = small_backbone(name)
    inputs = batch_of(MIXED)
    backbone(inputs)  # moves STAR's statistics off their start
    backbone.eval()
    together_BT = backbone(inputs)
    alone_BT = torch.cat([backbone(rows(inputs, slice(row, row + 1))) for row in range(len(MIXED))])
    torch.testing.assert_close(alone_BT, together_BT, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_the_scenario_of_a_row_chooses_its_logits(name: str) -> None:
    backbone = small_backbone(name).eval()
    inputs = batch_of([0, 0, 0])
    # M2M, APG and PEPNet know the scenario by its embedding alone, so that changes with it.
    other = replace(inputs, scenario_B=inputs.scenario_B + 1, scenario_embedding_BE=inputs.scenario_embedding_BE + 1)
    assert ((backbone(inputs) - backbone(other)).abs() > 1e-6).all()


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_saved_and_trained_by_a_mixed_batch(name: str) -> None:
    backbone = small_backbone(name)
    inputs = batch_of(MIXED * 3)
    weighted_sum(backbone(inputs), inputs).backward()
    saved = backbone.state_dict()
    for key, parameter in backbone.named_parameters():
        assert key in saved
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # Stacks (N networks, S scenarios, C cells, T tasks): each member on its own, so that no expert is idle.
        is_stack = re.search(r"_[NSCT][A-Z1]+(\.\d+)?$", key) is not None and parameter.dim() > 1
        members = parameter.grad.flatten(1) if is_stack else parameter.grad.reshape(1, -1)
        assert (members.abs().sum(dim=1) > 0).all(), key


@pytest.mark.parametrize("name", ALL)
def test_parameters_of_an_absent_scenario_are_in_the_graph_with_gradient_zero(name: str) -> None:
    backbone = small_backbone(name, num_scenarios=4)
    inputs = batch_of([0, 2, 2, 0, 2, 0])
    weighted_sum(backbone(inputs), inputs).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in backbone.parameters())
    own = dict(scenario_parameters(backbone, num_scenarios=4))
    for key, gradient_SX in own.items():
        assert (gradient_SX[[1, 3]] == 0).all(), key
        assert (gradient_SX[[0, 2]].abs().sum(dim=1) > 0).all(), key
    assert bool(own) == (name not in ("m2m", "apg", "pepnet"))


def scenario_parameters(backbone: Backbone, *, num_scenarios: int) -> list[tuple[str, Tensor]]:
    """Gradients (S, X) of what belongs to one scenario: STAR's S-first tensors and the cells' towers."""
    found = []
    for key, parameter in backbone.named_parameters():
        if re.search(r"_S[A-Z]+$", key) or key.startswith("towers.towers."):
            assert parameter.grad is not None
            found.append((key, parameter.grad.reshape(num_scenarios, -1)))
    return found


@pytest.mark.parametrize("name", ALL)
def test_padding_rows_change_nothing_for_the_others_in_training(name: str) -> None:
    inputs = batch_of(MIXED, padding=3)
    noisy = replace(inputs, x_BD=torch.where(inputs.weights_B.unsqueeze(1) > 0, inputs.x_BD, 1e3))
    short = rows(inputs, slice(0, len(MIXED) - 3))
    outcomes = []
    for case in (inputs, noisy, short):
        backbone = small_backbone(name)
        logits_BT = backbone(case)[: len(MIXED) - 3]
        (logits_BT * torch.arange(1.0, logits_BT.numel() + 1).view_as(logits_BT)).sum().backward()
        gradients = [parameter.grad for parameter in backbone.parameters()]
        outcomes.append([logits_BT.detach(), *gradients, *(b.clone() for b in backbone.buffers())])
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_one_row_trains_without_nan(name: str) -> None:
    backbone = small_backbone(name)
    inputs = batch_of([1])
    logits_BT = backbone(inputs)
    weighted_sum(logits_BT, inputs).backward()
    assert logits_BT.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in backbone.parameters())


@pytest.mark.parametrize("name", [name for name in ALL if name != "pepnet"])  # its gates stop gradients on purpose
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
def test_gradients_agree_with_finite_differences(name: str, is_training: bool) -> None:
    backbone = small_backbone(name).train(is_training)
    inputs = batch_of([0, 1, 2, 1, 0, 2, 0], padding=1)

    def logits(x_BD: Tensor, scenario_embedding_BE: Tensor, trigger_BZ: Tensor) -> Tensor:
        given = replace(inputs, x_BD=x_BD, scenario_embedding_BE=scenario_embedding_BE, trigger_BZ=trigger_BZ)
        return backbone(given)[:-1]

    leaves = [t.clone().requires_grad_() for t in (inputs.x_BD, inputs.scenario_embedding_BE, inputs.trigger_BZ)]
    assert torch.autograd.gradcheck(logits, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_logits_take_both_signs(name: str) -> None:
    logits_BT = torch.cat([small_backbone(name, seed=seed)(batch_of(MIXED)) for seed in range(8)])
    assert (logits_BT > 0).any(dim=0).all()
    assert (logits_BT < 0).any(dim=0).all()


@pytest.mark.parametrize("name", ALL)
def test_dropout_acts_in_training_only(name: str) -> None:
    backbone = small_backbone(name, config=replace(SMALL, dropout=0.5))
    inputs = batch_of(MIXED)
    assert not torch.equal(backbone(inputs), backbone(inputs))
    backbone.eval()
    assert torch.equal(backbone(inputs), backbone(inputs))


@pytest.mark.parametrize("name", ALL)
def test_a_width_zero_trigger_is_allowed(name: str) -> None:
    config = replace(SMALL, backbone=name)
    backbone = build_backbone(
        config, BackboneDims(input_dim=6, scenario_dim=3, trigger_dim=0, num_scenarios=2)
    ).double()
    inputs = batch_of([0, 1])
    assert backbone(replace(inputs, trigger_BZ=inputs.trigger_BZ[:, :0])).isfinite().all()


class FromTensors(nn.Module):
    """BackboneInput's fields as plain arguments, as an exported program takes them."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, x_BD: Tensor, scenario_B: Tensor, embedding_BE: Tensor, trigger_BZ: Tensor, weights_B: Tensor
    ) -> Tensor:
        logits_BT: Tensor = self.backbone(BackboneInput(x_BD, scenario_B, embedding_BE, trigger_BZ, weights_B))
        return logits_BT


def tensors(inputs: BackboneInput) -> tuple[Tensor, ...]:
    return (inputs.x_BD, inputs.scenario_B, inputs.scenario_embedding_BE, inputs.trigger_BZ, inputs.weights_B)


@pytest.mark.slow  # tests/e2e/test_export.py exports every backbone for requests of any size
@pytest.mark.parametrize("name", ALL)
def test_evaluation_exports_with_any_batch_size(name: str) -> None:
    model = FromTensors(small_backbone(name)).eval()
    rows_dim = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(model, tensors(batch_of(MIXED)), dynamic_shapes=[{0: rows_dim}] * 5)
    other = tensors(batch_of([2, 1, 2, 0, 0], seed=9))
    torch.testing.assert_close(program.module()(*other), model(*other), rtol=1e-12, atol=1e-12)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["star", "mmoe"])
def test_training_compiles_without_a_graph_break(name: str) -> None:
    """STAR does something else in training than the export above has traced; experts have a backward of their own."""
    model, twin = (FromTensors(small_backbone(name)) for _ in range(2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    case = tensors(batch_of(MIXED))
    found, expected = compiled(*case), twin(*case)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.integration
@pytest.mark.parametrize("name", ALL)
def test_half_precision_training_gives_finite_logits_and_gradients(name: str) -> None:
    backbone = small_backbone(name).float()
    inputs = batch_of(MIXED)
    inputs = BackboneInput(*(t.float() if t.is_floating_point() else t for t in tensors(inputs)))
    exact_BT = small_backbone(name)(batch_of(MIXED))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BT = backbone(inputs)
    weighted_sum(logits_BT.float(), inputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
    torch.testing.assert_close(logits_BT.double(), exact_BT, rtol=0.1, atol=0.1)


@pytest.mark.integration
@pytest.mark.parametrize("name", ALL)
def test_a_known_function_of_each_cell_is_learned(name: str) -> None:
    # Scenario 1 wants the opposite of scenario 0 and each task another direction: a scenario-blind model gets 0.5.
    num_scenarios, width = 2, 6
    torch.manual_seed(3)
    directions_T = torch.randn(2, width)
    sign_S = torch.tensor([1.0, -1.0])
    config = ModelConfig(
        backbone=name,
        hidden=(32, 16),
        tower_hidden=(8,),
        num_experts=3,
        meta_view_dim=6,
        apg_rank=6,
        apg_over_parameterisation=16,
    )
    backbone = build_backbone(
        config, BackboneDims(input_dim=width, scenario_dim=2, trigger_dim=2, num_scenarios=num_scenarios)
    )
    optimizer = torch.optim.Adam(backbone.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=100)

    def draw(num_rows: int) -> tuple[BackboneInput, Tensor]:
        x_BD = torch.randn(num_rows, width)
        scenario_B = torch.randint(0, num_scenarios, (num_rows,))
        embedding_BE = nn.functional.one_hot(scenario_B, num_scenarios).float()
        labels_BT = (sign_S[scenario_B].unsqueeze(1) * (x_BD @ directions_T.T) > 0).float()
        return BackboneInput(x_BD, scenario_B, embedding_BE, embedding_BE, torch.ones(num_rows)), labels_BT

    for _ in range(100):
        inputs, labels_BT = draw(128)
        loss = nn.functional.binary_cross_entropy_with_logits(backbone(inputs), labels_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    inputs, labels_BT = draw(4000)
    is_right_BT = (backbone.eval()(inputs) > 0) == (labels_BT > 0)
    for scenario in range(num_scenarios):
        accuracy_T = is_right_BT[inputs.scenario_B == scenario].double().mean(dim=0)
        assert (accuracy_T > 0.9).all(), accuracy_T


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden": ()}, "model.hidden is empty; give at least one width"),
        ({"tower_hidden": (8, 0)}, "model.tower_hidden[1] must be in [1, 65536], got 0"),
        ({"num_experts": 0}, "model.num_experts must be in [1, 1024], got 0"),
        ({"meta_depth": -1}, "model.meta_depth must be in [1, 64], got -1"),
        ({"dropout": 1.0}, "model.dropout must be in [0, 1), got 1.0"),
        (
            {"apg_rank": 8, "apg_over_parameterisation": 4},
            "model.apg_over_parameterisation (4) must not be below model.apg_rank (8)",
        ),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.from_dict({"model": values})


@pytest.mark.parametrize("num_scenarios", [1, 2, 5])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("is_scenario_major", [False, True])
def test_a_row_takes_its_own_scenario_s_values_to_the_last_bit(
    num_scenarios: int, shape: tuple[int, ...], is_scenario_major: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    values_BSX = torch.randn(num_scenarios, 7, *shape, generator=generator).transpose(0, 1)
    values_BSX = (values_BSX if is_scenario_major else values_BSX.contiguous()).requires_grad_()
    scenario_B = torch.randint(0, num_scenarios, (7,), generator=generator)
    taken = select_scenario(values_BSX, scenario_B)
    assert torch.equal(taken, torch.stack([values_BSX[row, scenario] for row, scenario in enumerate(scenario_B)]))
    weights = torch.randn(taken.shape, generator=generator)
    (found,) = torch.autograd.grad(taken, values_BSX, weights)
    expected = torch.zeros_like(values_BSX)
    for row, scenario in enumerate(scenario_B):
        expected[row, scenario] = weights[row]
    assert torch.equal(found, expected)
