"""What GLMT's global probabilities have beyond the scenario's own: its size, found on training rows.

p_k = p_g P(y_k | y_g), and the losses of a scenario see the product alone. Both factors begin at 1/2 and fall together
until the product is right. p_g is then still too high, and the conditional probability too low: only alpha times the
global loss moves the one against the other, which takes more steps than most runs have. So p_g - p_k, the probability
of a click elsewhere alone, is multiplied by the share s at which it is on average what was seen (model/multitask.py):
that moves both factors against each other and leaves their product, p_k, alone.

Shape letters: B rows, N rows, S scenarios, T tasks (schema.TASKS).
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from usr_ray.config import Config
from usr_ray.data.batch import UsrBatch, UsrOutputs
from usr_ray.data.feed import Feed
from usr_ray.data.manifest import Manifest
from usr_ray.data.mature import counted_in_training
from usr_ray.model.multitask import REST_SHARE, own_part
from usr_ray.schema import LABELS, TASKS
from usr_ray.training.rows import read_training_rows, training_batches, training_reader
from usr_ray.training.state import TrainState, share_json
from usr_ray.training.worker import Worker

MAX_ROWS = 1_000_000
"""Training rows whose labels are counted, about, drawn from all."""
SCORED_ROWS = 4_096
"""Training rows that are scored, the first of the shuffled first epoch: the mean probability of a scenario with some
hundred of them is known to a few percent, even where hardly one of them has the label.
"""
_POOLED_ROWS = 50
"""The share of all scenarios counts as much as so many rows of one: the share of a few rows would be noise."""


def rest_rates(config: Config, manifest: Manifest) -> Tensor:
    """(S, T) float64: share of the rows with an event elsewhere alone; half a row with one and half without are added.

    In variant B it is the share with an order anywhere. Rows and labels that training does not count take no part; NaN
    where none is left.

    Raises:
        DataError: no row counts, or a file cannot be read.
    """
    rows = read_training_rows(manifest, counted_in_training(config, manifest), at_most=MAX_ROWS)
    own_NT, global_NT = rows.labels_NT[:, : len(LABELS)].copy(), rows.labels_NT[:, len(LABELS) :]
    if config.model.multitask.variant == "B":
        own_NT[:, TASKS.index("ctcvr")] = 0
    rates_ST = np.empty((len(manifest.spec.scenarios), len(TASKS)))
    for task, rest_N in enumerate((global_NT - own_NT).T):
        known_N = ~np.isnan(rest_N)
        scenario_N, seen_N = rows.scenario_N[known_N], rest_N[known_N]
        counts_S, seen_S = (np.bincount(scenario_N, weights, len(rates_ST)) for weights in (None, seen_N))
        rates_ST[:, task] = np.where(counts_S > 0, (seen_S + 0.5) / (counts_S + 1), np.nan)
    return torch.tensor(rates_ST)


def shares_of(rates_ST: Tensor, sums: Tensor, before_ST: Tensor) -> Tensor:
    """(S, T): shares at which the mean of p_g - p_k is the rate; those `before` where there is no rate.

    At most 1, above which p_k + s (p_g - p_k) need not be a probability.

    Args:
        sums: `rest_sums` of the scored rows.
    """
    rows_S1, rest_ST = sums[:, :1], sums[:, 1:]
    is_known_ST = ~rates_ST.isnan()
    seen_ST = (rates_ST * rows_S1).nan_to_num()
    pooled_T = (seen_ST.sum(0) / (rest_ST * is_known_ST).sum(0)).nan_to_num(nan=1.0).clamp(max=1)
    own_ST = (seen_ST / rest_ST).nan_to_num().clamp(max=1)
    found_ST = (rows_S1 * own_ST + _POOLED_ROWS * pooled_T) / (rows_S1 + _POOLED_ROWS)
    return torch.where(is_known_ST, found_ST, before_ST.double())


class Rest:
    """Finds the model's shares, for its averaged weights where it has such."""

    def __init__(self, state: TrainState, worker: Worker) -> None:
        self.state, self.worker = state, worker

    @functools.cached_property
    def _rates_ST(self) -> Tensor:
        """`rest_rates`, which rank 0 reads, on all ranks."""
        found = rest_rates(self.state.config, self.state.manifest).tolist() if self.worker.is_main else None
        return torch.tensor(share_json(self.worker, found), dtype=torch.float64)

    def fit(self) -> None:
        """Set the shares; nothing to do without GLMT. All ranks must call it."""
        module = self.state.module
        if module.global_heads is None:
            return
        share_ST = module.get_buffer(REST_SHARE)
        before_ST = share_ST.to("cpu", copy=True)
        share_ST.fill_(1)
        share_ST.copy_(shares_of(self._rates_ST, self._scored().to("cpu"), before_ST))

    def _scored(self) -> Tensor:
        """`rest_sums` of the rows that are scored, of all ranks."""
        state, worker, config = self.state, self.worker, self.state.config
        module, num_scenarios = state.module, len(state.manifest.spec.scenarios)
        reader = training_reader(config, state.manifest, rank=worker.rank, world_size=worker.world_size)
        batches = training_batches(reader, state.tables, epochs=range(1), start_step=0, config=config.model)
        num_batches = -(-SCORED_ROWS // config.train.global_batch_size)
        sums = torch.zeros(num_scenarios, 1 + len(TASKS), dtype=torch.float64, device=worker.device)
        module.eval()
        try:
            with reader, state.averaged(), Feed(itertools.islice(batches, num_batches), worker.device) as feed:
                for (batch, unique), _ in feed:
                    with torch.inference_mode():
                        outputs = module(batch, state.tables.lookup(batch, unique))
                    sums += rest_sums(outputs, batch, num_scenarios, config.model.multitask.variant)
        finally:
            module.train()
        return worker.all_reduce_sum(sums)


def rest_sums(outputs: UsrOutputs, batch: UsrBatch, num_scenarios: int, variant: str) -> Tensor:
    """float64 (S, 1 + T): by scenario the rows with weight, and the sums of their probabilities elsewhere alone."""
    assert outputs.log_p_global_BT is not None
    rest_BT = outputs.log_p_global_BT.double().exp() - own_part(outputs, variant).double().exp()
    of_row = torch.cat([torch.ones_like(rest_BT[:, :1]), rest_BT], dim=1) * (batch.weights_B > 0).unsqueeze(1)
    of_scenario_SB = torch.arange(num_scenarios, device=rest_BT.device).unsqueeze(1) == batch.scenario_B
    return of_scenario_SB.double() @ of_row
