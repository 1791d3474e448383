"""Backbones from outside the package: `model.backbone = "module:Class"`, found by import, checked on a few rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from usr_ray.config import ConfigError, ModelConfig
from usr_ray.data.batch import map_tensors
from usr_ray.model.backbones.interface import Backbone, BackboneDims, BackboneInput
from usr_ray.schema import TASKS

_ROWS_A_SCENARIO = 2
_DIMS = {"input_dim": 12, "scenario_dim": 4, "trigger_dim": 6}


class OwnBackboneError(ConfigError):
    """The class that model.backbone names cannot be loaded, or breaks the interface."""


def own_backbone(name: str) -> Callable[[ModelConfig, BackboneDims], Backbone]:
    """The class "module:Class", imported from Python's path; the module's code runs.

    Raises:
        OwnBackboneError: there is no such module, no such class in it, or it is no `Backbone`.
    """
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise OwnBackboneError(
            f"model.backbone {name!r}: {error}; put its folder on PYTHONPATH, or install it, on every machine that "
            "trains, evaluates or scores"
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
        OwnBackboneError: the logits are not finite (B, T), a row's logits depend on other rows in evaluation, or a
            parameter takes no part where a scenario is absent from the batch (DistributedDataParallel would fail).
    """

    def refuse(what: str) -> OwnBackboneError:
        return OwnBackboneError(f"model.backbone {config.backbone!r}: {what} (usr_ray/model/backbones/interface.py)")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = kind(config, BackboneDims(**_DIMS, num_scenarios=num_scenarios))
        rows = _rows(num_scenarios)
        backbone.train()
        one = map_tensors(rows, itemgetter(slice(_ROWS_A_SCENARIO)))  # rows of the first scenario alone
        logits_BT = backbone(one)
        wanted = (_ROWS_A_SCENARIO, len(TASKS))
        if not isinstance(logits_BT, Tensor) or logits_BT.shape != wanted or not logits_BT.isfinite().all():
            found = tuple(logits_BT.shape) if isinstance(logits_BT, Tensor) else type(logits_BT).__name__
            raise refuse(f"forward must give finite logits of shape (rows, tasks) = {wanted}, got {found}")
        logits_BT.sum().backward()
        idle = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
        if idle:
            raise refuse(
                f"parameter {idle[0]} takes no part in a batch of one scenario; compute all scenarios and select"
            )
        backbone.eval()
        with torch.no_grad():
            together_BT = backbone(rows)
            alone = [map_tensors(rows, itemgetter(slice(n, n + 1))) for n in range(len(rows.x_BD))]
            alone_BT = torch.cat([backbone(row) for row in alone])
        if not torch.allclose(together_BT, alone_BT, atol=1e-5):
            raise refuse("in evaluation the logits of a row change with the other rows of its batch")


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
