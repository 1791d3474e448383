"""What a model asks of a batch's histories: jagged in a training batch, padded in the inputs of an exported model.

h_j = [e_item ; e_side .. ; e_query or e_noq] + type + action + log-dt, where type is the scenario the event happened
in and the sides are the item's categories (FeatureSpec.history_item_features) and projected vectors, which come with
the item and not with the event: they are put beside its item's row once, however many events name the item.

Shape letters: B rows, S scenarios, V events of all histories (scenario after scenario, then row after row), G = S * B
histories, L longest row of the batch over all scenarios (padded: S times the history length), P = B * L slots,
R newest past queries, D embedding, X = D (1 + sides) item vector, H = X + D event vector, I columns of a projection,
N kinds of events.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from typing_extensions import override

from usr_ray.data.batch import UsrBatch
from usr_ray.model.embedding import Lookup, TableLookup
from usr_ray.model.ops import Groups, Places, group_places, pool_sum
from usr_ray.model.unique import ITEM_TABLE, QUERY_TABLE
from usr_ray.schema import NUM_ACTIONS, HistoryColumns

NUM_AGES = 32
"""Buckets of dt: floor(log2(1 + seconds)), the last one open; 2^31 s are 68 years."""


class Histories(abc.ABC):
    """The events of a batch's rows, all scenarios' together."""

    no_query_D: Tensor
    """e_noq."""
    kinds_NH: Tensor
    """EventKinds.forward."""
    num_sides: int

    @property
    @abc.abstractmethod
    def lengths_SB(self) -> Tensor:
        """int64, events of each history."""

    @property
    def num_events_B(self) -> Tensor:
        """int64, events of a row in all scenarios."""
        return self.lengths_SB.sum(0)

    @abc.abstractmethod
    def item_sums(self) -> Tensor:
        """(S, B, X): sum of the item vectors [e_item ; e_side ..] of the events of each history."""

    @abc.abstractmethod
    def event_sum(self) -> Tensor:
        """(B, H): sum of the events h_j of a row."""

    @abc.abstractmethod
    def project(self, projection_IH: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, I): the projection of every h_j, zeros on padding; and bool (B, L): where there is an event."""

    @abc.abstractmethod
    def past_queries(self, scenario: int, num_recent: int) -> tuple[Tensor, Tensor]:
        """(B, D): sum of the newest past queries of one history; and int64 (B, 1): how many there are."""

    def mean_items(self, *, each: bool) -> list[Tensor]:
        """(B, D): mean over all events of a row of the sum of what an item vector holds, over the root of their number.

        With `each` those of every scenario's events besides. Zeros where there are no events.
        """
        sums_SBX, lengths_SB = self.item_sums(), self.lengths_SB
        if each:
            sums_SBX = torch.cat([sums_SBX.sum(0, keepdim=True), sums_SBX])
            lengths_SB = torch.cat([lengths_SB.sum(0, keepdim=True), lengths_SB])
        else:
            sums_SBX, lengths_SB = sums_SBX.sum(0, keepdim=True), lengths_SB.sum(0, keepdim=True)
        if self.num_sides:
            sums_SBX = sums_SBX.unflatten(2, (1 + self.num_sides, -1)).sum(2) / math.sqrt(1 + self.num_sides)
        return list((sums_SBX / lengths_SB.clamp(min=1).unsqueeze(2)).unbind(0))


@dataclass(frozen=True, slots=True)
class Events:
    """Where each event of a batch belongs."""

    history_V: Tensor
    """int64, history of the event: scenario * B + row."""
    from_newest_V: Tensor
    """int64, 0 for the newest event of its history, 1 for the one before it."""
    starts_SB: Tensor
    """int64, first event of each history."""
    lengths_SB: Tensor
    """int64, events of each history."""
    kinds: Places
    """(scenario, action, age bucket) of each event as an index into `EventKinds.forward`."""
    rows: Groups
    """The events of a row: its scenarios one after the other, newest last in each."""
    rank_V: Tensor
    """int64, the event's place in rows.order_V."""

    @property
    def num_events_B(self) -> Tensor:
        """int64 (B), events of a row in all scenarios."""
        return self.lengths_SB.sum(0)


def list_events(batch: UsrBatch) -> Events:
    """The events of all histories of a batch, on its device."""
    num_scenarios, num_rows = len(batch.histories), len(batch)
    lengths_SB = torch.stack([h.offsets[1:] - h.offsets[:-1] for h in batch.histories])
    lengths_G = lengths_SB.flatten()
    starts_G = lengths_G.cumsum(0) - lengths_G
    actions_V = torch.cat([h.actions_V for h in batch.histories])
    ages_s_V = torch.cat([h.ages_s_V for h in batch.histories])
    device, num_events = actions_V.device, actions_V.shape[0]
    histories_G = torch.arange(num_scenarios * num_rows, device=device)
    history_V = histories_G.repeat_interleave(lengths_G, output_size=num_events)
    # frexp is exact at powers of two, which a float log2 is not on every device.
    age_V = (torch.frexp(1 + ages_s_V.clamp(min=0)).exponent - 1).clamp(max=NUM_AGES - 1)
    scenario_V = torch.cat([torch.full_like(h.actions_V, s, dtype=torch.int64) for s, h in enumerate(batch.histories)])
    kind_V = (scenario_V * NUM_ACTIONS + actions_V) * NUM_AGES + age_V
    # Histories come scenario after scenario; a row's events stand together once each history has moved by `shift`.
    num_events_B = lengths_SB.sum(0)
    row_starts_B = num_events_B.cumsum(0) - num_events_B
    shift_SB = row_starts_B + lengths_SB.cumsum(0) - lengths_SB - starts_G.view_as(lengths_SB)
    numbers_V = torch.arange(num_events, device=device)
    rank_V = numbers_V + shift_SB.flatten().index_select(0, history_V)
    order_V = torch.empty_like(numbers_V).scatter_(0, rank_V, numbers_V)
    return Events(
        history_V=history_V,
        from_newest_V=(starts_G + lengths_G - 1).index_select(0, history_V) - numbers_V,
        starts_SB=starts_G.view_as(lengths_SB),
        lengths_SB=lengths_SB,
        kinds=group_places(kind_V, num_scenarios * NUM_ACTIONS * NUM_AGES),
        rows=Groups(history_V - scenario_V * num_rows, order_V, row_starts_B),
        rank_V=rank_V,
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """The events of a row side by side, padded to the batch's longest row."""

    valid_BL: Tensor
    """bool, False on padding."""
    slots: Groups
    """The event of each slot (row * L + position) as groups of one event, or of none on padding."""

    def mark(self, keep_V: Tensor) -> Tensor:
        """The events for which keep_V holds, as a bool (B, L)."""
        marks_P = torch.zeros_like(self.valid_BL).flatten()
        return marks_P.scatter_(0, self.slots.group_V, keep_V).view_as(self.valid_BL)


def lay_out(events: Events, longest: int | None = None) -> Grid:
    """The grid of a batch's events; L = max(longest, 1).

    `longest` is UsrBatch.longest; None: counted here, which waits for a GPU.
    """
    num_events_B1, row_starts_B = events.num_events_B.unsqueeze(1), events.rows.starts_G
    num_rows = row_starts_B.shape[0]
    if longest is None:
        longest = int(num_events_B1.max()) if num_rows else 1
    longest = max(longest, 1)
    position_L = torch.arange(longest, device=row_starts_B.device)
    # An empty slot starts where the row's events end.
    starts_P = (row_starts_B.unsqueeze(1) + position_L.expand(num_rows, -1).clamp(max=num_events_B1)).flatten()
    row_shift_B = torch.arange(num_rows, device=row_starts_B.device) * longest - row_starts_B
    slot_V = events.rank_V + row_shift_B.index_select(0, events.rows.group_V)
    return Grid(position_L < num_events_B1, Groups(slot_V, events.rows.order_V, starts_P))


class JaggedHistories(Histories):
    """Histories of a training batch: a row of a table is projected or pooled once, however many events take it.

    `sides` names the tables of the items' categories; `projected` are the items' vectors (InputNetwork.projected),
    (U, D) each, for the rows of the item table.
    """

    def __init__(
        self,
        batch: UsrBatch,
        lookup: Lookup,
        no_query_D: Tensor,
        kinds_NH: Tensor,
        sides: Sequence[str] = (),
        projected: Sequence[Tensor] = (),
    ) -> None:
        self.no_query_D, self.kinds_NH, self.num_sides = no_query_D, kinds_NH, len(sides) + len(projected)
        self.events = list_events(batch)
        self._longest = batch.longest
        self._grid: Grid | None = None
        items, queries = lookup.tables[ITEM_TABLE], lookup.tables[QUERY_TABLE]
        # Every lookup groups the events of these two tables.
        assert items.ids.events is not None
        assert queries.ids.events is not None
        of_sides = [lookup.tables[name] for name in sides]
        self.items_UX, self.queries_UD = _with_sides(items, of_sides, projected), queries.rows_UD
        self.places = (items.ids.events, queries.ids.events, self.events.kinds)

    @property
    def grid(self) -> Grid:
        """Where each event stands in `project`'s result."""
        self._grid = self._grid or lay_out(self.events, self._longest)
        return self._grid

    @property
    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        # In the query table, padding is not "nothing" but the learned e_noq.
        return self.items_UX, torch.cat([self.no_query_D.unsqueeze(0), self.queries_UD[1:]]), self.kinds_NH

    @property
    @override
    def lengths_SB(self) -> Tensor:
        return self.events.lengths_SB

    @override
    def item_sums(self) -> Tensor:
        history_V, starts_SB = self.events.history_V, self.events.starts_SB
        # The events of a history stand side by side already.
        numbers_V = torch.arange(history_V.shape[0], device=history_V.device)
        histories = Groups(history_V, numbers_V, starts_SB.flatten())
        return pool_sum([self.items_UX], [self.places[0]], histories).unflatten(0, starts_SB.shape)

    @override
    def event_sum(self) -> Tensor:
        own = [pool_sum([w], [p], self.events.rows) for w, p in zip(self._weights, self.places, strict=True)]
        return torch.cat(own[:2], dim=1) + own[2]

    @override
    def project(self, projection_IH: Tensor) -> tuple[Tensor, Tensor]:
        items_UX, queries_UD, kinds_NH = self._weights
        dim, valid_BL = items_UX.shape[1], self.grid.valid_BL
        projected = [
            items_UX @ projection_IH[:, :dim].T,
            queries_UD @ projection_IH[:, dim:].T,
            kinds_NH @ projection_IH.T,
        ]
        return pool_sum(projected, self.places, self.grid.slots).unflatten(0, valid_BL.shape), valid_BL

    @override
    def past_queries(self, scenario: int, num_recent: int) -> tuple[Tensor, Tensor]:
        index_V, events = self.places[1].index_V, self.events
        lengths_B1 = events.lengths_SB[scenario].unsqueeze(1)
        newest_R = torch.arange(num_recent, device=index_V.device)
        place_BR = events.starts_SB[scenario].unsqueeze(1) + lengths_B1 - 1 - newest_R
        # One place more than there are events, with padding, for the places outside the history.
        index_V = torch.cat([index_V, index_V.new_zeros(1)])
        place_BR = torch.where(newest_R < lengths_B1, place_BR, index_V.shape[0] - 1)
        index_BR = index_V.index_select(0, place_BR.flatten()).view_as(place_BR)
        numbers_P = torch.arange(index_BR.numel(), device=index_V.device)
        rows = Groups(numbers_P // num_recent, numbers_P, numbers_P[::num_recent])
        sum_BD = pool_sum([self.queries_UD], [group_places(index_BR.flatten(), self.queries_UD.shape[0])], rows)
        return sum_BD, (index_BR > 0).sum(1, keepdim=True)


def _with_sides(items: TableLookup, sides: Sequence[TableLookup], projected: Sequence[Tensor]) -> Tensor:
    """(U, X): [e_item ; e_side .. ; vector ..] of every item that a step uses."""
    parts = [items.rows_UD]
    for side in sides:
        assert side.ids.of_items is not None  # the tables were built with the sides that the model wants
        numbers_U = torch.arange(items.rows_UD.shape[0], device=items.rows_UD.device)
        parts.append(pool_sum([side.rows_UD], [side.ids.of_items], Groups(numbers_U, numbers_U, numbers_U)))
    parts += projected
    return torch.cat(parts, dim=1) if len(parts) > 1 else items.rows_UD


class PaddedHistories(Histories):
    """Histories from an exported model's inputs: the newest event in the last column, action 0 where there is none.

    Args:
        inputs: by name, (B, L) each.
        columns: one entry a scenario.
        embed: (table name, ids) -> rows; in the query table row 0 is e_noq.
        embed_items: ids -> item vectors.
    """

    def __init__(
        self,
        inputs: dict[str, Tensor],
        columns: Sequence[HistoryColumns],
        embed: Callable[[str, Tensor], Tensor],
        embed_items: Callable[[Tensor], Tensor],
        no_query_D: Tensor,
        kinds_NH: Tensor,
    ) -> None:
        self.no_query_D, self.kinds_NH = no_query_D, kinds_NH
        self._embed = embed
        self._queries = [None if c.query_ids is None else inputs[c.query_ids] for c in columns]
        actions = [inputs[c.actions].clamp(0, NUM_ACTIONS - 1) for c in columns]
        kinds = [
            (scenario * NUM_ACTIONS + actions_BL) * NUM_AGES + age_buckets(inputs[c.ages_s])
            for scenario, (c, actions_BL) in enumerate(zip(columns, actions, strict=True))
        ]
        self._item_BLX = embed_items(torch.cat([inputs[c.item_ids] for c in columns], dim=1))
        self.num_sides = self._item_BLX.shape[2] // no_query_D.shape[0] - 1
        self._kind_BL = torch.cat(kinds, dim=1)
        self.valid_BL = torch.cat(actions, dim=1) > 0

    @property
    @override
    def lengths_SB(self) -> Tensor:
        return self.valid_BL.unflatten(1, (len(self._queries), -1)).sum(2).T

    @override
    def item_sums(self) -> Tensor:
        known_BLX = self._item_BLX * self.valid_BL.unsqueeze(2)
        return known_BLX.unflatten(1, (len(self._queries), -1)).sum(2).transpose(0, 1)

    @override
    def event_sum(self) -> Tensor:
        return (self._vectors() * self.valid_BL.unsqueeze(2)).sum(1)

    @override
    def project(self, projection_IH: Tensor) -> tuple[Tensor, Tensor]:
        return self._vectors() @ projection_IH.T, self.valid_BL

    @override
    def past_queries(self, scenario: int, num_recent: int) -> tuple[Tensor, Tensor]:
        ids_BL = self._queries[scenario]
        assert ids_BL is not None
        ids_BR = ids_BL[:, -num_recent:]  # a place without an event holds id 0
        is_query_BR = ids_BR != 0
        sum_BD = (self._embed(QUERY_TABLE, ids_BR) * is_query_BR.unsqueeze(2)).sum(1)
        return sum_BD, is_query_BR.sum(1, keepdim=True)

    def _vectors(self) -> Tensor:
        """h_j, (B, L, H)."""
        length = self.valid_BL.shape[1] // len(self._queries)
        queries = [
            self.no_query_D.expand(self.valid_BL.shape[0], length, -1)
            if ids_BL is None
            else self._embed(QUERY_TABLE, ids_BL)
            for ids_BL in self._queries
        ]
        return torch.cat([self._item_BLX, torch.cat(queries, dim=1)], dim=2) + embedding(self._kind_BL, self.kinds_NH)


def age_buckets(ages_s: Tensor) -> Tensor:
    """floor(log2(1 + seconds)), the last bucket open: `list_events`' frexp in operations that ONNX has."""
    last = NUM_AGES - 1
    powers = 2.0 ** torch.arange(NUM_AGES + 1)
    value = 1 + ages_s.clamp(min=0)
    # NaN is not below either: it takes the last bucket, not a place outside the table.
    value = torch.where(value < powers[last], value, powers[last])
    bucket = torch.log2(value).floor().long().clamp(0, last)
    # A float log2 alone is not exact at powers of two.
    bucket = bucket - (powers[bucket] > value).long()
    return bucket + (powers[bucket + 1] <= value).long()


class EventKinds(nn.Module):
    """Type, action and log-dt embeddings, added up for every kind of event there is."""

    def __init__(self, num_scenarios: int, event_dim: int, init_std: float) -> None:
        super().__init__()
        self.type_SH = nn.Parameter(torch.randn(num_scenarios, event_dim) * init_std)
        self.action_AH = nn.Parameter(torch.randn(NUM_ACTIONS, event_dim) * init_std)
        self.age_GH = nn.Parameter(torch.randn(NUM_AGES, event_dim) * init_std)

    def forward(self) -> Tensor:
        """(N, H): row (scenario * NUM_ACTIONS + action) * NUM_AGES + age bucket."""
        return (self.type_SH[:, None, None] + self.action_AH[:, None] + self.age_GH).flatten(0, 2)
