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

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from usr_ray.model.counter_random import hash_keys, to_uniform
from usr_ray.model.history import Events

_EVENT_STREAM, _FEATURE_STREAM = 1, 2
_NORM_FLOOR = 1e-12
"""Added to squared norms, so that a zero vector (a padding row) has a finite gradient."""


def _row_keys(row_number_B: Tensor, step_seed: int, stream: int) -> Tensor:
    step = hash_keys(hash_keys(row_number_B.new_tensor(stream), step_seed), 0)
    return hash_keys(step, row_number_B)


def event_mask(events: Events, row_number_B: Tensor, step_seed: int, rate: float) -> Tensor:
    """Bool (V): the events a twin sees, each dropped with probability `rate`; the newest of a history always stays."""
    num_scenarios = events.lengths_SB.shape[0]
    scenario_S1 = torch.arange(num_scenarios, device=row_number_B.device).unsqueeze(1)
    keys_SB = hash_keys(_row_keys(row_number_B, step_seed, _EVENT_STREAM), scenario_S1)
    from_newest_V = events.from_newest_V()
    uniform_V = to_uniform(hash_keys(keys_SB.flatten()[events.group_V], from_newest_V))
    return (uniform_V >= rate) | (from_newest_V == 0)


def feature_mask(widths: Sequence[int], row_number_B: Tensor, step_seed: int, rate: float) -> Tensor:
    """Bool (B, C): the columns of f a twin sees; a feature's `widths[i]` columns stay or go together."""
    keys_B1 = _row_keys(row_number_B, step_seed, _FEATURE_STREAM).unsqueeze(1)
    features_F = torch.arange(len(widths), device=row_number_B.device)
    keep_BF = to_uniform(hash_keys(keys_B1, features_F)) >= rate
    return keep_BF.repeat_interleave(torch.tensor(widths, device=keep_BF.device), dim=1, output_size=sum(widths))


def contrastive_sum(
    vectors_BSD: Tensor, twins_BSD: Tensor, valid_B: Tensor, *, group_size: int, temperature: float
) -> Tensor:
    """The loss summed over all valid (row, view): a float32 scalar (float64 for float64 vectors).

    Args:
        vectors_BSD: i_k or f_k of every view; S >= 2.
        twins_BSD: their masked twins.
        valid_B: bool; other rows are neither anchors nor negatives.
        group_size: G; row b belongs to group b // G.
        temperature: tau.
    """
    unit_SNGD, valid_NG = _groups(vectors_BSD, valid_B, group_size)
    unit_twin_SNGD, _ = _groups(twins_BSD, valid_B, group_size)
    positive_SNG = (unit_SNGD * unit_twin_SNGD).sum(3) / temperature
    loss_SNG = softplus(_negatives(unit_SNGD, valid_NG, temperature) - positive_SNG)
    return torch.where(valid_NG, loss_SNG, 0).sum()


@torch.no_grad()
def variance_sum(vectors_BSD: Tensor, valid_B: Tensor, counted_B: Tensor, *, group_size: int) -> Tensor:
    """The collapse alarm: each view's variance over a group's valid rows, times its counted rows, added up; (S).

    The variance is the total one of the unit vectors, 1 - |mean|^2: 0 when all rows have one vector, near 1 when they
    point everywhere. Divided by the number of counted rows it is the mean over groups.
    """
    unit_SNGD, valid_NG = _groups(vectors_BSD, valid_B, group_size)
    num_missing = -counted_B.shape[0] % group_size
    counted_N = pad(counted_B, (0, num_missing)).unflatten(0, (-1, group_size)).sum(1)
    weight_NG = valid_NG.to(unit_SNGD.dtype)
    count_N = weight_NG.sum(1)
    mean_SND = (unit_SNGD * weight_NG.unsqueeze(2)).sum(2) / count_N.clamp(min=1).unsqueeze(1)
    variance_SN = torch.where(count_N > 0, 1 - mean_SND.square().sum(2), 0)
    return (variance_SN * counted_N).sum(1)


def _groups(vectors_BSD: Tensor, valid_B: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Unit vectors (S, N, G, D) and validity (N, G); the last group is filled up with invalid zeros."""
    num_missing = -vectors_BSD.shape[0] % group_size
    vectors_BSD = vectors_BSD.to(torch.promote_types(vectors_BSD.dtype, torch.float32))
    unit_BSD = vectors_BSD * (vectors_BSD.square().sum(2, keepdim=True) + _NORM_FLOOR).rsqrt()
    unit_SNGD = pad(unit_BSD.transpose(0, 1), (0, 0, 0, num_missing)).unflatten(1, (-1, group_size))
    return unit_SNGD, pad(valid_B, (0, num_missing)).unflatten(0, (-1, group_size))


def _negatives(unit_SNGD: Tensor, valid_NG: Tensor, temperature: float) -> Tensor:
    """Log of the sum over the other views' valid vectors of exp(cos / tau), (S, N, G)."""
    floor = torch.finfo(unit_SNGD.dtype).min
    views = unit_SNGD.unbind(0)
    parts: list[list[Tensor]] = [[] for _ in views]
    # Row g, column h of a pair's matrix serves anchor g of one view and anchor h of the other.
    for one in range(len(views)):
        for other in range(one + 1, len(views)):
            cos_NGG = views[one] @ views[other].transpose(1, 2) / temperature
            parts[one].append(cos_NGG.masked_fill(~valid_NG.unsqueeze(1), floor).logsumexp(2))
            parts[other].append(cos_NGG.masked_fill(~valid_NG.unsqueeze(2), floor).logsumexp(1))
    return torch.stack([torch.stack(part).logsumexp(0) for part in parts])
