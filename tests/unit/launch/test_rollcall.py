"""The rank that did not answer is named, and only that one; a refusal reaches the driver from a full disk."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.unit.two_ranks import run_ranks
from usr_ray.launch import rollcall as trainer_rollcall
from usr_ray.launch.rollcall import RollCall, read_refusal, reserve_refusal, write_refusal
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration

TIMED_OUT = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv"


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_rollcall, "_WAIT_S", 0.2)


def fail(folder: Path, rank: int, error: Exception, *, world_size: int = 3) -> None:
    with RollCall(folder, rank, world_size, timeout="20 s").answered():
        raise error


def test_the_rank_that_does_not_sign_is_named_with_its_process(tmp_path: Path) -> None:
    with RollCall(tmp_path, 1, 3, timeout="20 s").answered():
        pass  # it came, and was never heard of again
    with pytest.raises(RuntimeError):
        fail(tmp_path, 2, RuntimeError(TIMED_OUT))
    with pytest.raises(RuntimeError) as caught:
        fail(tmp_path, 0, RuntimeError(TIMED_OUT))
    assert re.fullmatch(
        r"rank 1 \(pid \d+ on \S+\) is lost: it has not answered for ray.timeout = 20 s, or its process is gone",
        str(caught.value),
    )
    assert str(caught.value.__cause__) == TIMED_OUT


def test_a_rank_that_never_started_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 \(never came\) is lost"):
        fail(tmp_path, 0, RuntimeError(TIMED_OUT), world_size=2)


def test_ranks_that_fail_for_reasons_of_their_own_are_not_called_lost(tmp_path: Path) -> None:
    """Rank 1 runs out of memory; rank 0 finds the connection closed: the memory is the news, not a lost rank."""
    with pytest.raises(RuntimeError, match="out of memory"):
        fail(tmp_path, 1, RuntimeError("CUDA out of memory"), world_size=2)
    with pytest.raises(RuntimeError, match="gloo"):
        fail(tmp_path, 0, RuntimeError(TIMED_OUT), world_size=2)


def _one_hangs(worker: LocalWorker, folder: Path) -> dict[str, torch.Tensor]:
    """Rank 1 comes and never answers; rank 0 waits for it in a sum for two seconds."""
    group = dist.new_group(timeout=dt.timedelta(seconds=2), backend="gloo")
    trainer_rollcall._WAIT_S = 0.2
    if worker.rank == 1:
        (folder / "pid").write_text(str(os.getpid()))
        with RollCall(folder, 1, 2, timeout="2 s").answered():
            dist.barrier()
            while "failed" not in (folder / "rank-0.json").read_text():
                time.sleep(0.05)
        return {"waited_s": torch.tensor(0.0)}
    start = time.monotonic()
    try:
        with RollCall(folder, 0, 2, timeout="2 s").answered():
            dist.barrier()  # both have come, in the group that waits longer
            dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        (folder / "said").write_text(str(error))
    return {"waited_s": torch.tensor(time.monotonic() - start)}


def test_a_rank_that_hangs_in_a_collective_ends_it_for_the_others_and_is_named(tmp_path: Path) -> None:
    waited, _ = run_ranks(_one_hangs, 2, tmp_path)
    assert 2 <= waited["waited_s"] < 30
    pid, said = ((tmp_path / name).read_text() for name in ("pid", "said"))
    assert re.match(rf"rank 1 \(pid {pid} on \S+\) is lost: it has not answered for ray.timeout = 2 s, ", said)


def test_a_new_group_forgets_the_signatures_of_the_last(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps({"state": "failed", "pid": 1, "host": "old"}))
    with RollCall(tmp_path, 1, 2, timeout="20 s").answered():
        pass
    with pytest.raises(RuntimeError, match=r"rank 1 .* is lost"):
        fail(tmp_path, 0, RuntimeError(TIMED_OUT), world_size=2)


def test_one_rank_alone_loses_nobody(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Timed out"):
        fail(tmp_path, 0, RuntimeError(TIMED_OUT), world_size=1)


def test_a_refusal_is_read_back_and_nothing_is_none(tmp_path: Path) -> None:
    path = tmp_path / "ray" / "refused.json"
    assert read_refusal(path) is None
    reserve_refusal(path)
    assert read_refusal(path) is None
    write_refusal(path, "é: one line")
    assert read_refusal(path) == "é: one line"


@pytest.fixture
def no_growth() -> Iterator[None]:
    """No file may grow beyond what a refusal has reserved."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_refusal_needs_no_room_however_long_it_is(tmp_path: Path, no_growth: None) -> None:
    path = tmp_path / "refused.json"
    reserve_refusal(path)
    write_refusal(path, "x" * 10_000)
    found = read_refusal(path)
    assert found is not None
    assert 2000 < len(found) < 4096
    assert set(found) == {"x"}
