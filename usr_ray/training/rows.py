"""What a rank trains on, ready for the steps: the reader of its rows, and its batches with their ids found."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from usr_ray.config import Config, end_of_us, parse_dates
from usr_ray.data.batch import UsrBatch
from usr_ray.data.manifest import Manifest
from usr_ray.data.reader import SampleReader
from usr_ray.model.unique import UniqueIds
from usr_ray.training.embeddings import RowSource
from usr_ray.training.loss import row_counts
from usr_ray.training.worker import Worker


def training_reader(config: Config, manifest: Manifest, worker: Worker) -> SampleReader:
    """Reads the part of the training batches that is this rank's.

    A row counts when its labels were final at the train cut-off, midnight UTC after the last training date: a global
    label that closes later has seen the held-out days.
    """
    last = parse_dates(config.data.train_dates or manifest.dates[-1], where="data.train_dates")[1]
    return SampleReader(
        manifest,
        global_batch_size=config.train.global_batch_size,
        group_size=config.model.contrastive.group_size,
        rank=worker.rank,
        world_size=worker.world_size,
        seed=config.train.seed,
        order=config.train.order,
        ready_before_us=end_of_us(last) if config.data.mature_only else None,
        mature_only=config.data.mature_only,
        num_threads=config.train.reader_threads,
        num_shards=config.train.reader_shards,
        cache_dir=config.train.reader_cache or None,
    )


def training_batches(
    reader: SampleReader, tables: RowSource, *, epochs: range, start_step: int, num_scenarios: int
) -> Iterator[tuple[tuple[UsrBatch, UniqueIds], Tensor]]:
    """((batch, its unique ids), its row counts) of every step of `epochs`, the first from `start_step` on.

    All on the CPU: whatever has a size that depends on the data is found here, ahead of the step, so that a GPU's
    queue is never waited for. One epoch follows another without a pause.
    """
    for epoch in epochs:
        for batch in reader.batches(epoch, start_step=start_step):
            yield (batch.count_longest(), tables.unique_ids(batch)), row_counts(batch, num_scenarios)
        start_step = 0
