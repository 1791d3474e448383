"""The two strategies of the tables: the same steps as dense tables, the same files, on one rank and on two."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.random_batches import VECTORS, make_batch, make_config, make_spec, make_vectors, rows
from tests.unit.samples_table import read_manifests, samples_spec, write_samples
from tests.unit.training.test_loop import NUM_STEPS, Watcher, assert_equal_states, run
from tests.unit.training.test_loop import make_config as make_run_config
from tests.unit.two_ranks import run_ranks
from usr_ray.config import Config, ConfigError
from usr_ray.data.batch import UsrBatch
from usr_ray.model.unique import EmbeddingError, unique_ids
from usr_ray.model.usr import UsrModel
from usr_ray.training.checkpoint import CheckpointError
from usr_ray.training.embeddings import (
    Embeddings,
    ReplicatedEmbeddings,
    describe_memory,
)
from usr_ray.training.loss import row_counts, usr_loss
from usr_ray.training.state import build_embeddings
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration

needs_torchrec = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torchrec", "fbgemm_gpu")),
    reason="TorchRec is not installed; `make setup` does it (setup.cfg, extra [sharded])",
)

STEPS, ROWS, RATE = 5, 16, 0.03
SPEC = make_spec(num_embeddings=41, vectors=VECTORS)  # an odd number: the two shards differ in size
FROZEN = make_vectors(SPEC, 0)
"""Vectors, and users and items that have their ids for them alone: the unknown id's row is theirs."""
SCALES = [0.25, 0.5, 0.75, 1.0, 1.0]
"""Share of the learning rate in each step, as a warm-up gives it."""


def strategy_config(**train: Any) -> Config:
    train = {"embedding_weight_decay": 0.01, "embedding_learning_rate": RATE} | train
    return Config.from_dict({"model": {"embedding_dim": 4}, "train": train})


def global_batch(step: int) -> UsrBatch:
    """Histories of items and queries among the rows; in step 2 rank 1 has padding alone, and asks for no row."""
    return make_batch(SPEC, ROWS, seed=step, num_padding=ROWS // 2 if step == 2 else 2)


def share(batch: UsrBatch, worker: LocalWorker) -> UsrBatch:
    size = len(batch) // worker.world_size
    return rows(batch, slice(worker.rank * size, (worker.rank + 1) * size))


def plain_model() -> UsrModel:
    torch.manual_seed(0)
    return UsrModel(SPEC, make_config())


# Adam moves a row by its rate however small its gradient; with a larger loss rounding stays within the bounds below.
LOSS = make_config(multitask={"alpha": 0.5})


def train_tables(worker: LocalWorker, folder: Path, *, strategy: str, optimizer: str) -> dict[str, torch.Tensor]:
    """Five steps of the tables under a USR that itself stays as it is; the state of a checkpoint, on rank 0."""
    embeddings = build_embeddings(
        SPEC, strategy_config(embedding_strategy=strategy, embedding_optimizer=optimizer), worker, vectors=FROZEN
    )
    model = plain_model()
    for step in range(STEPS):
        batch = share(global_batch(step), worker)
        counts = worker.all_reduce_sum(row_counts(batch, 2, LOSS))
        embeddings.at_step(step, SCALES[step])
        lookup = embeddings.lookup(batch, embeddings.unique_ids(batch) if step % 2 else None)
        usr_loss(model(batch, lookup, step), batch, counts, LOSS).total.backward()
        embeddings.apply_gradients(lookup)
    with torch.inference_mode():  # as an evaluation looks up, between steps
        lookup = embeddings.lookup(share(global_batch(0), worker))
    assert not any(table.rows_UD.requires_grad for table in lookup.tables.values())
    return embeddings.state_tensors()


@functools.cache
def dense_reference(optimizer: str) -> dict[str, torch.Tensor]:
    """The same steps with autograd's gradients of whole tables and masked updates of all their rows, one rank."""
    worker = LocalWorker("cpu")
    config = strategy_config(embedding_optimizer=optimizer)
    start = ReplicatedEmbeddings(SPEC, config, worker, vectors=FROZEN)
    rows_of = {name: torch.arange(len(table)) for name, table in start.tables.items()}
    rows_of |= {name: torch.where(cold_N, 1, rows_of[name]) for name, cold_N in start.cold.items()}
    assert len(start.cold) == 2
    tables = {name: table.clone() for name, table in start.tables.items()}
    first = {n: torch.zeros_like(t) for n, t in tables.items()}
    second, count = ({n: torch.zeros(len(t)) for n, t in tables.items()} for _ in range(2))
    model = plain_model()
    for step in range(STEPS):
        batch = global_batch(step)
        dense = {name: table.clone().requires_grad_() for name, table in tables.items()}
        lookup = start.lookup(batch)
        by_autograd = {
            n: dataclasses.replace(t, rows_UD=dense[n][rows_of[n][t.ids.ids_U]]) for n, t in lookup.tables.items()
        }
        outputs = model(batch, dataclasses.replace(lookup, tables=by_autograd), step)
        usr_loss(outputs, batch, row_counts(batch, 2, LOSS), LOSS).total.backward()
        rate = RATE * SCALES[step]
        for name, leaf in dense.items():
            used = torch.zeros(len(leaf), dtype=torch.bool)
            used[rows_of[name][lookup.tables[name].ids.ids_U[1:]]] = True
            assert leaf.grad is not None
            g = leaf.grad + 0.01 * tables[name]
            if optimizer == "rowwise_adagrad":
                second[name] += torch.where(used, g.square().mean(1), 0)
                moved = tables[name] - rate * g / (second[name].sqrt() + 1e-8)[:, None]
            else:
                count[name] += used
                first[name] = torch.where(used[:, None], 0.9 * first[name] + 0.1 * g, first[name])
                second[name] = torch.where(used, 0.999 * second[name] + 0.001 * g.square().mean(1), second[name])
                mean = first[name] / (1 - 0.9 ** count[name])[:, None]
                moved = (
                    tables[name] - rate * mean / ((second[name] / (1 - 0.999 ** count[name])).sqrt() + 1e-8)[:, None]
                )
            tables[name] = torch.where(used[:, None], moved, tables[name])
    weights = {f"tables/{n}": t for n, t in tables.items()}
    if optimizer == "rowwise_adagrad":
        return weights | {f"adagrad/{n}": t for n, t in second.items()}
    state = {"first": first, "second": second, "count": count}
    return weights | {f"adam/{n}/{part}": t[n] for part, t in state.items() for n in tables}


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].float(), tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "rowwise_adam"])
def test_replicated_tables_on_one_and_two_ranks_equal_dense_ones(tmp_path: Path, optimizer: str) -> None:
    function = functools.partial(train_tables, strategy="replicated", optimizer=optimizer)
    alone = function(LocalWorker("cpu"), tmp_path)
    first, second = run_ranks(function, 2, tmp_path)
    for got in (alone, first, second):
        assert_close(got, dense_reference(optimizer))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_torchrec
def test_sharded_tables_on_two_ranks_equal_dense_ones(tmp_path: Path) -> None:
    function = functools.partial(train_tables, strategy="sharded", optimizer="rowwise_adagrad")
    first, second = run_ranks(function, 2, tmp_path)
    assert_close(first, dense_reference("rowwise_adagrad"))
    assert second == {}, "whole tables are gathered in one place only"


def shard_state(worker: LocalWorker, folder: Path) -> dict[str, torch.Tensor]:
    """What a rank holds, and what comes back after every row of every tensor was written in pieces of 7."""
    embeddings = build_embeddings(SPEC, strategy_config(embedding_strategy="sharded"), worker)
    memory = embeddings.memory()
    fresh = embeddings.state_tensors()
    for name, shape in embeddings.state_shapes().items():
        numbers = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
        for first in range(0, shape[0], 7):
            embeddings.load_rows(name, first, numbers[first : first + 7])
    written = embeddings.state_tensors()
    return (
        {f"fresh/{n}": t for n, t in fresh.items()}
        | {f"written/{n}": t for n, t in written.items()}
        | {"memory": torch.tensor([memory.weight_bytes, memory.optimizer_bytes])}
        | {"held": embeddings._shards["tables/item_id"].rows}
        | {"replicated": torch.tensor(len(embeddings.replicated_tensors()))}
    )


@needs_torchrec
def test_shards_start_like_whole_tables_and_take_any_piece(tmp_path: Path) -> None:
    whole = ReplicatedEmbeddings(SPEC, strategy_config(), LocalWorker("cpu"))
    first, second = run_ranks(shard_state, 2, tmp_path)
    for name, tensor in whole.state_tensors().items():
        assert torch.equal(first[f"fresh/{name}"], tensor)
        numbers = torch.arange(tensor.numel(), dtype=torch.float32).reshape(tensor.shape)
        assert torch.equal(first[f"written/{name}"], numbers)
    # 41 rows a table are 21 places on each of two ranks; six tables of 4 floats a row, and one accumulator.
    assert first["memory"].tolist() == second["memory"].tolist() == [6 * 21 * 16, 6 * 21 * 4]
    # Rows take turns, so that the frequent ones, which come first, are shared: row i begins with the number 4 i.
    assert first["held"][:3, 0].tolist() == [0, 8, 16]
    assert second["held"][:3, 0].tolist() == [4, 12, 20]
    assert (whole.memory().weight_bytes, whole.memory().optimizer_bytes) == (6 * 41 * 16, 6 * 41 * 4)
    assert first["replicated"] == 0


def sharded_run(worker: LocalWorker, folder: Path, *, stop_at: int) -> dict[str, torch.Tensor]:
    """A run of the whole loop, evaluation included, stopped or to the end."""
    config = make_run_config(train_embedding_strategy="sharded", train_log_every_steps=1, train_warmup_steps=6)
    worker.__init__("cpu")  # type: ignore[misc]  # the stop flag of an earlier run
    watcher = Watcher(worker if worker.rank == 0 else None, stop_at=stop_at)
    train_manifest, eval_manifest = read_manifests(folder / "lake")
    result = run(config, (train_manifest, eval_manifest), folder / "run", watcher, worker)
    has_metrics = result.evaluation is not None and result.evaluation.metrics is not None
    return {"step": torch.tensor(result.step), "evaluated": torch.tensor(has_metrics)} | result.state.tensors()


@needs_torchrec
def test_a_run_goes_on_with_the_other_strategy_and_another_number_of_workers(tmp_path: Path) -> None:
    """Two workers sharded, then one replicated, then two sharded, against one that never stopped."""
    write_samples(tmp_path / "lake", samples_spec(), num_rows=950, num_days=4)
    manifests = read_manifests(tmp_path / "lake")
    first, second = run_ranks(functools.partial(sharded_run, stop_at=2), 2, tmp_path)
    assert (int(first["step"]), int(second["step"])) == (3, 3)
    worker = LocalWorker("cpu")
    config = make_run_config(train_log_every_steps=1, train_warmup_steps=6)
    middle = run(config, (manifests[0], None), tmp_path / "run", Watcher(worker, stop_at=4), worker)
    assert (middle.status, middle.step) == ("stopped", 5)
    last, _ = run_ranks(functools.partial(sharded_run, stop_at=-1), 2, tmp_path)
    assert int(last["step"]) == NUM_STEPS
    assert bool(last["evaluated"])
    unbroken = run(config, (manifests[0], None), tmp_path / "unbroken").state.tensors()
    assert last.keys() - {"step", "evaluated"} == unbroken.keys()
    for name, tensor in unbroken.items():
        if name.startswith(("model/", "tables/")):
            torch.testing.assert_close(last[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # The last files, sharded when written, are a finished run to one worker.
    assert run(config, (manifests[0], None), tmp_path / "run").step == NUM_STEPS


def test_adam_resumes_bit_for_bit_and_only_as_adam(tmp_path: Path) -> None:
    write_samples(tmp_path / "lake", samples_spec(), num_rows=950, num_days=4)
    manifests = (read_manifests(tmp_path / "lake")[0], None)
    config = make_run_config(train_embedding_optimizer="rowwise_adam", train_log_every_steps=1)
    unbroken = run(config, manifests, tmp_path / "unbroken")
    worker = LocalWorker("cpu")
    assert run(config, manifests, tmp_path / "run", Watcher(worker, stop_at=3), worker).step == 4
    with pytest.raises(CheckpointError, match=r"embedding_optimizer = 'rowwise_adam', this run 'rowwise_adagrad'; set"):
        run(make_run_config(), manifests, tmp_path / "run")
    assert_equal_states(unbroken, run(config, manifests, tmp_path / "run"))


def test_one_worker_holds_everything_under_either_name() -> None:
    embeddings = build_embeddings(SPEC, strategy_config(embedding_strategy="sharded"), LocalWorker("cpu"))
    assert isinstance(embeddings, ReplicatedEmbeddings)


def test_a_run_says_what_its_tables_take() -> None:
    config = strategy_config(embedding_optimizer="rowwise_adam")
    worker = LocalWorker("cpu")
    # 16 bytes of weights a row; Adam's state is another 16 and 8.
    spec = make_spec(num_embeddings=41_000)
    line = describe_memory(build_embeddings(spec, config, worker), config, worker)
    assert line == (
        "6 embedding tables, 246,000 rows of 4, replicated: 3.9 MB of weights and 5.9 MB of optimiser state on each of "
        "1 workers"
    )


class TwoRanks(LocalWorker):
    """Rank 0 of two that are never asked for anything."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.world_size = 2


def test_sharded_without_its_packages_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("fbgemm_gpu"):
            raise ModuleNotFoundError("No module named 'fbgemm_gpu'")
        return load(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "usr_ray.training.embeddings_sharded", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EmbeddingError) as error:
        build_embeddings(SPEC, strategy_config(embedding_strategy="sharded"), TwoRanks("cpu"))
    assert str(error.value) == (
        "train.embedding_strategy 'sharded' needs TorchRec and FBGEMM, which cannot be loaded (No module named "
        "'fbgemm_gpu'); install the extra [sharded] (docs/embeddings.md) or set 'replicated'"
    )


def test_sharded_adam_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'rowwise_adam' needs train.embedding_strategy 'replicated': FBGEMM .* set"):
        strategy_config(embedding_strategy="sharded", embedding_optimizer="rowwise_adam")


def test_both_strategies_are_of_the_one_interface() -> None:
    """A strategy that lacks a method would fail in a run of hours, at its first checkpoint."""
    methods = {name for name in vars(Embeddings) if not name.startswith("_")} | {"num_rows", "unique_ids", "lookup"}
    assert {"apply_gradients", "load_rows", "state_tensors", "memory", "at_step"} <= methods
    assert all(callable(getattr(ReplicatedEmbeddings, name)) for name in methods)
    batch = global_batch(0)
    embeddings = ReplicatedEmbeddings(SPEC, strategy_config(), LocalWorker("cpu"))
    assert len(unique_ids(batch, embeddings.num_rows())) == len(SPEC.sparse)
