"""Run a function on several gloo ranks of this machine, set up as torchrun does, and bring back its tensors."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from usr_ray.worker import LocalWorker

RankFunction = Callable[[LocalWorker, Path], Mapping[str, torch.Tensor]]


def run_ranks(function: RankFunction, world_size: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The tensors `function(worker, folder)` returned on each rank, in rank order. `function` must be picklable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run_rank, args=(function, world_size, port, folder), nprocs=world_size, join=True)
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(world_size)]


def _run_rank(rank: int, function: RankFunction, world_size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}  # fmt: skip
    worker = LocalWorker("cpu")
    try:
        tensors = {name: tensor.detach().contiguous() for name, tensor in function(worker, folder).items()}
        save_file(tensors, folder / f"rank-{rank}.safetensors")
    finally:
        worker.close()
