"""Care of a lake's tables: merge small files (OPTIMIZE), delete files that nobody needs any more (VACUUM).

OPTIMIZE writes a new table version with the same rows; the files of the older one stay until a VACUUM. VACUUM never
deletes a file that a run it knows of is pinned to: run directories and the pins in the lake say who needs what.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from etl.checks import DataCheckError
from etl.jvm import file_system, json_texts, parquet_footer, table_properties, table_version
from etl.lake.tables import TABLES, Lake, samples_version, without_dictionaries
from etl.session import MIN_FILE_BYTES, literal_path
from usr_ray.config import DAY_US
from usr_ray.schema import ITEM_FEATURES, ITEM_FEATURES_PROPERTY, PINS, SAMPLES, VECTOR_TABLES, VECTORS_PROPERTIES

RETENTION_PROPERTY = "delta.deletedFileRetentionDuration"
_DEFAULT_RETENTION_DAYS = 7.0
"""Delta's, where the table sets none."""
_UNIT_DAYS = {"minute": 1 / 1440, "hour": 1 / 24, "day": 1.0, "week": 7.0}
_CONFIG = "config.json"
_MANIFESTS = "manifest-*.json"
_FOOTERS = 32
"""Files whose row groups are counted, at most."""
_HOUR_US = DAY_US // 24
_INVENTORY = "path string, length bigint, isDir boolean, modificationTime bigint"
_BY_ID = {ITEM_FEATURES: ITEM_FEATURES_PROPERTY, **{t: VECTORS_PROPERTIES[o] for o, t in VECTOR_TABLES.items()}}
"""Tables by encoded id -> the property of the samples with their version; also their files' key in a manifest."""
_LISTED = ("table", "version", "files", "MB", "median MB", "rows a row group", "old files", "old MB")


@dataclass(frozen=True, kw_only=True, slots=True)
class MaintainRequest:
    """What to do with which lake."""

    lake: Lake
    runs: Sequence[str] = ()
    """Folders with run directories, at any depth."""
    optimize: bool = False
    vacuum: bool = False
    keep_us: int = 7 * DAY_US
    """VACUUM leaves files that left the table, or were written, this recently."""
    keep_pinned: bool = False
    """Delete around the files that runs are pinned to, instead of refusing."""
    unpin: Sequence[str] = ()
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TableShape:
    """How a table lies on the disk; `old` files belong to earlier versions, or to builds that never came to an end."""

    table: str
    version: int
    sizes: dict[str, int]
    """Name -> bytes of the newest version's files."""
    folders: dict[str, str]
    """Name -> partition folder of the same files."""
    old_sizes: dict[str, int]
    group_rows: tuple[int, ...]
    """Rows of each row group, of a sample of the files."""

    def cells(self) -> tuple[str, ...]:
        """One line of the table that people read, in the order of its head."""
        mb = 1e6
        return (
            self.table,
            f"{self.version}",
            f"{len(self.sizes):,}",
            f"{sum(self.sizes.values()) / mb:,.1f}",
            f"{median(self.sizes.values()) / mb:,.2f}" if self.sizes else "-",
            f"{median(self.group_rows):,.0f}" if self.group_rows else "-",
            f"{len(self.old_sizes):,}",
            f"{sum(self.old_sizes.values()) / mb:,.1f}",
        )


def maintain(spark: SparkSession, request: MaintainRequest, report: Callable[[str], None]) -> None:
    """Do what is asked, and show the tables before and after.

    Raises:
        DataCheckError: there is no such lake; VACUUM would delete what a run is pinned to, or is to keep files for
            longer than the table remembers them. Nothing was deleted then.
    """
    lake = request.lake
    tables = [table for table in TABLES if lake.has(spark, table)]
    if not tables:
        raise DataCheckError(f"--lake {lake.root}: holds no tables; run jobs/build_samples.py on it or name another")
    for name in () if request.dry_run else request.unpin:
        remove_pin(spark, lake, name)
        report(f"pin {name} removed")
    pinned = [hold for hold in holds_of_pins(spark, lake) if hold.pin not in request.unpin]
    holds = [*holds_of_runs(request.runs), *pinned]
    before = [table_shape(spark, lake, table) for table in tables]
    for line in (*shape_lines(before), "", *hold_lines(holds, before)):
        report(line)
    # Checked for all tables first: a refusal leaves everything as it is.
    doomed = {table: _doomed(spark, request, table) for table in tables} if request.vacuum else {}
    of_samples = _files_of_samples(spark, lake)
    for table in _BY_ID.keys() & doomed.keys():
        doomed[table] = [path for path in doomed[table] if _name(path) not in of_samples]
    held = _held([path for table in (SAMPLES, *_BY_ID) for path in doomed.get(table, [])], holds)
    if held and not request.keep_pinned:
        raise DataCheckError(_refusal(lake.path(SAMPLES), held))
    # VACUUM never sees the files that runs read, so none of them can become old enough between this check and VACUUM.
    pinned_files = {file for hold in holds for file in hold.files} | of_samples
    for shape in before:
        # VACUUM first: it must not find what OPTIMIZE has only now put aside.
        if request.vacuum:
            kept = pinned_files if shape.table in (SAMPLES, *_BY_ID) else set()
            report(_vacuum(spark, request, shape.table, doomed[shape.table], kept))
        if request.optimize:
            report(_optimize(spark, request, shape))
    if (request.optimize or request.vacuum) and not request.dry_run:
        for line in ("", *shape_lines([table_shape(spark, lake, table) for table in tables])):
            report(line)


def table_shape(spark: SparkSession, lake: Lake, table: str) -> TableShape:
    """Count and measure the files of a table, old ones included."""
    path = lake.path(table)
    current = {_name(file) for file in spark.read.format("delta").load(path).inputFiles()}
    on_disk = _files(spark, path).select("path", "length").collect()
    sizes = {_name(row["path"]): row["length"] for row in on_disk}
    # Paths of the listing: those that Delta gives are encoded as those of a URL.
    paths = {_name(row["path"]): row["path"] for row in on_disk if _name(row["path"]) in current}
    every = sorted(paths)
    sampled = every[:: -(-len(every) // _FOOTERS)] if every else []
    return TableShape(
        table=table,
        version=table_version(spark, path),
        sizes={name: sizes[name] for name in paths},
        folders={name: file.rpartition("/")[0] for name, file in paths.items()},
        old_sizes={name: size for name, size in sizes.items() if name not in current},
        group_rows=tuple(rows for name in sampled for rows in _row_groups(spark, paths[name])),
    )


def shape_lines(shapes: Sequence[TableShape]) -> list[str]:
    """The shapes as a table of text."""
    rows = [_LISTED, *(shape.cells() for shape in shapes)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_LISTED))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def hold_lines(holds: Sequence[Hold], shapes: Sequence[TableShape]) -> list[str]:
    """Which versions of the samples are kept, and by whom."""
    samples = next((shape for shape in shapes if shape.table == SAMPLES), None)
    lines = []
    for hold in holds:
        old = hold.files & samples.old_sizes.keys() if samples else set()
        here = old | (hold.files & samples.sizes.keys() if samples else set())
        if here:
            by = f"pin {hold.pin} of {hold.run}" if hold.pin else f"run {hold.run} ({hold.status})"
            lines.append(f"version {hold.version}: {by} reads {len(here):,} files, {len(old):,} of them old")
    return lines or ["no run is known to be pinned to these tables: --runs DIR names folders of runs to look into"]


def _doomed(spark: SparkSession, request: MaintainRequest, table: str) -> list[str]:
    """Paths that VACUUM would delete."""
    path = request.lake.path(table)
    text = table_properties(spark, path).get(RETENTION_PROPERTY, "")
    remembered = _days(text)
    if request.keep_us > remembered * DAY_US:
        raise DataCheckError(
            f"--keep {request.keep_us / DAY_US:g} days: {path} remembers for {remembered:g} days when a file left it, "
            f"and what it forgets is deleted; take at most that, or set '{RETENTION_PROPERTY}' = 'interval "
            f"{-(-request.keep_us // DAY_US)} days' with ALTER TABLE ... SET TBLPROPERTIES"
        )
    return [
        row[0]
        for row in spark.sql(f"VACUUM delta.`{path}` {_retain(request)} DRY RUN").collect()
        if row[0].endswith(".parquet")
    ]


def _held(doomed: Sequence[str], holds: Sequence[Hold]) -> list[tuple[Hold, frozenset[str]]]:
    names = frozenset(_name(path) for path in doomed)
    return [(hold, hold.files & names) for hold in holds if hold.files & names]


def _files_of_samples(spark: SparkSession, lake: Lake) -> set[str]:
    """Names of the files by encoded id that the newest samples name: they need not be those of the tables' newest."""
    found: set[str] = set()
    for table, name in _BY_ID.items():
        version = samples_version(spark, lake, name)
        if version is not None and lake.has(spark, table):
            there = spark.read.format("delta").option("versionAsOf", version).load(lake.path(table))
            found |= {_name(file) for file in there.inputFiles()}
    return found


def _refusal(path: str, held: Sequence[tuple[Hold, frozenset[str]]]) -> str:
    hold, files = held[0]
    others = f" (and {len(held) - 1} more runs theirs)" if len(held) > 1 else ""
    release = f"--unpin {hold.pin}" if hold.pin else "leave it out of --runs"
    return (
        f"{path}: VACUUM would delete {len(files):,} files of version {hold.version}, to which the run {hold.run} "
        f"({hold.status}) is pinned{others}; give a longer --keep, or --keep-pinned to delete only the other files, or "
        f"{release} once the run is not needed any more"
    )


def _optimize(spark: SparkSession, request: MaintainRequest, shape: TableShape) -> str:
    small: dict[str, int] = {}
    for name, size in shape.sizes.items():
        if size < MIN_FILE_BYTES:
            small[shape.folders[name]] = small.get(shape.folders[name], 0) + 1
    merging = [count for count in small.values() if count > 1]
    if request.dry_run or not merging:
        return f"{shape.table}: OPTIMIZE merges {sum(merging):,} small files of {len(merging):,} partitions"
    without_dictionaries(spark.read.format("delta").load(request.lake.path(shape.table)))
    metrics = spark.sql(f"OPTIMIZE delta.`{request.lake.path(shape.table)}`").collect()[0]["metrics"]
    return f"{shape.table}: OPTIMIZE made {metrics['numFilesAdded']:,} files of {metrics['numFilesRemoved']:,}"


def _vacuum(spark: SparkSession, request: MaintainRequest, table: str, doomed: Sequence[str], kept: set[str]) -> str:
    path = request.lake.path(table)
    deleted = [file for file in doomed if _name(file) not in kept]
    saved = f"; {len(doomed) - len(deleted):,} stay for the runs pinned to them" if len(deleted) < len(doomed) else ""
    if request.dry_run or not deleted:
        return f"{table}: VACUUM deletes {len(deleted):,} files older than {request.keep_us / DAY_US:g} days{saved}"
    inventory = ""
    if kept:
        # Only files of the inventory are looked at. Made anew of its rows: Delta wants every column nullable.
        files = [row for row in _files(spark, path).collect() if _name(row["path"]) not in kept]
        spark.createDataFrame(files, _INVENTORY).createOrReplaceTempView("deletable_files")
        inventory = "USING INVENTORY (SELECT path, length, isDir, modificationTime FROM deletable_files)"
    spark.sql(f"VACUUM delta.`{path}` {inventory} {_retain(request)}").collect()
    return f"{table}: VACUUM deleted {len(deleted):,} files older than {request.keep_us / DAY_US:g} days{saved}"


def _files(spark: SparkSession, path: str):  # type: ignore[no-untyped-def]
    """Data files below a table's folder, in the columns of VACUUM's inventory."""
    files = spark.read.format("binaryFile").option("recursiveFileLookup", True).option("pathGlobFilter", "*.parquet")
    millis = F.unix_millis("modificationTime")
    return files.load(literal_path(path)).select(
        "path", "length", F.lit(False).alias("isDir"), millis.alias("modificationTime")
    )


def _row_groups(spark: SparkSession, file: str) -> list[int]:
    with parquet_footer(spark, file) as footer:
        return [int(block.getRowCount()) for block in footer.getBlocks()]


def _days(interval: str) -> float:
    """Days of a table property such as 'interval 30 days'."""
    match = re.fullmatch(r"(?:interval\s+)?(\d+)\s+(minute|hour|day|week)s?", interval.strip().lower())
    return float(match[1]) * _UNIT_DAYS[match[2]] if match else _DEFAULT_RETENTION_DAYS


def _retain(request: MaintainRequest) -> str:
    return f"RETAIN {request.keep_us / _HOUR_US:.6f} HOURS"


def _name(path: str) -> str:
    return path.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """A run and the data files it is pinned to."""

    run: str
    """Its directory."""
    status: str
    """A run's as in config.json ('running' where it has not come to its end); a pin's is 'not finished'."""
    version: int
    """Version of the samples table."""
    files: frozenset[str]
    """Names, without folders: Delta gives every file a name of its own."""
    pin: str | None = None
    """Name of the pin, where that is how the run is known."""


def holds_of_runs(folders: Sequence[str]) -> list[Hold]:
    """What the runs below these folders are pinned to, by the manifests that jobs/train.py left.

    Raises:
        DataCheckError: there is no such folder, it holds no run (as where nothing is mounted), or a folder or a
            manifest cannot be read: then nobody knows what a run needs.
    """
    found: list[Hold] = []

    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, str(error.strerror)) from error

    for folder in folders:
        if not Path(folder).is_dir():
            raise DataCheckError(f"--runs {folder}: there is no such folder; name the folder of the run directories")
        seen = {os.path.realpath(folder)}
        num_before = len(found)
        for place, inside, _ in os.walk(folder, onerror=refuse, followlinks=True):
            # Checkpoints are many and hold no run. A link may lead to where we have been.
            paths = {name: os.path.realpath(f"{place}/{name}") for name in sorted(inside) if name != "checkpoints"}
            inside[:] = [name for name, path in paths.items() if path not in seen]
            seen |= set(paths.values())
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
        if len(found) == num_before:
            raise DataCheckError(
                f"--runs {folder}: holds no run of jobs/train.py at any depth; name the folder of the run directories, "
                "or leave --runs out if there is none yet"
            )
    return found


def holds_of_pins(spark: SparkSession, lake: Lake) -> list[Hold]:
    """What the pins in the lake hold.

    Raises:
        DataCheckError: a pin cannot be read.
    """
    found = []
    for path, text in json_texts(spark, lake.path(PINS)).items():
        version, files, raw = _parse(text, path)
        name = path.rpartition("/")[2].removesuffix(".json")
        found.append(Hold(run=f"{raw.get('run')}", status="not finished", version=version, files=files, pin=name))
    return found


def remove_pin(spark: SparkSession, lake: Lake, name: str) -> None:
    """Delete `<lake>/pins/<name>.json`.

    Raises:
        DataCheckError: there is none.
    """
    system, path = file_system(spark, f"{lake.path(PINS)}/{name}.json")
    if not system.delete(path, False):
        there = ", ".join(str(hold.pin) for hold in holds_of_pins(spark, lake)) or "none"
        raise DataCheckError(f"--unpin {name}: {lake.root} has no such pin; it has: {there}")


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
        files = [*raw["files"], *(file for table in _BY_ID for file in raw.get(table, ()))]
        paths = [file if isinstance(file, str) else file["path"] for file in files]
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
