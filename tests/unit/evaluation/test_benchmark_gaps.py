"""What benchmarks/learning_runs.py compares: the same rows, whatever order their files have."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from usr_ray.evaluation.metrics import Predictions, auc
from usr_ray.evaluation.statistics import paired_auc_gap

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))

from learning_runs import Runs, gaps

pytestmark = pytest.mark.unit


def drawn(num_rows: int = 60) -> Runs:
    """Rows of twelve users whose probabilities hold their labels in part."""
    generator = np.random.default_rng(0)
    numbers_N = np.arange(num_rows)
    labels_NT = (generator.random((num_rows, 4)) < 0.4).astype(np.float32)
    rows = Predictions(
        row_number_N=numbers_N,
        scenario_N=numbers_N % 2,
        labels_NT=labels_NT,
        probs_NT=np.zeros((num_rows, 2)),
        global_probs_NT=None,
        user_key_N=numbers_N % 12,
        request_key_N=numbers_N // 2,
        item_id_N=numbers_N % 7,
        history_length_N=numbers_N % 5,
    )
    return Runs(rows, (labels_NT[:, :2] + generator.random((2, num_rows, 2))) / 2)


def test_rows_in_another_order_are_the_same_rows() -> None:
    runs = drawn()
    order_N = np.random.default_rng(1).permutation(len(runs.rows))
    moved = Runs(runs.rows.take(order_N), runs.probs_RNT[:, order_N])
    assert gaps(runs, moved, ("a", "b"))["ctr"]["all"] == {"gap": 0.0, "interval": [0.0, 0.0], "by_seed": [0.0, 0.0]}


@pytest.mark.parametrize("column", ["labels_NT", "request_key_N"])
def test_other_rows_are_refused(column: str) -> None:
    runs = drawn()
    others = replace(runs, rows=replace(runs.rows, **{column: 1 - getattr(runs.rows, column)}))
    with pytest.raises(SystemExit, match="held-out rows differ in"):
        gaps(runs, others, ("a", "b"))
    fewer = Runs(runs.rows.take(np.arange(9)), runs.probs_RNT[:, :9])
    with pytest.raises(SystemExit, match="60 held-out rows beside 9"):
        gaps(runs, fewer, ("a", "b"))


def test_a_model_of_one_run_stands_beside_each_seed_with_the_interval_of_studies() -> None:
    runs = drawn()
    once = Runs(runs.rows, runs.probs_RNT[:1])
    found = gaps(runs, once, ("a", "b"))["ctr"]["all"]
    labels_N, probs_RN = runs.rows.labels_NT[:, 0], runs.probs_RNT[:, :, 0]
    own = paired_auc_gap(labels_N, probs_RN, probs_RN[[0, 0]], runs.rows.user_key_N)
    assert own is not None
    areas = [auc(labels_N, probs_N) or 0.0 for probs_N in probs_RN]
    assert found["by_seed"] == [0.0, pytest.approx(areas[1] - areas[0], abs=1e-5)]
    assert found["interval"] == pytest.approx([own.low, own.high], abs=1e-5)
