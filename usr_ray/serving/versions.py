"""A registry: a folder of versions, each whole and checked, and the pointer that says which one is served.

current.json                   {"stable": NAME, "before": [NAME, ..]}, replaced in one step
versions/NAME/version.json     SHA-256 and bytes of every file, model, lake, pinned versions of its tables
versions/NAME/model/           usr_ray/serving/export.py
versions/NAME/vocabularies/    N.arrow for the N-th feature of the spec (encode.ValueIndex); none for hashed ids
versions/NAME/items*, users/   usr_ray/serving/stores.py
versions/NAME/golden.json      requests with the probabilities that this version gave when it was published
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from usr_ray.config import UserError
from usr_ray.files import file_sha256, write_whole
from usr_ray.schema import FeatureSpec
from usr_ray.serving.encode import Encoder, ValueIndex
from usr_ray.serving.runtime import FEATURE_SPEC, changed_file, described, read_manifest

FORMAT = 2
VERSION, POINTER, VERSIONS = "version.json", "current.json", "versions"
MODEL, VOCABULARY_FOLDER, GOLDEN = "model", "vocabularies", "golden.json"
_PUBLISH = "publish one with jobs/publish.py"


class RegistryError(UserError):
    """A registry, or a version in it, that cannot be used."""


def version_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Path in a version's folder -> SHA-256 and bytes, of every file but version.json."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != VERSION)
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in paths
    }


def verified_version(folder: Path) -> dict[str, Any]:
    """version.json of a version, after every file was found to be what it names.

    Raises:
        RegistryError: a file is missing or was changed, or there is none of this format.
    """
    version = described(folder / VERSION, FORMAT, error=RegistryError, way_out=_PUBLISH)
    if changed := changed_file(folder, version["files"]):
        raise RegistryError(f"{changed}: missing or changed since it was published; {_PUBLISH}")
    return version


def read_pointer(registry: Path) -> dict[str, Any]:
    """current.json: `stable`, and `before`, what was stable before it, the newest last.

    Raises:
        RegistryError: there is none, or it names no version of the registry.
    """
    try:
        pointer: dict[str, Any] = json.loads((registry / POINTER).read_text(encoding="utf-8"))
        stable, before = pointer["stable"], pointer["before"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"--registry {registry}: holds no readable {POINTER}; {_PUBLISH}") from error
    for name in (stable, *before):
        if not isinstance(name, str) or "/" in name or name.startswith("."):
            raise RegistryError(f"--registry {registry}: {POINTER} names {name!r}, which is no version; {_PUBLISH}")
    return pointer


def move_pointer(registry: Path, name: str) -> None:
    """Make a version the stable one."""
    before: list[str] = []
    if (registry / POINTER).exists():
        pointer = read_pointer(registry)
        before = [*pointer["before"], pointer["stable"]]
    write_whole(registry / POINTER, json.dumps({"stable": name, "before": before}, indent=2) + "\n")


def roll_back(registry: Path) -> str:
    """Make the version before the stable one stable again; its name.

    Raises:
        RegistryError: there was none before.
    """
    pointer = read_pointer(registry)
    if not pointer["before"]:
        raise RegistryError(f"--registry {registry}: no version was stable before {pointer['stable']}; {_PUBLISH}")
    *before, name = pointer["before"]
    write_whole(registry / POINTER, json.dumps({"stable": name, "before": before}, indent=2) + "\n")
    return str(name)


def stable_folder(registry: Path) -> Path:
    """The folder of the stable version. Raises RegistryError."""
    folder = registry / VERSIONS / str(read_pointer(registry)["stable"])
    if not folder.is_dir():
        raise RegistryError(f"--registry {registry}: {POINTER} names {folder.name}, which is not there; {_PUBLISH}")
    return folder


def model_spec(folder: Path) -> FeatureSpec:
    """The feature spec of the model in a version's folder."""
    return FeatureSpec.from_json((folder / MODEL / FEATURE_SPEC).read_text(encoding="utf-8"))


def vocabulary_paths(folder: Path, spec: FeatureSpec) -> dict[str, Path]:
    """Feature -> where its vocabulary is, or would be, in a version's folder; by number, as names may be odd."""
    return {f.name: folder / VOCABULARY_FOLDER / f"{n}.arrow" for n, f in enumerate(spec.sparse)}


def open_encoder(folder: Path) -> Encoder:
    """The encoder of a version's folder, whose files `verified_version` has verified, or `publish` has just written."""
    spec, vocabulary = model_spec(folder), read_manifest(folder / MODEL)["vocabulary"]
    if vocabulary["kind"] == "hash":
        return Encoder(spec, {}, vocabulary["num_buckets"])
    paths = vocabulary_paths(folder, spec)
    return Encoder(spec, {name: ValueIndex(path) for name, path in paths.items() if path.exists()}, None)
