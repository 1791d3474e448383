"""A backbone from outside the package: named by module:Class, refused in one line where it breaks the interface."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.backbone_batches import batch_of
from tests.unit.export_runs import make_run, run_config
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.config import ModelConfig, UserError
from usr_ray.model.backbones import BackboneDims, build_backbone, check_own_backbone
from usr_ray.model.backbones.own import check_backbone
from usr_ray.runs.plan import plan_run
from usr_ray.training.evaluate import load_run

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "add_a_backbone"
SOURCE = """
import torch
from torch import nn
from usr_ray.model.backbones import Backbone

class Plain(Backbone):
    def __init__(self, config, dims):
        super().__init__()
        self.num_scenarios = dims.num_scenarios
        self.layer = nn.Linear(dims.input_dim, 2)
        self.own = nn.Parameter(torch.ones(dims.num_scenarios))

    def forward(self, inputs):
        return self.layer(inputs.x_BD) * self.own[inputs.scenario_B].unsqueeze(1)

class Wide(Plain):
    def forward(self, inputs):
        return super().forward(inputs)[:, :1]

class Idle(Plain):
    def __init__(self, config, dims):
        super().__init__(config, dims)
        self.towers = nn.ModuleList(nn.Linear(2, 2) for _ in range(dims.num_scenarios))

    def forward(self, inputs):
        logits_BT = super().forward(inputs)
        return sum(self.towers[s](logits_BT) for s in inputs.scenario_B.unique().tolist())

class Mixing(Plain):
    def forward(self, inputs):
        logits_BT = super().forward(inputs)
        return logits_BT - logits_BT.mean(0) if len(logits_BT) > 1 else logits_BT

class Wrong(Plain):
    def forward(self, inputs):
        return self.layer(inputs.trigger_BZ)

class Double(Plain):
    def forward(self, inputs):
        return super().forward(inputs).double()

class Undefined(Plain):  # for the last scenario alone
    def forward(self, inputs):
        return super().forward(inputs) / (inputs.scenario_B != self.num_scenarios - 1).unsqueeze(1)

class InPlace(Plain):
    def forward(self, inputs):
        inputs.trigger_BZ.mul_(2)
        return super().forward(inputs)

class Listed(Plain):  # zeros at first, as many a bias: a fresh one has the same
    def __init__(self, config, dims):
        super().__init__(config, dims)
        self.biases = [nn.Parameter(torch.zeros(2)) for _ in range(dims.num_scenarios)]

    def forward(self, inputs):
        return super().forward(inputs) + torch.stack(self.biases)[inputs.scenario_B]

class Drawn(Plain):
    def __init__(self, config, dims):
        super().__init__(config, dims)
        self.projection = torch.randn(2, 2)

    def forward(self, inputs):
        return super().forward(inputs) @ self.projection

class Moving(Plain):
    def __init__(self, config, dims):
        super().__init__(config, dims)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, inputs):
        logits_BT = super().forward(inputs)
        if self.training:
            self.scale.lerp_(self.layer.weight.detach().std(), 0.1)
        return logits_BT / self.scale

class BatchNorm(Plain):
    def __init__(self, config, dims):
        super().__init__(config, dims)
        self.norm = nn.BatchNorm1d(dims.input_dim)

    def forward(self, inputs):
        return self.layer(self.norm(inputs.x_BD)) * self.own[inputs.scenario_B].unsqueeze(1)

class AlwaysDropped(Plain):
    def forward(self, inputs):
        return nn.functional.dropout(super().forward(inputs), 0.5)

class Dropped(Plain):  # keeps all promises
    def forward(self, inputs):
        self.last = super().forward(inputs)
        return nn.functional.dropout(self.last, 0.5, training=self.training)

class NotOne:
    pass
"""


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_backbones.py").write_text(SOURCE)
    (folder / "half_written.py").write_text("import torch.nn as nn, math; Net = nn.Linear(")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.syspath_prepend(str(EXAMPLE))
        yield


def refusal(name: str) -> str:
    with pytest.raises(UserError) as error:
        check_own_backbone(ModelConfig(backbone=name), num_scenarios=3)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_had_or_breaks_the_interface_is_one_line() -> None:
    assert refusal("nowhere.mine:Net") == (
        "model.backbone 'nowhere.mine:Net': No module named 'nowhere'; put its folder on PYTHONPATH, or install it, on "
        "every machine that trains, evaluates or scores"
    )
    assert refusal("half_written:Net") == (
        "model.backbone 'half_written:Net': importing half_written raises SyntaxError: '(' was never closed "
        "(half_written.py, line 1)"
    )
    assert "has something else there" in refusal("os:system")
    needed = "a subclass of usr_ray.model.backbones.Backbone is needed; it has: AlwaysDropped, Backbone, BatchNorm, "
    assert f"own_backbones.py has no such name there, {needed}" in refusal("own_backbones:Nett")
    assert "own_backbones.py has something else there" in refusal("own_backbones:NotOne")
    assert "forward must give finite logits of shape (rows, tasks) = (6, 2), got (6, 1)" in refusal(
        "own_backbones:Wide"
    )
    assert "parameter towers.1.weight takes no part in a batch of one scenario" in refusal("own_backbones:Idle")
    assert "the logits of a row change with the other rows of its batch" in refusal("own_backbones:Mixing")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Wrong", "its code raises RuntimeError ({file}:36): mat1 and mat2 shapes cannot be multiplied"),
        ("Double", "forward must give logits of the input's type, torch.float32, got torch.float64"),
        ("Undefined", "forward must give finite logits of shape (rows, tasks) = (6, 2), got (6, 2)"),
        ("InPlace", "forward changes its input trigger_BZ in place; other parts of the model read it too"),
        ("Listed", "a weight is no registered parameter, so it would be neither trained nor saved; make it an attr"),
        ("Drawn", "what is saved of it (state_dict) does not give the same logits again; register each tensor that"),
        ("Moving", "what is saved of it (state_dict) does not give the same logits again; register each tensor that"),
        ("BatchNorm", "in training rows of weight 0 (padding) change the logits of others, as batch norms do"),
        ("AlwaysDropped", "in evaluation the same rows have other logits each time; drop out in training alone (self"),
    ],
)
def test_a_mistake_that_would_only_show_as_a_wrong_number_is_refused(name: str, line: str) -> None:
    found = refusal(f"own_backbones:{name}")
    found = found.replace(str(sys.modules["own_backbones"].__file__), "{file}")
    assert found.startswith(f"model.backbone 'own_backbones:{name}': {line}")


def test_dropout_and_what_a_forward_keeps_for_itself_are_let_pass() -> None:
    check_own_backbone(ModelConfig(backbone="own_backbones:Dropped"), num_scenarios=3)


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe", "ple", "star", "m2m", "apg", "pepnet"])
def test_our_own_backbones_keep_what_is_asked_of_others(name: str) -> None:
    for config in (ModelConfig(backbone=name), ModelConfig(backbone=name, dropout=0.3)):
        check_backbone(config, build_backbone, num_scenarios=3)


def test_the_check_leaves_torchs_generator_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_own_backbone(ModelConfig(backbone="own_backbones:Plain"), num_scenarios=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_is_refused_before_ray_starts(tmp_path: Path) -> None:
    write_samples(tmp_path / "lake", samples_spec(), num_rows=300, num_days=4)
    config = run_config(backbone="own_backbones:Mixing")
    config = replace(config, data=replace(config.data, mature_only=False))
    with pytest.raises(UserError, match="own_backbones:Mixing': in evaluation"):
        plan_run(config, tmp_path / "lake", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_example_computes_cross_layers() -> None:
    config = ModelConfig(
        backbone="cross_network:CrossNetwork", backbone_options={"num_cross_layers": 2}, hidden=(5,), tower_hidden=()
    )
    torch.manual_seed(0)
    net = build_backbone(config, BackboneDims(input_dim=6, scenario_dim=3, trigger_dim=4, num_scenarios=3)).double()
    inputs = batch_of([2, 0, 1, 1])
    found = net(inputs)
    for row, scenario in enumerate(inputs.scenario_B.tolist()):
        x0 = x = inputs.x_BD[row]
        for layer in net.cross:
            x = torch.stack([x0[n] * (layer.weight[n] @ x + layer.bias[n]) + x[n] for n in range(6)])
        deep = torch.relu(net.deep.layers[0].weight @ x0 + net.deep.layers[0].bias)
        h = torch.cat([x, deep])
        for task in range(2):
            cell = scenario * 2 + task
            expected = h @ net.towers.towers.weights_NIO[0][cell, :, 0] + net.towers.towers.biases_N1O[0][cell, 0, 0]
            torch.testing.assert_close(found[row, task], expected, rtol=1e-10, atol=1e-12)


def test_a_machine_without_the_class_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples(tmp_path / "lake", samples_spec(), num_rows=60, num_days=1)
    run_dir = make_run(tmp_path / "run", tmp_path / "lake", backbone="cross_network:CrossNetwork")
    monkeypatch.setattr("usr_ray.model.backbones.own.importlib.import_module", _absent)
    with pytest.raises(UserError, match=r"^model.backbone 'cross_network:CrossNetwork': No module named 'cross_net"):
        load_run(run_dir)


def _absent(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
