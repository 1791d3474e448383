"""Contrastive learning over views: which events and features a twin sees, the loss, and the collapse alarm.

The positive of a vector is a masked twin of the same row and view. The negatives are all other vectors of the group of
rows: its own view's, but for those of the same user, and the other views', its own row's among them (method, 3).

L = -log( exp(cos(v, twin) / tau) / (exp(cos(v, twin) / tau) + sum_n exp(cos(v, n) / tau)) )

With negatives from the other views alone, one constant vector per view would be the minimum; with the own view's, such
a collapse costs log G.

Groups are consecutive rows of fixed size and masks depend on the row and the step alone, so the loss is the same for
every number of workers.

Shape letters: B rows, S views, D vector, V events, F features, C columns, N groups, G rows of a group, X = S G.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from usr_ray.model.counter_random import hash_keys, to_uniform
from usr_ray.model.history import Events

_EVENT_STREAM, _FEATURE_STREAM = 1, 2
_NORM_FLOOR = 1e-6
"""Added to norms, so that the gradient of a zero vector is finite."""


def _row_keys(row_number_B: Tensor, step_seed: int | Tensor, stream: int) -> Tensor:
    # A fill, not a copy of a number from the host, which would wait for a GPU's queue.
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
    user_key_B: Tensor,
    *,
    group_size: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The loss added up over all valid (row, view), and the collapse alarm of each view added up over counted rows.

    The alarm is the total variance of a group's unit vectors, 1 - |mean|^2: 0 when all rows have one vector, near 1
    when they point everywhere. It counts once for each counted row of the group.

    Args:
        vectors_BSD: i_k or f_k, one a view.
        twins_BSD: their masked twins; None: no loss, zero.
        valid_B: bool; other rows are neither anchors nor negatives, nor part of the variance.
        counted_B: bool; rows over which the caller takes the mean.
        user_key_B: rows with one key are a user's: no negatives of one another inside a view.
        group_size: G; row b belongs to group b // G.

    Returns:
        A scalar, and (S) without a gradient; float32 (float64 for float64 vectors).
    """
    valid_NG, counted_NG, user_NG = (_groups(rows_B, group_size) for rows_B in (valid_B, counted_B, user_key_B))
    units_NGSD = _units(vectors_BSD, group_size)
    loss = units_NGSD.new_zeros(())
    if twins_BSD is not None:
        loss_NGS = _contrast(units_NGSD, _units(twins_BSD, group_size), valid_NG, user_NG, temperature)
        loss = (loss_NGS * valid_NG.unsqueeze(2)).sum()
    return loss, _variance_sums(units_NGSD.detach(), valid_NG, counted_NG)


def _contrast(units_NGSD: Tensor, twins_NGSD: Tensor, valid_NG: Tensor, user_NG: Tensor, temperature: float) -> Tensor:
    """L of every (row, view), (N, G, S); without meaning for rows that are not valid."""
    num_groups, num_rows, num_views, _ = units_NGSD.shape
    positive_NSG = (units_NGSD * twins_NGSD).sum(3).transpose(1, 2) / temperature
    # One view's rows after another's: X = S G vectors of a group, each beside all.
    units_NXD = units_NGSD.transpose(1, 2).flatten(1, 2)
    left_out_NXX = _left_out(valid_NG, user_NG, num_views, units_NXD.dtype)
    scores_NXX = torch.baddbmm(left_out_NXX, units_NXD, units_NXD.transpose(1, 2), alpha=1 / temperature)
    total_NX = scores_NXX.logsumexp(2)
    return softplus(total_NX.view(num_groups, num_views, num_rows) - positive_NSG).transpose(1, 2)


def _left_out(valid_NG: Tensor, user_NG: Tensor, num_views: int, dtype: torch.dtype) -> Tensor:
    """(N, X, X): a large negative number for a pair that is no pair of negatives, else 0.

    Left out are rows that are not valid, and in a vector's own view the rows of its user, itself among them.
    """
    # A finite floor: a vector without any negative would have a gradient that is not a number.
    floor = torch.finfo(dtype).min / 2
    invalid_N1G = (~valid_NG).unsqueeze(1)
    of_user_NGG = (user_NG.unsqueeze(2) == user_NG.unsqueeze(1)) | invalid_N1G
    num_groups, num_rows = valid_NG.shape
    left_out_NSGSG = (invalid_N1G.to(dtype) * floor)[:, None, :, None].repeat(1, num_views, num_rows, num_views, 1)
    left_out_NSGSG.diagonal(dim1=1, dim2=3).copy_((of_user_NGG.to(dtype) * floor).unsqueeze(3))
    return left_out_NSGSG.view(num_groups, num_views * num_rows, num_views * num_rows)


def _groups(values_B: Tensor, group_size: int) -> Tensor:
    """(N, G, ..), the last group filled up with zeros."""
    num_missing = -values_B.shape[0] % group_size
    if num_missing:
        values_B = torch.cat([values_B, values_B.new_zeros((num_missing, *values_B.shape[1:]))])
    return values_B.unflatten(0, (-1, group_size))


def _units(vectors_BSD: Tensor, group_size: int) -> Tensor:
    """Unit vectors, (N, G, S, D), at least float32."""
    vectors_BSD = vectors_BSD.to(torch.promote_types(vectors_BSD.dtype, torch.float32))
    norms_BS1 = torch.linalg.vector_norm(vectors_BSD, dim=2, keepdim=True)
    return _groups(vectors_BSD / (norms_BS1 + _NORM_FLOOR), group_size)


def _variance_sums(units_NGSD: Tensor, valid_NG: Tensor, counted_NG: Tensor) -> Tensor:
    count_N1 = valid_NG.sum(1, keepdim=True)
    sum_NSD = (units_NGSD * valid_NG[:, :, None, None]).sum(1)
    mean_NSD = sum_NSD / count_N1.clamp(min=1).unsqueeze(2)
    variance_NS = torch.where(count_N1 > 0, 1 - mean_NSD.square().sum(2), 0)
    return (variance_NS * counted_NG.sum(1, keepdim=True)).sum(0)
