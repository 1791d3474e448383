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
_EXCLUDED = -1e30
"""Score of what is no negative; its exponential is 0."""


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
    """Bool (B, C): the columns of f a twin sees; a feature's `widths[i]` columns stay or go together."""
    keys_B1 = _row_keys(row_number_B, step_seed, _FEATURE_STREAM).unsqueeze(1)
    features_F = torch.arange(len(widths), device=row_number_B.device)
    keep_BF = to_uniform(hash_keys(keys_B1, features_F)) >= rate
    return torch.cat([k_B1.expand(-1, width) for k_B1, width in zip(keep_BF.split(1, 1), widths, strict=True)], dim=1)


def contrastive_sums(
    vectors_BSD: Tensor, twins_BSD: Tensor | None, valid_B: Tensor, counted_B: Tensor, *, group_size: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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
    unit_SNGD = _groups(_unit(vectors_BSD), group_size)
    valid_NG, counted_NG = (_fill(flag_B, group_size).unflatten(0, (-1, group_size)) for flag_B in (valid_B, counted_B))
    variance_S = _variance_sums(unit_SNGD.detach(), valid_NG, counted_NG)
    if twins_BSD is None:
        return torch.zeros_like(variance_S[0]), variance_S
    positive_SNG = (unit_SNGD * _groups(_unit(twins_BSD), group_size)).sum(3) / temperature
    loss_SNG = softplus(_negatives(unit_SNGD, valid_NG, temperature) - positive_SNG)
    return torch.where(valid_NG, loss_SNG, 0).sum(), variance_S


def _unit(vectors_BSD: Tensor) -> Tensor:
    unit_BSD: Tensor = _Unit.apply(  # type: ignore[no-untyped-call]
        vectors_BSD.to(torch.promote_types(vectors_BSD.dtype, torch.float32))
    )
    return unit_BSD


class _Unit(torch.autograd.Function):
    """v / (|v| + floor). Autograd's own backward takes nine passes over the widest tensors of a step, this one four.

    With u the result, s = 1 / (|v| + floor) and g its gradient: dv = s (g - u (g.u) (|v| + floor) / |v|), and s g at 0.
    """

    @staticmethod
    def forward(ctx: Any, vectors_BSD: Tensor) -> Tensor:
        norm_BS1 = torch.linalg.vector_norm(vectors_BSD, dim=2, keepdim=True)
        unit_BSD = vectors_BSD / (norm_BS1 + _NORM_FLOOR)
        ctx.save_for_backward(unit_BSD, norm_BS1)
        return unit_BSD

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_BSD: Tensor) -> Tensor:
        unit_BSD, norm_BS1 = ctx.saved_tensors
        along_BS1 = (grad_BSD * unit_BSD).sum(2, keepdim=True)
        along_BS1 *= (norm_BS1 + _NORM_FLOOR) / norm_BS1.clamp(min=torch.finfo(norm_BS1.dtype).tiny)
        # At v = 0 the factor is infinite and the product with it is not used.
        along_BS1 = torch.where(norm_BS1 > 0, along_BS1, 0)
        return torch.addcmul(grad_BSD, unit_BSD, along_BS1, value=-1).div_(norm_BS1 + _NORM_FLOOR)


def _fill(values: Tensor, group_size: int) -> Tensor:
    """Rows of zeros at the end until the last group is full."""
    num_missing = -values.shape[0] % group_size
    return torch.cat([values, values.new_zeros((num_missing, *values.shape[1:]))]) if num_missing else values


def _groups(values_BSD: Tensor, group_size: int) -> Tensor:
    """(S, N, G, D), the last group filled up with zeros."""
    return _fill(values_BSD, group_size).transpose(0, 1).unflatten(1, (-1, group_size))


def _variance_sums(unit_SNGD: Tensor, valid_NG: Tensor, counted_NG: Tensor) -> Tensor:
    weight_N1G = valid_NG.unsqueeze(1).to(unit_SNGD.dtype)
    count_N = weight_N1G.sum((1, 2))
    mean_SND = (weight_N1G @ unit_SNGD).squeeze(2) / count_N.clamp(min=1).unsqueeze(1)
    variance_SN = torch.where(count_N > 0, 1 - mean_SND.square().sum(2), 0)
    return (variance_SN * counted_NG.sum(1)).sum(1)


def _negatives(unit_SNGD: Tensor, valid_NG: Tensor, temperature: float) -> Tensor:
    """Log of the sum over the other views' valid vectors of exp(cos / tau), (S, N, G)."""
    views = unit_SNGD.unbind(0)
    parts: list[list[Tensor]] = [[] for _ in views]
    # Finite also when doubled: an invalid row's own result is a number too, dropped by the caller.
    floor_NG = (~valid_NG).to(unit_SNGD.dtype) * _EXCLUDED
    floor_NGG = floor_NG.unsqueeze(1) + floor_NG.unsqueeze(2)
    # Row g, column h of a pair's matrix serves anchor g of one view and anchor h of the other.
    for one in range(len(views)):
        for other in range(one + 1, len(views)):
            score_NGG = torch.baddbmm(floor_NGG, views[one], views[other].transpose(1, 2), alpha=1 / temperature)
            parts[one].append(score_NGG.logsumexp(2))
            parts[other].append(score_NGG.logsumexp(1))
    return torch.stack([torch.stack(part).logsumexp(0) for part in parts])
