"""USR around a backbone: input network -> IE -> FG -> backbone -> GLMT (method, section 3).

h_k = [i_k ; f_k ; z_k] takes the place of [pooled history ; f ; e_k] in each backbone, whichever it is.

Shape letters: B rows, R those with twins, S scenarios, V views computed (S, or 1: the row's own), D, C, Z widths of i,
f, z, E scenario embedding, X backbone input.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from usr_ray.config import ModelConfig
from usr_ray.data.batch import GroupShare, UsrBatch, UsrOutputs, rows_of
from usr_ray.model.backbones import BackboneDims, BackboneInput, build_backbone
from usr_ray.model.backbones.towers import select_scenario
from usr_ray.model.contrastive import event_mask, feature_mask
from usr_ray.model.embedding import Lookup
from usr_ray.model.generator import FeatureGenerator
from usr_ray.model.history import Histories, JaggedHistories
from usr_ray.model.inputs import InputNetwork, Inputs, Trigger, side_by_side
from usr_ray.model.interest import InterestExtractor, PooledHistory
from usr_ray.model.lists import list_columns
from usr_ray.model.multitask import REST_SHARE, GlobalHeads, global_outputs, scenario_outputs, with_rest
from usr_ray.model.unique import ITEM_TABLE, QUERY_TABLE, event_sides, event_vectors, table_columns
from usr_ray.model.wide import Wide
from usr_ray.schema import TASKS, FeatureSpec


@dataclass(frozen=True, slots=True)
class _Views:
    """What IE and FG say of the computed views. Without IE i is (B, 1, D); without FG f is (B, 1, C)."""

    interests_BVD: Tensor
    features_BVC: Tensor
    interests_twin_RVD: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Masks:
    """What the twins see; None: no twin of that part."""

    share: GroupShare | None = None
    """The rows that have twins; None: all."""
    events_RL: Tensor | None = None
    features_RC: Tensor | None = None


class UsrModel(nn.Module):
    """The dense part of USR: what DDP wraps. The tables stay outside (model/embedding.py).

    Every part has a switch, and all switches off is the plain backbone on [pooled history ; f ; e_k]:

    - `interest.enabled` (IE) off: the mean of the events, the same in all views.
    - `generator.enabled` (FG) off: f itself.
    - `multitask.enabled` (GLMT) off: the backbone's logits direct.
    - `contrastive.*_weight` 0, or the part it acts on off, or one scenario: no twins are computed.

    With IE and FG both off there are no views: e_k takes the place of z_k, and backbones that want a trigger (APG)
    get [e_k ; e_q or e_noq ; e_c] unchanged. `wide` on, each head's logit has the first-order part besides; of
    `crosses` (features.crosses) it alone knows.
    """

    def __init__(self, spec: FeatureSpec, config: ModelConfig, crosses: Sequence[Sequence[str]] = ()) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        num_scenarios, dim = len(spec.scenarios), config.embedding_dim
        self.num_scenarios = num_scenarios
        self.scenario_embedding_SE = nn.Parameter(torch.randn(num_scenarios, dim) * dim**-0.5)
        self.inputs = InputNetwork(spec, config)
        self.sides, self.event_vectors = event_sides(spec, config), event_vectors(spec, config)
        event_dim = self.inputs.event_dim
        ie, fg = config.interest, config.generator
        self.has_views = ie.enabled or fg.enabled
        self.trigger = Trigger(spec, config, self.inputs.context_dim) if self.has_views else None
        self.pooled = None if ie.enabled else PooledHistory(event_dim)
        self.interest = (
            InterestExtractor(config.trigger_dim, event_dim, dim, ie.rank, ie.over_parameterisation)
            if ie.enabled
            else None
        )
        self.generator = (
            FeatureGenerator(config.trigger_dim, self.inputs.feature_dim, fg.hidden) if fg.enabled else None
        )
        interest_dim = dim if ie.enabled else event_dim
        feature_dim = self.inputs.feature_dim
        dims = BackboneDims(
            input_dim=interest_dim + feature_dim + (config.trigger_dim if self.has_views else dim),
            scenario_dim=dim,
            trigger_dim=config.trigger_dim if self.has_views else 2 * dim + self.inputs.context_dim,
            num_scenarios=num_scenarios,
        )
        self.backbone = build_backbone(config, dims)
        joined_dim = (
            interest_dim * (num_scenarios if ie.enabled else 1)
            + feature_dim * (num_scenarios if fg.enabled else 1)
            + config.trigger_dim * (num_scenarios if self.has_views else 0)
            + dim
        )
        self.global_heads = (
            GlobalHeads(joined_dim, config.multitask, config.dropout) if config.multitask.enabled else None
        )
        if config.multitask.enabled:
            self.register_buffer(REST_SHARE, torch.ones(num_scenarios, len(TASKS)))
        num_heads = len(TASKS) * (2 if config.multitask.enabled else 1)
        self.wide = Wide(spec, crosses, config.wide_buckets, num_heads) if config.wide else None
        cl = config.contrastive
        self.twins_interest = ie.enabled and cl.interest_weight > 0 and num_scenarios > 1
        self.twins_features = fg.enabled and cl.feature_weight > 0 and num_scenarios > 1

    def forward(self, batch: UsrBatch, lookup: Lookup, step_seed: int | Tensor = 0) -> UsrOutputs:
        """Log probabilities of every row, and in training the views and twins of the contrastive loss.

        Args:
            batch: B rows, on the module's device.
            lookup: RowSource.lookup(batch).
            step_seed: draws the twins' masks: one number per step, the same on every rank (an int64 scalar tensor where
                a new number would be a new constant for torch.compile). Not used in evaluation.
        """
        projected = self.inputs.projected(lookup.vectors)
        of_items = [projected[name] for name in self.event_vectors]
        histories = JaggedHistories(batch, lookup, self.inputs.no_query_D, self.inputs.kinds(), self.sides, of_items)
        columns = {name: embedding(table.ids.column_B, table.rows_UD) for name, table in lookup.tables.items()}
        for vector in self.spec.vectors:
            columns[vector.name] = embedding(lookup.tables[vector.key].ids.column_B, projected[vector.name])
        columns |= self._list_columns(batch, lookup, columns)
        # In the query table, padding is not "nothing" but the learned e_noq.
        has_query_B1 = (lookup.tables[QUERY_TABLE].ids.column_B > 0).unsqueeze(1)
        columns[QUERY_TABLE] = torch.where(has_query_B1, columns[QUERY_TABLE], self.inputs.no_query_D)
        ids = dict(zip(self.inputs.names, batch.sparse_BF.unbind(1), strict=True))
        ids |= {name: table.row_B for name, table in lookup.tables.items() if table.ids.shared is not None}
        masks = self._masks(batch, histories, step_seed) if self.training else None
        return self.score(columns, ids, batch.dense_BF, histories, batch.scenario_B, batch.weights_B, masks)

    def _masks(self, batch: UsrBatch, histories: JaggedHistories, step_seed: int | Tensor) -> _Masks | None:
        """What the twins see, drawn for this step; None: there are none."""
        share = GroupShare.of_batch(batch, self.config)
        if not (self.twins_interest or self.twins_features) or (share is not None and share.num_rows == 0):
            return None
        rate, events_RL, features_RC = self.config.contrastive.mask_rate, None, None
        if self.twins_interest:
            keep_V = event_mask(histories.events, batch.row_number_B, step_seed, rate)
            events_RL = rows_of(histories.grid.mark(keep_V), share)
        if self.twins_features:
            row_number_R = rows_of(batch.row_number_B, share)
            features_RC = feature_mask(self.inputs.feature_widths, row_number_R, step_seed, rate)
        return _Masks(share, events_RL, features_RC)

    def _list_columns(self, batch: UsrBatch, lookup: Lookup, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What tags and terms add, from the embeddings (B, L, D) of their tables."""
        if batch.lists_BW is None:
            return {}
        ids, own = {}, {}
        tables = {name: lookup.tables[name].ids.widths for name in table_columns(self.spec)}
        parts = {name: iter(vectors[name].split(list(widths), dim=1)) for name, widths in tables.items()}
        for feature in self.spec.lists:
            own[feature.name] = next(parts[feature.vocabulary])
            first = self.spec.list_places[feature.name][0]
            ids[feature.name] = batch.lists_BW[:, first : first + own[feature.name].shape[1]]
        return list_columns(self.spec, ids, own)

    def score(
        self,
        columns: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        dense_BF: Tensor,
        histories: Histories,
        scenario_B: Tensor,
        weights_B: Tensor,
        masks: _Masks | None = None,
    ) -> UsrOutputs:
        """The one forward of training, evaluation and exported models: embeddings in, log probabilities out.

        The rows are impressions, or the candidates of one request: then every column but the items', the histories and
        the scenario have one row, and whatever depends on these alone is computed once.

        Args:
            columns: embedding (B, D) of the row by feature name; in the query's, e_noq where there is no query;
                those of `list_columns` and the projected vectors too.
            ids: encoded id (B) of the row by feature name, for the first-order part; the unknown id's where it has no
                row of its own.
            scenario_B: int64, the row's own scenario.
            weights_B: 0 for rows that must not influence others.
            masks: what the twins of the contrastive loss see; None: there are no twins.
        """
        num_rows = columns[ITEM_TABLE].shape[0]
        inputs: Inputs = self.inputs(columns, dense_BF, histories)
        scenario_BE = embedding(scenario_B, self.scenario_embedding_SE)
        if self.trigger is None:
            views = _Views(self._pool(histories), inputs.features_BC.unsqueeze(1))
            joined = [scenario_BE]
            trigger_BZ = torch.cat([scenario_BE, inputs.query_BD, inputs.context_BC], dim=1)
            last_BX = scenario_BE
        else:
            z_BSZ = self.trigger(inputs, scenario_B, self.scenario_embedding_SE)
            trigger_BZ = last_BX = select_scenario(z_BSZ, scenario_B)
            all_views = self.global_heads is not None or masks is not None
            views = self._views(inputs, z_BSZ if all_views else trigger_BZ.unsqueeze(1), masks or _Masks())
            joined = [z_BSZ.flatten(1), scenario_BE]
        scenario_B = scenario_B.expand(num_rows)
        i_BD, f_BC = (select_scenario(of, scenario_B) for of in (views.interests_BVD, views.features_BVC))
        x_BX = side_by_side([i_BD, f_BC, last_BX], num_rows)
        scenario_BE, trigger_BZ = scenario_BE.expand(num_rows, -1), trigger_BZ.expand(num_rows, -1)
        logits_BT = self.backbone(BackboneInput(x_BX, scenario_B, scenario_BE, trigger_BZ, weights_B))
        wide_BH = None if self.wide is None else self.wide(ids, scenario_B)
        if wide_BH is not None:
            logits_BT = logits_BT + wide_BH[:, : len(TASKS)]
        if self.global_heads is None:
            outputs = scenario_outputs(logits_BT)
        else:
            each_view = [*_each(views.interests_BVD), *_each(views.features_BVC)]
            global_BT = self.global_heads(side_by_side([*each_view, *joined], num_rows))
            if wide_BH is not None:
                global_BT = global_BT + wide_BH[:, len(TASKS) :]
            outputs = global_outputs(logits_BT, global_BT, self.config.multitask.variant)
            if not self.training:
                share_BT = embedding(scenario_B, self.get_buffer(REST_SHARE))
                outputs = with_rest(outputs, share_BT, self.config.multitask.variant)
        return self._with_views(outputs, views, masks)

    def _pool(self, histories: Histories) -> Tensor:
        assert self.pooled is not None
        pooled_BH: Tensor = self.pooled(histories)
        return pooled_BH.unsqueeze(1)

    def _views(self, inputs: Inputs, z_BVZ: Tensor, masks: _Masks) -> _Views:
        """i_k and f_k of the views whose triggers are given, and the twins of i_k where there are masks."""
        interests_twin_RVD = None
        if self.interest is None:
            interests_BVD = self._pool(inputs.histories)
        else:
            interests_BVD, interests_twin_RVD = self.interest(inputs, z_BVZ, masks.events_RL, masks.share)
        if self.generator is None:
            features_BVC = inputs.features_BC.unsqueeze(1)
        else:
            features_BVC = self.generator(z_BVZ, inputs.features_BC)
        return _Views(interests_BVD, features_BVC, interests_twin_RVD)

    def _with_views(self, outputs: UsrOutputs, views: _Views, masks: _Masks | None) -> UsrOutputs:
        """Outputs with the vectors of the parts that are on, when all views were computed."""
        if self.interest is not None and views.interests_BVD.shape[1] == self.num_scenarios:
            outputs = replace(outputs, interests_BSD=views.interests_BVD, interests_twin_RSD=views.interests_twin_RVD)
        if self.generator is not None and views.features_BVC.shape[1] == self.num_scenarios:
            kept_RC = None if masks is None else masks.features_RC
            outputs = replace(outputs, features_BSD=views.features_BVC, features_kept_RD=kept_RC)
        return outputs

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *more: Any) -> None:
        """Weights of an older version have no shares: theirs are 1."""
        if self.global_heads is not None:
            state_dict.setdefault(f"{prefix}{REST_SHARE}", torch.ones_like(self.get_buffer(REST_SHARE)))
        super()._load_from_state_dict(state_dict, prefix, *more)

    def fold(self) -> UsrModel:
        """A copy for export, in which every product U and V is one matrix: equal outputs, fewer parameters."""
        folded = copy.deepcopy(self)
        if folded.interest is not None:
            folded.interest.fold()
        folded.backbone.fold()
        return folded


def _each(views_BVX: Tensor) -> Sequence[Tensor]:
    """(B, X) of each view. One view lies after the other in memory, and so do their gradients then."""
    return views_BVX.transpose(0, 1).unbind(0)
