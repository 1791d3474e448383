"""A row's own view beside all its views: what the backbone sees, and what the global heads see.

Shape letters: B rows, V views, X columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def own_and_all(views_BVX: Tensor, view_B: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(B, X): each row's own view; and every view by itself, (B, X) each.

    Args:
        views_BVX: cheapest where one view lies after the other in memory.
        view_B: int64, 0 <= view < V; None or a single view: the first is everybody's own.
    """
    if view_B is None or views_BVX.shape[1] == 1:
        views = views_BVX.unbind(1)
        return views[0], views
    own_BX, *all_BX = _OwnAndAll.apply(views_BVX.transpose(0, 1), view_B)  # type: ignore[no-untyped-call]
    return own_BX, tuple(all_BX)


class _OwnAndAll(torch.autograd.Function):
    """Autograd's own backward would fill the place of every view with zeros for the gradients of the own ones."""

    @staticmethod
    def forward(ctx: Any, views_VBX: Tensor, view_B: Tensor) -> tuple[Tensor, ...]:
        num_rows = views_VBX.shape[1]
        place_B = view_B * num_rows + torch.arange(num_rows, device=view_B.device)
        ctx.save_for_backward(place_B)
        return views_VBX.flatten(0, 1).index_select(0, place_B), *views_VBX.unbind(0)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_own_BX: Tensor, *grads_BX: Tensor) -> tuple[Tensor, None]:
        (place_B,) = ctx.saved_tensors
        grad_VBX = torch.stack(grads_BX)
        # No place comes twice, so the sums do not depend on their order on a GPU either.
        grad_VBX.flatten(0, 1).index_add_(0, place_B, grad_own_BX)
        return grad_VBX, None
