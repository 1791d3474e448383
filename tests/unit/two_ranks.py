"""Run functions on several gloo ranks of this machine, set up as torchrun does, and bring back their tensors.

The ranks are started once for all tests of a session: importing torch takes longer than what they do.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from usr_ray.training.worker import LocalWorker

RankFunction = Callable[[LocalWorker, Path], Mapping[str, torch.Tensor]]
TIMEOUT_S = 300


def run_ranks(function: RankFunction, world_size: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The tensors `function(worker, folder)` returned on each rank, in rank order. `function` must be picklable."""
    ranks = _ranks(world_size)
    for _, connection in ranks:
        connection.send((function, folder))
    failures = []
    for rank, (_, connection) in enumerate(ranks):
        # A rank that failed leaves the others in a collective: its report is not waited for in vain.
        answer = connection.recv() if connection.poll(5 if failures else TIMEOUT_S) else "no answer"
        if answer:
            failures.append(f"rank {rank}: {answer}")
    if failures:
        _ranks.cache_clear()  # they are out of step with one another
        for process, _ in ranks:
            process.kill()
        raise AssertionError("\n".join(failures))
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(world_size)]


@functools.cache
def _ranks(world_size: int) -> list[tuple[ForkServerProcess, Connection]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked off a process that has imported torch, the loop and TorchRec, where it is installed, once, not once a rank.
    context = multiprocessing.get_context("forkserver")
    own = ["usr_ray.training.loop", "usr_ray.training.embeddings_sharded"]
    context.set_forkserver_preload(["torch._dynamo", "pytest", *own])
    ranks = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        # Daemons: they end with the session.
        process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
        process.start()
        ranks.append((process, ours))
    return ranks


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    LocalWorker("cpu")  # sets up the process group, for as long as the process lives
    while True:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # LocalWorker takes it for a wish; the session's end is an order
        function, folder = connection.recv()
        try:
            tensors = function(LocalWorker("cpu"), folder)
            plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            save_file(plain, folder / f"rank-{rank}.safetensors")
            connection.send("")
        except BaseException:
            connection.send(traceback.format_exc())
