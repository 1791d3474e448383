"""Vectors in the model: every backbone uses them, nothing trains them. Against slow loops in test_usr.py."""

from __future__ import annotations

import pytest
import torch

from tests.unit.random_batches import PLAIN, VECTORS, make_batch, make_config, make_spec, make_tables, rows
from usr_ray.config import BACKBONES
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
    assert sorted(tables.state_dict()) == sorted(tables.tables), "what a checkpoint holds"


@pytest.mark.parametrize("event_sides", [True, False])
def test_events_and_targets_carry_items_vectors_or_not(event_sides: bool) -> None:
    spec = make_spec(vectors=VECTORS)
    model = UsrModel(spec, make_config(event_sides=event_sides))
    assert model.inputs.event_dim == 4 * (4 if event_sides else 2)  # item, two vectors, query
    assert model.inputs.feature_dim == UsrModel(make_spec(), make_config()).inputs.feature_dim + 3 * 4


def test_a_map_begins_as_large_as_an_embedding() -> None:
    spec = make_spec(vectors=(VECTORS[0].__class__(name="wide", owner="item", length=400),))
    torch.manual_seed(0)
    model = UsrModel(spec, make_config(embedding_dim=64))
    projected = model.inputs.projected({"wide": torch.cat([torch.randn(500, 400), torch.zeros(500, 1)], 1)})["wide"]
    assert projected.std().item() == pytest.approx(0.05, rel=0.05)
    assert model.inputs.projected({"wide": torch.eye(401)[-1:]})["wide"].std().item() == pytest.approx(0.05, rel=0.3)
