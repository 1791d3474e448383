"""Two operations whose backward is written by hand, each beside its plain torch twin.

Both save at least 5 % of a whole training step of USR (docs/speed.md); others did not and were deleted.

- `pool_sum`: sums of gathered rows. torch's own backward of a gather adds the rows one at a time; grouped by row
  beforehand it is a segmented sum, with the same order of additions every time, on a GPU as well.
- `masked_attention`: torch's own backward builds the gradients of keys and values apart, the values' once for each
  mask, and joins them: three more passes over the largest tensor of a step.

`with plain():` switches them to their twins; torch.export always takes the twins.

Shape letters: U rows of a weight, V places (history events; queries, that is views, in attention), C columns, G groups
of places; B rows of the batch, R those of a share, L events, M masks, W = M * V, K size of a key and of a value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from usr_ray.data.batch import GroupShare

ALL = ("pool_sum", "masked_attention")
_plain: tuple[str, ...] = ()


@contextlib.contextmanager
def plain(*names: str) -> Iterator[None]:
    """Use the plain torch twins of the named operations (none: all) inside the block."""
    global _plain  # noqa: PLW0603
    before, _plain = _plain, names or ALL
    try:
        yield
    finally:
        _plain = before


def _is_plain(name: str) -> bool:
    return name in _plain or torch.compiler.is_exporting()


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


_RADIX, _WORTH_FILLING = 2**15, 2**13
"""torch sorts integers by radix on a CPU from so many on; and from how many it pays to fill up to that."""


def key_type(num_keys: int) -> torch.dtype:
    """Type to sort the keys 0..num_keys - 1 in: half the bytes take half the time."""
    return torch.int16 if num_keys < 2**15 else torch.int32 if num_keys < 2**31 else torch.int64


def stable_order(keys_V: Tensor, num_keys: int) -> Tensor:
    """int64 permutation that sorts integer keys, 0 <= key < `num_keys`; equal ones stay in their order."""
    keys_V, size = keys_V.to(key_type(num_keys)), keys_V.shape[0]
    if keys_V.is_cpu and _WORTH_FILLING <= size < _RADIX:
        keys_V = torch.cat([keys_V, keys_V.new_full((_RADIX - size,), torch.iinfo(keys_V.dtype).max)])
    return torch.sort(keys_V, stable=True).indices[:size]


def group_places(index_V: Tensor, num_rows: int, order_V: Tensor | None = None) -> Places:
    """Places of an index into a weight of `num_rows` rows. The sort is stable, so the result is deterministic.

    `order_V`: Places.order_V, where it is known.
    """
    if order_V is None:
        order_V = stable_order(index_V, num_rows)
    if index_V.is_cpu:
        counts_U = torch.bincount(index_V, minlength=num_rows)
    else:  # on a GPU bincount first waits for the largest index
        counts_U = index_V.new_zeros(num_rows).scatter_add_(0, index_V, torch.ones_like(index_V))
    return Places(index_V, order_V, counts_U.cumsum(0) - counts_U)


def pool_sum(weights: Sequence[Tensor], places: Sequence[Places], groups: Groups) -> Tensor:
    """(G, C): for each group the sum over its places and over the weights (U_i, C) of the row a place takes of each.

    No (V, C) tensor is built. An empty group gives zeros. bfloat16 rows give a float32 sum.
    """
    if _is_plain("pool_sum"):
        return plain_pool_sum(weights, places, groups)
    tensors = [t for p in places for t in (p.index_V, p.order_V, p.starts_U)]
    pooled_GC: Tensor = _PoolSum.apply(  # type: ignore[no-untyped-call]
        len(weights), *weights, *tensors, groups.group_V, groups.order_V, groups.starts_G
    )
    return pooled_GC


def plain_pool_sum(weights: Sequence[Tensor], places: Sequence[Places], groups: Groups) -> Tensor:
    """`pool_sum` by gathers and an index_add."""
    rows_VC = torch.stack([w[p.index_V] for w, p in zip(weights, places, strict=True)]).sum(0)
    rows_VC = rows_VC.to(torch.promote_types(rows_VC.dtype, torch.float32))
    return rows_VC.new_zeros((groups.starts_G.shape[0], rows_VC.shape[1])).index_add(0, groups.group_V, rows_VC)


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


def masked_attention(
    query_BVK: Tensor,
    pairs_BLK: Tensor,
    valid_BML: Tensor,
    share: GroupShare | None = None,
    kept_RL: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """sum_j softmax_j(query . key_j) value_j over the events each mask lets through, at least float32.

    Args:
        query_BVK: already scaled.
        pairs_BLK: (B, L, 2 K), each event's key and then its value.
        valid_BML: bool; a row whose mask is all false gives an arbitrary finite number, never NaN.
        share: R rows that are read once more; None: none are.
        kept_RL: bool; the mask of the R rows of `share`.

    Returns:
        (B, M, V, K), and (R, V, K) where there is a share.
    """
    dtype = torch.promote_types(query_BVK.dtype, torch.float32)
    query_BVK, pairs_BLK = query_BVK.to(dtype), pairs_BLK.to(dtype)
    if _is_plain("masked_attention"):
        return plain_masked_attention(query_BVK, pairs_BLK, valid_BML, share, kept_RL)
    with torch.autocast(query_BVK.device.type, enabled=False):
        read_BWK, read_RVK = _MaskedAttention.apply(  # type: ignore[no-untyped-call]
            query_BVK, pairs_BLK, valid_BML, share, kept_RL
        )
    return read_BWK.unflatten(1, (valid_BML.shape[1], query_BVK.shape[1])), read_RVK


def plain_masked_attention(
    query_BVK: Tensor, pairs_BLK: Tensor, valid_BML: Tensor, share: GroupShare | None, kept_RL: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`masked_attention` by autograd."""
    key_BLK, value_BLK = pairs_BLK.chunk(2, dim=2)
    score_BVL = torch.bmm(query_BVK, key_BLK.transpose(1, 2))
    read_BMVK = torch.matmul(_softmax(score_BVL, valid_BML), value_BLK.unsqueeze(1))
    if share is None or kept_RL is None:
        return read_BMVK, None
    weight_RVL = _softmax(share.of(score_BVL), kept_RL.unsqueeze(1)).squeeze(1)
    return read_BMVK, torch.bmm(weight_RVL, share.of(value_BLK))


def _softmax(score_BVL: Tensor, valid_BML: Tensor) -> Tensor:
    """Weights of the events each mask lets through, (B, M, V, L)."""
    # A finite floor: a softmax over nothing but -inf would be NaN. Adding is faster than selecting: next to it
    # a score vanishes.
    floor_BML = (~valid_BML).to(score_BVL.dtype) * (torch.finfo(score_BVL.dtype).min / 2)
    return (score_BVL.unsqueeze(1) + floor_BML.unsqueeze(2)).softmax(dim=3)


def _softmax_gradient(weight: Tensor, grad_weight: Tensor) -> Tensor:
    """Gradient of the scores, over the last dimension: in one pass, as torch's own softmax takes it."""
    return torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BVK: Tensor,
        pairs_BLK: Tensor,
        valid_BML: Tensor,
        share: GroupShare | None,
        kept_RL: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        key_BLK, value_BLK = pairs_BLK.split(query_BVK.shape[2], dim=2)
        score_BVL = torch.bmm(query_BVK, key_BLK.transpose(1, 2))
        weight_BMVL = _softmax(score_BVL, valid_BML)
        ctx.share = share
        read_BWK = torch.bmm(weight_BMVL.flatten(1, 2), value_BLK)
        if share is None or kept_RL is None:
            ctx.save_for_backward(query_BVK, pairs_BLK, weight_BMVL)
            return read_BWK, None
        weight_RVL = _softmax(share.of(score_BVL), kept_RL.unsqueeze(1)).squeeze(1)
        value_RLK = share.of(value_BLK)
        ctx.save_for_backward(query_BVK, pairs_BLK, weight_BMVL, weight_RVL, value_RLK)
        return read_BWK, torch.bmm(weight_RVL, value_RLK)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_BWK: Tensor, grad_RVK: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query_BVK, pairs_BLK, weight_BMVL, *of_share = ctx.saved_tensors
        num_queries, size = query_BVK.shape[1:]
        grad_BWK = grad_BWK.contiguous()
        key_BLK, value_BLK = pairs_BLK.split(size, dim=2)
        grad_weight_BWL = torch.bmm(grad_BWK, value_BLK.transpose(1, 2))
        grad_score_BMVL = _softmax_gradient(weight_BMVL, grad_weight_BWL.view_as(weight_BMVL))
        # A sum over one mask would be a copy.
        grad_score_BVL = grad_score_BMVL.squeeze(1) if grad_score_BMVL.shape[1] == 1 else grad_score_BMVL.sum(1)
        if of_share:
            weight_RVL, value_RLK = of_share
            grad_RVK = grad_RVK.contiguous()
            grad_RVL = _softmax_gradient(weight_RVL, torch.bmm(grad_RVK, value_RLK.transpose(1, 2)))
            found = ctx.share.view(grad_score_BVL)
            found += grad_RVL.view_as(found)
        # d key = d score' query and d value = weight' d read, as one product.
        left_BXL = torch.cat([grad_score_BVL, weight_BMVL.flatten(1, 2)], dim=1)
        right_BXK = grad_BWK.new_zeros((*left_BXL.shape[:2], 2 * size))
        right_BXK[:, :num_queries, :size] = query_BVK
        right_BXK[:, num_queries:, size:] = grad_BWK
        grad_pairs_BLK = torch.bmm(left_BXL.transpose(1, 2), right_BXK)
        if of_share:
            grad_value_RLK = torch.bmm(weight_RVL.transpose(1, 2), grad_RVK)
            found = ctx.share.view(grad_pairs_BLK)[..., size:]
            found += grad_value_RLK.view_as(found)
        return torch.bmm(grad_score_BVL, key_BLK), grad_pairs_BLK, None, None, None
