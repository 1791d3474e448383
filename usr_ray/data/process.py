"""What a worker asks of its own process: threads that leave the step's alone, and memory that stays.

Nothing here is needed for a right result; each spares a CPU's step what the machine would otherwise do beside it.
"""

from __future__ import annotations

import ctypes
import platform
import threading

import torch

_lock = threading.Lock()

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Of mallopt, from malloc.h."""
_NEVER = -1
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""The most that glibc takes. Larger tensors are mapped, and given back, one by one."""
_HEAP_BYTES = 64 << 20
"""Of the heap of a thread other than the main one. With less room kept than that, glibc drops heaps that are empty."""


def compute_alone() -> None:
    """Have torch's operations in this thread use no thread besides it; every other thread keeps its own number.

    For threads that work beside the training step. OpenMP keeps a team for each thread that ever shares out an
    operation. With more threads in all teams than cores, it has them sleep between two operations, and on a CPU the
    step then waits milliseconds for its own team to wake, in every operation that is large enough to be shared out.
    """
    with _lock:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # That is also what threads start with from now on. Undone in a thread that ends: it counts for the caller too.
        undo = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
        undo.start()
        undo.join()


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, up to the most it ever used, instead of giving it back.

    A step frees at its end what the next one allocates again. glibc gives such memory back to the kernel, and every
    page of it then costs a fault and 4,096 zeros: a tenth of the time of USR's step on a CPU (docs/speed.md).
    Without effect where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_TOP_PAD, _HEAP_BYTES)
