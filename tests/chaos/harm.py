"""What can be done to files: a samples table harmed in the ways that happen, a full disk, torn checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_BLOCK = b"\0" * 65536
_ROWS_3_AND_5 = "^Bg9^0rr910000000000iXQKl0rr91000315c8Xg0@@G8"
"""An inline deletion vector of the Delta protocol: Z85 of a portable roaring bitmap array, 36 bytes."""


def fill(filler: Path) -> None:
    """Grow `filler` until its storage refuses a single byte more."""
    with filler.open("wb", buffering=0) as file:
        for block in (_BLOCK, b"\0"):
            with contextlib.suppress(OSError):
                while True:
                    file.write(block)


def truncate(table: Path, name: str) -> None:
    """A data file that lost its second half: a copy that was cut off."""
    os.truncate(table / name, (table / name).stat().st_size // 2)


def empty(table: Path, name: str) -> None:
    """A data file of no bytes."""
    os.truncate(table / name, 0)


def remove(table: Path, name: str) -> None:
    """A data file that is gone: vacuumed too early, or deleted."""
    (table / name).unlink()


def change_file_schema(table: Path, name: str) -> None:
    """A data file written again with a column of another type, behind the table's back."""
    content = pq.ParquetFile(table / name).read()
    at = content.schema.get_field_index("is_click")
    changed = content.set_column(at, "is_click", content.column(at).cast(pa.int32()))
    pq.write_table(changed, table / name)


def garble(table: Path, name: str) -> None:
    """A data file of the right size whose content was overwritten: a failing disk."""
    size = (table / name).stat().st_size
    with (table / name).open("r+b") as file:
        file.seek(size // 4)
        file.write(b"\xa5" * (size // 4))


def change_table_schema(table: Path, name: str) -> None:
    """A new version whose schema calls a number column a string: ALTER TABLE by someone else."""

    def change(action: dict[str, Any]) -> None:
        if "metaData" in action:
            schema = json.loads(action["metaData"]["schemaString"])
            for field in schema["fields"]:
                if field["name"] == "user_key":
                    field["type"] = "string"
            action["metaData"]["schemaString"] = json.dumps(schema)

    _commit(table, _current(table, change))


def map_columns(table: Path, name: str) -> None:
    """A new version with column mapping switched on: from now on files may hold other names than the table's."""

    def change(action: dict[str, Any]) -> None:
        if "protocol" in action:
            action["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
        if "metaData" in action:
            action["metaData"]["configuration"]["delta.columnMapping.mode"] = "name"
            schema = json.loads(action["metaData"]["schemaString"])
            for number, field in enumerate(schema["fields"], 1):
                mapped = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": field["name"]}
                field["metadata"] = mapped
            action["metaData"]["schemaString"] = json.dumps(schema)

    _commit(table, _current(table, change))


def delete_rows(table: Path, name: str) -> None:
    """A new version with a deletion vector: rows that are deleted, although the file still holds them."""
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}

    def change(action: dict[str, Any]) -> None:
        if "protocol" in action:
            action["protocol"] = {"minReaderVersion": 3, "minWriterVersion": 7, **features}

    add = next(a["add"] for a in _actions(table) if a.get("add", {}).get("path") == name)
    vector = {"storageType": "i", "pathOrInlineDv": _ROWS_3_AND_5, "sizeInBytes": 36, "cardinality": 2}
    head = [action for action in _current(table, change) if "protocol" in action]
    removed = {"path": name, "dataChange": True, "deletionTimestamp": 0, "partitionValues": add["partitionValues"]}
    _commit(table, [*head, {"remove": removed}, {"add": add | {"deletionVector": vector}}])


def advance_table(table: Path) -> None:
    """A new version without the rows of one file: somebody rebuilt a date while the run was on. The file stays."""
    adds = [action["add"] for action in _actions(table) if "add" in action]
    last = sorted(adds, key=lambda add: add["path"])[0]
    removed = {key: last[key] for key in ("path", "partitionValues", "size") if key in last}
    _commit(table, [{"remove": {**removed, "dataChange": True, "deletionTimestamp": 0}}])


def tear_checkpoints(folder: Path) -> list[str]:
    """Tear the three newest checkpoints in three ways; their names, newest first."""
    newest = sorted((p for p in folder.iterdir() if p.name.startswith("step-")), reverse=True)[:3]
    tensors = newest[0] / "tensors.safetensors"
    os.truncate(tensors, tensors.stat().st_size // 2)
    (newest[1] / "state.json").unlink()
    sums = newest[2] / "SHA256SUMS"
    sums.write_text(sums.read_text(encoding="utf-8").replace("a", "b"), encoding="utf-8")
    return [path.name for path in newest]


def tear_snapshots(folder: Path) -> int:
    """Cut what Ray and we keep of each attempt in `folder`, as a crash in the midst of a write in place does; how many.

    Ray writes its snapshot when it is handed checkpoints. Ours are our own, so there is none: a torn one is put there.
    """
    for attempt in folder.iterdir():
        (attempt / "checkpoint_manager_snapshot.json").write_text('{"version": 1, "checkpoint_results": [{"metr')
    files = [path for path in folder.rglob("*.json") if path.is_file()]
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    return len(files)


def copy_lake(lake: Path, to: Path) -> Path:
    """A copy of the samples table, to be harmed."""
    shutil.copytree(lake / "samples", to / "samples")
    return to


def first_file(lake: Path) -> str:
    """Path, relative to the table, of the file whose rows come first."""
    return sorted(action["add"]["path"] for action in _actions(lake / "samples") if "add" in action)[0]


HARMS: dict[str, Callable[[Path, str], None]] = {
    "truncated": truncate,
    "zero-byte": empty,
    "missing": remove,
    "changed-schema": change_file_schema,
    "garbled": garble,
    "changed-table-schema": change_table_schema,
    "column-mapping": map_columns,
    "deletion-vectors": delete_rows,
}


def _log(table: Path) -> list[Path]:
    return sorted((table / "_delta_log").glob("*.json"))


def _actions(table: Path) -> list[dict[str, Any]]:
    lines = [line for path in _log(table) for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines if line.strip()]


def _current(table: Path, change: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """The newest protocol and metadata of the table, changed."""
    newest: dict[str, dict[str, Any]] = {}
    for action in _actions(table):
        newest |= {kind: action for kind in ("protocol", "metaData") if kind in action}
    for action in newest.values():
        change(action)
    return list(newest.values())


def _commit(table: Path, actions: list[dict[str, Any]]) -> None:
    """Append a version to the table's log, as any Delta writer does."""
    version = int(_log(table)[-1].stem) + 1
    info = {"commitInfo": {"operation": "chaos", "timestamp": 0}}
    lines = [json.dumps(action) + "\n" for action in [info, *actions]]
    (table / "_delta_log" / f"{version:020d}.json").write_text("".join(lines), encoding="utf-8")
