"""The loss of USR: cells, global tasks and contrastive terms (method, section 3).

total = sum over (k, task) of mean BCE on the rows of k + alpha * sum over tasks of mean global BCE on all rows
        + l1 * mean CL(i) + l2 * mean CL(f), over the rows of every nth group (model.contrastive.every_nth_group)

Where a scenario's logs know no orders, its rows have no label of CTCVR, neither their own nor the global one: the cell
is left out, and the global mean is over the rows that have the label.

A label that is still open (schema.OPEN_LABEL: clicks are final before orders, data.final_labels) takes no part either,
but its row counts in the means: every known label weighs the same, and a mean of CTCVR is that much smaller.

Every mean divides by a count over ALL ranks, handed in, so the sum of the ranks' totals is the global loss whatever
the mix of scenarios on each: gradients are summed over ranks, never averaged.

Shape letters: B rows, R those in the contrastive losses, S scenarios, C = S + 1 counts, T tasks (schema.TASKS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from usr_ray.config import ModelConfig
from usr_ray.data.batch import GroupShare, UsrBatch, UsrOutputs, rows_of
from usr_ray.model.contrastive import contrastive_sums
from usr_ray.schema import LABELS, OPEN_LABEL, TASKS

KnownLabels = Sequence[Sequence[bool]]
"""FeatureSpec.known_labels: (S, T), False where the rows of a scenario have no label of a task."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A rank's share of the global loss and of its parts; shares of all ranks add up. All but total detached."""

    total: Tensor
    """float scalar with a graph."""
    cells_ST: Tensor
    """Mean BCE of each (scenario, task); 0 where the label is not known."""
    global_T: Tensor
    """Mean BCE of each global task, before alpha; zeros without GLMT."""
    cell_rows_ST: Tensor
    """This rank's rows that `cell_sums_ST` adds up: those whose label is known and final."""
    cell_sums_ST: Tensor
    """BCE of each (scenario, task), added up over this rank's rows."""
    global_rows_T: Tensor
    """The same of each global task; zeros without GLMT."""
    global_sums_T: Tensor
    """BCE of each global task, added up over them."""
    contrastive_interest: Tensor
    """Mean CL(i) of a (row, view), before its weight; zero when it is off."""
    contrastive_feature: Tensor
    """Mean CL(f) of a (row, view), before its weight; zero when it is off."""
    variance_interest_S: Tensor
    """Variance of i_k inside a group of rows, one a view, in [0, 1]; near 0 is collapse. Zeros without IE."""
    variance_feature_S: Tensor
    """The same of f_k; zeros without FG."""

    def by_row(self, scenarios: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """'loss/<scenario>|global/<task>' -> (BCE, rows), sums over this rank's rows whose label is known and final.

        Not the cells' means, which are smaller where labels are open and 0 in a step without rows of the scenario.
        """
        names = (*scenarios, "global")
        sums = torch.cat([self.cell_sums_ST, self.global_sums_T.unsqueeze(0)])
        rows = torch.cat([self.cell_rows_ST, self.global_rows_T.unsqueeze(0)])
        return {
            f"loss/{name}/{task}": (sums[s, t], rows[s, t])
            for s, name in enumerate(names)
            for t, task in enumerate(TASKS)
        }

    def named(self, scenarios: Sequence[str]) -> dict[str, Tensor]:
        """Scalars by name: 'loss', 'contrastive/..', 'variance/../<scenario>'."""
        named = {"loss": self.total.detach()}
        named |= {"contrastive/interest": self.contrastive_interest, "contrastive/feature": self.contrastive_feature}
        for scenario, name in enumerate(scenarios):
            named[f"variance/interest/{name}"] = self.variance_interest_S[scenario]
            named[f"variance/feature/{name}"] = self.variance_feature_S[scenario]
        return named


def row_counts(batch: UsrBatch, num_scenarios: int, config: ModelConfig) -> Tensor:
    """Weight of this rank's rows, float64 (S + 1): by scenario, then of the rows in the contrastive losses.

    Summed over ranks it is the `counts` of `usr_loss`.
    """
    weights_B = batch.weights_B.double()
    counts_S = (_one_hot(batch.scenario_B, num_scenarios) * weights_B).sum(1)
    return torch.cat([counts_S, rows_of(weights_B, GroupShare.of_batch(batch, config)).sum().unsqueeze(0)])


def usr_loss(
    outputs: UsrOutputs,
    batch: UsrBatch,
    counts_C: Tensor,
    config: ModelConfig,
    *,
    known_labels: KnownLabels | None = None,
) -> LossTerms:
    """A rank's share of the global loss.

    Args:
        batch: this rank's rows; rows of weight 0 take no part. Its first row starts a contrastive group.
        counts_C: `row_counts` summed over all ranks. A scenario that is absent everywhere adds nothing.
        known_labels: FeatureSpec.known_labels, (S, T); None: every scenario knows every task's label.
    """
    # bfloat16 has 8 bits: a sum of thousands of rows would stop growing.
    with torch.autocast(batch.weights_B.device.type, enabled=False):
        return _usr_loss(outputs, batch, counts_C, config, known_labels)


def _usr_loss(
    outputs: UsrOutputs, batch: UsrBatch, counts_C: Tensor, config: ModelConfig, known_labels: KnownLabels | None
) -> LossTerms:
    labels_BT, dtype, counts_S = batch.labels_BT, outputs.log_p_BT.dtype, counts_C[:-1]
    known_ST = _known(known_labels, counts_S)
    # A label that is not known has weight 0: its logits stay in the graph, so DDP finds every parameter.
    weights_BT = batch.weights_B.to(dtype).unsqueeze(1) * known_ST.to(dtype)[batch.scenario_B]
    weights_BT = weights_BT * (labels_BT[:, : len(LABELS)] != OPEN_LABEL)  # a global label is open where the own one is
    labels_BT = labels_BT.clamp(min=0)
    # In float64 until here: a count above 2^24 is no float32.
    per_row_S = (1 / counts_S.clamp(min=1)).to(dtype)
    per_contrasted_row = (1 / counts_C[-1].clamp(min=1)).to(dtype)
    per_known_row_T = (1 / (counts_S @ known_ST.to(counts_S.dtype)).clamp(min=1)).to(dtype)
    bce_BT = _bce(outputs.log_p_BT, outputs.log_not_p_BT, labels_BT[:, : len(LABELS)]) * weights_BT
    # A product, not an index_add: the order of the additions is fixed on a GPU as well.
    of_scenario_SB = _one_hot(batch.scenario_B, counts_S.shape[0]).to(dtype)
    cell_sums_ST, cell_rows_ST = of_scenario_SB @ bce_BT, of_scenario_SB @ weights_BT
    cells_ST = cell_sums_ST * per_row_S.unsqueeze(1)
    global_sums_T = torch.zeros_like(cells_ST[0])
    if outputs.log_p_global_BT is not None and outputs.log_not_p_global_BT is not None:
        global_BT = _bce(outputs.log_p_global_BT, outputs.log_not_p_global_BT, labels_BT[:, len(LABELS) :])
        global_sums_T = (global_BT * weights_BT).sum(0)
    global_T = global_sums_T * per_known_row_T
    # A row without events has the same learned vector in every view: there is nothing to tell apart.
    counted_B = batch.weights_B > 0
    with_events_B = counted_B & (torch.stack([h.offsets.diff() for h in batch.histories]).sum(0) > 0)
    interest, variance_interest_S = (
        part * per_contrasted_row
        for part in _contrastive(outputs.interests_BSD, outputs.interests_twin_RSD, None, with_events_B, batch, config)
    )
    feature, variance_feature_S = (
        part * per_contrasted_row
        for part in _contrastive(outputs.features_BSD, None, outputs.features_kept_RD, counted_B, batch, config)
    )
    cl = config.contrastive
    weighted_ST = cells_ST
    if config.scenario_weights == "rows":  # the same total weight, one for each scenario, by their shares of the rows
        share_S = counts_S / counts_S.sum().clamp(min=1)
        weighted_ST = cells_ST * (share_S * len(counts_S)).to(dtype).unsqueeze(1)
    total = weighted_ST.sum() + config.multitask.alpha * global_T.sum()
    total = total + cl.interest_weight * interest + cl.feature_weight * feature
    return LossTerms(
        total,
        cells_ST.detach(),
        global_T.detach(),
        cell_rows_ST,
        cell_sums_ST.detach(),
        cell_rows_ST.sum(0) if outputs.log_p_global_BT is not None else torch.zeros_like(cell_rows_ST[0]),
        global_sums_T.detach(),
        interest.detach(),
        feature.detach(),
        variance_interest_S.expand_as(counts_S),
        variance_feature_S.expand_as(counts_S),
    )


def _contrastive(
    vectors_BSD: Tensor | None,
    twins_RSD: Tensor | None,
    kept_RD: Tensor | None,
    valid_B: Tensor,
    batch: UsrBatch,
    config: ModelConfig,
) -> tuple[Tensor, Tensor]:
    """Loss of a row, mean over its views, and variance of each view, both added up over rows; zeros where not computed.

    Both are divided by the rows that count, not by the valid ones: a row's pull on the weights then does not depend
    on how many others have events, and one count serves all terms.
    """
    cl, share = config.contrastive, GroupShare.of_batch(batch, config)
    if vectors_BSD is None or (share is not None and share.num_rows == 0):
        zero = torch.zeros((), device=valid_B.device)
        return zero, zero
    loss, variance_S = contrastive_sums(
        vectors_BSD,
        twins_RSD,
        valid_B,
        batch.weights_B > 0,
        batch.user_key_B,
        group_size=cl.group_size,
        temperature=cl.temperature,
        kept_RD=kept_RD,
        share=share,
    )
    return loss / vectors_BSD.shape[1], variance_S


def _known(known_labels: KnownLabels | None, counts_S: Tensor) -> Tensor:
    """Bool (S, T) on the device of `counts_S`."""
    shape = (counts_S.shape[0], len(TASKS))
    if known_labels is None or all(map(all, known_labels)):  # made on the device: no copy in the usual case
        return torch.ones(shape, dtype=torch.bool, device=counts_S.device)
    return torch.tensor(known_labels, device=counts_S.device)


def _bce(log_p_BT: Tensor, log_not_p_BT: Tensor, labels_BT: Tensor) -> Tensor:
    return -torch.lerp(log_not_p_BT, log_p_BT, labels_BT.to(log_p_BT.dtype))


def _one_hot(scenario_B: Tensor, num_scenarios: int) -> Tensor:
    """Bool (S, B)."""
    return torch.arange(num_scenarios, device=scenario_B.device).unsqueeze(1) == scenario_B
