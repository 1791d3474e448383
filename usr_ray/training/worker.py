"""What the loop knows of the processes round it: Worker, and LocalWorker for one process or torchrun. No Ray.

Two planes. Numbers on the CPU (row counts, the stop flag, sizes) travel over a gloo group and never wait for a GPU;
tensors on a GPU (gradients) travel over NCCL. On a machine without a GPU both are the same gloo group.
"""

from __future__ import annotations

import datetime as dt
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, Protocol, cast, get_type_hints, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from usr_ray.data.process import keep_freed_memory

DEFAULT_TIMEOUT = dt.timedelta(minutes=5)
"""A collective that takes longer is a failure, not a hang (torch's own default is 30 minutes)."""


@runtime_checkable
class Worker(Protocol):
    """One rank of a run. Every method that talks to other ranks must be called by all ranks, in the same order."""

    @property
    def rank(self) -> int:
        """Position of this process, 0 to world_size - 1."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    @property
    def is_main(self) -> bool:
        """True on rank 0: the one that writes files and prints."""

    @property
    def received_bytes(self) -> int:
        """Bytes of other ranks' rows that `all_gather_rows` has brought here so far, padding included."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor (same shape and dtype on all); the argument is left as it was."""

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Every rank's rows, one below the other in rank order; first dimensions may differ and may be 0."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor (same shape and dtype on all), written into the argument and returned."""

    def any_true(self, flag: bool) -> bool:
        """True on every rank when the flag is true on one of them."""

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def should_stop(self) -> bool:
        """True once this rank was asked to stop (SIGTERM); ranks agree through `any_true` or a sum of flags."""

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand numbers to whoever started the run; called by every rank alike."""

    def wrap_model(self, module: nn.Module) -> nn.Module:
        """The module on this rank's device, in DDP when there is more than one rank; gradients are SUMMED."""


class DistributedWorker:
    """Worker on torch.distributed, or on nothing when no process group is set up (then world_size is 1).

    The process group belongs to whoever set it up (torchrun through LocalWorker, Ray Train through RayWorker). The
    process keeps the memory that it frees from then on (usr_ray/data/process.py).
    """

    def __init__(self, device: torch.device | str = "cpu", *, timeout: dt.timedelta = DEFAULT_TIMEOUT) -> None:
        keep_freed_memory()
        self._device = torch.device(device)
        self._stop = threading.Event()
        self._rank, self._world_size = 0, 1
        self._received_bytes = 0
        self._control: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            # Sizes and flags must not wait for the GPU's queue, so NCCL runs get a second, gloo group.
            if self._world_size > 1 and dist.get_backend() != "gloo":
                self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))

    @property
    def rank(self) -> int:
        """Position of this process, 0 to world_size - 1."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world_size

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._device

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self._rank == 0

    @property
    def received_bytes(self) -> int:
        """See Worker."""
        return self._received_bytes

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._control if tensor.device.type == "cpu" else None

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """See Worker. With one rank the argument itself comes back."""
        if self._world_size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group(total))
        return total

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """See Worker. Shorter ranks are padded to the longest for the transfer, then cut again."""
        if self._world_size == 1:
            return rows
        num_rows_W = torch.zeros(self._world_size, dtype=torch.int64)
        num_rows_W[self._rank] = rows.shape[0]
        dist.all_reduce(num_rows_W, group=self._control)
        num_rows = num_rows_W.tolist()
        longest = max(num_rows)
        if longest == 0:
            return rows.detach()
        mine = rows.new_zeros((longest, *rows.shape[1:]))
        mine[: rows.shape[0]] = rows.detach()
        gathered = rows.new_empty((self._world_size * longest, *rows.shape[1:]))
        self._received_bytes += gathered.nbytes - mine.nbytes
        dist.all_gather_single(gathered, mine, group=self._group(rows))
        return torch.cat([gathered[r * longest : r * longest + n] for r, n in enumerate(num_rows)])

    def broadcast(self, tensor: Tensor) -> Tensor:
        """See Worker."""
        if self._world_size > 1:
            dist.broadcast(tensor.detach(), src=0, group=self._group(tensor))
        return tensor

    def any_true(self, flag: bool) -> bool:
        """See Worker. Uses the CPU plane, so it never waits for a GPU."""
        return bool(self.all_reduce_sum(torch.tensor(int(flag))))

    def barrier(self) -> None:
        """See Worker."""
        self.any_true(False)

    def request_stop(self) -> None:
        """Ask this rank to stop at the next step boundary; safe from any thread and from a signal handler."""
        self._stop.set()

    def should_stop(self) -> bool:
        """See Worker."""
        return self._stop.is_set()

    def stop_on_signal(self, number: int = signal.SIGTERM) -> bool:
        """Turn SIGTERM into `request_stop`; False where that cannot be done (Ray runs the loop in a thread)."""
        if threading.current_thread() is not threading.main_thread():
            return False

        def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self.request_stop()

        signal.signal(number, stop)
        return True

    def report(self, metrics: Mapping[str, float]) -> None:
        """See Worker. Nobody listens here; RayWorker hands them to Ray Train."""

    def wrap_model(self, module: nn.Module) -> nn.Module:
        """See Worker. The sum over ranks replaces DDP's mean: the loss of a rank is its share of the global loss."""
        module = module.to(self._device)
        if self._world_size == 1 or not any(p.requires_grad for p in module.parameters()):
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


class LocalWorker(DistributedWorker):
    """One process, or one of torchrun's: `torchrun --nproc-per-node 2 jobs/train.py ...`.

    Args:
        device: where to compute; None: this process's GPU when there is one, else the CPU.
        timeout: longest a collective may take.
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
        self.last_report: dict[str, float] = {}
        self.stop_on_signal()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Keep the newest numbers in `last_report`."""
        self.last_report = dict(metrics)

    def close(self) -> None:
        """Leave the process group this worker set up; nothing to do otherwise."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
