"""A batch's histories as one list of events, and the part of an event that is not its item or query.

h_j = [e_item ; e_query or e_noq] + type + action + log-dt, where type is the scenario the event happened in.

Shape letters: B rows, S scenarios, V events of all histories (scenario after scenario, then row after row), G = S * B
histories, L longest row of the batch over all scenarios, H event vector (2 D), N kinds of events.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from usr_ray.batch import UsrBatch
from usr_ray.model.gather import Places, group_places
from usr_ray.schema import NUM_ACTIONS

NUM_AGES = 32
"""Buckets of dt: floor(log2(1 + seconds)), the last one open; 2^31 s are 68 years."""


@dataclass(frozen=True, slots=True)
class Events:
    """Where each event of a batch belongs. Fields with V are int64."""

    group_V: Tensor
    """History of the event: scenario * B + row."""
    starts_G: Tensor
    """int64, first event of each history."""
    lengths_SB: Tensor
    """int64, events of each history."""
    kinds: Places
    """(scenario, action, age bucket) of each event as an index into `EventKinds.forward`."""

    @property
    def num_events_B(self) -> Tensor:
        """int64 (B), events of a row in all scenarios."""
        return self.lengths_SB.sum(0)

    def from_newest_V(self) -> Tensor:
        """int64, 0 for the newest event of its history, 1 for the one before it."""
        ends_G = self.starts_G + self.lengths_SB.flatten()
        return ends_G[self.group_V] - 1 - torch.arange(self.group_V.shape[0], device=self.group_V.device)


def list_events(batch: UsrBatch) -> Events:
    """The events of all histories of a batch, on its device."""
    num_scenarios, num_rows = len(batch.histories), len(batch)
    lengths_SB = torch.stack([h.offsets[1:] - h.offsets[:-1] for h in batch.histories])
    lengths_G = lengths_SB.flatten()
    starts_G = lengths_G.cumsum(0) - lengths_G
    actions_V = torch.cat([h.actions_V for h in batch.histories])
    ages_s_V = torch.cat([h.ages_s_V for h in batch.histories])
    groups_G = torch.arange(num_scenarios * num_rows, device=lengths_G.device)
    group_V = groups_G.repeat_interleave(lengths_G, output_size=actions_V.shape[0])
    # frexp is exact at powers of two, which a float log2 is not on every device.
    age_V = (torch.frexp(1 + ages_s_V.clamp(min=0)).exponent - 1).clamp(max=NUM_AGES - 1)
    scenario_V = group_V // max(num_rows, 1)
    kind_V = (scenario_V * NUM_ACTIONS + actions_V) * NUM_AGES + age_V
    kinds = group_places(kind_V, num_scenarios * NUM_ACTIONS * NUM_AGES)
    return Events(group_V, starts_G, lengths_SB, kinds)


@dataclass(frozen=True, slots=True)
class Grid:
    """The events of a row side by side, padded to the batch's longest row."""

    place_V: Tensor
    """int64, row * L + position of each event; a row's scenarios follow one another, newest last in each."""
    valid_BL: Tensor
    """bool, False on padding."""

    def pad(self, values_VC: Tensor) -> Tensor:
        """(B, L, C) with zeros on padding."""
        shape = self.valid_BL.shape
        padded_PC = values_VC.new_zeros((shape[0] * shape[1], values_VC.shape[1]))
        return padded_PC.index_copy_(0, self.place_V, values_VC).view(*shape, -1)

    def mark(self, keep_V: Tensor) -> Tensor:
        """The events for which keep_V holds, as a bool (B, L)."""
        marks_P = torch.zeros_like(self.valid_BL).flatten()
        marks_P[self.place_V] = keep_V
        return marks_P.view_as(self.valid_BL)


def lay_out(events: Events) -> Grid:
    """The grid of a batch's events; L is at least 1. On a GPU this waits for the longest row's length."""
    num_rows = events.lengths_SB.shape[1]
    num_events_B = events.num_events_B
    longest = max(int(num_events_B.max()), 1) if num_rows else 1
    before_G = (events.lengths_SB.cumsum(0) - events.lengths_SB).flatten()
    row_starts_G = torch.arange(num_rows, device=before_G.device).repeat(events.lengths_SB.shape[0]) * longest
    shift_G = row_starts_G + before_G - events.starts_G
    place_V = shift_G[events.group_V] + torch.arange(events.group_V.shape[0], device=before_G.device)
    valid_BL = torch.arange(longest, device=before_G.device) < num_events_B.unsqueeze(1)
    return Grid(place_V, valid_BL)


class EventKinds(nn.Module):
    """Type, action and log-dt embeddings, added up for every kind of event there is."""

    def __init__(self, num_scenarios: int, event_dim: int, init_std: float) -> None:
        super().__init__()
        self.type_SH = nn.Parameter(torch.randn(num_scenarios, event_dim) * init_std)
        self.action_AH = nn.Parameter(torch.randn(NUM_ACTIONS, event_dim) * init_std)
        self.age_GH = nn.Parameter(torch.randn(NUM_AGES, event_dim) * init_std)

    def forward(self) -> Tensor:
        """(N, H): row (scenario * NUM_ACTIONS + action) * NUM_AGES + age bucket."""
        return (self.type_SH[:, None, None] + self.action_AH[:, None] + self.age_GH).flatten(0, 2)
