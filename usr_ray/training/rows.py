"""What a rank trains on, ready for the steps: the reader of its rows, and its batches with their ids found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
from torch import Tensor

from usr_ray.config import Config, ModelConfig
from usr_ray.data.assemble import padding_batch, take_rows
from usr_ray.data.batch import UsrBatch
from usr_ray.data.by_id import read_cold
from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.manifest import Manifest
from usr_ray.data.mature import WhichRows, counted_in_training, labels_close_us, usable_row_groups
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.data.rows import micros
from usr_ray.evaluation.baseline import TrainingRows
from usr_ray.evaluation.metrics import known_labels_only
from usr_ray.model.embedding import RowSource
from usr_ray.model.unique import UniqueIds
from usr_ray.schema import ALL_LABELS, ORDERS, PADDING_ID, UNKNOWN_ID, FeatureSpec
from usr_ray.training.loss import row_counts


def training_reader(config: Config, manifest: Manifest, *, rank: int = 0, world_size: int = 1) -> SampleReader:
    """Reads the part of the training batches that is the rank's; which rows have weight: counted_in_training."""
    reading = Reading(
        global_batch_size=config.train.global_batch_size,
        group_size=config.model.contrastive.group_size,
        seed=config.train.seed,
        order=config.train.order,
        **asdict(counted_in_training(config, manifest)),
        num_shards=config.train.reader_shards,
        rank=rank,
        world_size=world_size,
        num_threads=config.train.reader_threads,
        cache_dir=config.train.reader_cache or None,
    )
    return SampleReader(manifest, reading)


def training_batches(
    reader: SampleReader,
    tables: RowSource,
    *,
    epochs: range,
    start_step: int,
    config: ModelConfig,
    of_a_size: bool = True,
) -> Iterator[tuple[tuple[UsrBatch, UniqueIds], Tensor]]:
    """((batch, its unique ids), its row counts) of every step of `epochs`, the first from `start_step` on.

    All on the CPU: whatever has a size that depends on the data is found here, ahead of the step, so that a GPU's
    queue is never waited on. One epoch follows another without a pause.

    Args:
        start_step: holds for the first epoch; the later ones start at step 0.
        config: its contrastive losses take a share of the rows.
        of_a_size: all batches have as many rows, as a compiled step wants, and the contrastive losses, whose groups go
            by a row's place. Otherwise those of a model of one scenario (data.only_scenario) leave out the rows of the
            others, which then cost nothing. Rows without weight that stay have padding for ids: no step decays theirs.
    """
    num_scenarios = len(reader.manifest.spec.scenarios)
    for epoch in epochs:
        for whole in reader.batches(epoch, start_step=start_step):
            is_cut = not of_a_size and reader.reading.only_scenario
            batch = _rows_that_count(whole, reader.manifest.spec) if is_cut else _ids_that_count(whole)
            yield (batch.count_longest(), tables.unique_ids(batch)), row_counts(batch, num_scenarios, config)
        start_step = 0


def _rows_that_count(batch: UsrBatch, spec: FeatureSpec) -> UsrBatch:
    """The rows with weight, or a row of padding where none has any: no layer is made for an empty batch."""
    rows = np.flatnonzero(batch.weights_B.numpy() > 0)
    return take_rows(batch, rows) if len(rows) else padding_batch(spec, 1)


def _ids_that_count(batch: UsrBatch) -> UsrBatch:
    """The batch with padding for every id of a row without weight: a tenth of the time that leaving out rows takes."""
    is_out_B = batch.weights_B == 0
    if not is_out_B.any():
        return batch
    histories = []
    for history in batch.histories:
        is_out_V = is_out_B.repeat_interleave(history.offsets.diff())
        queries_V = history.query_ids_V
        histories.append(
            replace(
                history,
                item_ids_V=history.item_ids_V.masked_fill(is_out_V, PADDING_ID),
                query_ids_V=None if queries_V is None else queries_V.masked_fill(is_out_V, PADDING_ID),
            )
        )
    lists_BW = None if batch.lists_BW is None else batch.lists_BW.masked_fill(is_out_B[:, None], PADDING_ID)
    sparse_BF = batch.sparse_BF.masked_fill(is_out_B[:, None], PADDING_ID)
    return replace(batch, sparse_BF=sparse_BF, lists_BW=lists_BW, histories=tuple(histories))


def baseline_rows(config: Config, manifest: Manifest) -> TrainingRows:
    """`read_training_rows` of what training on a manifest counts, but of all scenarios."""
    return read_training_rows(manifest, counted_in_training(config, manifest))


def read_training_rows(manifest: Manifest, which: WhichRows, *, at_most: int | None = None) -> TrainingRows:
    """The rows of a manifest that training would count, four columns of them; labels that were still open are NaN.

    `at_most`: of more rows than these (counted or not) about so many are read, in row groups drawn from all: every
    seventh, say, would be one weekday where a day is one.

    Raises:
        DataError: no row counts, or a file cannot be read.
    """
    decoder = RowGroupDecoder(manifest, which)
    item_column = manifest.spec.sparse_feature("item_id").column
    decoder.columns = [*ALL_LABELS, "scenario_index", "user_key", item_column, "is_mature", "event_time"]
    parts = []
    groups = usable_row_groups(manifest, which)
    num_rows = sum(ref.row_group.num_rows for ref in groups)
    if at_most is not None and num_rows > at_most:
        drawn = np.random.default_rng(0).permutation(len(groups))[: -(-len(groups) * at_most // num_rows)]
        groups = [groups[n] for n in sorted(drawn)]
    for ref in groups:
        table = decoder.read(ref)
        counts_N = np.ones(table.num_rows, dtype=bool)
        if which.mature_only:
            counts_N &= table["is_mature"].to_numpy()
        if which.ready_before_us is not None:
            time_us_N = micros(table["event_time"])
            wait_us_N = labels_close_us(time_us_N, manifest.spec) - which.ready_before_us
            counts_N &= wait_us_N <= which.order_wait_us
            table = table.append_column("is_open", pa.array(wait_us_N > 0))
        parts.append(table.drop_columns(["is_mature", "event_time"]).filter(pa.array(counts_N)))
    rows = pa.concat_tables(parts)
    scenario_N = rows["scenario_index"].to_numpy()
    labels_NT = np.stack([rows[label].to_numpy() for label in ALL_LABELS], axis=1)
    if which.ready_before_us is not None:
        labels_NT[np.ix_(rows["is_open"].to_numpy(), ORDERS)] = np.nan
    item_N = rows[item_column].to_numpy()
    cold_N = read_cold(manifest).get("item_id")
    return TrainingRows(
        scenario_N=scenario_N,
        user_key_N=rows["user_key"].to_numpy(),
        item_id_N=item_N if cold_N is None else np.where(cold_N[item_N], UNKNOWN_ID, item_N),  # as in Predictions
        labels_NT=known_labels_only(labels_NT, scenario_N, manifest.spec.known_labels),
    )
