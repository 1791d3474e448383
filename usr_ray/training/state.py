"""What a step changes and a checkpoint holds: model, tables, both optimisers and the position in the data."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import usr_ray
from usr_ray.config import Config, date_ranges, first_difference
from usr_ray.data.manifest import Manifest
from usr_ray.model.embedding import WEIGHTS, Lookup, check_shapes
from usr_ray.model.multitask import REST_SHARE
from usr_ray.model.unique import EmbeddingError, ItemSides
from usr_ray.model.usr import UsrModel
from usr_ray.model.wide import WEIGHTS as WEIGHTS_OF_WIDE
from usr_ray.schema import FeatureSpec
from usr_ray.training.average import DENSE, DenseAverage
from usr_ray.training.checkpoint import Checkpoint, CheckpointError, part_of
from usr_ray.training.embeddings import (
    SIDES,
    Embeddings,
    ReplicatedEmbeddings,
    load_sides,
    load_vectors,
)
from usr_ray.training.optimizers import DenseAdamW, rate_scale, replica_hash
from usr_ray.training.warm_start import find_checkpoint, warm_start_refusal
from usr_ray.training.worker import Worker

FORMAT = 1
FIXED_KEYS = (
    "model",
    "features.crosses",
    "train.seed",
    "train.global_batch_size",
    "train.order",
    "train.reader_shards",
    "train.embedding_optimizer",
    "train.average",
    "train.early_stopping",
    "train.warm_start",
    "train.warm_start_optimizer",
    "data.mature_only",
    "data.final_labels",
    "data.only_scenario",
)
"""Configuration that gives the weights and the cursor their meaning: a resumed run must have the same.

With train.early_stopping the result is the checkpoint marked best, which a run without it would leave behind.
"""
_PIECE_BYTES = 1 << 26
_PACKAGES = ("torch", "numpy", "pyarrow", "safetensors")


class TrainState:
    """Model, tables, optimisers and cursor of one rank; at every step boundary bitwise equal on all ranks.

    Sharded tables alone differ: each rank holds its share.

    Args:
        config: `model` and `train` are used.
        manifest: the training rows; its spec sizes the tables, its hash is part of the cursor.
        worker: this rank. All ranks build the state together.
        order: SampleReader.fingerprint: what fixes the global batches, so that (epoch, step) means the same rows.
        total_steps: of the run; train.schedule goes by it.
    """

    step: int
    """Steps of the whole run."""

    def __init__(self, config: Config, manifest: Manifest, worker: Worker, *, order: str, total_steps: int = 0) -> None:
        self.config = config
        self.manifest = manifest
        self.order = order
        self.total_steps = total_steps
        self.trained_dates = date_ranges(manifest.dates)
        """Those that the weights will have seen, "A:B, C"; a warm start's are among them where `train` was told so."""
        torch.manual_seed(config.train.seed)
        self.module = UsrModel(manifest.spec, config.model, config.features.crosses)
        """The dense part itself: what is saved, exported and evaluated."""
        self.tables = build_embeddings(
            manifest.spec, config, worker, load_sides(manifest, config.model), load_vectors(manifest)
        )
        """The embedding tables with their optimiser."""
        compiled = torch.compile(self.module) if config.train.compile else self.module
        self.model = worker.wrap_model(compiled)  # type: ignore[arg-type]
        """What a training step calls."""
        self.dense = DenseAdamW(self.module, config.train, {WEIGHTS_OF_WIDE: config.model.wide_l2})
        decay = config.train.average
        # The shares are found for the averages, and so are none.
        self.average = DenseAverage(self.module, decay, but=[REST_SHARE]) if decay else None
        self._at_step(0)
        self.epoch = 0
        self.epoch_step = 0
        """Steps of the current epoch; all of them while the epoch waits for its evaluation."""

    def apply_gradients(self, lookup: Lookup) -> Tensor:
        """After the backward of a step: one step of both optimisers, the tables' on the rows of all ranks.

        Returns:
            The norm of the dense gradients before clipping, a scalar on the device. All ranks must call it.
        """
        norm = self.dense.step(scale=rate_scale(self.step, self.config.train, self.total_steps))
        self.tables.apply_gradients(lookup)
        self.epoch_step += 1
        self._at_step(self.step + 1)
        if self.average is not None:
            self.average.take_in(self.step)
        return norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block model and tables are their averages (train.average): what is evaluated and exported."""
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            with self.tables.averaged():
                yield
        finally:
            self.average.swap()

    def _at_step(self, step: int) -> None:
        self.step = step
        self.tables.at_step(step, rate_scale(step, self.config.train, self.total_steps))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name. All ranks must call it; sharded tables are whole on rank 0 alone."""
        sides = self.tables.sides
        of_items = {} if sides is None else {SIDES: sides.ids_NC}
        return self._dense_tensors() | self.tables.state_tensors() | of_items

    def _dense_tensors(self) -> dict[str, Tensor]:
        parts = {"model": self.module.state_dict(), "adamw": self.dense.state_tensors()}
        if self.average is not None:
            parts[DENSE] = self.average.averages
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def describe(self, worker: Worker) -> dict[str, Any]:
        """The JSON beside the tensors: cursor, configuration, table, random numbers, versions."""
        return {
            "format": FORMAT,
            "cursor": {
                "manifest": self.manifest.sha256,
                "order": self.order,
                "epoch": self.epoch,
                "step": self.epoch_step,
            },
            "table": {"uri": self.manifest.table_uri, "version": self.manifest.version},
            "trained_dates": self.trained_dates,
            "config": self.config.to_dict(),
            "spec": json.loads(self.manifest.spec.to_json()),
            "random": {"seed": self.config.train.seed, "rule": "a function of (seed, step), no state"},
            "world_size": worker.world_size,
            "versions": package_versions(),
        }

    def check_replicas(self, worker: Worker) -> None:
        """Raise RuntimeError on every rank when the ranks' states are not bitwise equal; all ranks must call it."""
        if worker.world_size == 1:
            return
        replica = self._dense_tensors() | self.tables.replicated_tensors()
        hashes = worker.all_gather_rows(torch.tensor([replica_hash(replica)])).tolist()
        if len(set(hashes)) > 1:
            raise RuntimeError(
                f"step {self.step}: the replicas of the weights differ (hashes by rank: {hashes}); the ranks' machines "
                "must have the same kind of processor and the same package versions"
            )

    def restore(self, checkpoint: Checkpoint | None, worker: Worker) -> bool:
        """Load rank 0's checkpoint on every rank; False when rank 0 has none. All ranks must call it.

        Only rank 0 reads storage; the others receive, so all start bitwise equal.

        Raises:
            CheckpointError: on every rank, when the checkpoint belongs to other rows or another model.
        """
        header: dict[str, Any] = {}
        if checkpoint is not None:
            header = {"step": checkpoint.step, "tensors": _shapes(checkpoint), "cursor": checkpoint.state.get("cursor")}
            header["refusal"] = refusal(checkpoint, self.config, self.manifest, self.order)
        header = share_json(worker, header)
        if not header:
            return False
        if header["refusal"]:
            raise CheckpointError(header["refusal"])
        check_shapes(self.tables.state_shapes(), {n: tuple(shape) for n, (_, shape) in header["tensors"].items()})
        shapes = {name: shape for name, shape in header["tensors"].items() if name != SIDES}  # the manifest has them
        self._receive(checkpoint, shapes, worker)
        self._at_step(header["step"])
        self.epoch, self.epoch_step = header["cursor"]["epoch"], header["cursor"]["step"]
        return True

    def warm_start(self, path: str, worker: Worker) -> str:
        """Take model and tables (train.warm_start_optimizer: optimisers too) from another run; returns its checkpoint.

        The step and the epoch stay 0. Rows that a table has beyond the old ones keep the values of a fresh table.

        Raises:
            CheckpointError: on every rank: there is no checkpoint, or it is of another model or of other features.
        """
        checkpoint = None
        header: dict[str, Any] = {}
        if worker.is_main:
            try:
                checkpoint = find_checkpoint(path)
                header = {"path": str(checkpoint.path), "tensors": _shapes(checkpoint)}
                header["refusal"] = warm_start_refusal(checkpoint.state, path, self.config, self.manifest)
            except CheckpointError as error:
                header = {"refusal": str(error)}
        header = share_json(worker, header)
        if header["refusal"]:
            raise CheckpointError(header["refusal"])
        # The averages begin anew: their steps are the other run's.
        parts = {"model", WEIGHTS}
        if self.config.train.warm_start_optimizer:
            parts |= {"adamw", self.config.train.embedding_optimizer.removeprefix("rowwise_")}
        self._receive(checkpoint, {n: s for n, s in header["tensors"].items() if n.split("/")[0] in parts}, worker)
        return str(header["path"])

    def _receive(self, checkpoint: Checkpoint | None, shapes: Mapping[str, Any], worker: Worker) -> None:
        """The named tensors of rank 0's checkpoint, on every rank."""
        of_tables, tensors = self.tables.state_shapes(), {}
        for name, (dtype, shape) in shapes.items():
            own = checkpoint.tensors[name] if checkpoint is not None and worker.is_main else None
            if name in of_tables:
                self._receive_rows(name, own, dtype, shape, worker)
            else:
                tensors[name] = worker.broadcast(_empty(shape, dtype) if own is None else own)
        self.module.load_state_dict(part_of(tensors, "model"))
        self.dense.load_state_tensors(part_of(tensors, "adamw"))
        if self.average is not None:
            for name, tensor in part_of(tensors, DENSE).items():
                self.average.averages[name].copy_(tensor)

    def _receive_rows(self, name: str, own: Tensor | None, dtype: str, shape: list[int], worker: Worker) -> None:
        """Load one table's tensor piece by piece, so that no rank has to hold the whole of a sharded one."""
        step = max(1, _PIECE_BYTES // max(1, _empty([1, *shape[1:]], dtype).nbytes))
        for first in range(0, shape[0], step):
            size = min(step, shape[0] - first)
            rows = _empty([size, *shape[1:]], dtype) if own is None else own[first : first + size]
            self.tables.load_rows(name, first, worker.broadcast(rows))


def build_embeddings(
    spec: FeatureSpec,
    config: Config,
    worker: Worker,
    sides: ItemSides | None = None,
    vectors: Mapping[str, Tensor] | None = None,
) -> Embeddings:
    """The tables of a run, by `train.embedding_strategy`. One worker's share is everything: then both are replicated.

    Raises:
        EmbeddingError: 'sharded' without the packages of the extra [sharded].
    """
    if config.train.embedding_strategy == "sharded" and worker.world_size > 1:
        try:
            from usr_ray.training.embeddings_sharded import ShardedEmbeddings
        except (ImportError, OSError) as error:  # OSError: FBGEMM's library was built for another torch
            raise EmbeddingError(
                "train.embedding_strategy 'sharded' needs TorchRec and FBGEMM, which cannot be loaded "
                f"({str(error).splitlines()[0]}); install the extra [sharded] (docs/embeddings.md) or set 'replicated'"
            ) from error
        return ShardedEmbeddings(spec, config, worker, sides, vectors)
    return ReplicatedEmbeddings(spec, config, worker, sides, vectors)


def refusal(checkpoint: Checkpoint, config: Config, manifest: Manifest, order: str) -> str | None:
    """Why a run of `config` on `manifest` must not continue from `checkpoint`: one line; None when it may.

    The number of workers may differ: global batches and their order do not depend on it.
    """
    way_out = "train in another --run-dir"
    saved = checkpoint.state
    if saved.get("format") != FORMAT:
        return f"checkpoint {checkpoint.path}: format {saved.get('format')}, this version reads {FORMAT}; {way_out}"
    if saved["cursor"]["manifest"] != manifest.sha256:
        return (
            f"checkpoint {checkpoint.path}: it was trained on other rows (manifest {saved['cursor']['manifest'][:12]} "
            f"of {saved['table']['uri']} version {saved['table']['version']}) than this run reads (manifest "
            f"{manifest.sha256[:12]} of {manifest.table_uri} version {manifest.version}); {way_out}, or pin the "
            "table version and dates it was trained on"
        )
    if saved["spec"] != json.loads(manifest.spec.to_json()):
        return f"checkpoint {checkpoint.path}: the table's features changed since it was written; {way_out}"
    then, now = Config.completed(saved["config"]), config.to_dict()
    if found := first_difference(then, now, FIXED_KEYS):
        path, old, new = found
        return f"checkpoint {checkpoint.path}: it has {path} = {old!r}, this run {new!r}; set it back, or {way_out}"
    if saved["cursor"]["order"] != order:
        return f"checkpoint {checkpoint.path}: the rows come in another order than when it was written; {way_out}"
    return None


def _shapes(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    return {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in checkpoint.tensors.items()}


def share_json(worker: Worker, value: Any) -> Any:
    """Rank 0's JSON value, on every rank."""
    if worker.world_size == 1:
        return json.loads(json.dumps(value))
    content = json.dumps(value).encode() if worker.is_main else b""
    length = int(worker.broadcast(torch.tensor([len(content)])))
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8) if worker.is_main else torch.empty(length).byte()
    return json.loads(worker.broadcast(buffer).numpy().tobytes())


def package_versions() -> dict[str, str]:
    """What computed the weights: name to version."""
    versions = {"usr_ray": usr_ray.__version__, "python": platform.python_version()}
    return versions | {package: metadata.version(package) for package in _PACKAGES}


def _empty(shape: list[int], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype))
