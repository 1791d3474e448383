"""Vectors in the model: every backbone uses them, nothing trains them. Against slow loops in test_usr.py."""

from __future__ import annotations

import pytest
import torch

from tests.unit.random_batches import PLAIN, VECTORS, make_batch, make_config, make_spec, make_tables, rows
from usr_ray.config import BACKBONES
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.usr import UsrModel

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("switches", [{}, PLAIN], ids=["USR", "plain"])
def test_every_backbone_uses_each_vector_and_learns_its_map_and_what_stands_for_none(
    backbone: str, switches: dict
) -> None:
    spec = make_spec(vectors=VECTORS)
    torch.manual_seed(0)
    model, tables = UsrModel(spec, make_config(backbone=backbone, **switches)).eval(), make_tables(spec, 4, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    batch = make_batch(spec)
    lookup = tables.lookup(batch)
    found = model(batch, lookup)
    found.log_p_BT.sum().backward()
    for vector, map_PD in zip(spec.vectors, model.inputs.vector_maps, strict=True):
        assert map_PD.grad.abs().amin(1).min() > 0, vector.name  # the last row too: some have none
        assert not lookup.vectors[vector.name].requires_grad
        own = tables.vectors[vector.name]
        tables.vectors[vector.name] = own * 2
        assert not torch.allclose(model(batch, tables.lookup(batch)).log_p_BT, found.log_p_BT), vector.name
        tables.vectors[vector.name] = own
    alone = rows(batch, [3, 7])
    torch.testing.assert_close(
        model(alone, tables.lookup(alone)).log_p_BT, found.log_p_BT[[3, 7]], rtol=1e-4, atol=1e-5
    )
    assert sorted(lookup.updates()) == sorted(tables.tables), "what a step trains"


@pytest.mark.parametrize("event_sides", [True, False])
def test_events_and_targets_carry_items_vectors_or_not(event_sides: bool) -> None:
    spec = make_spec(vectors=VECTORS)
    model = UsrModel(spec, make_config(event_sides=event_sides))
    assert model.inputs.event_dim == 4 * (4 if event_sides else 2)  # item, two vectors, query
    assert model.inputs.feature_dim == UsrModel(make_spec(), make_config()).inputs.feature_dim + 3 * 4


@pytest.mark.parametrize("event_sides", [True, False])
def test_an_id_known_by_its_vector_alone_is_the_unknown_id_with_its_own_vector_and_sides(event_sides: bool) -> None:
    """Of the row and of the events: as if the unknown id's row stood in its place; its own row is not looked at."""
    spec = make_spec(sides=("brand",), vectors=VECTORS)
    torch.manual_seed(0)
    model = UsrModel(spec, make_config(event_sides=event_sides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    tables, batch = make_tables(spec, 4, 0), make_batch(spec)
    cold = {key: cold_N.nonzero().flatten() for key, cold_N in tables.cold.items()}
    assert cold.keys() == {"user_id", "item_id"}
    assert torch.isin(batch.sparse_BF[:, 1], cold["item_id"]).any()
    assert torch.isin(torch.cat([h.item_ids_V for h in batch.histories]), cold["item_id"]).any()
    found = model(batch, tables.lookup(batch)).log_p_BT
    found.sum().backward()
    copied = make_tables(spec, 4, 0)
    copied.cold = {}
    for key, ids in cold.items():
        assert not torch.equal(copied.tables[key][ids[0]], copied.tables[key][1])
        copied.tables[key][ids] = copied.tables[key][1].clone()
    torch.testing.assert_close(model(batch, copied.lookup(batch)).log_p_BT, found)
    for key, ids in cold.items():
        tables.tables[key][ids] = float("nan")
    assert torch.equal(model(batch, tables.lookup(batch)).log_p_BT, found), "their own rows"
    for name, key in (("face", "user_id"), ("picture", "item_id")):
        own = tables.vectors[name].clone()
        tables.vectors[name][cold[key]] += 1
        assert not torch.allclose(model(batch, tables.lookup(batch)).log_p_BT, found), name
        tables.vectors[name] = own
    tables.sides.ids_NC[cold["item_id"]] = 2
    assert torch.allclose(model(batch, tables.lookup(batch)).log_p_BT, found) == (not event_sides), "their sides"


def test_the_first_order_part_takes_it_for_the_unknown_id_too() -> None:
    spec = make_spec(vectors=VECTORS)
    model = UsrModel(spec, make_config(wide=True, wide_buckets=97), [("user_id", "item_id")]).eval()
    tables, batch, seen = make_tables(spec, 4, 0), make_batch(spec), []
    model.wide.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    with torch.no_grad():
        model.wide.weights_NH[1:] = torch.randn(96, 4)
        model(batch, tables.lookup(batch))
        ids = {f.name: batch.sparse_BF[:, n] for n, f in enumerate(spec.sparse)}
        as_it_is = model.wide(ids, batch.scenario_B)
        ids |= {key: torch.where(cold_N[ids[key]], 1, ids[key]) for key, cold_N in tables.cold.items()}
        expected = model.wide(ids, batch.scenario_B)
    assert torch.equal(seen[0], expected)
    assert not torch.equal(seen[0], as_it_is)


def test_without_such_ids_nothing_is_shared() -> None:
    spec = make_spec(vectors=VECTORS)
    tables, batch = make_tables(spec, 4, 0), make_batch(spec)
    flags = {name: cold_N & False for name, cold_N in tables.frozen.items() if name.endswith("_is_cold")}
    plain = EmbeddingTables(spec, 4, 0, vectors=tables.frozen | flags)
    assert plain.cold == {}
    assert plain.frozen.keys() == {"face", "title_vector", "picture"}
    assert all(table.ids.shared is None for table in plain.lookup(batch).tables.values())


def test_a_map_begins_as_large_as_an_embedding() -> None:
    spec = make_spec(vectors=(VECTORS[0].__class__(name="wide", owner="item", length=400),))
    torch.manual_seed(0)
    model = UsrModel(spec, make_config(embedding_dim=64))
    projected = model.inputs.projected({"wide": torch.cat([torch.randn(500, 400), torch.zeros(500, 1)], 1)})["wide"]
    assert projected.std().item() == pytest.approx(0.05, rel=0.05)
    assert model.inputs.projected({"wide": torch.eye(401)[-1:]})["wide"].std().item() == pytest.approx(0.05, rel=0.3)
