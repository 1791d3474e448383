"""usr_ray/data/feed.py: torch computes with one thread beside the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.feed import Feed, compute_alone
from usr_ray.data.manifest import build_manifest
from usr_ray.data.reader import Reading, SampleReader


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


def test_the_readers_threads_compute_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples(tmp_path, samples_spec(), num_rows=100, num_days=1)
    found: list[int] = []
    decode = RowGroupDecoder.decode

    def watched(self: RowGroupDecoder, *arguments: Any, **options: Any) -> Any:
        found.append(torch.get_num_threads())
        return decode(self, *arguments, **options)

    monkeypatch.setattr(RowGroupDecoder, "decode", watched)
    manifest = build_manifest(tmp_path, dates=(FIRST_DATE, FIRST_DATE))
    with SampleReader(manifest, Reading(global_batch_size=32, group_size=8, mature_only=False)) as reader:
        assert len(list(reader.batches(0))) == 4
    assert set(found) == {1}
    assert torch.get_num_threads() == 3


def test_a_feed_on_a_cpu_computes_alone() -> None:
    def source() -> Iterator[tuple[torch.Tensor, int]]:
        yield torch.zeros(1), torch.get_num_threads()

    with Feed(source(), torch.device("cpu")) as feed:
        assert [kept for _, kept in feed] == [1]
    assert torch.get_num_threads() == 3
