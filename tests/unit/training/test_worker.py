"""One rank and two gloo ranks: sums, gathers, agreement, the stop flag and summed gradients."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.two_ranks import run_ranks
from usr_ray.training.worker import LocalWorker, Worker

pytestmark = pytest.mark.unit


def test_one_process_is_a_world_of_its_own() -> None:
    worker = LocalWorker("cpu")
    rows = torch.arange(6.0).reshape(3, 2)
    assert isinstance(worker, Worker)
    assert (worker.rank, worker.world_size, worker.is_main) == (0, 1, True)
    assert torch.equal(worker.all_reduce_sum(rows), rows)
    assert torch.equal(worker.all_gather_rows(rows), rows)
    assert worker.any_true(True)
    assert not worker.any_true(False)
    model = nn.Linear(2, 1)
    assert worker.wrap_model(model) is model


def test_sigterm_raises_the_stop_flag_and_nothing_else() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        worker = LocalWorker("cpu")
        assert signal.getsignal(signal.SIGTERM) is before, "a constructor leaves its process as it is"
        assert worker.stop_on_signal()
        assert not worker.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert worker.should_stop()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_worker_in_a_thread_leaves_the_signal_handler_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    installed: list[bool] = []
    thread = threading.Thread(target=lambda: installed.append(Worker().stop_on_signal()))
    thread.start()
    thread.join()
    assert installed == [False]
    assert signal.getsignal(signal.SIGTERM) is before


def _collectives(worker: Worker) -> dict[str, torch.Tensor]:
    rank = worker.rank
    counts = torch.tensor([1.0 + rank, 10.0])
    summed = worker.all_reduce_sum(counts)
    uneven = worker.all_gather_rows(torch.full((1 + 2 * rank, 2), float(rank)))
    one_empty = worker.all_gather_rows(torch.arange(3)[: 3 * rank])
    all_empty = worker.all_gather_rows(torch.zeros(0, 4))
    main_value = worker.broadcast(torch.tensor([rank + 7]))
    flags = torch.tensor([worker.any_true(rank == 1), worker.any_true(False)])
    ranks = torch.tensor([rank, worker.world_size, worker.is_main])
    return {
        "ranks": ranks,
        "counts": counts,
        "summed": summed,
        "uneven": uneven,
        "one_empty": one_empty,
        "all_empty": all_empty,
        "main_value": main_value,
        "flags": flags,
        "received_bytes": torch.tensor(worker.received_bytes),
    }


def _gradients(worker: Worker) -> dict[str, torch.Tensor]:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, float(worker.rank))  # DDP must start every rank from rank 0's weights
    wrapped = worker.wrap_model(model)
    start = model.weight.detach().clone()
    x = torch.tensor([[1.0, 2.0]]) if worker.rank == 0 else torch.tensor([[10.0, 20.0]])
    wrapped(x).sum().backward()
    assert model.weight.grad is not None
    return {"start": start, "gradient": model.weight.grad}


def _both(worker: Worker, folder: Path) -> dict[str, torch.Tensor]:
    return _collectives(worker) | _gradients(worker)


@pytest.mark.integration
def test_two_ranks_of_torchrun_sum_gather_agree_and_sum_gradients(tmp_path: Path) -> None:
    for rank, got in enumerate(run_ranks(_both, 2, tmp_path)):
        assert got["ranks"].tolist() == [rank, 2, int(rank == 0)]
        assert got["counts"].tolist() == [1.0 + rank, 10.0], "the argument must stay as it was"
        assert got["summed"].tolist() == [3.0, 20.0]
        assert got["uneven"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
        assert got["one_empty"].tolist() == [0, 1, 2]
        assert got["all_empty"].shape == (0, 4)
        assert got["main_value"].tolist() == [7]
        assert got["flags"].tolist() == [True, False]
        # Two gathers, each of the other rank's 3 rows: 3 x 2 floats, then 3 whole numbers; an empty one costs nothing.
        assert got["received_bytes"] == 3 * 2 * 4 + 3 * 8
        assert got["start"].tolist() == [[0.0, 0.0]]
        assert got["gradient"].tolist() == [[11.0, 22.0]], "summed over ranks, not averaged"
