"""Input network: features f, target t, events h_j, and the scenario trigger z_k (method, section 3).

Shape letters: B rows, S scenarios, F features of one kind, D embedding, C concatenated features, H = 2 D target and
event vector, E scenario embedding, Z trigger, R newest past queries, U rows looked up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from usr_ray.config import ModelConfig
from usr_ray.data.batch import UsrBatch
from usr_ray.model.embedding import INIT_STD, Lookup, TableLookup
from usr_ray.model.gather import Groups, Places, group_places, pool_sum, take_columns
from usr_ray.model.history import EventKinds, Events
from usr_ray.model.unique import ITEM_TABLE, QUERY_TABLE
from usr_ray.schema import FeatureSpec


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch after the input network; nothing here knows of views."""

    features_BC: Tensor
    """f: every sparse feature's embedding in the order of FeatureSpec.sparse, the dense features, the interactions."""
    target_BH: Tensor
    """t = [e_v ; e_q or e_noq], the row's own query."""
    context_BC: Tensor
    """e_c: the context features of f; may have no columns."""
    query_BD: Tensor
    """e_q or e_noq."""
    event_weights: tuple[Tensor, Tensor, Tensor]
    """Rows from which events are summed: items (U, D), queries (U, D; row 0 is e_noq) and kinds (N, H)."""
    query_rows_UD: Tensor
    """The query table's rows with zeros, not e_noq, for padding."""
    event_places: tuple[Places, Places, Places]


def interactions(user: Sequence[Tensor], item: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """The products u * v of the row's user u and item v, then x * v for x of `others`, each (B, D).

    u and v are the sums of the embeddings of all features of the user and of the item over the root of their number. An
    MLP on embeddings side by side finds products only after many epochs; a factorisation machine has them from the
    start. Divided by INIT_STD a product starts with the spread of an embedding.
    """
    user_BD = torch.stack(list(user)).sum(0) / math.sqrt(len(user))
    item_BD = torch.stack(list(item)).sum(0) / (math.sqrt(len(item)) * INIT_STD)
    return [x_BD * item_BD for x_BD in (user_BD, *others)]


class InputNetwork(nn.Module):
    """Embeddings and dense features of a batch side by side.

    Dense features pass a learned scale and shift each: a batch statistic would make a row depend on its batch-mates.
    """

    def __init__(self, spec: FeatureSpec, embedding_dim: int, *, has_interactions: bool = True) -> None:
        super().__init__()
        self.user_names = [f.name for f in spec.sparse if f.owner == "user"]
        self.item_names = [f.name for f in spec.sparse if f.owner == "item"]
        self.has_interactions, self.has_queries = has_interactions, bool(spec.query_scenarios)
        self.names = tuple(f.name for f in spec.sparse)
        self.sparse_context = [i for i, f in enumerate(spec.sparse) if f.owner == "context"]
        self.dense_context = [i for i, f in enumerate(spec.dense) if f.owner == "context"]
        self.no_query_D = nn.Parameter(torch.randn(embedding_dim) * INIT_STD)
        num_dense = len(spec.dense)
        self.dense_affine_2F = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, num_dense)) if num_dense else None
        self.kinds = EventKinds(len(spec.scenarios), 2 * embedding_dim, INIT_STD)
        # Columns of each feature in f, in order.
        self.feature_widths = [embedding_dim] * len(spec.sparse) + [1] * num_dense
        if has_interactions:
            self.feature_widths += [embedding_dim] * (3 if self.has_queries else 2)
        self.feature_dim = sum(self.feature_widths)
        self.context_dim = embedding_dim * len(self.sparse_context) + len(self.dense_context)

    def forward(self, batch: UsrBatch, lookup: Lookup, events: Events) -> Inputs:
        """The inputs of a batch; `lookup` is EmbeddingTables.lookup(batch), `events` list_events(batch)."""
        items, queries = lookup.tables[ITEM_TABLE], lookup.tables[QUERY_TABLE]
        # In the query table, padding is not "nothing" but the learned e_noq.
        queries_UD = torch.cat([self.no_query_D.unsqueeze(0), queries.rows_UD[1:]])
        tables = [lookup.tables[name] for name in self.names]
        weights = [queries_UD if table is queries else table.rows_UD for table in tables]
        sparse_BC, sparse = take_columns(weights, [table.column_B for table in tables], lookup.columns)
        columns = dict(zip(self.names, sparse, strict=True))
        parts, context = [sparse_BC], [sparse[i] for i in self.sparse_context]
        if self.dense_affine_2F is not None:
            dense_BF = batch.dense_BF * self.dense_affine_2F[0] + self.dense_affine_2F[1]
            parts.append(dense_BF)
            # Slices: a list of columns would be copied to a GPU, and waited for, in each step.
            context += [dense_BF[:, i : i + 1] for i in self.dense_context]
        query_BD = columns[QUERY_TABLE]
        if self.has_interactions:
            parts += self.interact(columns, mean_item(items, events))
        # Every lookup groups the events of these two tables.
        assert items.events is not None
        assert queries.events is not None
        return Inputs(
            features_BC=torch.cat(parts, dim=1),
            target_BH=torch.cat([columns[ITEM_TABLE], query_BD], dim=1),
            context_BC=torch.cat(context, dim=1) if context else query_BD[:, :0],
            query_BD=query_BD,
            event_weights=(items.rows_UD, queries_UD, self.kinds()),
            query_rows_UD=queries.rows_UD,
            event_places=(items.events, queries.events, events.kinds),
        )

    def interact(self, columns: Mapping[str, Tensor], history_BD: Tensor) -> list[Tensor]:
        """The products u * v, query * v where there are queries, and mean item of the histories * v.

        Args:
            columns: embedding (B, D) of the row by feature name.
            history_BD: zeros for a row without events.
        """
        others = [columns[QUERY_TABLE], history_BD] if self.has_queries else [history_BD]
        return interactions([columns[n] for n in self.user_names], [columns[n] for n in self.item_names], others)


def mean_item(items: TableLookup, events: Events) -> Tensor:
    """(B, D): mean of the item embeddings of all events of a row, zeros without any."""
    assert items.events is not None
    return pool_sum([items.rows_UD], [items.events], events.rows) / events.num_events_B.clamp(min=1).unsqueeze(1)


class Trigger(nn.Module):
    """z_k = LayerNorm(W [e_k ; e_q or e_noq ; e_c]) of every view on every row.

    A query scenario's view takes the row's own query, or on a row of a scenario without queries the mean of the
    user's newest past queries in that view's history, or e_noq when there are none; never a later query. The view of
    a scenario without queries takes e_noq.
    """

    def __init__(self, spec: FeatureSpec, config: ModelConfig, context_dim: int) -> None:
        super().__init__()
        has_query = [s in spec.query_scenarios for s in spec.scenarios]
        self.register_buffer("has_query_S", torch.tensor(has_query), persistent=False)
        self.query_scenarios = [s for s, has in enumerate(has_query) if has]
        self.num_scenarios = len(has_query)
        self.num_recent = config.recent_queries
        self.project = nn.Linear(2 * config.embedding_dim + context_dim, config.trigger_dim)
        self.norm = nn.LayerNorm(config.trigger_dim)

    def forward(self, inputs: Inputs, scenario_B: Tensor, scenario_embedding_SE: Tensor, events: Events) -> Tensor:
        """(B, S, Z)."""
        num_rows = scenario_B.shape[0]
        own_query_B1 = self.get_buffer("has_query_S")[scenario_B].unsqueeze(1)
        no_query_D = inputs.event_weights[1][0]
        views = [no_query_D.expand(num_rows, -1)] * self.num_scenarios
        for scenario in self.query_scenarios:
            past_BD = self._past_query(inputs, events, scenario, no_query_D)
            views[scenario] = torch.where(own_query_B1, inputs.query_BD, past_BD)
        query_BSD = torch.stack(views, dim=1)
        scenario_BSE = scenario_embedding_SE.expand(num_rows, -1, -1)
        context_BSC = inputs.context_BC.unsqueeze(1).expand(-1, self.num_scenarios, -1)
        z_BSZ: Tensor = self.norm(self.project(torch.cat([scenario_BSE, query_BSD, context_BSC], dim=2)))
        return z_BSZ

    def _past_query(self, inputs: Inputs, events: Events, scenario: int, no_query_D: Tensor) -> Tensor:
        """(B, D): mean of the newest past queries of one history, e_noq where it has none."""
        index_V, rows_UD = inputs.event_places[1].index_V, inputs.query_rows_UD
        lengths_B1 = events.lengths_SB[scenario].unsqueeze(1)
        newest_R = torch.arange(self.num_recent, device=index_V.device)
        place_BR = events.starts_SB[scenario].unsqueeze(1) + lengths_B1 - 1 - newest_R
        # One place more than there are events, with padding, for the places outside the history.
        index_V = torch.cat([index_V, index_V.new_zeros(1)])
        index_BR = index_V[torch.where(newest_R < lengths_B1, place_BR, index_V.shape[0] - 1)]
        numbers_P = torch.arange(index_BR.numel(), device=index_V.device)
        rows = Groups(numbers_P // self.num_recent, numbers_P, numbers_P[:: self.num_recent])
        sum_BD = pool_sum([rows_UD], [group_places(index_BR.flatten(), rows_UD.shape[0])], rows)
        count_B1 = (index_BR > 0).sum(1, keepdim=True)
        return torch.where(count_B1 > 0, sum_BD / count_B1.clamp(min=1), no_query_D)
