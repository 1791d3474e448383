"""IE, the S&R views user interest extractor: attention with weights generated from the trigger (method, section 3).

For X in {Q, K, V}: W_X^k = U_X S_X^k V_X,  S_X^k = I + reshape(A_X z_k + b_X)
i_k = sum_j softmax_j((W_Q^k t).(W_K^k h_j) / sqrt(d)) W_V^k h_j

W is never built. V_K h_j and V_V h_j are K numbers an event, the same for all views; U_K and S_K move to the query's
side, since (W_Q t).(U_K S_K v_j) = (S_K' U_K' W_Q t).v_j, and U_V S_V come after the sum over events. What a view adds
for an event is then one product of K numbers for its score and one for its value.

Shape letters: B rows, V views (events where the name says so), L longest row, Z trigger, H target and event vector,
K rank, P inner size of an over-parameterised product, D interest, O and I outer sizes, M masks (all events, and those
the twin sees).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from usr_ray.model.attention import masked_attention
from usr_ray.model.embedding import INIT_STD
from usr_ray.model.gather import pool_sum
from usr_ray.model.history import Events, Grid
from usr_ray.model.inputs import Inputs


class Product(nn.Module):
    """A linear map (O, I) trained as a product of two, without bias or activation in between."""

    def __init__(self, out_dim: int, inner_dim: int, in_dim: int) -> None:
        super().__init__()
        self.left_OP = nn.Parameter(torch.empty(out_dim, inner_dim))
        self.right_PI: nn.Parameter | None = nn.Parameter(torch.empty(inner_dim, in_dim))
        nn.init.xavier_uniform_(self.left_OP)
        nn.init.xavier_uniform_(self.right_PI)

    def forward(self) -> Tensor:
        """(O, I)."""
        return self.left_OP if self.right_PI is None else self.left_OP @ self.right_PI

    @torch.no_grad()
    def fold(self) -> None:
        """Keep only the product, as one parameter (O, I)."""
        self.left_OP = nn.Parameter(self())
        self.right_PI = None


class GeneratedCores(nn.Module):
    """reshape(A_X z_k + b_X) for Q, K and V: S_X^k less its identity, which `_apply` adds.

    A and b start at zero, so that all views start equal.
    """

    def __init__(self, trigger_dim: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.generate = nn.Linear(trigger_dim, 3 * rank * rank)
        nn.init.zeros_(self.generate.weight)
        nn.init.zeros_(self.generate.bias)

    def forward(self, trigger_BVZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q's, K's and V's, (B, V, K, K) each."""
        query, key, value = self.generate(trigger_BVZ).unflatten(-1, (3, self.rank, self.rank)).unbind(2)
        return query, key, value


class InterestExtractor(nn.Module):
    """Interest i_k of every view, (B, V, d). A row without events gets a learned vector, the same in all views."""

    def __init__(self, trigger_dim: int, event_dim: int, interest_dim: int, rank: int, inner_dim: int) -> None:
        super().__init__()
        self.rank = rank
        self.cores = GeneratedCores(trigger_dim, rank)
        self.outer = nn.ModuleDict({x: Product(interest_dim, inner_dim, rank) for x in "qkv"})
        self.inner = nn.ModuleDict({x: Product(rank, inner_dim, event_dim) for x in "qkv"})
        self.empty_D = nn.Parameter(torch.randn(interest_dim) * INIT_STD)
        self.output_dim = interest_dim

    def forward(
        self, inputs: Inputs, trigger_BVZ: Tensor, events: Events, grid: Grid, keep_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Interests (B, V, d), and those of the twin that sees only the events of `keep_BL` (None without it)."""
        query_core, key_core, value_core = self.cores(trigger_BVZ)
        # S_K' U_K' U_Q S_Q V_Q t: all that a score needs of the row and the view.
        inner_B1K = (inputs.target_BH @ self.inner["q"]().T).unsqueeze(1)
        query_BVK = _apply(query_core, inner_B1K) @ (self.outer["q"]().T @ self.outer["k"]())
        query_BVK = _apply(key_core.transpose(2, 3), query_BVK) / math.sqrt(self.output_dim)
        valid_BML = grid.valid_BL.unsqueeze(1)
        if keep_BL is not None:
            valid_BML = torch.stack([grid.valid_BL, keep_BL & grid.valid_BL], dim=1)
        read_BMVK = masked_attention(query_BVK, self._project_events(inputs, grid), valid_BML)
        interest_BMVD = _apply(value_core.unsqueeze(1), read_BMVK) @ self.outer["v"]().T
        has_events_B111 = (events.num_events_B > 0).view(-1, 1, 1, 1)
        interest_BMVD = torch.where(has_events_B111, interest_BMVD, self.empty_D.to(interest_BMVD.dtype))
        return interest_BMVD[:, 0], None if keep_BL is None else interest_BMVD[:, 1]

    def fold(self) -> None:
        """Multiply the over-parameterised products out, in place: the same outputs, fewer parameters, for serving."""
        for module in self.modules():
            if isinstance(module, Product):
                module.fold()

    def _project_events(self, inputs: Inputs, grid: Grid) -> Tensor:
        """[V_K h_j ; V_V h_j] of every event, (B, L, 2 K) with zeros on padding.

        h_j is a sum of rows, so the rows are projected, once each, and their projections summed.
        """
        inner_IH = torch.cat([self.inner["k"](), self.inner["v"]()])
        items_UD, queries_UD, kinds_NH = inputs.event_weights
        dim = items_UD.shape[1]
        projected = [items_UD @ inner_IH[:, :dim].T, queries_UD @ inner_IH[:, dim:].T, kinds_NH @ inner_IH.T]
        return pool_sum(projected, inputs.event_places, grid.slots).view(*grid.valid_BL.shape, 2 * self.rank)


def _apply(core: Tensor, vector: Tensor) -> Tensor:
    """(I + core) vector, (.., K). A sum of K products: K is too small for a batched matmul to pay."""
    return vector + (core * vector.unsqueeze(-2)).sum(-1)


class PooledHistory(nn.Module):
    """What stands in for i_k without IE: the mean of the events h_j, (B, H), the same in all views."""

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.empty_H = nn.Parameter(torch.randn(event_dim) * INIT_STD)
        self.output_dim = event_dim

    def forward(self, inputs: Inputs, events: Events) -> Tensor:
        """(B, H); a row without events gets a learned vector."""
        items, queries, kinds = inputs.event_places
        items_UD, queries_UD, kinds_NH = inputs.event_weights
        own = [pool_sum([items_UD], [items], events.rows), pool_sum([queries_UD], [queries], events.rows)]
        sum_BH = torch.cat(own, dim=1) + pool_sum([kinds_NH], [kinds], events.rows)
        count_B1 = events.num_events_B.unsqueeze(1)
        return torch.where(count_B1 > 0, sum_BH / count_B1.clamp(min=1), self.empty_H)
