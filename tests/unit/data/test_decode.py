"""One row group into tensors: layouts that Arrow may hand over, and every value that breaks the contract."""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.unit.random_batches import make_lists
from tests.unit.samples_table import samples_arrow, samples_spec
from usr_ray.data.batch import UsrBatch
from usr_ray.data.decode import table_to_batch
from usr_ray.data.manifest import DataError
from usr_ray.data.mature import WhichRows

pytestmark = pytest.mark.unit

SPEC = samples_spec()
TABLE = samples_arrow(SPEC, num_rows=60, num_days=2)
ITEMS, ACTIONS, AGES = "search_history_item_ids", "search_history_actions", "search_history_ages_s"


def decode(table: pa.Table, **options: Any) -> UsrBatch:
    which = WhichRows(**{"mature_only": False, **options})
    return table_to_batch(table, SPEC, which, where="part-0.parquet, row group 3", first_row=100)


def with_values(name: str, values: list[Any], kind: pa.DataType | None = None) -> pa.Table:
    place = TABLE.column_names.index(name)
    return TABLE.set_column(place, name, pa.array(values, kind or TABLE.schema.field(name).type))


def with_value(name: str, row: int, value: Any) -> pa.Table:
    values = TABLE.column(name).to_pylist()
    values[row] = value
    return with_values(name, values)


def lists(history: Any, name: str) -> list[list[Any]]:
    offsets = history.offsets.tolist()
    return [getattr(history, name)[a:b].tolist() for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize(
    "table",
    [
        TABLE.slice(7, 31),
        pa.concat_tables([TABLE.slice(7, 11), TABLE.slice(18, 20)]),
        TABLE.slice(7, 31).combine_chunks(),
    ],
    ids=["slice", "chunks", "copy"],
)
def test_a_slice_or_chunks_of_a_table_decode_as_the_rows_they_show(table: pa.Table) -> None:
    # ListArray.values ignores where a slice starts and ends; flatten() does not.
    batch = decode(table)
    rows = TABLE.to_pylist()[7:38]
    assert len(batch) == 31
    assert batch.row_number_B.tolist() == list(range(100, 131))
    assert batch.user_key_B.tolist() == [row["user_key"] for row in rows]
    assert batch.sparse_BF[:, 1].tolist() == [row["item_id_index"] for row in rows]
    for history, names in zip(batch.histories, SPEC.histories, strict=True):
        assert history.offsets[0] == 0
        assert len(history.item_ids_V) == history.offsets[-1]
        assert lists(history, "item_ids_V") == [row[names.item_ids] for row in rows]
        assert lists(history, "ages_s_V") == [row[names.ages_s] for row in rows]


def test_tags_and_terms_decode_side_by_side_and_padded() -> None:
    spec = samples_spec(lists=make_lists(9))
    table = samples_arrow(spec, num_rows=40, num_days=1).slice(5, 30)
    batch = table_to_batch(table, spec, where="x", first_row=0)
    assert batch.lists_BW is not None
    assert batch.lists_BW.dtype == torch.int32
    for feature in spec.lists:
        first, end = spec.list_places[feature.name]
        wanted = [row + [0] * (feature.length - len(row)) for row in table[feature.column].to_pylist()]
        assert batch.lists_BW[:, first:end].tolist() == wanted
    assert decode(TABLE).lists_BW is None
    column = table.column_names.index("tags_indices")
    for values, message in (
        ([1, 2, 3], "column tags_indices holds 3 values in a row, the table's feature spec has 2 of them"),
        ([9], "column tags_indices holds id 9, but the table's feature spec has 9 embeddings"),
    ):
        wrong = table.set_column(column, "tags_indices", pa.array([values] * 30, pa.list_(pa.int64())))
        with pytest.raises(DataError, match=f"^x: {message}"):
            table_to_batch(wrong, spec, where="x", first_row=0)


def test_no_row_decodes_to_an_empty_batch() -> None:
    batch = decode(TABLE.slice(0, 0))
    assert len(batch) == 0
    assert all(history.offsets.tolist() == [0] for history in batch.histories)
    assert batch.histories[0].ages_s_V.dtype == torch.float32


def test_rows_without_any_event_decode() -> None:
    empty: list[list[int]] = [[] for _ in range(60)]
    table = TABLE
    for names in SPEC.histories:
        for name in (names.item_ids, names.actions, names.ages_s, names.query_ids):
            if name:
                kind = table.schema.field(name).type
                table = table.set_column(table.column_names.index(name), name, pa.array(empty, kind))
    assert all(history.offsets.tolist() == [0] * 61 for history in decode(table).histories)


def test_of_one_scenario_alone_only_its_rows_count_and_only_its_histories_are_there() -> None:
    every, alone = decode(TABLE), decode(TABLE, only_scenario="recommendation")
    assert alone.weights_B.tolist() == [float(n == "recommendation") for n in TABLE["scenario"].to_pylist()]
    assert torch.equal(alone.sparse_BF, every.sparse_BF)
    gone, kept = alone.histories
    assert gone.offsets.tolist() == [0] * 61
    assert [len(values) for values in (gone.item_ids_V, gone.actions_V, gone.ages_s_V, gone.query_ids_V)] == [0] * 4
    assert lists(kept, "item_ids_V") == TABLE["recommendation_history_item_ids"].to_pylist()


def test_tables_without_numbers_and_with_one_scenario_decode() -> None:
    spec = samples_spec(scenarios=("feed",), query_scenarios=())
    table = samples_arrow(spec, num_rows=9, num_days=1)
    batch = table_to_batch(table, spec, where="x", first_row=0)
    assert len(batch.histories) == 1
    assert batch.histories[0].query_ids_V is None
    assert not batch.scenario_B.any()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (with_value("item_id_index", 4, None), "column item_id_index has 1 nulls, but the samples table"),
        (with_value(ITEMS, 4, None), f"column {ITEMS} has 1 nulls"),
        (with_values(ITEMS, [[2, None]] * 60, pa.list_(pa.int64())), f"column {ITEMS} has 60 null elements"),
        (with_value("is_click", 4, 2.0), "column is_click holds 2.0 in row 4, a label is 0 or 1"),
        (with_value("is_click", 4, float("nan")), "column is_click holds nan in row 4, a label is 0 or 1"),
        (with_value("item_id_index", 4, 42), "column item_id_index holds id 42, but .* has 42 embeddings"),
        (with_value("item_id_index", 4, -1), "column item_id_index holds id -1, but .* has 42 embeddings"),
        (with_value("scenario_index", 4, 2), "column scenario_index holds id 2, but .* has 2 scenarios"),
        (with_value("price_scaled", 4, float("inf")), "column price_scaled holds inf in row 4, not a finite number"),
        (with_value("price_scaled", 4, float("nan")), "column price_scaled holds nan in row 4, not a finite number"),
        (with_value(ITEMS, 4, [2] * 6), f"column {ITEMS} holds 6 events in a row, histories.length is 5"),
        (with_values(ITEMS, [[42]] * 60), f"column {ITEMS} holds id 42, but .* has 42 embeddings"),
        (with_values(ACTIONS, [[1]] * 59 + [[1, 1]]), f"column {ACTIONS} has another number of events than {ITEMS}"),
        (with_values("user_key", [1] * 60, pa.int32()), "column user_key is int32 in the file, the table says long"),
        (with_values(ITEMS, [1] * 60, pa.int64()), f"column {ITEMS} is int64 in the file, the table says array<long>"),
        (TABLE.drop_columns([AGES]), f"column {AGES} is missing in the file, though the table has it"),
    ],
)
def test_values_that_break_the_contract_are_refused_with_their_place(table: pa.Table, message: str) -> None:
    with pytest.raises(DataError, match=f"^part-0.parquet, row group 3: {message}") as caught:
        decode(table)
    assert str(caught.value).endswith("; rebuild its date with jobs/build_samples.py")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 1, 1, 1), "column is_order is 1 where is_click is 0 in row 7"),
        ((1, 0, 0, 0), "column is_click is 1 where is_click_global is 0 in row 7"),
        ((1, 1, 1, 0), "column is_order is 1 where is_order_global is 0 in row 7"),
        ((0, 0, 0, 1), "column is_order_global is 1 where is_click_global is 0 in row 7"),
    ],
)
def test_labels_out_of_order_are_refused(labels: tuple[int, ...], message: str) -> None:
    table = TABLE
    for name, value in zip(("is_click", "is_order", "is_click_global", "is_order_global"), labels, strict=True):
        values = [0.0] * 60
        values[7] = float(value)
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.float32()))
    with pytest.raises(DataError, match=message):
        decode(table)


@pytest.mark.parametrize(
    ("value", "is_fine"), [(0.25, True), (0.0, False), (-3.0, False), (float("nan"), False), (float("inf"), False)]
)
def test_ages_are_positive_numbers(value: float, is_fine: bool) -> None:
    ages = [[float(value)] * len(row) for row in TABLE.column(AGES).to_pylist()]
    if is_fine:
        assert decode(with_values(AGES, ages)).histories[0].ages_s_V.unique().tolist() == [0.25]
    else:
        with pytest.raises(DataError, match=f"column {AGES} holds an age that is not a positive number"):
            decode(with_values(AGES, ages))


@pytest.mark.parametrize("action", [0, 3, -1])
def test_actions_are_clicks_or_orders(action: int) -> None:
    actions = [[action] * len(row) for row in TABLE.column(ACTIONS).to_pylist()]
    with pytest.raises(DataError, match=rf"column {ACTIONS} holds an action outside 1\.\.2"):
        decode(with_values(ACTIONS, actions))


def test_event_time_must_be_a_time() -> None:
    table = with_values("event_time", [5] * 60, pa.int64())
    with pytest.raises(DataError, match="column event_time is int64 in the file, the table says timestamp"):
        decode(table, ready_before_us=0)
    assert len(decode(table)) == 60, "event_time is not read without a cut-off"
