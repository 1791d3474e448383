"""What every backbone takes and gives, so that "+USR" is one wrapper around any of them.

Shape letters: B rows, I backbone input, E scenario embedding, Z trigger, S scenarios, T tasks (schema.TASKS).
A cell is one (scenario, task) pair; cell c = scenario * T + task.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class BackboneInput:
    """One batch as a backbone sees it; scenarios may be mixed, and some may be absent. Not to be changed in place."""

    x_BD: Tensor
    """float (B, input_dim): h_k = [i_k ; f_k ; z_k] with USR, [pooled history ; f ; e_k] without."""
    scenario_B: Tensor
    """int64 (B), 0 <= scenario < num_scenarios."""
    scenario_embedding_BE: Tensor
    """float (B, scenario_dim): e_k of the row's own scenario."""
    trigger_BZ: Tensor
    """float (B, trigger_dim): z_k; trigger_dim may be 0."""
    weights_B: Tensor
    """float (B): 0 marks a padding row, which must not influence any other row."""


@dataclass(frozen=True, slots=True)
class BackboneDims:
    """The sizes a backbone is built for."""

    input_dim: int
    """Width of x_BD."""
    scenario_dim: int
    """Width of scenario_embedding_BE."""
    trigger_dim: int
    """Width of trigger_BZ; may be 0."""
    num_scenarios: int
    """S, one or more."""


class Backbone(nn.Module):
    """Base of the seven backbones, and of yours: `__init__(config, dims)` as theirs, then `forward`.

    In evaluation a row's logits depend on that row, and on what `state_dict` holds, alone. Every parameter takes part
    in the graph of every forward, whatever the scenarios of the batch: DistributedDataParallel needs no search for
    unused parameters. `own.py` checks these promises of yours.
    """

    def forward(self, inputs: BackboneInput) -> Tensor:
        """Logits (B, T) of CTR and CTCVR, each row's in its own scenario; the dtype of x_BD."""
        raise NotImplementedError

    def fold(self) -> None:
        """Reduce to fewer parameters with the same outputs, in place, before an export; does nothing by default."""
