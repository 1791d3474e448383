"""Metrics against values worked out by hand, against pair counting and against scikit-learn."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.examples import depth
from usr_ray.evaluation import metrics as m
from usr_ray.evaluation.metrics import Predictions, compute_metrics, known_labels_only, metrics_by_scenario

pytestmark = pytest.mark.unit

# Few distinct probabilities, so that most rows are tied with others.
ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), st.integers(-2, 2)),
    min_size=1,
    max_size=40,
)


def columns(rows):
    return tuple(np.array(c) for c in zip(*rows, strict=True))


def auc_by_pairs(labels, probs):
    """The definition: count every (positive, negative) pair."""
    pairs = [
        (p, n) for p, y in zip(probs, labels, strict=True) if y for n, z in zip(probs, labels, strict=True) if not z
    ]
    if not pairs:
        return None
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def test_auc_of_a_worked_case():
    # Positives .8 .4, negatives .4 .2: wins .8>.4 .8>.2 .4>.2 and one tie = 3.5 of 4.
    assert m.auc(np.array([1, 1, 0, 0]), np.array([0.8, 0.4, 0.4, 0.2])) == 3.5 / 4


def test_auc_of_equal_probabilities_is_one_half():
    assert m.auc(np.array([1, 0, 0]), np.full(3, 0.3)) == 0.5


@pytest.mark.parametrize("labels", [[], [1], [0], [1, 1], [0, 0, 0]])
def test_auc_is_undefined_when_a_class_is_missing(labels):
    assert m.auc(np.array(labels), np.linspace(0, 1, len(labels))) is None


def test_gauc_weights_users_by_impressions_and_leaves_out_users_with_one_label():
    users = np.array([7, 7, 7, -3, -3, 5, 5])
    labels = np.array([1, 0, 0, 1, 0, 1, 1])
    probs = np.array([0.5, 0.4, 0.6, 0.1, 0.9, 0.2, 0.3])
    # User 7: one win of two pairs, 3 rows. User -3: no win, 2 rows. User 5 has clicks only.
    assert m.gauc(labels, probs, users) == pytest.approx((0.5 * 3 + 0.0 * 2) / 5)


def test_gauc_is_undefined_when_no_user_has_both_labels():
    assert m.gauc(np.array([1, 1, 0]), np.array([0.1, 0.2, 0.3]), np.array([1, 1, 2])) is None


def test_log_loss_and_pcoc_of_a_worked_case():
    labels, probs = np.array([1, 0]), np.array([0.25, 0.5])
    assert m.log_loss(labels, probs) == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert m.pcoc(labels, probs) == pytest.approx(0.75)


def test_log_loss_of_a_certain_mistake_is_finite():
    assert m.log_loss(np.array([1, 0]), np.array([0.0, 1.0])) == pytest.approx(52 * math.log(2), rel=1e-3)


def test_normalised_entropy_is_one_for_the_mean_label_and_undefined_for_one_class():
    labels = np.array([1, 0, 0, 0])
    assert m.normalised_entropy(labels, np.full(4, 0.25)) == pytest.approx(1.0)
    assert m.normalised_entropy(np.zeros(4), np.full(4, 0.25)) is None


def test_ndcg_of_a_worked_case_skips_requests_of_one_label():
    requests = np.array([1, 1, 1, 2, 2, 3, 4, 5, 5])
    labels = np.array([0, 1, 0, 1, 0, 0, 1, 1, 1])
    probs = np.array([0.9, 0.5, 0.1, 0.8, 0.3, 0.4, 0.2, 0.2, 0.1])
    # Request 1: the positive is second. Request 2: first. Request 3: nothing to find. Requests 4, of a row whose log
    # knows no request, and 5: nothing to get wrong.
    assert m.ndcg_at_k(labels[5:], probs[5:], requests[5:]) is None
    assert m.ndcg_at_k(labels, probs, requests) == pytest.approx((1 / math.log2(3) + 1) / 2)


def test_ndcg_at_one_sees_only_the_first_place():
    assert m.ndcg_at_k(np.array([0, 1]), np.array([0.9, 0.5]), np.array([4, 4]), k=1) == 0.0


def test_ndcg_of_a_tie_is_the_mean_over_its_orders():
    labels = np.array([1, 0, 0])
    by_order = [
        sum(y / math.log2(place + 2) for place, y in enumerate(order[:2])) for order in itertools.permutations(labels)
    ]
    assert m.ndcg_at_k(labels, np.full(3, 0.5), np.zeros(3), k=2) == pytest.approx(np.mean(by_order))


@depth(60)
@given(ROWS)
def test_auc_and_gauc_equal_pair_counting_with_ties(rows):
    labels, probs, users = columns(rows)
    assert m.auc(labels, probs) == auc_by_pairs(labels, probs)
    per_user = [(auc_by_pairs(labels[users == u], probs[users == u]), (users == u).sum()) for u in np.unique(users)]
    defined = [(a, n) for a, n in per_user if a is not None]
    expected = sum(a * n for a, n in defined) / sum(n for _, n in defined) if defined else None
    assert m.gauc(labels, probs, users) == (None if expected is None else pytest.approx(expected))


@depth(40)
@given(ROWS)
def test_metrics_equal_scikit_learn(rows):
    from sklearn import metrics as sk

    labels, probs, requests = columns(rows)
    if 0 < labels.sum() < len(labels):
        assert m.auc(labels, probs) == pytest.approx(sk.roc_auc_score(labels, probs))
    assert m.log_loss(labels, probs) == pytest.approx(sk.log_loss(labels, probs, labels=[0, 1]))
    groups = [requests == r for r in np.unique(requests)]
    both = [g for g in groups if 0 < labels[g].sum() < g.sum()]
    ndcgs = [sk.ndcg_score(labels[None, g], probs[None, g], k=3) for g in both]
    value = m.ndcg_at_k(labels, probs, requests, k=3)
    assert value == (pytest.approx(np.mean(ndcgs)) if ndcgs else None)


@depth(30)
@given(ROWS, st.randoms())
def test_metrics_do_not_depend_on_the_order_of_rows(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    first, second = (compute_metrics(*columns(r), columns(r)[2]) for r in (rows, shuffled))
    assert first == {k: v if v is None else pytest.approx(v, rel=1e-12) for k, v in second.items()}


def test_auc_stays_exact_on_many_rows():
    labels = np.zeros(400_000, dtype=np.float32)
    labels[::2] = 1
    probs = np.repeat(np.arange(200_000), 2) / 200_000  # every positive is tied with the negative beside it
    assert m.auc(labels, probs) == 0.5


def test_no_rows_give_no_metrics_and_valid_json():
    empty = compute_metrics(np.array([]), np.array([]), np.array([]), np.array([]))
    assert empty == {
        "auc": None,
        "gauc": None,
        "log_loss": None,
        "pcoc": None,
        "normalised_entropy": None,
        "ndcg_at_10": None,
        "num_samples": 0,
        "num_positives": 0,
    }
    assert json.loads(json.dumps(empty, allow_nan=False)) == empty


def predictions(*, with_global):
    #             click order click_g order_g
    labels = [[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    return Predictions(
        row_number_N=np.arange(4),
        scenario_N=np.array([0, 0, 1, 1]),
        labels_NT=np.array(labels, dtype=np.float32),
        probs_NT=np.array([[0.6, 0.1], [0.7, 0.2], [0.1, 0.05], [0.65, 0.3]]),
        global_probs_NT=np.array([[0.7, 0.1], [0.8, 0.2], [0.2, 0.1], [0.9, 0.4]]) if with_global else None,
        user_key_N=np.array([1, 1, 1, 2]),
        request_key_N=np.array([10, 10, 11, 12]),
        item_id_N=np.array([2, 3, 2, 1]),
        history_length_N=np.array([0, 1, 2, 3]),
    )


def test_cells_take_their_own_rows_labels_and_probabilities():
    cells = metrics_by_scenario(predictions(with_global=True), ("search", "recommendation"))
    assert list(cells) == ["search", "recommendation", "global", "all"]
    assert cells["search"]["ctr"]["auc"] == 0.0  # the clicked row has 0.6 < 0.7
    assert cells["search"]["ctcvr"]["auc"] is None  # no order in search
    assert cells["recommendation"]["ctr"]["auc"] == 1.0
    assert cells["recommendation"]["ctr"]["pcoc"] == pytest.approx(0.75)
    # Pooled: positives .6 .65, negatives .7 .1 -> two wins of four. Global clicks: .7 .8 .9 against .2.
    assert cells["all"]["ctr"]["auc"] == 0.5
    assert cells["global"]["ctr"]["auc"] == 1.0
    assert [cells[c]["ctr"]["num_positives"] for c in cells] == [1, 1, 3, 2]
    assert [cells[c]["ctcvr"]["num_samples"] for c in cells] == [2, 2, 4, 4]


def test_requests_of_two_scenarios_are_two_whatever_their_ids():
    rows = replace(predictions(with_global=True), request_key_N=np.array([7, 7, 7, 7]))
    cells = metrics_by_scenario(rows, ("search", "recommendation"))
    # Search has its click second (0.6 below 0.7), recommendation first (0.65 above 0.1); pooled as one list, the clicks
    # would be second and third.
    assert cells["search"]["ctr"]["ndcg_at_10"] == pytest.approx(1 / math.log2(3))
    assert cells["all"]["ctr"]["ndcg_at_10"] == pytest.approx((1 / math.log2(3) + 1) / 2)


def test_a_model_without_global_heads_has_counts_but_no_global_metrics():
    cell = metrics_by_scenario(predictions(with_global=False), ("search", "recommendation"))["global"]["ctr"]
    assert cell["num_samples"] == 4
    assert cell["num_positives"] == 3
    assert {value for key, value in cell.items() if not key.startswith("num_")} == {None}


def test_labels_that_no_log_knows_take_no_part_and_are_counted():
    rows = predictions(with_global=True)
    # Recommendation (rows 2 and 3) knows no orders; a forgotten 1 there shows that it is not read.
    labels = known_labels_only(rows.labels_NT, rows.scenario_N, ((True, True), (True, False)))
    assert np.isnan(labels).tolist() == [[False] * 4] * 2 + [[False, True, False, True]] * 2
    cells = metrics_by_scenario(replace(rows, labels_NT=labels), ("search", "recommendation"))
    unknown = cells["recommendation"]["ctcvr"]
    assert {value for key, value in unknown.items() if not key.startswith("num_")} == {None}
    assert (unknown["num_samples"], unknown["num_positives"], unknown["num_unknown"]) == (0, 0, 2)
    for cell in ("search", "global", "all"):  # search alone has orders: none of two rows
        assert (cells[cell]["ctcvr"]["num_samples"], cells[cell]["ctcvr"]["num_positives"]) == (2, 0)
    assert [cells[c]["ctcvr"]["num_unknown"] for c in cells] == [0, 2, 2, 2]
    assert cells["all"]["ctcvr"]["log_loss"] == pytest.approx(-(np.log(0.9) + np.log(0.8)) / 2)
    assert [cells[c]["ctr"]["num_samples"] for c in cells] == [2, 2, 4, 4]


def test_a_scenario_without_rows_is_there_with_zero_samples():
    cells = metrics_by_scenario(predictions(with_global=True), ("search", "recommendation", "live"))
    assert cells["live"]["ctr"]["num_samples"] == 0
    assert cells["live"]["ctr"]["log_loss"] is None
