"""UsrBatch: padding of histories, slices, and rows put together from several batches, against plain lists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.examples import depth
from tests.unit.samples_table import samples_spec
from usr_ray.data.assemble import BatchBuilder, padding_batch, take_rows
from usr_ray.data.batch import History, UsrBatch

pytestmark = pytest.mark.unit

SPEC = samples_spec()
ROW_FIELDS = (
    "labels_BT",
    "weights_B",
    "scenario_B",
    "sparse_BF",
    "dense_BF",
    "user_key_B",
    "request_key_B",
    "row_number_B",
)


def history_of(lists: list[list[int]], *, has_queries: bool = True) -> History:
    """Item ids as given; action, age and query follow from the item id, so that a mix-up shows."""
    flat = torch.tensor([item for events in lists for item in events], dtype=torch.int64)
    offsets = np.concatenate([[0], np.cumsum([len(events) for events in lists])])
    return History(
        item_ids_V=flat,
        actions_V=flat % 2 + 1,
        ages_s_V=flat / 2,
        query_ids_V=flat + 1000 if has_queries else None,
        offsets=torch.from_numpy(offsets.astype(np.int64)),
    )


def batch_of(first_row: int, histories: list[list[list[int]]]) -> UsrBatch:
    """Rows whose every value follows from the row number; one list of lists a scenario."""
    row = torch.arange(first_row, first_row + len(histories[0]))
    return UsrBatch(
        labels_BT=(row[:, None] + torch.arange(4)).float(),
        weights_B=torch.ones(len(row)),
        scenario_B=row % 2,
        sparse_BF=(row[:, None] * 10 + torch.arange(len(SPEC.sparse))).int(),
        dense_BF=row[:, None] / 4 + torch.arange(len(SPEC.dense)),
        histories=(history_of(histories[0]), history_of(histories[1], has_queries=False)),
        user_key_B=-row,
        request_key_B=row * 3,
        row_number_B=row,
    )


def row_values(batch: UsrBatch, b: int) -> dict[str, Any]:
    """Everything a row holds, as plain values."""
    values: dict[str, Any] = {name: getattr(batch, name)[b].tolist() for name in ROW_FIELDS}
    for n, history in enumerate(batch.histories):
        first, last = int(history.offsets[b]), int(history.offsets[b + 1])
        for name in ("item_ids_V", "actions_V", "ages_s_V", "query_ids_V"):
            field = getattr(history, name)
            values[f"{name}_{n}"] = None if field is None else field[first:last].tolist()
    return values


def check_shape(batch: UsrBatch, *, items: torch.dtype = torch.int64, actions: torch.dtype = torch.int64) -> None:
    assert batch.sparse_BF.dtype == torch.int32
    for history in batch.histories:
        assert history.query_ids_V is None or history.query_ids_V.dtype == items
        assert (history.item_ids_V.dtype, history.actions_V.dtype) == (items, actions)
        assert history.offsets[0] == 0
        assert len(history.offsets) == len(batch) + 1
        for field in (history.item_ids_V, history.actions_V, history.ages_s_V, history.query_ids_V):
            assert field is None or len(field) == history.offsets[-1]
        assert history.ages_s_V.dtype == torch.float32
        assert history.offsets.dtype == torch.int64


LISTS = st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=0, max_size=7)


@pytest.mark.integration
@depth(30)
@given(lists=LISTS, max_length=st.integers(1, 8), has_queries=st.booleans())
def test_padded_history_keeps_the_newest_events_at_its_end(
    lists: list[list[int]], max_length: int, has_queries: bool
) -> None:
    history = history_of(lists, has_queries=has_queries)
    padded = history.padded(max_length)
    assert padded.item_ids_BL.shape == (len(lists), max_length)
    for b, events in enumerate(lists):
        kept = events[-max_length:]
        items = [0] * (max_length - len(kept)) + kept
        assert padded.item_ids_BL[b].tolist() == items
        assert padded.mask_BL[b].tolist() == [item != 0 for item in items]
        assert padded.actions_BL[b].tolist() == [item % 2 + 1 if item else 0 for item in items]
        assert padded.ages_s_BL[b].tolist() == [item / 2 for item in items]
        if padded.query_ids_BL is not None:
            assert padded.query_ids_BL[b].tolist() == [item + 1000 if item else 0 for item in items]
    assert (padded.query_ids_BL is not None) == has_queries


def test_padding_rows_count_nothing() -> None:
    batch = padding_batch(SPEC, 3)
    check_shape(batch, items=torch.int32, actions=torch.int8)
    assert len(batch) == 3
    assert batch.row_number_B.tolist() == [-1, -1, -1]
    for name in ROW_FIELDS:
        assert name == "row_number_B" or not getattr(batch, name).any()
    assert batch.sparse_BF.shape == (3, len(SPEC.sparse))
    assert batch.dense_BF.shape == (3, len(SPEC.dense))
    assert [history.query_ids_V is not None for history in batch.histories] == [True, False]
    assert all(len(history.item_ids_V) == 0 for history in batch.histories)


def example() -> UsrBatch:
    return batch_of(5, [[[1, 2], [], [3], [4, 5, 6]], [[], [7], [8, 9], []]])


def test_slices_hold_the_rows_and_share_the_memory() -> None:
    whole = example()
    part = whole.slice_rows(1, 3)
    check_shape(part)
    assert [row_values(part, b) for b in range(2)] == [row_values(whole, b) for b in (1, 2)]
    assert part.histories[1].item_ids_V.data_ptr() == whole.histories[1].item_ids_V[:1].data_ptr()
    assert len(whole.slice_rows(2, 2)) == 0


def test_rows_are_taken_in_any_order_and_more_than_once() -> None:
    whole = example()
    rows = [3, 0, 0, 2]
    taken = take_rows(whole, np.array(rows))
    check_shape(taken)
    assert [row_values(taken, n) for n in range(4)] == [row_values(whole, b) for b in rows]


@depth(30)
@given(
    lists=st.lists(st.lists(st.integers(1, 99), max_size=4), min_size=1, max_size=12),
    num_padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_rows_of_several_batches_land_in_their_places(lists: list[list[int]], num_padding: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = batch_of(100, [lists, lists[::-1]])
    cut = int(rng.integers(0, len(lists) + 1))
    places = rng.permutation(len(lists) + num_padding)[: len(lists)]
    builder = BatchBuilder(SPEC, len(lists) + num_padding)
    builder.add(whole.slice_rows(0, cut), places[:cut])
    builder.add(whole.slice_rows(cut, len(lists)), places[cut:])
    built = builder.finish()
    check_shape(built, items=torch.int32, actions=torch.int8)
    padding = padding_batch(SPEC, 1)
    source = {int(place): n for n, place in enumerate(places)}
    for b in range(len(built)):
        expected = row_values(whole, source[b]) if b in source else row_values(padding, 0)
        assert row_values(built, b) == expected


def test_a_batch_of_no_rows_is_all_padding() -> None:
    built = BatchBuilder(SPEC, 2).finish()
    assert [row_values(built, b) for b in range(2)] == [row_values(padding_batch(SPEC, 2), b) for b in range(2)]


def test_ids_are_as_wide_as_their_largest_table_needs() -> None:
    """2^31 rows have the ids 0..2^31 - 1, the most that int32 holds."""

    def types(**sizes: int) -> tuple[torch.dtype, torch.dtype, torch.dtype | None]:
        sparse = tuple(replace(f, num_embeddings=sizes.get(f.name, 10)) for f in SPEC.sparse)
        batch = padding_batch(replace(SPEC, sparse=sparse), 1)
        search = batch.histories[0]
        assert search.query_ids_V is not None
        return batch.sparse_BF.dtype, search.item_ids_V.dtype, search.query_ids_V.dtype

    assert types(item_id=2**31) == (torch.int32, torch.int32, torch.int32)
    assert types(item_id=2**31 + 1) == (torch.int64, torch.int64, torch.int32)
    assert types(query=2**31 + 1) == (torch.int64, torch.int32, torch.int64)
    assert types(user_id=2**31 + 1) == (torch.int64, torch.int32, torch.int32)


def test_wide_ids_keep_their_value_through_the_builder() -> None:
    large = 2**31
    sparse = tuple(replace(f, num_embeddings=large + 1) for f in SPEC.sparse)
    whole = batch_of(5, [[[1, 2], [3]], [[4], []]])
    search = replace(whole.histories[0], item_ids_V=torch.tensor([1, large, 3]))
    wide = torch.tensor([[large - 1, large, 0, 0, 0], [1, 2, 3, 4, 5]])
    whole = replace(whole, sparse_BF=wide, histories=(search, whole.histories[1]))
    builder = BatchBuilder(replace(SPEC, sparse=sparse), 2)
    builder.add(whole, np.array([1, 0]))
    built = builder.finish()
    assert built.sparse_BF.tolist() == wide.tolist()[::-1]
    assert built.histories[0].item_ids_V.tolist() == [3, 1, large]
