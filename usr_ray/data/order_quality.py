"""How well an order mixes: a few numbers, relative to a full shuffle. Pure functions on integers.

Shape letters: N rows, G row groups, K blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from usr_ray.data.order import EpochOrder, RankShare, block_share

_Ints = NDArray[np.int64]
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
        order: of the epoch.
        first_rows_G: number in the table of each row group's first row, row groups as `epoch_order` was given them.
        values_G: a number for each row group, such as its date.
        global_batch_size: rows of a step.
        max_rows: bound on the work.
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


def _quality(rows: _Ints, values: NDArray[np.float64], places: _Ints, blocks: _Ints, total: int) -> ShuffleQuality:
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
