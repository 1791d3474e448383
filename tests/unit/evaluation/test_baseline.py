"""The popularity baseline against rates worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from usr_ray.evaluation.baseline import TrainingRows, popularity_baseline
from usr_ray.evaluation.metrics import Predictions

pytestmark = pytest.mark.unit


def rows_to_score(scenario, users, items):
    n = len(scenario)
    return Predictions(
        row_number_N=np.arange(n),
        scenario_N=np.array(scenario),
        labels_NT=np.zeros((n, 4), dtype=np.float32),
        probs_NT=np.zeros((n, 2)),
        global_probs_NT=None,
        user_key_N=np.array(users),
        request_key_N=np.arange(n),
        item_id_N=np.array(items),
        history_length_N=np.zeros(n, dtype=np.int64),
    )


TRAIN = TrainingRows(
    scenario_N=np.array([0, 0, 0, 1]),
    user_key_N=np.array([-5, -5, 9, 9]),
    item_id_N=np.array([2, 3, 2, 2]),
    labels_NT=np.array([[1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=np.float32),
)


def logit(p):
    return math.log(p / (1 - p))


def test_score_adds_the_log_odds_of_user_and_item_of_the_rows_scenario():
    scored = popularity_baseline(TRAIN, rows_to_score([0], [-5], [2]), num_scenarios=2)
    rate = 2.5 / 4  # two clicks of three rows in scenario 0, and one half of each
    user, item = (1 + 20 * rate) / 22, (2 + 20 * rate) / 22
    assert logit(scored.probs_NT[0, 0]) == pytest.approx(logit(user) + logit(item) - logit(rate))
    global_rate = 3.5 / 5
    user, item = (2 + 20 * global_rate) / 22, (2 + 20 * global_rate) / 23
    assert logit(scored.global_probs_NT[0, 0]) == pytest.approx(logit(user) + logit(item) - logit(global_rate))


def test_unknown_user_and_item_get_the_mean_rate():
    scored = popularity_baseline(TRAIN, rows_to_score([0, 1], [123, 123], [77, 77]), num_scenarios=2)
    assert scored.probs_NT[:, 0] == pytest.approx([2.5 / 4, 0.5 / 2])


def test_scenario_without_training_rows_gets_one_half():
    scored = popularity_baseline(TRAIN, rows_to_score([2], [9], [2]), num_scenarios=3)
    assert scored.probs_NT.tolist() == [[0.5, 0.5]]
