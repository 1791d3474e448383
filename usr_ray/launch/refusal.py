"""A worker's refusal reaches the driver as one line, even on full storage.

A UserError in a worker is not worth a restart, but Ray restarts the group for any error. So the worker records it
before it raises: the ranks of the next group see it and leave at once, and the driver shows the line. The file is there
from the start, filled with spaces, and is written over in place: that needs no room on a full disk, and a network file
system that has denied a file may go on denying it for a minute.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_NUM_BYTES = 4096


def reserve_refusal(path: Path) -> None:
    """Make the file before the workers start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b" " * _NUM_BYTES)


def write_refusal(path: Path, message: str) -> None:
    """Write the line; it is cut to the file's size. Raises OSError."""
    content = b""
    while not content or len(content) > _NUM_BYTES:
        message = message if not content else message[: len(message) * 3 // 4]
        content = json.dumps(message).encode()
    with path.open("r+b") as file:
        file.write(content.ljust(_NUM_BYTES))
        file.flush()
        os.fsync(file.fileno())


def read_refusal(path: Path) -> str | None:
    """The line; None when no worker has refused, or the file is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
