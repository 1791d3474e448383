"""Backbones from outside the package: `model.backbone = "module:Class"`, found by import, checked on a few rows."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from operator import itemgetter

import torch
from torch import Tensor

from usr_ray.config import ConfigError, ModelConfig
from usr_ray.data.batch import map_tensors
from usr_ray.files import one_line
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.schema import TASKS

_ROWS_A_SCENARIO = 2
_DIMS = {"input_dim": 12, "scenario_dim": 4, "trigger_dim": 6}


class OwnBackboneError(ConfigError):
    """The class that model.backbone names cannot be loaded, or breaks the interface."""


def own_backbone(name: str) -> Callable[[ModelConfig, BackboneDims], Backbone]:
    """The class "module:Class", imported from Python's path; the module's code runs.

    Raises:
        OwnBackboneError: there is no such module, or its code fails; it has no such class, or that is no `Backbone`.
    """
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise OwnBackboneError(
            f"model.backbone {name!r}: {error}; put its folder on PYTHONPATH, or install it, on every machine that "
            "trains, evaluates or scores"
        ) from error
    except Exception as error:
        raise OwnBackboneError(
            f"model.backbone {name!r}: importing {module_name} raises {type(error).__name__}: {one_line(error)}"
        ) from error
    kind = getattr(module, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, Backbone)):
        there = sorted(n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Backbone))
        found = "no such name" if kind is None else "something else"
        raise OwnBackboneError(
            f"model.backbone {name!r}: {module.__file__} has {found} there, a subclass of "
            f"usr_ray.model.backbones.Backbone is needed; it has: {', '.join(there) or 'none'}"
        )
    return kind


def check_backbone(
    config: ModelConfig, kind: Callable[[ModelConfig, BackboneDims], Backbone], *, num_scenarios: int
) -> None:
    """Check what `Backbone` promises on a few random rows; torch's global generator is left unchanged.

    Raises:
        OwnBackboneError: it raises an error; the logits are not finite (B, T) of the input's type; its inputs are
            changed; a parameter is not registered, or takes no part where a scenario is absent from the batch
            (DistributedDataParallel would fail); padding rows change other rows' logits; a row's logits depend on other
            rows in evaluation; or what is saved of it does not give its logits again.
    """

    def refuse(what: str) -> OwnBackboneError:
        return OwnBackboneError(f"model.backbone {config.backbone!r}: {what} (usr_ray/model/backbones/interface.py)")

    def build() -> Backbone:
        return kind(config, BackboneDims(**_DIMS, num_scenarios=num_scenarios))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            found = _broken_promise(build, num_scenarios)
        except Exception as error:
            found = f"its code raises {type(error).__name__}{_place(error, kind)}: {one_line(error)}"
    if found:
        raise refuse(found)


def _broken_promise(build: Callable[[], Backbone], num_scenarios: int) -> str:
    """What a backbone does not keep of its promises; '': it keeps all."""
    backbone, rows = build().train(), _rows(num_scenarios)
    for some in (rows, map_tensors(rows, itemgetter(slice(_ROWS_A_SCENARIO)))):  # the second: of one scenario alone
        given = map_tensors(some, Tensor.clone)
        logits_BT = backbone(given)
        wanted, dtype = (len(some.x_BD), len(TASKS)), some.x_BD.dtype
        if not isinstance(logits_BT, Tensor) or logits_BT.shape != wanted or not logits_BT.isfinite().all():
            found = tuple(logits_BT.shape) if isinstance(logits_BT, Tensor) else type(logits_BT).__name__
            return f"forward must give finite logits of shape (rows, tasks) = {wanted}, got {found}"
        if logits_BT.dtype != dtype:
            return f"forward must give logits of the input's type, {dtype}, got {logits_BT.dtype}"
        for name in (field.name for field in fields(some)):
            if not torch.equal(getattr(some, name), getattr(given, name)):
                return f"forward changes its input {name} in place; other parts of the model read it too"
    if _leaves(logits_BT) - {*map(id, backbone.parameters())}:
        return (
            "a weight is no registered parameter, so it would be neither trained nor saved; make it an attribute of "
            "its own, or use nn.ParameterList or nn.ModuleList"
        )
    logits_BT.sum().backward()
    idle = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    if idle:
        return f"parameter {idle[0]} takes no part in a batch of one scenario; compute all scenarios and select"
    return _unsaved(backbone, build(), rows) or _dependence(backbone, rows)


def _leaves(tensor: Tensor) -> set[int]:
    """Ids of the tensors that a backward from `tensor` would give a gradient."""
    found, seen, left = set(), set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        left += [parent for parent, _ in node.next_functions]
    return found


def _unsaved(backbone: Backbone, fresh: Backbone, rows: BackboneInput) -> str:
    """Why a fresh backbone with the weights that are saved gives other logits in evaluation; '': it does not."""
    fresh.load_state_dict(backbone.eval().state_dict())
    with torch.no_grad():
        logits_BT = backbone(rows)
        if not torch.allclose(backbone(rows), logits_BT):
            return "in evaluation the same rows have other logits each time; drop out in training alone (self.training)"
        if torch.allclose(fresh.eval()(rows), logits_BT, atol=1e-5):
            return ""
    return (
        "what is saved of it (state_dict) does not give the same logits again; register each tensor that forward uses, "
        "as a parameter or a persistent buffer"
    )


def _dependence(backbone: Backbone, rows: BackboneInput) -> str:
    """How a row's logits depend on other rows; '': on none that they may not depend on."""
    is_padding_B = torch.arange(len(rows.x_BD)) % _ROWS_A_SCENARIO == _ROWS_A_SCENARIO - 1
    padded = replace(rows, weights_B=(~is_padding_B).float())
    others = replace(padded, x_BD=torch.where(is_padding_B.unsqueeze(1), 3 * rows.x_BD + 1, rows.x_BD))
    with torch.no_grad():
        backbone.eval()
        alone_BT = torch.cat([backbone(map_tensors(rows, itemgetter(slice(n, n + 1)))) for n in range(len(rows.x_BD))])
        if not torch.allclose(backbone(rows), alone_BT, atol=1e-5):
            return "in evaluation the logits of a row change with the other rows of its batch"
        backbone.train()
        found, state = list[Tensor](), {name: value.clone() for name, value in backbone.state_dict().items()}
        for some in (padded, others):
            torch.manual_seed(1)  # of dropout
            backbone.load_state_dict(state)  # moving averages start alike
            found.append(backbone(some)[~is_padding_B])
    if torch.allclose(found[0], found[1], atol=1e-5):
        return ""
    return "in training rows of weight 0 (padding) change the logits of others, as batch norms do"


def _place(error: BaseException, kind: Callable[..., Backbone]) -> str:
    """' (file:line)', the innermost line of the module of `kind` that the error went through; '' without one."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({file}:{lines[-1]})" if lines else ""


def _rows(num_scenarios: int) -> BackboneInput:
    """A few random rows of each scenario, scenario by scenario."""
    scenario_B = torch.arange(num_scenarios).repeat_interleave(_ROWS_A_SCENARIO)
    num_rows = len(scenario_B)
    return BackboneInput(
        x_BD=torch.randn(num_rows, _DIMS["input_dim"]),
        scenario_B=scenario_B,
        scenario_embedding_BE=torch.randn(num_scenarios, _DIMS["scenario_dim"])[scenario_B],
        trigger_BZ=torch.randn(num_rows, _DIMS["trigger_dim"]),
        weights_B=torch.ones(num_rows),
    )
