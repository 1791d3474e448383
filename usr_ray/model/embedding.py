"""Embedding tables outside the module: one step looks up, trains and exchanges the rows it uses and no others.

The tables are plain tensors, so DDP never sees them and no dense gradient of a table ever exists. `lookup` copies the
rows of a batch into leaf tensors; after the backward their `.grad` is what the optimiser applies (usr_ray/optim.py).

Shape letters: B rows of the batch, N rows of a table, U rows of a table used in this step, D embedding, V events of
all histories (scenario after scenario), S scenarios, F features.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from usr_ray.batch import UsrBatch
from usr_ray.config import UserError
from usr_ray.model.counter_random import hash_keys, to_uniform
from usr_ray.model.gather import Places, group_places
from usr_ray.schema import PADDING_ID, FeatureSpec

ITEM_TABLE = "item_id"
"""Table of the target item and of every history's items."""
QUERY_TABLE = "query"
"""Table of the row's own query and of every history's queries."""
INIT_STD = 0.05
"""Standard deviation of a fresh row: of the order of row-wise Adagrad's first step."""
_INIT_CHUNK_ROWS = 1 << 20


class EmbeddingError(UserError):
    """Tables and ids, or tables and a checkpoint, that do not fit together."""


@dataclass(frozen=True, slots=True)
class TableLookup:
    """The rows of one table that a step uses. Row 0 stands for padding whether the batch has any or not."""

    ids_U: Tensor
    """int64, ascending, each once; the first is the padding id 0."""
    rows_UD: Tensor
    """float32 copy of the rows, the first all zero; a leaf whose `.grad` (U, D) is filled by the backward."""
    column_B: Tensor
    """int64: place in ids_U of the row's own value."""
    events: Places | None
    """Places in ids_U of the histories' values; None for tables that no history uses."""

    def update(self) -> tuple[Tensor, Tensor]:
        """(ids, gradients) of the rows to train, padding left out; zeros where the loss did not reach the table."""
        grad_UD = self.rows_UD.grad
        return self.ids_U[1:], (torch.zeros_like(self.rows_UD) if grad_UD is None else grad_UD)[1:]


@dataclass(frozen=True, slots=True)
class Lookup:
    """What `EmbeddingTables.lookup` hands to the model and to the optimiser."""

    tables: dict[str, TableLookup]
    """Table name -> its rows of this step, in the order of FeatureSpec.sparse."""

    def updates(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Table name -> (ids_U, gradient (U, D)) of the rows to train, after the backward; padding is left out."""
        return {name: table.update() for name, table in self.tables.items()}


class EmbeddingTables:
    """One float32 table for each categorical feature; row 0 (padding) is zero and never trained.

    Every value of a fresh table is a pure function of (seed, table, row, column): ranks agree without a broadcast, and
    a table that grew equals one that was large from the start.

    Args:
        spec: names and sizes of the tables (FeatureSpec.sparse).
        dim: D.
        seed: of the fresh rows.
        device: where the tables live; batches must be on the same device.
    """

    def __init__(self, spec: FeatureSpec, dim: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.seed = seed
        self.device = torch.device(device)
        self.tables: dict[str, Tensor] = {f.name: self._fresh_rows(f.name, 0, f.num_embeddings) for f in spec.sparse}
        """Table name -> (N, D); the optimiser writes its rows in place."""

    def lookup(self, batch: UsrBatch) -> Lookup:
        """The rows that `batch` uses of every table; leaves that want a gradient when gradients are enabled.

        Work and memory follow the number of ids in the batch, whatever the size of the tables.

        Raises:
            EmbeddingError: an id is outside its table: the samples table grew after this run's manifest.
        """
        columns = dict(zip(self.tables, batch.sparse_BF.unbind(1), strict=True))
        histories = {
            ITEM_TABLE: torch.cat([h.item_ids_V for h in batch.histories]),
            QUERY_TABLE: torch.cat(
                [torch.zeros_like(h.item_ids_V) if h.query_ids_V is None else h.query_ids_V for h in batch.histories]
            ),
        }
        return Lookup({name: self._lookup(name, columns[name], histories.get(name)) for name in self.tables})

    def _lookup(self, name: str, column_B: Tensor, history_V: Tensor | None) -> TableLookup:
        table_ND = self.tables[name]
        # The padding id comes first, so that index 0 is padding whether the batch has any or not.
        parts = [column_B.new_full((1,), PADDING_ID), column_B, *([] if history_V is None else [history_V])]
        ids = torch.cat(parts)
        if table_ND.shape[0] < 2**31:
            ids = ids.int()  # half the bytes is half the time of the sort inside unique
        unique, index = torch.unique(ids, return_inverse=True)
        # A CUDA gather traps ids outside the table by itself; reading them here would make the queue wait.
        if not unique.is_cuda and (int(unique[0]) < 0 or int(unique[-1]) >= table_ND.shape[0]):
            wrong = int(unique[0]) if int(unique[0]) < 0 else int(unique[-1])
            raise EmbeddingError(
                f"table {name}: the batch has id {wrong}, the table has {table_ND.shape[0]} rows; the samples table "
                "does not belong to this run's feature spec: build the manifest again, or grow the tables"
            )
        ids_U = unique.long()
        rows_UD = table_ND.index_select(0, ids_U)
        if torch.is_grad_enabled():
            rows_UD.requires_grad_()
        num_own = 1 + column_B.shape[0]
        events = None if history_V is None else group_places(index[num_own:], unique.shape[0])
        return TableLookup(ids_U, rows_UD, index[1:num_own], events)

    def num_rows(self) -> dict[str, int]:
        """Table name -> N."""
        return {name: table.shape[0] for name, table in self.tables.items()}

    def num_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(t.numel() * t.element_size() for t in self.tables.values())

    def to(self, device: torch.device | str) -> EmbeddingTables:
        """Move the tables to `device`, in place; returns self."""
        self.device = torch.device(device)
        self.tables = {name: table.to(self.device) for name, table in self.tables.items()}
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Table name -> the table itself (no copy)."""
        return dict(self.tables)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite every table with a checkpoint's.

        Raises:
            EmbeddingError: a table is missing, unknown, or of another shape. For a vocabulary that grew, load into
                tables of the old sizes and call `grow`.
        """
        missing, unknown = sorted(set(self.tables) - set(state)), sorted(set(state) - set(self.tables))
        if missing or unknown:
            raise EmbeddingError(
                f"checkpoint: tables missing {_names(missing)}, unknown {_names(unknown)}; use a checkpoint of a run "
                "with the same features"
            )
        for name, table_ND in self.tables.items():
            if state[name].shape != table_ND.shape:
                raise EmbeddingError(
                    f"checkpoint: table {name} is {tuple(state[name].shape)}, this run needs {tuple(table_ND.shape)}; "
                    "use a checkpoint of the same features and model.embedding_dim, or grow the tables after loading"
                )
        for name, table_ND in self.tables.items():
            table_ND.copy_(state[name])

    def grow(self, sizes: Mapping[str, int]) -> None:
        """Append fresh rows until table `name` has `sizes[name]` rows; rows that exist keep their values.

        Raises:
            EmbeddingError: a table is unknown or would shrink: vocabularies grow and never renumber.
        """
        for name, size in sizes.items():
            if name not in self.tables:
                raise EmbeddingError(f"cannot grow {name!r}: tables are {_names(self.tables)}; name one of them")
            old = self.tables[name].shape[0]
            if size < old:
                raise EmbeddingError(
                    f"table {name} has {old} rows and cannot shrink to {size}; vocabularies only grow: use the spec "
                    "of the newer samples table"
                )
        for name, size in sizes.items():
            table_ND = self.tables[name]
            self.tables[name] = torch.cat([table_ND, self._fresh_rows(name, table_ND.shape[0], size)])

    def _fresh_rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows first..end - 1 as they start: uniform with mean 0 and INIT_STD; the padding row zero."""
        rows_ND = torch.empty((end - first, self.dim), dtype=torch.float32)
        table_seed = hash_keys(torch.tensor(self.seed), zlib.crc32(name.encode()))
        columns_D = torch.arange(self.dim)
        for start in range(first, end, _INIT_CHUNK_ROWS):
            stop = min(start + _INIT_CHUNK_ROWS, end)
            row_hash_N1 = hash_keys(table_seed, torch.arange(start, stop)).unsqueeze(1)
            uniform_ND = to_uniform(hash_keys(row_hash_N1, columns_D))
            rows_ND[start - first : stop - first] = (uniform_ND * 2 - 1) * (INIT_STD * 3**0.5)
        if first <= PADDING_ID < end:
            rows_ND[PADDING_ID - first] = 0
        return rows_ND.to(self.device)


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
