"""The global sample order, and how well it mixes: pure functions on integers, no I/O, no torch.

One epoch's order is a function of (row groups, kind, seed, epoch, global_batch_size, num_shards) alone. Row groups
are put in order, cut into blocks, and the rows of a block are permuted. The global batch of a step is a fixed slice
of that order and a rank takes a fixed part of the slice, so 1, 2, 3 or 4 workers see the same global batches, take the
same number of steps, and any step is found without walking through the steps before it.

Shards. With num_shards = L > 1 a block's rows are split into L contiguous spans and each span is permuted by itself;
a global batch takes global_batch_size / L rows from every span. A rank then decodes only the row groups under its own
spans, instead of every row group of the block. L is part of the order and does not depend on the number of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from usr_ray.config import UserError

BLOCK_ROWS = 1 << 18
"""Smallest block (per shard), so that rows move far although a Parquet file is read a row group at a time."""
ORDERS = ("shuffled", "by_date", "file")

IntArray = NDArray[np.int64]
_BLOCK_BITS = 24
"""Blocks of one date: 2^24 of 2^18 rows or more."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA'14): a bijection on 64 bits that scatters counters."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(*parts: int) -> int:
    """A 64-bit key of a few integers; other integers, or the same in another order, give an unrelated key."""
    key = 0
    for part in parts:
        key = int(mix64(np.array([(key + _GOLDEN + part) & _MASK], dtype=np.uint64))[0])
    return key


def permutation(count: int, key: int) -> IntArray:
    """A permutation of range(count) fixed by `key`, the same under every version of numpy.

    Rows are sorted by splitmix64 of a counter. splitmix64 is a bijection, so no two keys are equal and every sorting
    algorithm gives the same result.
    """
    keys = np.arange(1, count + 1, dtype=np.uint64)
    keys *= np.uint64(_GOLDEN)
    keys += np.uint64(key)
    return np.argsort(mix64(keys)).astype(np.int64, copy=False)


def num_steps(num_rows: int, global_batch_size: int) -> int:
    """Steps of an epoch; the last one is padded, so no row is dropped."""
    return -(-num_rows // global_batch_size)


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """Blocks of one epoch. G groups, K blocks, L shards."""

    groups_G: IntArray
    """Row groups in this epoch's order (positions in the list the order was made of)."""
    group_rows_G: IntArray
    """Rows of each of groups_G."""
    block_groups: IntArray
    """K + 1: block k holds groups_G[block_groups[k]:block_groups[k + 1]]."""
    block_starts: IntArray
    """K + 1: rows before each block, and at the end the rows of the epoch."""
    block_ids: IntArray
    """K: what names a block in the key of its permutation: its number, or under 'by_date' (date, number inside it)."""
    num_shards: int
    key: int
    is_shuffled: bool

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.block_groups) - 1

    @property
    def num_rows(self) -> int:
        """Rows of the epoch, padding not counted."""
        return int(self.block_starts[-1])


def epoch_order(
    group_rows_G: ArrayLike,
    group_days_G: ArrayLike,
    *,
    kind: str,
    seed: int,
    epoch: int,
    block_rows: int = BLOCK_ROWS,
    num_shards: int = 1,
) -> EpochOrder:
    """The order of one epoch; UserError for an unknown kind.

    Args:
        group_rows_G: rows of each row group, in manifest order.
        group_days_G: any integer that grows with the row group's date.
        kind: 'shuffled': row groups permuted over all dates; 'by_date': dates ascending, row groups permuted inside
            each, no block spans two dates, and a date's order is the same whatever other dates there are; 'file':
            manifest order, nothing permuted.
        epoch: 0 and up; 'file' is the same in every epoch.
        block_rows: a block ends with the row group that reaches block_rows * num_shards; what is left of a date (or of
            the epoch) below that joins the block before it.
    """
    rows, days = np.asarray(group_rows_G, dtype=np.int64), np.asarray(group_days_G, dtype=np.int64)
    if kind not in ORDERS:
        raise UserError(f"order {kind!r} is not known; choose from: {', '.join(ORDERS)}")
    key = stream_key(seed, epoch)
    groups = np.arange(len(rows)) if kind == "file" else permutation(len(rows), stream_key(key, -1))
    segments = np.array([0, len(rows)])
    if kind == "by_date":
        groups = np.argsort(days, kind="stable")
        segments = np.concatenate([[0], np.flatnonzero(np.diff(days[groups])) + 1, [len(rows)]])
        for first, last in itertools.pairwise(segments):
            day = int(days[groups[first]])
            groups[first:last] = groups[first:last][permutation(int(last - first), stream_key(key, -1, day))]
    ordered_rows = rows[groups]
    starts = np.concatenate([[0], np.cumsum(ordered_rows)])
    cuts, ids = [0], []
    for first, last in itertools.pairwise(segments):
        ends = _cut_blocks(starts, int(first), int(last), min_rows=block_rows * num_shards)
        day = int(days[groups[first]]) if kind == "by_date" else 0
        ids += [(day << _BLOCK_BITS) + number for number in range(len(ends))]
        cuts += ends
    block_groups, block_ids = np.array(cuts, dtype=np.int64), np.array(ids, dtype=np.int64)
    return EpochOrder(
        groups, ordered_rows, block_groups, starts[block_groups], block_ids, num_shards, key, kind != "file"
    )


def _cut_blocks(starts: IntArray, first: int, last: int, *, min_rows: int) -> list[int]:
    """Ends of the blocks of groups first..last - 1, each of at least min_rows rows if there are as many."""
    ends: list[int] = []
    position = first
    while position < last:
        position = int(np.searchsorted(starts[: last + 1], starts[position] + min_rows))
        if position > last:  # too few rows are left: they join the block before
            if ends:
                ends.pop()
            position = last
        ends.append(position)
    return ends


@dataclass(frozen=True, slots=True)
class RankShare:
    """The part of each global batch that one rank takes: whole groups of `group_size` rows, W-independent borders."""

    global_batch_size: int
    first: int
    """First position in the global batch that is this rank's."""
    last: int
    """One behind the last."""

    @property
    def num_rows(self) -> int:
        """Rows of this rank's batch, the same in every step."""
        return self.last - self.first


def rank_share(
    *, global_batch_size: int, group_size: int, rank: int, world_size: int, num_shards: int = 1
) -> RankShare:
    """Rank r of W takes groups [r n // W, (r + 1) n // W) of the n = global_batch_size / group_size of a step.

    Raises:
        UserError: the batch is no multiple of group_size or of num_shards, there are more workers than groups, or
            the rank is outside 0..world_size - 1.
    """
    if group_size <= 0 or global_batch_size <= 0 or global_batch_size % group_size:
        raise UserError(
            f"train.global_batch_size ({global_batch_size}) must be a positive multiple of "
            f"model.contrastive.group_size ({group_size})"
        )
    num_groups = global_batch_size // group_size
    if world_size > num_groups:
        raise UserError(
            f"{world_size} workers cannot share a global batch of {num_groups} groups (train.global_batch_size "
            f"{global_batch_size} / model.contrastive.group_size {group_size}): raise train.global_batch_size to at "
            f"least {world_size * group_size} or lower ray.num_workers to at most {num_groups}"
        )
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not in 0..{world_size - 1}")
    if num_shards <= 0 or global_batch_size % num_shards:
        raise UserError(
            f"train.reader_shards ({num_shards}) must be positive and divide train.global_batch_size "
            f"({global_batch_size})"
        )
    first, last = (r * num_groups // world_size * group_size for r in (rank, rank + 1))
    return RankShare(global_batch_size, first, last)


def first_block(order: EpochOrder, step: int, share: RankShare) -> int:
    """The first block that holds a row of `step` or later."""
    shard_batch = share.global_batch_size // order.num_shards
    longest_shard = (order.block_starts[1:] + order.num_shards - 1) // order.num_shards
    return int(np.searchsorted(longest_shard, step * shard_batch, side="right"))


def last_block(order: EpochOrder, step: int, share: RankShare) -> int:
    """The last block that holds a row of `step`."""
    shard_batch = share.global_batch_size // order.num_shards
    shortest_shard = order.block_starts[:-1] // order.num_shards
    return int(np.searchsorted(shortest_shard, (step + 1) * shard_batch)) - 1


def block_share(order: EpochOrder, block: int, share: RankShare, start_step: int = 0) -> tuple[IntArray, IntArray]:
    """What a rank takes from a block, in the order it uses it.

    Returns:
        places: step * share.num_rows + position in the rank's batch, ascending, for steps >= start_step.
        rows: for each place the row of the block (0 is the first row of the block's first row group).
    """
    # The rows before a block are dealt out so that shard s holds (rows + s) // L of them: the shards' lengths differ
    # by at most one, their sum is exact (Hermite's identity), and each start is known without the blocks before.
    shards = np.arange(order.num_shards)
    starts = (order.block_starts[block] + shards) // order.num_shards
    ends = (order.block_starts[block + 1] + shards) // order.num_shards
    span_starts = np.cumsum(ends - starts) - (ends - starts)
    batch = share.global_batch_size // order.num_shards
    places, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for shard in range(share.first // batch, -(-share.last // batch)):
        count = int(ends[shard] - starts[shard])
        position = np.arange(starts[shard], ends[shard])
        step, slot = np.divmod(position, batch)
        slot += shard * batch - share.first
        mine = (slot >= 0) & (slot < share.num_rows) & (step >= start_step)
        block_id = int(order.block_ids[block])
        row = permutation(count, stream_key(order.key, block_id, shard)) if order.is_shuffled else np.arange(count)
        places.append((step * share.num_rows + slot)[mine])
        rows.append(row[mine] + span_starts[shard])
    place, row = np.concatenate(places), np.concatenate(rows)
    if len(places) > 2:  # several shards: interleave them by step
        by_place = np.argsort(place)
        return place[by_place], row[by_place]
    return place, row


def block_rows_by_group(order: EpochOrder, block: int, rows: IntArray) -> list[tuple[int, IntArray, IntArray]]:
    """Which row groups hold `rows` of a block: (row group, rows inside it ascending, their positions in `rows`)."""
    first, last = (int(g) for g in order.block_groups[block : block + 2])
    ends = np.cumsum(order.group_rows_G[first:last])
    # No row comes twice, so they are sorted by where they stand: one pass, a tenth of the time of argsort.
    place_of_row = np.full(int(ends[-1]) if len(ends) else 0, -1, dtype=np.int64)
    place_of_row[rows] = np.arange(len(rows))
    sorted_rows = np.flatnonzero(place_of_row >= 0)
    by_row = place_of_row[sorted_rows]
    found: list[tuple[int, IntArray, IntArray]] = []
    cuts = np.searchsorted(sorted_rows, np.concatenate([[0], ends]))
    for n, (a, b) in enumerate(itertools.pairwise(cuts)):
        if a < b:
            inside = sorted_rows[a:b] - (ends[n] - order.group_rows_G[first + n])
            found.append((int(order.groups_G[first + n]), inside, by_row[a:b]))
    return found


MAX_ROWS = 1 << 22
"""Rows of an epoch that are measured, at most; of a larger one, blocks at even distances."""


@dataclass(frozen=True, slots=True)
class ShuffleQuality:
    """How well an order mixes. A full shuffle has displacement and neighbour_distance 1 and both correlations 0."""

    displacement: float
    """Mean |position - row| over N / 3, its expectation for a uniform permutation. File order: 0."""
    neighbour_distance: float
    """Mean distance in the table of consecutive rows, over N / 3. File order: 3 / N."""
    autocorrelation: float
    """Correlation of a value (by default the row's number) with that of the next row. File order: near 1."""
    correlation: float
    """Correlation of that value with the position in the order. File order: 1."""


def shuffle_quality(rows_N: ArrayLike, values_N: ArrayLike | None = None) -> ShuffleQuality:
    """Measure an order.

    Args:
        rows_N: row numbers 0..N - 1 in the order they are read.
        values_N: a number for each row, in file order; None: the row's own. A constant one has correlations 0.
    """
    rows = np.asarray(rows_N, dtype=np.int64)
    values = rows if values_N is None else np.asarray(values_N)[rows]
    return _quality(rows, values.astype(np.float64), np.arange(len(rows)), np.zeros(len(rows), np.int64), len(rows))


def epoch_quality(
    order: EpochOrder, first_rows_G: ArrayLike, values_G: ArrayLike, *, global_batch_size: int, max_rows: int = MAX_ROWS
) -> ShuffleQuality:
    """Measure the order of an epoch as all ranks together read it.

    Args:
        first_rows_G: row_number of each row group's first row, row groups as `epoch_order` was given them.
        values_G: a number for each row group, such as its date.
    """
    first_rows, values = np.asarray(first_rows_G, dtype=np.int64), np.asarray(values_G, dtype=np.float64)
    step = max(1, -(-order.num_rows // max_rows))
    share = RankShare(global_batch_size, 0, global_batch_size)
    parts: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]] = []
    for block in range(0, order.num_blocks, step):
        places, rows = block_share(order, block, share)
        first, last = (int(g) for g in order.block_groups[block : block + 2])
        starts = np.cumsum(order.group_rows_G[first:last]) - order.group_rows_G[first:last]
        inside = np.searchsorted(starts, rows, side="right") - 1
        groups = order.groups_G[first:last][inside]
        parts.append((first_rows[groups] + rows - starts[inside], values[groups], places, np.full(len(rows), block)))
    if not parts:
        return ShuffleQuality(0.0, 0.0, 0.0, 0.0)
    table_rows, table_values, places, blocks = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _quality(table_rows, table_values, places, blocks, order.num_rows)


def order_text(shuffle: Mapping[str, Any]) -> str:
    """`shuffle` of a run's config.json in words: the order's kind and how well it mixes, relative to a full shuffle."""
    return (
        f"{shuffle['order']}: neighbours {shuffle['neighbour_distance']:.0%} as far apart as in a full shuffle, "
        f"correlation of position and date {shuffle['correlation']:+.2f}"
    )


def _quality(
    rows: IntArray, values: NDArray[np.float64], places: IntArray, blocks: IntArray, total: int
) -> ShuffleQuality:
    """Rows in the order they are read; neighbours count where both belong to one of the measured `blocks`."""
    follows = np.flatnonzero((np.diff(blocks) == 0) | (np.diff(places) == 1))
    distance = np.abs(np.diff(rows))[follows].mean() if len(follows) else 0.0
    centred = values - values.mean()
    variance = float(centred @ centred)
    offset = places - places.mean()
    spread = float(np.sqrt(variance * float(offset @ offset)))
    return ShuffleQuality(
        displacement=float(np.abs(rows - places).mean() / (total / 3)),
        neighbour_distance=float(distance / (total / 3)),
        autocorrelation=float(centred[follows] @ centred[follows + 1]) / variance if variance > 0 else 0.0,
        correlation=float(centred @ offset) / spread if spread > 0 else 0.0,
    )
