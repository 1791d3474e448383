"""Input network: features f, target t, and the scenario trigger z_k (method, section 3).

Shape letters: B rows, S scenarios, F features of one kind, D embedding, C concatenated features, H target and event
vector, E scenario embedding, Z trigger, P numbers of a vector, U users or items of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from usr_ray.config import ModelConfig
from usr_ray.model.embedding import INIT_STD
from usr_ray.model.history import EventKinds, Histories
from usr_ray.model.lists import TERM_OVERLAP, TERM_PRODUCT, has_both_terms
from usr_ray.model.mlp import MLP
from usr_ray.model.unique import ITEM_TABLE, QUERY_TABLE, event_sides, event_vectors
from usr_ray.schema import STANDARD, FeatureSpec, SparseFeature, VectorFeature

MAX_DEVIATIONS = 100.0
"""A number of scale "standard" counts as no further from its mean: one row of 999,999,999 for "no price" would have a
gradient beside which clipping leaves the other rows of its batch nothing."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch after the input network; nothing here knows of views.

    Of a request, what does not depend on the candidate (context, query, histories) has one row.
    """

    features_BC: Tensor
    """f: every sparse feature's embedding in the order of FeatureSpec.sparse, the dense features, the interactions, the
    pooled tags and terms, the projected vectors."""
    target_BH: Tensor
    """t = [e_v ; e_side .. ; vector .. ; e_q or e_noq], the row's own columns."""
    context_BC: Tensor
    """e_c: the context features of f; may have no columns."""
    query_BD: Tensor
    """e_q or e_noq."""
    histories: Histories


def side_by_side(parts: Sequence[Tensor], num_rows: int) -> Tensor:
    """(num_rows, columns of all parts): parts of one row are the same for all, such as a request's user."""
    return torch.cat([p_BX if p_BX.shape[0] == num_rows else p_BX.expand(num_rows, -1) for p_BX in parts], dim=1)


class Interactions(nn.Module):
    """The products u * v of the row's user u and item v, then x * v for x of the others, (B, D) each.

    u and v are the sums of the embeddings of all features of the user and of the item over the root of their number. An
    MLP on concatenated embeddings learns products only after many epochs; a factorisation machine has them from the
    start. Over INIT_STD an embedding starts with a spread of 1; each side then passes a small tower (ours: x + MLP(x),
    the last layer zero at the start), because a sum of embeddings cannot say that two features together mean
    something. A product starts with the spread of an embedding.

    Args:
        others: number of sides besides user and item.
        hidden: units of each tower's one hidden layer; 0: no towers.
    """

    def __init__(self, dim: int, others: int, hidden: int) -> None:
        super().__init__()
        towers = [MLP(dim, (hidden,), dim) for _ in range(2 + others)] if hidden else []
        for tower in towers:
            nn.init.zeros_(cast(nn.Linear, tower.layers[-1]).weight)
        self.towers = nn.ModuleList(towers) if hidden else None

    def forward(self, user: Sequence[Tensor], item: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        """`user` and `item`: embeddings of their features; `others`: one embedding each."""
        sums = [torch.stack(list(side)).sum(0) / math.sqrt(len(side)) for side in (user, item)]
        sides = [x_BD / INIT_STD for x_BD in (*sums, *others)]
        if self.towers is not None:
            sides = [x_BD + tower(x_BD) for x_BD, tower in zip(sides, self.towers, strict=True)]
        user_BD, item_BD, *rest = sides
        item_BD = item_BD * INIT_STD
        return [x_BD * item_BD for x_BD in (user_BD, *rest)]


class InputNetwork(nn.Module):
    """Embeddings and dense features of a batch side by side.

    Each dense feature has a learned scale and shift: a batch statistic would make a row depend on the rest of its
    batch.
    """

    def __init__(self, spec: FeatureSpec, config: ModelConfig) -> None:
        super().__init__()
        embedding_dim = config.embedding_dim
        self.item_columns = (ITEM_TABLE, *event_sides(spec, config), *event_vectors(spec, config))
        self.event_dim = (len(self.item_columns) + 1) * embedding_dim
        named: tuple[SparseFeature | VectorFeature, ...] = (*spec.sparse, *spec.lists, *spec.vectors)
        self.user_names = [f.name for f in named if f.owner == "user"]
        self.item_names = [f.name for f in named if f.owner == "item"]
        self.has_queries = bool(spec.query_scenarios)
        self.names = tuple(f.name for f in spec.sparse)
        # What list_columns (model/lists.py) adds, behind all else in f.
        met = (TERM_PRODUCT, TERM_OVERLAP) if has_both_terms(spec) else ()
        self.list_names = (*(f.name for f in spec.lists), *met)
        self.sparse_context = [f.name for f in named if f.owner == "context"]
        self.dense_context = [i for i, f in enumerate(spec.dense) if f.owner == "context"]
        self.no_query_D = nn.Parameter(torch.randn(embedding_dim) * INIT_STD)
        num_dense = len(spec.dense)
        self.dense_affine_2F = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, num_dense)) if num_dense else None
        bounds = [MAX_DEVIATIONS if f.scale == STANDARD else torch.finfo(torch.float32).max for f in spec.dense]
        self.is_bounded = MAX_DEVIATIONS in bounds
        if self.is_bounded:
            self.register_buffer("dense_bound_F", torch.tensor(bounds), persistent=False)
        self.kinds = EventKinds(len(spec.scenarios), self.event_dim, INIT_STD)
        # Columns of each feature in f, in order.
        self.feature_widths = [embedding_dim] * len(spec.sparse) + [1] * num_dense
        self.interactions: Interactions | None = None
        if config.interactions:
            num_scenarios = len(spec.scenarios)
            self.each_history = config.interaction_histories == "each" and num_scenarios > 1
            num_others = (2 if self.has_queries else 1) + (num_scenarios if self.each_history else 0)
            self.interactions = Interactions(embedding_dim, num_others, config.interaction_hidden)
            self.feature_widths += [embedding_dim] * (1 + num_others)
        self.feature_widths += [2 if name == TERM_OVERLAP else embedding_dim for name in self.list_names]
        # Vectors are behind all else in f. Each has a map of [v / scale ; 1 where there is none]: the last row of a map
        # stands for no vector.
        self.vector_names = tuple(vector.name for vector in spec.vectors)
        starts = [torch.randn(vector.length + 1, embedding_dim) * INIT_STD for vector in spec.vectors]
        for start_PD in starts:
            start_PD[:-1] /= math.sqrt(len(start_PD) - 1)  # as large as an embedding, of numbers around 1
        self.vector_maps = nn.ParameterList(nn.Parameter(start_PD) for start_PD in starts)
        self.feature_widths += [embedding_dim] * len(spec.vectors)
        self.feature_dim = sum(self.feature_widths)
        self.context_dim = embedding_dim * len(self.sparse_context) + len(self.dense_context)

    def projected(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> (U, D) of vectors (U, P + 1), as data/by_id.py has them."""
        maps = zip(self.vector_names, self.vector_maps, strict=True)
        return {name: vectors[name] @ map_PD for name, map_PD in maps}

    def forward(self, columns: Mapping[str, Tensor], dense_BF: Tensor, histories: Histories) -> Inputs:
        """The inputs of a batch.

        Args:
            columns: embedding (B, D) of the row by feature name; in the query's, e_noq where there is no query; with
                tags or terms those of `list_columns` too, with vectors the projected ones.
            dense_BF: as UsrBatch.dense_BF; not looked at where there are no dense features.

        The candidates of one request may share one row of every column but the item's, and one history.
        """
        num_rows = columns[ITEM_TABLE].shape[0]
        query_BD, context = columns[QUERY_TABLE], [columns[name] for name in self.sparse_context]
        parts = [columns[name] for name in self.names]
        if self.dense_affine_2F is not None:
            if self.is_bounded:
                bound_F = self.get_buffer("dense_bound_F")
                dense_BF = torch.maximum(torch.minimum(dense_BF, bound_F), -bound_F)
            dense_BF = dense_BF * self.dense_affine_2F[0] + self.dense_affine_2F[1]
            parts.append(dense_BF)
            # Slices: a list of columns would be copied to a GPU in each step, and the step would wait for it.
            # A request has one context: its first row has all of it.
            context += [dense_BF[: query_BD.shape[0], i : i + 1] for i in self.dense_context]
        if self.interactions is not None:
            means = histories.mean_items(each=self.each_history)
            others = [query_BD, *means] if self.has_queries else means
            parts += self.interactions(
                [columns[n] for n in self.user_names], [columns[n] for n in self.item_names], others
            )
        parts += [columns[name] for name in (*self.list_names, *self.vector_names)]
        return Inputs(
            features_BC=side_by_side(parts, num_rows),
            target_BH=side_by_side([*(columns[name] for name in self.item_columns), query_BD], num_rows),
            context_BC=torch.cat(context, dim=1) if context else query_BD[:, :0],
            query_BD=query_BD,
            histories=histories,
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
        # Floats, taken by an embedding, not a mask by an index: ONNX then refuses a scenario that is not there.
        self.register_buffer("has_query_S1", torch.tensor(has_query).float().unsqueeze(1), persistent=False)
        self.query_scenarios = [s for s, has in enumerate(has_query) if has]
        self.num_scenarios = len(has_query)
        self.num_recent = config.recent_queries
        self.project = nn.Linear(2 * config.embedding_dim + context_dim, config.trigger_dim)
        self.norm = nn.LayerNorm(config.trigger_dim)

    def forward(self, inputs: Inputs, scenario_B: Tensor, scenario_embedding_SE: Tensor) -> Tensor:
        """(B, S, Z)."""
        num_rows = scenario_B.shape[0]
        own_query_B1 = embedding(scenario_B, self.get_buffer("has_query_S1")) > 0
        no_query_D = inputs.histories.no_query_D
        views = [no_query_D.expand(num_rows, -1)] * self.num_scenarios
        for scenario in self.query_scenarios:
            sum_BD, count_B1 = inputs.histories.past_queries(scenario, self.num_recent)
            past_BD = torch.where(count_B1 > 0, sum_BD / count_B1.clamp(min=1), no_query_D)
            views[scenario] = torch.where(own_query_B1, inputs.query_BD, past_BD)
        query_BSD = torch.stack(views, dim=1)
        scenario_BSE = scenario_embedding_SE.expand(num_rows, -1, -1)
        context_BSC = inputs.context_BC.unsqueeze(1).expand(-1, self.num_scenarios, -1)
        z_BSZ: Tensor = self.norm(self.project(torch.cat([scenario_BSE, query_BSD, context_BSC], dim=2)))
        return z_BSZ
