"""What a thread beside the training step asks of its process: to leave the step's own threads alone."""

from __future__ import annotations

import threading

import torch

_lock = threading.Lock()


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
