"""One block of the global order -> this rank's rows of it, in the order in which they are used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from usr_ray.data import order as ordering
from usr_ray.data.assemble import BatchBuilder, take_rows
from usr_ray.data.batch import UsrBatch
from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.manifest import RowGroupRef
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
    """Plans and builds the blocks of one rank, for one pass over an epoch.

    Args:
        spec: of the table.
        refs: the row groups that the order counts.
        decoder: of the table.
        share: of the rank.
        executor: whose threads decode.
        num_threads: of the executor.
        max_bytes_in_flight: bound on what is decoded at one time.
    """

    is_closed: bool
    """`close` was called."""

    def __init__(
        self,
        spec: FeatureSpec,
        refs: Sequence[RowGroupRef],
        decoder: RowGroupDecoder,
        share: ordering.RankShare,
        *,
        executor: ThreadPoolExecutor,
        num_threads: int,
        max_bytes_in_flight: int,
    ) -> None:
        self._spec, self._refs, self._decoder, self._share = spec, refs, decoder, share
        self._executor, self._num_threads = executor, num_threads
        self._max_bytes_in_flight = max_bytes_in_flight
        self._in_flight: list[int] = []
        self._changed = threading.Condition()
        self.is_closed = False

    def plan(self, order: ordering.EpochOrder, block: int, start_step: int) -> Plan:
        """What the rank takes from a block for the steps from `start_step` on; reads nothing."""
        places, rows = ordering.block_share(order, block, self._share, start_step)
        return Plan(block, places, ordering.block_rows_by_group(order, block, rows))

    def build(self, plan: Plan) -> Future[Callable[[], Block]]:
        """Have a block's row groups decoded, and the rank's rows laid out in the order in which they are used.

        Waits until threads are free to begin the last of the row groups, not until it is decoded: the next block may
        be begun meanwhile, so that no thread idles at the end of a block.

        Returns:
            What ends when all is decoded; the result waits for the rows. It may hold instead:
            DataError: see RowGroupDecoder.decode.
            RuntimeError: the reader was closed.
        """
        builder = BatchBuilder(self._spec, len(plan.places))
        built: Future[Callable[[], Block]] = Future()
        # A row group is decoded by one thread, unless there are threads to spare.
        use_threads = len(plan.groups) < self._num_threads
        left = len(plan.groups)

        def decode(group: int, inside: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
            if self.is_closed:
                raise RuntimeError(CLOSED)
            decoded = self._decoder.decode(self._refs[group], use_threads=use_threads)
            # Only this rank's rows are kept, so that W workers on one machine hold a block once, not W times.
            builder.add(decoded if len(inside) == len(decoded) else take_rows(decoded, inside), targets)

        def finish() -> None:
            try:
                rows = builder.start(self._executor.submit)
                built.set_result(lambda: Block(plan.block, plan.places, rows()))
            except Exception as error:  # it belongs to the thread that uses the batches
                built.set_exception(error)

        def count(future: Future[None], num_bytes: int) -> None:
            nonlocal left
            error = RuntimeError(CLOSED) if future.cancelled() else future.exception()
            with self._changed:
                self._in_flight.remove(num_bytes)
                self._changed.notify()
                left -= 1
                is_last = left == 0
                if error and not built.done():
                    built.set_exception(error)
            if is_last and not built.done():
                finish()

        for group, inside, targets in plan.groups:
            num_bytes = self._refs[group].row_group.num_bytes
            self._make_room(num_bytes)
            future = self._executor.submit(decode, group, inside, targets)
            future.add_done_callback(partial(count, num_bytes=num_bytes))
        if not plan.groups:
            finish()
        return built

    def close(self) -> None:
        """Decode no row group that is not begun yet."""
        with self._changed:
            self.is_closed = True
            self._changed.notify()

    def _make_room(self, num_bytes: int) -> None:
        """Wait until one row group more may be decoded: there is memory, and a thread will take it up soon.

        Not more than one row group waits for a thread, or a block that is decoded would be laid out after all of them.
        """

        def is_room() -> bool:
            is_small = sum(self._in_flight) + num_bytes <= self._max_bytes_in_flight
            return self.is_closed or not self._in_flight or (is_small and len(self._in_flight) <= self._num_threads)

        with self._changed:
            self._changed.wait_for(is_room)
            if self.is_closed:
                raise RuntimeError(CLOSED)
            self._in_flight.append(num_bytes)
