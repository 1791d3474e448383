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
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from usr_ray.config import MultitaskConfig
from usr_ray.data.batch import UsrOutputs
from usr_ray.model.mlp import MLP
from usr_ray.schema import TASKS

REST_SHARE = "rest_share_ST"
"""Name of the shares s of `with_rest` in UsrModel, which training/rest.py finds."""
_LOG_HALF = -math.log(2)
_Logs = tuple[Tensor, Tensor]
"""log p and log(1 - p)."""


def _times(factor: _Logs, other: _Logs) -> _Logs:
    """Of the product. For small p, log(1 - p) = -p drowns in the rounding of its terms: then it takes `_exact`."""
    return factor[0] + other[0], torch.logaddexp(factor[1], factor[0] + other[1])


def _exact(product: _Logs) -> _Logs:
    """With a log(1 - p) that is exact for small p too; both finite, with finite gradients, for finite logits."""
    log_p, log_not_p = product
    log1mexp = torch.log1p(-torch.exp(log_p.clamp(max=_LOG_HALF)))
    return log_p, torch.where(log_p < _LOG_HALF, log1mexp, log_not_p)


def _stack(logs: Sequence[_Logs], dim: int) -> _Logs:
    return torch.stack([log_p for log_p, _ in logs], dim), torch.stack([log_not_p for _, log_not_p in logs], dim)


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
    # One task's logits after another's, and what has one form at once: on a thousand rows the calls are the cost.
    logits_LB = _at_least_float32(torch.cat([global_logits_BT, logits_BT], dim=1)).T.contiguous()
    log_sig_LB, log_not_LB = logsigmoid(logits_LB), logsigmoid(-logits_LB)
    a_g, b_g, a_k, b_k = zip(log_sig_LB.unbind(0), log_not_LB.unbind(0), strict=True)
    # p_ctr,k, p_ctcvr,k and p_ctcvr,g are sig(a_g) times these.
    others = _stack([a_k, _times(b_g if variant == "A" else a_k, b_k), b_g], dim=0)
    log_p_3B, log_not_p_3B = _exact(_times(a_g, others))
    ctr_k, ctcvr_k, ctcvr_g = zip(log_p_3B.unbind(0), log_not_p_3B.unbind(0), strict=True)
    return UsrOutputs(*_stack([ctr_k, ctcvr_k], dim=1), *_stack([a_g, ctcvr_g], dim=1))


def own_part(outputs: UsrOutputs, variant: str) -> Tensor:
    """Log of the part of each global probability that the scenario's own is a factor of, (B, T): p_ctr,k, and in
    variant A p_ctcvr,k; in variant B that one is no factor of p_ctcvr,g, so there is none, -inf.
    """
    if variant == "A":
        return outputs.log_p_BT
    return torch.stack([outputs.log_p_BT[:, 0], torch.full_like(outputs.log_p_BT[:, 1], -math.inf)], dim=1)


def with_rest(outputs: UsrOutputs, share_BT: Tensor, variant: str) -> UsrOutputs:
    """Outputs whose global probabilities are p_k + s (p_g - p_k): the rest, what happens elsewhere alone, times s.

    In variant B p_ctcvr,g is s times itself. Where it is the larger one, p_ctr,g is as large. The scenarios' own
    probabilities stay as they are, and every bound that the products keep is kept.

    Args:
        share_BT: s in (0, 1] of the row's scenario.
    """
    assert outputs.log_p_global_BT is not None
    assert outputs.log_not_p_global_BT is not None
    own_BT, all_BT = own_part(outputs, variant), outputs.log_p_global_BT
    # In ONNX, log sig(-100) is -inf: the difference of two such would be no number.
    gap_BT = torch.where(own_BT == all_BT, 0.0, own_BT - all_BT).clamp(max=0)
    rest_BT = all_BT + torch.log(-torch.expm1(gap_BT))
    log_p_BT = torch.logaddexp(own_BT, rest_BT + share_BT.log()).clamp(max=0)  # its rounding may be above
    log_not_p_BT = torch.logaddexp(outputs.log_not_p_global_BT, rest_BT + torch.log1p(-share_BT)).clamp(max=0)
    log_p_BT = torch.cat([log_p_BT.amax(1, keepdim=True), log_p_BT[:, 1:]], dim=1)
    log_not_p_BT = torch.cat([log_not_p_BT.amin(1, keepdim=True), log_not_p_BT[:, 1:]], dim=1)
    return replace(outputs, log_p_global_BT=log_p_BT, log_not_p_global_BT=log_not_p_BT)


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
