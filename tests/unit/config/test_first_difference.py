"""Is this the same run? One rule for runs, checkpoints, studies, searches and tables."""

from __future__ import annotations

import pytest

from usr_ray.config import first_difference

pytestmark = pytest.mark.unit

SAVED = {"model": {"d": 8, "towers": [1, 2]}, "train": {"seed": 0, "seed_of_views": 1}, "ray": {"num_workers": 1}}


def changed(section: str, **values: object) -> dict[str, dict[str, object]]:
    return SAVED | {section: SAVED[section] | values}


def test_the_first_key_that_differs_is_named_with_both_values() -> None:
    assert first_difference(SAVED, SAVED) is None
    assert first_difference(SAVED, changed("model", towers=[1, 3])) == ("model.towers", [1, 2], [1, 3])


def test_a_key_of_one_side_alone_is_a_difference() -> None:
    assert first_difference(SAVED, changed("train", order="by_date")) == ("train.order", None, "by_date")
    assert first_difference(changed("train", order="by_date"), SAVED) == ("train.order", "by_date", None)


def test_only_keys_that_count_are_compared() -> None:
    now = changed("ray", num_workers=2)
    assert first_difference(SAVED, now, but=["ray"]) is None
    assert first_difference(SAVED, now, ["model", "train"]) is None
    assert first_difference(SAVED, now, ["model", "ray.num_workers"]) == ("ray.num_workers", 1, 2)


def test_a_key_is_no_prefix_of_another_name() -> None:
    now = changed("train", seed_of_views=2)
    assert first_difference(SAVED, now, ["train.seed"]) is None
    assert first_difference(SAVED, now, but=["train.seed"]) == ("train.seed_of_views", 1, 2)
