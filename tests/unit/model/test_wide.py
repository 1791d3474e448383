"""The first-order part: its hash by hand in plain Python, what has no value, its weights against one-hot sums."""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch

from tests.unit.random_batches import PLAIN, make_batch, make_config, make_spec, make_tables
from usr_ray.config import Config, ConfigError
from usr_ray.model.usr import UsrModel
from usr_ray.model.wide import Wide, wide_terms

pytestmark = pytest.mark.unit

CROSSES = (("age", "brand", "scenario"), ("query", "item_id"))
TERMS = (
    ("event_hour",),
    ("age",),
    ("brand",),
    ("event_hour", "scenario"),
    ("age", "scenario"),
    ("brand", "scenario"),
    ("age", "brand", "scenario"),
    ("item_id", "query"),
)


def constant(text: str) -> int:
    return zlib.crc32(text.encode()) % (2**31 - 2) + 1


def slow_bucket(term: tuple[str, ...], ids: dict[str, int], num_buckets: int) -> int:
    if any(ids[part] == 0 for part in term):
        return 0
    prime = 2**31 - 1
    key = sum(ids[part] % prime * constant(part) % prime for part in term) + constant("*".join(term))
    return 1 + key % (num_buckets - 1)


def test_terms_are_categories_alone_and_by_scenario_and_the_crosses_each_once() -> None:
    assert wide_terms(make_spec(), CROSSES) == TERMS
    assert wide_terms(make_spec(), [("scenario", "brand"), ("brand", "age"), ("age", "brand")]) == (
        *TERMS[:6],
        ("age", "brand"),
    )


@pytest.mark.parametrize("switches", [{}, {"multitask": {"variant": "B"}}, PLAIN], ids=["USR", "variant B", "plain"])
def test_every_heads_logit_has_the_weights_of_the_rows_values_and_padding_has_none(switches: dict) -> None:
    spec, config = make_spec(3), make_config(wide=True, wide_buckets=97, **switches)
    torch.manual_seed(0)
    model, tables = UsrModel(spec, config, CROSSES).eval(), make_tables(spec, 4, seed=0)
    weights_NH = model.wide.weights_NH
    num_heads = 2 if switches == PLAIN else 4
    assert weights_NH.shape == (97, num_heads)
    batch = make_batch(spec)
    heads = {"backbone": model.backbone, "global_heads": model.global_heads}
    logits: dict[str, torch.Tensor] = {}
    for name, module in heads.items():
        if module is not None:
            module.register_forward_hook(lambda _m, _i, out, name=name: logits.__setitem__(name, out.detach()))
    with torch.no_grad():
        before = model(batch, tables.lookup(batch))
        weights_NH[1:] = torch.randn(96, num_heads)
        after = model(batch, tables.lookup(batch))
    num_absent = 0
    for row in range(len(batch)):
        ids = {f.name: int(v) for f, v in zip(spec.sparse, batch.sparse_BF[row], strict=True)}
        ids["scenario"] = int(batch.scenario_B[row]) + 2
        places = [slow_bucket(term, ids, 97) for term in TERMS]
        num_absent += places.count(0)
        added = sum(weights_NH[place] for place in places if place)
        added = torch.zeros(num_heads) + added
        own = logits["backbone"][row] + added[:2]
        if num_heads == 2:
            expected = own.sigmoid()
        else:
            shared = (logits["global_heads"][row] + added[2:]).sigmoid()
            torch.testing.assert_close(after.log_p_global_BT.exp()[row], torch.stack([shared[0], shared.prod()]))
            click = shared[0] * own[0].sigmoid()
            above = shared.prod() if config.multitask.variant == "A" else click
            expected = torch.stack([click, above * own[1].sigmoid()])
        torch.testing.assert_close(after.log_p_BT.exp()[row], expected)
    assert num_absent >= 8, "rows of recommendation have no query, so no query x item; padding rows have no ids"
    assert not torch.equal(before.log_p_BT, after.log_p_BT)


def test_weights_start_at_zero_and_padding_is_never_trained() -> None:
    spec = make_spec()
    wide = Wide(spec, CROSSES, 97, 2)
    assert not wide.weights_NH.any()
    batch = make_batch(spec)
    ids = dict(zip((f.name for f in spec.sparse), batch.sparse_BF.unbind(1), strict=True))
    wide(ids, batch.scenario_B).sum().backward()
    assert not wide.weights_NH.grad[0].any()
    assert wide.weights_NH.grad[1:].any()


def test_cells_of_a_grid_lie_apart_about_as_often_as_a_random_hash_would_have_it() -> None:
    """30 x 40 x 3 cells in 2^18 rows: 3,600 values, of which a random hash merges 25 on average."""
    spec = make_spec(3)
    wide = Wide(spec, CROSSES, 1 << 18, 2)
    grid = torch.tensor(list(itertools.product(range(2, 32), range(2, 42), range(3))))
    ids = {f.name: torch.ones(len(grid), dtype=torch.int64) for f in spec.sparse} | {
        "age": grid[:, 0],
        "brand": grid[:, 1],
    }
    columns = [grid[:, 2] + 2 if part == "scenario" else ids[part] for part in wide.parts]
    buckets_BK = wide.buckets(torch.stack([*columns, torch.ones(len(grid), dtype=torch.int64)], dim=1))
    assert len(buckets_BK[:, TERMS.index(("age", "brand", "scenario"))].unique()) > 3_600 - 75


def test_ids_of_any_width_and_one_row_for_all_give_the_same() -> None:
    spec = make_spec()
    wide = Wide(spec, CROSSES, 97, 2)
    with torch.no_grad():
        wide.weights_NH[1:] = torch.randn(96, 2)
    ids = {f.name: torch.randint(1, 40, (5,)) for f in spec.sparse}
    ids["item_id"] = torch.tensor([2, 3, 2**40, 5, 2**31 - 1])
    ids["age"], ids["query"] = ids["age"][:1].expand(5), ids["query"][:1].expand(5)
    scenario_B = torch.zeros(5, dtype=torch.int64)
    whole = wide(ids, scenario_B)
    shared = wide(ids | {"age": ids["age"][:1], "query": ids["query"][:1]}, scenario_B[:1])
    assert torch.equal(whole, shared)
    narrow = {name: value.int() for name, value in ids.items() if name != "item_id"} | {"item_id": ids["item_id"]}
    assert torch.equal(whole, wide(narrow, scenario_B))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"crosses": [["age", "price"]]},
            r"^features.crosses\[0\]: price is no id or category; there can be: user_id, ",
        ),
        ({"crosses": [["age", "query"], ["age"]]}, r"^features.crosses\[1\]: \['age'\] must name two or more, each"),
        ({"crosses": [["age", "age"]]}, r"^features.crosses\[0\]: \['age', 'age'\] must name two or more, each of"),
        ({"crosses": [["age", "query"], ["query", "age"]]}, r"^features.crosses: .* is named more than once; take one"),
    ],
)
def test_crosses_that_cannot_be_are_refused_in_one_line(features: dict, message: str) -> None:
    section = {"user_categories": ["age"], "item_numbers": ["price"], **features}
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"model": {"wide": True}, "features": section})


def test_crosses_need_the_first_order_part_and_do_not_change_what_a_row_means() -> None:
    section = {"user_categories": ["age"], "crosses": [["age", "scenario", "event_hour"]]}
    with pytest.raises(ConfigError, match=r"^features.crosses is for the first-order part; set model.wide=true, or"):
        Config.from_dict({"features": section})
    crossed = Config.from_dict({"model": {"wide": True}, "features": section})
    assert crossed.row_meaning() == Config.from_dict({"features": {"user_categories": ["age"]}}).row_meaning()
