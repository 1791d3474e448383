"""The exported files beside the training model on drawn rows: all scenarios, all ids, full and empty histories.

Shape letters: B rows, V events of one history.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from usr_ray.data.batch import History, UsrBatch, UsrOutputs, map_tensors
from usr_ray.schema import ACTION_ORDER, ALL_LABELS, PADDING_ID, FeatureSpec, ListFeature
from usr_ray.serving.model import GLOBAL_PROBABILITIES, PROBABILITIES, padded_inputs, request_inputs
from usr_ray.serving.runtime import REQUEST, RUNTIMES, ExportedModel
from usr_ray.training.evaluate import TrainedRun

_NUM_ROWS = 64
_LONGEST_AGE_S = 1e8


def drawn_batch(spec: FeatureSpec, num_rows: int, *, seed: int = 0) -> UsrBatch:
    """Rows with valid ids, numbers and histories of 0 to history_length events; the labels are all 0."""
    g = torch.Generator().manual_seed(seed)

    def ids(limit: int, *shape: int) -> Tensor:
        return torch.randint(0, limit, shape, generator=g)

    histories = []
    for names in spec.histories:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ids(spec.history_length + 1, num_rows).cumsum(0)])
        num_events = int(offsets[-1])
        num_queries = spec.sparse_feature("query").num_embeddings
        histories.append(
            History(
                item_ids_V=ids(spec.sparse_feature("item_id").num_embeddings, num_events),
                actions_V=1 + ids(ACTION_ORDER, num_events),
                ages_s_V=_LONGEST_AGE_S ** torch.rand(num_events, generator=g),
                query_ids_V=None if names.query_ids is None else ids(num_queries, num_events),
                offsets=offsets,
            )
        )
    return UsrBatch(
        labels_BT=torch.zeros(num_rows, len(ALL_LABELS)),
        weights_B=torch.ones(num_rows),
        scenario_B=torch.arange(num_rows) % len(spec.scenarios),
        sparse_BF=torch.stack([ids(feature.num_embeddings, num_rows) for feature in spec.sparse], dim=1),
        dense_BF=torch.randn(num_rows, len(spec.dense), generator=g),
        histories=tuple(histories),
        user_key_B=torch.arange(num_rows),
        request_key_B=torch.arange(num_rows),
        row_number_B=torch.arange(num_rows),
        lists_BW=torch.cat([_drawn_list(feature, num_rows, g) for feature in spec.lists], dim=1)
        if spec.lists
        else None,
    )


def _drawn_list(feature: ListFeature, num_rows: int, g: torch.Generator) -> Tensor:
    """(B, L) ids of 0 to L values a row, padded."""
    ids_BL = torch.randint(1, feature.num_embeddings, (num_rows, feature.length), generator=g)
    lengths_B1 = torch.randint(0, feature.length + 1, (num_rows, 1), generator=g)
    return torch.where(torch.arange(feature.length) < lengths_B1, ids_BL, PADDING_ID)


def one_request(batch: UsrBatch, spec: FeatureSpec, row: int) -> UsrBatch:
    """The batch with the user, query, context and histories of one row on all of them: a request for their items."""
    num_rows = len(batch)

    def mixed(value_BF: Tensor, owners: list[str]) -> Tensor:
        of_items_F = torch.tensor([owner == "item" for owner in owners], dtype=torch.bool)
        return torch.where(of_items_F, value_BF, value_BF[row : row + 1])

    def repeated(history: History) -> History:
        one = history.slice_rows(row, row + 1)
        events = map_tensors(one, lambda value: value.repeat(num_rows))
        return replace(events, offsets=torch.arange(num_rows + 1) * one.item_ids_V.shape[0])

    return replace(
        batch,
        scenario_B=batch.scenario_B[row].repeat(num_rows),
        sparse_BF=mixed(batch.sparse_BF, [f.owner for f in spec.sparse]),
        dense_BF=mixed(batch.dense_BF, [f.owner for f in spec.dense]),
        lists_BW=None
        if batch.lists_BW is None
        else mixed(batch.lists_BW, [f.owner for f in spec.lists for _ in range(f.length)]),
        histories=tuple(map(repeated, batch.histories)),
    )


def training_probabilities(outputs: UsrOutputs) -> dict[str, Tensor]:
    """The training model's probabilities (B) under the names of the exported model's outputs."""
    probs = dict(zip(PROBABILITIES, outputs.log_p_BT.exp().unbind(1), strict=True))
    if outputs.log_p_global_BT is not None:
        probs |= dict(zip(GLOBAL_PROBABILITIES, outputs.log_p_global_BT.exp().unbind(1), strict=True))
    return probs


def largest_differences(directory: Path, run: TrainedRun, *, requests_only: bool) -> dict[str, float]:
    """File -> largest absolute difference of a probability from the training model's, on drawn rows; NaN stays NaN."""
    batch = drawn_batch(run.spec, _NUM_ROWS)
    inputs = padded_inputs(batch, run.spec)
    differences = {
        name: _difference(ExportedModel(directory, runtime=runtime), inputs, run, batch)
        for runtime, name in RUNTIMES.items()
        if not requests_only
    }
    program = ExportedModel(directory, per_request=True)
    requests = [one_request(batch, run.spec, row) for row in range(len(run.spec.scenarios))]
    of_requests = [
        _difference(program, request_inputs(padded_inputs(request, run.spec), run.spec), run, request)
        for request in requests
    ]
    return differences | {REQUEST: float(torch.tensor(of_requests).max())}


def _difference(model: ExportedModel, inputs: dict[str, Tensor], run: TrainedRun, batch: UsrBatch) -> float:
    with torch.inference_mode():
        expected = training_probabilities(run.module(batch, run.tables.lookup(batch)))
    found = model.predict({name: value.numpy() for name, value in inputs.items()})
    worst = [(torch.from_numpy(found[key]) - value).abs().max() for key, value in expected.items()]
    return float(torch.stack(worst).max())
