"""IE: generated attention against W built in full for each row, its gradients, and the mean that replaces it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.unit.random_batches import make_batch, make_spec, rows
from usr_ray.data.batch import History, UsrBatch
from usr_ray.model.embedding import Lookup, TableLookup
from usr_ray.model.history import NUM_AGES, EventKinds, JaggedHistories, lay_out, list_events
from usr_ray.model.inputs import Inputs
from usr_ray.model.interest import InterestExtractor, PooledHistory
from usr_ray.model.ops import Places, group_places
from usr_ray.model.unique import TableIds
from usr_ray.schema import NUM_ACTIONS

pytestmark = pytest.mark.unit

D, H, Z, V = 4, 6, 5, 3


def table_lookup(rows_UD: Tensor, events: Places) -> TableLookup:
    """A table of which histories alone use these rows, one each."""
    return TableLookup(TableIds(torch.arange(len(rows_UD)), torch.zeros(0), events), rows_UD, rows_UD)


def stand_in(batch: UsrBatch, seed: int = 0) -> Inputs:
    """Random rows for the items, queries and kinds of a batch's events, in float64."""
    g = torch.Generator().manual_seed(seed)
    num_events = len(list_events(batch).history_V)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def table() -> TableLookup:
        index_V = torch.randint(0, 7, (num_events,), generator=g)
        return table_lookup(random(7, H // 2), group_places(index_V, 7))

    lookup = Lookup({"item_id": table(), "query": table()})
    kinds_NH = random(len(batch.histories) * NUM_ACTIONS * NUM_AGES, H)
    return Inputs(
        features_BC=random(len(batch), 1),
        target_BH=random(len(batch), H),
        context_BC=random(len(batch), 0),
        query_BD=random(len(batch), H // 2),
        histories=JaggedHistories(batch, lookup, random(H // 2), kinds_NH),
    )


def tensors_of(histories: JaggedHistories) -> list[Tensor]:
    return [histories.items_UX, histories.queries_UD, histories.no_query_D, histories.kinds_NH]


def extractor() -> InterestExtractor:
    torch.manual_seed(0)
    ie = InterestExtractor(Z, H, D, rank=3, inner_dim=5).double()
    with torch.no_grad():
        for parameter in ie.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return ie


def event_vectors(inputs: Inputs) -> list[Tensor]:
    """h_j of every event, in the order of the histories."""
    histories = inputs.histories
    items, queries, no_query, kinds = tensors_of(histories)
    vectors = []
    for item, query, kind in zip(*(p.index_V.tolist() for p in histories.places), strict=True):
        vectors.append(torch.cat([items[item], queries[query] if query else no_query]) + kinds[kind])
    return vectors


def events_of(batch: UsrBatch, row: int) -> list[int]:
    """Numbers of a row's events in the list of all histories."""
    first, numbers = 0, []
    for h in batch.histories:
        numbers += [first + v for v in range(int(h.offsets[row]), int(h.offsets[row + 1]))]
        first += len(h.item_ids_V)
    return numbers


def slow_interest(ie: InterestExtractor, target: Tensor, z: Tensor, events: list[Tensor]) -> Tensor:
    generated = (ie.cores.generate.weight @ z + ie.cores.generate.bias).view(3, ie.rank, ie.rank)
    w_q, w_k, w_v = (
        ie.outer[x]() @ (torch.eye(ie.rank, dtype=torch.float64) + generated[n]) @ ie.inner[x]()
        for n, x in enumerate("qkv")
    )
    scores = [((w_q @ target) @ (w_k @ h)).item() / math.sqrt(D) for h in events]
    total = sum(math.exp(s) for s in scores)
    return sum(math.exp(s) / total * (w_v @ h) for s, h in zip(scores, events, strict=True))


def test_interest_equals_attention_with_each_rows_own_matrices() -> None:
    batch = make_batch(make_spec(3), 9)
    inputs, ie = stand_in(batch), extractor()
    vectors = event_vectors(inputs)
    z_BVZ = torch.randn(9, V, Z, dtype=torch.float64)
    keep_V = torch.rand(len(vectors)) < 0.6
    interest_BVD, twin_BVD = ie(inputs, z_BVZ, inputs.histories.grid.mark(keep_V))
    num_compared = 0
    for row in range(9):
        own = events_of(batch, row)
        kept = [v for v in own if keep_V[v]]
        for view in range(V):
            arguments = ie, inputs.target_BH[row], z_BVZ[row, view]
            if own:
                torch.testing.assert_close(
                    interest_BVD[row, view], slow_interest(*arguments, [vectors[v] for v in own])
                )
            else:
                assert torch.equal(interest_BVD[row, view], ie.empty_D)
            if kept:
                torch.testing.assert_close(twin_BVD[row, view], slow_interest(*arguments, [vectors[v] for v in kept]))
                num_compared += 1
    assert num_compared > 6


def test_gradients_of_interest_are_those_of_finite_differences() -> None:
    batch = rows(make_batch(make_spec(), 8, max_length=3), [0, 1, 2, 3])
    inputs, ie = stand_in(batch), extractor()
    keep_BL = inputs.histories.grid.mark(inputs.histories.events.from_newest_V == 0)
    names = [name for name, _ in ie.named_parameters()]

    def both(target_BH: Tensor, z_BVZ: Tensor, *rest: Tensor) -> Tensor:
        h, (items, queries, no_query, kinds, *weights) = inputs.histories, rest
        lookup = Lookup(
            {
                name: table_lookup(rows_UD, h.places[n])
                for n, (name, rows_UD) in enumerate((("item_id", items), ("query", queries)))
            }
        )
        moved = dataclasses.replace(
            inputs, target_BH=target_BH, histories=JaggedHistories(batch, lookup, no_query, kinds)
        )
        found = torch.func.functional_call(ie, dict(zip(names, weights, strict=True)), (moved, z_BVZ, keep_BL))
        return torch.cat(found)

    z_BVZ = torch.randn(4, 2, Z, dtype=torch.float64)
    arguments = [inputs.target_BH, z_BVZ, *tensors_of(inputs.histories), *(p.detach() for p in ie.parameters())]
    assert torch.autograd.gradcheck(both, [a.requires_grad_() for a in arguments], fast_mode=True)


def test_a_batch_without_any_event_gives_the_learned_vector_and_finite_gradients() -> None:
    batch = make_batch(make_spec(), 4, max_length=0)
    inputs, ie = stand_in(batch), extractor()
    interest_BVD, _ = ie(inputs, torch.randn(4, V, Z, dtype=torch.float64))
    assert torch.equal(interest_BVD, ie.empty_D.expand(4, V, D))
    interest_BVD.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ie.parameters())


def test_views_are_equal_until_the_cores_have_learned() -> None:
    batch = make_batch(make_spec(), 6)
    ie = InterestExtractor(Z, H, D, rank=3, inner_dim=5).double()
    interest_BVD, _ = ie(stand_in(batch), torch.randn(6, V, Z, dtype=torch.float64))
    torch.testing.assert_close(interest_BVD, interest_BVD[:, :1].expand(-1, V, -1))


def test_without_ie_the_interest_is_the_mean_of_the_events() -> None:
    batch = make_batch(make_spec(3), 9)
    inputs, pooled = stand_in(batch), PooledHistory(H).double()
    vectors = event_vectors(inputs)
    mean_BH = pooled(inputs.histories)
    for row in range(9):
        own = events_of(batch, row)
        expected = torch.stack([vectors[v] for v in own]).mean(0) if own else pooled.empty_H
        torch.testing.assert_close(mean_BH[row], expected)


def hand_batch() -> UsrBatch:
    """Two rows: search events of ages 0.5 and 3 s, then 1023 s; one recommendation order of 2^40 s on row 1."""
    batch = rows(make_batch(make_spec(), 4, max_length=0), [0, 1])
    search = History(
        item_ids_V=torch.tensor([3, 4, 5]),
        actions_V=torch.tensor([1, 2, 1]),
        ages_s_V=torch.tensor([3.0, 0.5, 1023.0]),
        query_ids_V=torch.tensor([2, 2, 3]),
        offsets=torch.tensor([0, 2, 3]),
    )
    recommendation = History(
        item_ids_V=torch.tensor([6]),
        actions_V=torch.tensor([2]),
        ages_s_V=torch.tensor([2.0**40]),
        query_ids_V=None,
        offsets=torch.tensor([0, 0, 1]),
    )
    return dataclasses.replace(batch, histories=(search, recommendation))


def test_events_know_their_row_their_kind_and_their_place() -> None:
    events = list_events(hand_batch())
    assert events.rows.group_V.tolist() == [0, 0, 1, 1]
    assert events.from_newest_V.tolist() == [1, 0, 0, 0]
    assert events.num_events_B.tolist() == [2, 2]
    # scenario, action, floor(log2(1 + age)); the last bucket is open.
    kinds = [(0, 1, 2), (0, 2, 0), (0, 1, 10), (1, 2, 31)]
    assert events.kinds.index_V.tolist() == [(s * 3 + a) * NUM_AGES + g for s, a, g in kinds]
    grid = lay_out(events)
    assert grid.valid_BL.tolist() == [[True, True], [True, True]]
    assert grid.slots.group_V.tolist() == [0, 1, 2, 3]
    assert grid.mark(torch.tensor([True, False, False, True])).tolist() == [[True, False], [False, True]]


def test_a_kind_is_the_sum_of_type_action_and_age() -> None:
    kinds = EventKinds(2, H, init_std=1.0)
    row = kinds()[(1 * 3 + 2) * NUM_AGES + 7]
    torch.testing.assert_close(row, kinds.type_SH[1] + kinds.action_AH[2] + kinds.age_GH[7])
