"""The model as it is served: tables and dense part in one module, plain padded tensors in, probabilities out.

The forward is the training model's own (UsrModel.score), on histories of a fixed length, which torch.export and ONNX
both take. The over-parameterised factors are multiplied out (UsrModel.fold). It takes its inputs in two shapes: one row
an impression (ServingModel), or one user with B candidates (RequestModel).

Shape letters: B rows or candidates, F features, H event vector, D embedding, N rows of a table or kinds of events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from usr_ray.data.batch import UsrBatch
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.history import PaddedHistories
from usr_ray.model.inputs import InputNetwork
from usr_ray.model.lists import list_columns
from usr_ray.model.unique import ITEM_TABLE, QUERY_TABLE
from usr_ray.model.usr import UsrModel
from usr_ray.schema import TASKS, UNKNOWN_ID, FeatureSpec, cold_column

_PIECE_ROWS = 1 << 20
"""Rows of vectors that are multiplied out at once, as float32."""
SCENARIO, SPARSE, DENSE = "scenario", "sparse", "dense"
REQUEST_SPARSE, REQUEST_DENSE = "request_sparse", "request_dense"
ITEM_SPARSE, ITEM_DENSE = "item_sparse", "item_dense"
PROBABILITIES = tuple(f"p_{task}" for task in TASKS)
"""Outputs of every model: of the row's own scenario."""
GLOBAL_PROBABILITIES = tuple(f"p_{task}_global" for task in TASKS)
"""Outputs of models with GLMT besides."""


def padded_inputs(batch: UsrBatch, spec: FeatureSpec) -> dict[str, Tensor]:
    """The inputs of a ServingModel for the rows of a batch, by name, in the order of `input_names`."""
    inputs = {SCENARIO: batch.scenario_B, SPARSE: batch.sparse_BF}
    if spec.dense:
        inputs[DENSE] = batch.dense_BF
    for feature in spec.lists:
        assert batch.lists_BW is not None
        inputs[feature.column] = batch.lists_BW[:, slice(*spec.list_places[feature.name])]
    for history, names in zip(batch.histories, spec.histories, strict=True):
        padded = history.padded(spec.history_length)
        inputs |= {names.item_ids: padded.item_ids_BL, names.actions: padded.actions_BL, names.ages_s: padded.ages_s_BL}
        if names.query_ids is not None:
            assert padded.query_ids_BL is not None
            inputs[names.query_ids] = padded.query_ids_BL
    return {name: inputs[name].to(dtype) for name, (dtype, _) in input_shapes(spec).items()}


def request_inputs(inputs: dict[str, Tensor], spec: FeatureSpec) -> dict[str, Tensor]:
    """The inputs of a RequestModel of rows that differ in their items only: candidates, whose first row is all's."""
    found = {}
    for name, (_, shape) in request_shapes(spec).items():
        features = _features(name, spec)
        value = inputs[name] if features is None else inputs[features.rows][:, list(features.columns)]
        found[name] = value if shape[0] is None else value[:1]
    return found


def input_shapes(spec: FeatureSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Input name -> (dtype, shape of one row), in the order of the inputs; () is a scalar for each row."""
    inputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        SCENARIO: (torch.int64, ()),
        SPARSE: (torch.int64, (len(spec.sparse),)),
    }
    if spec.dense:
        inputs[DENSE] = (torch.float32, (len(spec.dense),))
    inputs |= {feature.column: (torch.int64, (feature.length,)) for feature in spec.lists}
    for names in spec.histories:
        for name in (names.item_ids, names.actions, names.ages_s, names.query_ids):
            if name is not None:
                dtype = torch.float32 if name == names.ages_s else torch.int64
                inputs[name] = (dtype, (spec.history_length,))
    return inputs


def request_shapes(spec: FeatureSpec) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
    """Input name of a RequestModel -> (dtype, shape), in order: None is the number of candidates, all else has one row.

    Features of users, queries and context are in `request_sparse` and `request_dense`, those of items in `item_sparse`
    and `item_dense`, each in the spec's order; an input that would be empty is left out. Tags and terms are inputs of
    their own, those of items with a row for each candidate.
    """
    rows = input_shapes(spec)
    inputs: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {}
    of_items = {feature.column for feature in spec.lists if feature.owner == "item"}
    for name in (SCENARIO, REQUEST_SPARSE, ITEM_SPARSE, REQUEST_DENSE, ITEM_DENSE, *rows):
        features = _features(name, spec)
        if features is not None and features.columns:
            inputs[name] = (rows[features.rows][0], (None if features.of_items else 1, len(features.columns)))
        elif features is None and name not in (SPARSE, DENSE):
            inputs[name] = (rows[name][0], (None if name in of_items else 1, *rows[name][1]))
    return inputs


@dataclass(frozen=True, slots=True)
class _Features:
    """An input of a RequestModel as columns of an input of a ServingModel."""

    rows: str
    of_items: bool
    columns: tuple[int, ...]


def _features(name: str, spec: FeatureSpec) -> _Features | None:
    """What an input of features holds; None for any other input."""
    sparse, dense = [f.owner for f in spec.sparse], [f.owner for f in spec.dense]
    parts = {
        REQUEST_SPARSE: (SPARSE, False, sparse),
        REQUEST_DENSE: (DENSE, False, dense),
        ITEM_SPARSE: (SPARSE, True, sparse),
        ITEM_DENSE: (DENSE, True, dense),
    }
    if name not in parts:
        return None
    rows, of_items, owners = parts[name]
    return _Features(rows, of_items, tuple(n for n, owner in enumerate(owners) if (owner == "item") == of_items))


class _Embeddings(nn.Module):
    """The tables. An id that a table does not hold is taken as unknown, as any new value is.

    An id that is known by its vector alone has the unknown id's row in its own place.
    """

    def __init__(self, tables: EmbeddingTables, inputs: InputNetwork, event_vectors: Sequence[str]) -> None:
        super().__init__()
        # Vectors are multiplied out, and are tables like others then, with a row for each id of their owner.
        maps = dict(zip(inputs.vector_names, inputs.vector_maps, strict=True))
        projected = {
            name: torch.cat([part_NP.cpu().float() @ maps[name] for part_NP in v_NP.split(_PIECE_ROWS)])
            for name, v_NP in tables.vectors.items()
        }
        self.places = {name: place for place, name in enumerate((*tables.tables, *projected))}
        rows = [t.detach().cpu() for t in (*tables.tables.values(), *projected.values())]
        self.cold = tuple(tables.cold)
        for key, cold_N in tables.cold.items():
            table_ND = rows[self.places[key]]
            rows[self.places[key]] = torch.where(cold_N.unsqueeze(1), table_ND[UNKNOWN_ID], table_ND)
            self.register_buffer(cold_column(key), cold_N)
        # In the query table, padding is not "nothing" but the learned e_noq.
        query = self.places[QUERY_TABLE]
        rows[query] = torch.cat([inputs.no_query_D.detach().cpu().unsqueeze(0), rows[query][1:]])
        self.event_vectors = tuple(event_vectors)
        self.tables = nn.ParameterList(nn.Parameter(table_ND, requires_grad=False) for table_ND in rows)
        self.sides = () if tables.sides is None else tables.sides.names
        if tables.sides is not None:
            self.register_buffer("sides_NC", tables.sides.ids_NC.long())

    def forward(self, name: str, ids: Tensor) -> Tensor:
        return embedding(self.known(name, ids), self.tables[self.places[name]])

    def item_vectors(self, ids: Tensor) -> Tensor:
        """(.., X): [e_item ; e_side .. ; vector ..] of every item."""
        parts = [self(ITEM_TABLE, ids)]
        if self.sides:
            sides = self.get_buffer("sides_NC")[self.known(ITEM_TABLE, ids)]
            parts += [self(name, sides[..., n]) for n, name in enumerate(self.sides)]
        return torch.cat([*parts, *(self(name, ids) for name in self.event_vectors)], dim=-1)

    def known(self, name: str, ids: Tensor) -> Tensor:
        """The ids, unknown where the table does not hold them."""
        is_known = (ids >= 0) & (ids < self.tables[self.places[name]].shape[0])
        return torch.where(is_known, ids, UNKNOWN_ID)

    def row_ids(self, name: str, ids: Tensor) -> Tensor:
        """The ids, unknown where they have no row of their own either."""
        ids = self.known(name, ids)
        return torch.where(self.get_buffer(cold_column(name))[ids], UNKNOWN_ID, ids) if name in self.cold else ids


class ServingModel(nn.Module):
    """Probabilities from padded inputs. A row's outputs do not depend on the other rows of the batch.

    Args:
        model: it is copied and folded, and may go on training.
        tables: their rows are shared, not copied (but for the query table, and tables with ids that are known by their
            vectors alone).
        spec: that of the table that the run was trained on.
    """

    def __init__(self, model: UsrModel, tables: EmbeddingTables, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = model.fold().cpu()
        self.embeddings = _Embeddings(tables, self.model.inputs, self.model.event_vectors)
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
        ids = {f.name: inputs[SPARSE][:, n] for n, f in enumerate(self.spec.sparse)}
        return self.probabilities(ids, inputs.get(DENSE), inputs)

    def probabilities(
        self, ids: dict[str, Tensor], dense_BF: Tensor | None, inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Output name -> probabilities (B).

        Args:
            ids: encoded id of the row, or of all rows, by feature name.
            dense_BF: None where there are no dense features.
            inputs: scenario, histories, tags and terms, of B rows, or of one for all.
        """
        # ONNX counts a negative index from the end; as torch does, it shall refuse it.
        scenario_B = torch.where(inputs[SCENARIO] < 0, self.model.num_scenarios, inputs[SCENARIO])
        no_query_D, kinds_NH = self.model.inputs.no_query_D, self.model.inputs.kinds()
        histories = PaddedHistories(
            inputs, self.spec.histories, self.embeddings, self.embeddings.item_vectors, no_query_D, kinds_NH
        )
        columns = {name: self.embeddings(name, ids_B) for name, ids_B in ids.items()}
        columns |= {vector.name: self.embeddings(vector.name, ids[vector.key]) for vector in self.spec.vectors}
        lists = {f.name: self.embeddings.known(f.vocabulary, inputs[f.column]) for f in self.spec.lists}
        vectors = {f.name: self.embeddings(f.vocabulary, lists[f.name]) for f in self.spec.lists}
        columns |= list_columns(self.spec, lists, vectors)
        ids = {name: self.embeddings.row_ids(name, ids_B) for name, ids_B in ids.items()}
        weights_B = torch.ones_like(columns[ITEM_TABLE][:, 0])
        dense_BF = weights_B.unsqueeze(1) if dense_BF is None else dense_BF
        outputs = self.model.score(columns, ids, dense_BF, histories, scenario_B, weights_B)
        log_probs = [outputs.log_p_BT]
        if outputs.log_p_global_BT is not None:
            log_probs.append(outputs.log_p_global_BT)
        return dict(zip(self.output_names, torch.cat(log_probs, dim=1).exp().unbind(1), strict=True))


class RequestModel(nn.Module):
    """Probabilities of the B candidates of one request: what does not depend on the candidate is computed once.

    Args:
        model: its weights and tables are shared, not copied.
    """

    def __init__(self, model: ServingModel) -> None:
        super().__init__()
        self.model = model
        self.spec = model.spec

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output name -> probabilities (B) of inputs of `request_shapes`; equal to those of the rows one by one."""
        num_rows = inputs[ITEM_SPARSE].shape[0]
        ids: dict[str, Tensor] = {}
        dense: dict[int, Tensor] = {}
        for name in (REQUEST_SPARSE, ITEM_SPARSE, REQUEST_DENSE, ITEM_DENSE):
            features = _features(name, self.spec)
            assert features is not None
            for place, number in enumerate(features.columns):
                value_B = inputs[name][:, place]
                if features.rows == SPARSE:
                    ids[self.spec.sparse[number].name] = value_B
                else:
                    dense[number] = value_B.expand(num_rows)
        dense_BF = torch.stack([dense[number] for number in sorted(dense)], dim=1) if dense else None
        return self.model.probabilities(ids, dense_BF, inputs)
