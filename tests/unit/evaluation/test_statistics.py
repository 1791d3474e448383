"""The AUC gap with its interval, by hand and against the bootstrap; Holm's correction by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from usr_ray.evaluation.baseline import paired_auc_gap as bootstrap_gap
from usr_ray.evaluation.statistics import holm, paired_auc_gap

pytestmark = pytest.mark.unit


def test_the_gap_of_two_seeds_by_hand() -> None:
    # Users a, b, c, d with a row each; positives are the rows of a and b.
    labels = np.array([1, 1, 0, 0])
    users = np.array([1, 2, 3, 4])
    perfect, half, worst = [0.9, 0.8, 0.2, 0.1], [0.9, 0.1, 0.5, 0.5], [0.1, 0.2, 0.8, 0.9]
    gap = paired_auc_gap(labels, np.array([perfect, perfect]), np.array([half, worst]), users)
    assert gap is not None
    assert gap.by_seed == (0.5, 1.0)  # AUC 1 - 1/2 (one positive above both, one below both), 1 - 0
    assert gap.value == 0.75
    assert gap.seed_sd == pytest.approx(math.sqrt(0.125))
    # Influence: `perfect` and `worst` place every row alike, so 0. `half`: positives at 1 and 0, AUC 1/2, so +1/4 and
    # -1/4; negatives both at 1/2, so 0. Mean over the seeds of (ours - theirs): a -1/8, b +1/8.
    assert gap.user_se == pytest.approx(math.sqrt(4 / 3 * (1 / 64 + 1 / 64)))
    variance = 1 / 24 + 0.125 / 2
    freedom = variance**2 / ((1 / 24) ** 2 / 3 + 0.0625**2 / 1)
    assert freedom == pytest.approx(2.4196, abs=1e-3)
    # Student's 97.5 % point lies between those of 2 and 3 degrees: 4.303 and 3.182.
    assert 3.182 * math.sqrt(variance) < gap.high - gap.value < 4.303 * math.sqrt(variance)
    assert gap.high - gap.value == pytest.approx(gap.value - gap.low)
    assert (gap.num_users, gap.num_rarer) == (4, 2)


def test_the_users_part_agrees_with_a_bootstrap_over_users() -> None:
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(300), 8)
    taste = rng.normal(size=300)[users]  # rows of a user go together
    labels = (rng.random(2400) < 1 / (1 + np.exp(1 - taste))).astype(float)
    ours, theirs = taste + rng.normal(size=2400), taste + 2 * rng.normal(size=2400)
    gap = paired_auc_gap(labels, ours[None], theirs[None], users)
    assert gap is not None
    value, low, high = bootstrap_gap(labels, ours, theirs, users, num_resamples=800) or (0.0, 0.0, 0.0)
    assert gap.value == pytest.approx(value)
    assert gap.seed_sd == 0.0
    assert gap.high - gap.low == pytest.approx(high - low, rel=0.12)


def test_rows_of_one_user_do_not_count_as_many_users() -> None:
    rng = np.random.default_rng(0)
    labels, ours, theirs = (rng.random(100) < 0.3).astype(float), rng.random(100), rng.random(100)
    apart = paired_auc_gap(labels, ours[None], theirs[None], np.arange(100))
    # The same rows ten times over, for the same hundred users: nothing new was seen.
    repeated = [np.tile(x, 10) for x in (labels, ours, theirs)]
    again = paired_auc_gap(repeated[0], repeated[1][None], repeated[2][None], np.tile(np.arange(100), 10))
    assert apart is not None
    assert again is not None
    assert (again.low, again.high, again.p_value) == pytest.approx((apart.low, apart.high, apart.p_value))


def test_a_model_against_itself_has_no_gap_and_a_missing_label_none() -> None:
    labels, probs = np.array([1.0, 0.0, 1.0]), np.array([[0.2, 0.4, 0.9]])
    gap = paired_auc_gap(labels, probs, probs, np.array([1, 2, 3]))
    assert gap is not None
    assert (gap.value, gap.low, gap.high, gap.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert paired_auc_gap(np.ones(3), probs, probs, np.array([1, 2, 3])) is None
    assert paired_auc_gap(np.zeros(0), np.zeros((1, 0)), np.zeros((1, 0)), np.zeros(0)) is None


def test_holm_by_hand() -> None:
    # Sorted: 0.01 x 4, 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.8 x 1.
    assert holm([0.03, 0.01, 0.8, 0.02]) == pytest.approx([0.06, 0.04, 0.8, 0.06])
    # Never below an earlier one, never above 1.
    assert holm([0.01, 0.011]) == pytest.approx([0.02, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
