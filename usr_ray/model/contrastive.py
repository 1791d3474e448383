"""Contrastive learning over views: which events and features a twin sees, the loss, and the collapse alarm.

"Vectors of one view are positives" alone is solved by one constant vector a view. Here the positive of a vector is a
masked twin of the same row and view, and the negatives are the vectors of the other views in the same group of rows,
its own row's among them (method, section 3):

L = -log( exp(cos(v, twin) / tau) / (exp(cos(v, twin) / tau) + sum_n exp(cos(v, n) / tau)) )

Groups are consecutive rows of fixed size and masks depend on the row and the step alone, so the loss is the same for
every number of workers.

Shape letters: B rows, S views, D vector, V events, F features, C columns, N groups, G rows of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from usr_ray.model.counter_random import hash_keys, to_uniform
from usr_ray.model.history import Events

_EVENT_STREAM, _FEATURE_STREAM = 1, 2
_NORM_FLOOR = 1e-6
"""Added to norms, so that the gradient of a zero vector is finite."""
_LARGEST_SCORE = 60
"""e^60 added up over a group is a float32."""


def _row_keys(row_number_B: Tensor, step_seed: int | Tensor, stream: int) -> Tensor:
    # A fill, not a copy of a number from the host, which a GPU's queue would be waited for.
    start = torch.full((), stream, dtype=torch.int64, device=row_number_B.device)
    step = hash_keys(hash_keys(start, step_seed), 0)
    return hash_keys(step, row_number_B)


def event_mask(events: Events, row_number_B: Tensor, step_seed: int | Tensor, rate: float) -> Tensor:
    """Bool (V): the events a twin sees, each dropped with probability `rate`; the newest of a history always stays."""
    num_scenarios = events.lengths_SB.shape[0]
    scenario_S1 = torch.arange(num_scenarios, device=row_number_B.device).unsqueeze(1)
    keys_SB = hash_keys(_row_keys(row_number_B, step_seed, _EVENT_STREAM), scenario_S1)
    uniform_V = to_uniform(hash_keys(keys_SB.flatten()[events.history_V], events.from_newest_V))
    return (uniform_V >= rate) | (events.from_newest_V == 0)


def feature_mask(widths: Sequence[int], row_number_B: Tensor, step_seed: int | Tensor, rate: float) -> Tensor:
    """Float32 (B, C): 1 for the columns of f a twin sees, else 0; a feature's `widths[i]` columns stay or go together.

    Numbers to multiply by, not bool: a product of both kinds takes three times as long.
    """
    keys_B1 = _row_keys(row_number_B, step_seed, _FEATURE_STREAM).unsqueeze(1)
    features_F = torch.arange(len(widths), device=row_number_B.device)
    keep_BF = (to_uniform(hash_keys(keys_B1, features_F)) >= rate).float()
    return torch.cat([k_B1.expand(-1, width) for k_B1, width in zip(keep_BF.split(1, 1), widths, strict=True)], dim=1)


def contrastive_sums(
    vectors_BSD: Tensor,
    twins_BSD: Tensor | None,
    valid_B: Tensor,
    counted_B: Tensor,
    *,
    group_size: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The loss added up over all valid (row, view), and the collapse alarm of each view added up over counted rows.

    The alarm is the total variance of a group's unit vectors, 1 - |mean|^2: 0 when all rows have one vector, near 1
    when they point everywhere. It counts once for each counted row of the group.

    Args:
        vectors_BSD: i_k or f_k of every view.
        twins_BSD: their masked twins; None: no loss, zero. Needs S >= 2.
        valid_B: bool; other rows are neither anchors nor negatives, nor part of the variance.
        counted_B: bool; rows over which the caller takes the mean.
        group_size: G; row b belongs to group b // G.
        temperature: tau.

    Returns:
        A scalar, and (S) without a gradient; float32 (float64 for float64 vectors).
    """
    vectors_NGSD = _groups(vectors_BSD, group_size)
    valid_NG, counted_NG = (_fill(flag_B, group_size).unflatten(0, (-1, group_size)) for flag_B in (valid_B, counted_B))
    if twins_BSD is None:
        scale_NGS = _scale(vectors_NGSD.detach())[1]
        loss = scale_NGS.new_zeros(())
    else:
        loss_NGS, scale_NGS = _Contrast.apply(  # type: ignore[no-untyped-call]
            vectors_NGSD, _groups(twins_BSD, group_size), valid_NG, temperature
        )
        loss = loss_NGS.sum()
    return loss, _variance_sums(vectors_NGSD.detach(), scale_NGS, valid_NG, counted_NG)


def _scale(vectors_NGSD: Tensor) -> tuple[Tensor, Tensor]:
    """|v|, and the factor 1 / (|v| + floor) that makes v a unit vector; (N, G, S) each."""
    norm_NGS = torch.linalg.vector_norm(vectors_NGSD, dim=3)
    return norm_NGS, 1 / (norm_NGS + _NORM_FLOOR)


class _Contrast(torch.autograd.Function):
    """The loss of every (row, view), (N, G, S), zero for rows that are not valid; and the factors of `_scale`.

    A cosine is v.n times both vectors' factors, so unit vectors are never built, and the backward is written out: with
    g the gradient of v at fixed factors, dv = g - v (g.v) factor / |v|, and g.v is a sum over the dots kept.
    Autograd's own passes over the widest tensors of a step three times as often.
    """

    @staticmethod
    def forward(
        ctx: Any, vectors_NGSD: Tensor, twins_NGSD: Tensor, valid_NG: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        norm_NGS, scale_NGS = _scale(vectors_NGSD)
        twin_norm_NGS, twin_scale_NGS = _scale(twins_NGSD)
        dot_NGS = (vectors_NGSD * twins_NGSD).sum(3)
        # Scores lie in [-1 / tau, 1 / tau], so their exponentials need no shift where the type can hold the largest.
        dtype = scale_NGS.dtype if 1 / temperature < _LARGEST_SCORE else torch.float64
        valid_NG1 = valid_NG.to(dtype).unsqueeze(2)
        views, scales = vectors_NGSD.unbind(2), scale_NGS.unbind(2)
        totals = [torch.zeros_like(valid_NG1)] * len(views)
        kept: list[Tensor] = []
        # Row g, column h of a pair's matrix serves anchor g of one view and anchor h of the other.
        for one, other in itertools.combinations(range(len(views)), 2):
            dots_NGG = torch.bmm(views[one], views[other].transpose(1, 2))
            score_NGG = dots_NGG * (scales[one] / temperature).unsqueeze(2)
            weight_NGG = score_NGG.mul_(scales[other].unsqueeze(1)).to(dtype).exp_()
            totals[one] = totals[one] + torch.bmm(weight_NGG, valid_NG1)
            totals[other] = totals[other] + torch.bmm(valid_NG1.transpose(1, 2), weight_NGG).transpose(1, 2)
            kept += [dots_NGG, weight_NGG]
        # An invalid row may have no negatives at all; its result is a number too, dropped at the end.
        total_NGS = torch.cat(totals, dim=2).clamp_(min=torch.finfo(dtype).tiny)
        margin_NGS = total_NGS.log().to(scale_NGS.dtype) - dot_NGS * scale_NGS * twin_scale_NGS / temperature
        ctx.save_for_backward(
            vectors_NGSD,
            twins_NGSD,
            valid_NG1,
            norm_NGS,
            scale_NGS,
            twin_norm_NGS,
            twin_scale_NGS,
            dot_NGS,
            margin_NGS,
            total_NGS,
            *kept,
        )
        ctx.temperature = temperature
        ctx.mark_non_differentiable(scale_NGS)
        return softplus(margin_NGS) * valid_NG1.to(margin_NGS.dtype), scale_NGS

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_NGS: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (
            vectors_NGSD,
            twins_NGSD,
            valid_NG1,
            norm_NGS,
            scale_NGS,
            twin_norm_NGS,
            twin_scale_NGS,
            dot_NGS,
            margin_NGS,
            total_NGS,
            *kept,
        ) = ctx.saved_tensors
        pull_NGS = grad_NGS * torch.sigmoid(margin_NGS) * valid_NG1.to(margin_NGS.dtype)
        push_NGS = -pull_NGS * scale_NGS * twin_scale_NGS / ctx.temperature
        grad_twins_NGSD = vectors_NGSD * push_NGS.unsqueeze(3)
        pushed_NGS = push_NGS * dot_NGS
        along_NGS = pushed_NGS * _per_norm(twin_scale_NGS, twin_norm_NGS)
        grad_twins_NGSD.addcmul_(twins_NGSD, along_NGS.unsqueeze(3), value=-1)
        grad_NGSD = twins_NGSD * push_NGS.unsqueeze(3)
        views, scales, grads = vectors_NGSD.unbind(2), scale_NGS.unbind(2), grad_NGSD.unbind(2)
        along = list(pushed_NGS.unbind(2))
        shares = (pull_NGS / total_NGS).split(1, dim=2)
        matrices = iter(kept)
        for one, other in itertools.combinations(range(len(views)), 2):
            dots_NGG, weight_NGG = next(matrices), next(matrices)
            # share of g's anchor for each valid h, and of h's anchor for each valid g: one product of rank two.
            left_NG2 = torch.cat([shares[one], valid_NG1], dim=2)
            right_NG2 = torch.cat([valid_NG1, shares[other]], dim=2)
            grad_NGG = torch.bmm(left_NG2, right_NG2.transpose(1, 2)).mul_(weight_NGG).to(dots_NGG.dtype)
            grad_NGG.mul_((scales[one] / ctx.temperature).unsqueeze(2)).mul_(scales[other].unsqueeze(1))
            grads[one].baddbmm_(grad_NGG, views[other])
            grads[other].baddbmm_(grad_NGG.transpose(1, 2), views[one])
            grad_NGG.mul_(dots_NGG)
            along[one], along[other] = along[one] + grad_NGG.sum(2), along[other] + grad_NGG.sum(1)
        along_NGS = torch.stack(along, dim=2) * _per_norm(scale_NGS, norm_NGS)
        return grad_NGSD.addcmul_(vectors_NGSD, along_NGS.unsqueeze(3), value=-1), grad_twins_NGSD, None, None


def _per_norm(scale_NGS: Tensor, norm_NGS: Tensor) -> Tensor:
    """The factor over the norm, 0 at v = 0."""
    return torch.where(norm_NGS > 0, scale_NGS / norm_NGS.clamp(min=torch.finfo(norm_NGS.dtype).tiny), 0)


def _fill(values: Tensor, group_size: int) -> Tensor:
    """Rows of zeros at the end until the last group is full."""
    num_missing = -values.shape[0] % group_size
    return torch.cat([values, values.new_zeros((num_missing, *values.shape[1:]))]) if num_missing else values


def _groups(values_BSD: Tensor, group_size: int) -> Tensor:
    """(N, G, S, D), at least float32, the last group filled up with zeros."""
    values_BSD = values_BSD.to(torch.promote_types(values_BSD.dtype, torch.float32))
    return _fill(values_BSD, group_size).unflatten(0, (-1, group_size))


def _variance_sums(vectors_NGSD: Tensor, scale_NGS: Tensor, valid_NG: Tensor, counted_NG: Tensor) -> Tensor:
    count_N = valid_NG.to(scale_NGS.dtype).sum(1)
    weight_NGS = torch.where(valid_NG.unsqueeze(2), scale_NGS, 0)
    views = zip(vectors_NGSD.unbind(2), weight_NGS.unbind(2), strict=True)
    sum_NSD = torch.cat([torch.bmm(weight_NG.unsqueeze(1), view_NGD) for view_NGD, weight_NG in views], dim=1)
    mean_NSD = sum_NSD / count_N.clamp(min=1).view(-1, 1, 1)
    variance_NS = torch.where(count_N.unsqueeze(1) > 0, 1 - mean_NSD.square().sum(2), 0)
    return (variance_NS * counted_NG.sum(1).unsqueeze(1)).sum(0)
