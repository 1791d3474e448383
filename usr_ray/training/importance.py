"""Feature importance by permutation: the click AUC that a model loses when rows exchange their values of one signal.

A signal is a feature of the row, all columns of one counter, one scenario's history, or the sides of the events (which
item has which categories). Values are exchanged inside a part of the rows: a scenario, or its rows of an unseen user,
item or query. So a search row gets the query of another search row, and an unseen user never a known one's id.

A low drop does not say that a signal is useless: another may say the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from usr_ray.config import Config
from usr_ray.config.counters import COUNTER_COLUMN
from usr_ray.data.assemble import BatchBuilder, take_rows
from usr_ray.data.batch import UsrBatch, map_tensors
from usr_ray.data.manifest import Manifest
from usr_ray.evaluation.metrics import auc
from usr_ray.evaluation.statistics import effective_users, paired_auc_gap
from usr_ray.model.embedding import RowSource
from usr_ray.model.unique import ItemSides, unique_ids
from usr_ray.schema import FIRST_ID, UNKNOWN_ID, FeatureSpec
from usr_ray.training.evaluate import evaluation_reader, known_ids
from usr_ray.training.monitor import row_progress
from usr_ray.training.worker import Worker

MAX_ROWS = 10_000
"""Rows that are scored once more for each signal, drawn from the evaluated ones."""
SEED = 0
ALL_ROWS = "all"
UNSEEN = ("user", "item", "query")
"""What a cold row does not know; FeatureSpec.sparse starts with their ids, in this order."""


@dataclass(frozen=True, slots=True)
class Signal:
    """What is permuted together."""

    name: str
    sparse: tuple[int, ...] = ()
    """Columns of UsrBatch.sparse_BF."""
    dense: tuple[int, ...] = ()
    history: int | None = None
    """Place in UsrBatch.histories."""
    is_sides: bool = False
    in_lists: tuple[int, int] | None = None
    """First column and end in UsrBatch.lists_BW."""
    is_vector: bool = False
    """The vector of that name; users or items exchange it wherever they are, histories included."""


def signals_of(spec: FeatureSpec, sides: ItemSides | None) -> list[Signal]:
    """Every signal that a model of this table can use; `sides`: what the items of its histories are, if it asks."""
    # A row's vector is looked up by its id, so whoever takes another id takes its vectors too.
    of_key = {f.name: sum(vector.key == f.name for vector in spec.vectors) for f in spec.sparse}
    names = [name + ("", " and its vector", " and its vectors")[min(number, 2)] for name, number in of_key.items()]
    signals = [Signal(name, sparse=(place,)) for place, name in enumerate(names)]
    numbers: dict[str, tuple[int, ...]] = {}
    for place, number in enumerate(spec.dense):
        counter = COUNTER_COLUMN.fullmatch(number.column)
        name = counter[1] if counter else number.name
        numbers[name] = (*numbers.get(name, ()), place)
    signals += [Signal(name, dense=places) for name, places in numbers.items()]
    signals += [Signal(feature.name, in_lists=spec.list_places[feature.name]) for feature in spec.lists]
    signals += [Signal(vector.name, is_vector=True) for vector in spec.vectors]
    signals += [Signal(f"{scenario}_history", history=place) for place, scenario in enumerate(spec.scenarios)]
    return [*signals, Signal("sides of the events", is_sides=True)] if sides and sides.names else signals


def importance(
    model: nn.Module,
    tables: RowSource,
    manifest: Manifest,
    worker: Worker,
    config: Config,
    evaluated_N: NDArray[np.int64],
    *,
    max_rows: int = MAX_ROWS,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The drop of click AUC by part of the rows and signal, as it goes into an evaluation's file.

    Args:
        model: trained; put back into the mode it came in.
        manifest: has the evaluated rows.
        worker: must be the only one.
        evaluated_N: their numbers, ascending (Predictions.row_number_N): rows of weight 0 are not among them.
        max_rows: most rows to draw from them; the draw is fixed by it and SEED.
        report: is given lines of progress, at most ten each for the rows to draw and to score.

    Returns:
        {"num_rows": rows scored, "parts": [{"scenario", "rows": 'all' or 'unseen user' ..., "num_rows",
        "num_positives", "auc", "drops": {signal: {"drop", "low", "high"}}}]}; low and high are the ends of a 95 %
        interval over users. A part without both labels, or of one user, has "auc" null and no drops.
    """
    drawn = row_progress("importance: rows drawn", manifest.num_rows, report)
    places = np.random.default_rng(SEED).choice(len(evaluated_N), min(max_rows, len(evaluated_N)), replace=False)
    sample = _sample(manifest, worker, config, evaluated_N[places], drawn)
    sample = known_ids(sample, manifest.spec, tables.num_rows())
    signals = signals_of(manifest.spec, tables.sides)
    every = list(_parts(sample, manifest.spec, tables))
    num_rows = sum(len(rows) for *_, rows in every) * (1 + len(signals))
    scored = row_progress(f"importance: {len(signals)} signals", num_rows, report)
    scorer = _Scorer(model, tables, worker.device, config.train.global_batch_size, scored)
    was_training = model.training
    model.eval()
    try:
        parts = [
            {"scenario": scenario, "rows": name, **_drops(take_rows(sample, rows), signals, scorer)}
            for scenario, name, rows in every
        ]
    finally:
        model.train(was_training)
    return {"num_rows": len(sample), "parts": parts}


def importance_text(found: Mapping[str, Any]) -> str:
    """Text for the terminal: a line for each scenario with the signals that carry most."""
    lines = [f"click AUC lost when the rows exchange a signal ({found['num_rows']:,} rows):"]
    for part in found["parts"]:
        if part["rows"] == ALL_ROWS and part["drops"]:
            first = sorted(part["drops"].items(), key=lambda entry: -entry[1]["drop"])[:5]
            lines.append(f"  {part['scenario']}: " + ", ".join(f"{name} {drop['drop']:.4f}" for name, drop in first))
    return "\n".join(lines)


def _sample(
    manifest: Manifest, worker: Worker, config: Config, chosen: NDArray[np.int64], read: Callable[[int], None]
) -> UsrBatch:
    """The rows of these numbers, in file order, in one batch on the CPU."""
    pieces = []
    with evaluation_reader(manifest, worker, config) as reader:
        for batch in reader.batches(epoch=0):
            pieces.append(take_rows(batch, np.flatnonzero(np.isin(batch.row_number_B.numpy(), chosen))))
            read(len(batch))
    builder, first = BatchBuilder(manifest.spec, sum(map(len, pieces))), 0
    for piece in pieces:
        builder.add(piece, np.arange(first, first + len(piece)))
        first += len(piece)
    return builder.finish()


def _parts(sample: UsrBatch, spec: FeatureSpec, tables: RowSource) -> Iterator[tuple[str, str, NDArray[np.int64]]]:
    """(scenario, name, rows) of every part that has rows: a scenario, then its cold rows."""
    scenario_B, ids_BF = sample.scenario_B.numpy(), sample.sparse_BF.numpy()
    is_unseen_BF = ids_BF[:, : len(UNSEEN)] == UNKNOWN_ID
    for f, feature in enumerate(spec.sparse[: len(UNSEEN)]):
        if feature.name in tables.cold:  # known by their vectors alone
            is_unseen_BF[:, f] |= tables.cold[feature.name].numpy()[ids_BF[:, f]]
    for place, scenario in enumerate(spec.scenarios):
        inside_B = scenario_B == place
        cold = [(f"unseen {name}", inside_B & is_unseen_BF[:, f]) for f, name in enumerate(UNSEEN)]
        for name, rows_B in [(ALL_ROWS, inside_B), *cold]:
            if rows_B.any():
                yield scenario, name, np.flatnonzero(rows_B)


def _drops(rows: UsrBatch, signals: Sequence[Signal], scorer: _Scorer) -> dict[str, Any]:
    """What a part of the rows loses by each signal."""
    labels_N, users_N = rows.labels_BT[:, 0].numpy(), rows.user_key_B.numpy()
    counts = {"num_rows": len(rows), "num_positives": int(labels_N.sum())}
    # One user does not say how far others would be (paired_auc_gap): unseen ones may share a key.
    if effective_users(labels_N, users_N) <= 1:
        scorer.scored(len(rows) * (1 + len(signals)))
        return {**counts, "auc": None, "drops": {}}
    whole_N, drops = scorer(rows), {}
    for signal in signals:
        generator = np.random.default_rng(SEED)  # the same exchange for each, so that another signal changes none
        if signal.is_sides:
            permuted_N = scorer(rows, _permuted_sides(scorer.tables.sides, generator))
        elif signal.is_vector:
            with _permuted_vectors(scorer.tables, signal.name, generator):
                permuted_N = scorer(rows)
        else:
            permuted_N = scorer(_permuted(rows, signal, generator.permutation(len(rows))))
        gap = paired_auc_gap(labels_N, whole_N[None], permuted_N[None], users_N)
        assert gap is not None  # both labels are there, of several users each
        drops[signal.name] = {"drop": gap.value, "low": gap.low, "high": gap.high}
    return {**counts, "auc": auc(labels_N, whole_N), "drops": drops}


def _permuted(rows: UsrBatch, signal: Signal, order_N: NDArray[np.int64]) -> UsrBatch:
    """The rows with the signal of the rows `order_N`."""
    index = torch.from_numpy(order_N)
    sparse_BF, dense_BF, histories = rows.sparse_BF.clone(), rows.dense_BF.clone(), list(rows.histories)
    for place in signal.sparse:
        sparse_BF[:, place] = rows.sparse_BF[index, place]
    for place in signal.dense:
        dense_BF[:, place] = rows.dense_BF[index, place]
    if signal.history is not None:
        histories[signal.history] = take_rows(rows, order_N).histories[signal.history]
    lists_BW = rows.lists_BW
    if signal.in_lists is not None and lists_BW is not None:
        columns = slice(*signal.in_lists)
        lists_BW = lists_BW.clone()
        lists_BW[:, columns] = lists_BW[index, columns]
    return replace(rows, sparse_BF=sparse_BF, dense_BF=dense_BF, histories=tuple(histories), lists_BW=lists_BW)


def _permuted_sides(sides: ItemSides | None, generator: np.random.Generator) -> ItemSides:
    """Every item with the categories of another; padding and unknown keep theirs."""
    assert sides is not None  # else there is no such signal
    order_N = np.arange(len(sides.ids_NC))
    order_N[FIRST_ID:] = generator.permutation(order_N[FIRST_ID:])
    return replace(sides, ids_NC=sides.ids_NC[torch.from_numpy(order_N).to(sides.ids_NC.device)])


@contextlib.contextmanager
def _permuted_vectors(tables: RowSource, name: str, generator: np.random.Generator) -> Iterator[None]:
    """Inside the block every user or item has the vector of another; padding and unknown keep theirs."""
    own = tables.vectors
    order_N = np.arange(len(own[name]))
    order_N[FIRST_ID:] = generator.permutation(order_N[FIRST_ID:])
    tables.vectors = {**own, name: own[name][torch.from_numpy(order_N).to(own[name].device)]}
    try:
        yield
    finally:
        tables.vectors = own


@dataclass(frozen=True, slots=True)
class _Scorer:
    """log P(click) of rows, a few at a time."""

    model: nn.Module
    tables: RowSource
    device: torch.device
    batch_size: int
    scored: Callable[[int], None]
    """Is called with the number of rows of each batch."""

    def __call__(self, rows: UsrBatch, sides: ItemSides | None = None) -> NDArray[np.float64]:
        """float64 (N,); `sides`: in place of the tables' own."""
        found = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows.slice_rows(start, min(start + self.batch_size, len(rows))).count_longest()
            unique = (
                self.tables.unique_ids(batch)
                if sides is None
                else unique_ids(batch, self.tables.num_rows(), sides, self.tables.lists, self.tables.cold)
            )
            batch, unique = map_tensors((batch, unique), lambda tensor: tensor.to(self.device))
            with torch.inference_mode():
                found.append(self.model(batch, self.tables.lookup(batch, unique)).log_p_BT[:, 0].double().cpu())
            self.scored(len(batch))
        return torch.cat(found).numpy()
