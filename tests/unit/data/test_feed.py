"""The feed: order, bounds, ends and failures; and its ring on a device that takes its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from usr_ray.data.feed import Feed, PinnedRing

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Two:
    numbers: Tensor
    flags: Tensor
    size: int


def numbered(count: int, drawn: list[int] | None = None) -> Iterator[tuple[Tensor, int]]:
    for n in range(count):
        if drawn is not None:
            drawn.append(n)
        yield torch.full((3,), n), n


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "usr-ray-feed"]


def settle(what: list[int]) -> None:
    """Wait until the feed's thread makes no more."""
    size = -1
    while size != len(what):
        size = len(what)
        time.sleep(0.15)


def test_everything_comes_in_order_and_then_the_end_for_good() -> None:
    with Feed(numbered(20), CPU) as feed:
        assert [(int(moved[0]), kept) for moved, kept in feed] == [(n, n) for n in range(20)]
        assert list(feed) == []
    assert feed_threads() == []


def test_no_more_is_made_than_the_depth_and_one_in_the_making() -> None:
    drawn: list[int] = []
    with Feed(numbered(100, drawn), CPU, depth=3) as feed:
        settle(drawn)
        assert drawn == [0, 1, 2, 3]
        next(feed)
        settle(drawn)
        assert drawn == [0, 1, 2, 3, 4]


def test_what_the_source_raises_comes_after_the_batches_before_it_and_stays() -> None:
    def source() -> Iterator[tuple[Tensor, int]]:
        yield from numbered(2)
        raise ValueError("file 3 is torn")

    with Feed(source(), CPU) as feed:
        assert [kept for _, kept in (next(feed), next(feed))] == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="file 3 is torn"):
                next(feed)
    assert feed_threads() == []


def test_leaving_early_closes_the_source_in_its_own_thread_and_ends_it() -> None:
    closed_in: list[str] = []

    def source() -> Iterator[tuple[Tensor, int]]:
        try:
            yield from numbered(100)
        finally:
            closed_in.append(threading.current_thread().name)

    feed = Feed(source(), CPU)
    next(feed)
    feed.close()
    assert closed_in == ["usr-ray-feed"]
    assert feed_threads() == []
    with pytest.raises(StopIteration):
        next(feed)


class SlowEvent:
    def __init__(self, copies: SlowCopies, number: int) -> None:
        self.copies, self.number = copies, number

    def synchronize(self) -> None:
        self.copies.log.append(f"wait {self.number}")
        self.copies.finish(self.number)


class SlowCopies:
    """A device whose copies read the host buffer only when somebody waits for them, as late as they ever might."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.allocated: list[Tensor] = []
        self.num_copies = 0
        self.lock = threading.Lock()

    def allocate(self, num_bytes: int) -> Tensor:
        self.allocated.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return self.allocated[-1]

    def start(self, buffer: Tensor) -> tuple[Tensor, SlowEvent]:
        on_device = torch.full_like(buffer, 255)
        self.pending[self.num_copies] = (buffer, on_device)
        self.log.append(f"copy {self.num_copies}")
        self.num_copies += 1
        return on_device, SlowEvent(self, self.num_copies - 1)

    def finish(self, number: int) -> None:
        # Whoever waits for a copy that another thread has begun to finish waits for its end, as on a device.
        with self.lock:
            if number in self.pending:
                buffer, on_device = self.pending.pop(number)
                on_device.copy_(buffer)

    def hand_over(self, on_device: Tensor, event: SlowEvent) -> None:
        self.log.append(f"hand over {event.number}")
        self.finish(event.number)


def two(n: int, rows: int) -> Two:
    return Two(torch.arange(rows) * 1000 + n, torch.arange(rows) % 2 == n % 2, rows)


def test_a_buffer_is_filled_again_only_after_its_last_copy() -> None:
    """Copies that finish late would carry the next batch's bytes if a buffer were touched before its event."""
    copies = SlowCopies()
    ring = PinnedRing(copies, num_buffers=2)
    moved = [ring.copy(two(n, rows=n % 4)) for n in range(8)]
    assert copies.log == ["copy 0", "copy 1"] + [word for n in range(6) for word in (f"wait {n}", f"copy {n + 2}")]
    for n, (batch, _, event) in enumerate(moved):
        event.synchronize()
        expected = two(n, rows=n % 4)
        assert (batch.numbers.dtype, batch.flags.dtype, batch.size) == (torch.int64, torch.bool, n % 4)
        assert torch.equal(batch.numbers, expected.numbers)
        assert torch.equal(batch.flags, expected.flags)


def test_buffers_grow_to_the_largest_batch_and_are_used_again() -> None:
    copies = SlowCopies()
    ring = PinnedRing(copies, num_buffers=2)
    for rows in (100, 100, 90, 110, 40, 100, 1):
        ring.copy(two(0, rows))
    assert len(copies.allocated) == 2, "batches within a quarter of the first need no new memory"
    ring.copy(two(0, 1000))
    assert len(copies.allocated) == 3


def test_every_tensor_starts_where_wide_loads_may() -> None:
    ring = PinnedRing(SlowCopies())
    batch, memory, _ = ring.copy((torch.zeros(3, dtype=torch.bool), torch.zeros(5), torch.zeros(0), torch.ones(())))
    assert all((tensor.data_ptr() - memory.data_ptr()) % 256 == 0 for tensor in batch if tensor.numel())
    assert [tuple(tensor.shape) for tensor in batch] == [(3,), (5,), (0,), ()]


def test_the_feed_hands_each_copy_over_before_its_batch_is_used() -> None:
    copies = SlowCopies()
    with Feed(((two(n, 5), n) for n in range(6)), CPU, depth=2, copies=copies) as feed:
        for batch, n in feed:
            assert torch.equal(batch.numbers, two(n, 5).numbers)
    handed = [word for word in copies.log if word.startswith("hand over")]
    assert handed == [f"hand over {n}" for n in range(6)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies on a stream of their own")
def test_on_a_gpu_batches_arrive_whole_while_the_step_is_busy() -> None:
    device = torch.device("cuda", 0)
    busy = torch.randn(2048, 2048, device=device)
    with Feed(((two(n, 50_000), n) for n in range(20)), device) as feed:
        for batch, n in feed:
            busy = busy @ busy / 2048
            assert torch.equal(batch.numbers.cpu(), two(n, 50_000).numbers)
