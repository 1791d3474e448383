"""Files that are whole or absent, their checksums and the time in them. Standard library only."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import re
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


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


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


def one_line(error: BaseException) -> str:
    """The first line of an error's text, without the final stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def whole_line(error: BaseException) -> str:
    """All lines of an error's text as one, without colours: delta-rs puts the cause into the last of them."""
    lines = re.sub("\x1b\\[[0-9;]*m", "", str(error)).splitlines()
    return ": ".join(line.strip(" \t.↳") for line in lines if line.strip()) or type(error).__name__
