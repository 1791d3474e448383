"""Pins: a training run marks its files in the lake, so that `jobs/maintain_tables.py --vacuum` keeps the files it
reads.

A pin is `<lake>/pins/<run>-<hash>.json`: run, table version, file names. It is written when a run begins and removed
when it finishes; a run that was killed keeps it until it is resumed and finishes, or until somebody removes it.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from usr_ray.data.manifest import Manifest, open_filesystem
from usr_ray.files import now, write_whole
from usr_ray.schema import PINS


def pin_name(run_dir: Path) -> str:
    """Name of the pin of a run directory, without its suffix; the same from every machine that sees the directory."""
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.name)[:64]
    return f"{stem}-{hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:8]}"


def write_pin(manifests: Sequence[Manifest], run_dir: Path) -> None:
    """Mark these files in the lake as read by a run. A lake that cannot be written does not stop training; it is
    reported.

    Args:
        manifests: one or more, of one table.
    """
    pin = {
        "run": str(run_dir.absolute()),
        "host": socket.gethostname(),
        "created": now(),
        "version": manifests[0].version,
        "files": sorted({path for manifest in manifests for path in _paths(manifest)}),
    }
    system, path = _place(manifests[0].table_uri, run_dir)
    text = json.dumps(pin, indent=1) + "\n"
    try:
        system.create_dir(path.rpartition("/")[0], recursive=True)
        if isinstance(system, pafs.LocalFileSystem):
            write_whole(Path(path), text)
        else:  # object stores show a file once its stream is closed
            with system.open_output_stream(path) as stream:
                stream.write(text.encode())
    except (OSError, pa.ArrowException) as error:
        print(
            f"no pin at {path} ({type(error).__name__}): whoever vacuums the lake must name {run_dir} with --runs, or "
            "keep files for longer than the run takes"
        )


def remove_pin(table_uri: str, run_dir: Path) -> None:
    """Remove the pin of a run; its absence is no error."""
    system, path = _place(table_uri, run_dir)
    try:
        system.delete_file(path)
    except (OSError, pa.ArrowException):
        return


def _place(table_uri: str, run_dir: Path) -> tuple[pafs.FileSystem, str]:
    system, table = open_filesystem(table_uri)
    return system, f"{table.rstrip('/').rpartition('/')[0]}/{PINS}/{pin_name(run_dir)}.json"


def _paths(manifest: Manifest) -> list[str]:
    """Every file that a run reads, each relative to its table."""
    by_id = (*manifest.item_features, *manifest.user_vectors, *manifest.item_vectors)
    return [file.path for file in manifest.files] + [file.path for file in by_id]
