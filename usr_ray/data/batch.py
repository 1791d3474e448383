"""UsrBatch: the tensors of one step, and UsrOutputs: a model's outputs for them.

Shape letters: B rows, F features, V history events of the batch (jagged), L padded history, S scenarios, T tasks,
D embedding, R rows that take part in the contrastive losses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from usr_ray.config import ModelConfig


@dataclass(frozen=True, slots=True)
class History:
    """One scenario's events before each row, jagged: row b owns values[offsets[b]:offsets[b + 1]], newest last."""

    item_ids_V: Tensor
    """Encoded item ids, of any integer type; the reader gives int32, or int64 where the table's ids need it."""
    actions_V: Tensor
    """1 click, 2 order, of any integer type; the reader gives int8."""
    ages_s_V: Tensor
    """float32, seconds before the impression, > 0."""
    query_ids_V: Tensor | None
    """Encoded queries, as item_ids_V; None where the scenario has no queries."""
    offsets: Tensor
    """int64, B + 1, starts at 0."""

    def emptied(self) -> History:
        """A history of as many rows, without an event."""
        queries = None if self.query_ids_V is None else self.query_ids_V[:0]
        events = (self.item_ids_V[:0], self.actions_V[:0], self.ages_s_V[:0], queries)
        return History(*events, torch.zeros_like(self.offsets))

    def padded(self, max_length: int) -> PaddedHistory:
        """The newest `max_length` events of each row as dense tensors on its own device; the newest in the last column.

        Nothing here waits for the device: the shapes depend on max_length alone.

        Args:
            max_length: L, columns of the result; pass FeatureSpec.history_length to drop no event.
        """
        start_B1, end_B1 = self.offsets[:-1, None], self.offsets[1:, None]
        source_BL = end_B1 - max_length + torch.arange(max_length, device=self.offsets.device)
        mask_BL = source_BL >= start_B1
        num_events = self.item_ids_V.shape[0]
        source_BL = source_BL.clamp(0, max(num_events - 1, 0))

        def dense(values_V: Tensor) -> Tensor:
            if num_events == 0:  # nothing to index
                return values_V.new_zeros(mask_BL.shape)
            return torch.where(mask_BL, values_V[source_BL], 0)

        return PaddedHistory(
            item_ids_BL=dense(self.item_ids_V),
            actions_BL=dense(self.actions_V),
            ages_s_BL=dense(self.ages_s_V),
            query_ids_BL=None if self.query_ids_V is None else dense(self.query_ids_V),
            mask_BL=mask_BL,
        )

    def slice_rows(self, start: int, stop: int) -> History:
        """Rows start..stop - 1; values are views. For histories on the CPU."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return History(
            item_ids_V=self.item_ids_V[first:last],
            actions_V=self.actions_V[first:last],
            ages_s_V=self.ages_s_V[first:last],
            query_ids_V=None if self.query_ids_V is None else self.query_ids_V[first:last],
            offsets=self.offsets[start : stop + 1] - first,
        )


@dataclass(frozen=True, slots=True)
class PaddedHistory:
    """A history as dense tensors; places without an event hold 0 and mask False."""

    item_ids_BL: Tensor
    """(B, L), of the history's type."""
    actions_BL: Tensor
    """(B, L), of the history's type."""
    ages_s_BL: Tensor
    """float32 (B, L)."""
    query_ids_BL: Tensor | None
    """(B, L), of the history's type; None where the scenario has no queries."""
    mask_BL: Tensor
    """bool (B, L), True where there is an event; events run from oldest to newest."""


@dataclass(frozen=True, slots=True)
class UsrBatch:
    """One step's rows of one rank. Padding rows have weight 0, row_number -1, ids 0 and empty histories."""

    labels_BT: Tensor
    """float32 (B, 4) in the order of schema.ALL_LABELS: 0, 1, or OPEN_LABEL in training (Reading.order_wait_us)."""
    weights_B: Tensor
    """float32, 1 for a row with weight, 0 for padding and for rows whose labels are not final."""
    scenario_B: Tensor
    """int64, position in FeatureSpec.scenarios."""
    sparse_BF: Tensor
    """(B, F), encoded ids in the order of FeatureSpec.sparse, of any integer type; the reader gives int32 or int64."""
    dense_BF: Tensor
    """float32 (B, F), in the order of FeatureSpec.dense; F may be 0."""
    histories: tuple[History, ...]
    """One entry per scenario, in the order of FeatureSpec.scenarios."""
    user_key_B: Tensor
    """int64 hash of the raw user_id: groups rows for GAUC; unknown users stay apart."""
    request_key_B: Tensor
    """int64 hash of the raw request_id: groups rows for NDCG."""
    row_number_B: Tensor
    """int64 position of the row in the manifest (file order, then row order), -1 for padding."""
    lists_BW: Tensor | None = None
    """(B, W), encoded ids of tags and terms in the order of FeatureSpec.lists, each list padded with 0 to its length,
    of any integer type; None where the spec has none."""
    longest: int | None = None
    """Events of the row that has most, over all its histories; None: not counted (`count_longest`)."""
    first_group: int = 0
    """Number of its first group of contrastive rows in the global batch."""

    def __len__(self) -> int:
        return int(self.scenario_B.shape[0])

    @property
    def row_fields(self) -> list[str]:
        """Names of the fields with one entry a row that the batch has."""
        names = (key.name for key in fields(self) if key.name not in ("histories", "longest", "first_group"))
        return [name for name in names if getattr(self, name) is not None]

    def map(self, function: Any) -> UsrBatch:
        """A batch with `function` applied to every tensor."""
        return map_tensors(self, function)

    def count_longest(self) -> UsrBatch:
        """The batch with `longest`. On a GPU this would wait for the queue: call it on the CPU."""
        if not len(self):
            return replace(self, longest=0)
        lengths_B = torch.stack([h.offsets for h in self.histories]).sum(0).diff()
        return replace(self, longest=int(lengths_B.max()))

    def slice_rows(self, start: int, stop: int) -> UsrBatch:
        """Rows start..stop - 1; all but the history offsets are views. For batches on the CPU."""
        rows = {name: getattr(self, name)[start:stop] for name in self.row_fields}
        return UsrBatch(**rows, histories=tuple(history.slice_rows(start, stop) for history in self.histories))


def map_tensors(value: Any, function: Any) -> Any:
    """`value`, of dataclasses and tuples, with `function` applied to every tensor; None and integers stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(v, function) for v in value)
    if value is None or isinstance(value, int):
        return value
    return replace(value, **{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})


@dataclass(frozen=True, slots=True)
class GroupShare:
    """The rows of whole groups, every nth of the global batch: those that the contrastive losses take of a batch.

    Numbers of Python's, the same in each step: no tensor has a size that a GPU would have to tell.
    """

    num_groups: int
    """Groups of the batch."""
    group_size: int
    first: int
    """The batch's first group that takes part."""
    step: int
    """n."""

    @classmethod
    def of_batch(cls, batch: UsrBatch, config: ModelConfig) -> GroupShare | None:
        """The share of a batch; None: all rows, also without contrastive losses, where groups need not be whole.

        Raises:
            ValueError: the batch is not of whole groups.
        """
        size, step = config.contrastive.group_size, config.contrastive.every_nth_group
        if step == 1 or not config.has_twins:
            return None
        if len(batch) % size:
            raise ValueError(f"a batch of {len(batch)} rows is not of whole groups of {size}")
        return cls(len(batch) // size, size, -batch.first_group % step, step)

    @property
    def num_rows(self) -> int:
        """How many rows take part; may be 0 where there are many workers."""
        return len(range(self.first, self.num_groups, self.step)) * self.group_size

    def view(self, values: Tensor, dim: int = 0) -> Tensor:
        """Where these rows' values are, dimension `dim` split into groups and rows of a group."""
        groups = values.unflatten(dim, (self.num_groups, self.group_size))
        return groups[(slice(None),) * dim + (slice(self.first, None, self.step),)]

    def of(self, values: Tensor, dim: int = 0) -> Tensor:
        """These rows' values, copied."""
        return self.view(values, dim).flatten(dim, dim + 1)


def rows_of(values_B: Tensor, share: GroupShare | None) -> Tensor:
    """The rows of `share`, or all without one."""
    return values_B if share is None else share.of(values_B)


@dataclass(frozen=True, slots=True)
class UsrOutputs:
    """A model's outputs for a batch, in log space so that products of probabilities stay exact.

    log_p and log_not_p hold log P(y = 1) and log P(y = 0), float32 also under mixed precision.
    """

    log_p_BT: Tensor
    """(B, 2) CTR and CTCVR of the row's own scenario."""
    log_not_p_BT: Tensor
    """(B, 2)"""
    log_p_global_BT: Tensor | None = None
    """(B, 2) global CTR and CTCVR; None without GLMT."""
    log_not_p_global_BT: Tensor | None = None
    interests_BSD: Tensor | None = None
    """(B, S, D) i_k of every view, for the contrastive loss; None when it is off or IE is off."""
    interests_twin_RSD: Tensor | None = None
    """Event-masked twins, the positives of the contrastive loss, of the R rows that take part (GroupShare)."""
    features_BSD: Tensor | None = None
    """(B, S, D) f_k of every view."""
    features_kept_RD: Tensor | None = None
    """1 for the columns of f_k that its twin, the positive of the contrastive loss, keeps, else 0; of the same rows."""
