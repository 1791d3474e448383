"""Averages of the weights over the steps (train.average): what evaluation, export and scoring take in their place.

a_t = w_t in the first step, the plain mean of w_1 .. w_t up to the window n = 1 / (1 - decay), and
a_t = decay a_(t-1) + (1 - decay) w_t from then on, for every weight, the tables' rows among them.

A row that no step touches since step s keeps its weight w, so its average has a closed form and is brought up to date
only when the row is used again, or read: a_t = w + r(s, t) (a_s - w), where r is the product of the steps' decays. The
work of a step follows its rows, whatever the size of the tables.

Shape letters: N rows of a table, U rows of a step, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from usr_ray.training.optimizers import Update

DENSE, ROWS, STEPS = "average_model", "average", "average_step"
"""First parts of the names in a checkpoint: the dense part's averages, the tables', and the step of each row's."""


def kept_share(decay: float, since: Tensor, now: int) -> Tensor:
    """r(s, t): the share that the average of step `since` (int, any shape) has in that of step `now`, float32."""
    window = max(1, round(1 / (1 - decay)))
    since = since.double()
    old_steps = max(now - window, 0) - (since - window).clamp(min=0)
    share = since.clamp(max=window) / max(min(now, window), 1) * torch.pow(decay, old_steps)
    return share.to(torch.float32)


class RowAverages:
    """Averages of tables that an optimiser changes in place."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.weights, self.decay = dict(weights), decay
        self.averages = {name: weight.clone() for name, weight in weights.items()}
        """a_s by table, (N, D)."""
        self.steps = {name: w.new_zeros(w.shape[0], dtype=torch.int32) for name, w in weights.items()}
        """s by table, int32 (N); 0 for a row that no step used yet."""

    @torch.no_grad()
    def catch_up(self, updates: Mapping[str, Update], step: int) -> None:
        """Bring the averages of a step's rows up to the steps done before it, while the weights are still theirs."""
        for name, (ids_U, _) in updates.items():
            weight_UD = self.weights[name].index_select(0, ids_U)
            share_U1 = kept_share(self.decay, self.steps[name].index_select(0, ids_U), step).unsqueeze(1)
            average_UD = self.averages[name].index_select(0, ids_U)
            self.averages[name].index_copy_(0, ids_U, weight_UD + share_U1 * (average_UD - weight_UD))

    @torch.no_grad()
    def take_in(self, updates: Mapping[str, Update], step: int) -> None:
        """Count the weights of a step's rows after it; `step`: steps done, this one among them."""
        share = float(kept_share(self.decay, torch.tensor(step - 1), step))
        for name, (ids_U, _) in updates.items():
            average_UD = self.averages[name].index_select(0, ids_U)
            average_UD.lerp_(self.weights[name].index_select(0, ids_U), 1 - share)
            self.averages[name].index_copy_(0, ids_U, average_UD)
            self.steps[name].index_fill_(0, ids_U, step)

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; views, not copies."""
        rows = {f"{ROWS}/{name}": tensor for name, tensor in self.averages.items()}
        return rows | {f"{STEPS}/{name}": tensor for name, tensor in self.steps.items()}


class DenseAverage:
    """Averages of a module's floating-point parameters and buffers, but for those named in `but`."""

    def __init__(self, module: nn.Module, decay: float, but: Sequence[str] = ()) -> None:
        self.decay = decay
        self.weights = {n: t for n, t in module.state_dict().items() if t.is_floating_point() and n not in but}
        self.averages = {name: weight.clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def take_in(self, step: int) -> None:
        """Count the weights after a step; `step`: steps done, this one among them."""
        share = float(kept_share(self.decay, torch.tensor(step - 1), step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.weights.values()), 1 - share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages; a second call puts them back."""
        for weight, average in zip(self.weights.values(), self.averages.values(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def averaged_rows(weight_ND: Tensor, average_ND: Tensor, steps_N: Tensor, decay: float, step: int) -> Tensor:
    """The average (N, D) of every row of a table after `step` steps."""
    return weight_ND + kept_share(decay, steps_N, step).unsqueeze(1) * (average_ND - weight_ND)


def averaged_tensors(tensors: Mapping[str, Tensor], decay: float, step: int) -> dict[str, Tensor]:
    """A checkpoint's tensors with the averages in place of the weights; the tensors themselves where decay is 0."""
    if not decay:
        return dict(tensors)
    found = dict(tensors)
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part == DENSE:
            found[f"model/{rest}"] = tensor
        elif part == ROWS:
            weights = tensors[f"tables/{rest}"]
            found[f"tables/{rest}"] = averaged_rows(weights, tensor, tensors[f"{STEPS}/{rest}"], decay, step)
    return found
