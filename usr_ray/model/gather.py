"""Sums of gathered rows with a backward whose cost is one pass over the gradient.

torch's own backward of a gather of 200,000 rows adds them one at a time (25 ms on one core, one table); grouped by
row beforehand it is a segmented sum (1 ms), and the same order of additions every time, on a GPU as well.

Shape letters: U rows of a weight, V gathered places, C columns, G sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, slots=True)
class Places:
    """Which row of a weight each place takes, and for each row the places that take it."""

    index_V: Tensor
    """int64, 0 <= index < U."""
    order_V: Tensor
    """int64 permutation of the places that sorts them by row, ties by place."""
    starts_U: Tensor
    """int64: row u is taken by places order_V[starts_U[u]:starts_U[u + 1]]."""


def group_places(index_V: Tensor, num_rows: int) -> Places:
    """Places of an index into a weight of `num_rows` rows. The sort is stable, so the result is deterministic."""
    # Half the bytes is half the time of the sort.
    dtype = torch.int16 if num_rows < 2**15 else torch.int32 if num_rows < 2**31 else torch.int64
    order_V = torch.sort(index_V.to(dtype), stable=True).indices
    counts_U = torch.bincount(index_V, minlength=num_rows)
    return Places(index_V, order_V, counts_U.cumsum(0) - counts_U)


def gather_sum(weights: Sequence[Tensor], places: Sequence[Places]) -> Tensor:
    """(V, C): for each place the sum over the weights (U_i, C) of the row it takes of each."""
    tensors = [t for p in places for t in (p.index_V, p.order_V, p.starts_U)]
    gathered_VC: Tensor = _GatherSum.apply(len(weights), *weights, *tensors)  # type: ignore[no-untyped-call]
    return gathered_VC


def pool_sum(weights: Sequence[Tensor], places: Sequence[Places], starts_G: Tensor, group_V: Tensor) -> Tensor:
    """(G, C): `gather_sum` added up over the groups, without the (V, C) in between.

    Group g owns places starts_G[g]:starts_G[g + 1] and group_V names the group of each place (both int64). An empty
    group gives zeros.
    """
    tensors = [t for p in places for t in (p.index_V, p.order_V, p.starts_U)]
    pooled_GC: Tensor = _PoolSum.apply(len(weights), *weights, *tensors, starts_G, group_V)  # type: ignore[no-untyped-call]
    return pooled_GC


def _bag(index: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """Sum of rows[index] over consecutive segments; bfloat16 is added up in float32."""
    if rows.shape[0] == 0 or index.shape[0] == 0:
        return rows.new_zeros((starts.shape[0], rows.shape[1]))
    wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    return embedding_bag(index, wide.contiguous(), starts, mode="sum").to(rows.dtype)


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_weights: int, *tensors: Tensor) -> Tensor:
        weights, places = tensors[:num_weights], tensors[num_weights:]
        ctx.num_weights = num_weights
        ctx.save_for_backward(*places)
        total_VC = weights[0].index_select(0, places[0])
        for weight_UC, index_V in zip(weights[1:], places[3::3], strict=True):
            total_VC += weight_UC.index_select(0, index_V)
        return total_VC

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_VC: Tensor) -> tuple[Tensor | None, ...]:
        places = ctx.saved_tensors
        grads = [_bag(order, grad_VC, starts) for order, starts in zip(places[1::3], places[2::3], strict=True)]
        return (None, *grads, *[None] * len(places))


class _PoolSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_weights: int, *tensors: Tensor) -> Tensor:
        weights, places = tensors[:num_weights], tensors[num_weights:-2]
        starts_G, group_V = tensors[-2:]
        ctx.save_for_backward(*places, group_V)
        total_GC = _bag(places[0], weights[0], starts_G)
        for weight_UC, index_V in zip(weights[1:], places[3::3], strict=True):
            total_GC += _bag(index_V, weight_UC, starts_G)
        return total_GC

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_GC: Tensor) -> tuple[Tensor | None, ...]:
        *places, group_V = ctx.saved_tensors
        grads = [
            _bag(group_V.index_select(0, order), grad_GC, starts)
            for order, starts in zip(places[1::3], places[2::3], strict=True)
        ]
        return (None, *grads, *[None] * (len(places) + 2))
