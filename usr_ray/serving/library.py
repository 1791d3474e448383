"""A run and a samples table as objects of a notebook or a program: what `import usr_ray` names (docs/library.md)."""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from usr_ray.config import Config, UserError, parse_dates
from usr_ray.data.decode import RowGroupDecoder, table_to_batch
from usr_ray.data.lineage import built_with, difference
from usr_ray.data.manifest import Manifest, build_manifest, make_manifest, model_columns, read_vocabularies
from usr_ray.data.mature import WhichRows
from usr_ray.evaluation.files import read_metrics
from usr_ray.files import one_line
from usr_ray.model.usr import UsrModel
from usr_ray.runs.evaluations import METRICS_FILE, read_record
from usr_ray.schema import ALL_LABELS, CONFIG_PROPERTY, FEATURE_SPEC_PROPERTY, FeatureSpec
from usr_ray.serving.check import training_probabilities
from usr_ray.serving.model import GLOBAL_PROBABILITIES, PROBABILITIES
from usr_ray.serving.score import probability_columns
from usr_ray.training.evaluate import TrainedRun, check_whole, known_ids
from usr_ray.training.evaluate import load_run as load_trained

_ARROW = {
    "long": pa.int64(),
    "float": pa.float32(),
    "array<long>": pa.list_(pa.int64()),
    "array<float>": pa.list_(pa.float32()),
}
_NOT_LOOKED_AT = ("is_mature", "event_time")
"""Columns of training that say which rows count; every row is scored."""
_NOT_READ = (*ALL_LABELS, "user_key", "request_key")
"""Columns of a batch that no probability depends on."""
_MEANING = (FEATURE_SPEC_PROPERTY, CONFIG_PROPERTY, "usr_ray.table_uri")
"""Keys of a schema's metadata: the table's FeatureSpec, Manifest.built_with and Manifest.table_uri."""

# A process that was forked from one that has computed has no threads left for torch, and would wait for them for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@dataclass(frozen=True, slots=True)
class Run:
    """A trained run; made by `load_run`."""

    path: Path
    trained: TrainedRun

    @property
    def config(self) -> Config:
        """The configuration that the run was trained with."""
        return self.trained.config

    @property
    def spec(self) -> FeatureSpec:
        """Features and scenarios of the table that it was trained on."""
        return self.trained.spec

    @property
    def model(self) -> UsrModel:
        """The dense part, in evaluation mode on the CPU; the embedding tables are `trained.tables`."""
        return self.trained.module

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json: split -> scenario -> task -> metric; empty for a run without held-out dates."""
        path = self.path / METRICS_FILE
        return read_metrics(path) if path.is_file() else {}

    @property
    def vocabularies(self) -> pa.Table:
        """Columns feature, value (string) and id (int64) of the lake that the run was trained on.

        Raises:
            UserError: that lake is not where it was; config.json is damaged.
        """
        table = read_record(self.path, "table")["table"]["uri"]
        return read_vocabularies(table.rpartition("/")[0])

    def score(self, frame: Any) -> pa.Table:
        """Probabilities of rows of a samples table, in their order.

        Args:
            frame: an Arrow table, a pandas data frame, or what else is a table to Arrow (polars), with the model's
                columns of a samples table of the lake that the run was trained on (docs/tables.md), as `open_samples`
                gives them. Further columns, such as labels, are not read.

        Returns:
            Columns p_ctr and p_ctcvr, and with global heads p_ctr_global and p_ctcvr_global; float32. Those
            of orders are null in scenarios whose orders nobody logs (labels.no_order_scenarios).

        Raises:
            UserError: no table; a column is missing, there twice, or of another type; the run was trained on one
                scenario alone; or the rows say (`open_samples`, Arrow) that they are of a lake whose columns or ids
                mean something else.
            DataError: a value that the table never holds.
        """
        check_whole(self.trained, f"run.score: {self.path}")
        _check_rows(frame, self.trained)
        # Ids that the vocabularies have gained since the training are allowed here, and unknown to the model.
        limits = self.trained.tables.num_rows()
        open_ended = replace(
            self.spec,
            sparse=tuple(replace(f, num_embeddings=2**31) for f in self.spec.sparse),
            lists=tuple(replace(f, num_embeddings=2**31) for f in self.spec.lists),
        )
        table = _model_table(frame, self.spec)
        if not table.num_rows:
            names = (*PROBABILITIES, *(GLOBAL_PROBABILITIES if self.config.model.multitask.enabled else ()))
            return pa.table({name: pa.array([], pa.float32()) for name in names})
        batch = table_to_batch(table, open_ended, where="run.score", first_row=0)
        batch = known_ids(batch, self.spec, limits)
        with torch.inference_mode():
            outputs = self.model(batch.count_longest(), self.trained.tables.lookup(batch))
        return pa.table(probability_columns(training_probabilities(outputs), batch.scenario_B, self.spec))


def load_run(path: Path | str) -> Run:
    """The run in a directory of jobs/train.py: its best checkpoint, or its newest where none was marked best.

    Raises:
        UserError: no run there, or it is another version's.
    """
    return Run(Path(path), load_trained(Path(path)))


class Samples:
    """Rows of some dates of a samples table, pinned to one version; made by `open_samples`."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __len__(self) -> int:
        return self.manifest.num_rows

    @property
    def spec(self) -> FeatureSpec:
        """Features and scenarios of the table."""
        return self.manifest.spec

    def head(self, num_rows: int = 5) -> pa.Table:
        """The first rows in the table's order, with every column that training reads; fewer where there are fewer.

        The schema's metadata says what the columns and ids mean, which `Run.score` then compares.
        """
        decoder = RowGroupDecoder(self.manifest, WhichRows(ready_before_us=0))
        found: list[pa.Table] = []
        for ref in self.manifest.row_groups():
            found.append(decoder.read(ref))
            if sum(part.num_rows for part in found) >= num_rows:
                break
        meaning = (self.spec.to_json(), self.manifest.built_with, self.manifest.table_uri)
        rows = pa.concat_tables(found).slice(0, num_rows)
        return rows.replace_schema_metadata(dict(zip(_MEANING, meaning, strict=True)))


def open_samples(lake: Path | str, *, dates: str, allow_missing_dates: bool = False) -> Samples:
    """The samples of a lake.

    Args:
        lake: folder or address of jobs/build_samples.py.
        dates: "A:B", both included, or one date.
        allow_missing_dates: where some of the dates have no rows, print a warning and take the others.

    Raises:
        UserError: no table, or no rows on these dates, or on one of them; this process was forked.
    """
    span = parse_dates(str(dates), where="dates")
    try:
        return Samples(build_manifest(lake, dates=span, where="dates", allow_missing=allow_missing_dates))
    except BaseException as error:  # a panic of delta-rs, which is no Exception and would end a pool's worker unseen
        if "Forked process" not in str(error):
            raise
        raise UserError(
            f"{lake}: cannot be opened in a process that was forked after a table had been opened; open it before the "
            "fork, or start processes by multiprocessing's 'spawn'"
        ) from error


def _check_rows(frame: Any, run: TrainedRun) -> None:
    """Refuse Arrow rows that say that they mean something else to the model; those that say nothing pass."""
    metadata = getattr(getattr(frame, "schema", None), "metadata", None) or {}
    spec, built, table_uri = (metadata.get(key.encode(), b"").decode() for key in _MEANING)
    if not spec:
        return
    table = make_manifest(table_uri=table_uri, version=0, spec=FeatureSpec.from_json(spec), files=[], built_with=built)
    if problem := difference(run.spec, built_with(run.config), table):
        raise UserError(f"run.score: {problem}; give rows of the lake that the run was trained on")


def _model_table(frame: Any, spec: FeatureSpec) -> pa.Table:
    """The model's columns of a frame in the types of the samples table; the others that a batch has are zeros."""
    wanted = {name: kind for name, kind in model_columns(spec).items() if name not in _NOT_LOOKED_AT}
    table, columns = _as_arrow(frame, wanted), dict[str, Any]()
    try:
        for name, kind in wanted.items():
            if name in _NOT_READ:
                columns[name] = pa.nulls(table.num_rows, _ARROW[kind]).fill_null(0)
                continue
            found = table.column_names.count(name)
            if not found:
                raise UserError(f"run.score: column '{name}' is missing; it has: {', '.join(table.column_names)}")
            if found > 1:
                raise UserError(f"run.score: column '{name}' is there {found} times; give each column once")
            columns[name] = table[name].cast(_ARROW[kind])
        return pa.table(columns).combine_chunks()
    except pa.ArrowException as error:
        raise UserError(f"run.score: wrong columns: {error}; give rows of the run's samples table") from error


def _as_arrow(frame: Any, wanted: Container[str]) -> pa.Table:
    """What Arrow takes for a table, as one; of a pandas frame, which may hold anything, the wanted columns."""
    try:
        if isinstance(frame, pa.Table):
            return frame
        if isinstance(frame, pa.RecordBatch):
            return pa.Table.from_batches([frame])
        if type(frame).__module__.partition(".")[0] == "pandas":
            return pa.Table.from_pandas(frame.loc[:, [name in wanted for name in frame.columns]], preserve_index=False)
        if hasattr(frame, "__arrow_c_stream__"):
            return pa.table(frame)
    except (pa.ArrowException, ValueError) as error:  # columns of any kind, two of one name
        raise UserError(f"run.score: wrong columns: {one_line(error)}; give rows of the run's samples table") from error
    raise UserError(f"run.score: a table of Arrow, pandas or polars is needed, got {type(frame).__name__}")
