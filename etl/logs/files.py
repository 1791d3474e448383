"""Find the logs in a folder and open them, whatever their format. What is wrong with a log is a DataCheckError here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession

from etl.checks import DataCheckError
from etl.jvm import data_files, file_system
from etl.logs.drift import check_same_columns
from etl.logs.mapping import map_columns
from etl.logs.parquet_times import first_schema, with_instants
from usr_ray.config import LogConfig

_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
_PACKED = (".gz", ".zst", ".bz2", ".snappy", ".lz4")
TEXT_FORMATS = ("csv", "json")


class LogFolder:
    """The logs of one run: a folder (local, or any file system Hadoop knows) with one entry per log, or `mappings`."""

    def __init__(self, spark: SparkSession, root: str, mappings: Mapping[str, LogConfig] | None = None) -> None:
        self._spark = spark
        self._mappings = dict(mappings or {})
        self._root = root.rstrip("/")
        self._entries = self._list(self._root)
        if self._entries is None:
            raise DataCheckError(f"--logs {root}: there is no such folder; run jobs/ingest_logs.py or name another one")

    def has(self, log: str) -> bool:
        """True where the folder has an entry for the log, or the configuration maps it."""
        return log in self._mappings or self._entry(log) is not None

    def read(self, log: str, columns: Iterable[str] = ()) -> tuple[DataFrame, str]:
        """The log's rows and its format: as they stand (text formats as strings throughout), or as they are mapped.

        Args:
            log: its name.
            columns: what the caller reads of it, by the contract's names: the same in all files of a Parquet log.

        Raises:
            DataCheckError: the log is missing, empty, of no known format or of two, unreadable, not as mapped, or of
                files that differ in a column.
        """
        mapping = self._mappings.get(log)
        entry = (mapping and mapping.path) or self._entry(log)
        if entry is None:
            there = ", ".join(sorted(self._entries or [])) or "nothing"
            raise DataCheckError(
                f"log {log}: is missing in {self._root}, which holds: {there}; add a folder or file {log}"
            )
        paths = self._matches(log, entry) if mapping and mapping.path else [f"{self._root}/{entry}"]
        kind = (mapping and mapping.format) or self._format(log, paths)
        try:
            if kind == "parquet":
                check_same_columns(self._spark, log, paths, _own_columns(columns, mapping))
            raw = self._open(paths, kind, mapping or LogConfig())
            return (map_columns(raw, log, mapping) if mapping else raw), kind
        except (AnalysisException, PySparkException, Py4JJavaError) as error:
            cause = str(error).strip().splitlines()[0][:300]
            raise DataCheckError(f"log {log}: cannot be read as {kind}: {cause}") from error

    def _matches(self, log: str, entry: str) -> list[str]:
        """Paths that a mapping's file, folder or glob means."""
        path = entry if entry.startswith("/") or "://" in entry else f"{self._root}/{entry}"
        system, hadoop = file_system(self._spark, path)
        found = system.globStatus(hadoop) or []
        paths = [str(s.getPath()) for s in found if not s.getPath().getName().startswith(("_", "."))]
        if not paths:
            raise DataCheckError(
                f"log {log}: logs.{log}.path matches no file, looked for {path}; correct it, or the --logs above it"
            )
        return paths

    def _open(self, paths: list[str], kind: str, mapping: LogConfig) -> DataFrame:
        reader = self._spark.read
        if kind == "csv":
            # RFC 4180: quotes are doubled, and a quoted field may hold line breaks and be of any length. Without
            # enforceSchema=False files whose columns stand in another order would be read as if they did not.
            return reader.csv(
                paths,
                header=True,
                sep=mapping.separator,
                encoding=mapping.encoding,
                escape='"',
                multiLine=True,
                maxCharsPerColumn=-1,
                inferSchema=False,
                enforceSchema=False,
            )
        if kind == "json":
            return reader.json(paths, primitivesAsString=True)
        schema = first_schema(self._spark, paths) if kind == "parquet" else None
        reader = reader if schema is None else reader.schema(schema)
        raw = reader.format(kind).load(paths[0] if len(paths) == 1 else paths)
        return with_instants(self._spark, raw, paths) if kind == "parquet" else raw

    def _entry(self, log: str) -> str | None:
        names = [n for n in self._entries or [] if n == log or (n.startswith(f"{log}.") and _suffix(n))]
        if len(names) > 1:
            raise DataCheckError(f"log {log}: {self._root} has {' and '.join(sorted(names))}; keep one of them")
        return names[0] if names else None

    def _format(self, log: str, paths: list[str]) -> str:
        files: list[str] = []
        for path in paths:
            inside = self._list(path)
            if inside and "_delta_log" in inside:
                return "delta"
            files += [path.rpartition("/")[2]] if inside is None else self._files(path)
        kinds = {kind for name in files if (kind := _suffix(name))}
        if len(kinds) == 1:
            return kinds.pop()
        found = ", ".join(sorted(kinds)) or (files[0] if files else "no files")
        raise DataCheckError(
            f"log {log}: {paths[0]} holds {found}; needed one of Parquet, Delta, CSV (.csv) or JSON lines "
            "(.jsonl, .json)"
        )

    def _files(self, path: str) -> list[str]:
        """Names of a folder's data files, those of its partition folders included; a few are enough."""
        return [file.getName() for file in itertools.islice(data_files(self._spark, path), 1000)]

    def _list(self, path: str) -> list[str] | None:
        """Names in a folder; None where there is no such folder."""
        system, hadoop = file_system(self._spark, path)
        if not system.exists(hadoop) or not system.getFileStatus(hadoop).isDirectory():
            return None
        return [status.getPath().getName() for status in system.listStatus(hadoop)]


def _own_columns(columns: Iterable[str], mapping: LogConfig | None) -> set[str]:
    """The log's own names of these columns, and of those that a mapping filters by."""
    if mapping is None:
        return set(columns)
    own = [mapping.columns.get(name, name) for name in columns if name not in mapping.constants]
    return {name for names in own for name in ([names] if isinstance(names, str) else names)} | set(mapping.where)


def _suffix(name: str) -> str | None:
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)
