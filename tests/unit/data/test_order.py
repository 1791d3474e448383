"""The global sample order, against plain Python and by brute force over every step, rank and shard."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.examples import depth
from usr_ray.config import UserError
from usr_ray.data.order import (
    EpochOrder,
    block_rows_by_group,
    block_share,
    epoch_order,
    first_block,
    last_block,
    num_steps,
    permutation,
    rank_share,
    shuffle_quality,
    stream_key,
)

pytestmark = pytest.mark.unit

MASK = (1 << 64) - 1
GROUP_ROWS = [7, 12, 1, 30, 9, 9, 25, 3, 18, 11]
GROUP_DAYS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]


def splitmix64(state: int) -> int:
    """One output of splitmix64 in plain integers, from the published algorithm."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def walk(order: EpochOrder, *, world_size: int, global_batch_size: int, group_size: int, start_step: int = 0):
    """Every rank's rows as [step][rank] -> list of (row group, row), None for padding; the order's slow reading."""
    steps = num_steps(order.num_rows, global_batch_size)
    found = []
    for rank in range(world_size):
        share = rank_share(
            global_batch_size=global_batch_size,
            group_size=group_size,
            rank=rank,
            world_size=world_size,
            num_shards=order.num_shards,
        )
        stream: list[tuple[int, int] | None] = [None] * (steps * share.num_rows)
        for block in range(order.num_blocks):
            places, rows = block_share(order, block, share, start_step)
            assert (np.diff(places) > 0).all()
            for group, inside, positions in block_rows_by_group(order, block, rows):
                for row, position in zip(inside.tolist(), positions.tolist(), strict=True):
                    assert stream[places[position]] is None
                    stream[places[position]] = (group, row)
                    step = places[position] // share.num_rows
                    assert first_block(order, step, share) <= block <= last_block(order, step, share)
        found.append([stream[s * share.num_rows : (s + 1) * share.num_rows] for s in range(steps)])
    return [[found[rank][step] for rank in range(world_size)] for step in range(steps)]


def all_rows(group_rows: list[int]) -> list[tuple[int, int]]:
    return [(group, row) for group, count in enumerate(group_rows) for row in range(count)]


def test_permutation_sorts_rows_by_splitmix64_of_a_counter() -> None:
    golden = 0x9E3779B97F4A7C15
    for count, key in ((1, 0), (2, 5), (100, 123456789), (1000, MASK)):
        # Row n gets output n of the generator that starts in state `key`.
        keys = [splitmix64((key + n * golden) & MASK) for n in range(count)]
        assert permutation(count, key).tolist() == sorted(range(count), key=lambda n: keys[n])


def test_permutation_never_changes_between_versions() -> None:
    # Written down once: an order that changed would make every old cursor point to other rows.
    assert permutation(8, stream_key(0, 0)).tolist() == [0, 7, 2, 5, 4, 6, 3, 1]


def test_keys_of_other_numbers_or_another_order_differ() -> None:
    keys = {stream_key(*parts) for parts in [(0,), (0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (1 << 63, 0), (0, 0, 0)]}
    assert len(keys) == 8


@depth(30)
@given(
    group_rows=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    kind=st.sampled_from(["shuffled", "by_date", "file"]),
    num_groups=st.integers(4, 6),
    group_size=st.integers(1, 5),
    num_shards=st.integers(1, 4),
    block_rows=st.integers(1, 60),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_and_workers_share_the_global_batches(
    group_rows: list[int], kind: str, num_groups: int, group_size: int, num_shards: int, block_rows: int, epoch: int
) -> None:
    global_batch_size = num_groups * group_size * num_shards
    days = [n // 3 for n in range(len(group_rows))]
    order = epoch_order(group_rows, days, kind=kind, seed=3, epoch=epoch, block_rows=block_rows, num_shards=num_shards)
    sizes = {"global_batch_size": global_batch_size, "group_size": group_size}
    reference = [list(itertools.chain(*ranks)) for ranks in walk(order, world_size=1, **sizes)]
    seen = [row for batch in reference for row in batch if row is not None]
    assert sorted(seen) == all_rows(group_rows)
    assert all(None not in batch for batch in reference[:-1]), "only the last step is padded"
    for world_size in (2, 3, 4):
        steps = walk(order, world_size=world_size, **sizes)
        assert [list(itertools.chain(*ranks)) for ranks in steps] == reference


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("kind", ["shuffled", "by_date", "file"])
def test_starting_late_gives_exactly_the_rest(kind: str, num_shards: int) -> None:
    order = epoch_order(GROUP_ROWS, GROUP_DAYS, kind=kind, seed=0, epoch=1, block_rows=20, num_shards=num_shards)
    whole = walk(order, world_size=2, global_batch_size=16, group_size=4)
    for start in range(len(whole) + 1):
        late = walk(order, world_size=2, global_batch_size=16, group_size=4, start_step=start)
        assert late[start:] == whole[start:]
        assert all(row is None for ranks in late[:start] for rows in ranks for row in rows)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def rows(seed: int, epoch: int) -> list[object]:
        order = epoch_order(GROUP_ROWS, GROUP_DAYS, kind="shuffled", seed=seed, epoch=epoch, block_rows=50)
        return walk(order, world_size=1, global_batch_size=8, group_size=4)

    assert rows(0, 0) == rows(0, 0)
    different = [rows(0, 0), rows(0, 1), rows(1, 0), rows(1, 1)]
    assert all(a != b for a, b in itertools.combinations(different, 2))


def test_by_date_reads_the_dates_in_order_and_shuffles_inside_each() -> None:
    order = epoch_order(GROUP_ROWS, GROUP_DAYS, kind="by_date", seed=0, epoch=0, block_rows=1000)
    steps = walk(order, world_size=1, global_batch_size=8, group_size=4)
    seen = [row for ranks in steps for rows in ranks for row in rows if row is not None]
    days = [GROUP_DAYS[group] for group, _ in seen]
    assert days == sorted(days)
    for day in range(4):
        rows = [row for row in seen if GROUP_DAYS[row[0]] == day]
        assert len(rows) < 12 or rows != sorted(rows)


def test_file_order_is_the_order_of_the_rows_in_every_epoch() -> None:
    for epoch in (0, 5):
        order = epoch_order(GROUP_ROWS, GROUP_DAYS, kind="file", seed=9, epoch=epoch, block_rows=13)
        steps = walk(order, world_size=1, global_batch_size=8, group_size=4)
        assert [r for ranks in steps for rows in ranks for r in rows if r is not None] == all_rows(GROUP_ROWS)


def test_blocks_reach_their_size_and_hold_whole_row_groups() -> None:
    rng = random.Random(0)
    rows = [rng.randrange(1, 50) for _ in range(200)]
    for kind in ("shuffled", "by_date", "file"):
        order = epoch_order(rows, [n // 50 for n in range(200)], kind=kind, seed=0, epoch=0, block_rows=100)
        sizes = np.diff(order.block_starts)
        # At least block_rows; less than two blocks and a row group, since a small rest joins the block before.
        assert (sizes >= 100).all()
        assert (sizes < 2 * 100 + 50).all()
        assert order.num_rows == sum(rows)
        assert sorted(order.groups_G.tolist()) == list(range(200))


def test_a_table_smaller_than_a_block_is_one_block() -> None:
    order = epoch_order([3, 4], [0, 1], kind="shuffled", seed=0, epoch=0)
    assert order.num_blocks == 1
    assert order.num_rows == 7


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (1, [(0, 20)]),
        (2, [(0, 8), (8, 20)]),
        (3, [(0, 4), (4, 12), (12, 20)]),
        (5, [(4 * r, 4 * r + 4) for r in range(5)]),
    ],
)
def test_ranks_take_whole_groups(world_size: int, expected: list[tuple[int, int]]) -> None:
    # 5 groups of 4 rows; rank r takes groups [5 r // W, 5 (r + 1) // W).
    shares = [rank_share(global_batch_size=20, group_size=4, rank=r, world_size=world_size) for r in range(world_size)]
    assert [(share.first, share.last) for share in shares] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 6}, r"6 workers .* 5 groups .*to at least 24 or lower ray.num_workers to at most 5"),
        ({"group_size": 3}, r"train.global_batch_size \(20\) must be a positive multiple of .*group_size \(3\)"),
        ({"num_shards": 3}, r"train.reader_shards \(3\) must be positive and divide train.global_batch_size \(20\)"),
        ({"rank": 2, "world_size": 2}, r"rank 2 is not in 0..1"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rank_share(**{"global_batch_size": 20, "group_size": 4, "rank": 0, "world_size": 1, **arguments})


def test_an_unknown_order_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="order 'random' is not known; choose from: shuffled, by_date, file"):
        epoch_order([1], [0], kind="random", seed=0, epoch=0)


def test_with_shards_a_rank_reads_only_its_own_row_groups() -> None:
    def groups_read(num_shards: int) -> int:
        order = epoch_order(
            [64] * 16, [0] * 16, kind="shuffled", seed=0, epoch=0, block_rows=512 // num_shards, num_shards=num_shards
        )
        share = rank_share(global_batch_size=64, group_size=8, rank=1, world_size=4, num_shards=num_shards)
        return sum(
            len(block_rows_by_group(order, block, block_share(order, block, share)[1]))
            for block in range(order.num_blocks)
        )

    assert groups_read(1) == 16
    assert groups_read(4) == 4


def test_by_date_the_order_of_a_date_does_not_depend_on_the_others() -> None:
    def rows_of(days: list[int], wanted: int) -> list[tuple[int, int]]:
        """(row group of the wanted day, row) in the order they are read."""
        order = epoch_order([64] * len(days), days, kind="by_date", seed=3, epoch=1, block_rows=128)
        steps = walk(order, world_size=1, global_batch_size=64, group_size=64)
        first = days.index(wanted)
        return [(g - first, row) for ranks in steps for batch in ranks for g, row in batch if days[g] == wanted]

    alone = rows_of([7] * 5, 7)
    assert len(alone) == 5 * 64
    assert rows_of([5, 5, 6, *[7] * 5, 9], 7) == alone
    assert rows_of([6] * 5, 6) != alone


@pytest.mark.integration
def test_block_shuffle_mixes_nearly_as_well_as_a_uniform_one() -> None:
    # 64 row groups, eight to a block: the file is sorted by user, so labels of neighbours are alike.
    labels = (np.sin(np.arange(64 * 256) / 500) > 0).astype(float)
    assert shuffle_quality(np.arange(64 * 256), labels).autocorrelation > 0.95
    found = []
    for epoch in range(4):
        order = epoch_order([256] * 64, [0] * 64, kind="shuffled", seed=0, epoch=epoch, block_rows=2048)
        steps = walk(order, world_size=1, global_batch_size=2048, group_size=64)
        rows = [group * 256 + row for ranks in steps for batch in ranks for group, row in batch]
        found.append(shuffle_quality(rows, labels))
    assert np.mean([quality.displacement for quality in found]) == pytest.approx(1, abs=0.1)
    # What is left is between blocks: each is a sample of 8 row groups of 64.
    assert abs(np.mean([quality.autocorrelation for quality in found])) < 0.15


def test_finding_a_late_step_of_a_large_epoch_takes_no_walk() -> None:
    order = epoch_order([131_072] * 20_000, [0] * 20_000, kind="shuffled", seed=0, epoch=0)
    share = rank_share(global_batch_size=65_536, group_size=128, rank=3, world_size=8)
    start = time.perf_counter()
    block = first_block(order, 30_000, share)
    # Block k holds rows [k * 2^18, (k + 1) * 2^18): step 30 000 starts at row 30 000 * 65 536.
    assert block == 30_000 * 65_536 // (1 << 18)
    assert time.perf_counter() - start < 1
