"""usr_ray/threads.py: torch computes with one thread beside the step, and with all of them in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from usr_ray.feed import Feed
from usr_ray.threads import compute_alone


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """A number that no machine has by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_new_thread(function: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


def alone() -> int:
    compute_alone()
    return torch.get_num_threads()


def test_only_the_thread_that_asks_computes_alone() -> None:
    assert in_new_thread(alone) == 1
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == 3


def test_threads_that_ask_at_once_leave_the_number_of_later_ones() -> None:
    with ThreadPoolExecutor(8, initializer=compute_alone) as executor:
        found = [executor.submit(torch.get_num_threads) for _ in range(64)]
    assert {f.result() for f in found} == {1}
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == 3


def test_a_feed_on_a_cpu_computes_alone() -> None:
    def source() -> Iterator[tuple[torch.Tensor, int]]:
        yield torch.zeros(1), torch.get_num_threads()

    with Feed(source(), torch.device("cpu")) as feed:
        assert [kept for _, kept in feed] == [1]
    assert torch.get_num_threads() == 3
