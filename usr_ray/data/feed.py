"""Batches ahead of the steps that use them: made in a thread, and for a GPU copied there on their own stream.

    source (a thread)  ->  pinned buffer of the ring  ->  one copy on the copy stream  ->  queue of `depth`  ->  step

All tensors of a batch are laid side by side in one page-locked buffer, so a batch is one copy, which needs no thread
and does not occupy the step's stream. The step's stream waits for the copy's event, the host never does; a buffer is
refilled once the event of its last copy has occurred. On a CPU the same class is a plain prefetcher: nothing is copied.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from usr_ray.data.batch import map_tensors

_ALIGNMENT = 256
"""Bytes; the alignment of CUDA's allocator, enough for every vectorised load."""
_POLL_S = 0.1
_NUM_BUFFERS = 2
"""One is filled while the other is copied."""

Moved = TypeVar("Moved")
Kept = TypeVar("Kept")


class CudaCopies:
    """The copies to one GPU, on their own stream; tests have a stand-in without a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, num_bytes: int) -> Tensor:
        """A page-locked host buffer, uint8."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, buffer: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Begin a copy to the device, whose memory is of the copy stream's pool; the event occurs when it is done."""
        with torch.cuda.stream(self._stream):
            on_device = buffer.to(self._device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return on_device, event

    def hand_over(self, on_device: Tensor, event: torch.cuda.Event) -> None:
        """Have the caller's stream wait for the copy and keep the memory until that stream has used it."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        # The allocator would otherwise give the memory to the next copy as soon as the host drops the batch.
        on_device.record_stream(stream)


@dataclass(slots=True)
class _Buffer:
    bytes: Tensor
    copied: torch.cuda.Event | None = None


class PinnedRing:
    """Host buffers used in turn, each only after its last copy has ended."""

    def __init__(self, copies: CudaCopies, num_buffers: int = _NUM_BUFFERS) -> None:
        self._copies = copies
        self._buffers = [_Buffer(torch.empty(0, dtype=torch.uint8)) for _ in range(num_buffers)]
        self._next = 0

    def copy(self, value: Moved) -> tuple[Moved, Tensor, torch.cuda.Event]:
        """`value` with all its tensors on the device, the memory that holds them, and the event of the copy."""
        tensors: list[Tensor] = []
        map_tensors(value, tensors.append)
        starts, num_bytes = [], 0
        for tensor in tensors:
            starts.append(num_bytes)
            num_bytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if buffer.copied is not None:
            buffer.copied.synchronize()
        if buffer.bytes.shape[0] < num_bytes:
            buffer.bytes = self._copies.allocate(num_bytes + num_bytes // 4)  # batches differ by their histories
        for tensor, start in zip(tensors, starts, strict=True):
            _part(buffer.bytes, start, tensor).copy_(tensor)
        on_device, buffer.copied = self._copies.start(buffer.bytes[:num_bytes])
        parts = iter([_part(on_device, start, tensor) for tensor, start in zip(tensors, starts, strict=True)])
        return map_tensors(value, lambda _: next(parts)), on_device, buffer.copied


def _part(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes from `start` on as a tensor of the dtype and shape of `like`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


@dataclass(frozen=True, slots=True)
class _Item(Generic[Moved, Kept]):
    moved: Moved
    kept: Kept
    memory: Tensor | None = None
    copied: torch.cuda.Event | None = None


class _EndError(Exception):
    """The source is exhausted."""


class Feed(Generic[Moved, Kept]):
    """An iterator over `source` that is up to `depth` batches ahead. Use it as a context manager, or close it.

    Args:
        source: pairs of what goes to the device (dataclasses and tuples of tensors) and what stays as it is. It runs,
            and is closed, in the feed's thread.
        depth: most batches that wait for their step; one more is being made.
        copies: None: those of the device.

    Raises:
        Whatever the source raises, from `next`, after the batches before it.
    """

    def __init__(
        self,
        source: Iterator[tuple[Moved, Kept]],
        device: torch.device,
        *,
        depth: int = 2,
        copies: CudaCopies | None = None,
    ) -> None:
        self._source = source
        self._device = device
        self._copies = CudaCopies(device) if copies is None and device.type == "cuda" else copies
        self._ring = PinnedRing(self._copies) if self._copies is not None else None
        self._ready: queue.Queue[_Item[Moved, Kept] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="usr-ray-feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Moved, Kept]]:
        return self

    def __next__(self) -> tuple[Moved, Kept]:
        if self._failure is None:
            item = self._ready.get()
            if isinstance(item, _Item):
                if self._copies is not None and item.memory is not None and item.copied is not None:
                    self._copies.hand_over(item.memory, item.copied)
                return item.moved, item.kept
            self._failure = item
        if isinstance(self._failure, _EndError):
            raise StopIteration
        raise self._failure

    def close(self) -> None:
        """End the thread and drop what is ready; the feed is then exhausted."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._thread.join()
        self._failure = self._failure or _EndError()

    def __enter__(self) -> Feed[Moved, Kept]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        outcome: BaseException = _EndError()
        if self._device.type == "cpu":
            compute_alone()
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # each thread has its own
            for moved, kept in self._source:
                item = _Item(moved, kept) if self._ring is None else self._copied(self._ring, moved, kept)
                if not self._put(item):
                    break
        except BaseException as error:  # it belongs to the thread that uses the batches
            outcome = error
        finally:
            close = getattr(self._source, "close", None)  # a generator's, in the thread that it ran in
            if close is not None:
                close()
            self._put(outcome)

    @staticmethod
    def _copied(ring: PinnedRing, moved: Moved, kept: Kept) -> _Item[Moved, Kept]:
        on_device, memory, event = ring.copy(moved)
        return _Item(on_device, kept, memory, event)

    def _put(self, item: _Item[Moved, Kept] | BaseException) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=_POLL_S)
                return True
        return False


_lock = threading.Lock()


def compute_alone() -> None:
    """Run torch's operations of this thread on this thread alone; other threads keep their own number.

    For threads that work beside the training step. OpenMP keeps a team for each thread that ever runs a parallel
    operation. With more threads in all teams than cores, it lets them sleep between two operations, and on a CPU the
    step then waits milliseconds for its own team to wake, in every operation that is large enough to be parallel.
    """
    with _lock:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # That is also what threads start with from now on. Undone in a thread that ends: it counts for the caller too.
        undo = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
        undo.start()
        undo.join()
