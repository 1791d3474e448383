"""Tables whose rows are spread over the ranks, on TorchRec and FBGEMM: for tables that one worker cannot hold.

Row i of a table belongs to rank i modulo W, with its optimiser state. A step sends each rank's unique ids to the rows'
owners, brings the rows back, and after the backward sends the gradients to the owners, where FBGEMM sums them and takes
the step of row-wise Adagrad (docs/embeddings.md has the bytes).

TorchRec cuts a table into W blocks of c = ceil(N / W) rows, one a rank. Vocabularies put frequent values first and new
ones last, so blocks of ids would have one rank serve most of each batch: row i is kept at place (i mod W) c + i div W.

TorchRec's EmbeddingCollection is given unique ids, table by table, and not the features: what a batch repeats (an item
that is in many histories) crosses the wire once, and one table serves a feature and its histories without a second copy
of the rows. The padding row is zero, so it is never asked for.

Shape letters: N rows of a table, U ids and R rows of a step, D embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import Tensor
from torchrec.distributed import comm_ops
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from usr_ray.config import Config
from usr_ray.data.batch import UsrBatch
from usr_ray.model.embedding import WEIGHTS, EmbeddingMemory, Lookup, TableLookup, fresh_rows
from usr_ray.model.unique import ItemSides, UniqueIds, table_columns
from usr_ray.schema import FeatureSpec
from usr_ray.training.embeddings import Embeddings
from usr_ray.training.optimizers import RowwiseAdagrad
from usr_ray.training.worker import Worker

_EPS = 1e-8
_PIECE_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Shard:
    """What this rank holds of one tensor of the state."""

    rows: Tensor
    """(c, D) weights or (c) accumulators, the very memory that FBGEMM trains: row k is row k W + rank of the table."""
    shape: tuple[int, ...]
    """Shape of the whole tensor; the first dimension is N."""


@dataclass(frozen=True, slots=True)
class ShardedLookup(Lookup):
    """A lookup that knows where its rows came from."""

    sources: tuple[Tensor, ...] = ()
    """For each table (R - 1, D): the rows but for padding, with TorchRec's way back to their owners behind them."""


class ShardedEmbeddings(Embeddings):
    """Embeddings (usr_ray/training/embeddings.py) by rows. Every rank must look up and train together, evaluation
    included.

    Rows start as those of EmbeddingTables do. Gradients are summed over the ranks, as for the replicated tables.

    Args:
        config: its model.embedding_dim, train.seed and train.embedding_* are used.
        worker: this rank, in the default process group; more than one rank.
        sides: as for EmbeddingTables.
        vectors: as for EmbeddingTables; each rank holds them whole.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        config: Config,
        worker: Worker,
        sides: ItemSides | None = None,
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.sides, self.lists, self.spec = sides, table_columns(spec), spec
        self._hold(vectors or {}, worker.device)
        self.worker = worker
        self.dim = config.model.embedding_dim
        self.learning_rate = config.train.embedding_learning_rate
        self._num_rows = {name: f.num_embeddings for name, f in spec.vocabularies.items()}
        self._num_held = {name: -(-size // worker.world_size) for name, size in self._num_rows.items()}
        """c by table."""
        self._module = self._build(config)
        self._shards = self._find_shards()
        for name, size in self._num_rows.items():
            rows = fresh_rows(name, worker.rank, size, worker.world_size, dim=self.dim, seed=config.train.seed)
            self._shards[f"{WEIGHTS}/{name}"].rows[: rows.shape[0]] = rows

    def _build(self, config: Config) -> ShardedEmbeddingCollection:
        """TorchRec's module: one table and one feature for each name, all by rows, trained in the backward."""
        # The loss of a rank is its share of the global loss already; TorchRec would take the mean over ranks.
        comm_ops.set_gradient_division(False)
        device = self.worker.device
        tables = [
            EmbeddingConfig(
                name=name, feature_names=[name], num_embeddings=held * self.worker.world_size, embedding_dim=self.dim
            )
            for name, held in self._num_held.items()
        ]
        sharder = EmbeddingCollectionSharder(
            fused_params={
                "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
                "learning_rate": self.learning_rate,
                "eps": _EPS,
                "weight_decay": config.train.embedding_weight_decay,
                "weight_decay_mode": WeightDecayMode.L2,
            }
        )
        collection = EmbeddingCollection(tables=tables, device=torch.device("meta"))
        plan = construct_module_sharding_plan(
            collection,
            {name: row_wise(compute_kernel=EmbeddingComputeKernel.FUSED.value) for name in self._num_rows},
            sharder=sharder,
            local_size=self.worker.world_size if device.type == "cpu" else None,
            world_size=self.worker.world_size,
            device_type=device.type,
        )
        group = dist.group.WORLD
        assert group is not None
        return sharder.shard(collection, plan, ShardingEnv.from_process_group(group), device)

    def _find_shards(self) -> dict[str, _Shard]:
        """Weights and accumulators of this rank under the names they have in a checkpoint."""
        weights = self._module.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchRec's own use of ShardedTensor
            state = self._module.fused_optimizer.state_dict()["state"]
        shards = {}
        for name, size in self._num_rows.items():
            key = f"embeddings.{name}.weight"
            (table,) = weights[key].local_shards()
            (sums,) = state[key][f"{name}.momentum1"].local_shards()
            shards[f"{WEIGHTS}/{name}"] = _Shard(table.tensor.detach(), (size, self.dim))
            shards[f"{RowwiseAdagrad.part}/{name}"] = _Shard(sums.tensor.detach(), (size,))
        return shards

    @override
    def num_rows(self) -> dict[str, int]:
        return dict(self._num_rows)

    @override
    def lookup(self, batch: UsrBatch, unique: UniqueIds | None = None) -> ShardedLookup:
        # TorchRec has the host wait for a GPU here, to size what the ranks send one another.
        found = self.unique_ids(batch) if unique is None else unique
        wanted = [self._places(name, ids.rows_R[1:]) for name, ids in zip(self._num_rows, found, strict=True)]
        features = KeyedJaggedTensor(
            keys=list(self._num_rows),
            values=torch.cat(wanted),
            lengths=torch.tensor([len(rows_R) for rows_R in wanted]).to(self.worker.device, non_blocking=True),
        )
        with_grad = torch.is_grad_enabled()
        # FBGEMM counts its calls in place, which inference mode forbids.
        with torch.inference_mode(mode=False), torch.set_grad_enabled(with_grad):
            vectors = self._module(features)
            sources = tuple(vectors[name].values() for name in self._num_rows)
        tables = {}
        for name, ids, source_RD in zip(self._num_rows, found, sources, strict=True):
            rows_RD = torch.cat([source_RD.new_zeros(1, self.dim), source_RD.detach()])
            tables[name] = TableLookup.of_rows(rows_RD, ids)
        return ShardedLookup(tables, self.vectors_of(tables), sources=sources)

    def _places(self, name: str, rows_R: Tensor) -> Tensor:
        """Where TorchRec's table keeps these rows."""
        num_ranks = self.worker.world_size
        return rows_R % num_ranks * self._num_held[name] + rows_R // num_ranks

    @override
    def at_step(self, step: int, scale: float) -> None:
        # FBGEMM keeps the rate of the forward for the step that its backward takes.
        optimizer = self._module.fused_optimizer
        for group in optimizer.param_groups:
            group["lr"] = scale * self.learning_rate
        optimizer.step()  # no more than handing the rate over

    @override
    def apply_gradients(self, lookup: Lookup) -> None:
        # A table that the loss did not reach takes part with zeros, as it does in the exchange.
        assert isinstance(lookup, ShardedLookup)
        torch.autograd.backward(lookup.sources, [grads_UD for _, grads_UD in lookup.updates().values()])

    @override
    def memory(self) -> EmbeddingMemory:
        # this rank's share.
        weights = sum(s.rows.nbytes for name, s in self._shards.items() if name.startswith(f"{WEIGHTS}/"))
        return EmbeddingMemory(weights, sum(s.rows.nbytes for s in self._shards.values()) - weights)

    @override
    def replicated_tensors(self) -> dict[str, Tensor]:
        # none.
        return {}

    @override
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shard.shape for name, shard in self._shards.items()}

    @override
    def state_tensors(self) -> dict[str, Tensor]:
        # whole tensors in rank 0's memory (not its GPU's), nothing on the others.
        whole = {}
        num_ranks = self.worker.world_size
        for name, shard in self._shards.items():
            if self.worker.is_main:
                whole[name] = torch.empty(shard.shape, dtype=shard.rows.dtype)
            for rank in range(num_ranks):
                num_rows = len(range(rank, shard.shape[0], num_ranks))
                for first in range(0, num_rows, _PIECE_ROWS):
                    last = min(first + _PIECE_ROWS, num_rows)
                    piece = self._piece_of(rank, shard, first, last)
                    if self.worker.is_main:
                        whole[name][rank + first * num_ranks : rank + last * num_ranks : num_ranks] = piece
        return whole

    def _piece_of(self, rank: int, shard: _Shard, first: int, last: int) -> Tensor:
        """Rows first .. last - 1 of what `rank` holds, on rank 0; of no meaning elsewhere."""
        mine = shard.rows[first:last]
        if rank == self.worker.rank:
            if rank > 0:
                dist.send(mine.contiguous(), dst=0)
            return mine
        piece = torch.empty_like(mine)
        if self.worker.is_main:
            dist.recv(piece, src=rank)
        return piece

    @override
    def load_rows(self, name: str, first: int, rows: Tensor) -> None:
        num_ranks = self.worker.world_size
        skipped = (self.worker.rank - first) % num_ranks
        mine = rows[skipped::num_ranks]
        start = (first + skipped) // num_ranks
        held = self._shards[name].rows
        held[start : start + mine.shape[0]] = mine.to(held.device)
