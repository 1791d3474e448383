"""Embedding tables outside the module: one step looks up, trains and exchanges the rows it uses and no others.

The tables are plain tensors, so DDP never sees them and no dense gradient of a table ever exists. `lookup` copies the
rows of a batch into leaf tensors; after the backward their `.grad` is what the optimiser applies
(usr_ray/training/optimizers.py).

Shape letters: B rows of the batch, N rows of a table, U rows of a table used in this step, D embedding, V events of
all histories (scenario after scenario), S scenarios, F features, P numbers of a vector.
"""

from __future__ import annotations

import abc
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding
from typing_extensions import override

from usr_ray.data.batch import UsrBatch
from usr_ray.model.counter_random import hash_keys, to_uniform
from usr_ray.model.unique import EmbeddingError, ItemSides, TableIds, UniqueIds, table_columns, unique_ids
from usr_ray.schema import PADDING_ID, FeatureSpec, cold_column

INIT_STD = 0.05
"""Standard deviation of a fresh row: of the order of row-wise Adagrad's first step."""
_INIT_CHUNK_ROWS = 1 << 20


WEIGHTS = "tables"
"""First part of the names of the tables in a checkpoint; an optimiser's state has RowOptimizer.part."""


@dataclass(frozen=True, slots=True)
class EmbeddingMemory:
    """What one rank holds, whatever the batch."""

    weight_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True, slots=True)
class TableLookup:
    """The rows of one table that a step uses. Row 0 stands for padding whether the batch has any or not."""

    ids: TableIds
    rows_UD: Tensor
    """float32 copy of the rows of ids.ids_U, the first all zero."""
    leaf_RD: Tensor
    """What rows_UD are made of: each of ids.rows_R once. The same tensor where each id has a row of its own."""

    @classmethod
    def of_rows(cls, rows_RD: Tensor, ids: TableIds) -> TableLookup:
        """From the rows of ids.rows_R: a leaf, where gradients are enabled, whose `.grad` the backward fills."""
        if torch.is_grad_enabled():
            rows_RD.requires_grad_()
        # The lookup's backward adds up what several ids owe to a row, in a fixed order.
        rows_UD = rows_RD if ids.shared is None else embedding(ids.shared.place_U, rows_RD)
        return cls(ids, rows_UD, rows_RD)

    @property
    def row_B(self) -> Tensor:
        """int64: row of the table for the row's own value."""
        ids = self.ids
        return (ids.ids_U if ids.shared is None else ids.rows_R[ids.shared.place_U])[ids.column_B]

    def update(self) -> tuple[Tensor, Tensor]:
        """(ids, gradients) of the rows to train, padding left out; zeros where the loss did not reach the table."""
        grad_RD = torch.zeros_like(self.leaf_RD) if self.leaf_RD.grad is None else self.leaf_RD.grad
        return self.ids.rows_R[1:], grad_RD[1:]


@dataclass(frozen=True, slots=True)
class Lookup:
    """What `EmbeddingTables.lookup` hands to the model and to the optimiser."""

    tables: dict[str, TableLookup]
    """Table name -> its rows of this step, in the order of FeatureSpec.vocabularies."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Vector -> float32 (U, P + 1) of the users or items that ids_U of their table names, as data/by_id.py has them;
    not trained."""

    def updates(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Table name -> (ids_U, gradient (U, D)) of the rows to train, after the backward; padding is left out."""
        return {name: table.update() for name, table in self.tables.items()}


class RowSource(abc.ABC):
    """Tables as a model sees them. All ranks must call `lookup` together."""

    sides: ItemSides | None
    """What the items of histories are; None: nothing but their ids is looked up."""
    lists: Mapping[str, Sequence[tuple[int, int]]]
    """Tables of tags and terms (unique.table_columns)."""
    spec: FeatureSpec
    vectors: dict[str, Tensor]
    """Vector -> float16 (N, P + 1) on the tables' device, whole on every rank (data/by_id.py); never trained."""
    cold: dict[str, Tensor]
    """Table -> bool (N) on the CPU: ids that the vocabulary has for their vectors alone. They look up the row of the
    unknown id, which is trained, and not their own, which nothing has trained. Tables without such an id are left out.
    """

    def _hold(self, frozen: Mapping[str, Tensor], device: torch.device) -> None:
        """Set `vectors` and `cold` from what `frozen` gives."""
        names = {vector.name: vector.key for vector in self.spec.vectors}
        self.vectors = {name: held.to(device) for name, held in frozen.items() if name in names}
        flags = {key: frozen[cold_column(key)] for key in dict.fromkeys(names.values()) if cold_column(key) in frozen}
        self.cold = {key: cold_N.cpu() for key, cold_N in flags.items() if cold_N.any()}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """What a run holds beside its checkpoints: the vectors, and `cold` by schema.cold_column."""
        return self.vectors | {cold_column(key): cold_N for key, cold_N in self.cold.items()}

    @abc.abstractmethod
    def num_rows(self) -> dict[str, int]:
        """Table name -> N, rows of the whole table."""

    @abc.abstractmethod
    def lookup(self, batch: UsrBatch, unique: UniqueIds | None = None) -> Lookup:
        """The rows that `batch` uses of every table; leaves that want a gradient when gradients are enabled.

        Work and memory follow the number of ids in the batch, whatever the size of the tables.

        Args:
            batch: on the tables' device.
            unique: `unique_ids` of this batch, on the tables' device; None: found here, which on a GPU waits for it.

        Raises:
            EmbeddingError: see `unique_ids`.
        """

    def vectors_of(self, tables: Mapping[str, TableLookup]) -> dict[str, Tensor]:
        """Lookup.vectors for the rows of a step."""
        keys = {vector.name: vector.key for vector in self.spec.vectors}
        return {n: v_NP.index_select(0, tables[keys[n]].ids.ids_U).float() for n, v_NP in self.vectors.items()}

    def unique_ids(self, batch: UsrBatch) -> UniqueIds:
        """What a lookup must know of a batch: from any thread, on the batch's own device, ahead of the step.

        Raises:
            EmbeddingError: an id is outside its table: the samples table grew after this run's manifest.
        """
        return unique_ids(batch, self.num_rows(), self.sides, self.lists, self.cold)


class EmbeddingTables(RowSource):
    """One float32 table for each vocabulary; row 0 (padding) is zero and never trained.

    Every value of a fresh table is a pure function of (seed, table, row, column): ranks agree without a broadcast, and
    a table that grew equals one that was large from the start.

    Args:
        device: where the tables live; batches must be on the same device.
        sides: what the items of histories are; None: nothing but their ids is wanted.
        vectors: as `frozen` gives them (training.embeddings.load_vectors).
    """

    def __init__(
        self,
        spec: FeatureSpec,
        dim: int,
        seed: int,
        device: torch.device | str = "cpu",
        sides: ItemSides | None = None,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.sides, self.lists, self.spec = sides, table_columns(spec), spec
        self.dim = dim
        self.seed = seed
        self.device = torch.device(device)
        self._hold(vectors or {}, self.device)
        self.tables: dict[str, Tensor] = {
            name: fresh_rows(name, 0, f.num_embeddings, dim=dim, seed=seed).to(self.device)
            for name, f in spec.vocabularies.items()
        }
        """Table name -> (N, D); the optimiser writes its rows in place."""

    @override
    def lookup(self, batch: UsrBatch, unique: UniqueIds | None = None) -> Lookup:
        found = self.unique_ids(batch) if unique is None else unique
        tables = {
            name: TableLookup.of_rows(self.tables[name].index_select(0, ids.rows_R), ids)
            for name, ids in zip(self.tables, found, strict=True)
        }
        return Lookup(tables, self.vectors_of(tables))

    @override
    def num_rows(self) -> dict[str, int]:
        return {name: table.shape[0] for name, table in self.tables.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite every table with a checkpoint's.

        Raises:
            EmbeddingError: see `check_shapes`.
        """
        found = {name: tuple(table_ND.shape) for name, table_ND in state.items()}
        check_shapes({name: tuple(table_ND.shape) for name, table_ND in self.tables.items()}, found)
        for name, table_ND in self.tables.items():
            table_ND.copy_(state[name])


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose tables or optimiser states are not those of this run.

    Raises:
        EmbeddingError: a name is missing, or has another shape.
    """
    for name, shape in expected.items():
        if name not in found:
            raise EmbeddingError(
                f"checkpoint: {name} is missing; use a checkpoint of a run with the same features "
                "and train.embedding_optimizer"
            )
        if found[name] != shape:
            raise EmbeddingError(
                f"checkpoint: {name} is {found[name]}, this run needs {shape}; use a checkpoint of "
                "the same features and model.embedding_dim"
            )


def fresh_rows(name: str, first: int, end: int, step: int = 1, *, dim: int, seed: int) -> Tensor:
    """Rows first, first + step, .. below `end` of a table as they start, float32 on the CPU.

    Uniform with mean 0 and standard deviation INIT_STD, the padding row zero: a pure function of the arguments, row by
    row.
    """
    numbers = range(first, end, step)
    rows_ND = torch.empty((len(numbers), dim), dtype=torch.float32)
    table_seed = hash_keys(torch.tensor(seed), zlib.crc32(name.encode()))
    columns_D = torch.arange(dim)
    for start in range(0, len(numbers), _INIT_CHUNK_ROWS):
        chunk = numbers[start : start + _INIT_CHUNK_ROWS]
        row_hash_N1 = hash_keys(table_seed, torch.arange(chunk.start, chunk.stop, step)).unsqueeze(1)
        uniform_ND = to_uniform(hash_keys(row_hash_N1, columns_D))
        rows_ND[start : start + len(chunk)] = (uniform_ND * 2 - 1) * (INIT_STD * 3**0.5)
    if PADDING_ID in numbers:
        rows_ND[numbers.index(PADDING_ID)] = 0
    return rows_ND
