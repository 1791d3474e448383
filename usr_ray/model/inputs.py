"""Input network: features f, target t, events h_j, and the scenario trigger z_k (method, section 3).

Shape letters: B rows, S scenarios, F features of one kind, D embedding, C concatenated features, H = 2 D target and
event vector, E scenario embedding, Z trigger, R newest past queries, U rows looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from usr_ray.batch import UsrBatch
from usr_ray.config import ModelConfig
from usr_ray.model.embedding import INIT_STD, ITEM_TABLE, QUERY_TABLE, Lookup, TableLookup
from usr_ray.model.gather import Places, gather_sum, group_places
from usr_ray.model.history import EventKinds, Events
from usr_ray.schema import FeatureSpec


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch after the input network; nothing here knows of views."""

    features_BC: Tensor
    """f: every sparse feature's embedding in the order of FeatureSpec.sparse, then the dense features."""
    target_BH: Tensor
    """t = [e_v ; e_q or e_noq], the row's own query."""
    context_BC: Tensor
    """e_c: the context features of f; may have no columns."""
    query_BD: Tensor
    """e_q or e_noq."""
    event_weights: tuple[Tensor, Tensor, Tensor]
    """Rows from which events are summed: items (U, D), queries (U, D; row 0 is e_noq) and kinds (N, H)."""
    event_places: tuple[Places, Places, Places]


class InputNetwork(nn.Module):
    """Embeddings and dense features of a batch side by side.

    Dense features pass a learned scale and shift each: a batch statistic would make a row depend on its batch-mates.
    """

    def __init__(self, spec: FeatureSpec, embedding_dim: int) -> None:
        super().__init__()
        self.names = tuple(f.name for f in spec.sparse)
        self.sparse_context = [i for i, f in enumerate(spec.sparse) if f.owner == "context"]
        self.dense_context = [i for i, f in enumerate(spec.dense) if f.owner == "context"]
        self.no_query_D = nn.Parameter(torch.randn(embedding_dim) * INIT_STD)
        num_dense = len(spec.dense)
        self.dense_affine_2F = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, num_dense)) if num_dense else None
        self.kinds = EventKinds(len(spec.scenarios), 2 * embedding_dim, INIT_STD)
        self.feature_widths = [embedding_dim] * len(spec.sparse) + [1] * num_dense
        """Columns of each feature in f, in order."""
        self.feature_dim = sum(self.feature_widths)
        self.context_dim = embedding_dim * len(self.sparse_context) + len(self.dense_context)

    def forward(self, batch: UsrBatch, lookup: Lookup, events: Events) -> Inputs:
        """The inputs of a batch; `lookup` is EmbeddingTables.lookup(batch), `events` list_events(batch)."""
        items, queries = lookup.tables[ITEM_TABLE], lookup.tables[QUERY_TABLE]
        # In the query table, padding is not "nothing" but the learned e_noq.
        queries_UD = torch.cat([self.no_query_D.unsqueeze(0), queries.rows_UD[1:]])
        columns = {}
        for name in self.names:
            table: TableLookup = lookup.tables[name]
            columns[name] = embedding(table.column_B, queries_UD if table is queries else table.rows_UD)
        sparse = list(columns.values())
        parts, context = list(sparse), [sparse[i] for i in self.sparse_context]
        if self.dense_affine_2F is not None:
            dense_BF = batch.dense_BF * self.dense_affine_2F[0] + self.dense_affine_2F[1]
            parts.append(dense_BF)
            context.append(dense_BF[:, self.dense_context])
        query_BD = columns[QUERY_TABLE]
        # Every lookup groups the events of these two tables.
        assert items.events is not None
        assert queries.events is not None
        return Inputs(
            features_BC=torch.cat(parts, dim=1),
            target_BH=torch.cat([columns[ITEM_TABLE], query_BD], dim=1),
            context_BC=torch.cat(context, dim=1) if context else query_BD[:, :0],
            query_BD=query_BD,
            event_weights=(items.rows_UD, queries_UD, self.kinds()),
            event_places=(items.events, queries.events, events.kinds),
        )


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
        query_weight_UD = inputs.event_weights[1]
        own_query_B1 = self.get_buffer("has_query_S")[scenario_B].unsqueeze(1)
        views = [query_weight_UD[0].expand(num_rows, -1)] * self.num_scenarios
        for scenario in self.query_scenarios:
            past_BD = self._past_query(query_weight_UD, inputs.event_places[1].index_V, events, scenario)
            views[scenario] = torch.where(own_query_B1, inputs.query_BD, past_BD)
        query_BSD = torch.stack(views, dim=1)
        scenario_BSE = scenario_embedding_SE.expand(num_rows, -1, -1)
        context_BSC = inputs.context_BC.unsqueeze(1).expand(-1, self.num_scenarios, -1)
        z_BSZ: Tensor = self.norm(self.project(torch.cat([scenario_BSE, query_BSD, context_BSC], dim=2)))
        return z_BSZ

    def _past_query(self, weight_UD: Tensor, index_V: Tensor, events: Events, scenario: int) -> Tensor:
        """(B, D): mean of the newest past queries of one history, e_noq where it has none."""
        num_rows = events.lengths_SB.shape[1]
        first_B = events.starts_G[scenario * num_rows : (scenario + 1) * num_rows]
        newest_R = torch.arange(self.num_recent, device=index_V.device)
        place_BR = (first_B + events.lengths_SB[scenario]).unsqueeze(1) - 1 - newest_R
        inside_BR = newest_R < events.lengths_SB[scenario].unsqueeze(1)
        # One place more than there are events, for the places outside.
        index_BR = torch.cat([index_V, index_V.new_zeros(1)])[torch.where(inside_BR, place_BR, index_V.shape[0])]
        known_BR = (index_BR > 0).to(weight_UD.dtype)
        count_B1 = known_BR.sum(1, keepdim=True)
        places = group_places(index_BR.flatten(), weight_UD.shape[0])
        queries_BRD = gather_sum([weight_UD], [places]).unflatten(0, index_BR.shape)
        mean_BD = (known_BR.unsqueeze(1) @ queries_BRD).squeeze(1) / count_B1.clamp(min=1)
        return torch.where(count_B1 > 0, mean_BD, weight_UD[0])
