"""Row-wise optimisers of embedding tables: work and memory traffic of a step follow its rows, not the tables.

Both are lazy: a row changes, and its state moves, only in the steps whose batch uses it. Row 0 (padding) never changes.
With summed gradient g (D values) of row r, weights w and learning rate a (times the share that warm-up allows), both
start with g <- g + weight_decay * w. Then

    row-wise Adagrad    A_r <- A_r + mean(g^2)
                        w <- w - a g / (sqrt(A_r) + eps)

    row-wise Adam       n_r <- n_r + 1
                        m_r <- b1 m_r + (1 - b1) g             (D values)
                        v_r <- b2 v_r + (1 - b2) mean(g^2)     (one value)
                        w <- w - a [m_r / (1 - b1^n_r)] / (sqrt(v_r / (1 - b2^n_r)) + eps)

Adam's bias is corrected by n_r, the steps that used row r, not by the steps of the run: m_r and v_r are averages over
those n_r gradients alone. Corrected by the run's step (as LazyAdam, SparseAdam and FBGEMM do), a row first seen late
would take a first step of (1 - b1) / sqrt(1 - b2) = 3.2 times the size, and rare rows are most of a table.

Sources: Adagrad with one accumulator per row as in TorchRec and FBGEMM (EXACT_ROWWISE_ADAGRAD); Adam as in
arXiv:1412.6980, with one second moment per row as in FBGEMM (PARTIAL_ROWWISE_ADAM).

Shape letters: N rows of a table, U rows of a step, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from usr_ray.config import TrainConfig
from usr_ray.schema import PADDING_ID
from usr_ray.training.optimizers import Update


class RowOptimizer:
    """What the row-wise optimisers share.

    Args:
        weights: float32 tables (N, D) by name, changed in place by `step`.
        learning_rate: a.
        eps: added to the root.
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
            scale: share of the learning rate to use.
        """
        for name, (ids_U, grads_UD) in updates.items():
            if ids_U.numel():
                # index_select and index_copy_: on a CPU half the time of an index in brackets, where tables are large.
                rows_UD = self.weights[name].index_select(0, ids_U)
                if self.weight_decay:
                    grads_UD = grads_UD + self.weight_decay * rows_UD  # noqa: PLW2901
                # A mask, not a selection: the host knows the number of rows and does not wait for a GPU.
                is_padding_U = ids_U == PADDING_ID
                masked_UD = torch.where(is_padding_U[:, None], 0.0, grads_UD)
                mean_UD, root_U = self._moments(name, ids_U, masked_UD, is_padding_U)
                step_UD = scale * self.learning_rate * mean_UD / (root_U + self.eps)[:, None]
                self.weights[name].index_copy_(0, ids_U, rows_UD - step_UD)

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

    def __init__(
        self, weights: Mapping[str, Tensor], *, learning_rate: float, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(weights, learning_rate=learning_rate, eps=eps, weight_decay=weight_decay)
        self.accumulators = {name: _zeros(weight) for name, weight in self.weights.items()}
        """A_r, float32 (N) by table."""

    def _moments(
        self,
        name: str,
        ids_U: Tensor,
        grads_UD: Tensor,
        is_padding_U: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
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

    def __init__(
        self, weights: Mapping[str, Tensor], *, learning_rate: float, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(weights, learning_rate=learning_rate, eps=eps, weight_decay=weight_decay)
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
"""By train.embedding_optimizer."""


def build_row_optimizer(weights: Mapping[str, Tensor], config: TrainConfig) -> RowOptimizer:
    """The optimiser that `train.embedding_optimizer` names, on these tables."""
    return ROW_OPTIMIZERS[config.embedding_optimizer](
        weights, learning_rate=config.embedding_learning_rate, weight_decay=config.embedding_weight_decay
    )


def _zeros(weight_ND: Tensor) -> Tensor:
    return torch.zeros(weight_ND.shape[0], dtype=torch.float32, device=weight_ND.device)
