"""A batch's histories as one list of events, and the part of an event that is not its item or query.

h_j = [e_item ; e_query or e_noq] + type + action + log-dt, where type is the scenario the event happened in.

Shape letters: B rows, S scenarios, V events of all histories (scenario after scenario, then row after row), G = S * B
histories, P = B * L slots, L longest row of the batch over all scenarios, H event vector (2 D), N kinds of events.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from usr_ray.data.batch import UsrBatch
from usr_ray.model.gather import Groups, Places, group_places
from usr_ray.schema import NUM_ACTIONS

NUM_AGES = 32
"""Buckets of dt: floor(log2(1 + seconds)), the last one open; 2^31 s are 68 years."""


@dataclass(frozen=True, slots=True)
class Events:
    """Where each event of a batch belongs."""

    history_V: Tensor
    """int64, history of the event: scenario * B + row."""
    from_newest_V: Tensor
    """int64, 0 for the newest event of its history, 1 for the one before it."""
    starts_SB: Tensor
    """int64, first event of each history."""
    lengths_SB: Tensor
    """int64, events of each history."""
    kinds: Places
    """(scenario, action, age bucket) of each event as an index into `EventKinds.forward`."""
    rows: Groups
    """The events of a row: its scenarios one after the other, newest last in each."""
    rank_V: Tensor
    """int64, the event's place in rows.order_V."""

    @property
    def num_events_B(self) -> Tensor:
        """int64 (B), events of a row in all scenarios."""
        return self.lengths_SB.sum(0)


def list_events(batch: UsrBatch) -> Events:
    """The events of all histories of a batch, on its device."""
    num_scenarios, num_rows = len(batch.histories), len(batch)
    lengths_SB = torch.stack([h.offsets[1:] - h.offsets[:-1] for h in batch.histories])
    lengths_G = lengths_SB.flatten()
    starts_G = lengths_G.cumsum(0) - lengths_G
    actions_V = torch.cat([h.actions_V for h in batch.histories])
    ages_s_V = torch.cat([h.ages_s_V for h in batch.histories])
    device, num_events = actions_V.device, actions_V.shape[0]
    histories_G = torch.arange(num_scenarios * num_rows, device=device)
    history_V = histories_G.repeat_interleave(lengths_G, output_size=num_events)
    # frexp is exact at powers of two, which a float log2 is not on every device.
    age_V = (torch.frexp(1 + ages_s_V.clamp(min=0)).exponent - 1).clamp(max=NUM_AGES - 1)
    scenario_V = history_V // max(num_rows, 1)
    kind_V = (scenario_V * NUM_ACTIONS + actions_V) * NUM_AGES + age_V
    # Histories come scenario after scenario; a row's events stand together once each history has moved by `shift`.
    num_events_B = lengths_SB.sum(0)
    row_starts_B = num_events_B.cumsum(0) - num_events_B
    shift_SB = row_starts_B + lengths_SB.cumsum(0) - lengths_SB - starts_G.view_as(lengths_SB)
    numbers_V = torch.arange(num_events, device=device)
    rank_V = numbers_V + shift_SB.flatten()[history_V]
    order_V = torch.empty_like(numbers_V)
    order_V[rank_V] = numbers_V
    return Events(
        history_V=history_V,
        from_newest_V=(starts_G + lengths_G)[history_V] - 1 - numbers_V,
        starts_SB=starts_G.view_as(lengths_SB),
        lengths_SB=lengths_SB,
        kinds=group_places(kind_V, num_scenarios * NUM_ACTIONS * NUM_AGES),
        rows=Groups(history_V - scenario_V * num_rows, order_V, row_starts_B),
        rank_V=rank_V,
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """The events of a row side by side, padded to the batch's longest row."""

    valid_BL: Tensor
    """bool, False on padding."""
    slots: Groups
    """The event of each slot (row * L + position) as groups of one event, or of none on padding."""

    def mark(self, keep_V: Tensor) -> Tensor:
        """The events for which keep_V holds, as a bool (B, L)."""
        marks_P = torch.zeros_like(self.valid_BL).flatten()
        marks_P[self.slots.group_V] = keep_V
        return marks_P.view_as(self.valid_BL)


def lay_out(events: Events, longest: int | None = None) -> Grid:
    """The grid of a batch's events; L = max(longest, 1).

    `longest` is UsrBatch.longest; None: counted here, which waits for a GPU.
    """
    num_events_B1, row_starts_B = events.num_events_B.unsqueeze(1), events.rows.starts_G
    num_rows = row_starts_B.shape[0]
    if longest is None:
        longest = int(num_events_B1.max()) if num_rows else 1
    longest = max(longest, 1)
    position_L = torch.arange(longest, device=row_starts_B.device)
    # An empty slot starts where the row's events end.
    starts_P = (row_starts_B.unsqueeze(1) + torch.minimum(position_L, num_events_B1)).flatten()
    row_shift_B = torch.arange(num_rows, device=row_starts_B.device) * longest - row_starts_B
    slot_V = events.rank_V + row_shift_B[events.rows.group_V]
    return Grid(position_L < num_events_B1, Groups(slot_V, events.rows.order_V, starts_P))


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
