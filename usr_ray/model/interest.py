"""IE, the S&R views user interest extractor: attention with weights generated from the trigger (method, section 3).

For X in {Q, K, V}: W_X^k = U_X S_X^k V_X,  S_X^k = I + reshape(A_X z_k + b_X)
i_k = sum_j softmax_j((W_Q^k t).(W_K^k h_j) / sqrt(d)) W_V^k h_j

W is never built. V_K h_j and V_V h_j are K numbers per event, the same for all views; U_K and S_K move to the query's
side, since (W_Q t).(U_K S_K v_j) = (S_K' U_K' W_Q t).v_j, and U_V S_V come after the sum over events. What a view adds
for an event is then one product of K numbers for its score and one for its value.

What depends on the view has its rows last, (K, K, V, B): K is 8, and loops over 8 numbers are the slow ones.

Shape letters: B rows, R those with a twin, V views (events where the name says so), L longest row, Z trigger, H target
and event vector, K rank, P inner size of an over-parameterised product, D interest, O and I outer sizes, M masks (all
events, and where all rows have a twin those it sees).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from usr_ray.data.batch import GroupShare
from usr_ray.model.embedding import INIT_STD
from usr_ray.model.history import Histories
from usr_ray.model.inputs import Inputs
from usr_ray.model.ops import masked_attention


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
        """Q's, K's and V's, (K, K, V, B) each."""
        num_rows, num_views, _ = trigger_BVZ.shape
        trigger_ZN = trigger_BVZ.transpose(0, 1).flatten(0, 1).T
        cores = torch.addmm(self.generate.bias.unsqueeze(1), self.generate.weight, trigger_ZN)
        query, key, value = cores.view(3, self.rank, self.rank, num_views, num_rows).unbind(0)
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
        self,
        inputs: Inputs,
        trigger_BVZ: Tensor,
        keep_RL: Tensor | None = None,
        share: GroupShare | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Interests (B, V, d), and (R, V, d) of the twins that see only the events of `keep_RL` (None without it).

        `share`: the rows that have a twin; None: all.
        """
        query_core, key_core, value_core = self.cores(trigger_BVZ)
        # S_K' U_K' U_Q S_Q V_Q t: all that a score needs of the row and the view.
        inner_K1B = (self.inner["q"]() @ inputs.target_BH.T).unsqueeze(1)
        query_KVB = _apply(query_core, inner_K1B)
        query_KVB = ((self.outer["k"]().T @ self.outer["q"]()) @ query_KVB.flatten(1)).view_as(query_KVB)
        query_KVB = _apply(key_core.transpose(0, 1), query_KVB) / math.sqrt(self.output_dim)
        # h_j is a sum of rows, so rows are projected and their projections summed: [V_K h_j ; V_V h_j].
        pairs_BLK, valid_BL = inputs.histories.project(torch.cat([self.inner["k"](), self.inner["v"]()]))
        valid_BML, kept_RL = valid_BL.unsqueeze(1), None
        if keep_RL is not None and share is not None:
            kept_RL = keep_RL & share.of(valid_BL)
        elif keep_RL is not None:  # one more mask for all rows
            valid_BML = torch.stack([valid_BL, keep_RL & valid_BL], dim=1)
        query_BVK = query_KVB.permute(2, 1, 0).contiguous()
        if pairs_BLK.shape[0] == query_BVK.shape[0]:
            read_BMVK, read_RVK = masked_attention(query_BVK, pairs_BLK, valid_BML, share, kept_RL)
        else:  # the candidates of a request read one history: they are further queries to it, as the views are
            read_1MWK, read_RVK = masked_attention(query_BVK.flatten(0, 1).unsqueeze(0), pairs_BLK, valid_BML)
            read_BMVK = read_1MWK.squeeze(0).unflatten(1, query_BVK.shape[:2]).transpose(0, 1)
        outer_DK, has_events_B1 = self.outer["v"](), (inputs.histories.num_events_B > 0).unsqueeze(1)
        seen = self._interests(value_core, read_BMVK, outer_DK, has_events_B1).unbind(0)
        if read_RVK is not None and share is not None:
            core, has_events_R1 = share.of(value_core, dim=3), share.of(has_events_B1)
            return seen[0], self._interests(core, read_RVK.unsqueeze(1), outer_DK, has_events_R1).squeeze(0)
        return seen[0], None if keep_RL is None else seen[1]

    def _interests(self, value_core: Tensor, read_BMVK: Tensor, outer_DK: Tensor, has_events_B1: Tensor) -> Tensor:
        """U_V S_V of what was read, (M, B, V, d)."""
        inner_KMVB = _apply(value_core.unsqueeze(2), read_BMVK.permute(3, 1, 2, 0).contiguous())
        interest_MVBD = (inner_KMVB.flatten(1).T @ outer_DK.T).unflatten(0, inner_KMVB.shape[1:])
        interest_MVBD = torch.where(has_events_B1, interest_MVBD, self.empty_D.to(interest_MVBD.dtype))
        return interest_MVBD.transpose(1, 2)

    def fold(self) -> None:
        """Multiply the over-parameterised products out, in place: the same outputs, fewer parameters, for serving."""
        for module in self.modules():
            if isinstance(module, Product):
                module.fold()


def _apply(core: Tensor, vector: Tensor) -> Tensor:
    """(I + core) vector of every row: (K, K, ..., B) and (K, ..., B); the dimensions between broadcast."""
    return (core * vector).sum(1) + vector


class PooledHistory(nn.Module):
    """What replaces i_k without IE: the mean of the events h_j, (B, H), the same in all views."""

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.empty_H = nn.Parameter(torch.randn(event_dim) * INIT_STD)
        self.output_dim = event_dim

    def forward(self, histories: Histories) -> Tensor:
        """(B, H); a row without events gets a learned vector."""
        count_B1 = histories.num_events_B.unsqueeze(1)
        return torch.where(count_B1 > 0, histories.event_sum() / count_B1.clamp(min=1), self.empty_H)
