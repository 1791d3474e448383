"""What the loop knows of the processes around it: Worker, and LocalWorker for one process or torchrun. No Ray.

Two planes. Numbers on the CPU (row counts, the stop flag, sizes) go over a gloo group and never wait for a GPU;
tensors on a GPU (gradients) travel over NCCL. On a machine without a GPU both are the same gloo group.
"""

from __future__ import annotations

import datetime as dt
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, cast, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

DEFAULT_TIMEOUT = dt.timedelta(minutes=5)
"""A collective that takes longer is a failure, not a hang (torch's own default is 30 minutes)."""


class Worker:
    """One rank on torch.distributed, or the only one where no process group is set up.

    Every method that communicates with other ranks must be called by all ranks, in the same order. The process group
    belongs to whoever set it up (torchrun through LocalWorker, Ray Train through RayWorker).
    """

    def __init__(self, device: torch.device | str = "cpu", *, timeout: dt.timedelta = DEFAULT_TIMEOUT) -> None:
        self.device = torch.device(device)
        """Where this rank computes."""
        self.rank, self.world_size = 0, 1
        self.received_bytes = 0
        """Bytes of other ranks' rows that `all_gather_rows` has brought here so far, padding included."""
        self._stop = threading.Event()
        self._control: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            # Sizes and flags must not wait for the GPU's queue, so NCCL runs get a second, gloo group.
            if self.world_size > 1 and dist.get_backend() != "gloo":
                self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))

    @property
    def is_main(self) -> bool:
        """True on rank 0: the one that writes files and prints."""
        return self.rank == 0

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._control if tensor.device.type == "cpu" else None

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor (same shape and dtype on all); the argument stays as it was.

        With one rank the argument itself comes back.
        """
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group(total))
        return total

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Every rank's rows, one below the other in rank order; first dimensions may differ and may be 0."""
        if self.world_size == 1:
            return rows
        num_rows_W = torch.zeros(self.world_size, dtype=torch.int64)
        num_rows_W[self.rank] = rows.shape[0]
        dist.all_reduce(num_rows_W, group=self._control)
        num_rows = num_rows_W.tolist()
        longest = max(num_rows)
        if longest == 0:
            return rows.detach()
        mine = rows.new_zeros((longest, *rows.shape[1:]))
        mine[: rows.shape[0]] = rows.detach()
        gathered = rows.new_empty((self.world_size * longest, *rows.shape[1:]))
        self.received_bytes += gathered.nbytes - mine.nbytes
        dist.all_gather_single(gathered, mine, group=self._group(rows))
        return torch.cat([gathered[r * longest : r * longest + n] for r, n in enumerate(num_rows)])

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor (same shape and dtype on all), written into the argument and returned."""
        if self.world_size > 1:
            dist.broadcast(tensor.detach(), src=0, group=self._group(tensor))
        return tensor

    def any_true(self, flag: bool) -> bool:
        """True on every rank when the flag is true on one of them. On the CPU plane: never waits for a GPU."""
        return bool(self.all_reduce_sum(torch.tensor(int(flag))))

    def request_stop(self) -> None:
        """Ask this rank to stop at the next step boundary; safe from any thread and from a signal handler."""
        self._stop.set()

    def should_stop(self) -> bool:
        """True once this rank was asked to stop; ranks agree through `any_true` or a sum of flags."""
        return self._stop.is_set()

    def stop_on_signal(self) -> bool:
        """Turn SIGTERM into `request_stop`; False where that cannot be done (Ray runs the loop in a thread).

        For entry points: no constructor touches the signal handlers of its process.
        """
        if threading.current_thread() is not threading.main_thread():
            return False

        def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self.request_stop()

        signal.signal(signal.SIGTERM, stop)
        return True

    def report(self, metrics: Mapping[str, float]) -> None:
        """Report numbers to the launcher of the run; called by every rank. Ignored here."""

    def wrap_model(self, module: nn.Module) -> nn.Module:
        """The module on this rank's device, in DDP when there is more than one rank; gradients are SUMMED over ranks.

        The loss of a rank is its share of the global loss, so DDP's own mean would be wrong.
        """
        module = module.to(self.device)
        if self.world_size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        # Buffers stay per rank: what must agree (STAR's statistics) is reduced by the layer that owns it.
        wrapped = DistributedDataParallel(module, forward_sync_buffers=False, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, _sum_bucket)
        return wrapped


def _sum_bucket(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # noqa: ARG001
    reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return reduced.then(lambda future: future.value()[0])


# DDP compares the hook's annotations with its own types, and `from __future__` made them strings.
_sum_bucket.__annotations__ = get_type_hints(_sum_bucket)


class LocalWorker(Worker):
    """One process, or one of torchrun's: `torchrun --nproc-per-node 2 jobs/train.py ...`.

    Args:
        device: where to compute; None: this process's GPU when there is one, else the CPU.
        timeout: the longest that a collective may take.
    """

    def __init__(self, device: torch.device | str | None = None, *, timeout: dt.timedelta = DEFAULT_TIMEOUT) -> None:
        launched = dist.is_available() and dist.is_torchelastic_launched()
        if device is None:
            local_rank = dist.get_node_local_rank() if launched else 0
            device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._owns_group = launched and not dist.is_initialized()
        if self._owns_group:
            dist.init_process_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        super().__init__(device, timeout=timeout)

    def close(self) -> None:
        """Leave the process group this worker set up; nothing to do otherwise."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
