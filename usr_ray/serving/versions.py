"""A registry: a folder of versions, each whole and checked, and the pointer that says which one is served.

current.json                   `Pointer` as JSON, replaced in one step
versions/NAME/version.json     SHA-256 and bytes of every file, model, lake, pinned versions of its tables
versions/NAME/model/           usr_ray/serving/export.py
versions/NAME/vocabularies/    N.arrow for the N-th feature of the spec (encode.ValueIndex); none for hashed ids
versions/NAME/items*, users/   usr_ray/serving/stores.py
versions/NAME/counters/        usr_ray/serving/counters.py; none for a model without counters
versions/NAME/golden.json      requests with the probabilities that this version gave when it was published
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from usr_ray.config import UserError
from usr_ray.config.stored import Shape, Text, read_json, requiring
from usr_ray.files import file_sha256, write_whole
from usr_ray.schema import FeatureSpec
from usr_ray.serving.counters import FOLDER as COUNTERS_FOLDER
from usr_ray.serving.counters import Counters
from usr_ray.serving.encode import Encoder, ValueIndex, hashes, micros_of
from usr_ray.serving.runtime import FEATURE_SPEC, FILES, changed_file, described, read_manifest

_LOG = logging.getLogger(__name__)
FORMAT = 3
VERSION, POINTER, VERSIONS = "version.json", "current.json", "versions"
MODEL, VOCABULARY_FOLDER, GOLDEN = "model", "vocabularies", "golden.json"
_LOCK = ".pointer.lock"
STABLE, CANARY, SHADOW = "stable", "canary", "shadow"
"""Places of the pointer; the first two are buckets, too."""
PRUNED_AFTER_S = 86_400.0
"""Age from which `prune` deletes a version."""
_PUBLISH = "publish one with jobs/publish.py"
_SHAPE: Shape = {
    "files?": FILES,
    "version?": str,
    "model_id?": str,
    "as_of?": Text("a time with a zone", micros_of),
    "rules?": {"click_window": int, "order_window": int, "credit_impression?": bool, "*": int},
    "null_values?": {"*": [str]},
    "users_at?": str,
    "users_place?": str,
}
_POINTER: Shape = {"stable": str, "before": [str], "canary?": (str, None), "share?": float, "shadow?": (str, None)}


class RegistryError(UserError):
    """A registry, or a version in it, that cannot be used."""


def version_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Path in a version's folder -> SHA-256 and bytes, of every file but version.json."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != VERSION)
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in paths
    }


def read_version(folder: Path, *needed: str) -> dict[str, Any]:
    """version.json of a version with these entries; its files are not looked at. Raises RegistryError."""
    return described(folder / VERSION, FORMAT, requiring(_SHAPE, needed), error=RegistryError, way_out=_PUBLISH)


def verified_version(folder: Path, *needed: str) -> dict[str, Any]:
    """version.json of a version with these entries, after every file was found to be what it names.

    Raises:
        RegistryError: a file is missing or was changed, or there is none of this format.
    """
    version = read_version(folder, "files", *needed)
    if changed := changed_file(folder, version["files"]):
        raise RegistryError(f"{changed}: missing or changed since it was published; {_PUBLISH}")
    return version


@dataclass(frozen=True, slots=True)
class Pointer:
    """Which versions answer."""

    stable: str
    before: tuple[str, ...] = ()
    """What was stable before, the newest last."""
    canary: str | None = None
    """Answers to `share` of the users."""
    share: float = 0.0
    shadow: str | None = None
    """Scores every request after it was answered; its scores are logged, never returned."""

    def bucket(self, user_id: str) -> str:
        """'canary' or 'stable': always the same for a user while the canary is one model; a larger share adds users.

        The user's hash is salted with the canary's model, so that the next one meets other users, and one that is
        published again, so that it knows what has happened since, meets the same.
        """
        if self.canary is None:
            return STABLE
        return CANARY if hashes([f"{model_of(self.canary)} {user_id}"])[0] < self.share * 2.0**64 else STABLE

    def write(self, registry: Path) -> None:
        """Make it the pointer of a registry."""
        write_whole(registry / POINTER, json.dumps(asdict(self), indent=2) + "\n")


def read_pointer(registry: Path) -> Pointer:
    """current.json.

    Raises:
        RegistryError: there is none, or it names no version of the registry.
    """
    try:
        raw = read_json(registry / POINTER, _POINTER)
        pointer = Pointer(**raw | {"before": tuple(raw["before"])})
        if not 0 <= pointer.share <= 1:
            raise ValueError
    except (UserError, ValueError, TypeError) as error:
        raise RegistryError(f"--registry {registry}: holds no readable {POINTER}; {_PUBLISH}") from error
    optional = [name for name in (pointer.canary, pointer.shadow) if name is not None]
    for name in (pointer.stable, *pointer.before, *optional):
        if "/" in name or name.startswith("."):
            raise RegistryError(f"--registry {registry}: {POINTER} names {name!r}, which is no version; {_PUBLISH}")
    return pointer


@contextlib.contextmanager
def _changing(registry: Path) -> Iterator[None]:
    """One change of the pointer at a time: of two that both read the old one, the first would be lost."""
    with (registry / _LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file
        yield


def move_pointer(registry: Path, name: str) -> None:
    """Make a version the stable one; it is no longer canary or shadow, nor is one whose folder is gone."""
    with _changing(registry):
        pointer = Pointer(name)
        if (registry / POINTER).exists():
            old = read_pointer(registry)
            # One that is stable already has no other place to go back to than it had.
            pointer = replace(old, stable=name, before=old.before if old.stable == name else (*old.before, old.stable))
            if old.canary == name or _is_gone(registry, old.canary):
                pointer = replace(pointer, canary=None, share=0.0)
            if old.shadow == name or _is_gone(registry, old.shadow):
                pointer = replace(pointer, shadow=None)
        pointer.write(registry)


def _is_gone(registry: Path, name: str | None) -> bool:
    return name is not None and not (registry / VERSIONS / name).is_dir()


def with_canary(registry: Path, name: str, share: float) -> None:
    """Let a version answer to a share of the users; 0 ends it. Raises RegistryError."""
    canary = name if share > 0 else None
    with _changing(registry):
        replace(read_pointer(registry), canary=canary, share=share).write(registry)


def with_shadow(registry: Path, name: str) -> None:
    """Let a version score what was answered. Raises RegistryError."""
    with _changing(registry):
        replace(read_pointer(registry), shadow=name).write(registry)


def model_of(version: str) -> str:
    """The model's id in the name of a version that `publish` gave."""
    return version.partition("-")[2] or version


def rollback_place(registry: Path, pointer: Pointer) -> int | None:
    """Which of `before` a rollback serves: the newest of another model, else the newest; None where there is none.

    A model is published again each day that brings no better one, so the version before is most often the same model.
    One whose folder is gone is passed over.
    """
    places = [n for n, name in enumerate(pointer.before) if (registry / VERSIONS / name).is_dir()]
    others = [n for n in places if model_of(pointer.before[n]) != model_of(pointer.stable)]
    return max(others or places, default=None)


def in_use(registry: Path) -> set[str]:
    """Versions that the pointer names, and the one that a rollback would take, now or once a new version is stable."""
    if not (registry / POINTER).exists():
        return set()
    pointer = read_pointer(registry)
    place = rollback_place(registry, pointer)
    names = (pointer.stable, None if place is None else pointer.before[place], pointer.canary, pointer.shadow)
    return {name for name in names if name is not None}


def prune(registry: Path) -> list[str]:
    """Delete the folders of versions that are out of use, and what killed publications left; the names.

    What was changed within the last day stays: a publication may be writing it, or a service may be about to open it.
    A service that has a version open keeps its files until it lets go of them.

    Raises:
        RegistryError: no readable pointer, so nobody knows what is in use. Nothing is deleted then.
    """
    read_pointer(registry)
    keep, before = in_use(registry), time.time() - PRUNED_AFTER_S
    folders = sorted(path for path in (registry / VERSIONS).iterdir() if path.is_dir() and path.name not in keep)
    gone = [folder for folder in folders if folder.stat().st_mtime < before]
    for folder in gone:
        shutil.rmtree(folder)
    return [folder.name for folder in gone]


def roll_back(registry: Path) -> str:
    """Make the newest version of the previous model stable again, without canary and shadow; its name.

    Raises:
        RegistryError: there was none before, or it is no longer there.
    """
    with _changing(registry):
        pointer = read_pointer(registry)
        place = rollback_place(registry, pointer)
        if place is None:
            raise RegistryError(f"--registry {registry}: no version was stable before {pointer.stable}; {_PUBLISH}")
        Pointer(pointer.before[place], pointer.before[:place]).write(registry)
    return pointer.before[place]


def version_folder(registry: Path, name: str) -> Path:
    """The folder of a version that the pointer names. Raises RegistryError."""
    folder = registry / VERSIONS / name
    if not folder.is_dir():
        raise RegistryError(f"--registry {registry}: {POINTER} names {folder.name}, which is not there; {_PUBLISH}")
    return folder


def stable_folder(registry: Path) -> Path:
    """The folder of the stable version. Raises RegistryError."""
    return version_folder(registry, read_pointer(registry).stable)


def model_spec(folder: Path) -> FeatureSpec:
    """The feature spec of the model in a version's folder."""
    return FeatureSpec.from_json((folder / MODEL / FEATURE_SPEC).read_text(encoding="utf-8"))


class OtherVersions:
    """Raw features that other versions of a registry take: of what a client sends, one version leaves them out.

    A client cannot change at the instant at which the pointer is moved, and it does not know whether the canary or the
    stable version will answer it.

    Args:
        folder: of the version that leaves out.
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self._folder, self._own = folder, encoder.names
        self._read: tuple[int, dict[str, set[str]]] = -1, {}
        """Time of the folder of versions, and what they take."""
        self._told: set[str] = set()

    def without(self, owner: str, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Features of an owner without those that only others take; what no version takes stays."""
        strange = raw.keys() - self._own[owner].keys()
        if not strange:
            return raw
        with contextlib.suppress(OSError):  # gone: what was known goes on
            changed = self._folder.parent.stat().st_mtime_ns
            if changed != self._read[0]:
                self._read = changed, self._names()
        left_out = strange & self._read[1].get(owner, set())
        if new := left_out - self._told:
            self._told |= new
            names = ", ".join(sorted(new))
            _LOG.warning("%s: leaves out %s of requests, which another version takes", self._folder.name, names)
        return {name: value for name, value in raw.items() if name not in left_out}

    def _names(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for folder in self._folder.parent.iterdir():
            with contextlib.suppress(OSError, ValueError):  # one that is torn or half written
                for owner, names in Encoder(model_spec(folder), {}, None).names.items():
                    found.setdefault(owner, set()).update(names)
        return found


def vocabulary_paths(folder: Path, spec: FeatureSpec) -> dict[str, Path]:
    """Feature -> where its vocabulary is, or would be, in a version's folder; by number, as names may be odd."""
    return {name: folder / VOCABULARY_FOLDER / f"{n}.arrow" for n, name in enumerate(spec.vocabularies)}


def open_counters(folder: Path) -> Counters | None:
    """The counters of a version's folder, verified or just written; None where the model has none."""
    return Counters(folder) if (folder / COUNTERS_FOLDER).is_dir() else None


def open_encoder(folder: Path, counters: Counters | None = None) -> Encoder:
    """The encoder of a version's folder, whose files `verified_version` has verified, or `publish` has just written."""
    spec, vocabulary = model_spec(folder), read_manifest(folder / MODEL)["vocabulary"]
    counted = None if counters is None else counters.indexes
    if vocabulary["kind"] == "hash":
        return Encoder(spec, {}, vocabulary["num_buckets"], counted)
    paths = vocabulary_paths(folder, spec)
    return Encoder(spec, {name: ValueIndex(path) for name, path in paths.items() if path.exists()}, None, counted)
