"""Files that are whole or absent, and their checksums. Standard library only."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader, or a crash, finds the old file or the new one and nothing in between."""
    # A name of its own: ranks on several machines may write one file at once.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
