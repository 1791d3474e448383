"""The logistic regression's columns, by hand; it finds a cross that no column says alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from usr_ray.config import UserError
from usr_ray.schema import OPEN_LABEL, DenseFeature, FeatureSpec, SparseFeature
from usr_ray.training.logistic import (
    INVERSE_L2,
    MIN_ROWS,
    PlainRows,
    crossed_columns,
    design,
    logistic_regression,
    mean_and_deviation,
)

pytestmark = pytest.mark.unit

OWNERS = {"user_id": "user", "item_id": "item", "query": "query", "age": "user", "city": "user", "brand": "item"}


def spec_of():
    sparse = [SparseFeature(name=n, column=n, num_embeddings=40, owner=o) for n, o in OWNERS.items()]
    dense = (DenseFeature(name="price", column="price", owner="item"),)
    return FeatureSpec(
        scenarios=("search", "feed"),
        query_scenarios=("search",),
        sparse=tuple(sparse),
        dense=dense,
        history_length=1,
        label_delay_us=1,
    )


def rows_of(ids, labels, scenario=0):
    ids = np.array(ids)
    labels_NT = np.stack([labels, labels], axis=1).astype(np.float32)
    numbers = np.arange(len(ids), dtype=np.float32)
    return PlainRows(ids, numbers[:, None], np.full(len(ids), scenario), labels_NT, np.arange(len(ids)))


def test_crosses_join_the_users_side_with_the_items():
    found = crossed_columns(spec_of())
    assert [names for names in found if len(names) == 1] == [("scenario",), *((n,) for n in OWNERS)]
    assert {names[1:] for names in found if len(names) == 3} == {
        ("user_id", "brand"),
        ("age", "item_id"),
        ("age", "brand"),
        ("city", "item_id"),
        ("city", "brand"),
        ("query", "item_id"),
        ("query", "brand"),
    }
    assert [names[1:] for names in found if len(names) == 4] == [("age", "city", "item_id"), ("age", "city", "brand")]


def test_a_value_has_a_column_where_training_has_it_often_enough():
    often = [[2, 2, 2, 2, 2, 2]] * MIN_ROWS
    seldom = [[3, 3, 3, 3, 3, 3]] * (MIN_ROWS - 1)
    train = rows_of(often + seldom, [0] * (2 * MIN_ROWS - 1))
    fitted, scored = design(spec_of(), train, rows_of([often[0], seldom[0]], [0, 0]))
    num_crosses = len(crossed_columns(spec_of()))
    assert fitted.shape == (2 * MIN_ROWS - 1, num_crosses + 1)  # one value of each, and the price
    assert scored.toarray()[0, :-1].tolist() == [1] * num_crosses
    assert scored.toarray()[1, :-1].sum() == 1, "the scenario alone is known"
    assert fitted.toarray()[:, -1].mean() == pytest.approx(0, abs=1e-6)
    assert fitted.toarray()[:, -1].std() == pytest.approx(1, abs=1e-4)


def test_it_finds_what_only_two_columns_together_say():
    generator = np.random.default_rng(0)
    ids = np.full((2000, 6), 2)
    ids[:, 3], ids[:, 5] = generator.integers(2, 4, 2000), generator.integers(2, 4, 2000)
    labels = ids[:, 3] == ids[:, 5]
    probs_NT = logistic_regression(spec_of(), rows_of(ids, labels), rows_of(ids[:50], labels[:50]))
    assert probs_NT.shape == (50, 2)
    assert ((probs_NT[:, 0] > 0.9) == labels[:50]).all()
    assert ((probs_NT[:, 0] < 0.1) == ~labels[:50]).all()


def test_labels_that_no_log_knows_are_no_labels():
    """The feed logs no orders: its rows, all of them 0, must not change what the search's say."""
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    ids = np.full((400, 6), 2)
    ids[:, 3] = generator.integers(2, 4, 400)
    labels = (ids[:, 3] == 3) ^ (generator.random(400) < 0.2)
    search, feed = rows_of(ids, labels), rows_of(ids, labels * 0, scenario=1)
    both = PlainRows(*(np.concatenate([getattr(one, name) for one in (search, feed)]) for name in PlainRows.__slots__))
    both.labels_NT[400:, 0] = labels
    knows_search = replace(spec_of(), no_order_scenarios=("feed",))
    fitted, scored = design(spec_of(), both, search)
    model = LogisticRegression(C=INVERSE_L2, max_iter=200, tol=1e-3).fit(fitted[:400], labels)
    probs_NT = logistic_regression(knows_search, both, search)
    np.testing.assert_array_equal(probs_NT[:, 1], model.predict_proba(scored)[:, 1])
    assert abs(probs_NT[:, 1].mean() - labels.mean()) < 0.02
    alone_NT = logistic_regression(replace(spec_of(), no_order_scenarios=("search",)), search, search)
    assert np.isnan(alone_NT).tolist() == [[False, True]] * 400, "no row has a label of this task"


def test_rows_whose_label_is_open_are_left_out():
    from sklearn.linear_model import LogisticRegression

    ids, labels = [[2] * 6] * 20 + [[3] * 6] * 20, [0, 1] * 10 + [0, 0, 0, 1] * 5
    train, scored = rows_of(ids, labels), rows_of([ids[0], ids[-1]], [0, 0])
    train.labels_NT[10:25, 1] = OPEN_LABEL
    columns, wanted = design(spec_of(), train, scored)
    known = [*range(10), *range(25, 40)]
    alone = LogisticRegression(C=INVERSE_L2, max_iter=200, tol=1e-3).fit(columns[known], train.labels_NT[known, 1])
    probs_NT = logistic_regression(spec_of(), train, scored)
    assert probs_NT[:, 1].tolist() == alone.predict_proba(wanted)[:, 1].tolist()
    whole = logistic_regression(spec_of(), rows_of(ids, labels), scored)
    assert probs_NT[:, 0].tolist() == whole[:, 0].tolist()
    assert probs_NT[:, 1].tolist() != whole[:, 1].tolist()


def test_rows_of_one_label_are_refused():
    with pytest.raises(UserError, match="--compare: all training rows have one label of ctr"):
        logistic_regression(spec_of(), *[rows_of([[2] * 6] * 9, [0] * 9)] * 2)


def test_numbers_are_standardised_alike_however_many_rows_there_are():
    """float32 sums of two million rows give 8.71 for the first mean."""
    rows = np.tile(np.array([[8.3, 1.0], [9.3, 1.0]], dtype=np.float32), (1 << 20, 1))
    mean, deviation = mean_and_deviation(rows)
    assert mean == pytest.approx([8.8, 1.0], abs=1e-5)
    assert deviation == pytest.approx([0.5, 0.0], abs=1e-5)
    assert mean.dtype == deviation.dtype == np.float32
