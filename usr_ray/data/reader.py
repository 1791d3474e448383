"""The samples of one rank, step by step: row groups -> Arrow -> UsrBatch, decoded ahead of use in the background.

A block (order.py) is decoded by a few threads while the block before it is being used. Each decoded row group is
reduced at once to the rows of this rank; the block's rows are laid out in the order they are used, so that a step's
batch is a view of them. In memory at most: two blocks of this rank's rows, the events of one of them once more while
it is laid out, and the row groups being decoded.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from usr_ray.data import order as ordering
from usr_ray.data.assemble import BatchBuilder, take_rows
from usr_ray.data.batch import UsrBatch
from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.feed import compute_alone
from usr_ray.data.manifest import Manifest
from usr_ray.data.mature import WhichRows, usable_row_groups
from usr_ray.data.order import ShuffleQuality, epoch_quality

CLOSED = "the reader was closed while its batches were in use"
_BLOCKS_IN_MEMORY = 2
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading(WhichRows):
    """How a manifest is read. The global batches do not depend on rank, world_size and the fields below them."""

    global_batch_size: int
    """Rows of a step over all ranks."""
    group_size: int
    """Rows that stay together on a rank (model.contrastive.group_size)."""
    seed: int = 0
    order: str = "shuffled"
    """'shuffled', 'by_date' or 'file' (order.epoch_order)."""
    num_shards: int = 1
    """Spans of a block that are permuted separately, so that a rank decodes only its own (order.py); 1 permutes whole
    blocks, and every rank decodes every row group."""
    block_rows: int = ordering.BLOCK_ROWS
    """Rows of a block per shard, at least."""
    rank: int = 0
    world_size: int = 1
    num_threads: int = 2
    """Decoding threads."""
    max_bytes_in_flight: int = 1 << 30
    """Uncompressed bytes of the row groups being decoded at one time; one is decoded whatever its size."""
    cache_dir: Path | str | None = None
    """Folder that keeps decoded row groups for later epochs and runs (decode.RowGroupCache); None: none."""


class SampleReader:
    """Reads one rank's part of the global batches of a manifest.

    Raises:
        UserError: a batch that cannot be shared by these workers, or an unknown order.
        DataError: no row has weight.
    """

    def __init__(self, manifest: Manifest, reading: Reading) -> None:
        """Plan the reading; nothing but the manifest is touched."""
        self.manifest, self.reading = manifest, reading
        self.share = ordering.rank_share(
            global_batch_size=reading.global_batch_size,
            group_size=reading.group_size,
            rank=reading.rank,
            world_size=reading.world_size,
            num_shards=reading.num_shards,
        )
        self.refs = usable_row_groups(manifest, reading)
        """The row groups that are read, in file order."""
        self.decoder = RowGroupDecoder(manifest, reading, reading.cache_dir)
        self._executor: ThreadPoolExecutor | None = None
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self.epoch_order(0)  # refuses an unknown order now, not in the first step
        self.fingerprint = self._fingerprint()

    fingerprint: str
    """SHA-256 of all that fixes the global batches: a cursor (fingerprint, epoch, step) names the same rows."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch over all ranks: those of row groups that may hold a row with weight."""
        return sum(ref.row_group.num_rows for ref in self.refs)

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, the same on every rank; the last one is padded."""
        return ordering.num_steps(self.num_rows, self.share.global_batch_size)

    @property
    def batch_size(self) -> int:
        """Rows of this rank's batches, padding included."""
        return self.share.num_rows

    def epoch_order(self, epoch: int) -> ordering.EpochOrder:
        """Blocks of an epoch, over the row groups that are read."""
        rows, days = self._rows_and_days()
        r = self.reading
        return ordering.epoch_order(
            rows, days, epoch=epoch, kind=r.order, seed=r.seed, block_rows=r.block_rows, num_shards=r.num_shards
        )

    def _rows_and_days(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        dates = np.array([self.manifest.files[ref.file].date for ref in self.refs], dtype="datetime64[D]")
        return np.array([ref.row_group.num_rows for ref in self.refs]), dates.astype(np.int64)

    def shuffle_quality(self) -> ShuffleQuality:
        """How well the order of the first epoch mixes the rows that are read, and their dates; reads nothing."""
        (rows, days), batch = self._rows_and_days(), self.share.global_batch_size
        return epoch_quality(self.epoch_order(0), rows.cumsum() - rows, days, global_batch_size=batch)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[UsrBatch]:
        """Batches of this rank in an epoch from `start_step` on; starting late costs no more than starting at 0.

        The tensors are views of larger blocks on the CPU: do not write into them. Closing the iterator, or the
        reader, ends its threads.

        Raises:
            DataError: a file cannot be read or breaks the contract; raised by the step that needs it or earlier.
        """
        if not 0 <= start_step <= self.num_steps:
            raise ValueError(f"start_step {start_step} is not in 0..{self.num_steps}")
        if self._executor is None:
            self._executor = ThreadPoolExecutor(
                self.reading.num_threads, thread_name_prefix="usr-ray-decode", initializer=compute_alone
            )
        stream = _Stream(self, self._executor, epoch, start_step)
        self._streams.add(stream)
        return stream.batches()

    def close(self) -> None:
        """End all threads; iterators still in use stop with an error."""
        for stream in list(self._streams):
            stream.close()
        if self._executor:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fingerprint(self) -> str:
        spec, r = self.manifest.spec, self.reading
        order = {"kind": r.order, "seed": r.seed, "block_rows": r.block_rows, "num_shards": r.num_shards}
        rows: list[object] = [r.global_batch_size, r.group_size, r.ready_before_us, r.mature_only]
        # Before 30 November 2026 the other scenarios' rows were computed too, and their ids decayed.
        rows += [[r.only_scenario, "own rows"]] if r.only_scenario else []
        rows += [{"order_wait_us": r.order_wait_us}] if r.order_wait_us else []
        fixed = [self.manifest.sha256, spec.label_delay_us, spec.label_day_span, order, *rows]
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which rows of a block a rank takes, and from where."""

    block: int
    places: NDArray[np.int64]
    """step * rows + position in the batch, for every row that the rank takes, ascending."""
    groups: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]
    """As order.block_rows_by_group gives them."""


@dataclass(frozen=True, slots=True)
class _Block:
    """The rows that a rank takes from a block."""

    index: int
    places: NDArray[np.int64]
    """See _Plan, for every row of `rows`."""
    rows: UsrBatch


class _Stream:
    """One pass over an epoch: a thread that builds blocks ahead, and the batches cut from them."""

    def __init__(self, reader: SampleReader, executor: ThreadPoolExecutor, epoch: int, start_step: int) -> None:
        self._reader, self._share = reader, reader.share
        self._executor = executor
        self._order = reader.epoch_order(epoch)
        self._start_step = start_step
        self._num_extra = 0
        self._free = threading.Semaphore(_BLOCKS_IN_MEMORY)
        self._ready: queue.SimpleQueue[Future[Callable[[], _Block]] | BaseException] = queue.SimpleQueue()
        self._in_flight: list[int] = []
        """Bytes of each row group being decoded."""
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._produce, name="usr-ray-reader", daemon=True)

    def batches(self) -> Iterator[UsrBatch]:
        """The batches; a generator, so that leaving it early ends the thread."""
        self._thread.start()
        held: deque[_Block] = deque()
        newest = ordering.first_block(self._order, self._start_step, self._share) - 1
        rows = self._reader.batch_size
        try:
            for step in range(self._start_step, self._reader.num_steps):
                last = min(ordering.last_block(self._order, step, self._share), self._order.num_blocks - 1)
                while newest < last:
                    # A block that ends before this step makes room before the next one is waited for.
                    self._drop(held, step * rows)
                    if len(held) >= _BLOCKS_IN_MEMORY:  # a batch larger than a block: days of few rows, in date order
                        self._num_extra += 1
                        self._free.release()
                    held.append(self._next_block())
                    newest = held[-1].index
                batch = self._cut(held, step * rows, (step + 1) * rows)
                yield replace(batch, first_group=self._share.first // self._reader.reading.group_size)
                self._drop(held, (step + 1) * rows)
        finally:
            self.close()

    def close(self) -> None:
        """Decode no further row group; end the thread and wait for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _produce(self) -> None:
        first = ordering.first_block(self._order, self._start_step, self._share)
        if first >= self._order.num_blocks:  # the end of the epoch
            return
        try:
            planned = self._plan(first)
            for block in range(first, self._order.num_blocks):
                while not self._free.acquire(timeout=_POLL_S):
                    if self._is_closed:
                        break
                if self._is_closed:
                    raise RuntimeError(CLOSED)
                plan = planned.result()
                if block + 1 < self._order.num_blocks:  # made while this one is decoded
                    planned = self._plan(block + 1)
                self._ready.put(self._build(plan))
        except BaseException as error:  # it belongs to the thread that uses the batches
            self._ready.put(error)

    def _plan(self, block: int) -> Future[_Plan]:
        return self._executor.submit(self._plan_now, block)

    def _plan_now(self, block: int) -> _Plan:
        """What the rank takes from a block for the steps from the first one on; reads nothing."""
        places, rows = ordering.block_share(self._order, block, self._share, self._start_step)
        return _Plan(block, places, ordering.block_rows_by_group(self._order, block, rows))

    def _build(self, plan: _Plan) -> Future[Callable[[], _Block]]:
        """Have a block's row groups decoded, and the rank's rows laid out in the order in which they are used.

        Waits until threads are free to begin the last of the row groups, not until it is decoded: the next block may
        be begun meanwhile, so that no thread idles at the end of a block.

        Returns:
            Done when all is decoded; its result waits for the rows. It may hold instead:
            DataError: see RowGroupDecoder.decode.
            RuntimeError: the reader was closed.
        """
        builder = BatchBuilder(self._reader.manifest.spec, len(plan.places))
        built: Future[Callable[[], _Block]] = Future()
        # A row group is decoded by one thread, unless there are threads to spare.
        use_threads = len(plan.groups) < self._reader.reading.num_threads
        left = len(plan.groups)

        def decode(group: int, inside: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
            if self._is_closed:
                raise RuntimeError(CLOSED)
            decoded = self._reader.decoder.decode(self._reader.refs[group], use_threads=use_threads)
            # Only this rank's rows are kept, so that W workers on one machine hold a block once, not W times.
            builder.add(decoded if len(inside) == len(decoded) else take_rows(decoded, inside), targets)

        def finish() -> None:
            try:
                rows = builder.start(self._executor.submit)
                built.set_result(lambda: _Block(plan.block, plan.places, rows()))
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
            num_bytes = self._reader.refs[group].row_group.num_bytes
            self._make_room(num_bytes)
            future = self._executor.submit(decode, group, inside, targets)
            future.add_done_callback(partial(count, num_bytes=num_bytes))
        if not plan.groups:
            finish()
        return built

    def _make_room(self, num_bytes: int) -> None:
        """Wait until one more row group may be decoded: there is memory, and a thread will be free soon.

        Not more than one row group waits for a thread, or a block that is decoded would be laid out after all of them.
        """

        def is_room() -> bool:
            is_small = sum(self._in_flight) + num_bytes <= self._reader.reading.max_bytes_in_flight
            return (
                self._is_closed
                or not self._in_flight
                or (is_small and len(self._in_flight) <= self._reader.reading.num_threads)
            )

        with self._changed:
            self._changed.wait_for(is_room)
            if self._is_closed:
                raise RuntimeError(CLOSED)
            self._in_flight.append(num_bytes)

    def _next_block(self) -> _Block:
        block = self._ready.get()
        if isinstance(block, BaseException):
            raise block
        try:
            return block.result()()
        except CancelledError as error:
            raise RuntimeError(CLOSED) from error

    def _drop(self, held: deque[_Block], place: int) -> None:
        while held and (not len(held[0].places) or held[0].places[-1] < place):
            held.popleft()
            if self._num_extra:
                self._num_extra -= 1
            else:
                self._free.release()

    def _cut(self, held: deque[_Block], first: int, last: int) -> UsrBatch:
        """The batch of places first..last - 1: a view of one block, or the rows of several put together."""
        pieces = []
        for block in held:
            start, stop = (int(n) for n in np.searchsorted(block.places, [first, last]))
            if stop - start == last - first:
                return block.rows.slice_rows(start, stop)
            if start < stop:
                pieces.append((block.rows.slice_rows(start, stop), block.places[start:stop] - first))
        builder = BatchBuilder(self._reader.manifest.spec, last - first)
        for rows, places in pieces:
            builder.add(rows, places)
        return builder.finish()
