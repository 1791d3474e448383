"""Tags and terms in the model: by hand, and their lookup against the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit.random_batches import NO_CL, PLAIN, make_batch, make_config, make_spec, make_tables, rows
from usr_ray.model.lists import TERM_OVERLAP, TERM_PRODUCT, list_columns, overlap
from usr_ray.model.unique import EmbeddingError, table_columns
from usr_ray.model.usr import UsrModel

pytestmark = pytest.mark.unit


def test_lists_are_pooled_by_their_mean_and_terms_meet() -> None:
    """Two rows of D = 2; embedding of id n is (n, -n)."""
    spec = make_spec(lists=True)
    ids = {f.name: torch.zeros(2, f.length, dtype=torch.int64) for f in spec.lists}
    ids["tags"][0] = torch.tensor([4, 8])
    ids["query_terms"] = torch.tensor([[5, 1, 7], [0, 0, 0]])
    ids["item_terms"] = torch.tensor([[7, 1, 5, 9], [3, 0, 0, 0]])
    vectors = {name: torch.stack([n.float(), -n.float()], dim=2) for name, n in ids.items()}
    vectors = {name: torch.where(ids[name].unsqueeze(2) == 0, 99.0, value) for name, value in vectors.items()}
    found = list_columns(spec, ids, vectors)
    assert found["tags"].tolist() == [[6, -6], [0, 0]]
    assert found["hobbies"].tolist() == [[0, 0], [0, 0]]
    query, item = 13 / 3, 22 / 4
    torch.testing.assert_close(found["query_terms"], torch.tensor([[query, -query], [0, 0]]))
    torch.testing.assert_close(found["item_terms"], torch.tensor([[item, -item], [3, -3]]))
    torch.testing.assert_close(found[TERM_PRODUCT], torch.tensor([[query * item / 0.05] * 2, [0, 0]]))
    # Both have an unknown term, which may be two different ones: two of three, and two of four.
    torch.testing.assert_close(found[TERM_OVERLAP], torch.tensor([[2 / 3, 2 / 4], [0, 0]]))


def test_one_query_meets_many_items() -> None:
    one, items = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0], [6, 7, 8], [0, 0, 0]])
    assert torch.equal(overlap(one, items), overlap(one.expand(3, -1), items))
    torch.testing.assert_close(overlap(one, items), torch.tensor([[1, 1], [1 / 2, 1 / 3], [0, 0]]))


@pytest.mark.parametrize("changes", [{"contrastive": NO_CL}, PLAIN], ids=["USR", "plain"])
def test_every_list_reaches_the_outputs_and_its_table(changes: dict) -> None:
    spec = make_spec(lists=True)
    model, tables = UsrModel(spec, make_config(**changes)), make_tables(spec, 4, 0)
    batch = make_batch(spec, num_padding=0)
    lookup = tables.lookup(batch)
    for name, spans in table_columns(spec).items():
        table = lookup.tables[name]
        parts = zip(spans, table.ids.ids_U[table.ids.column_B].split(table.ids.widths, dim=1), strict=True)
        for (first, end), found_BL in parts:
            used = first + found_BL.shape[1]
            assert torch.equal(found_BL, batch.lists_BW[:, first:used])
            assert not batch.lists_BW[:, used:end].any()
    before = model(batch, lookup)
    before.log_p_BT.sum().backward()
    for name in ("hobbies", "tags", "intents", "moods", "term"):
        assert lookup.updates()[name][1].abs().sum() > 0
    for feature in spec.lists:
        first, end = spec.list_places[feature.name]
        changed = batch.lists_BW.clone()
        changed[:, first:end] = changed[:, first:end].flip(0)
        other = replace(batch, lists_BW=changed)
        assert not torch.allclose(model(other, tables.lookup(other)).log_p_BT, before.log_p_BT), feature.name


def test_columns_of_padding_alone_are_not_looked_up_and_change_no_bit() -> None:
    """A table of 32 places a list, as the configuration makes them, and one with as many as the rows use: 3 and 7."""
    wide = make_spec(lists=True)
    wide = replace(wide, lists=tuple(replace(f, length=32) for f in wide.lists[-2:]))
    narrow = replace(wide, lists=tuple(replace(f, length=n) for f, n in zip(wide.lists, (3, 7), strict=True)))
    small = make_batch(narrow, num_padding=0)
    small.lists_BW[:, [2, 9]] = 0
    small.lists_BW[5, [2, 9]] = torch.tensor([7, 8], dtype=small.lists_BW.dtype)  # all places of a list are used
    padded = torch.zeros(12, 64, dtype=small.lists_BW.dtype)
    padded[:, :3], padded[:, 32:39] = small.lists_BW[:, :3], small.lists_BW[:, 3:]
    found = []
    for spec, batch in ((narrow, small), (wide, replace(small, lists_BW=padded))):
        torch.manual_seed(0)
        model, tables = UsrModel(spec, make_config()), make_tables(spec, 4, 0)
        lookup = tables.lookup(batch)
        assert lookup.tables["term"].ids.widths == (3, 7)
        outputs = model(batch, lookup, 1)
        outputs.log_p_BT.sum().backward()
        found.append([outputs.log_p_BT, lookup.tables["term"].rows_UD.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    nobody = replace(small, lists_BW=torch.zeros_like(padded))
    assert tables.unique_ids(nobody)[-1].widths == (1, 1), "a column of padding is left"
    assert model(nobody, tables.lookup(nobody), 1).log_p_BT.isfinite().all()


def test_a_row_alone_is_the_row_in_its_batch_and_an_id_outside_is_refused() -> None:
    spec = make_spec(lists=True)
    model, tables = UsrModel(spec, make_config()).eval(), make_tables(spec, 4, 0)
    batch = make_batch(spec, num_padding=0)
    part = rows(batch, [3, 7])
    whole = model(batch, tables.lookup(batch)).log_p_BT[[3, 7]]
    torch.testing.assert_close(model(part, tables.lookup(part)).log_p_BT, whole)
    batch.lists_BW[2, -1] = 40
    with pytest.raises(EmbeddingError, match="table term: the batch has id 40, the table has 40 rows"):
        tables.lookup(batch)
