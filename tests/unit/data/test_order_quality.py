"""The numbers that say how well an order mixes, by hand and against a walk through the rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from usr_ray.data.order import (
    RankShare,
    ShuffleQuality,
    block_share,
    epoch_order,
    epoch_quality,
    order_text,
    shuffle_quality,
)

pytestmark = pytest.mark.unit


def test_four_rows_by_hand() -> None:
    # N / 3 = 4/3. File order: neighbours 1 apart; dates 0 0 1 1 against places 0 1 2 3: 2 / sqrt(1 * 5).
    ordered = shuffle_quality([0, 1, 2, 3], [0, 0, 1, 1])
    assert dataclasses.astuple(ordered) == pytest.approx((0, 3 / 4, 0.25 / 1, 2 / 5**0.5))
    # Order 2 0 3 1: rows moved by 2 1 1 2, neighbours 2 3 2 apart; rows against places: -.75 + .75 + .75 - .75.
    mixed = shuffle_quality([2, 0, 3, 1])
    assert mixed.displacement == pytest.approx(1.5 / (4 / 3))
    assert mixed.neighbour_distance == pytest.approx(7 / 3 / (4 / 3))
    assert mixed.correlation == 0
    # Centred rows .5 -1.5 1.5 -.5: products of neighbours -.75 -2.25 -.75, variance 5.
    assert mixed.autocorrelation == pytest.approx(-3.75 / 5)


def test_file_order_and_a_full_shuffle_are_told_apart() -> None:
    rows = np.arange(10_000)
    file_order = shuffle_quality(rows)
    assert (file_order.displacement, file_order.correlation) == (0, pytest.approx(1))
    assert file_order.autocorrelation > 0.99
    assert file_order.neighbour_distance < 0.001
    uniform = shuffle_quality(np.random.default_rng(0).permutation(10_000))
    assert dataclasses.astuple(uniform) == pytest.approx((1, 1, 0, 0), abs=0.03)
    constant = shuffle_quality(rows, np.zeros(10_000))
    assert (constant.autocorrelation, constant.correlation) == (0, 0)


def walked(kind: str, rows_G: list[int], days_G: list[int], batch: int, num_shards: int) -> tuple[list[int], list[int]]:
    """(row number, date) of every row of an epoch in the order of its places, one row at a time."""
    order = epoch_order(rows_G, days_G, kind=kind, seed=1, epoch=0, block_rows=60, num_shards=num_shards)
    first_rows = np.cumsum(rows_G) - rows_G
    found = []
    for block in range(order.num_blocks):
        places, rows = block_share(order, block, RankShare(batch, 0, batch))
        groups = order.groups_G[order.block_groups[block] : order.block_groups[block + 1]]
        numbers = [(first_rows[g] + row, days_G[g]) for g in groups for row in range(rows_G[g])]
        found += [(place, *numbers[row]) for place, row in zip(places, rows, strict=True)]
    return [int(n) for _, n, _ in sorted(found)], [day for _, _, day in sorted(found)]


@pytest.mark.parametrize("kind", ["shuffled", "by_date", "file"])
def test_the_quality_of_an_epoch_is_that_of_its_rows(kind: str) -> None:
    rows_G, days_G = [40, 25, 31, 40, 40, 7, 40], [1, 1, 1, 2, 2, 2, 4]
    numbers, days = walked(kind, rows_G, days_G, 16, 1)
    dates_in_file_order = np.repeat(days_G, rows_G)
    expected = shuffle_quality(numbers, dates_in_file_order)
    assert [int(day) for day in dates_in_file_order[numbers]] == days
    order = epoch_order(rows_G, days_G, kind=kind, seed=1, epoch=0, block_rows=60)
    found = epoch_quality(order, np.cumsum(rows_G) - rows_G, days_G, global_batch_size=16)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected))
    if kind == "by_date":
        assert found.correlation > 0.8


def test_a_large_epoch_is_measured_on_some_of_its_blocks() -> None:
    rows_G, days_G = [1000] * 200, [n // 20 for n in range(200)]
    order = epoch_order(rows_G, days_G, kind="shuffled", seed=0, epoch=0, block_rows=10_000)
    whole, part = (
        epoch_quality(order, np.arange(200) * 1000, days_G, global_batch_size=500, max_rows=max_rows)
        for max_rows in (1 << 22, 50_000)
    )
    assert whole != part
    assert isinstance(part, ShuffleQuality)
    assert dataclasses.astuple(part) == pytest.approx(dataclasses.astuple(whole), abs=0.25)


def test_the_words_for_a_run_and_its_report() -> None:
    shuffle = {"order": "by_date", "displacement": 0.4, "neighbour_distance": 0.254, "autocorrelation": 0.9}
    assert order_text({**shuffle, "correlation": 0.874}) == (
        "by_date: neighbours 25% as far apart as in a full shuffle, correlation of position and date +0.87"
    )
