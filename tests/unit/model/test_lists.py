"""Tags and terms in the model: by hand, and their lookup against the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit.random_batches import NO_CL, PLAIN, make_batch, make_config, make_spec, make_tables, rows
from usr_ray.model.lists import TERM_OVERLAP, TERM_PRODUCT, list_columns, overlap
from usr_ray.model.unique import EmbeddingError
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
    assert lookup.tables["term"].column_B.shape == (12, 7)
    for name, table in lookup.tables.items():
        if table.column_B.ndim == 2:
            first = spec.list_places["query_terms" if name == "term" else name][0]
            expected = batch.lists_BW[:, first : first + table.column_B.shape[1]]
            assert torch.equal(table.ids_U[table.column_B], expected)
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
