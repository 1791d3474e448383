"""STAR, M2M, APG and PEPNet against slow loops over rows from the formulas; PLE against a case worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.unit.backbone_batches import SMALL, batch_of, small_backbone, weighted_sum
from usr_ray.model.backbones import BackboneDims, BackboneInput, build_backbone
from usr_ray.model.backbones.apg import APG, GeneratedLinear, GeneratedMLP
from usr_ray.model.backbones.m2m import M2M, MetaUnit
from usr_ray.model.backbones.pepnet import GateUnit, PEPNet
from usr_ray.model.backbones.ple import PLE
from usr_ray.model.backbones.star import STAR, StarMLP

pytestmark = pytest.mark.unit
MIXED = [0, 2, 1, 1, 0, 2, 2, 0, 1]


def same_logits_and_gradients(backbone: nn.Module, expected_BT: Tensor, inputs: BackboneInput) -> None:
    parameters = list(backbone.parameters())
    logits_BT = backbone(inputs)
    torch.testing.assert_close(logits_BT, expected_BT, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(weighted_sum(logits_BT, inputs), parameters)
    wanted = torch.autograd.grad(weighted_sum(expected_BT, inputs), parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def dense(mlp: nn.Module, x_I: Tensor) -> Tensor:
    """A plain MLP of model/mlp.py on one row: ReLU between its linear layers."""
    linears = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    for number, linear in enumerate(linears):
        x_I = linear.weight @ x_I + linear.bias
        if number < len(linears) - 1:
            x_I = x_I.clamp(min=0)
    return x_I


# STAR


def star_layers(network: StarMLP, x_I: Tensor, scenario: int, member: int) -> Tensor:
    for number, layer in enumerate(network.layers):
        weight_IO = layer.weight_NIO[member] * layer.weight_SNIO[scenario, member]
        x_I = x_I @ weight_IO + layer.bias_NO[member] + layer.bias_SNO[scenario, member]
        if number < network.num_hidden:
            x_I = x_I.clamp(min=0)
    return x_I


def star_by_rows(star: STAR, inputs: BackboneInput, mean_SI: Tensor, var_SI: Tensor) -> Tensor:
    norm = star.normalisation
    logits = []
    for row, k in enumerate(inputs.scenario_B.tolist()):
        x_I = inputs.x_BD[row]
        z_I = (norm.gamma_I * norm.gamma_SI[k]) * (x_I - mean_SI[k]) / torch.sqrt(var_SI[k] + 1e-5)
        z_I = z_I + norm.beta_I + norm.beta_SI[k]
        h_H = star_layers(star.bottom, z_I, k, 0)
        auxiliary_T = dense(star.auxiliary, torch.cat([inputs.scenario_embedding_BE[row], x_I]))
        logits.append(torch.stack([star_layers(star.towers, h_H, k, t)[0] + auxiliary_T[t] for t in range(2)]))
    return torch.stack(logits)


def test_star_in_training_equals_a_loop_over_rows() -> None:
    star = small_backbone("star")
    assert isinstance(star, STAR)
    inputs = batch_of(MIXED)
    by_scenario = [inputs.x_BD[[row for row, k in enumerate(MIXED) if k == scenario]] for scenario in range(3)]
    mean_SI = torch.stack([rows.mean(dim=0) for rows in by_scenario])
    var_SI = torch.stack([((rows - rows.mean(dim=0)) ** 2).mean(dim=0) for rows in by_scenario])
    same_logits_and_gradients(star, star_by_rows(star, inputs, mean_SI, var_SI), inputs)


def test_star_in_evaluation_equals_a_loop_over_rows_with_moving_statistics() -> None:
    star = small_backbone("star")
    assert isinstance(star, STAR)
    for seed in range(3):
        star(batch_of(MIXED, seed=seed))
    star.eval()
    inputs = batch_of(MIXED, seed=7)
    norm = star.normalisation
    same_logits_and_gradients(star, star_by_rows(star, inputs, norm.moving_mean_SI, norm.moving_var_SI), inputs)


def test_star_starts_as_one_network_for_all_scenarios() -> None:
    torch.manual_seed(0)
    star = build_backbone(
        replace(SMALL, backbone="star"), BackboneDims(input_dim=6, scenario_dim=3, trigger_dim=4, num_scenarios=3)
    ).eval()
    inputs = replace(batch_of([0, 0, 0]), weights_B=torch.ones(3))
    inputs = replace(inputs, x_BD=inputs.x_BD.float(), scenario_embedding_BE=inputs.scenario_embedding_BE.float())
    other = replace(inputs, scenario_B=torch.tensor([1, 2, 1]))
    torch.testing.assert_close(star(inputs), star(other), rtol=0, atol=0)


# M2M


def meta(unit: MetaUnit, h_I: Tensor, view_P: Tensor) -> Tensor:
    num_outputs = unit.to_bias.weight.shape[0]
    weight_OI = (unit.to_weight.weight @ view_P + unit.to_weight.bias).reshape(num_outputs, len(h_I))
    y_O = weight_OI @ h_I + unit.to_bias.weight @ view_P + unit.to_bias.bias
    return torch.where(y_O > 0, y_O, 0.01 * y_O)


def m2m_by_rows(m2m: M2M, inputs: BackboneInput) -> Tensor:
    logits = []
    for row in range(len(inputs.scenario_B)):
        x_I = inputs.x_BD[row]
        experts = []
        for member in range(SMALL.num_experts):
            h = x_I
            for weight_NIO, bias_N1O in zip(m2m.experts.weights_NIO, m2m.experts.biases_N1O, strict=True):
                h = (h @ weight_NIO[member] + bias_N1O[member, 0]).clamp(min=0)
            experts.append(h)
        view_P = dense(m2m.scenario_view, torch.cat([inputs.scenario_embedding_BE[row], inputs.trigger_BZ[row]]))
        logits_t = []
        for t in range(2):
            task_P = dense(m2m.task_view, m2m.task_embedding_TP[t])
            scores = [m2m.attention.score_O @ meta(m2m.attention.meta, torch.cat([e, task_P]), view_P) for e in experts]
            total = sum(math.e**score for score in scores)
            h = sum((math.e**score / total) * expert for score, expert in zip(scores, experts, strict=True))
            assert isinstance(h, Tensor)
            for unit in m2m.towers:
                inner = meta(unit, h, view_P) + h
                h = torch.where(inner > 0, inner, 0.01 * inner)
            logits_t.append(m2m.output_weight_TH[t] @ h + m2m.output_bias_T[t])
        logits.append(torch.stack(logits_t))
    return torch.stack(logits)


def test_m2m_equals_a_loop_over_rows() -> None:
    m2m = small_backbone("m2m")
    assert isinstance(m2m, M2M)
    inputs = batch_of(MIXED)
    same_logits_and_gradients(m2m, m2m_by_rows(m2m, inputs), inputs)


def test_m2m_task_view_does_not_depend_on_the_scenario() -> None:
    # The listed mistake: a task view made of the scenario embedding.
    m2m = small_backbone("m2m")
    assert isinstance(m2m, M2M)
    views = []
    m2m.task_view.register_forward_hook(lambda module, given, view: views.append(view))
    m2m(batch_of([0, 0]))
    m2m(batch_of([2, 1], seed=5))
    assert torch.equal(views[0], views[1])
    assert not torch.allclose(views[0][0], views[0][1])


# APG


def apg_layers(network: GeneratedMLP, x_I: Tensor, condition_Z: Tensor) -> Tensor:
    for layer in network.layers:
        rank = layer.rank
        core_KK = dense(layer.to_core, condition_Z).reshape(rank, rank)
        v_KI = (layer.v_IK.factors[0] @ layer.v_IK.factors[1]).T
        u_OK = (layer.u_KO.factors[0] @ layer.u_KO.factors[1]).T
        x_I = (u_OK @ core_KK @ v_KI @ x_I + layer.bias_O).clamp(min=0)
    return x_I


def apg_by_rows(apg: APG, inputs: BackboneInput) -> Tensor:
    logits = []
    for row in range(len(inputs.scenario_B)):
        condition_Z = torch.cat([inputs.scenario_embedding_BE[row], inputs.trigger_BZ[row]])
        h_H = apg_layers(apg.bottom, inputs.x_BD[row], condition_Z)
        towers = [apg_layers(tower, h_H, condition_Z) for tower in apg.towers]
        logits.append(torch.cat([dense(out, h) for out, h in zip(apg.outputs, towers, strict=True)]))
    return torch.stack(logits)


def test_apg_equals_a_loop_over_rows_that_builds_each_rows_weight() -> None:
    apg = small_backbone("apg")
    assert isinstance(apg, APG)
    inputs = batch_of(MIXED)
    same_logits_and_gradients(apg, apg_by_rows(apg, inputs), inputs)


def test_folded_apg_gives_the_same_logits_with_fewer_parameters() -> None:
    apg = small_backbone("apg").eval()
    assert isinstance(apg, APG)
    inputs = batch_of(MIXED)
    unfolded_BT, unfolded_size = apg(inputs), sum(p.numel() for p in apg.parameters())
    apg.fold()
    torch.testing.assert_close(apg(inputs), unfolded_BT, rtol=1e-12, atol=1e-13)
    assert sum(p.numel() for p in apg.parameters()) < unfolded_size
    assert not [key for key in apg.state_dict() if key.endswith("factors.1")]


def test_apg_products_keep_the_rank_of_the_core() -> None:
    # The listed mistake: an inner size below K makes U S V lose rank.
    torch.manual_seed(0)
    layer = GeneratedLinear(9, 8, 4, rank=5, inner_dim=5, hidden=(6,)).double()
    assert torch.linalg.matrix_rank(layer.v_IK()) == 5
    assert torch.linalg.matrix_rank(layer.u_KO()) == 5


# PEPNet


def gate(unit: GateUnit, condition_C: Tensor) -> Tensor:
    return 2 / (1 + torch.exp(-dense(unit.mlp, condition_C)))


def pepnet_by_rows(pepnet: PEPNet, inputs: BackboneInput) -> Tensor:
    logits = []
    for row in range(len(inputs.scenario_B)):
        x_D = inputs.x_BD[row]
        x_D = x_D * gate(pepnet.input_gate, torch.cat([inputs.scenario_embedding_BE[row], x_D.detach()]))
        condition_C = torch.cat([inputs.trigger_BZ[row], x_D.detach()])
        for tower in pepnet.towers:
            h_H = x_D
            for layer, unit in zip(tower.layers, tower.gates, strict=True):
                h_H = dense(layer, h_H).clamp(min=0) * gate(unit, condition_C)
            logits.append(dense(tower.output, h_H))
    return torch.cat(logits).view(-1, 2)


def test_pepnet_equals_a_loop_over_rows() -> None:
    pepnet = small_backbone("pepnet")
    assert isinstance(pepnet, PEPNet)
    inputs = batch_of(MIXED)
    same_logits_and_gradients(pepnet, pepnet_by_rows(pepnet, inputs), inputs)


def test_pepnet_gates_do_not_move_the_embeddings_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # The listed mistake: no stop of the gradient. With gates that are constants of the same size the gradient of x is
    # the same.
    pepnet = small_backbone("pepnet")
    x_BD = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    inputs = replace(batch_of([0, 1, 2, 0]), x_BD=x_BD)
    (found,) = torch.autograd.grad(weighted_sum(pepnet(inputs), inputs), x_BD)
    moving = GateUnit.forward
    monkeypatch.setattr(GateUnit, "forward", lambda self, condition_BC: moving(self, condition_BC).detach())
    (wanted,) = torch.autograd.grad(weighted_sum(pepnet(inputs), inputs), x_BD)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


# PLE


def test_ple_with_unequal_expert_counts_equals_the_case_worked_by_hand() -> None:
    config = replace(
        SMALL, backbone="ple", hidden=(1,), tower_hidden=(), num_experts=1, num_task_experts=2, num_levels=2
    )
    ple = build_backbone(config, BackboneDims(input_dim=1, scenario_dim=1, trigger_dim=0, num_scenarios=1)).double()
    assert isinstance(ple, PLE)
    first, last = ple.levels
    assert last.shared_gate_IG is None

    def scale(experts: nn.Module, factors: list[float]) -> None:
        experts.weights_NIO[0].copy_(torch.tensor(factors).view(-1, 1, 1))

    with torch.no_grad():
        for parameter in ple.parameters():
            parameter.zero_()
        # Level 1, x = 1: experts of the CTR cell give 1 and 2, of the CTCVR cell 3 and 4, the shared one 5.
        scale(first.task_experts, [1, 2, 3, 4])
        scale(first.shared_experts, [5])
        first.task_gates_CIG[0, 0] = torch.tensor([1.0, 2, 1]).log()  # 1/4, 1/2, 1/4 -> 1/4 + 1 + 5/4 = 5/2
        first.task_gates_CIG[1, 0] = torch.tensor([2.0, 1, 1]).log()  # 1/2, 1/4, 1/4 -> 3/2 + 1 + 5/4 = 15/4
        first.shared_gate_IG[0] = torch.tensor([1.0, 1, 2, 3, 1]).log()  # (1 + 2 + 6 + 12 + 5) / 8 = 13/4
        # Level 2, gates at zero take plain means: (5/2 + 5 + 13) / 3 = 41/6 and (15/2 + 15 + 13) / 3 = 71/6.
        scale(last.task_experts, [1, 2, 2, 4])
        scale(last.shared_experts, [4])
        # Towers 6 h + 1 and -6 h.
        ple.towers.towers.weights_NIO[0].copy_(torch.tensor([6.0, -6.0]).view(2, 1, 1))
        ple.towers.towers.biases_N1O[0][0] = 1.0
    one = torch.ones(1, 1, dtype=torch.float64)
    logits_BT = ple(BackboneInput(one, torch.tensor([0]), one, one[:, :0], one[0]))
    torch.testing.assert_close(logits_BT, torch.tensor([[42.0, -71.0]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_ple_with_one_level_has_no_shared_gate_at_all() -> None:
    one_level = small_backbone("ple", config=replace(SMALL, num_levels=1))
    two_levels = small_backbone("ple")
    assert [key for key in one_level.state_dict() if "shared_gate" in key] == []
    assert [key for key in two_levels.state_dict() if "shared_gate" in key] == ["levels.0.shared_gate_IG"]
