"""Which rows of the embedding tables a batch uses: the part of a lookup that sorts.

Sorts have results whose sizes the host would have to wait for, so they are separate from the tables: `unique_ids`
is a pure function of the batch, which a reader's thread can run on the host ahead of the step. A lookup that is given
its result neither sorts nor waits (EmbeddingTables.lookup).

Shape letters: B rows of the batch, N rows of a table, U rows of a table used in this step, V events of all histories
(scenario after scenario), F features (their values V = F * B where they are sorted).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from usr_ray.config import ModelConfig, UserError
from usr_ray.data.batch import UsrBatch
from usr_ray.model.ops import Places, group_places, key_type, stable_order
from usr_ray.schema import PADDING_ID, UNKNOWN_ID, FeatureSpec

ITEM_TABLE = "item_id"
"""Table of the target item and of every history's items."""
QUERY_TABLE = "query"
"""Table of the row's own query and of every history's queries."""


class EmbeddingError(UserError):
    """Tables and ids, or tables and a checkpoint, that do not fit together."""


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows of a table that the ids of a step stand for, where several may stand for that of the unknown id."""

    rows_R: Tensor
    """int64, ascending, unique; the first is the padding id 0."""
    place_U: Tensor
    """int64: place in rows_R of each of TableIds.ids_U."""


@dataclass(frozen=True, slots=True)
class TableIds:
    """Which rows of one table a batch uses, and where."""

    ids_U: Tensor
    """int64, ascending, unique; the first is the padding id 0, whether the batch has any or not."""
    column_B: Tensor
    """int64: place in ids_U of the row's own value; (B, L) of tags and terms."""
    events: Places | None
    """Places in ids_U of the histories' values; None for tables that no history uses."""
    of_items: Places | None = None
    """Places in ids_U of the value of each item of ITEM_TABLE's ids_U; None for tables that are no side of an event."""
    shared: SharedRows | None = None
    """None where each id names a row of its own."""
    widths: tuple[int, ...] = ()
    """Columns of each list among the L of tags and terms, in the order of FeatureSpec.lists."""

    @property
    def rows_R(self) -> Tensor:
        """int64: the rows of the table that the ids stand for."""
        return self.ids_U if self.shared is None else self.shared.rows_R


@dataclass(frozen=True, slots=True)
class ItemSides:
    """What the items of histories are, by encoded id."""

    names: tuple[str, ...]
    """Tables, C of them."""
    ids_NC: Tensor
    """Encoded ids of any integer type, on the CPU; row i is item i, N the rows of ITEM_TABLE."""


def event_sides(spec: FeatureSpec, config: ModelConfig) -> tuple[str, ...]:
    """Tables of the features that events of histories and the target carry beside the item's id."""
    return spec.history_item_features if config.event_sides else ()


def event_vectors(spec: FeatureSpec, config: ModelConfig) -> tuple[str, ...]:
    """Vectors that events of histories and the target carry: those of their items."""
    return tuple(vector.name for vector in spec.vectors if vector.owner == "item") if config.event_sides else ()


UniqueIds = tuple[TableIds, ...]
"""All that a lookup needs besides the tables, in the order of FeatureSpec.vocabularies."""


def table_columns(spec: FeatureSpec) -> dict[str, list[tuple[int, int]]]:
    """Table of tags or terms -> first column and end of each of its lists in UsrBatch.lists_BW."""
    found: dict[str, list[tuple[int, int]]] = {}
    for feature in spec.lists:
        found.setdefault(feature.vocabulary, []).append(spec.list_places[feature.name])
    return found


def unique_ids(
    batch: UsrBatch,
    num_rows: Mapping[str, int],
    sides: ItemSides | None = None,
    lists: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    cold: Mapping[str, Tensor] | None = None,
) -> UniqueIds:
    """Which rows of which table a batch uses, and where: the part of a lookup that sorts.

    Args:
        batch: on any device; on the CPU, ids outside their table are refused.
        num_rows: table name -> N, in the order of FeatureSpec.vocabularies.
        sides: what the items of histories are; None: nothing but their ids is wanted.
        lists: from `table_columns`; None: there are neither tags nor terms.
        cold: table name -> bool (N) on the CPU: ids that have no row of their own and stand for the unknown id's.

    Raises:
        EmbeddingError: an id is outside its table: the samples table grew after this run's manifest.
    """
    lists = lists or {}
    of_lists = tuple(_list_ids(name, num_rows[name], batch, spans) for name, spans in lists.items())
    num_rows = {name: size for name, size in num_rows.items() if name not in lists}
    if batch.sparse_BF.is_cpu and len(batch):
        lowest_F, highest_F = torch.aminmax(batch.sparse_BF, dim=0)
        for (name, size), *ends in zip(num_rows.items(), lowest_F.tolist(), highest_F.tolist(), strict=True):
            _check_range(name, size, *ends)
    histories = {
        ITEM_TABLE: torch.cat([h.item_ids_V for h in batch.histories]),
        QUERY_TABLE: torch.cat(
            [torch.zeros_like(h.item_ids_V) if h.query_ids_V is None else h.query_ids_V for h in batch.histories]
        ),
    }
    columns = dict(zip(num_rows, batch.sparse_BF.unbind(1), strict=True))
    shared = {name: _with_events(name, num_rows[name], columns[name], ids_V) for name, ids_V in histories.items()}
    if sides is not None and sides.names:
        items_U = shared[ITEM_TABLE].ids_U
        of_items_UC = sides.ids_NC[items_U.to(sides.ids_NC.device)].to(items_U.device)
        for name, ids_U in zip(sides.names, of_items_UC.unbind(1), strict=True):
            found = _with_events(name, num_rows[name], columns[name], ids_U)
            shared[name] = replace(found, events=None, of_items=found.events)
    own = _sort_columns(batch.sparse_BF, list(num_rows.values()))
    tables = {name: shared[name] if name in shared else own.table(f) for f, name in enumerate(num_rows)}
    for name, cold_N in (cold or {}).items():
        tables[name] = replace(tables[name], shared=_shared_rows(tables[name].ids_U, cold_N))
    return (*tables.values(), *of_lists)


def _shared_rows(ids_U: Tensor, cold_N: Tensor) -> SharedRows:
    is_cold_U = cold_N[ids_U.to(cold_N.device)].to(ids_U.device)
    return SharedRows(*torch.unique(torch.where(is_cold_U, UNKNOWN_ID, ids_U), return_inverse=True))


def _list_ids(name: str, num_rows: int, batch: UsrBatch, spans: Sequence[tuple[int, int]]) -> TableIds:
    """The ids of a table of tags or terms; its column is (B, L), padding where a list is shorter.

    Of each list only as many columns as the batch's longest has: most are far shorter than the table allows.
    """
    assert batch.lists_BW is not None
    lists = [_without_padding(batch.lists_BW[:, first:end]) for first, end in spans]
    ids_BL = torch.cat(lists, dim=1)
    parts = [ids_BL.new_full((1,), PADDING_ID), ids_BL.flatten()]
    ids_U, index_N, _ = _distinct(name, num_rows, torch.cat(parts))
    widths = tuple(ids.shape[1] for ids in lists)
    return TableIds(ids_U, index_N[1:].view(ids_BL.shape), None, widths=widths)


def _without_padding(ids_BL: Tensor) -> Tensor:
    """The ids without the last columns that hold padding alone; all columns on a GPU, which this would wait for."""
    if not ids_BL.is_cpu:
        return ids_BL
    used_L = (ids_BL != PADDING_ID).any(0).nonzero()
    return ids_BL[:, : int(used_L[-1]) + 1] if len(used_L) else ids_BL[:, :1]


def _with_events(name: str, num_rows: int, column_B: Tensor, history_V: Tensor) -> TableIds:
    """The ids of a table that histories, or their items, use as well."""
    num_own = 1 + column_B.shape[0]
    # The padding id comes first, so that index 0 is padding whether the batch has any or not.
    ids_N = torch.cat([column_B.new_full((1,), PADDING_ID), column_B, history_V])
    ids_U, place_N, order_N = _distinct(name, num_rows, ids_N)
    # Those of the histories stand in that order too: one sort for both.
    order_V = order_N.masked_select(order_N >= num_own) - num_own
    return TableIds(ids_U, place_N[1:num_own], group_places(place_N[num_own:], ids_U.shape[0], order_V))


def _distinct(name: str, num_rows: int, ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As torch.unique with the inverse: int64, ascending; the place of each id there; and the order that sorts them."""
    if ids_N.is_cpu:
        _check_range(name, num_rows, *(int(end) for end in torch.aminmax(ids_N)))
    order_N = stable_order(ids_N, num_rows)
    sorted_N = ids_N.index_select(0, order_N)
    is_first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    torch.ne(sorted_N[1:], sorted_N[:-1], out=is_first_N[1:])
    place_N = torch.empty_like(order_N).scatter_(0, order_N, is_first_N.cumsum(0) - 1)
    return sorted_N.masked_select(is_first_N).long(), place_N, order_N


def _check_range(name: str, num_rows: int, lowest: int, highest: int) -> None:
    # A CUDA gather traps ids outside the table by itself; reading them there would make the queue wait.
    if lowest < 0 or highest >= num_rows:
        raise EmbeddingError(
            f"table {name}: the batch has id {lowest if lowest < 0 else highest}, the table has {num_rows} rows; the "
            "samples table does not belong to this run's feature spec: build the manifest again"
        )


@dataclass(frozen=True, slots=True)
class _SortedColumns:
    """The own values of all features, each feature's sorted by id, ties by row."""

    ids_FB: Tensor
    is_first_FB: Tensor
    """bool: the id differs from the one before."""
    place_FB: Tensor
    """int64, of each row's value: how many distinct ids of its feature are smaller, padding always included."""

    def table(self, feature: int) -> TableIds:
        """The ids of a table that no history uses."""
        ids_U = self.ids_FB[feature].masked_select(self.is_first_FB[feature]).long()
        others_U = ids_U[ids_U != PADDING_ID]
        return TableIds(torch.cat([others_U.new_full((1,), PADDING_ID), others_U]), self.place_FB[feature], None)


def _sort_columns(sparse_BF: Tensor, sizes: Sequence[int]) -> _SortedColumns:
    """One sort for all features: of torch's, one of many numbers is faster than many of few (radix)."""
    num_rows, num_features = sparse_BF.shape
    features_F1 = torch.arange(num_features, device=sparse_BF.device).unsqueeze(1)
    # Each feature's ids lie above those of the features before it, so its sorted values stay together.
    starts = [0, *itertools.accumulate(sizes)]
    # On a GPU nothing looks at the ids before; in 16 bits one that is too large could become another's.
    dtype = key_type(starts[-1]) if sparse_BF.is_cpu else torch.int64
    start_F1 = torch.tensor(starts[:-1], dtype=dtype, device=sparse_BF.device).unsqueeze(1)
    keys_V = (sparse_BF.T.to(dtype) + start_F1).flatten()
    order_V = stable_order(keys_V, starts[-1])
    ids_FB = keys_V.index_select(0, order_V).view(num_features, num_rows) - start_F1
    row_FB = order_V.view(num_features, num_rows) - features_F1 * num_rows
    is_first_FB = torch.ones_like(ids_FB, dtype=torch.bool)
    torch.ne(ids_FB[:, 1:], ids_FB[:, :-1], out=is_first_FB[:, 1:])
    smaller_FB = is_first_FB.cumsum(1) - (ids_FB[:, :1] == PADDING_ID).long()
    place_FB = torch.empty_like(row_FB).scatter_(1, row_FB, smaller_FB)
    return _SortedColumns(ids_FB, is_first_FB, place_FB)
