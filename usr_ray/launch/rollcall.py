"""Which rank was lost. When a collective fails, the ranks that notice sign a list, and those that do not are named.

Torch says only that some other process did not answer. The list is in the run directory, which every rank sees; it is
written when a group starts and when something fails, so a step costs nothing.

A worker's UserError is not worth a restart, but Ray restarts the group for any error. So the worker records it before
it raises: the ranks of the next group see it and leave at once, and the driver shows the line. The file is there from
the start, filled with spaces, and is written over in place: that needs no room on a full disk, and a network file
system that has denied a file may go on denying it for a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from usr_ray.files import write_whole

_COLLECTIVE = re.compile(r"gloo|nccl|process group", re.IGNORECASE)
_WAIT_S = 5.0
"""The ranks notice within moments of each other; a rank that has not signed by then is not running."""
_POLL_S = 0.1
_REFUSAL_BYTES = 4096


class RollCall:
    """The list of one group of ranks.

    Args:
        folder: the same for all ranks; groups one after the other may share it.
        timeout: ray.timeout as it was written, for the message.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, *, timeout: str) -> None:
        self._folder, self._rank, self._world_size, self._timeout = folder, rank, world_size, timeout

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Wrap code that communicates with other ranks.

        Raises:
            RuntimeError: from a failed collective, naming the ranks that were lost; any other error goes through.
        """
        self._sign("trains")
        try:
            yield
        except Exception as error:
            self._sign("failed")
            is_collective = isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error))
            lost = self._lost() if is_collective and self._world_size > 1 else ""
            if not lost:
                raise
            print(f"[train] {lost}", flush=True)
            raise RuntimeError(lost) from error

    def _sign(self, state: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            self._folder.mkdir(parents=True, exist_ok=True)
            about = {"state": state, "pid": os.getpid(), "host": socket.gethostname()}
            write_whole(self._folder / f"rank-{self._rank}.json", json.dumps(about))

    def _lost(self) -> str:
        """One line that names the ranks without a sign; empty when all have signed."""
        end = time.monotonic() + _WAIT_S
        silent = self._silent()
        while silent and time.monotonic() < end:
            time.sleep(_POLL_S)
            silent = self._silent()
        if not silent:
            return ""
        names = ", ".join(f"rank {rank} ({where})" for rank, where in silent.items())
        return f"{names} is lost: it has not answered for ray.timeout = {self._timeout}, or its process is gone"

    def _silent(self) -> dict[int, str]:
        silent = {}
        for rank in range(self._world_size):
            about = {"state": "never came"}
            with contextlib.suppress(OSError, ValueError):
                about = json.loads((self._folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
            if about["state"] != "failed":
                silent[rank] = f"pid {about['pid']} on {about['host']}" if "pid" in about else about["state"]
        return silent


def reserve_refusal(path: Path) -> None:
    """Make the file before the workers start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b" " * _REFUSAL_BYTES)


def write_refusal(path: Path, message: str) -> None:
    """Write the line; it is cut to the file's size. Raises OSError."""
    content = b""
    while not content or len(content) > _REFUSAL_BYTES:
        message = message if not content else message[: len(message) * 3 // 4]
        content = json.dumps(message).encode()
    with path.open("r+b") as file:
        file.write(content.ljust(_REFUSAL_BYTES))
        file.flush()
        os.fsync(file.fileno())


def read_refusal(path: Path) -> str | None:
    """The line; None when no worker has refused, or the file is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
