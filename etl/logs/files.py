"""Find the files of each log, in a folder or where the configuration maps them. What is wrong is a DataCheckError here.

Every file below a log's folder, at whatever depth, is read or named in a refusal. Names are literal: only a mapping's
`path` may be a glob, and only where no file has that very name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession

from etl.checks import DataCheckError
from etl.jvm import file_system
from etl.logs.formats import Formats, renamed
from etl.logs.mapping import map_columns
from etl.logs.names import entry_of, format_of, missing
from etl.session import literal_path
from usr_ray.config import LogConfig

TEXT_FORMATS = ("csv", "json")


@dataclass(frozen=True, slots=True)
class Found:
    """Where the rows of a log are."""

    kind: str
    files: tuple[str, ...] = ()
    """All data files; of Delta none, as the table knows its own."""
    base: str = ""
    """Folder that they all lie in: `key=value` folders below it are columns. Of Delta: the table."""

    def __str__(self) -> str:
        if self.kind == "delta":
            return "a Delta table"
        return f"{len(self.files):,} {self.kind} file{'s' if len(self.files) != 1 else ''}"


class LogFolder:
    """The logs of one run: a folder (local, or any file system Hadoop knows) with one entry per log, or `mappings`."""

    def __init__(self, spark: SparkSession, root: str, mappings: Mapping[str, LogConfig] | None = None) -> None:
        self._spark = spark
        self._mappings = dict(mappings or {})
        self._root = root.rstrip("/") or "/"
        self._found: dict[str, Found] = {}
        self._formats = Formats(spark)
        self._asked: set[str] = set()
        self._told: list[str] = []
        entries = self._list(self._root)
        if entries is None:
            raise DataCheckError(f"--logs {root}: there is no such folder; run jobs/ingest_logs.py or name another one")
        self._entries = entries

    def has(self, log: str) -> bool:
        """True where the folder has an entry for the log, or the configuration maps it."""
        self._asked.add(log)
        return log in self._mappings or self._entry(log) is not None

    def source(self, log: str) -> str:
        """What was read of a log, such as '3 csv files'; '' where it was not."""
        return str(self._found.get(log, ""))

    def note(self, line: str) -> None:
        """Add what a reader has found in a log to the notes."""
        self._told.append(line)

    def note_unread(self, log: str, read: Collection[str]) -> None:
        """Note the columns that a log's mapping makes and nobody reads: `ingest = "got"` would be without effect.

        Args:
            read: names in the log (docs/own-logs.md), and features.
        """
        mapping = self._mappings.get(log, LogConfig())
        made = dict.fromkeys([*mapping.columns, *mapping.constants, *mapping.split, *mapping.decimal_comma])
        if unread := [name for name in made if name not in read]:
            self.note(
                f"log {log}: logs.{log} makes {', '.join(map(repr, unread))}, which nothing reads; read are "
                f"{', '.join(dict.fromkeys(read))}; correct the name, or name the feature in [features]"
            )

    def notes(self) -> list[str]:
        """What the user should know of the logs that were read: columns that some files lack, misspelt logs ..."""
        notes = [*self._formats.notes, *self._told]
        logs = {*self._found, *self._asked}
        read = {self._entry(log) for log in logs}
        for name in sorted(name for name in self._entries if name not in read and not self._mappings):
            meant = difflib.get_close_matches(name.partition(".")[0], logs, n=1, cutoff=0.8)
            if meant:
                notes.append(f"--logs {self._root} holds {name}, which no log reads; is it {meant[0]}?")
        return notes

    def read(self, log: str, columns: Iterable[str] = ()) -> tuple[DataFrame, str]:
        """The log's rows and its format: as they stand (text formats as strings throughout), or as they are mapped.

        Files may differ in columns and types as far as one type holds all values; names match whatever their case and
        the blanks around them.

        Args:
            columns: what the caller reads, by its names in the log (docs/own-logs.md).

        Raises:
            DataCheckError: the log is missing, empty, of no known format or of two, unreadable, not as mapped, or of
                files whose columns no one type can hold.
        """
        mapping = self._mappings.get(log)
        needed = _own_columns(columns, mapping)
        with readable(log):
            found = self._found.get(log) or self._find(log, mapping)
            self._found[log] = found
            if found.kind == "delta":
                table = self._spark.read.format("delta").load(found.base)
                raw = renamed(log, table, table.columns, needed)
            else:
                raw = self._formats.open(log, found.kind, found.files, found.base, mapping or LogConfig(), needed)
            return (map_columns(raw, log, mapping) if mapping else raw), found.kind

    def _find(self, log: str, mapping: LogConfig | None) -> Found:
        entry = (mapping and mapping.path) or self._entry(log)
        if entry is None:
            raise missing(log, self._root, self._entries)
        roots = self._matches(log, entry) if mapping and mapping.path else [f"{self._root}/{entry}"]
        asked = mapping.format if mapping else ""
        files: list[str] = []
        strange: list[str] = []
        kinds: set[str] = set()
        keys: dict[tuple[str, ...], str] = {}
        for root in roots:
            if asked in ("", "delta") and "_delta_log" in (self._list(root) or []):
                if len(roots) > 1:
                    raise DataCheckError(f"log {log}: {root} is a Delta table; name one table, got {len(roots)} paths")
                return Found("delta", base=root)
            for file, folders, name in self._below(root):
                kind = format_of(name)
                if any(part.startswith(("_", ".")) for part in (*folders, name)):
                    strange += [file] if kind else []
                    continue
                strange += [file] if not (kind or asked) else []
                kinds |= {kind} if kind else set()
                keys.setdefault(_partition_keys(folders), file)
                files.append(file)
        if asked == "delta":
            raise DataCheckError(f"log {log}: {roots[0]} is no Delta table; correct logs.{log}.path or its format")
        if strange or (len(kinds) != 1 and not (asked and files)):
            names = [*sorted(kinds), *(_name(file) for file in strange[:2])]
            raise DataCheckError(
                f"log {log}: {roots[0]} holds {', '.join(names) or 'no files'}; needed one of Parquet, Delta, CSV "
                "(.csv) or JSON lines (.jsonl, .json), and no other files; names that begin with _ or . are hidden"
            )
        if len(keys) > 1 or (len(roots) > 1 and any(keys)) or ("?",) in keys:
            shown = " and ".join(list(keys.values())[:2])
            raise DataCheckError(
                f"log {log}: {shown} lie in different key=value folders, so that one would lack the other's column; "
                f"put all files of the log into folders of the same keys, directly below {roots[0]}"
            )
        return Found(asked or kinds.pop(), tuple(sorted(files)), roots[0] if any(keys) else "")

    def _matches(self, log: str, entry: str) -> list[str]:
        """Paths that a mapping's file, folder or glob means."""
        is_whole = entry.startswith("/") or "://" in entry
        path = entry if is_whole else f"{self._root}/{entry}"
        system, hadoop = file_system(self._spark, path)
        if system.exists(hadoop):
            return [str(hadoop)]
        system, pattern = file_system(self._spark, entry if is_whole else f"{literal_path(self._root)}/{entry}")
        paths = [str(status.getPath()) for status in system.globStatus(pattern) or []]
        hidden = [p for p in paths if _name(p).startswith(("_", "."))]
        for name in map(_name, hidden):
            if format_of(name):
                raise DataCheckError(
                    f"log {log}: logs.{log}.path matches {name}, and names that begin with _ or . are hidden; no file "
                    "of them is read: rename it, or narrow the path"
                )
        paths = [p for p in paths if p not in hidden]
        if not paths:
            raise DataCheckError(
                f"log {log}: logs.{log}.path matches no file, looked for {path}; correct it, or the --logs above it"
            )
        return paths

    def _entry(self, log: str) -> str | None:
        return entry_of(log, self._root, self._entries)

    def _below(self, path: str) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Every file below a folder, or the file itself: its path, the folders between, its name."""
        system, hadoop = file_system(self._spark, path)
        start = str(system.makeQualified(hadoop))
        found = system.listFiles(hadoop, True)
        while found.hasNext():
            file = str(found.next().getPath())
            inside = file.removeprefix(start).strip("/").split("/")
            yield file, tuple(inside[:-1]), _name(file)

    def _list(self, path: str) -> list[str] | None:
        """Names in a folder; None where there is no such folder."""
        system, hadoop = file_system(self._spark, path)
        if not system.exists(hadoop) or not system.getFileStatus(hadoop).isDirectory():
            return None
        try:
            return [status.getPath().getName() for status in system.listStatus(hadoop)]
        except Py4JJavaError as error:
            raise DataCheckError(
                f"--logs {path}: cannot be read ({_cause(error)}); mend it or rename the file"
            ) from error


@contextmanager
def readable(log: str) -> Iterator[None]:
    """What Spark or Hadoop cannot read is one line, whether it shows when a log is opened or when its rows are read.

    Raises:
        DataCheckError: in the place of Spark's own error.
    """
    try:
        yield
    except (AnalysisException, PySparkException, Py4JJavaError) as error:
        text = str(error)
        is_read = "FAILED_READ_FILE" in text or "MALFORMED_CSV_RECORD" in text
        if log == ANY_LOG and not is_read:
            raise
        raise DataCheckError(f"log {log}: cannot be read as it stands: {_cause(error)}") from error


ANY_LOG = "(one of them)"
"""Stands for the log where rows of all logs are read at once: the message then names the file."""


def _cause(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("An error occurred while calling", "at ", "JVM stacktrace"))]
    return re.sub(r"^:\s*", "", (told or lines or [type(error).__name__])[0])[:300]


def _own_columns(columns: Iterable[str], mapping: LogConfig | None) -> list[str]:
    """The log's own names of these columns, and of all that a mapping names."""
    if mapping is None:
        return list(dict.fromkeys(columns))
    own = [name for name in columns if name not in mapping.constants and name not in mapping.columns]
    for names in mapping.columns.values():
        own += [names] if isinstance(names, str) else names
    own += [name for name in mapping.decimal_comma if name not in mapping.columns]
    return list(dict.fromkeys([*own, *mapping.where]))


def _partition_keys(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Keys of `key=value` folders; ('?',) where they stand below folders of another kind."""
    is_key = ["=" in folder for folder in folders]
    if not any(is_key):
        return ()
    return tuple(folder.partition("=")[0] for folder in folders) if all(is_key) else ("?",)


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
