"""GLMT, the global label multi-task layer: every probability is a product of sigmoids (method, section 3).

The union of the labels makes {y_k = 1} a subset of {y_g = 1}, so p_k = p_g P(y_k = 1 | y_g = 1, x, k) is exact:

p_ctr,g = sig(a_g)                    p_ctr,k   = p_ctr,g sig(a_k)
p_ctcvr,g = p_ctr,g sig(b_g)          p_ctcvr,k = p_ctcvr,g sig(b_k) (variant A), or p_ctr,k sig(b_k) (variant B)

Everything stays in log space and float32. log(1 - p) is log1mexp(log p) up to p = 1/2. Above, where log p underflows to
0 when all logits are large, it is the equal sum 1 - sig(a) r = sig(-a) + sig(a) (1 - r): exact for logits of any size.

Shape letters: B rows, J joined views, T tasks (schema.TASKS).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from usr_ray.config import MultitaskConfig
from usr_ray.data.batch import UsrOutputs
from usr_ray.model.mlp import MLP
from usr_ray.schema import TASKS

_LOG_HALF = -math.log(2)


def log_product(*logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log of p = sig(logit_1) sig(logit_2) ... and log of 1 - p; finite, with finite gradients, for finite logits."""
    log_p, log_not_p = logsigmoid(logits[-1]), logsigmoid(-logits[-1])
    if len(logits) == 1:
        return log_p, log_not_p
    for logit in reversed(logits[:-1]):
        log_sig = logsigmoid(logit)
        log_not_p = torch.logaddexp(logsigmoid(-logit), log_sig + log_not_p)
        log_p = log_sig + log_p
    # For small p the sum above cancels: log(1 - p) = -p would drown in the rounding of its terms.
    log1mexp = torch.log1p(-torch.exp(log_p.clamp(max=_LOG_HALF)))
    return log_p, torch.where(log_p < _LOG_HALF, log1mexp, log_not_p)


def _stack(ctr: tuple[Tensor, Tensor], ctcvr: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.stack([ctr[0], ctcvr[0]], dim=1), torch.stack([ctr[1], ctcvr[1]], dim=1)


def scenario_outputs(logits_BT: Tensor) -> UsrOutputs:
    """Outputs without GLMT: each task is the sigmoid of the backbone's own logit."""
    logits_BT = _at_least_float32(logits_BT)
    return UsrOutputs(log_p_BT=logsigmoid(logits_BT), log_not_p_BT=logsigmoid(-logits_BT))


def global_outputs(logits_BT: Tensor, global_logits_BT: Tensor, variant: str) -> UsrOutputs:
    """Outputs with GLMT, from [a_k, b_k] and [a_g, b_g].

    Args:
        logits_BT: for the row's own scenario.
        variant: "A" or "B".
    """
    a_k_B, b_k_B = _at_least_float32(logits_BT).unbind(1)
    a_g_B, b_g_B = _at_least_float32(global_logits_BT).unbind(1)
    path = (a_g_B, b_g_B, b_k_B) if variant == "A" else (a_g_B, a_k_B, b_k_B)
    log_p_BT, log_not_p_BT = _stack(log_product(a_g_B, a_k_B), log_product(*path))
    log_p_global_BT, log_not_p_global_BT = _stack(log_product(a_g_B), log_product(a_g_B, b_g_B))
    return UsrOutputs(log_p_BT, log_not_p_BT, log_p_global_BT, log_not_p_global_BT)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class GlobalHeads(nn.Module):
    """a_g and b_g on the joined views [i_1 .. i_S ; f_1 .. f_S ; z_1 .. z_S ; e_k].

    e_k is among them because the factorisation conditions on k: without it p_g would be the mean over scenarios, and
    p_k <= p_g would hold back a scenario whose rate is above that mean.
    """

    def __init__(self, joined_dim: int, config: MultitaskConfig, dropout: float) -> None:
        super().__init__()
        self.heads = MLP(joined_dim, config.hidden, len(TASKS), dropout)

    def forward(self, joined_BJ: Tensor) -> Tensor:
        """[a_g, b_g], (B, 2)."""
        logits_BT: Tensor = self.heads(joined_BJ)
        return logits_BT
