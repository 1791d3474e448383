"""The training steps that several benchmarks measure: what a batch looks like, and one whole step of it.

`demo` has the features of jobs/configs/simulated.toml and histories as short as its (11 events a scenario in the mean,
100 in the longest row of a batch); `large` is a typical shop: 15 categorical features, three of them with a million
values, full histories of 0-50 events a scenario, and wider layers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from usr_ray.config import Config
from usr_ray.data.batch import History, UsrBatch, map_tensors
from usr_ray.data.manifest import make_manifest
from usr_ray.model.unique import UniqueIds
from usr_ray.schema import DenseFeature, FeatureSpec, SparseFeature
from usr_ray.serving.check import drawn_batch
from usr_ray.training.loss import row_counts, usr_loss
from usr_ray.training.state import TrainState
from usr_ray.training.worker import LocalWorker

PLAIN = {"interest": {"enabled": False}, "generator": {"enabled": False}, "multitask": {"enabled": False}}
"""All parts of USR off: the backbone alone, with the mean of the histories."""
_DEMO_SIZES = {
    "user_id": (2000, "user"),
    "item_id": (1000, "item"),
    "query": (302, "query"),
    "event_hour": (26, "context"),
    "age_band": (8, "user"),
    "city": (18, "user"),
    "category_id": (26, "item"),
    "brand_id": (122, "item"),
}
_LARGE_SIZES = {
    "user_id": (1_000_000, "user"),
    "item_id": (1_000_000, "item"),
    "query": (1_000_000, "query"),
    **{f"user_{n}": (10_000, "user") for n in range(4)},
    **{f"item_{n}": (10_000, "item") for n in range(4)},
    **{f"context_{n}": (1_000, "context") for n in range(4)},
}


@dataclass(frozen=True)
class Case:
    """One shape of training step."""

    name: str
    spec: FeatureSpec
    batch_rows: int
    model: Mapping[str, Any]
    """Of [model], besides what a benchmark varies."""
    mean_events: int | None = None
    """Of a scenario's history; None: 0 to history_length, all alike."""

    def draw(self, seed: int) -> UsrBatch:
        """A batch, its longest row counted as the feed does."""
        batch = drawn_batch(self.spec, self.batch_rows, seed=seed)
        if self.mean_events is not None:
            generator = torch.Generator().manual_seed(seed)
            histories = tuple(_shorten(h, self.mean_events, generator) for h in batch.histories)
            batch = dataclasses.replace(batch, histories=histories)
        return batch.count_longest()


def spec_of(sizes: Mapping[str, tuple[int, str]], numbers: Sequence[str] = ("price", "age")) -> FeatureSpec:
    """Two scenarios and a query; `sizes`: ids and owner of each feature by its name; `numbers`: of the item."""
    return FeatureSpec(
        scenarios=("search", "recommendation"),
        query_scenarios=("search",),
        sparse=tuple(
            SparseFeature(name=n, column=f"{n}_index", num_embeddings=size, owner=owner)
            for n, (size, owner) in sizes.items()
        ),
        dense=tuple(DenseFeature(name=n, column=f"{n}_scaled", owner="item") for n in numbers),
        history_length=50,
        label_delay_us=0,
    )


def _shorten(history: History, mean_events: int, generator: torch.Generator) -> History:
    """The newest events of each row, as many as an exponential of that mean allows."""
    lengths_B = history.offsets.diff()
    # One row keeps all it has, so that a batch's longest row is as long as a log's.
    limits_B = torch.empty(len(lengths_B)).exponential_(1 / mean_events, generator=generator).long()
    limits_B[lengths_B.argmax()] = lengths_B.max()
    kept_B = torch.minimum(lengths_B, limits_B)
    offsets = torch.cat([kept_B.new_zeros(1), kept_B.cumsum(0)])
    index_V = torch.arange(int(offsets[-1])) + (history.offsets[1:] - offsets[1:]).repeat_interleave(kept_B)
    queries = history.query_ids_V
    return History(
        history.item_ids_V[index_V],
        history.actions_V[index_V],
        history.ages_s_V[index_V],
        None if queries is None else queries[index_V],
        offsets,
    )


CASES = {
    "demo": Case("demo", spec_of(_DEMO_SIZES), 1024, {}, mean_events=14),
    "large": Case("large", spec_of(_LARGE_SIZES), 4096, {"hidden": (256, 128), "tower_hidden": (64,)}),
}
"""By name; 14 before the cut at the events that are there, 11 after it."""


class Step:
    """Model, tables and optimisers of one rank; a call takes one training step as usr_ray.training.loop does."""

    def __init__(
        self,
        spec: FeatureSpec,
        model: Mapping[str, Any],
        *,
        train: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        self.config = Config.from_dict({"model": dict(model), "train": dict(train or {})})
        self.worker = LocalWorker(device)
        manifest = make_manifest(table_uri="none", version=0, spec=spec, files=[])
        self.state = TrainState(self.config, manifest, self.worker, order="none")

    def __call__(self, batch: UsrBatch, unique: UniqueIds) -> None:
        state, train = self.state, self.config.train
        lookup = state.tables.lookup(batch, unique)
        seed = torch.full((), state.step, device=self.worker.device) if train.compile else state.step
        with torch.autocast(self.worker.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            outputs = state.model(batch, lookup, seed)
        counts_C = row_counts(batch, len(batch.histories), self.config.model)
        loss = usr_loss(outputs, batch, counts_C, self.config.model).total
        state.dense.zero_grad()
        loss.backward()
        state.apply_gradients(lookup)

    def timed(self, batch: UsrBatch) -> tuple[float, float]:
        """One step on a batch whose ids are found beforehand: seconds by the clock and of the processor."""
        unique = self.state.tables.unique_ids(batch)
        device = self.worker.device
        batch, unique = batch.map(lambda t: t.to(device)), _moved(unique, device)
        self.wait()
        start, cpu_start = time.perf_counter(), time.process_time()
        self(batch, unique)
        self.wait()
        return time.perf_counter() - start, time.process_time() - cpu_start

    def wait(self) -> None:
        """Until a GPU has done what it was given."""
        if self.worker.device.type == "cuda":
            torch.cuda.synchronize(self.worker.device)


def _moved(unique: UniqueIds, device: torch.device) -> UniqueIds:
    moved: UniqueIds = map_tensors(unique, lambda t: t.to(device))
    return moved
