"""Exact evaluation: every row once, whatever the number of workers and the batch size; then files that others read.

Each rank scores its slice of the rows in file order; labels, log probabilities and keys are gathered and sorted by row
number, and the metrics see all rows at once (method, section 6).

Shape letters: B rows of a batch, N rows of the evaluation, T tasks (schema.TASKS).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from usr_ray.config import Config, UserError
from usr_ray.data.batch import UsrBatch, UsrOutputs
from usr_ray.data.feed import Feed
from usr_ray.data.lineage import built_with, difference
from usr_ray.data.manifest import Manifest
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.evaluation.metrics import CellMetrics, Predictions, known_labels_only, metrics_by_scenario
from usr_ray.model.backbones import OwnBackboneError
from usr_ray.model.embedding import EmbeddingTables, RowSource
from usr_ray.model.unique import ITEM_TABLE, ItemSides, UniqueIds, event_sides
from usr_ray.model.usr import UsrModel
from usr_ray.schema import ALL_LABELS, TASKS, UNKNOWN_ID, FeatureSpec
from usr_ray.training.average import averaged_tensors
from usr_ray.training.checkpoint import CHECKPOINTS, VECTORS, Checkpoint, CheckpointError, CheckpointStore, part_of
from usr_ray.training.embeddings import SIDES
from usr_ray.training.worker import Worker


class EvaluationError(UserError):
    """Rows that cannot be evaluated."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of `evaluate`; on ranks other than 0 both fields are None."""

    predictions: Predictions | None
    """Rows that count, in row_number order."""
    metrics: CellMetrics | None
    """One split of metrics.json."""


def evaluate(
    model: nn.Module,
    tables: RowSource,
    manifest: Manifest,
    worker: Worker,
    config: Config,
    *,
    scored: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Score every row of `manifest` once and compute the metrics on rank 0. All ranks must call it.

    Rows of weight 0 (padding; labels that are not final) take no part. The model is put back into the mode (training or
    not) it came in. `scored` is called with the number of rows of each batch.

    Raises:
        EvaluationError: the model's probabilities are not numbers in [0, 1].
    """
    integers, log_probs, labels, kept = [], [], [], []
    with evaluation_reader(manifest, worker, config) as reader:
        for batch, outputs in score_batches(model, tables, reader, manifest.spec, worker.device):
            kept_B = batch.weights_B > 0
            columns = [batch.row_number_B, batch.scenario_B, batch.user_key_B, batch.request_key_B]
            columns += [_row_ids(tables, batch.sparse_BF[:, _ITEM]), _history_lengths(batch)]
            integers.append(torch.stack(columns, dim=1)[kept_B])
            labels.append(batch.labels_BT[kept_B])
            kept.append(kept_B)
            log_p = [outputs.log_p_BT]
            if outputs.log_p_global_BT is not None:
                log_p.append(outputs.log_p_global_BT)
            scored(len(batch))
            log_probs.append(torch.cat(log_p, dim=1))  # stays on the device, so that the host does not wait for a GPU
    if log_probs:
        log_probs = [torch.cat(log_probs).cpu()[torch.cat(kept)].double()]
    # A rank without a batch still takes part in every collective, with rows of the width the others have.
    has_global = worker.any_true(bool(log_probs) and log_probs[0].shape[1] > len(TASKS))
    width = 2 * len(TASKS) if has_global else len(TASKS)
    integers_N = worker.all_gather_rows(_rows(integers, 6, torch.int64))
    log_probs_N = worker.all_gather_rows(_rows(log_probs, width, torch.float64))
    labels_N = worker.all_gather_rows(_rows(labels, len(ALL_LABELS), torch.float32))
    if not worker.is_main:
        return Evaluation(None, None)
    predictions = _predictions(integers_N.numpy(), log_probs_N.exp().numpy(), labels_N.numpy(), manifest.spec)
    return Evaluation(predictions, metrics_by_scenario(predictions, manifest.spec.scenarios))


def evaluation_reader(manifest: Manifest, worker: Worker, config: Config, *, mature_only: bool = True) -> SampleReader:
    """Reader of the rank's rows of a held-out manifest, in file order.

    Rows whose labels are not final have weight 0, however the run was trained (data.mature_only): their orders, and
    clicks, are yet to come. `mature_only` off: every row has weight.
    """
    reading = Reading(
        global_batch_size=config.train.global_batch_size,
        group_size=config.model.contrastive.group_size,
        order="file",
        mature_only=mature_only,
        only_scenario=config.data.only_scenario,
        rank=worker.rank,
        world_size=worker.world_size,
        num_threads=config.train.reader_threads,
    )
    return SampleReader(manifest, reading)


def score_batches(
    model: nn.Module, tables: RowSource, reader: SampleReader, spec: FeatureSpec, device: torch.device
) -> Iterator[tuple[UsrBatch, UsrOutputs]]:
    """(batch, outputs) of every batch of `reader`, with the model in evaluation mode and float32.

    The batch is on the CPU, the outputs are on `device`; batches are read, their ids found and copied ahead of use.

    `spec` is the manifest's. Vocabularies grow after a model was trained; an id that the model has no embedding for is
    given to it as unknown, as any new value is. Ranks are not in step here, so DDP's wrapper is not called.
    """
    limits = tables.num_rows()
    has_grown = any(limits[name] < feature.num_embeddings for name, feature in spec.vocabularies.items())
    module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    was_training = module.training

    def batches() -> Iterator[tuple[tuple[UsrBatch, UniqueIds], UsrBatch]]:
        for batch in reader.batches(epoch=0):
            known = known_ids(batch, spec, limits) if has_grown else batch
            yield (known.count_longest(), tables.unique_ids(known)), known

    module.eval()
    try:
        with Feed(batches(), device) as feed:
            for (batch, unique), on_host in feed:
                with torch.inference_mode():
                    outputs = module(batch, tables.lookup(batch, unique))
                yield on_host, outputs
    finally:
        module.train(was_training)


def known_ids(batch: UsrBatch, spec: FeatureSpec, limits: dict[str, int]) -> UsrBatch:
    """The batch with UNKNOWN_ID in place of ids at or above the size of their embedding table."""

    def known(ids: Tensor, feature: str) -> Tensor:
        return torch.where(ids < limits[feature], ids, UNKNOWN_ID)

    columns = [known(batch.sparse_BF[:, place], feature.name) for place, feature in enumerate(spec.sparse)]
    histories = tuple(
        replace(
            history,
            item_ids_V=known(history.item_ids_V, "item_id"),
            query_ids_V=None if history.query_ids_V is None else known(history.query_ids_V, "query"),
        )
        for history in batch.histories
    )
    lists = batch.lists_BW
    if lists is not None:
        parts = {feature: lists[:, slice(*spec.list_places[feature.name])] for feature in spec.lists}
        lists = torch.cat([known(ids, feature.vocabulary) for feature, ids in parts.items()], dim=1)
    return replace(batch, sparse_BF=torch.stack(columns, dim=1), histories=histories, lists_BW=lists)


_ITEM = 1
"""Column of item_id in sparse_BF (FeatureSpec.sparse starts with user_id, item_id, query)."""


def _row_ids(tables: RowSource, item_B: Tensor) -> Tensor:
    """UNKNOWN_ID in place of items that are known by their vector alone: cold ones, as those without an id."""
    cold_N = tables.cold.get(ITEM_TABLE)
    return item_B if cold_N is None else torch.where(cold_N[item_B], UNKNOWN_ID, item_B)


def _history_lengths(batch: UsrBatch) -> Tensor:
    lengths_B = torch.zeros_like(batch.row_number_B)
    for history in batch.histories:
        lengths_B += history.offsets[1:] - history.offsets[:-1]
    return lengths_B


def _rows(parts: list[Tensor], width: int, dtype: torch.dtype) -> Tensor:
    return torch.cat(parts) if parts else torch.empty((0, width), dtype=dtype)


def _predictions(integers: NDArray, probs: NDArray, labels: NDArray, spec: FeatureSpec) -> Predictions:
    order = np.argsort(integers[:, 0], kind="stable")
    integers, probs, labels = integers[order], probs[order], labels[order]
    row_number_N, scenario_N, user_key_N, request_key_N, item_id_N, history_length_N = integers.T
    if len(row_number_N) and (np.diff(row_number_N) == 0).any():
        raise RuntimeError("a row was evaluated twice; the reader's slices overlap")
    labels = known_labels_only(labels, scenario_N, spec.known_labels)
    num_wrong = int((~(probs <= 1)).any(axis=1).sum())
    if num_wrong:
        raise EvaluationError(
            f"evaluation: the model's probabilities are not numbers on {num_wrong} of {len(probs)} rows, so it has "
            "diverged; train with a lower train.learning_rate or train.gradient_clip"
        )
    return Predictions(
        row_number_N=row_number_N,
        scenario_N=scenario_N,
        labels_NT=labels,
        probs_NT=probs[:, : len(TASKS)],
        global_probs_NT=probs[:, len(TASKS) :] if probs.shape[1] > len(TASKS) else None,
        user_key_N=user_key_N,
        request_key_N=request_key_N,
        item_id_N=item_id_N,
        history_length_N=history_length_N,
    )


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A model as a checkpoint holds it."""

    module: UsrModel
    tables: EmbeddingTables
    config: Config
    """Configuration of the run that wrote the checkpoint."""
    spec: FeatureSpec
    """Features of the table that it was trained on."""
    checkpoint: Checkpoint


def load_run(run_dir: Path, device: torch.device | str = "cpu", *, flag: str = "--run-dir") -> TrainedRun:
    """The model of a run's best checkpoint, or of its newest valid one where none was marked best.

    With train.average its weights are the averages. `flag`: what names the run, for messages.

    Raises:
        EvaluationError: no such directory, or no valid checkpoint in it. CheckpointError: it is another version's.
        OwnBackboneError: its backbone is a class of the user's that is not on this machine.
    """
    if not run_dir.is_dir():
        raise EvaluationError(f"{flag} {run_dir}: no such directory; name the --run-dir of jobs/train.py")
    store = CheckpointStore(run_dir / CHECKPOINTS)
    checkpoint = store.chosen()
    if checkpoint is None:
        raise EvaluationError(f"{flag} {run_dir}: holds no valid checkpoint; train with jobs/train.py first")
    try:
        config = Config.from_dict(Config.completed(checkpoint.state["config"]))
        spec = FeatureSpec.from_json(json.dumps(checkpoint.state["spec"]))
        module = UsrModel(spec, config.model, config.features.crosses)
        tensors = averaged_tensors(checkpoint.tensors, config.train.average, checkpoint.step)
        module.load_state_dict(part_of(tensors, "model"))
        names = event_sides(spec, config.model)
        sides = ItemSides(names, checkpoint.tensors[SIDES]) if names else None
        vectors = store.load_vectors(checkpoint.state[VECTORS]) if spec.vectors else None
    except (OwnBackboneError, CheckpointError):  # say themselves what is missing
        raise
    except (KeyError, ValueError, RuntimeError, UserError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: not written by this version ({reason}); use the version that trained it"
        ) from error
    tables = EmbeddingTables(spec, config.model.embedding_dim, config.train.seed, device, sides, vectors)
    tables.load_state_dict(part_of(tensors, "tables"))
    return TrainedRun(module.to(device).eval(), tables, config, spec, checkpoint)


def load_whole_run(run_dir: Path, device: torch.device | str = "cpu") -> TrainedRun:
    """`load_run`, for a use that meets rows of every scenario.

    Raises:
        EvaluationError: as load_run; or the run has data.only_scenario.
    """
    run = load_run(run_dir, device)
    check_whole(run, f"--run-dir {run_dir}")
    return run


def check_whole(run: TrainedRun, where: str) -> None:
    """Refuse a run of one scenario, whose rows and histories are all it knows; `where` begins the message.

    Raises:
        EvaluationError: it has data.only_scenario.
    """
    if only := run.config.data.only_scenario:
        raise EvaluationError(
            f"{where}: was trained on scenario {only!r} alone (data.only_scenario), so that it knows no other row and "
            "no other history; name a run that was trained on all"
        )


def check_table(run: TrainedRun, table: Manifest, *, where: str = "--lake") -> None:
    """Refuse rows that mean something else to the model; vocabularies that grew since the training are fine.

    `where` begins the message.

    Raises:
        EvaluationError: the table was built with another configuration, or its ids stand for other values.
    """
    problem = difference(run.spec, built_with(run.config), table)
    if problem:
        raise EvaluationError(f"{where}: {problem}; name the lake that it was trained on, or train on this one")
