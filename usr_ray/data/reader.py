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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from usr_ray.data import order as ordering
from usr_ray.data.assemble import BatchBuilder
from usr_ray.data.batch import UsrBatch
from usr_ray.data.blocks import CLOSED, MAX_BYTES_IN_FLIGHT, Block, BlockReader, Plan
from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.manifest import Manifest, usable_row_groups
from usr_ray.data.order_quality import ShuffleQuality, epoch_quality
from usr_ray.data.process import compute_alone

_BLOCKS_IN_MEMORY = 2
_POLL_S = 0.1


class SampleReader:
    """Reads one rank's part of the global batches of a manifest."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        global_batch_size: int,
        group_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        order: str = "shuffled",
        ready_before_us: int | None = None,
        mature_only: bool = True,
        num_threads: int = 2,
        num_shards: int = 1,
        block_rows: int = ordering.BLOCK_ROWS,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
        cache_dir: Path | str | None = None,
    ) -> None:
        """Plan the reading; nothing but the manifest is touched.

        Args:
            manifest: what to read.
            global_batch_size: rows of a step over all ranks.
            group_size: rows that stay together on a rank (model.contrastive.group_size).
            rank: of this worker.
            world_size: number of workers. The global batches do not depend on it.
            seed: of the order.
            order: 'shuffled', 'by_date' or 'file' (order.epoch_order).
            ready_before_us: rows whose labels close later (manifest.labels_close_us) get weight 0, and row groups
                that hold only such rows are not read; None: no such limit.
            mature_only: likewise for rows with is_mature false.
            num_threads: decoding threads.
            num_shards: spans of a block that are permuted apart, so that a rank decodes only its own (order.py); 1
                permutes whole blocks, and every rank decodes every row group.
            block_rows: rows of a block per shard, at least.
            max_bytes_in_flight: bound on what is decoded at one time.
            cache_dir: folder that keeps decoded row groups for later epochs and runs (cache.py); None: none.

        Raises:
            UserError: a batch that cannot be shared by these workers, or an unknown order.
            DataError: no row can count.
        """
        self._share = ordering.rank_share(
            global_batch_size=global_batch_size,
            group_size=group_size,
            rank=rank,
            world_size=world_size,
            num_shards=num_shards,
        )
        self._manifest = manifest
        self._refs = usable_row_groups(manifest, ready_before_us=ready_before_us, mature_only=mature_only)
        self._decoder = RowGroupDecoder(
            manifest, ready_before_us=ready_before_us, mature_only=mature_only, cache_dir=cache_dir
        )
        self._order: dict[str, Any] = {"kind": order, "seed": seed, "block_rows": block_rows, "num_shards": num_shards}
        self._num_threads = num_threads
        self._max_bytes_in_flight = max_bytes_in_flight
        self._executor: ThreadPoolExecutor | None = None
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self.epoch_order(0)  # refuses an unknown order now, not in the first step
        self.fingerprint = self._fingerprint(global_batch_size, group_size, ready_before_us, mature_only)

    fingerprint: str
    """SHA-256 of all that fixes the global batches: a cursor (fingerprint, epoch, step) names the same rows."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch over all ranks: those of row groups that may hold a row that counts."""
        return sum(ref.row_group.num_rows for ref in self._refs)

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, the same on every rank; the last one is padded."""
        return ordering.num_steps(self.num_rows, self._share.global_batch_size)

    @property
    def batch_size(self) -> int:
        """Rows of this rank's batches, padding included."""
        return self._share.num_rows

    def epoch_order(self, epoch: int) -> ordering.EpochOrder:
        """Blocks of an epoch, over the row groups that are read."""
        rows, days = self._rows_and_days()
        return ordering.epoch_order(rows, days, epoch=epoch, **self._order)

    def _rows_and_days(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        dates = np.array([self._manifest.files[ref.file].date for ref in self._refs], dtype="datetime64[D]")
        return np.array([ref.row_group.num_rows for ref in self._refs]), dates.astype(np.int64)

    def shuffle_quality(self, epoch: int = 0) -> ShuffleQuality:
        """How well the order of an epoch mixes the rows that are read, and their dates; reads nothing."""
        (rows, days), batch = self._rows_and_days(), self._share.global_batch_size
        return epoch_quality(self.epoch_order(epoch), rows.cumsum() - rows, days, global_batch_size=batch)

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
                self._num_threads, thread_name_prefix="usr-ray-decode", initializer=compute_alone
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

    def _fingerprint(self, *values: object) -> str:
        spec = self._manifest.spec
        fixed = [self._manifest.sha256, spec.label_delay_us, spec.label_day_span, self._order, *values]
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


class _Stream:
    """One pass over an epoch: a thread that builds blocks ahead, and the batches cut from them."""

    def __init__(self, reader: SampleReader, executor: ThreadPoolExecutor, epoch: int, start_step: int) -> None:
        self._reader = reader
        self._executor = executor
        self._blocks = BlockReader(
            reader._manifest.spec,
            reader._refs,
            reader._decoder,
            reader._share,
            executor=executor,
            num_threads=reader._num_threads,
            max_bytes_in_flight=reader._max_bytes_in_flight,
        )
        self._order = reader.epoch_order(epoch)
        self._start_step = start_step
        self._num_extra = 0
        self._free = threading.Semaphore(_BLOCKS_IN_MEMORY)
        self._ready: queue.SimpleQueue[Future[Callable[[], Block]] | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._produce, name="usr-ray-reader", daemon=True)

    def batches(self) -> Iterator[UsrBatch]:
        """The batches; a generator, so that leaving it early ends the thread."""
        self._thread.start()
        held: deque[Block] = deque()
        newest = ordering.first_block(self._order, self._start_step, self._reader._share) - 1
        rows = self._reader.batch_size
        try:
            for step in range(self._start_step, self._reader.num_steps):
                last = min(ordering.last_block(self._order, step, self._reader._share), self._order.num_blocks - 1)
                while newest < last:
                    # A block that ends before this step makes room before the next one is waited for.
                    self._drop(held, step * rows)
                    if len(held) >= _BLOCKS_IN_MEMORY:  # a batch larger than a block: days of few rows, in date order
                        self._num_extra += 1
                        self._free.release()
                    held.append(self._next_block())
                    newest = held[-1].index
                yield self._cut(held, step * rows, (step + 1) * rows)
                self._drop(held, (step + 1) * rows)
        finally:
            self.close()

    def close(self) -> None:
        """End the thread and wait for it."""
        self._blocks.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _produce(self) -> None:
        first = ordering.first_block(self._order, self._start_step, self._reader._share)
        if first >= self._order.num_blocks:  # the end of the epoch
            return
        try:
            planned = self._plan(first)
            for block in range(first, self._order.num_blocks):
                while not self._free.acquire(timeout=_POLL_S):
                    if self._blocks.is_closed:
                        break
                if self._blocks.is_closed:
                    raise RuntimeError(CLOSED)
                plan = planned.result()
                if block + 1 < self._order.num_blocks:  # made while this one is decoded
                    planned = self._plan(block + 1)
                self._ready.put(self._blocks.build(plan))
        except BaseException as error:  # it belongs to the thread that uses the batches
            self._ready.put(error)

    def _plan(self, block: int) -> Future[Plan]:
        return self._executor.submit(self._blocks.plan, self._order, block, self._start_step)

    def _next_block(self) -> Block:
        block = self._ready.get()
        if isinstance(block, BaseException):
            raise block
        try:
            return block.result()()
        except CancelledError as error:
            raise RuntimeError(CLOSED) from error

    def _drop(self, held: deque[Block], place: int) -> None:
        while held and (not len(held[0].places) or held[0].places[-1] < place):
            held.popleft()
            if self._num_extra:
                self._num_extra -= 1
            else:
                self._free.release()

    def _cut(self, held: deque[Block], first: int, last: int) -> UsrBatch:
        """The batch of places first..last - 1: a view of one block, or the rows of several put together."""
        pieces = []
        for block in held:
            start, stop = (int(n) for n in np.searchsorted(block.places, [first, last]))
            if stop - start == last - first:
                return block.rows.slice_rows(start, stop)
            if start < stop:
                pieces.append((block.rows.slice_rows(start, stop), block.places[start:stop] - first))
        builder = BatchBuilder(self._reader._manifest.spec, last - first)
        for rows, places in pieces:
            builder.add(rows, places)
        return builder.finish()
