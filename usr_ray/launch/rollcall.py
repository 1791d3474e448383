"""Which rank was lost. When a collective fails, the ranks that notice sign a list, and those that do not are named.

Torch says only that some other process did not answer. The list is in the run directory, which every rank sees; it is
written when a group starts and when something fails, so a step costs nothing.
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


class RollCall:
    """The list of one group of ranks.

    Args:
        folder: the same for all ranks; groups one after the other may share it.
        rank: of this process.
        world_size: number of ranks.
        timeout: ray.timeout, for the message.
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
