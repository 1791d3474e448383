"""Gradients of the tables' rows exchanged between replicas, the optimisers of tables and dense part, a replica's hash.

Gradients are sums. A rank's loss is its share of the global loss (usr_ray.training.loss: cells are divided by global
counts), so the gradient of the global loss is the sum over ranks: `exchange_tables` sums for the tables, the worker's
DDP hook for the dense part. Neither takes a mean, so one rank and many take the same step.

The tables stay outside DDP, which would move whole tables each step: ranks exchange (ids, gradients) of the rows of
the step, and each applies the same summed rows to its own replica (RowOptimizer,
docs/embeddings.md).

Shape letters: U unique ids, N ids that may repeat, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from usr_ray.config import TrainConfig
from usr_ray.schema import PADDING_ID
from usr_ray.training.worker import Worker

Update = tuple[Tensor, Tensor]
"""(ids_U, grads_UD): int64 rows of one table and the gradient of each."""

_TABLE_SHIFT = 48
"""Bits of a row id inside a packed (table, row) id: 2^15 tables of 2^48 rows."""
_HASH_CHUNK = 1 << 22


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


def exchange_tables(worker: Worker, updates: Mapping[str, Update]) -> dict[str, Update]:
    """Sum the row gradients of all ranks: the same few collectives a step however many tables there are.

    Every rank gets bitwise the same: ascending unique ids and the sums of their gradients. On a GPU nothing waits for
    its queue. The number of different ids is then not known to the host, so each table comes back with as many places
    as all ranks sent; those left over hold the padding id, which no optimiser trains.

    Args:
        worker: all its ranks must call this in the same order.
        updates: by table name, the same names and one D on all ranks; U may be 0 and differ. Of one rank, whose ids
            are unique already (Lookup), they come back as they are.
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
        packed_U, grads_UD = sum_by_id(worker.all_gather_rows(packed_U), worker.all_gather_rows(grads_UD))
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


_NOT_DECAYED = ("bias_", "biases_", "beta_", "gamma_", "weight_SNIO")
"""How the names of biases, of norms and of factors that begin at 1 begin, where scenarios or experts have one each and
they are no vectors. Towards 0 a scenario without rows would lose its factors: STAR's W_k, which begin at 1, go nowhere.
"""


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls a dense parameter towards 0: not biases, norms and factors that begin at 1."""
    own_name = name.rstrip("0123456789.").rpartition(".")[2]
    return parameter.dim() > 1 and not own_name.startswith(_NOT_DECAYED)


class DenseAdamW:
    """AdamW on a module's parameters, with gradient clipping; its state goes by parameter name.

    Fused on the devices that can. Weight decay is that of `is_decayed`.

    Args:
        config: rates, weight decay and clipping.
        own_decay: name -> weight decay, of parameters that have another than `config` says.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, own_decay: Mapping[str, float] | None = None) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.gradient_clip = config.gradient_clip
        self.learning_rate = config.learning_rate
        own = {name: decay for name, decay in (own_decay or {}).items() if name in self.parameters}
        decayed = [p for name, p in self.parameters.items() if is_decayed(name, p) and name not in own]
        spared = [p for name, p in self.parameters.items() if not is_decayed(name, p) and name not in own]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": spared, "weight_decay": 0.0},
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


class RowOptimizer:
    """Optimiser of embedding tables whose work and memory traffic in a step follow its rows, not the tables.

    Lazy: a row changes, and its state moves, only in the steps whose batch uses it. Row 0 (padding) never changes. With
    summed gradient g (D values) of row r, weights w and learning rate a (times the share that warm-up allows), g <- g +
    weight_decay * w, then

        row-wise Adagrad    A_r <- A_r + mean(g^2)
                            w <- w - a g / (sqrt(A_r) + eps)

        row-wise Adam       n_r <- n_r + 1
                            m_r <- b1 m_r + (1 - b1) g             (D values)
                            v_r <- b2 v_r + (1 - b2) mean(g^2)     (one value)
                            w <- w - a [m_r / (1 - b1^n_r)] / (sqrt(v_r / (1 - b2^n_r)) + eps)

    Adam's bias is corrected by n_r, the steps that used row r, not by the steps of the run: m_r and v_r are averages
    over those n_r gradients alone. Corrected by the run's step (as LazyAdam, SparseAdam and FBGEMM do), a row first
    seen late would take a first step of (1 - b1) / sqrt(1 - b2) = 3.2 times the size; most rows of a table are rare.

    Sources: Adagrad with one accumulator per row as in TorchRec and FBGEMM (EXACT_ROWWISE_ADAGRAD); Adam as in
    arXiv:1412.6980, with one second moment per row as in FBGEMM (PARTIAL_ROWWISE_ADAM).

    Args:
        weights: float32 tables (N, D) by name, changed in place by `step`.
        weight_decay: L2 on the rows of a step.
    """

    part: ClassVar[str]
    """First part of the names of the state in a checkpoint."""

    def __init__(
        self, weights: Mapping[str, Tensor], *, learning_rate: float, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self.weights = dict(weights)
        self.learning_rate = learning_rate
        self.eps = eps
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self, updates: Mapping[str, Update], *, scale: float = 1.0) -> None:
        """Apply one step of exchanged updates; `scale` multiplies the learning rate (warm-up).

        Args:
            updates: ids unique in each table but for padding, as exchange_tables gives them; a table may be absent or
                empty.
        """
        for name, (ids_U, grads_UD) in updates.items():
            if ids_U.numel():
                # index_select and index_copy_: on a CPU half the time of an index in brackets, where tables are large.
                rows_UD = self.weights[name].index_select(0, ids_U)
                if self.weight_decay:
                    grads_UD = grads_UD + self.weight_decay * rows_UD  # noqa: PLW2901
                # A mask, not a selection: the host knows the number of rows and does not wait for a GPU.
                is_padding_U = ids_U == PADDING_ID
                masked_UD = grads_UD.masked_fill(is_padding_U[:, None], 0.0)
                mean_UD, root_U = self._moments(name, ids_U, masked_UD, is_padding_U)
                root_U1 = (root_U + self.eps)[:, None]
                rows_UD.addcdiv_(mean_UD, root_U1, value=-scale * self.learning_rate)
                self.weights[name].index_copy_(0, ids_U, rows_UD)

    def _moments(self, name: str, ids_U: Tensor, grads_UD: Tensor, is_padding_U: Tensor) -> tuple[Tensor, Tensor]:
        """Move the state of a step's rows; (U, D) what the rate multiplies, zero for padding, and (U) its divisor."""
        raise NotImplementedError

    def state_tensors(self) -> dict[str, Tensor]:
        """The state by name, for a checkpoint; each tensor has N rows. Views, not copies."""
        raise NotImplementedError

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state_tensors`; KeyError where a table is missing."""
        for name, tensor in self.state_tensors().items():
            tensor.copy_(tensors[name])


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one accumulator per row: 4 bytes per row."""

    part = "adagrad"

    def __init__(self, weights: Mapping[str, Tensor], **settings: float) -> None:
        super().__init__(weights, **settings)
        self.accumulators = {name: w.new_zeros(w.shape[0], dtype=torch.float32) for name, w in weights.items()}
        """A_r, float32 (N) by table."""

    def _moments(self, name: str, ids_U: Tensor, grads_UD: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        accumulator_N = self.accumulators[name]
        sums_U = accumulator_N.index_select(0, ids_U) + grads_UD.square().mean(dim=1)
        accumulator_N[ids_U] = sums_U
        return grads_UD, sums_U.sqrt()

    def state_tensors(self) -> dict[str, Tensor]:
        """`<table>`: A_r."""
        return dict(self.accumulators)


class RowwiseAdam(RowOptimizer):
    """Adam with one second moment and one step count per row: 4 D + 8 bytes per row."""

    part = "adam"
    beta1, beta2 = 0.9, 0.999

    def __init__(self, weights: Mapping[str, Tensor], **settings: float) -> None:
        super().__init__(weights, **settings)
        self.first = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        """m_r, float32 (N, D) by table."""
        # Side by side in one matrix: a row's two numbers are then one access to memory, where tables are large.
        self._pairs = {n: weight.new_zeros((weight.shape[0], 2), dtype=torch.int32) for n, weight in weights.items()}
        self.second = {name: pairs_N2.view(torch.float32)[:, 0] for name, pairs_N2 in self._pairs.items()}
        """v_r, float32 (N) by table; a view."""
        self.counts = {name: pairs_N2[:, 1] for name, pairs_N2 in self._pairs.items()}
        """n_r, int32 (N) by table; a view."""

    def _moments(self, name: str, ids_U: Tensor, grads_UD: Tensor, is_padding_U: Tensor) -> tuple[Tensor, Tensor]:
        first_ND, pairs_N2 = self.first[name], self._pairs[name]
        first_UD = self.beta1 * first_ND.index_select(0, ids_U) + (1 - self.beta1) * grads_UD
        pairs_U2 = pairs_N2.index_select(0, ids_U)
        second_U = self.beta2 * pairs_U2.view(torch.float32)[:, 0] + (1 - self.beta2) * grads_UD.square().mean(dim=1)
        # Padding's moments stay zero by themselves; its count is 1 here, so that nothing is divided by zero.
        count_U = pairs_U2[:, 1] + 1
        first_ND.index_copy_(0, ids_U, first_UD)
        moved_U2 = torch.stack([second_U.view(torch.int32), torch.where(is_padding_U, 0, count_U)], dim=1)
        pairs_N2.index_copy_(0, ids_U, moved_U2)
        corrected_UD = first_UD / (1 - self.beta1 ** count_U.double()).float()[:, None]
        return corrected_UD, (second_U / (1 - self.beta2 ** count_U.double()).float()).sqrt()

    def state_tensors(self) -> dict[str, Tensor]:
        """`<table>/first`, `<table>/second`, `<table>/count`: m_r, v_r, n_r."""
        parts = {"first": self.first, "second": self.second, "count": self.counts}
        return {f"{name}/{part}": tensors[name] for name in self.weights for part, tensors in parts.items()}


ROW_OPTIMIZERS: dict[str, type[RowOptimizer]] = {"rowwise_adagrad": RowwiseAdagrad, "rowwise_adam": RowwiseAdam}
"""train.embedding_optimizer -> its class."""


def build_row_optimizer(weights: Mapping[str, Tensor], config: TrainConfig) -> RowOptimizer:
    """The optimiser that `train.embedding_optimizer` names, on these tables."""
    return ROW_OPTIMIZERS[config.embedding_optimizer](
        weights, learning_rate=config.embedding_learning_rate, weight_decay=config.embedding_weight_decay
    )
