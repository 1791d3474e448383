"""The files and row groups of one pinned version of a samples table, under one hash.

A manifest fixes what a run reads. It names every file, its row groups and their row counts, so that training needs
neither the Delta log nor the package `deltalake` again, and a checkpoint can say exactly which rows it has seen.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from usr_ray.config import DAY_US, SHOWN_RANGES, UserError, check_table_address, date_ranges, dates_there
from usr_ray.config.stored import DATES, misfit, read_json
from usr_ray.data.parts import DataFile, FeatureFile, RowGroup, RowGroupRef
from usr_ray.files import one_line, whole_line, write_whole
from usr_ray.schema import (
    ALL_LABELS,
    CONFIG_PROPERTY,
    COUNTERS,
    FEATURE_SPEC_PROPERTY,
    FITTED_PROPERTY,
    ITEM_FEATURES,
    ITEM_FEATURES_PROPERTY,
    NULLS_PROPERTY,
    PARTITION_COLUMN,
    SAMPLES,
    VECTOR_TABLES,
    VECTORS_PROPERTIES,
    VOCABULARIES,
    FeatureSpec,
)

FORMAT = 1
"""Format version of the JSON file; another is refused."""
_BY_ID = (ITEM_FEATURES, *VECTOR_TABLES.values())
"""Tables by encoded id, and where a manifest has their files."""
_FOOTER_THREADS = 16
REBUILD = "rebuild its date with jobs/build_samples.py"
STORE_HINT = "check the address, and the store's keys and endpoint in the environment (docs/cluster.md, object stores)"
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class DataError(UserError):
    """A samples table that cannot be used: one line naming the file and, where known, the row group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a run reads. Files are sorted by (date, path); a row's number is its position in that order."""

    table_uri: str
    version: int
    spec: FeatureSpec
    files: tuple[DataFile, ...]
    built_with: str
    """Configuration keys that decide what a row means, as JSON (schema.CONFIG_PROPERTY); '' where not known."""
    item_features: tuple[FeatureFile, ...]
    """Files of the version of `<lake>/item_features` that belongs to the rows; none where `spec` names none."""
    user_vectors: tuple[FeatureFile, ...] = ()
    """Files of `<lake>/user_vectors`, where `spec` names vectors of users."""
    item_vectors: tuple[FeatureFile, ...] = ()
    fitted: str = ""
    """What vocabularies and scales were fitted on, as JSON (schema.FITTED_PROPERTY); '' where not known."""
    sha256: str
    """Digest of all that fixes the order of rows; not of table_uri (a copy of the table reads alike) or version."""

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(group.num_rows for file in self.files for group in file.row_groups)

    @property
    def dates(self) -> tuple[str, ...]:
        """Dates that have files, ascending."""
        return tuple(sorted({file.date for file in self.files}))

    def row_groups(self) -> Iterator[RowGroupRef]:
        """Every row group in the order of the row numbers."""
        first_row = 0
        for position, file in enumerate(self.files):
            for index, group in enumerate(file.row_groups):
                yield RowGroupRef(file=position, index=index, first_row=first_row, row_group=group)
                first_row += group.num_rows

    def save(self, path: Path | str) -> None:
        """Write the manifest as JSON, whole or not at all."""
        raw = {"format": FORMAT, **dataclasses.asdict(self), "spec": json.loads(self.spec.to_json())}
        write_whole(Path(path), json.dumps(raw, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Manifest:
        """Read a manifest written by `save`, without Delta. UserError: there is none, or it was changed by hand."""
        raw = read_json(Path(path), {}, way_out="build it again from the lake")
        try:
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']}, this version reads {FORMAT}")
            for key, shape in (("built_with", {}), ("fitted", {"dates": DATES, "min_count": int})):
                if problem := misfit(json.loads(raw.get(key) or "null"), (shape, None), key):
                    raise ValueError(problem)
            manifest = make_manifest(
                table_uri=raw["table_uri"],
                version=raw["version"],
                spec=FeatureSpec.from_json(json.dumps(raw["spec"])),
                built_with=raw.get("built_with", ""),
                fitted=raw.get("fitted", ""),
                files=[
                    DataFile(**f | {"row_groups": tuple(RowGroup(**g) for g in f["row_groups"])}) for f in raw["files"]
                ],
                by_id={name: [FeatureFile(**file) for file in raw.get(name, [])] for name in _BY_ID},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"manifest {path}: not a manifest ({error}); build it again from the lake") from error
        if manifest.sha256 != raw.get("sha256"):
            raise UserError(f"manifest {path}: its hash does not match its files; build it again from the lake")
        return manifest


def make_manifest(
    *,
    table_uri: str,
    version: int,
    spec: FeatureSpec,
    files: list[DataFile],
    by_id: Mapping[str, Sequence[FeatureFile]] | None = None,
    built_with: str = "",
    fitted: str = "",
) -> Manifest:
    """A manifest of these files, sorted by (date, path) and hashed; `by_id`: of the tables that go by encoded id."""
    ordered = tuple(sorted(files, key=lambda file: (file.date, file.path)))
    others = {name: tuple(sorted(found, key=lambda file: file.path)) for name, found in (by_id or {}).items()}
    fixed: list[Any] = [FORMAT, [dataclasses.asdict(file) for file in ordered]]
    if others.get(ITEM_FEATURES):
        fixed.append([dataclasses.asdict(file) for file in others[ITEM_FEATURES]])
    for name in VECTOR_TABLES.values():
        if others.get(name):
            fixed.append({name: [dataclasses.asdict(file) for file in others[name]]})
    sha256 = hashlib.sha256(json.dumps(fixed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return Manifest(
        table_uri=table_uri,
        version=version,
        spec=spec,
        files=ordered,
        built_with=built_with,
        fitted=fitted,
        item_features=others.get(ITEM_FEATURES, ()),
        user_vectors=others.get(VECTOR_TABLES["user"], ()),
        item_vectors=others.get(VECTOR_TABLES["item"], ()),
        sha256=sha256,
    )


def model_columns(spec: FeatureSpec) -> dict[str, str]:
    """Every column that training reads, with its Delta type, in reading order; arrays as 'array<long>'."""
    columns = dict.fromkeys(ALL_LABELS, "float")
    columns |= {"is_mature": "boolean", "event_time": "timestamp", "scenario_index": "long"}
    columns |= {feature.column: "long" for feature in spec.sparse}
    columns |= {f.column: "float" for f in spec.dense} | {f.column: "array<long>" for f in spec.lists}
    for history in spec.histories:
        columns |= {history.item_ids: "array<long>", history.actions: "array<long>", history.ages_s: "array<float>"}
        if history.query_ids:
            columns[history.query_ids] = "array<long>"
    return columns | {"user_key": "long", "request_key": "long"}


def build_manifest(
    lake: Path | str,
    *,
    dates: tuple[dt.date, dt.date] | None,
    version: int | None = None,
    where: str = "--dates",
    allow_missing: bool = False,
    warmup_days: int = 0,
) -> Manifest:
    """The manifest of some dates, or of all, of `<lake>/samples`.

    Args:
        lake: folder, or URI that both Delta and Arrow can open.
        dates: first and last impression_date, both included; None: all that are there.
        version: of the Delta table; None: the newest.
        where: what names the dates, for messages.
        allow_missing: where some of the dates have no rows, print a warning and take the others.
        warmup_days: days to leave out (counters.warmup_days) from the first counted one on; of a lake without
            counters, from the table's first. Those among `dates` are printed.

    Raises:
        UserError: no table or version there, no files in these dates, or none in some of them.
        DataError: a table that would be read wrong (deletion vectors), is not understood, or lacks a file or column.
    """
    table_uri = table_address(lake, SAMPLES)
    table = open_table(table_uri, version)
    about = _about(table, table_uri)
    adds = pa.table(table.get_add_actions(flatten=True))
    days = adds.column(f"partition.{PARTITION_COLUMN}").to_pylist()
    first, last = dates or (dt.date.min, dt.date.max)
    known = {day for day in days if day is not None}
    begin = warmup_days and first_counted_date(lake)
    counted = dt.date.fromisoformat(begin) if begin else min(known, default=first)
    start = max(first, counted + dt.timedelta(days=warmup_days)) if warmup_days else first
    chosen = [n for n, day in enumerate(days) if day is not None and start <= day <= last]
    if not chosen:
        held = date_ranges([*map(str, known)], most=SHOWN_RANGES)
        span = f"the table holds {held}" if held else "the table is empty"
        span += f", and counters.warmup_days leaves out those before {start}" if start > first else ""
        raise UserError(f"{table_uri}: no rows in {first}:{last}; {span}: build these dates or choose others")
    names, sizes = adds.column("path").to_pylist(), adds.column("size_bytes").to_pylist()
    _refuse_deletion_vectors(table, table_uri, [names[n] for n in chosen])
    counts = adds.column("num_records").to_pylist() if "num_records" in adds.column_names else [None] * len(names)
    filesystem, table_path = open_filesystem(table_uri)

    def footer(n: int) -> DataFile:
        return read_footer(filesystem, table_path, names[n], date=days[n], size_bytes=sizes[n], num_rows=counts[n])

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        files = [file for file in pool.map(footer, chosen) if file.row_groups]
    if not files:
        raise UserError(f"{table_uri}: no rows in {first}:{last}; its files of these dates are empty")
    there = {str(day) for day in known if not start <= day <= last} | {f.date for f in files}
    source = f"the table {table_uri} holds"
    if dates and (warning := dates_there(dates, there, where=where, source=source, allow_missing=allow_missing)[1]):
        print(f"warning: {warning}", flush=True)
    if cold := [str(day) for day in known if first <= day < start]:
        print(f"{where}: counters.warmup_days = {warmup_days} leaves out {date_ranges(cold)}", flush=True)
    spec: FeatureSpec = about["spec"]
    wanted = {VECTOR_TABLES[vector.owner]: VECTORS_PROPERTIES[vector.owner] for vector in spec.vectors}
    if spec.history_item_features:
        wanted[ITEM_FEATURES] = ITEM_FEATURES_PROPERTY
    by_id = {name: _files_by_id(table, lake, name, version_in) for name, version_in in wanted.items()}
    return make_manifest(**about, files=files, by_id=by_id)


def _files_by_id(table: Any, lake: Path | str, name: str, version_in: str) -> list[FeatureFile]:
    """The files of the version of a table by encoded id that belongs to a version of the samples."""
    wanted = table.metadata().configuration.get(version_in, "")
    if not wanted.isdecimal():
        what = "categories of history events" if name == ITEM_FEATURES else "vectors"
        raise DataError(
            f"{table_address(lake, SAMPLES)}: the table property {version_in} is missing, though the "
            f"feature spec names {what}; rebuild the newest date with jobs/build_samples.py"
        )
    adds = pa.table(open_table(table_address(lake, name), int(wanted)).get_add_actions(flatten=True))
    pairs = zip(adds.column("path").to_pylist(), adds.column("size_bytes").to_pylist(), strict=True)
    return [FeatureFile(path=path, size_bytes=size) for path, size in pairs]


def open_samples(lake: Path | str) -> Manifest:
    """The newest version of `<lake>/samples` without its files: what a model is compared with. Raises UserError."""
    uri = table_address(lake, SAMPLES)
    return make_manifest(**_about(open_table(uri, None), uri), files=[])


def _about(table: Any, table_uri: str) -> dict[str, Any]:
    return {
        "table_uri": table_uri,
        "version": table.version(),
        "spec": _check_table(table, table_uri),
        "built_with": table.metadata().configuration.get(CONFIG_PROPERTY, ""),
        "fitted": table.metadata().configuration.get(FITTED_PROPERTY, ""),
    }


def null_values(manifest: Manifest) -> dict[str, list[str]]:
    """Log -> its `null_values`, as the newest build of the samples had them. Raises UserError: the table is gone."""
    table = open_table(manifest.table_uri, manifest.version)
    return dict(json.loads(table.metadata().configuration.get(NULLS_PROPERTY, "{}")))


def first_counted_date(lake: Path | str) -> str | None:
    """The first date of the events in `<lake>/counters`, ISO; None: the lake has no such table, or an empty one."""
    try:
        adds = pa.table(open_table(table_address(lake, COUNTERS), None).get_add_actions(flatten=True))
    except UserError:  # a copy of the samples alone can be trained on
        return None
    first = pc.min(adds.column("partition.event_date")).as_py() if len(adds) else None
    return None if first is None else str(first)


def read_vocabularies(lake: Path | str, feature: str | None = None) -> pa.Table:
    """Columns feature, value (string) and id (int64) of `<lake>/vocabularies`, of one feature or of all.

    Raises:
        UserError: there is none.
    """
    table = open_table(table_address(lake, VOCABULARIES), None)
    filters = None if feature is None else [("feature", "=", feature)]
    return table.to_pyarrow_table(columns=["feature", "value", "id"], filters=filters)


def open_table(table_uri: str, version: int | None) -> Any:
    """The DeltaTable at an address, its newest version with None. Raises UserError."""
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError
    except ImportError as error:
        raise UserError(
            "the package deltalake is not installed here: install usr-ray[train] or use a manifest file built elsewhere"
        ) from error
    try:
        return DeltaTable(table_uri, version=version)
    except TableNotFoundError as error:
        raise UserError(
            f"--lake: no Delta table at {table_uri}; run jobs/build_samples.py on this lake first"
        ) from error
    except (DeltaError, OSError) as error:
        at = "" if version is None else f" at version {version}"
        hint = f"; {STORE_HINT}" if "://" in table_uri else ""
        raise UserError(f"{table_uri}: the Delta table cannot be opened{at} ({whole_line(error)}){hint}") from error


def _check_table(table: Any, table_uri: str) -> FeatureSpec:
    """Refuse what would silently be read wrong; return the table's feature spec."""
    properties = table.metadata().configuration
    mode = properties.get("delta.columnMapping.mode", "none")
    if mode != "none":
        # Files then hold physical names; read by logical name every column would come back all null.
        raise DataError(
            f"{table_uri}: delta.columnMapping.mode is {mode!r}, which is not read here; rewrite the table without it"
        )
    if PARTITION_COLUMN not in table.metadata().partition_columns:
        raise DataError(f"{table_uri}: not partitioned by {PARTITION_COLUMN}; build it with jobs/build_samples.py")
    if FEATURE_SPEC_PROPERTY not in properties:
        raise DataError(
            f"{table_uri}: the table property {FEATURE_SPEC_PROPERTY} is missing, so the model's inputs are unknown; "
            "build the table with jobs/build_samples.py"
        )
    try:
        spec = FeatureSpec.from_json(properties[FEATURE_SPEC_PROPERTY])
    except ValueError as error:
        raise DataError(
            f"{table_uri}: the table property {FEATURE_SPEC_PROPERTY} cannot be read ({one_line(error)}); "
            "build the table with this version of jobs/build_samples.py"
        ) from error
    found = {field["name"]: _type_name(field["type"]) for field in json.loads(table.schema().to_json())["fields"]}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, needed {needed}"
        for name, needed in model_columns(spec).items()
        if found.get(name) != needed
    ]
    if wrong:
        raise DataError(f"{table_uri}: wrong columns: {'; '.join(wrong)}; rebuild the table with jobs/build_samples.py")
    return spec


def _type_name(delta_type: Any) -> str:
    if isinstance(delta_type, dict):
        inner = f"<{_type_name(delta_type['elementType'])}>" if delta_type["type"] == "array" else ""
        return f"{delta_type['type']}{inner}"
    return str(delta_type)


def _refuse_deletion_vectors(table: Any, table_uri: str, names: list[str]) -> None:
    """File lists ignore deletion vectors, so deleted rows would be trained on."""
    if "deletionVectors" not in (table.protocol().reader_features or []):
        return
    reason = ""
    try:
        marked = [str(path) for path in pa.table(table.deletion_vectors()).column("filepath").to_pylist()]
    except Exception as error:  # a vector that cannot be decoded is still a vector in use
        marked, reason = names, f" ({one_line(error)})"
    found = [name for name in names if any(path.endswith(name) for path in marked)]
    if found:
        raise DataError(
            f"{table_uri}: deletion vectors are in use, for example on {found[0]}{reason}, and are not read here; run "
            "REORG TABLE ... APPLY (PURGE) on the table"
        )


def table_address(lake: Path | str, table: str) -> str:
    """Where a table of the lake is: a whole path, or `<lake>/<table>` of an object store's address, as it was written.

    Raises:
        UserError: see check_table_address.
    """
    text = str(lake)
    check_table_address(text, flag="--lake")
    if "://" not in text:
        return str((Path(text) / table).resolve())
    return f"{text.rstrip('/')}/{table}"


def open_filesystem(table_uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a table and the table's path in it: a local path, or an address in an object store.

    Keys, region and endpoint come from the environment or from the machine's role, never from the address.

    Raises:
        UserError: Arrow knows no such kind of address, or the store refuses.
    """
    if "://" not in table_uri:
        return pafs.LocalFileSystem(), table_uri
    try:
        # Spark's name for S3 is s3a; a table has one address on both sides.
        return pafs.FileSystem.from_uri(re.sub("^s3a://", "s3://", table_uri))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{table_uri}: cannot be reached ({whole_line(error)}); {STORE_HINT}") from error


def join_path(table_path: str, path: str) -> str:
    """Path of a table's file: `path` itself if absolute, as a shallow clone names it.

    Raises:
        DataError: the path climbs out of the table.
    """
    if ".." in path.split("/"):
        raise DataError(f"{table_path}: its log names the file {path!r}, which is outside of the table; {REBUILD}")
    return path if path.startswith("/") else f"{table_path.rstrip('/')}/{path}"


def read_footer(
    filesystem: pafs.FileSystem, table_path: str, path: str, *, date: dt.date, size_bytes: int, num_rows: int | None
) -> DataFile:
    """Read the footer of one file.

    Args:
        table_path: as `open_filesystem` gives it.
        path: the file's, as in the Delta log.
        date: its rows' impression_date.
        num_rows: as in the Delta log; None where it has no statistics.

    Raises:
        DataError: the file is missing, has another size or row count than the log says, or is no Parquet file.
    """
    full = join_path(table_path, path)
    try:
        info = filesystem.get_file_info(full)
    except OSError as error:
        raise DataError(f"{full}: cannot be reached ({whole_line(error)}); {STORE_HINT}") from error
    if info.type != pafs.FileType.File:
        raise DataError(
            f"{full}: the file is missing, though the table's log names it; it was deleted or vacuumed: {REBUILD}"
        )
    if info.size != size_bytes:
        raise DataError(
            f"{full}: the file has {info.size} bytes, the table's log says {size_bytes}; it is cut short or was "
            f"replaced: copy it again or {REBUILD}"
        )
    try:
        with pq.ParquetFile(full, filesystem=filesystem, coerce_int96_timestamp_unit="us") as file:
            groups = tuple(_row_group(file, n, date) for n in range(file.metadata.num_row_groups))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{full}: not a readable Parquet file ({one_line(error)}); {REBUILD}") from error
    found = sum(group.num_rows for group in groups)
    if num_rows is not None and found != num_rows:
        raise DataError(
            f"{full}: the footer counts {found} rows, the table's log {num_rows}; the file was replaced: {REBUILD}"
        )
    return DataFile(
        path=path,
        date=date.isoformat(),
        size_bytes=size_bytes,
        row_groups=tuple(group for group in groups if group.num_rows),
    )


def _row_group(file: pq.ParquetFile, index: int, date: dt.date) -> RowGroup:
    metadata = file.metadata.row_group(index)
    columns = {metadata.column(n).path_in_schema: n for n in range(metadata.num_columns)}
    event_time = _min_max(metadata.column(columns["event_time"]).statistics)
    is_mature = _min_max(metadata.column(columns["is_mature"]).statistics)
    day_start_us = (date - _EPOCH.date()).days * DAY_US
    low, high = (
        (_microseconds(event_time[0]), _microseconds(event_time[1]))
        if event_time and isinstance(event_time[0], dt.datetime)
        else (day_start_us, day_start_us + DAY_US - 1)  # INT96 has no statistics; the date bounds the time
    )
    if is_mature is None and metadata.num_rows:
        column = file.read_row_group(index, columns=["is_mature"]).column("is_mature")
        is_mature = (None, pc.any(column).as_py())
    return RowGroup(
        num_rows=metadata.num_rows,
        num_bytes=metadata.total_byte_size,
        min_event_time_us=low,
        max_event_time_us=high,
        has_mature=bool(is_mature and is_mature[1]),
    )


def _min_max(statistics: Any) -> tuple[Any, Any] | None:
    return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None


def _microseconds(time: dt.datetime) -> int:
    aware = time if time.tzinfo else time.replace(tzinfo=dt.UTC)
    return (aware - _EPOCH) // dt.timedelta(microseconds=1)
