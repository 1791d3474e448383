"""Who still needs which files of the samples: run directories and the pins in the lake."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from etl.checks import DataCheckError
from etl.lake.tables import Lake
from usr_ray.schema import PINS

_CONFIG = "config.json"
_MANIFESTS = "manifest-*.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """A run and the data files it is pinned to."""

    run: str
    """Its directory."""
    status: str
    """As in config.json ('running' where it has not come to its end), or of a pin: 'not finished'."""
    version: int
    """Of the samples table."""
    files: frozenset[str]
    """Names, without folders: Delta gives every file a name of its own."""
    pin: str | None = None
    """Name of the pin, where that is how the run is known."""


def holds_of_runs(folders: Sequence[str]) -> list[Hold]:
    """What the runs below these folders are pinned to, by the manifests that jobs/train.py left.

    Raises:
        DataCheckError: there is no such folder, or a manifest cannot be read: then nobody knows what its run needs.
    """
    found = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise DataCheckError(f"--runs {folder}: there is no such folder; name the folder of the run directories")
        for place, inside, _ in os.walk(folder):
            # Checkpoints are many and hold no run.
            inside[:] = sorted(name for name in inside if name != "checkpoints")
            manifests = sorted(Path(place).glob(_MANIFESTS))
            if manifests:
                read = [_read(path) for path in manifests]
                found.append(
                    Hold(
                        run=place,
                        status=_status(Path(place)),
                        version=max(hold[0] for hold in read),
                        files=frozenset().union(*(hold[1] for hold in read)),
                    )
                )
    return found


def holds_of_pins(spark: SparkSession, lake: Lake) -> list[Hold]:
    """What the pins in the lake hold.

    Raises:
        DataCheckError: a pin cannot be read.
    """
    folder = lake.path(PINS)
    system, hadoop_path = _file_system(spark, folder)
    if not system.exists(hadoop_path):
        return []
    texts = spark.read.text(folder, wholetext=True, pathGlobFilter="*.json")
    found = []
    for row in sorted(texts.select("value", F.input_file_name().alias("path")).collect(), key=lambda row: row["path"]):
        version, files, raw = _parse(row["value"], row["path"])
        name = row["path"].rpartition("/")[2].removesuffix(".json")
        found.append(Hold(run=f"{raw.get('run')}", status="not finished", version=version, files=files, pin=name))
    return found


def remove_pin(spark: SparkSession, lake: Lake, name: str) -> None:
    """Delete `<lake>/pins/<name>.json`.

    Raises:
        DataCheckError: there is none.
    """
    system, path = _file_system(spark, f"{lake.path(PINS)}/{name}.json")
    if not system.delete(path, False):
        there = ", ".join(str(hold.pin) for hold in holds_of_pins(spark, lake)) or "none"
        raise DataCheckError(f"--unpin {name}: {lake.root} has no such pin; it has: {there}")


def _file_system(spark: SparkSession, path: str) -> tuple[Any, Any]:
    """Hadoop's file system of a path, and the path as Hadoop's."""
    context = spark.sparkContext
    hadoop = context._jvm.org.apache.hadoop.fs.Path(path)  # type: ignore[union-attr]
    return hadoop.getFileSystem(context._jsc.hadoopConfiguration()), hadoop  # type: ignore[union-attr]


def _read(path: Path) -> tuple[int, frozenset[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    version, files, _ = _parse(text, str(path))
    return version, files


def _parse(text: str, where: str) -> tuple[int, frozenset[str], dict[str, Any]]:
    """Version and file names of a manifest (files are objects) or a pin (files are paths)."""
    try:
        raw = json.loads(text)
        paths = [file if isinstance(file, str) else file["path"] for file in raw["files"]]
        return int(raw["version"]), frozenset(path.rpartition("/")[2] for path in paths), raw
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(where, type(error).__name__) from error


def _unreadable(where: object, why: str) -> DataCheckError:
    return DataCheckError(
        f"{where}: cannot be read ({why}), so the files its run needs are unknown; repair it, or remove it with its run"
    )


def _status(run_dir: Path) -> str:
    try:
        return str(json.loads((run_dir / _CONFIG).read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
