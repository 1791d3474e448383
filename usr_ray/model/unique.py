"""Which rows of the embedding tables a batch uses: the part of a lookup that sorts.

Sorts give results whose sizes a GPU would have to tell the host, so they are kept apart from the tables: `unique_ids`
is a pure function of the batch, which a reader's thread can run on the host ahead of the step. A lookup that is given
its result neither sorts nor waits (EmbeddingTables.lookup).

Shape letters: B rows of the batch, N rows of a table, U rows of a table used in this step, V events of all histories
(scenario after scenario), F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from usr_ray.batch import UsrBatch
from usr_ray.config import UserError
from usr_ray.model.gather import ColumnOrder, Places, group_places, order_columns
from usr_ray.schema import PADDING_ID

ITEM_TABLE = "item_id"
"""Table of the target item and of every history's items."""
QUERY_TABLE = "query"
"""Table of the row's own query and of every history's queries."""


class EmbeddingError(UserError):
    """Tables and ids, or tables and a checkpoint, that do not fit together."""


@dataclass(frozen=True, slots=True)
class TableIds:
    """Which rows of one table a batch uses, and where."""

    ids_U: Tensor
    """int64, ascending, each once; the first is the padding id 0, whether the batch has any or not."""
    column_B: Tensor
    """int64: place in ids_U of the row's own value."""
    events: Places | None
    """Places in ids_U of the histories' values; None for tables that no history uses."""


@dataclass(frozen=True, slots=True)
class UniqueIds:
    """What `unique_ids` finds in a batch: all that a lookup needs besides the tables."""

    tables: tuple[TableIds, ...]
    """In the order of FeatureSpec.sparse."""
    columns: ColumnOrder
    """Of the rows' own values, column_B of each table."""


def unique_ids(batch: UsrBatch, num_rows: Mapping[str, int]) -> UniqueIds:
    """Which rows of which table a batch uses, and where: the part of a lookup that sorts.

    Args:
        batch: on any device; on the CPU, ids outside their table are refused.
        num_rows: table name -> N, in the order of FeatureSpec.sparse.

    Raises:
        EmbeddingError: an id is outside its table: the samples table grew after this run's manifest.
    """
    columns = dict(zip(num_rows, batch.sparse_BF.unbind(1), strict=True))
    histories = {
        ITEM_TABLE: torch.cat([h.item_ids_V for h in batch.histories]),
        QUERY_TABLE: torch.cat(
            [torch.zeros_like(h.item_ids_V) if h.query_ids_V is None else h.query_ids_V for h in batch.histories]
        ),
    }
    tables = tuple(_table_ids(n, size, columns[n], histories.get(n)) for n, size in num_rows.items())
    return UniqueIds(tables, order_columns([t.column_B for t in tables], [t.ids_U.shape[0] for t in tables]))


def _table_ids(name: str, num_rows: int, column_B: Tensor, history_V: Tensor | None) -> TableIds:
    # The padding id comes first, so that index 0 is padding whether the batch has any or not.
    parts = [column_B.new_full((1,), PADDING_ID), column_B, *([] if history_V is None else [history_V])]
    # Half the bytes is half the time of the sort inside unique.
    ids = torch.cat([p.int() for p in parts] if num_rows <= 2**31 else parts)
    unique, index = torch.unique(ids, return_inverse=True)
    # A CUDA gather traps ids outside the table by itself; reading them here would make the queue wait.
    if not unique.is_cuda and (int(unique[0]) < 0 or int(unique[-1]) >= num_rows):
        wrong = int(unique[0]) if int(unique[0]) < 0 else int(unique[-1])
        raise EmbeddingError(
            f"table {name}: the batch has id {wrong}, the table has {num_rows} rows; the samples table "
            "does not belong to this run's feature spec: build the manifest again, or grow the tables"
        )
    num_own = 1 + column_B.shape[0]
    events = None if history_V is None else group_places(index[num_own:], unique.shape[0])
    return TableIds(unique.long(), index[1:num_own], events)
