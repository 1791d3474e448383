"""Gradients of the tables' rows exchanged between replicas, AdamW on the dense part, and the hash of a replica.

Gradients are sums. A rank's loss is its share of the global loss (usr_ray.training.loss: cells are divided by global
counts), so the gradient of the global loss is the sum over ranks: for the tables `exchange` sums, for the dense part
the worker's DDP hook sums. Neither takes a mean, so one rank and many take the same step.

The tables stay outside DDP, which would move whole tables each step: ranks exchange (ids, gradients) of the rows of
the step, and each applies the same summed rows to its own replica (usr_ray/training/optimizer_rows.py,
docs/embeddings.md).

Shape letters: U unique ids, N ids that may repeat, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from usr_ray.config import TrainConfig
from usr_ray.schema import PADDING_ID

Update = tuple[Tensor, Tensor]
"""(ids_U, grads_UD): int64 rows of one table and the gradient of each."""

_TABLE_SHIFT = 48
"""Bits of a row id inside a packed (table, row) id: 2^15 tables of 2^48 rows."""
_HASH_CHUNK = 1 << 22


class RowGatherer(Protocol):
    """The part of usr_ray.training.worker.Worker that an exchange needs."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Every rank's rows in rank order; first dimensions may differ and may be 0."""


def sum_by_id(ids_N: Tensor, grads_ND: Tensor) -> Update:
    """Ascending unique ids and, for each, the sum of its gradients in the order they stand in.

    The order of the additions is fixed (a stable sort, then one sequential sum per id) on CPU and GPU alike; atomic
    adds would let replicas drift apart by rounding.
    """
    if ids_N.numel() == 0:
        return ids_N, grads_ND
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    ids_U, lengths_U = torch.unique_consecutive(sorted_N, return_counts=True)
    grads_UD = torch.segment_reduce(grads_ND[order_N], "sum", lengths=lengths_U, axis=0)
    return ids_U, grads_UD


def exchange(worker: RowGatherer, ids_U: Tensor, grads_UD: Tensor) -> Update:
    """Sum the row gradients of all ranks; every rank gets bitwise the same result.

    Args:
        worker: all its ranks must call this in the same order.
        ids_U: int64 (U), this rank's rows; U may be 0 and differ between ranks.
        grads_UD: float (U, D), D equal on all ranks.

    Returns:
        Ascending unique ids of all ranks and their summed gradients. With one rank, whose ids are unique already
        (Lookup), the arguments themselves.
    """
    if worker.world_size == 1:
        return ids_U, grads_UD
    return sum_by_id(worker.all_gather_rows(ids_U), worker.all_gather_rows(grads_UD))


def exchange_tables(worker: RowGatherer, updates: Mapping[str, Update]) -> dict[str, Update]:
    """`exchange` of all tables at once: the same few collectives a step however many tables there are.

    On a GPU nothing waits for its queue. The number of different ids is then not known to the host, so each table
    comes back with as many places as all ranks sent; those left over hold the padding id, which no optimiser trains.

    Args:
        worker: see `exchange`.
        updates: by table name, the same names and one D on all ranks.
    """
    if worker.world_size == 1 or not updates:
        return dict(updates)
    names = sorted(updates)
    packed_U = torch.cat([updates[name][0] + (number << _TABLE_SHIFT) for number, name in enumerate(names)])
    grads_UD = torch.cat([updates[name][1] for name in names])
    if packed_U.is_cuda:
        sizes_WT = worker.all_gather_rows(torch.tensor([[updates[name][0].shape[0] for name in names]]))
        ends = [0, *sizes_WT.sum(0).cumsum(0).tolist()]  # on the CPU, where a sum is known at once
        packed_U, grads_UD = sum_in_place(worker.all_gather_rows(packed_U), worker.all_gather_rows(grads_UD))
    else:
        packed_U, grads_UD = exchange(worker, packed_U, grads_UD)
        starts = torch.arange(len(names) + 1) << _TABLE_SHIFT
        ends = torch.searchsorted(packed_U, starts).tolist()
    row_mask = (1 << _TABLE_SHIFT) - 1
    return {
        name: (packed_U[ends[n] : ends[n + 1]] & row_mask, grads_UD[ends[n] : ends[n + 1]])
        for n, name in enumerate(names)
    }


def sum_in_place(packed_N: Tensor, grads_ND: Tensor) -> Update:
    """`sum_by_id` with results of the size of its arguments, so that no size has to come back from a GPU.

    Args:
        packed_N: int64, row ids with the table's number above _TABLE_SHIFT bits; they may repeat.
        grads_ND: their gradients.

    Returns:
        The ids sorted, the second and later copies of an id replaced by its table's padding id; and at the first copy
        the sum over the copies, in the order and so with the rounding of `sum_by_id`, at the others zero.
    """
    if packed_N.numel() == 0:
        return packed_N, grads_ND
    sorted_N, order_N = torch.sort(packed_N, stable=True)
    ends_N = torch.searchsorted(sorted_N, sorted_N, right=True)
    places_N = torch.arange(sorted_N.shape[0], device=sorted_N.device)
    is_first_N = torch.ones_like(sorted_N, dtype=torch.bool)
    is_first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    lengths_N = torch.where(is_first_N, ends_N - places_N, 0)
    # `unsafe` leaves out a check of the lengths that would have the host wait.
    sums_ND = torch.segment_reduce(grads_ND[order_N], "sum", lengths=lengths_N, axis=0, unsafe=True)
    padding_N = (sorted_N >> _TABLE_SHIFT << _TABLE_SHIFT) + PADDING_ID
    return torch.where(is_first_N, sorted_N, padding_N), sums_ND


class DenseAdamW:
    """AdamW on a module's parameters, with gradient clipping; its state goes by parameter name.

    Fused on the devices that can. Weight decay spares vectors (biases, norms), as is usual.

    Args:
        module: whose parameters are trained.
        config: rates, weight decay and clipping.
        own_decay: weight decay of parameters that have another, by name.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, own_decay: Mapping[str, float] | None = None) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.gradient_clip = config.gradient_clip
        self.learning_rate = config.learning_rate
        own = {name: decay for name, decay in (own_decay or {}).items() if name in self.parameters}
        matrices = [p for name, p in self.parameters.items() if p.dim() > 1 and name not in own]
        vectors = [p for name, p in self.parameters.items() if p.dim() <= 1 and name not in own]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
            *({"params": [self.parameters[name]], "weight_decay": decay} for name, decay in own.items()),
        ]
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters.values())
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.learning_rate, fused=fused)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, *, scale: float = 1.0) -> Tensor:
        """Clip to the global norm, then take one step at `scale` times the learning rate.

        Returns:
            The norm of all gradients before clipping: a scalar that stays on the device.
        """
        parameters = list(self.parameters.values())
        bound = self.gradient_clip if self.gradient_clip > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, bound)
        for group in self.optimizer.param_groups:
            group["lr"] = scale * self.learning_rate
        self.optimizer.step()
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """`<parameter>/<step|exp_avg|exp_avg_sq>` to tensor, for a checkpoint; views, not copies."""
        state = self.optimizer.state
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in state.get(parameter, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state_tensors`. A parameter without state starts afresh, as one that never had a gradient."""
        self.optimizer.state.clear()
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            parameter = self.parameters[name]
            self.optimizer.state[parameter][part] = tensor.to(parameter.device, copy=True)


def rate_scale(step: int, config: TrainConfig, total_steps: int) -> float:
    """Share of the learning rates (dense and tables) used in step 0, 1, .. of a run of `total_steps`.

    Linear up to 1 over train.warmup_steps, then by train.schedule: 1, or from 1 down towards 0, which would be reached
    one step after the last, along a half cosine or a line.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "none":
        return 1.0
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return (1 + math.cos(math.pi * min(done, 1.0))) / 2 if config.schedule == "cosine" else max(1 - done, 0.0)


@torch.no_grad()
def replica_hash(tensors: Mapping[str, Tensor]) -> int:
    """A number that changes with any bit of any tensor: equal on two ranks when their replicas are bitwise equal.

    One pass over the data on its own device. Tensors are taken in the order of their names.
    """
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().reshape(-1)
        words_N = tensor.view(torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8)
        for start in range(0, words_N.numel(), _HASH_CHUNK):
            chunk_N = words_N[start : start + _HASH_CHUNK].to(torch.int64)
            # Odd multipliers modulo 2^64: the change of one word alone can never cancel out.
            factor_N = torch.arange(start, start + chunk_N.numel(), device=chunk_N.device) * 5308871122 + 1
            total = (total * 31 + int(((chunk_N + 1) * factor_N).sum())) % 2**63
    return total
