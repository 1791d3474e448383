"""A training step never has the host wait for a GPU: held on meta tensors everywhere, and by CUDA itself where it is.

A meta tensor has a shape and no values, so whatever would bring a value to the host fails on it: .item(), bool(tensor),
unique, nonzero, masks as indices. What a GPU is waited for besides, copies from the host's memory and bincount, is
refused by a mode that sees every operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.random_batches import make_batch, make_config, make_spec
from usr_ray.config import BACKBONES, ModelConfig, TrainConfig
from usr_ray.data.batch import UsrBatch, map_tensors
from usr_ray.data.feed import Feed
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.unique import UniqueIds
from usr_ray.model.usr import UsrModel
from usr_ray.training.loss import row_counts, usr_loss
from usr_ray.training.monitor import StepMeter
from usr_ray.training.optimizers import DenseAdamW
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration

SPEC = make_spec()


class NoWaiting(TorchDispatchMode):
    """Refuses operations of a device that its host would have to wait for."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen = 0

    def __torch_dispatch__(self, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = [t for t in tensors if t.device.type == self.device]
        self.seen += bool(on_device)
        assert not (on_device and name == "bincount"), "bincount waits for the largest value"
        strays = [t for t in tensors if t.device.type == "cpu" and t.dim()]
        assert not (on_device and strays), f"{name}: an argument is on the host, {tuple(strays[0].shape)}"
        kwargs = kwargs or {}
        moved = name in ("_to_copy", "copy_") and str(kwargs.get("device", self.device)).startswith(self.device)
        assert not (moved and tensors and not on_device and not kwargs.get("non_blocking")), f"{name}: waits"
        return function(*args, **kwargs)


def prepared(
    tables: EmbeddingTables, config: ModelConfig, num_batches: int = 1
) -> list[tuple[tuple[UsrBatch, UniqueIds], Tensor]]:
    """As usr_ray.training.rows makes them."""
    batches = [make_batch(SPEC, num_rows=24, seed=n) for n in range(num_batches)]
    return [((b.count_longest(), tables.unique_ids(b)), row_counts(b, len(SPEC.scenarios), config)) for b in batches]


def step_to_gradients(
    model: UsrModel, tables: EmbeddingTables, config: ModelConfig, batch: UsrBatch, unique: UniqueIds, counts_C: Tensor
) -> tuple[Any, Any]:
    lookup = tables.lookup(batch, unique)
    outputs = model(batch, lookup, 5)
    terms = usr_loss(outputs, batch, counts_C, config)
    terms.total.backward()
    return lookup, terms


@pytest.mark.parametrize("backbone", BACKBONES)
def test_forward_loss_and_backward_bring_no_value_to_the_host(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Autocast knows no meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    config = make_config(backbone=backbone, dropout=0.1)
    ((batch, unique), counts_C) = prepared(EmbeddingTables(SPEC, config.embedding_dim, 0), config)[0]
    tables = EmbeddingTables(SPEC, config.embedding_dim, 0, "meta")
    model = UsrModel(SPEC, config).to("meta")
    meter = StepMeter(LocalWorker("cpu"))
    there = map_tensors((batch, unique, counts_C), lambda tensor: tensor.to("meta"))
    with NoWaiting("meta") as mode:
        lookup, terms = step_to_gradients(model, tables, config, *there)
        named, by_row = terms.named(SPEC.scenarios), terms.by_row(SPEC.scenarios)
        meter.add(named, by_row, torch.zeros((), device="meta"), num_rows=22.0)
    assert mode.seen > 100
    assert all(rows.rows_UD.grad is not None for rows in lookup.tables.values())


def test_what_would_wait_is_noticed() -> None:
    values = torch.zeros(4, dtype=torch.int64, device="meta")
    with NoWaiting("meta"):
        with pytest.raises(AssertionError, match="bincount"):
            torch.bincount(values, minlength=3)
        with pytest.raises(AssertionError, match="an argument is on the host"):
            values[torch.tensor([0, 1])]
        with pytest.raises(AssertionError, match="_to_copy: waits"):
            torch.zeros(3).to("meta")
        for wait in (values.unique, lambda: bool(values.sum()), lambda: values[values > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA itself tells of every wait")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_on_a_gpu_whole_steps_run_under_sync_debug_mode_error(backbone: str) -> None:
    device, config = torch.device("cuda", 0), make_config(backbone=backbone, dropout=0.1)
    tables = EmbeddingTables(SPEC, config.embedding_dim, 0, device)
    model = UsrModel(SPEC, config).to(device)
    dense = DenseAdamW(model, TrainConfig())
    meter = StepMeter(LocalWorker(device))
    on_host = EmbeddingTables(SPEC, config.embedding_dim, 0)
    with Feed(iter(prepared(on_host, config, 6)), device) as feed:
        for number, ((batch, unique), counts_C) in enumerate(feed):
            # The first step allocates and initialises libraries, which may wait.
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            try:
                counts_there = counts_C.to(device, non_blocking=True)
                _, terms = step_to_gradients(model, tables, config, batch, unique, counts_there)
                norm = dense.step()
                dense.zero_grad()
                meter.add(terms.named(SPEC.scenarios), terms.by_row(SPEC.scenarios), norm, num_rows=22.0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert meter.read()["loss"] > 0
