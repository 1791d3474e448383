"""Run directories for the tests of export and scoring: small models whose every parameter is moved off its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.unit.samples_table import FIRST_DATE
from usr_ray.config import BACKBONES, Config
from usr_ray.data.manifest import build_manifest
from usr_ray.model.multitask import REST_SHARE
from usr_ray.training.checkpoint import CheckpointStore
from usr_ray.training.state import TrainState
from usr_ray.training.worker import LocalWorker

PLAIN = {"interest": {"enabled": False}, "generator": {"enabled": False}, "multitask": {"enabled": False}}
MODELS = [(backbone, is_plain) for backbone in BACKBONES for is_plain in (False, True)]
NAMES = [f"{backbone}{'' if is_plain else '+usr'}" for backbone, is_plain in MODELS]


def run_config(**model: Any) -> Config:
    """A small run; `model` are keys of [model], or its sections as dictionaries; `crosses` are features.crosses."""
    crosses = model.pop("crosses", [])
    small: dict[str, Any] = {
        "interest": {"rank": 2, "over_parameterisation": 4},
        "generator": {"hidden": 4},
        "multitask": {"hidden": [4]},
        "contrastive": {"group_size": 16},
    }
    sections = {name: {**values, **model.pop(name, {})} for name, values in small.items()}
    sizes = {
        "embedding_dim": 4,
        "trigger_dim": 4,
        "hidden": [8, 6],
        "tower_hidden": [4],
        "recent_queries": 3,
        "apg_rank": 3,
        "apg_over_parameterisation": 5,
        "apg_hidden": [4],
        "num_experts": 3,
    }
    return Config.from_dict(
        {
            "data": {"train_dates": "2026-01-01", "eval_dates": "2026-01-03:2026-01-04"},
            "features": {"crosses": crosses},
            "model": {**sizes, **sections, **model},
            "train": {"global_batch_size": 64, "reader_threads": 1},
        }
    )


def make_run(run_dir: Path, lake: Path, *, step: int = 5, best: bool = False, seed: int = 0, **model: Any) -> Path:
    """Write a checkpoint of a random model into `run_dir`, which may hold some already."""
    worker = LocalWorker("cpu")
    state = TrainState(run_config(**model), build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE)), worker, order="x")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in state.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if state.module.global_heads is not None:
            state.module.get_buffer(REST_SHARE).uniform_(0.1, 1.0, generator=generator)
        if state.module.wide is not None:
            state.module.wide.weights_NH[0] = 0  # padding, which no training moves
        for name, value in state.module.named_buffers():
            if "moving_" in name:
                value.add_(torch.rand(value.shape, generator=generator))
    for table_ND in state.tables.tables.values():
        table_ND[1:] += torch.randn(table_ND[1:].shape, generator=generator) * 0.5
    store = CheckpointStore(run_dir / "checkpoints")
    store.save(step, state.tensors(), state.describe(worker), vectors=state.tables.frozen, best=best)
    return run_dir
