"""The model as it is served: tables and dense part in one module, plain padded tensors in, probabilities out.

The training model reads jagged batches and the rows that a step uses, with backwards of its own (model/attention.py,
model/gather.py). Here the same formulae stand in plain operations on fixed shapes, which torch.export and ONNX both
take, and whatever does not depend on the row is multiplied out once: the over-parameterised factors (UsrModel.fold),
U_Q' U_K, and the projections of all kinds of events.

Shape letters: B rows, F features, L history length, E = S * L events of all scenarios, S scenarios, V views computed,
D embedding, K rank, C features side by side, Z trigger, N rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from usr_ray.data.batch import UsrBatch
from usr_ray.model.backbones import BackboneInput
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.history import NUM_AGES
from usr_ray.model.interest import InterestExtractor
from usr_ray.model.multitask import global_outputs, scenario_outputs
from usr_ray.model.unique import ITEM_TABLE, QUERY_TABLE
from usr_ray.model.usr import UsrModel
from usr_ray.schema import NUM_ACTIONS, TASKS, UNKNOWN_ID, FeatureSpec

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


class _Events(nn.Module):
    """Every event of a row as one vector, all scenarios' side by side, oldest first in each.

    Without IE the vector is h_j = [e_item ; e_query or e_noq] + kind; with IE it is [V_K h_j ; V_V h_j] at once.
    """

    def __init__(self, model: UsrModel, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec = spec
        dim = model.config.embedding_dim
        if model.interest is None:
            projection_HK = torch.eye(2 * dim)
        else:
            projection_HK = torch.cat([model.interest.inner["k"](), model.interest.inner["v"]()]).T.detach()
        kinds_SNK = (model.inputs.kinds() @ projection_HK).unflatten(0, (len(spec.scenarios), -1)).detach().clone()
        for scenario, names in enumerate(spec.histories):
            if names.query_ids is None:  # its events all have e_noq
                kinds_SNK[scenario] += model.inputs.no_query_D.detach() @ projection_HK[dim:]
        self.items_DK = nn.Parameter(projection_HK[:dim].clone(), requires_grad=False)
        self.queries_DK = nn.Parameter(projection_HK[dim:].clone(), requires_grad=False)
        self.kinds_SNK = nn.Parameter(kinds_SNK, requires_grad=False)
        self.register_buffer("powers", 2.0 ** torch.arange(NUM_AGES + 1), persistent=False)

    def forward(self, embeddings: _Embeddings, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors (B, E, K), and bool (B, E): where there is an event."""
        vectors, masks = [], []
        for kinds_NK, names in zip(self.kinds_SNK, self.spec.histories, strict=True):
            actions_BL = inputs[names.actions].clamp(0, NUM_ACTIONS - 1)
            kind_BL = actions_BL * NUM_AGES + self._age_buckets(inputs[names.ages_s])
            items_BLD = embeddings(ITEM_TABLE, inputs[names.item_ids])
            vectors_BLK = items_BLD @ self.items_DK + embedding(kind_BL, kinds_NK)
            if names.query_ids is not None:
                vectors_BLK = vectors_BLK + embeddings(QUERY_TABLE, inputs[names.query_ids]) @ self.queries_DK
            vectors.append(vectors_BLK)
            masks.append(actions_BL > 0)
        return torch.cat(vectors, dim=1), torch.cat(masks, dim=1)

    def _age_buckets(self, ages_s: Tensor) -> Tensor:
        """floor(log2(1 + seconds)), the last bucket open, exact at powers of two, which a float log2 alone is not."""
        powers = self.get_buffer("powers")
        last = NUM_AGES - 1
        value = 1 + ages_s.clamp(min=0)
        # NaN is not below either: it takes the last bucket, not a place outside the table.
        value = torch.where(value < powers[last], value, powers[last])
        bucket = torch.log2(value).floor().long().clamp(0, last)
        bucket = bucket - (powers[bucket] > value).long()
        return bucket + (powers[bucket + 1] <= value).long()


class _Interest(nn.Module):
    """IE on padded events (model/interest.py)."""

    def __init__(self, interest: InterestExtractor) -> None:
        super().__init__()
        self.cores = interest.cores
        self.scale = 1 / math.sqrt(interest.output_dim)
        inner_q, outer = interest.inner["q"](), interest.outer
        self.inner_q_KH = nn.Parameter(inner_q.detach().clone(), requires_grad=False)
        self.join_KK = nn.Parameter((outer["k"]().T @ outer["q"]()).detach(), requires_grad=False)
        self.value_KD = nn.Parameter(outer["v"]().T.detach().contiguous(), requires_grad=False)
        self.empty_D = interest.empty_D

    def forward(self, target_BH: Tensor, z_BVZ: Tensor, pairs_BEK: Tensor, mask_BE: Tensor) -> Tensor:
        """i_k of the views whose triggers are given, (B, V, D)."""
        query_core, key_core, value_core = self.cores(z_BVZ)
        query_KVB = _apply(query_core, (self.inner_q_KH @ target_BH.T).unsqueeze(1))
        query_KVB = (self.join_KK @ query_KVB.flatten(1)).view_as(query_KVB)
        query_BVK = (_apply(key_core.transpose(0, 1), query_KVB) * self.scale).permute(2, 1, 0)
        key_BEK, value_BEK = pairs_BEK.chunk(2, dim=2)
        score_BVE = torch.matmul(query_BVK, key_BEK.transpose(1, 2))
        floor = torch.finfo(score_BVE.dtype).min
        weight_BVE = torch.where(mask_BE.unsqueeze(1), score_BVE, floor).softmax(dim=2)
        inner_KVB = _apply(value_core, torch.matmul(weight_BVE, value_BEK).permute(2, 1, 0))
        interest_BVD = inner_KVB.permute(2, 1, 0) @ self.value_KD
        return torch.where(mask_BE.any(1).view(-1, 1, 1), interest_BVD, self.empty_D)


def _apply(core: Tensor, vector: Tensor) -> Tensor:
    """(I + core) vector of every row: (K, K, V, B) and (K, V, B)."""
    return vector + (core * vector).sum(1)


class ServingModel(nn.Module):
    """Probabilities from padded inputs. A row's outputs do not depend on the other rows of the batch.

    Args:
        model: of a run; it is copied and folded, and may go on training.
        tables: of the same run. Their rows are shared, not copied (but for the query table).
        spec: of the table that the run was trained on.
    """

    def __init__(self, model: UsrModel, tables: EmbeddingTables, spec: FeatureSpec) -> None:
        super().__init__()
        folded = model.fold().cpu().eval()
        inputs = folded.inputs
        self.spec = spec
        self.variant = folded.config.multitask.variant
        self.num_scenarios = folded.num_scenarios
        self.sparse_context, self.dense_context = inputs.sparse_context, inputs.dense_context
        self.dense_affine_2F = inputs.dense_affine_2F
        self.scenario_embedding_SE = folded.scenario_embedding_SE
        self.interact = inputs.interact if inputs.has_interactions else None
        self.embeddings = _Embeddings(tables, inputs.no_query_D)
        self.no_query_D = inputs.no_query_D
        self.events = _Events(folded, spec)
        self.trigger = folded.trigger
        self.interest = None if folded.interest is None else _Interest(folded.interest)
        self.empty_H = None if folded.pooled is None else folded.pooled.empty_H
        self.generator, self.backbone, self.global_heads = folded.generator, folded.backbone, folded.global_heads
        self.requires_grad_(False)
        self.eval()

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs; each is float32 (B)."""
        return PROBABILITIES + (GLOBAL_PROBABILITIES if self.global_heads is not None else ())

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output name -> probabilities (B) of rows given as `padded_inputs` gives them.

        Histories are padded on the left: the newest event is in the last column; action 0 marks an empty place.
        """
        # ONNX counts a negative index from the end; as torch does, it shall refuse it.
        scenario_B = torch.where(inputs[SCENARIO] < 0, self.num_scenarios, inputs[SCENARIO])
        sparse = [self.embeddings(f.name, inputs[SPARSE][:, n]) for n, f in enumerate(self.spec.sparse)]
        by_name = dict(zip(self.embeddings.places, sparse, strict=True))
        item_BD, query_BD = by_name[ITEM_TABLE], by_name[QUERY_TABLE]
        features, context = list(sparse), [sparse[n] for n in self.sparse_context]
        if self.dense_affine_2F is not None:
            dense_BF = inputs[DENSE] * self.dense_affine_2F[0] + self.dense_affine_2F[1]
            features.append(dense_BF)
            context += [dense_BF[:, n : n + 1] for n in self.dense_context]
        if self.interact is not None:
            features += self.interact(by_name, self._mean_item(inputs))
        f_BC = torch.cat(features, dim=1)
        vectors_BEK, mask_BE = self.events(self.embeddings, inputs)
        scenario_BE = embedding(scenario_B, self.scenario_embedding_SE)
        if self.trigger is None:
            i_BVD, f_BVC = self._pool(vectors_BEK, mask_BE), f_BC.unsqueeze(1)
            trigger_BZ = torch.cat([scenario_BE, query_BD, *context], dim=1)
            joined, last_BX = [scenario_BE], scenario_BE
        else:
            z_BSZ = self._triggers(inputs, scenario_B, query_BD, context)
            trigger_BZ = last_BX = _own(z_BSZ, scenario_B)
            z_BVZ = z_BSZ if self.global_heads is not None else trigger_BZ.unsqueeze(1)
            if self.interest is None:
                i_BVD = self._pool(vectors_BEK, mask_BE)
            else:
                i_BVD = self.interest(torch.cat([item_BD, query_BD], dim=1), z_BVZ, vectors_BEK, mask_BE)
            f_BVC = f_BC.unsqueeze(1) if self.generator is None else self.generator(z_BVZ, f_BC)
            joined = [z_BSZ.flatten(1), scenario_BE]
        x_BX = torch.cat([_own(i_BVD, scenario_B), _own(f_BVC, scenario_B), last_BX], dim=1)
        weights_B = torch.ones_like(x_BX[:, 0])
        logits_BT = self.backbone(BackboneInput(x_BX, scenario_B, scenario_BE, trigger_BZ, weights_B))
        return self._probabilities(logits_BT, torch.cat([i_BVD.flatten(1), f_BVC.flatten(1), *joined], dim=1))

    def _probabilities(self, logits_BT: Tensor, joined_BJ: Tensor) -> dict[str, Tensor]:
        if self.global_heads is None:
            probs = [scenario_outputs(logits_BT).log_p_BT.exp()]
        else:
            outputs = global_outputs(logits_BT, self.global_heads(joined_BJ), self.variant)
            assert outputs.log_p_global_BT is not None
            probs = [outputs.log_p_BT.exp(), outputs.log_p_global_BT.exp()]
        columns = [column_B for probs_BT in probs for column_B in probs_BT.unbind(1)]
        return dict(zip(self.output_names, columns, strict=True))

    def _pool(self, vectors_BEK: Tensor, mask_BE: Tensor) -> Tensor:
        """Mean of the events, or the learned vector of a row without any: (B, 1, H)."""
        assert self.empty_H is not None
        count_B1 = mask_BE.sum(1, keepdim=True)
        sum_BH = (vectors_BEK * mask_BE.unsqueeze(2)).sum(1)
        return torch.where(count_B1 > 0, sum_BH / count_B1.clamp(min=1), self.empty_H).unsqueeze(1)

    def _mean_item(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, D): mean of the item embeddings of all events, zeros without any (model/inputs.py, mean_item)."""
        ids_BE = torch.cat([inputs[names.item_ids] for names in self.spec.histories], dim=1)
        mask_BE = torch.cat([inputs[names.actions] > 0 for names in self.spec.histories], dim=1)
        sum_BD = (self.embeddings(ITEM_TABLE, ids_BE) * mask_BE.unsqueeze(2)).sum(1)
        return sum_BD / mask_BE.sum(1, keepdim=True).clamp(min=1)

    def _triggers(
        self, inputs: Mapping[str, Tensor], scenario_B: Tensor, query_BD: Tensor, context: list[Tensor]
    ) -> Tensor:
        """z_k of every view, (B, S, Z) (model/inputs.py, Trigger)."""
        assert self.trigger is not None
        own_query_B1 = embedding(scenario_B, self.trigger.get_buffer("has_query_S").float().unsqueeze(1)) > 0
        views = []
        for scenario, names in enumerate(self.spec.histories):
            if names.query_ids is None:
                query_view_BD = self.no_query_D.expand_as(query_BD)
            else:
                query_view_BD = torch.where(own_query_B1, query_BD, self._past_query(inputs, names.query_ids))
            scenario_BE = self.scenario_embedding_SE[scenario].expand_as(query_BD)
            views.append(torch.cat([scenario_BE, query_view_BD, *context], dim=1))
        z_BSZ: Tensor = self.trigger.norm(self.trigger.project(torch.stack(views, dim=1)))
        return z_BSZ

    def _past_query(self, inputs: Mapping[str, Tensor], name: str) -> Tensor:
        """(B, D): mean of the newest past queries, e_noq where there are none. A place without an event holds id 0."""
        assert self.trigger is not None
        ids_BR = inputs[name][:, -self.trigger.num_recent :]
        has_query_BR = ids_BR != 0
        count_B1 = has_query_BR.sum(1, keepdim=True)
        sum_BD = (self.embeddings(QUERY_TABLE, ids_BR) * has_query_BR.unsqueeze(2)).sum(1)
        return torch.where(count_B1 > 0, sum_BD / count_B1.clamp(min=1), self.no_query_D)


def _own(views_BVX: Tensor, scenario_B: Tensor) -> Tensor:
    """(B, X): each row's own view, or the only one."""
    if views_BVX.shape[1] == 1:
        return views_BVX[:, 0]
    index_B1X = scenario_B.view(-1, 1, 1).expand(-1, 1, views_BVX.shape[2])
    return views_BVX.gather(1, index_B1X).squeeze(1)
