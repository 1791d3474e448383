"""Contrastive learning over views: which events and features a twin sees, the loss, and the collapse alarm.

The positive of a vector is a masked twin of the same row and view: i's has seen fewer events, f's is f_k itself without
some features. The negatives are all other vectors of the group of rows: its own view's, but for those of the same user,
and the other views', its own row's among them (method, 3).

L = -log( exp(cos(v, twin) / tau) / (exp(cos(v, twin) / tau) + sum_n exp(cos(v, n) / tau)) )

With negatives from the other views alone, one constant vector per view would be the minimum; with the own view's, such
a collapse costs log G.

Groups are consecutive rows of fixed size and masks depend on the row and the step alone, so the loss is the same for
every number of workers.

Shape letters: B rows, R those with twins, S views, D vector, V events, F features, C columns, N groups, G rows of a
group, X = S G.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from usr_ray.data.batch import GroupShare
from usr_ray.model.counter_random import hash_keys, to_uniform
from usr_ray.model.history import Events

_EVENT_STREAM, _FEATURE_STREAM = 1, 2
_NORM_FLOOR = 1e-6
"""Added to norms, so that the gradient of a zero vector is finite."""
_VANISHING = 40.0
"""How far below all others the score of a pair that is left out lies: e^-40 beside 1 is nothing. Finite, or a vector
without any negative would have a gradient that is not a number; and no deeper, since torch takes ten times as long over
exponentials that underflow, and several times as long over products that nearly do."""


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
    keys_V = keys_SB.flatten().index_select(0, events.history_V)
    uniform_V = to_uniform(hash_keys(keys_V, events.from_newest_V))
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
    twins_RSD: Tensor | None,
    valid_B: Tensor,
    counted_B: Tensor,
    user_key_B: Tensor,
    *,
    group_size: int,
    temperature: float,
    kept_RD: Tensor | None = None,
    share: GroupShare | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss added up over all valid (row, view), and the collapse alarm of each view added up over counted rows.

    The alarm is the total variance of a group's unit vectors, 1 - |mean|^2: 0 when all rows have one vector, near 1
    when they point everywhere. It counts once for each counted row of the group.

    Args:
        vectors_BSD: i_k or f_k, one a view.
        twins_RSD: their masked twins, of the rows of `share`.
        valid_B: bool; other rows are neither anchors nor negatives, nor part of the variance.
        counted_B: bool; rows over which the caller takes the mean.
        user_key_B: rows with one key are a user's: no negatives of one another inside a view.
        group_size: G; row b belongs to group b // G.
        kept_RD: instead of twins, 1 for the columns that a vector's twin keeps of it, else 0. With neither the loss is
            zero.
        share: the groups that take part; None: all.

    Returns:
        A scalar, and (S) without a gradient; float32 (float64 for float64 vectors).
    """
    valid_NG, counted_NG, user_NG = (_groups(rows_B, group_size, share) for rows_B in (valid_B, counted_B, user_key_B))
    # One view lies after the other in memory, and so do the gradients then.
    units_NSGD = _units(_groups(vectors_BSD.transpose(0, 1), group_size, share, dim=1).transpose(0, 1))
    variance_S = _variance_sums(units_NSGD.detach(), valid_NG, counted_NG)
    if twins_RSD is not None:
        twin_NSG = (units_NSGD * _units(_groups(twins_RSD, group_size, None).transpose(1, 2))).sum(3)
    elif kept_RD is not None:
        # u . (u m) over the norm of u m, which is the root of the same.
        twin_NSG = torch.linalg.vector_norm(units_NSGD * _groups(kept_RD, group_size, None).unsqueeze(1), dim=3)
    else:
        return units_NSGD.new_zeros(()), variance_S
    loss_NSG = _contrast(units_NSGD, twin_NSG, valid_NG, user_NG, temperature)
    return (loss_NSG * valid_NG.unsqueeze(1)).sum(), variance_S


def _contrast(units_NSGD: Tensor, twin_NSG: Tensor, valid_NG: Tensor, user_NG: Tensor, temperature: float) -> Tensor:
    """L of every (row, view), (N, S, G), from its cosine with its twin; without meaning for rows that are not valid."""
    # One view's rows after another's: X = S G vectors of a group, each beside all.
    units_NXD = units_NSGD.flatten(1, 2)
    floor = -2 / temperature - _VANISHING
    left_out_NXX = _left_out(valid_NG, user_NG, units_NSGD.shape[1], floor, units_NXD.dtype)
    scores_NXX = torch.baddbmm(left_out_NXX, units_NXD, units_NXD.transpose(1, 2), alpha=1 / temperature)
    return softplus(scores_NXX.logsumexp(2).view_as(twin_NSG) - twin_NSG / temperature)


def _left_out(valid_NG: Tensor, user_NG: Tensor, num_views: int, floor: float, dtype: torch.dtype) -> Tensor:
    """(N, X, X): `floor` for a pair that is no pair of negatives, else 0.

    Left out are rows that are not valid, and in a vector's own view the rows of its user, itself among them.
    """
    invalid_N1G = (~valid_NG).unsqueeze(1)
    of_user_NGG = (user_NG.unsqueeze(2) == user_NG.unsqueeze(1)) | invalid_N1G
    num_groups, num_rows = valid_NG.shape
    left_out_NSGSG = (invalid_N1G.to(dtype) * floor)[:, None, :, None].repeat(1, num_views, num_rows, num_views, 1)
    left_out_NSGSG.diagonal(dim1=1, dim2=3).copy_((of_user_NGG.to(dtype) * floor).unsqueeze(3))
    return left_out_NSGSG.view(num_groups, num_views * num_rows, num_views * num_rows)


def _groups(values: Tensor, group_size: int, share: GroupShare | None, dim: int = 0) -> Tensor:
    """Dimension `dim`, of rows, as groups and the rows of one; without a share the last group is filled with zeros."""
    if share is not None:
        return share.view(values, dim)
    num_missing = -values.shape[dim] % group_size
    if num_missing:
        shape = (*values.shape[:dim], num_missing, *values.shape[dim + 1 :])
        values = torch.cat([values, values.new_zeros(shape)], dim)
    return values.unflatten(dim, (-1, group_size))


def _units(vectors_NSGD: Tensor) -> Tensor:
    """Unit vectors, at least float32, one view's rows after another's in memory."""
    vectors_NSGD = vectors_NSGD.to(torch.promote_types(vectors_NSGD.dtype, torch.float32)).contiguous()
    norms_NSG1 = torch.linalg.vector_norm(vectors_NSGD, dim=3, keepdim=True)
    return vectors_NSGD * (norms_NSG1 + _NORM_FLOOR).reciprocal()


def _variance_sums(units_NSGD: Tensor, valid_NG: Tensor, counted_NG: Tensor) -> Tensor:
    count_N1 = valid_NG.sum(1, keepdim=True)
    # A product, not masked sums: the widest vectors are read once.
    sum_NSD = (valid_NG.to(units_NSGD.dtype)[:, None, None] @ units_NSGD).squeeze(2)
    mean_NSD = sum_NSD / count_N1.clamp(min=1).unsqueeze(2)
    variance_NS = torch.where(count_N1 > 0, 1 - mean_NSD.square().sum(2), 0)
    return (variance_NS * counted_NG.sum(1, keepdim=True)).sum(0)
