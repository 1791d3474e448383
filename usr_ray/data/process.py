"""What a thread that runs beside the training step must do to leave the step's own threads alone."""

from __future__ import annotations

import threading

import torch

_lock = threading.Lock()


def compute_alone() -> None:
    """Run torch's operations of this thread on this thread alone; other threads keep their own number.

    For threads that work beside the training step. OpenMP keeps a team for each thread that ever runs a parallel
    operation. With more threads in all teams than cores, it lets them sleep between two operations, and on a CPU the
    step then waits milliseconds for its own team to wake, in every operation that is large enough to be parallel.
    """
    with _lock:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # That is also what threads start with from now on. Undone in a thread that ends: it counts for the caller too.
        undo = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
        undo.start()
        undo.join()
