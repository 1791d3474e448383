"""Checkpoints that are whole or absent: safetensors and JSON under checksums, renamed into place in one piece.

    <run>/checkpoints/step-00000050/     tensors.safetensors, state.json, SHA256SUMS
    <run>/checkpoints/best-00000200/     the same; kept apart from the last k
    <run>/checkpoints/vectors-<hash>.safetensors   what the run reads and never trains, once for all its checkpoints
    <run>/checkpoints/step-00000100.tmp-1f...   being written, or left by a crash: never read, cleaned by the next save

The directory names are the index: a rename is atomic, so there is no index file that could be torn. Nothing here is
pickled, so reading a checkpoint runs no code. `sha256sum -c SHA256SUMS` checks one by hand.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from usr_ray.config import UserError
from usr_ray.config.stored import read_json
from usr_ray.files import file_sha256, sync

TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
CHECKPOINTS = "checkpoints"
"""Their folder in a run directory."""
VECTORS = "vectors"
"""Key in a checkpoint's state: the file beside it that holds the vectors its run was trained with."""
STORAGE_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, quota used up, file size limit: the storage refuses to grow, the run itself is sound."""

_VECTORS_DIGITS = 16
_NAME = re.compile(r"(step|best)-(\d{8,})")
_log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that is missing, torn or not ours."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose checksums agree."""

    path: Path
    step: int
    """Steps of the whole run done when it was written."""
    tensors: dict[str, Tensor]
    """Name -> tensor, on the CPU."""
    state: dict[str, Any]
    """What `save` was given as `state`."""
    model_id: str
    """16 hex digits that name the tensors: the head of their SHA-256."""


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors called '<part>/<name>', by name."""
    prefix = f"{part}/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


class CheckpointStore:
    """The checkpoints of one run. One process writes (rank 0); any may read.

    Args:
        directory: need not exist; the first save creates it.
        keep_last: how many `step-` checkpoints stay; the best one stays besides.
    """

    def __init__(self, directory: Path, *, keep_last: int = 3) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self._vectors = ""
        """Name of the file with the vectors, once this process has written it."""

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        vectors: Mapping[str, Tensor] | None = None,
        best: bool = False,
        must: bool = False,
    ) -> Path | None:
        """Write one checkpoint as a unit and drop what it replaces.

        Args:
            step: steps of the whole run done so far, >= 0.
            tensors: any shapes, dtypes and devices; copied to the CPU as they are.
            state: JSON values; NaN and infinity are refused, since JSON has none.
            vectors: what all checkpoints of the run share: written once, and named in the state as VECTORS.
            best: write it as the run's best checkpoint, in place of the former best, instead of as one of the last k.
            must: the run's result depends on it: a full storage is an error.

        Returns:
            The checkpoint's directory, or None when the storage is full: then a warning says so, nothing
            half-written is left, and the earlier checkpoints are unchanged.

        Raises:
            CheckpointError: the storage is full and `must`. OSError: any other failure to write.
            ValueError: `state` is not JSON.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        kind = "best" if best else "step"
        final = self.directory / f"{kind}-{step:08d}"
        json.dumps(dict(state), allow_nan=False)  # refused before anything is written
        temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")
        try:
            self._clean()
            temporary.mkdir(parents=True)
            if vectors and not self._vectors:
                self._vectors = self._save_vectors(vectors)
            named = {**state, **({VECTORS: self._vectors} if vectors else {})}
            _write(temporary, tensors, json.dumps(named, indent=1, sort_keys=True, allow_nan=False))
            self._put(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if error.errno not in STORAGE_FULL:
                raise
            shortage = _shortage(error, self.directory, tensors)
            problem = f"checkpoint of step {step} not written to {self.directory}: {shortage}"
            if must:
                raise CheckpointError(
                    f"{problem}; without it the run has no result: free space on this storage and run the same "
                    "command, which goes on from the newest checkpoint there"
                ) from error
            _log.warning("%s; training goes on and the earlier checkpoints stay: free space on this storage", problem)
            return None
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._prune(kind, step)
        return final

    def _save_vectors(self, vectors: Mapping[str, Tensor]) -> str:
        """The name of the file that holds them now, with the head of its SHA-256 in it."""
        temporary = self.directory / f"{VECTORS}.tmp-{uuid.uuid4().hex}"
        try:
            _save_tensors(vectors, temporary)
            name = f"{VECTORS}-{file_sha256(temporary)[:_VECTORS_DIGITS]}.safetensors"
            sync(temporary)
            temporary.rename(self.directory / name)
            sync(self.directory)
        finally:
            temporary.unlink(missing_ok=True)
        return name

    def load_vectors(self, name: str) -> dict[str, Tensor]:
        """What `save` wrote under this name, verified.

        Raises:
            CheckpointError: there is no such file, or its content is another.
        """
        path = self.directory / name
        digits = name.removeprefix(f"{VECTORS}-").removesuffix(".safetensors")
        try:
            if "/" in name or path.is_symlink() or file_sha256(path)[:_VECTORS_DIGITS] != digits:
                raise CheckpointError(
                    f"{path}: does not match its checksum (torn or changed); copy the run again with all of its "
                    "checkpoints folder"
                )
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}), and without its vectors the model cannot be used; copy the run "
                "again with all of its checkpoints folder"
            ) from error

    def newest_valid(self) -> Checkpoint | None:
        """The newest `step-` checkpoint whose checksums agree; a torn one is skipped with a warning."""
        return self._first_valid("step")

    def newest_state(self) -> dict[str, Any] | None:
        """State of the newest `step-` checkpoint that can be read, without its tensors; not verified."""
        for _, name in reversed(self._entries("step")):
            with contextlib.suppress(UserError):
                return read_json(self.directory / name / STATE, {"cursor": {"epoch": int, "step": int}})
        return None

    def best_valid(self) -> Checkpoint | None:
        """The best checkpoint, or None when none was marked (or it is torn, with a warning line)."""
        return self._first_valid("best")

    def chosen(self) -> Checkpoint | None:
        """The run's result: the best checkpoint, or the newest whole one where none was marked."""
        return self.best_valid() or self.newest_valid()

    def steps(self) -> list[int]:
        """Steps of the `step-` checkpoints on disk, oldest first; not verified."""
        return [step for step, _ in self._entries("step")]

    def load(self, name: str) -> Checkpoint:
        """The checkpoint called `name`, such as 'step-00000050', verified.

        Raises:
            CheckpointError: the name is no checkpoint's name, there is none of it, or its content is torn.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"checkpoint {name!r}: not a checkpoint's name; write step-<8 digits> as in {self.directory}"
            )
        path = self.directory / name
        if path.is_symlink() or not path.is_dir():
            present = ", ".join(self._names()) or "none"
            raise CheckpointError(f"checkpoint {path}: no such directory; present: {present}")
        digest = _verify(path)
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            tensors = load_file(path / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {path}: cannot be read ({error}); use an older one") from error
        return Checkpoint(path=path, step=int(match[2]), tensors=tensors, state=state, model_id=digest[:16])

    def _first_valid(self, kind: str) -> Checkpoint | None:
        for _, name in reversed(self._entries(kind)):
            try:
                return self.load(name)
            except CheckpointError as error:
                _log.warning("skipped: %s", error)
        return None

    def _entries(self, kind: str) -> list[tuple[int, str]]:
        matches = [_NAME.fullmatch(name) for name in self._names()]
        return sorted((int(m[2]), m[0]) for m in matches if m and m[1] == kind)

    def _names(self) -> list[str]:
        return sorted(p.name for p in self.directory.iterdir()) if self.directory.is_dir() else []

    def _clean(self) -> None:
        """Remove what a crash left half-written. There is one writer, so none of it can be alive."""
        for name in self._names():
            whole, mark, _ = name.partition(".tmp-")
            if mark and whole == VECTORS:
                (self.directory / name).unlink(missing_ok=True)
            elif mark and _NAME.fullmatch(whole):
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def _put(self, temporary: Path, final: Path) -> None:
        if final.exists():  # the same step again, after a resume: a rename cannot replace a full directory
            final.rename(final.with_name(f"{final.name}.tmp-replaced"))
        temporary.rename(final)
        sync(self.directory)
        shutil.rmtree(final.with_name(f"{final.name}.tmp-replaced"), ignore_errors=True)

    def _prune(self, kind: str, step: int) -> None:
        # A later step than the one just written was torn; otherwise the run would have resumed from it.
        old = [name for other, name in self._entries(kind) if other <= step]
        later = [name for other, name in self._entries(kind) if other > step]
        keep = 1 if kind == "best" else self.keep_last
        for name in [*old[:-keep], *later]:
            # Renamed first: a directory that is half deleted must not look like a checkpoint.
            doomed = self.directory / f"{name}.tmp-pruned"
            (self.directory / name).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _shortage(error: OSError, directory: Path, tensors: Mapping[str, Tensor]) -> str:
    """What the storage said, what a checkpoint needs and what is left there."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    left = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    return f"the storage is full ({error.strerror}; {needed / 1e6:,.1f} MB needed, {left / 1e6:,.1f} MB free)"


def _write(folder: Path, tensors: Mapping[str, Tensor], state: str) -> None:
    _save_tensors(tensors, folder / TENSORS)
    (folder / STATE).write_text(state, encoding="utf-8")
    sums = [f"{file_sha256(folder / name)}  {name}\n" for name in (STATE, TENSORS)]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")
    for path in (folder / TENSORS, folder / STATE, folder / SUMS, folder):
        sync(path)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: _plain(tensor) for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # the library hides errno in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor that owns its memory; safetensors refuses views of one another."""
    plain = tensor.detach().to("cpu").contiguous()
    return plain.clone() if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size() else plain


def _verify(path: Path) -> str:
    """The SHA-256 of the tensors."""
    expected = f"{path}: expected {STATE}, {TENSORS} and their {SUMS}"
    try:
        lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        if set(sums) != {STATE, TENSORS}:  # also keeps a name such as ../../x from being opened
            raise CheckpointError(f"checkpoint {expected}, found sums of {', '.join(sorted(sums))}; use an older one")
        torn = [name for name in sorted(sums) if (path / name).is_symlink() or file_sha256(path / name) != sums[name]]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {expected}, but reading failed ({error}); use an older one") from error
    if torn:
        raise CheckpointError(
            f"checkpoint {path}: {torn[0]} does not match its checksum (torn or changed); use an older one"
        )
    return sums[TENSORS]
