"""Attention of a few queries a row over short keys and values that lie side by side, under one or more masks.

The backward is written out because autograd's own would build the gradients of keys and values apart, the values'
once for each mask, and join them: three more passes over the largest tensor of a step.

Shape letters: B rows, V queries (views), L events, M masks, W = M * V, K size of a key and of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def masked_attention(query_BVK: Tensor, pairs_BLK: Tensor, valid_BML: Tensor) -> Tensor:
    """sum_j softmax_j(query . key_j) value_j over the events each mask lets through, (B, M, V, K), at least float32.

    Args:
        query_BVK: already scaled.
        pairs_BLK: (B, L, 2 K), each event's key and then its value.
        valid_BML: bool; a row whose mask lets nothing through gives a number without meaning, never NaN.
    """
    dtype = torch.promote_types(query_BVK.dtype, torch.float32)
    with torch.autocast(query_BVK.device.type, enabled=False):
        read_BWK: Tensor = _MaskedAttention.apply(  # type: ignore[no-untyped-call]
            query_BVK.to(dtype), pairs_BLK.to(dtype), valid_BML
        )
    return read_BWK.unflatten(1, (valid_BML.shape[1], query_BVK.shape[1]))


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_BVK: Tensor, pairs_BLK: Tensor, valid_BML: Tensor) -> Tensor:
        key_BLK, value_BLK = pairs_BLK.split(query_BVK.shape[2], dim=2)
        score_B1VL = torch.bmm(query_BVK, key_BLK.transpose(1, 2)).unsqueeze(1)
        # A finite floor: a softmax over nothing but -inf would be NaN. Added, which is faster than to choose: beside it
        # a score is nothing.
        floor_BML = (~valid_BML).to(score_B1VL.dtype).mul_(torch.finfo(score_B1VL.dtype).min / 2)
        weight_BMVL = (score_B1VL + floor_BML.unsqueeze(2)).softmax(dim=3)
        ctx.save_for_backward(query_BVK, pairs_BLK, weight_BMVL)
        return torch.bmm(weight_BMVL.flatten(1, 2), value_BLK)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_BWK: Tensor) -> tuple[Tensor, Tensor, None]:
        query_BVK, pairs_BLK, weight_BMVL = ctx.saved_tensors
        num_queries, size = query_BVK.shape[1:]
        grad_BWK = grad_BWK.contiguous()
        key_BLK, value_BLK = pairs_BLK.split(size, dim=2)
        grad_weight_BMVL = torch.bmm(grad_BWK, value_BLK.transpose(1, 2)).view_as(weight_BMVL) * weight_BMVL
        grad_score_BMVL = torch.addcmul(grad_weight_BMVL, weight_BMVL, grad_weight_BMVL.sum(3, keepdim=True), value=-1)
        grad_score_BVL = grad_score_BMVL.sum(1)
        # d key = d score' query and d value = weight' d read, as one product.
        left_BXL = torch.cat([grad_score_BVL, weight_BMVL.flatten(1, 2)], dim=1)
        right_BXK = grad_BWK.new_zeros((*left_BXL.shape[:2], 2 * size))
        right_BXK[:, :num_queries, :size] = query_BVK
        right_BXK[:, num_queries:, size:] = grad_BWK
        return torch.bmm(grad_score_BVL, key_BLK), torch.bmm(left_BXL.transpose(1, 2), right_BXK), None
