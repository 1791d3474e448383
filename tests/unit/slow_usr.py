"""USR written out row by row from the formulas of docs/method.md: the plain reference of the model's tests.

Takes the modules' weights and nothing else of the code under test; every W_X^k is built in full.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from usr_ray.data.batch import UsrBatch
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.usr import UsrModel
from usr_ray.schema import FeatureSpec


@dataclass
class SlowRow:
    """One row's z_k, i_k and f_k by view, and what the heads are given."""

    f: Tensor
    z: list[Tensor]
    i: list[Tensor]
    f_views: list[Tensor]
    x: Tensor
    joined: Tensor


def row_events(batch: UsrBatch, row: int) -> list[tuple[int, int, int, int, float]]:
    """(scenario, item, query, action, age) of a row's events, scenario after scenario."""
    events = []
    for s, h in enumerate(batch.histories):
        for v in range(int(h.offsets[row]), int(h.offsets[row + 1])):
            query = 0 if h.query_ids_V is None else int(h.query_ids_V[v])
            events.append((s, int(h.item_ids_V[v]), query, int(h.actions_V[v]), float(h.ages_s_V[v])))
    return events


class SlowUsr:
    def __init__(self, model: UsrModel, tables: EmbeddingTables, spec: FeatureSpec) -> None:
        self.model, self.spec = model, spec
        self.tables = {n: t.double() for n, t in tables.tables.items()}
        self.no_query = model.inputs.no_query_D
        self.sides = tables.sides
        self.vectors = {n: t.double() for n, t in tables.vectors.items()}
        self.cold = tables.cold
        self.vector, self.item = functools.cache(self.vector), functools.cache(self.item)  # the same for every event
        if model.interest is not None:
            outer, inner = model.interest.outer, model.interest.inner
            self.factors = {
                x: (outer[x].left_OP @ outer[x].right_PI, inner[x].left_OP @ inner[x].right_PI) for x in "qkv"
            }

    def embedded(self, name: str, number: int) -> Tensor:
        """Row of a table: the unknown id's of an id that is known by its vector alone."""
        is_cold = name in self.cold and bool(self.cold[name][number])
        return self.tables[name][1 if is_cold else number]

    def vector(self, name: str, number: int) -> Tensor:
        """The projected vector of a user or item, or what stands for none."""
        place = [v.name for v in self.spec.vectors].index(name)
        weights = self.model.inputs.vector_maps[place]
        *values, is_missing = self.vectors[name][number].tolist()
        return weights[-1] if is_missing else sum(x * row for x, row in zip(values, weights[:-1], strict=True))

    @property
    def item_vectors(self) -> list[str]:
        return [v.name for v in self.spec.vectors if v.owner == "item"] if self.model.config.event_sides else []

    def item(self, number: int) -> list[Tensor]:
        """e_item and the rows of its categories, by what the item features say of it."""
        named = [] if self.sides is None else zip(self.sides.names, self.sides.ids_NC[number].tolist(), strict=True)
        vectors = [self.vector(name, number) for name in self.item_vectors]
        return [self.embedded("item_id", number), *(self.tables[name][value] for name, value in named), *vectors]

    def target(self, batch: UsrBatch, row: int) -> Tensor:
        """t: of the row's own columns, which an item unknown to the item features has too."""
        values = dict(zip((f.name for f in self.spec.sparse), batch.sparse_BF[row].tolist(), strict=True))
        names = ("item_id", *(() if self.sides is None else self.sides.names))
        vectors = [self.vector(name, values["item_id"]) for name in self.item_vectors]
        own = [self.embedded(name, values[name]) for name in names]
        return torch.cat([*own, *vectors, self.query(values["query"])])

    def query(self, number: int) -> Tensor:
        return self.no_query if number == 0 else self.tables["query"][number]

    def features(self, batch: UsrBatch, row: int) -> tuple[Tensor, Tensor]:
        """f and e_c."""
        parts, context = [], []
        for number, feature in enumerate(self.spec.sparse):
            value = int(batch.sparse_BF[row, number])
            part = self.query(value) if feature.name == "query" else self.embedded(feature.name, value)
            parts.append(part)
            context += [part] if feature.owner == "context" else []
        for number, dense in enumerate(self.spec.dense):
            scale, shift = self.model.inputs.dense_affine_2F[:, number]
            part = (batch.dense_BF[row, number].double() * scale + shift).view(1)
            parts.append(part)
            context += [part] if dense.owner == "context" else []
        numbers = {"user": int(batch.sparse_BF[row, 0]), "item": int(batch.sparse_BF[row, 1])}
        vectors = [(v.owner, self.vector(v.name, numbers[v.owner])) for v in self.spec.vectors]
        if self.model.config.interactions:
            parts += self.interactions(batch, row, parts, vectors)
        parts += [vector for _, vector in vectors]
        return torch.cat(parts), torch.cat(context)

    def interactions(
        self, batch: UsrBatch, row: int, parts: list[Tensor], vectors: list[tuple[str, Tensor]]
    ) -> list[Tensor]:
        """u * v, q * v and mean item * v of sides over the start's standard deviation, 0.05, through their towers.

        The mean item is of all events, then perhaps of each scenario's.
        """
        sums = {}
        for owner in ("user", "item"):
            own = [p for p, feature in zip(parts, self.spec.sparse, strict=False) if feature.owner == owner]
            own += [vector for whose, vector in vectors if whose == owner]
            sums[owner] = sum(own) / len(own) ** 0.5
        groups = [range(len(self.spec.scenarios))]
        if self.model.config.interaction_histories == "each" and len(groups[0]) > 1:
            groups += [range(s, s + 1) for s in groups[0]]
        means = []
        for group in groups:
            events = [item for s, item, _, _, _ in row_events(batch, row) if s in group]
            past = [sum(v := self.item(item)) / len(v) ** 0.5 for item in events]
            means.append(torch.stack(past).mean(0) if past else torch.zeros_like(parts[0]))
        query = [self.query(int(batch.sparse_BF[row, 2]))] if self.spec.query_scenarios else []
        others = [*query, *means]
        sides = [x / 0.05 for x in (sums["user"], sums["item"], *others)]
        for n, tower in enumerate(self.model.inputs.interactions.towers or []):
            (first, first_bias), (last, last_bias) = (
                map(Tensor.double, layer.parameters()) for layer in tower.layers[::2]
            )
            hidden = (first @ sides[n].double() + first_bias).clamp(min=0)
            sides[n] = sides[n] + last @ hidden + last_bias
        user, item, *rest = sides
        return [0.05 * x * item for x in (user, *rest)]

    def trigger(self, batch: UsrBatch, row: int, view: int, context: Tensor) -> Tensor:
        name, own = self.spec.scenarios[view], self.spec.scenarios[int(batch.scenario_B[row])]
        query = self.no_query
        if name in self.spec.query_scenarios:
            if own in self.spec.query_scenarios:
                query = self.query(int(batch.sparse_BF[row, 2]))
            else:
                past = [q for s, _, q, _, _ in row_events(batch, row) if s == view][-self.model.config.recent_queries :]
                known = [self.tables["query"][q] for q in past if q > 0]
                query = torch.stack(known).mean(0) if known else self.no_query
        projected = self.model.trigger.project(torch.cat([self.model.scenario_embedding_SE[view], query, context]))
        return torch.nn.functional.layer_norm(
            projected, projected.shape, self.model.trigger.norm.weight, self.model.trigger.norm.bias
        )

    def events(self, batch: UsrBatch, row: int) -> list[Tensor]:
        """h_j."""
        kinds, vectors = self.model.inputs.kinds, []
        for s, item, query, action, age in row_events(batch, row):
            bucket = min(int(math.log2(1 + age)), 31)
            own = torch.cat([*self.item(item), self.query(query)])
            vectors.append(own + kinds.type_SH[s] + kinds.action_AH[action] + kinds.age_GH[bucket])
        return vectors

    def interest(self, target: Tensor, z: Tensor, events: list[Tensor]) -> Tensor:
        """softmax attention with W_X^k = U_X S_X^k V_X built for this row and view."""
        ie = self.model.interest
        if not events:
            return ie.empty_D
        rank = ie.rank
        generated = (ie.cores.generate.weight @ z + ie.cores.generate.bias).view(3, rank, rank)
        w = {}
        for number, x in enumerate("qkv"):
            u, v = self.factors[x]
            w[x] = u @ (torch.eye(rank, dtype=z.dtype) + generated[number]) @ v
        scores = torch.stack([(w["q"] @ target) @ (w["k"] @ h) for h in events]) / math.sqrt(len(w["q"]))
        weights = torch.exp(scores) / torch.exp(scores).sum()
        return sum(a * (w["v"] @ h) for a, h in zip(weights, events, strict=True))

    def gated(self, z: Tensor, f: Tensor) -> Tensor:
        fg = self.model.generator
        hidden = fg.trigger_layer.weight @ z + fg.trigger_layer.bias + fg.feature_layer.weight @ f.detach()
        gate = 2 / (1 + torch.exp(-(fg.gate_layer.weight @ hidden.clamp(min=0) + fg.gate_layer.bias)))
        return gate * f

    def row(self, batch: UsrBatch, row: int) -> SlowRow:
        model, views, own = self.model, range(len(self.spec.scenarios)), int(batch.scenario_B[row])
        f, context = self.features(batch, row)
        e_k, events = model.scenario_embedding_SE[own], self.events(batch, row)
        target = self.target(batch, row)
        z = [] if model.trigger is None else [self.trigger(batch, row, view, context) for view in views]
        if model.interest is not None:
            i = [self.interest(target, z[view], events) for view in views]
        else:
            i = [torch.stack(events).mean(0) if events else model.pooled.empty_H]
        f_views = [f] if model.generator is None else [self.gated(z[view], f) for view in views]
        x = torch.cat([i[own if len(i) > 1 else 0], f_views[own if len(f_views) > 1 else 0], z[own] if z else e_k])
        return SlowRow(f, z, i, f_views, x, torch.cat([*i, *f_views, *z, e_k]))
