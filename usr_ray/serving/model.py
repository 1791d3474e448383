"""The model as it is served: tables and dense part in one module, plain padded tensors in, probabilities out.

The forward is the training model's own (UsrModel.score), on histories of a fixed length, which torch.export and ONNX
both take. The over-parameterised factors are multiplied out (UsrModel.fold).

Shape letters: B rows, F features, H event vector, D embedding, N rows of a table or kinds of events.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from usr_ray.data.batch import UsrBatch
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.history import PaddedHistories
from usr_ray.model.unique import ITEM_TABLE, QUERY_TABLE
from usr_ray.model.usr import UsrModel
from usr_ray.schema import TASKS, UNKNOWN_ID, FeatureSpec

SCENARIO, SPARSE, DENSE = "scenario", "sparse", "dense"
PROBABILITIES = tuple(f"p_{task}" for task in TASKS)
"""Outputs of every model: of the row's own scenario."""
GLOBAL_PROBABILITIES = tuple(f"p_{task}_global" for task in TASKS)
"""Outputs of models with GLMT besides."""


def padded_inputs(batch: UsrBatch, spec: FeatureSpec) -> dict[str, Tensor]:
    """The inputs of a ServingModel for the rows of a batch, by name, in the order of `input_names`."""
    inputs = {SCENARIO: batch.scenario_B, SPARSE: batch.sparse_BF}
    if spec.dense:
        inputs[DENSE] = batch.dense_BF
    for history, names in zip(batch.histories, spec.histories, strict=True):
        padded = history.padded(spec.history_length)
        inputs |= {names.item_ids: padded.item_ids_BL, names.actions: padded.actions_BL, names.ages_s: padded.ages_s_BL}
        if names.query_ids is not None:
            assert padded.query_ids_BL is not None
            inputs[names.query_ids] = padded.query_ids_BL
    return {name: inputs[name].to(dtype) for name, (dtype, _) in input_shapes(spec).items()}


def input_shapes(spec: FeatureSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Input name -> (dtype, shape of one row), in the order of the inputs; () is a scalar for each row."""
    inputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        SCENARIO: (torch.int64, ()),
        SPARSE: (torch.int64, (len(spec.sparse),)),
    }
    if spec.dense:
        inputs[DENSE] = (torch.float32, (len(spec.dense),))
    for names in spec.histories:
        for name in (names.item_ids, names.actions, names.ages_s, names.query_ids):
            if name is not None:
                dtype = torch.float32 if name == names.ages_s else torch.int64
                inputs[name] = (dtype, (spec.history_length,))
    return inputs


class _Embeddings(nn.Module):
    """The tables. An id that a table does not hold is taken as unknown, as any new value is."""

    def __init__(self, tables: EmbeddingTables, no_query_D: Tensor) -> None:
        super().__init__()
        self.places = {name: place for place, name in enumerate(tables.tables)}
        rows = [t.detach().cpu() for t in tables.tables.values()]
        # In the query table, padding is not "nothing" but the learned e_noq.
        query = self.places[QUERY_TABLE]
        rows[query] = torch.cat([no_query_D.detach().cpu().unsqueeze(0), rows[query][1:]])
        self.tables = nn.ParameterList(nn.Parameter(table_ND, requires_grad=False) for table_ND in rows)

    def forward(self, name: str, ids: Tensor) -> Tensor:
        table_ND = self.tables[self.places[name]]
        is_known = (ids >= 0) & (ids < table_ND.shape[0])
        return embedding(torch.where(is_known, ids, UNKNOWN_ID), table_ND)


class ServingModel(nn.Module):
    """Probabilities from padded inputs. A row's outputs do not depend on the other rows of the batch.

    Args:
        model: of a run; it is copied and folded, and may go on training.
        tables: of the same run. Their rows are shared, not copied (but for the query table).
        spec: of the table that the run was trained on.
    """

    def __init__(self, model: UsrModel, tables: EmbeddingTables, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = model.fold().cpu()
        self.embeddings = _Embeddings(tables, self.model.inputs.no_query_D)
        self.requires_grad_(False)
        self.eval()

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs; each is float32 (B)."""
        return PROBABILITIES + (GLOBAL_PROBABILITIES if self.model.global_heads is not None else ())

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output name -> probabilities (B) of rows given as `padded_inputs` gives them.

        Histories are padded on the left: the newest event is in the last column; action 0 marks an empty place.
        """
        # ONNX counts a negative index from the end; as torch does, it shall refuse it.
        scenario_B = torch.where(inputs[SCENARIO] < 0, self.model.num_scenarios, inputs[SCENARIO])
        columns = {f.name: self.embeddings(f.name, inputs[SPARSE][:, n]) for n, f in enumerate(self.spec.sparse)}
        no_query_D, kinds_NH = self.model.inputs.no_query_D, self.model.inputs.kinds()
        histories = PaddedHistories(inputs, self.spec.histories, self.embeddings, no_query_D, kinds_NH)
        weights_B = torch.ones_like(columns[ITEM_TABLE][:, 0])
        dense_BF = inputs[DENSE] if self.spec.dense else weights_B.unsqueeze(1)
        outputs = self.model.score(columns, dense_BF, histories, scenario_B, weights_B)
        log_probs = [outputs.log_p_BT]
        if outputs.log_p_global_BT is not None:
            log_probs.append(outputs.log_p_global_BT)
        return dict(zip(self.output_names, torch.cat(log_probs, dim=1).exp().unbind(1), strict=True))
