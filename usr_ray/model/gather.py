"""Sums of gathered rows with a backward whose cost is one pass over the gradient.

torch's own backward of a gather of 200,000 rows adds them one at a time (25 ms on one core, one table); grouped by
row beforehand it is a segmented sum (1 ms), and the same order of additions every time, on a GPU as well.

Shape letters: U rows of a weight, V places (history events), C columns, G groups of places, B rows of the batch,
F features, D embedding, M = F * D.
"""

from __future__ import annotations

import itertools
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


@dataclass(frozen=True, slots=True)
class Groups:
    """Which places are added up."""

    group_V: Tensor
    """int64, the group of each place."""
    order_V: Tensor
    """int64 permutation of the places that puts those of one group side by side, groups ascending."""
    starts_G: Tensor
    """int64: group g is places order_V[starts_G[g]:starts_G[g + 1]]; it may be empty."""


@dataclass(frozen=True, slots=True)
class ColumnOrder:
    """Which values of a batch's features take each row of their weights; value b * F + f is row b's of feature f."""

    order_V: Tensor
    """int64 permutation of the B * F values that sorts them by weight, then by row of it, ties by value."""
    starts_U: Tensor
    """int64: row u of all weights laid end to end is taken by values order_V[starts_U[u]:starts_U[u + 1]]."""


def column_starts(columns: Sequence[tuple[Tensor, int]]) -> Tensor:
    """ColumnOrder.starts_U, of the row (B) that each value of a feature takes of its weight and the weight's rows."""
    first_rows = [0, *itertools.accumulate(size for _, size in columns)]
    index_V = torch.cat([c_B + first for (c_B, _), first in zip(columns, first_rows, strict=False)])
    return _starts(index_V, first_rows[-1])


def take_columns(
    weights: Sequence[Tensor], columns: Sequence[Tensor], order: ColumnOrder
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(B, F D): the rows that the features take of their weights (U_f, D), side by side; and (B, D) of each feature."""
    block_BM, *alone = _TakeColumns.apply(  # type: ignore[no-untyped-call]
        len(weights), *weights, *columns, order.order_V, order.starts_U
    )
    return block_BM, tuple(alone)


def group_places(index_V: Tensor, num_rows: int) -> Places:
    """Places of an index into a weight of `num_rows` rows. The sort is stable, so the result is deterministic."""
    # Half the bytes is half the time of the sort.
    dtype = torch.int16 if num_rows < 2**15 else torch.int32 if num_rows < 2**31 else torch.int64
    return Places(index_V, torch.sort(index_V.to(dtype), stable=True).indices, _starts(index_V, num_rows))


def _starts(index_V: Tensor, num_rows: int) -> Tensor:
    """int64 (U): how many places take a row before this one."""
    if index_V.is_cpu:
        counts_U = torch.bincount(index_V, minlength=num_rows)
    else:  # on a GPU bincount first waits for the largest index
        counts_U = index_V.new_zeros(num_rows).scatter_add_(0, index_V, torch.ones_like(index_V))
    return counts_U.cumsum(0) - counts_U


def pool_sum(weights: Sequence[Tensor], places: Sequence[Places], groups: Groups) -> Tensor:
    """(G, C): for each group the sum over its places and over the weights (U_i, C) of the row a place takes of each.

    No (V, C) tensor is built. An empty group gives zeros. bfloat16 rows give a float32 sum.
    """
    tensors = [t for p in places for t in (p.index_V, p.order_V, p.starts_U)]
    pooled_GC: Tensor = _PoolSum.apply(  # type: ignore[no-untyped-call]
        len(weights), *weights, *tensors, groups.group_V, groups.order_V, groups.starts_G
    )
    return pooled_GC


def _bag(index: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """Sum of rows[index] over consecutive segments, at least float32."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if rows.shape[0] == 0 or index.shape[0] == 0:
        return rows.new_zeros((starts.shape[0], rows.shape[1]))
    return embedding_bag(index, rows.contiguous(), starts, mode="sum")


class _PoolSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_weights: int, *tensors: Tensor) -> Tensor:
        weights, places, (group_V, order_V, starts_G) = tensors[:num_weights], tensors[num_weights:-3], tensors[-3:]
        ctx.save_for_backward(group_V, *places[1::3], *places[2::3])
        ctx.num_inputs, ctx.dtypes = len(tensors), [w.dtype for w in weights]
        # One pass over all weights: a group's rows of each, one after the other.
        first_row, indices = 0, []
        for weight_UC, index_V in zip(weights, places[::3], strict=True):
            indices.append(index_V.index_select(0, order_V).add_(first_row))
            first_row += weight_UC.shape[0]
        if num_weights == 1:
            return _bag(indices[0], weights[0], starts_G)
        return _bag(torch.stack(indices, dim=1).flatten(), torch.cat(weights), starts_G * num_weights)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_GC: Tensor) -> tuple[Tensor | None, ...]:
        group_V, *rest = ctx.saved_tensors
        half = len(rest) // 2
        grads = [
            _bag(group_V.index_select(0, order_V), grad_GC, starts_U).to(dtype)
            for order_V, starts_U, dtype in zip(rest[:half], rest[half:], ctx.dtypes, strict=True)
        ]
        return (None, *grads, *[None] * (ctx.num_inputs - len(grads)))


class _TakeColumns(torch.autograd.Function):
    """One segmented sum for the gradients of all features' rows."""

    @staticmethod
    def forward(ctx: Any, num_weights: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, columns = tensors[:num_weights], tensors[num_weights:-2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[-2:])
        ctx.sizes = [weight_UD.shape[0] for weight_UD in weights]
        alone = [weight_UD.index_select(0, c_B) for weight_UD, c_B in zip(weights, columns, strict=True)]
        return torch.cat(alone, dim=1), *alone

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        order_V, starts_U = ctx.saved_tensors
        num_weights = len(ctx.sizes)
        grad_block_BM, *alone = grads
        some = next((g for g in alone if g is not None), None)
        if grad_block_BM is not None:
            grad_BFD = grad_block_BM.clone(memory_format=torch.contiguous_format).unflatten(1, (num_weights, -1))
        elif some is not None:
            grad_BFD = some.new_zeros((some.shape[0], num_weights, some.shape[1]))
        else:
            return (None,) * (3 + 2 * num_weights)
        for grad_FD, grad_BD in zip(grad_BFD.unbind(1), alone, strict=True):
            if grad_BD is not None:
                grad_FD.add_(grad_BD)
        grads_UD = _bag(order_V, grad_BFD.flatten(0, 1), starts_U).split(ctx.sizes)
        return None, *grads_UD, *[None] * (num_weights + 2)
