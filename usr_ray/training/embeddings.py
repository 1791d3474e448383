"""The embedding tables of a run with their optimiser: one interface, two strategies (docs/embeddings.md).

`replicated`: every rank holds all tables and takes the same steps; ranks exchange the gradients of a step's rows.
`sharded`: every rank holds its share of each table's rows (usr_ray/training/embeddings_sharded.py, on TorchRec).

Both take the same steps to float tolerance and write the same checkpoints: whole tables and whole optimiser states by
name, so a run may resume with the other strategy or with another number of workers.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from usr_ray.config import Config, ModelConfig
from usr_ray.data.by_id import read_cold, read_item_features, read_vectors
from usr_ray.data.manifest import Manifest
from usr_ray.model.embedding import WEIGHTS, EmbeddingMemory, EmbeddingTables, Lookup, RowSource
from usr_ray.model.unique import ItemSides, event_sides
from usr_ray.schema import FeatureSpec, cold_column
from usr_ray.training.average import RowAverages, averaged_rows
from usr_ray.training.optimizers import build_row_optimizer, exchange_tables
from usr_ray.training.worker import Worker


class Embeddings(RowSource):
    """The tables and their optimiser as one rank sees them. All ranks must call the methods marked (all) together."""

    @abc.abstractmethod
    def at_step(self, step: int, scale: float) -> None:
        """`step` steps are done; those whose lookup comes from now on are at `scale` times the learning rate."""

    @abc.abstractmethod
    def apply_gradients(self, lookup: Lookup) -> None:
        """(all) After the backward: one step on the rows of all ranks."""

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block lookups give the averages of the rows (train.average), where there are any."""
        yield

    @abc.abstractmethod
    def memory(self) -> EmbeddingMemory:
        """Bytes that this rank holds."""

    @abc.abstractmethod
    def replicated_tensors(self) -> dict[str, Tensor]:
        """What must be bitwise equal on all ranks, by name."""

    @abc.abstractmethod
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything that a checkpoint holds; the first dimension is the rows of the table."""

    @abc.abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """(all) The whole of it by name, for a checkpoint; on ranks other than 0 it may be empty."""

    @abc.abstractmethod
    def load_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Overwrite rows first, first + 1, .. of one of `state_shapes`, as far as this rank holds them."""


class ReplicatedEmbeddings(EmbeddingTables, Embeddings):
    """All tables on every rank, each with the same row-wise optimiser, kept equal by exchanging (ids, gradients)."""

    def __init__(
        self,
        spec: FeatureSpec,
        config: Config,
        worker: Worker,
        sides: ItemSides | None = None,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(spec, config.model.embedding_dim, config.train.seed, worker.device, sides, vectors)
        self.worker = worker
        self.optimizer = build_row_optimizer(self.tables, config.train)
        self.averages = RowAverages(self.tables, config.train.average) if config.train.average else None
        self._step, self._scale = 0, 1.0

    @override
    def at_step(self, step: int, scale: float) -> None:
        self._step, self._scale = step, scale

    @override
    def apply_gradients(self, lookup: Lookup) -> None:
        updates = exchange_tables(self.worker, lookup.updates())
        if self.averages is not None:
            self.averages.catch_up(updates, self._step)
        self.optimizer.step(updates, scale=self._scale)
        if self.averages is not None:
            self.averages.take_in(updates, self._step + 1)

    @override
    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        if self.averages is None:
            yield
            return
        trained, rows = self.tables, self.averages
        try:
            self.tables = {
                name: averaged_rows(table, rows.averages[name], rows.steps[name], rows.decay, self._step)
                for name, table in trained.items()
            }
            yield
        finally:
            self.tables = trained

    @override
    def memory(self) -> EmbeddingMemory:
        weights = sum(t.nbytes for t in self.tables.values())
        return EmbeddingMemory(weights, sum(t.nbytes for t in self.state_tensors().values()) - weights)

    @override
    def replicated_tensors(self) -> dict[str, Tensor]:
        return self.state_tensors()

    @override
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state_tensors().items()}

    @override
    def state_tensors(self) -> dict[str, Tensor]:
        # Views, not copies, and on every rank.
        state = {f"{WEIGHTS}/{name}": table for name, table in self.tables.items()}
        state |= {f"{self.optimizer.part}/{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}
        return state | (self.averages.state_tensors() if self.averages is not None else {})

    @override
    def load_rows(self, name: str, first: int, rows: Tensor) -> None:
        self.state_tensors()[name][first : first + rows.shape[0]] = rows.to(self.device)


SIDES = "sides/item_id"
"""Name in a checkpoint of what the items of histories are: loading a model needs no lake for it."""


def load_sides(manifest: Manifest, config: ModelConfig) -> ItemSides | None:
    """What the items of histories are, of the version that belongs to the rows; None where the model asks for nothing.

    Raises:
        DataError: see read_item_features.
    """
    names = event_sides(manifest.spec, config)
    return ItemSides(names, torch.from_numpy(read_item_features(manifest))) if names else None


def load_vectors(manifest: Manifest) -> dict[str, Tensor]:
    """Vectors of users and items, of the versions that belong to the rows, and by schema.cold_column the ids that are
    there for them alone (data/by_id.py).

    Raises:
        DataError: see read_vectors and read_cold.
    """
    found = {name: torch.from_numpy(vectors_NP) for name, vectors_NP in read_vectors(manifest).items()}
    return found | {cold_column(key): torch.from_numpy(cold_N) for key, cold_N in read_cold(manifest).items()}


def describe_memory(embeddings: Embeddings, config: Config, worker: Worker) -> str:
    """One line for the start of a run: what the tables are and what a worker holds of them."""
    sizes, memory = embeddings.num_rows(), embeddings.memory()
    strategy = config.train.embedding_strategy if worker.world_size > 1 else "replicated"
    held = sum(vectors_NP.nbytes for vectors_NP in embeddings.vectors.values())
    vectors = f"; vectors {held / 1e6:,.1f} MB" if held else ""
    return (
        f"{len(sizes)} embedding tables, {sum(sizes.values()):,} rows of {config.model.embedding_dim}, {strategy}: "
        f"{memory.weight_bytes / 1e6:,.1f} MB of weights and {memory.optimizer_bytes / 1e6:,.1f} MB of optimiser state "
        f"on each of {worker.world_size} workers{vectors}"
    )
