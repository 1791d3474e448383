"""One block of the global order -> this rank's rows of it, in the order in which they are used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from usr_ray import order as ordering
from usr_ray.batch import UsrBatch
from usr_ray.batch_builder import BatchBuilder, take_rows
from usr_ray.manifest import RowGroupRef
from usr_ray.reader_decode import RowGroupDecoder
from usr_ray.schema import FeatureSpec

MAX_BYTES_IN_FLIGHT = 1 << 30
"""Uncompressed bytes of the row groups being decoded at one time; one row group is decoded whatever its size."""
CLOSED = "the reader was closed while its batches were in use"


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rows of a block a rank takes, and from where."""

    block: int
    places: NDArray[np.int64]
    """step * rows + position in the batch, for every row that the rank takes, ascending."""
    groups: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]
    """Of ordering.block_rows_by_group."""


@dataclass(frozen=True, slots=True)
class Block:
    """The rows that a rank takes from a block."""

    index: int
    places: NDArray[np.int64]
    """See Plan, for every row of `rows`."""
    rows: UsrBatch


class BlockReader:
    """Plans and builds the blocks of one rank.

    Args:
        spec: of the table.
        refs: the row groups that the order counts.
        decoder: of the table.
        share: of the rank.
        num_threads: of the executor that `build` is given.
        max_bytes_in_flight: bound on what is decoded at one time.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        refs: Sequence[RowGroupRef],
        decoder: RowGroupDecoder,
        share: ordering.RankShare,
        *,
        num_threads: int,
        max_bytes_in_flight: int,
    ) -> None:
        self._spec, self._refs, self._decoder, self._share = spec, refs, decoder, share
        self._num_threads = num_threads
        self._max_bytes_in_flight = max_bytes_in_flight

    def plan(self, order: ordering.EpochOrder, block: int, start_step: int) -> Plan:
        """What the rank takes from a block for the steps from `start_step` on; reads nothing."""
        places, rows = ordering.block_share(order, block, self._share, start_step)
        return Plan(block, places, ordering.block_rows_by_group(order, block, rows))

    def build(self, plan: Plan, executor: ThreadPoolExecutor, stop: threading.Event) -> Callable[[], Block]:
        """Decode a block's row groups and have the rank's rows laid out in the order in which they are used.

        Returns:
            What waits for the rows. The next block may be begun before, so that no thread idles meanwhile.

        Raises:
            DataError: see RowGroupDecoder.decode.
            RuntimeError: `stop` was set.
        """
        builder = BatchBuilder(self._spec, len(plan.places))
        # A row group is decoded by one thread, unless there are threads to spare.
        use_threads = len(plan.groups) < self._num_threads
        running: deque[tuple[Future[None], int]] = deque()
        num_bytes = 0

        def decode(group: int, inside: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
            if stop.is_set():
                raise RuntimeError(CLOSED)
            decoded = self._decoder.decode(self._refs[group], use_threads=use_threads)
            # Only this rank's rows are kept, so that W workers on one machine hold a block once, not W times.
            builder.add(decoded if len(inside) == len(decoded) else take_rows(decoded, inside), targets)

        try:
            for group, inside, targets in plan.groups:
                size = self._refs[group].row_group.num_bytes
                while running and num_bytes + size > self._max_bytes_in_flight:
                    future, finished_bytes = running.popleft()
                    future.result()
                    num_bytes -= finished_bytes
                running.append((executor.submit(decode, group, inside, targets), size))
                num_bytes += size
            while running:
                running.popleft()[0].result()
        finally:
            for future, _ in running:
                future.cancel()
        rows = builder.start(executor.submit)
        return lambda: Block(plan.block, plan.places, rows())
