"""Embedding tables, lookups and the grouped sums they feed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.random_batches import make_batch, make_config, make_spec, rows
from usr_ray.data.batch import map_tensors
from usr_ray.model.counter_random import hash_keys, to_uniform
from usr_ray.model.embedding import EmbeddingTables, check_shapes, fresh_rows
from usr_ray.model.ops import Groups, group_places, pool_sum
from usr_ray.model.unique import EmbeddingError, unique_ids
from usr_ray.model.usr import UsrModel
from usr_ray.training.loss import row_counts, usr_loss

pytestmark = pytest.mark.unit


def history_ids(batch, table: str) -> Tensor:
    if table == "item_id":
        return torch.cat([h.item_ids_V for h in batch.histories])
    return torch.cat(
        [torch.zeros_like(h.item_ids_V) if h.query_ids_V is None else h.query_ids_V for h in batch.histories]
    )


def test_a_lookup_holds_each_used_row_once_with_padding_first() -> None:
    spec, batch = make_spec(), make_batch(make_spec())
    tables = EmbeddingTables(spec, 4, seed=3)
    lookup = tables.lookup(batch)
    assert list(lookup.tables) == [f.name for f in spec.sparse]
    for number, (name, table) in enumerate(lookup.tables.items()):
        used = {0, *batch.sparse_BF[:, number].tolist()}
        if name in ("item_id", "query"):
            ids_V = history_ids(batch, name)
            used |= set(ids_V.tolist())
            assert table.ids.events is not None
            assert torch.equal(table.ids.ids_U[table.ids.events.index_V], ids_V)
        else:
            assert table.ids.events is None
        assert table.ids.ids_U.tolist() == sorted(used)
        assert torch.equal(table.ids.ids_U[table.ids.column_B], batch.sparse_BF[:, number])
        assert torch.equal(table.rows_UD, tables.tables[name][table.ids.ids_U])
        assert table.rows_UD.is_leaf
        assert table.rows_UD.requires_grad


def test_a_batch_without_rows_uses_padding_alone() -> None:
    spec = make_spec()
    lookup = EmbeddingTables(spec, 4, seed=3).lookup(make_batch(spec).slice_rows(0, 0))
    for table in lookup.tables.values():
        assert table.ids.ids_U.tolist() == [0]
        assert len(table.ids.column_B) == 0


def test_ids_found_ahead_of_the_step_give_the_same_lookup() -> None:
    spec, batch = make_spec(), make_batch(make_spec())
    tables = EmbeddingTables(spec, 4, seed=3)
    copies = []

    def copy(tensor: Tensor) -> Tensor:
        copies.append(tensor)
        return tensor.clone()

    ahead, now = tables.lookup(batch, map_tensors(unique_ids(batch, tables.num_rows()), copy)), tables.lookup(batch)
    # ids and column of six tables, three tensors of places of the two with histories
    assert len(copies) == 6 * 2 + 2 * 3
    for name, table in now.tables.items():
        other = ahead.tables[name]
        assert torch.equal(table.ids.ids_U, other.ids.ids_U)
        assert torch.equal(table.rows_UD, other.rows_UD)
        assert torch.equal(table.ids.column_B, other.ids.column_B)
        if table.ids.events is not None:
            assert other.ids.events is not None
            assert torch.equal(table.ids.events.index_V, other.ids.events.index_V)
            assert torch.equal(table.ids.events.order_V, other.ids.events.order_V)
            assert torch.equal(table.ids.events.starts_U, other.ids.events.starts_U)


def test_row_gradients_equal_those_of_whole_dense_tables() -> None:
    spec, config = make_spec(), make_config()
    batch = make_batch(spec)
    torch.manual_seed(0)
    model, tables = UsrModel(spec, config), EmbeddingTables(spec, 4, seed=1)
    lookup = tables.lookup(batch)
    counts_S = row_counts(batch, 2, config)
    usr_loss(model(batch, lookup, 5), batch, counts_S, config).total.backward()
    # The same step with the rows taken out of dense tables by autograd's own gather.
    dense = {name: table.clone().requires_grad_() for name, table in tables.tables.items()}
    by_autograd = {n: dataclasses.replace(t, rows_UD=dense[n][t.ids.ids_U]) for n, t in lookup.tables.items()}
    usr_loss(model(batch, dataclasses.replace(lookup, tables=by_autograd), 5), batch, counts_S, config).total.backward()
    for name, (ids_U, grads_UD) in lookup.updates().items():
        grad_ND = dense[name].grad
        assert grad_ND is not None
        assert 0 not in ids_U
        torch.testing.assert_close(grads_UD, grad_ND[ids_U])
        unused = torch.ones(len(grad_ND), dtype=torch.bool)
        unused[[0, *ids_U.tolist()]] = False
        assert not grad_ND[unused].any()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            # A view of an argument (detach of the table) costs nothing.
            if isinstance(t, Tensor) and not any(isinstance(a, Tensor) and a.data_ptr() == t.data_ptr() for a in args):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.integration
def test_no_tensor_of_a_step_grows_with_the_tables() -> None:
    largest = []
    for num_embeddings in (40, 20_000):
        spec, config = make_spec(num_embeddings=num_embeddings), make_config()
        batch = make_batch(make_spec(num_embeddings=40))
        model, tables = UsrModel(spec, config), EmbeddingTables(spec, 4, seed=0)
        with LargestTensor() as seen:
            lookup = tables.lookup(batch)
            usr_loss(model(batch, lookup), batch, row_counts(batch, 2, config), config).total.backward()
            lookup.updates()
        largest.append(seen.numel)
    assert largest[0] == largest[1] < 10_000


def test_fresh_tables_depend_on_seed_and_name_alone_and_padding_is_zero() -> None:
    spec = make_spec()
    first, again, other = (EmbeddingTables(spec, 8, seed=s) for s in (1, 1, 2))
    for name, table in first.tables.items():
        assert torch.equal(table, again.tables[name])
        assert not torch.equal(table, other.tables[name])
        assert not table[0].any()
        assert (table[1:] != 0).all()
    assert not torch.equal(first.tables["user_id"], first.tables["item_id"])


def test_fresh_rows_have_the_documented_spread() -> None:
    table = EmbeddingTables(make_spec(num_embeddings=20_000), 8, seed=0).tables["item_id"]
    assert table.mean().abs() < 1e-3
    assert table.std() == pytest.approx(0.05, rel=0.02)
    assert table.abs().max() <= 0.05 * 3**0.5


def test_the_rows_of_a_small_table_are_the_first_of_a_large_one() -> None:
    large = EmbeddingTables(make_spec(num_embeddings=25), 4, seed=7).tables["item_id"]
    assert torch.equal(EmbeddingTables(make_spec(num_embeddings=10), 4, seed=7).tables["item_id"], large[:10])
    assert torch.equal(fresh_rows("item_id", 10, 25, dim=4, seed=7), large[10:])


@pytest.mark.parametrize("of_history", [False, True])
@pytest.mark.parametrize("wrong", [40, -1, 2**16 + 3])
def test_an_id_outside_its_table_is_refused(wrong: int, of_history: bool) -> None:
    """Also one whose lowest 16 bits, which are sorted, are those of another."""
    spec = make_spec()
    batch = make_batch(spec)
    (batch.histories[1].item_ids_V if of_history else batch.sparse_BF[4])[1] = wrong
    with pytest.raises(
        EmbeddingError,
        match=rf"table item_id: the batch has id {wrong}, the table has 40 rows; .* build the manifest again",
    ):
        EmbeddingTables(spec, 4, seed=0).lookup(batch)


def test_state_comes_back_as_it_was_saved() -> None:
    source, target = (EmbeddingTables(make_spec(), 4, seed=s) for s in (0, 1))
    place = target.tables["user_id"]
    target.load_state_dict({n: t.clone() for n, t in source.tables.items()})
    assert all(torch.equal(target.tables[n], t) for n, t in source.tables.items())
    assert target.tables["user_id"] is place, "the optimiser holds the table itself"


def test_a_checkpoint_of_other_tables_is_refused() -> None:
    tables = EmbeddingTables(make_spec(), 4, seed=0)
    state = tables.tables
    with pytest.raises(EmbeddingError, match="checkpoint: query is missing; use a checkpoint of a run with the same"):
        tables.load_state_dict({n: t for n, t in state.items() if n != "query"})
    with pytest.raises(EmbeddingError, match=r"age is \(9, 4\), this run needs \(40, 4\); use a checkpoint of the"):
        tables.load_state_dict(state | {"age": torch.zeros(9, 4)})
    shapes: dict[str, tuple[int, ...]] = {"tables/item_id": (9, 4), "adagrad/item_id": (9,)}
    check_shapes(shapes, shapes | {"model/x": (3,)})


def test_lookup_makes_no_leaves_that_want_gradients_in_evaluation() -> None:
    spec = make_spec()
    with torch.no_grad():
        lookup = EmbeddingTables(spec, 4, seed=0).lookup(make_batch(spec))
    assert not any(t.rows_UD.requires_grad for t in lookup.tables.values())


def test_a_batch_without_events_or_rows_can_be_looked_up() -> None:
    spec = make_spec()
    tables = EmbeddingTables(spec, 4, seed=0)
    lookup = tables.lookup(rows(make_batch(spec), []))
    assert all(t.ids.ids_U.tolist() == [0] for t in lookup.tables.values())
    assert UsrModel(spec, make_config()).eval()(rows(make_batch(spec), []), lookup).log_p_BT.shape == (0, 2)


def test_pool_sum_adds_the_rows_of_each_group_and_sends_gradients_back() -> None:
    g = torch.Generator().manual_seed(0)
    indices = [torch.randint(0, 5, (9,), generator=g), torch.randint(0, 3, (9,), generator=g)]
    weights = [torch.randn(n, 2, generator=g, dtype=torch.float64).requires_grad_() for n in (5, 3)]
    group_V = torch.tensor([3, 0, 3, 1, 0, 3, 1, 1, 0])  # group 2 is empty
    order_V = torch.argsort(group_V, stable=True)
    groups = Groups(group_V, order_V, torch.tensor([0, 3, 6, 6]))
    places = [group_places(i, n) for i, n in zip(indices, (5, 3), strict=True)]
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for place, group in enumerate(group_V.tolist()):
        expected[group] += weights[0][indices[0][place]].detach() + weights[1][indices[1][place]].detach()
    torch.testing.assert_close(pool_sum(weights, places, groups), expected)
    assert torch.autograd.gradcheck(lambda *w: pool_sum(w, places, groups), weights)


def test_places_list_the_places_of_each_row_in_order() -> None:
    places = group_places(torch.tensor([2, 0, 2, 3, 0]), 5)
    assert places.order_V.tolist() == [1, 4, 0, 2, 3]
    assert places.starts_U.tolist() == [0, 2, 2, 4, 5]


def split_mix(state: int, key: int) -> int:
    """SplitMix64's finaliser on plain integers."""
    mask = 2**64 - 1
    mixed = (state ^ ((key + 1) * 0x9E3779B97F4A7C15)) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


def test_hashes_equal_those_of_plain_integers() -> None:
    keys = [0, 1, 7, 2**40, -1]
    hashed = hash_keys(hash_keys(torch.tensor(12), 34), torch.tensor(keys))
    expected = [split_mix(split_mix(12, 34), key) for key in keys]
    assert [h % 2**64 for h in hashed.tolist()] == expected
    assert to_uniform(hashed).tolist() == [(e >> 40) / 2**24 for e in expected]
