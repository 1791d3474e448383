"""Random batches and specs for the tests of the model: every feature kind, jagged and empty histories, padding rows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from usr_ray.config import ModelConfig
from usr_ray.config.model import ContrastiveConfig, GeneratorConfig, InterestConfig, MultitaskConfig
from usr_ray.data.batch import History, UsrBatch
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.unique import ItemSides
from usr_ray.schema import (
    ITEM_TERMS,
    QUERY_TERMS,
    TERM,
    DenseFeature,
    FeatureSpec,
    ListFeature,
    SparseFeature,
    VectorFeature,
    cold_column,
    index_column,
    list_column,
    scaled_column,
)

NAMES = ("search", "recommendation", "feed", "mail", "home", "cart", "ads", "live")
OWNERS = {
    "user_id": "user",
    "item_id": "item",
    "query": "query",
    "event_hour": "context",
    "age": "user",
    "brand": "item",
}


def make_spec(
    num_scenarios: int = 2,
    *,
    num_embeddings: int = 40,
    dense: bool = True,
    query_scenarios: tuple[str, ...] = ("search",),
    sides: tuple[str, ...] = (),
    lists: bool = False,
    vectors: tuple[VectorFeature, ...] = (),
) -> FeatureSpec:
    """With `lists`: tags of every owner, and terms of queries and items."""
    return FeatureSpec(
        scenarios=NAMES[:num_scenarios],
        query_scenarios=query_scenarios,
        sparse=tuple(
            SparseFeature(name=n, column=index_column(n), num_embeddings=num_embeddings, owner=o)
            for n, o in (OWNERS | dict.fromkeys(sides, "item")).items()
        ),
        dense=tuple(
            DenseFeature(name=n, column=scaled_column(n), owner=o)
            for n, o in (("price", "item"), ("hour_load", "context"))
        )
        if dense
        else (),
        history_length=6,
        label_delay_us=1,
        history_item_features=sides,
        lists=make_lists(num_embeddings) if lists else (),
        vectors=vectors,
    )


def make_lists(num_embeddings: int) -> tuple[ListFeature, ...]:
    def feature(name: str, owner: str, length: int, table: str = "") -> ListFeature:
        return ListFeature(
            name=name,
            column=list_column(name),
            table=table or name,
            num_embeddings=num_embeddings,
            owner=owner,
            length=length,
            sources=("query" if name == QUERY_TERMS else name,),
        )

    return (
        feature("hobbies", "user", 3),
        feature("tags", "item", 2),
        feature("intents", "query", 2),
        feature("moods", "context", 1),
        feature(QUERY_TERMS, "query", 3, TERM),
        feature(ITEM_TERMS, "item", 4, TERM),
    )


def make_tables(spec: FeatureSpec, dim: int, seed: int) -> EmbeddingTables:
    """Fresh tables; categories of items and vectors are drawn, but for padding and unknown, which have none."""
    vectors = make_vectors(spec, seed)
    if not spec.history_item_features:
        return EmbeddingTables(spec, dim, seed, vectors=vectors)
    g = torch.Generator().manual_seed(seed)
    sizes = [spec.sparse_feature(name).num_embeddings for name in spec.history_item_features]
    num_items = spec.sparse_feature("item_id").num_embeddings
    ids_NC = torch.stack([torch.randint(0, size, (num_items,), generator=g) for size in sizes], dim=1)
    ids_NC[:2] = 0
    return EmbeddingTables(spec, dim, seed, sides=ItemSides(spec.history_item_features, ids_NC), vectors=vectors)


VECTORS = (
    VectorFeature(name="face", owner="user", length=3),
    VectorFeature(name="title_vector", owner="item", length=5, scale=2.5),
    VectorFeature(name="picture", owner="item", length=2),
)


def make_vectors(spec: FeatureSpec, seed: int) -> dict[str, Tensor]:
    """Every third user or item has none, as padding and unknown; the last column says so. Every fourth has its id for
    its vector alone (data/by_id.py, read_cold).
    """
    g = torch.Generator().manual_seed(seed)
    found = {}
    for vector in spec.vectors:
        values_NP = torch.randn(spec.sparse_feature(vector.key).num_embeddings, vector.length + 1, generator=g)
        values_NP[:, -1] = torch.arange(len(values_NP)) % 3 == 1
        values_NP[:2, -1] = 1
        values_NP[values_NP[:, -1] == 1, :-1] = 0
        found[vector.name] = values_NP.half()
        found[cold_column(vector.key)] = torch.arange(len(values_NP)) % 4 == 3
    return found


def make_config(**changes: object) -> ModelConfig:
    """Small sizes; keys of ModelConfig, or interest, generator, multitask, contrastive as dictionaries of changes."""
    kinds = {
        "interest": InterestConfig,
        "generator": GeneratorConfig,
        "multitask": MultitaskConfig,
        "contrastive": ContrastiveConfig,
    }
    small: dict[str, dict] = {
        "interest": {"rank": 3, "over_parameterisation": 5},
        "generator": {"hidden": 6},
        "multitask": {"hidden": (6,)},
        "contrastive": {
            "group_size": 4,
            "every_nth_group": 1,
            "mask_rate": 0.4,
            "interest_weight": 0.3,
            "feature_weight": 0.2,
        },
    }
    sections = {n: k(**{**small[n], **changes.pop(n, {})}) for n, k in kinds.items()}  # type: ignore[dict-item]
    sizes = {"embedding_dim": 4, "trigger_dim": 5, "hidden": (8, 6), "tower_hidden": (4,), "recent_queries": 3}
    return ModelConfig(**{**sizes, **sections, **changes})  # type: ignore[arg-type]


NO_CL = {"interest_weight": 0.0, "feature_weight": 0.0}
PLAIN = {"interest": {"enabled": False}, "generator": {"enabled": False}, "multitask": {"enabled": False}}


def make_batch(
    spec: FeatureSpec, num_rows: int = 12, *, seed: int = 0, max_length: int = 5, num_padding: int = 2
) -> UsrBatch:
    """Rows of all scenarios in turn; row 0 has no history, the last `num_padding` rows are padding."""
    g = torch.Generator().manual_seed(seed)
    num_scenarios = len(spec.scenarios)
    scenario_B = torch.arange(num_rows) % num_scenarios
    sparse_BF = torch.stack([torch.randint(1, f.num_embeddings, (num_rows,), generator=g) for f in spec.sparse], dim=1)
    has_query_S = torch.tensor([s in spec.query_scenarios for s in spec.scenarios])
    sparse_BF[:, 2] *= has_query_S[scenario_B]
    p_BT = torch.rand(num_rows, 4, generator=g)
    click_g = (p_BT[:, 0] < 0.7).float()
    click, order_g = click_g * (p_BT[:, 1] < 0.6), click_g * (p_BT[:, 2] < 0.6)
    order = click * order_g * (p_BT[:, 3] < 0.7)
    row_number_B, weights_B = torch.arange(100, 100 + num_rows), torch.ones(num_rows)
    real = num_rows - num_padding
    lengths_SB = torch.randint(0, max_length + 1, (num_scenarios, num_rows), generator=g)
    lengths_SB[:, 0] = 0
    if num_padding:
        sparse_BF[real:] = 0
        scenario_B[real:] = 0
        row_number_B[real:], weights_B[real:], lengths_SB[:, real:] = -1, 0, 0
    sizes = {f.name: f.num_embeddings for f in spec.sparse}
    histories = []
    for s, name in enumerate(spec.scenarios):
        num_events = int(lengths_SB[s].sum())
        queries = torch.randint(0, sizes["query"], (num_events,), generator=g) if name in spec.query_scenarios else None
        histories.append(
            History(
                item_ids_V=torch.randint(1, sizes["item_id"], (num_events,), generator=g),
                actions_V=torch.randint(1, 3, (num_events,), generator=g),
                ages_s_V=torch.rand(num_events, generator=g) * 10 ** (torch.rand(num_events, generator=g) * 6),
                query_ids_V=queries,
                offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths_SB[s].cumsum(0)]),
            )
        )
    bags = [
        torch.randint(1, f.num_embeddings, (num_rows, f.length), generator=g)
        * (torch.arange(f.length) < torch.randint(0, f.length + 1, (num_rows, 1), generator=g))
        for f in spec.lists
    ]
    lists_BW = torch.cat(bags, dim=1) if bags else None
    if lists_BW is not None:
        lists_BW[real:] = 0
    labels_BT = torch.stack([click, order, click_g, order_g], dim=1)
    labels_BT[real:] = 0
    return UsrBatch(
        labels_BT=labels_BT,
        weights_B=weights_B,
        scenario_B=scenario_B,
        sparse_BF=sparse_BF,
        dense_BF=torch.randn(num_rows, len(spec.dense), generator=g),
        histories=tuple(histories),
        user_key_B=torch.arange(num_rows),
        request_key_B=torch.arange(num_rows),
        row_number_B=row_number_B,
        lists_BW=lists_BW,
    )


def rows(batch: UsrBatch, keep: Tensor | slice | list[int]) -> UsrBatch:
    """Some rows of a batch, in the order asked."""
    numbers = torch.arange(len(batch))[keep]
    histories = []
    for h in batch.histories:
        spans = [torch.arange(int(h.offsets[b]), int(h.offsets[b + 1])) for b in numbers.tolist()]
        places = torch.cat([torch.empty(0, dtype=torch.int64), *spans])
        histories.append(
            History(
                item_ids_V=h.item_ids_V[places],
                actions_V=h.actions_V[places],
                ages_s_V=h.ages_s_V[places],
                query_ids_V=None if h.query_ids_V is None else h.query_ids_V[places],
                offsets=torch.tensor([0, *[len(s) for s in spans]]).cumsum(0),
            )
        )
    flat = {
        f.name: getattr(batch, f.name)[numbers]
        for f in dataclasses.fields(batch)
        if f.name not in ("histories", "longest", "first_group") and getattr(batch, f.name) is not None
    }
    return UsrBatch(histories=tuple(histories), **flat)
