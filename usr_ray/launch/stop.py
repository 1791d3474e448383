"""A stop from outside becomes a checkpoint: SIGTERM to the driver (which is what `ray job stop` sends) or to a worker.

A worker that is asked raises its flag, the flag travels with the row counts of the next step, and all ranks save and
leave together (training/loop.py). The driver cannot call into a worker's loop, so its request travels through a file in
the run directory, which every machine sees. The file is there from the start and its content changes: a network file
system may not show a new file for a minute, while opening an old one asks the server.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ray.train.torch import TorchConfig

_POLL_S = 0.2
_STOP = "stop"

worker_was_asked = threading.Event()
"""Set in a worker's process by SIGTERM."""


def make_empty(path: Path) -> None:
    """Make a file of an attempt, and its folder, before the workers look for what will be written into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="utf-8")


def ask_to_stop(path: Path) -> None:
    """Tell the workers that watch `path`. Written in place, see above."""
    path.write_text(_STOP, encoding="utf-8")


@contextlib.contextmanager
def watch_stop_file(path: Path, stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` once `path` says so, from a thread that ends with the block. One rank is enough: ranks agree."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            with contextlib.suppress(OSError):
                if path.read_text(encoding="utf-8") == _STOP:
                    stop()
                    return

    thread = threading.Thread(target=watch, name="usr-ray-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def sigterm_sets(event: threading.Event) -> Iterator[None]:
    """Inside the block the first SIGTERM sets `event`; a second one acts as before the block.

    Outside the main thread, where Python takes no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = _catch_sigterm(event)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _catch_sigterm(event: threading.Event) -> Any:
    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        event.set()
        signal.signal(number, previous)

    previous = signal.signal(signal.SIGTERM, note)
    return previous


def _catch_in_worker() -> None:
    # Ray calls a worker's methods in the main thread, and the loop in another, where handlers cannot be set.
    if threading.current_thread() is threading.main_thread():
        _catch_sigterm(worker_was_asked)


class StoppableTorchConfig(TorchConfig):
    """TorchConfig whose workers treat SIGTERM as a request to stop; Ray's own handler ends them in mid-step."""

    @property
    def backend_cls(self) -> type:
        """See ray.train.backend.BackendConfig."""
        return _StoppableBackend


class _StoppableBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_training_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_catch_in_worker)
