"""Scores of every row of a samples table's dates, in a Delta table: exactly one for each row, whatever happens.

The table holds one model's, one commit a date, so that a date is there whole or not at all. What is done is read from
the table itself (row counts and the constant columns of its files), never from a note beside it: rows that somebody
deleted or restored are scored again, and a job that was killed leaves nothing to repair.

Shape letters: B rows of a batch.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from usr_ray.config import UserError, check_table_address
from usr_ray.data.manifest import Manifest, build_manifest, make_manifest
from usr_ray.data.rows import read_rows
from usr_ray.schema import OF_ORDERS, PARTITION_COLUMN, FeatureSpec
from usr_ray.serving.check import training_probabilities
from usr_ray.serving.model import GLOBAL_PROBABILITIES, PROBABILITIES
from usr_ray.training.evaluate import TrainedRun, check_table, evaluation_reader, load_whole_run, score_batches
from usr_ray.training.monitor import RowProgress
from usr_ray.training.worker import Worker

SCORES_SCHEMA = pa.schema(
    [
        pa.field("impression_id", pa.string(), nullable=False),
        pa.field("scenario", pa.string(), nullable=False),
        pa.field("event_time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field(PARTITION_COLUMN, pa.date32(), nullable=False),
        *(pa.field(name, pa.float32(), nullable=name in OF_ORDERS) for name in PROBABILITIES),
        *(pa.field(name, pa.float32()) for name in GLOBAL_PROBABILITIES),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("model_step", pa.int64(), nullable=False),
        pa.field("table_version", pa.int64(), nullable=False),
        pa.field("rows_id", pa.string()),
    ]
)
"""Grain: one row per row of the samples table. Global probabilities are null for a model without GLMT, those of orders
in scenarios whose orders nobody logs. rows_id: `rows_id`, null where a version without it has scored."""
_ROWS_ID_DIGITS = 16


class ScoreError(UserError):
    """Rows that cannot be scored, or a table that scores cannot go to."""


@dataclass(frozen=True, slots=True)
class _File:
    date: dt.date
    num_rows: int | None
    model_ids: tuple[str | None, str | None]
    """Least and greatest; None where the table's log does not know."""
    model_steps: tuple[int | None, int | None]
    table_versions: tuple[int | None, int | None]
    rows_ids: tuple[str | None, str | None]


class ScoreTable:
    """The scores of one model.

    Args:
        path: created when it is absent or an empty directory.
        model_id: as Checkpoint.model_id.
        has_unknown: probabilities of orders will be null on some rows.

    Raises:
        ScoreError: something else is there, the scores of another model, or a table that takes no nulls.
    """

    def __init__(self, path: Path, *, model_id: str, model_step: int, has_unknown: bool = False) -> None:
        from deltalake import DeltaTable, Field
        from deltalake.schema import PrimitiveType

        check_table_address(str(path), flag="--output")

        self.path = path
        self.model_id = model_id
        if path.exists() and not DeltaTable.is_deltatable(str(path)) and (not path.is_dir() or any(path.iterdir())):
            raise ScoreError(f"--output {path}: is not empty and no Delta table; name another directory")
        # 'ignore': a table that is there stays as it is.
        self._table = DeltaTable.create(str(path), SCORES_SCHEMA, mode="ignore", partition_by=[PARTITION_COLUMN])
        fields = self._table.schema().fields
        names = [field.name for field in fields]
        if names not in (SCORES_SCHEMA.names, SCORES_SCHEMA.names[:-1]):
            raise ScoreError(f"--output {path}: is a Delta table, but not of scores; name another directory")
        if has_unknown and not all(field.nullable for field in fields if field.name in OF_ORDERS):
            raise ScoreError(
                f"--output {path}: is of an earlier version, which gave an untrained head's numbers where nobody logs "
                "orders (labels.no_order_scenarios), and takes no null; name another --output"
            )
        for file in self._files():
            if file.model_ids != (model_id, model_id):
                raise ScoreError(
                    f"--output {path}: holds scores of another model (checkpoint of step {file.model_steps[0]}, id "
                    f"{file.model_ids[0]}), this one is of step {model_step}, id {model_id}; name another --output, "
                    "or delete that table first"
                )
        if names != SCORES_SCHEMA.names:  # of a version that knew rows by the table's version alone
            self._table.alter.add_columns(Field(SCORES_SCHEMA.names[-1], PrimitiveType("string")))

    def dates(self) -> set[dt.date]:
        """Dates that have rows."""
        return {file.date for file in self._files()}

    def is_done(self, rows: Manifest) -> bool:
        """True when the table holds a score of each of the rows, all of one date and this version of their table.

        A lake that was built anew counts its versions from 0 again, and has as many rows: so the files are asked too.
        """
        date = dt.date.fromisoformat(rows.dates[0])
        files = [file for file in self._files() if file.date == date]
        return (
            bool(files)
            and all(file.table_versions == (rows.version,) * 2 for file in files)
            and all(file.rows_ids == (rows_id(rows),) * 2 for file in files)
            and sum(file.num_rows or 0 for file in files) == rows.num_rows
        )

    def write_date(self, date: dt.date, batches: Iterable[pa.RecordBatch]) -> None:
        """Put `batches` in place of the rows of `date`, in one commit after the last of them.

        An exception of `batches` comes out as it is, and nothing is committed.
        """
        from deltalake import write_deltalake

        failures: list[BaseException] = []

        def watched() -> Iterator[pa.RecordBatch]:
            try:
                yield from batches
            except BaseException as error:  # Delta's writer would make its own error of it, without the type
                failures.append(error)
                raise

        reader = pa.RecordBatchReader.from_batches(SCORES_SCHEMA, watched())
        try:
            write_deltalake(
                str(self.path), reader, mode="overwrite", predicate=_is_date(date), partition_by=[PARTITION_COLUMN]
            )
        except Exception as error:
            raise (failures[0] if failures else error) from None

    def remove_date(self, date: dt.date) -> None:
        """Delete the rows of `date`."""
        self._table.update_incremental()
        self._table.delete(_is_date(date))

    def _files(self) -> list[_File]:
        self._table.update_incremental()
        adds: list[dict[str, Any]] = pa.table(self._table.get_add_actions(flatten=True)).to_pylist()

        def ends(add: dict[str, Any], name: str) -> tuple[Any, Any]:
            return add.get(f"min.{name}"), add.get(f"max.{name}")

        return [
            _File(
                date=add[f"partition.{PARTITION_COLUMN}"],
                num_rows=add.get("num_records"),
                model_ids=ends(add, "model_id"),
                model_steps=ends(add, "model_step"),
                table_versions=ends(add, "table_version"),
                rows_ids=ends(add, "rows_id"),
            )
            for add in adds
        ]


def rows_id(rows: Manifest) -> str:
    """16 hex digits that name the files of some rows: the head of their manifest's SHA-256."""
    return rows.sha256[:_ROWS_ID_DIGITS]


def _is_date(date: dt.date) -> str:
    return f"{PARTITION_COLUMN} = '{date.isoformat()}'"


@dataclass(frozen=True, slots=True)
class Scored:
    """What a job did."""

    num_rows: int
    """Rows scored by this job."""
    dates: tuple[dt.date, ...]
    """Dates written by this job."""
    skipped: tuple[dt.date, ...]
    """Dates that were done before."""
    step: int
    """The checkpoint's step."""


def score_dates(
    run_dir: Path,
    lake: Path | str,
    dates: tuple[dt.date, dt.date],
    output: Path,
    worker: Worker,
    *,
    allow_missing: bool = False,
    report: Callable[[str], None] = print,
) -> Scored:
    """Score all rows of the dates first..last (both included), mature or not, into the Delta table `output`.

    One commit a date. Dates that the table already holds of this model and these files of this version of the samples
    table are skipped; any other date, cut off or of an older version, is written as a whole. With `allow_missing`,
    dates without rows are left out, and their scores deleted where there are any.

    Raises:
        UserError: no run, no checkpoint, no rows in the dates, a lake of other features, an output of another model;
            or a ScoreError: a model that gives no probabilities, more than one process.
    """
    if worker.world_size > 1:
        raise ScoreError("jobs/score.py runs in one process; share the dates over several jobs with their own --output")
    run = load_whole_run(run_dir, worker.device)
    manifest = build_manifest(lake, dates=dates, allow_missing=allow_missing)
    check_table(run, manifest)
    has_unknown = bool(manifest.spec.no_order_scenarios)
    identity = run.checkpoint.model_id
    table = ScoreTable(output, model_id=identity, model_step=run.checkpoint.step, has_unknown=has_unknown)
    of_date = {dt.date.fromisoformat(date): _only(manifest, date) for date in manifest.dates}
    for date in sorted(table.dates() - set(of_date)):
        if dates[0] <= date <= dates[1]:  # its rows have left the samples table
            table.remove_date(date)
            report(f"{date}: no longer in the samples table; its scores are deleted")
    skipped = [date for date, part in of_date.items() if table.is_done(part)]
    todo = {date: part for date, part in of_date.items() if date not in skipped}
    if skipped:
        report(f"{len(skipped)} of {len(of_date)} dates are done already")
    progress = RowProgress(sum(part.num_rows for part in todo.values()), report)
    for number, (date, part) in enumerate(todo.items(), start=1):
        progress.start(f"{date} ({number} of {len(todo)})")
        table.write_date(date, score_rows(run, part, worker, progress.add))
        progress.say(": written")
    return Scored(progress.num_done, tuple(todo), tuple(skipped), run.checkpoint.step)


def _only(manifest: Manifest, date: str) -> Manifest:
    files = [file for file in manifest.files if file.date == date]
    return make_manifest(table_uri=manifest.table_uri, version=manifest.version, spec=manifest.spec, files=files)


def probability_columns(probs: Mapping[str, Tensor], scenario_B: Tensor, spec: FeatureSpec) -> dict[str, pa.Array]:
    """Probabilities (B) by name as float32 columns; of orders null where nobody logs them, as no model learns them."""
    is_untrained_S = np.array([name in spec.no_order_scenarios for name in spec.scenarios])
    is_untrained_B = is_untrained_S[scenario_B.cpu().numpy()]
    return {
        name: pa.array(p_B.float().cpu().numpy(), mask=is_untrained_B if name in OF_ORDERS else None)
        for name, p_B in probs.items()
    }


def score_rows(
    run: TrainedRun, manifest: Manifest, worker: Worker, add_rows: Callable[[int], None]
) -> Iterator[pa.RecordBatch]:
    """Batches of SCORES_SCHEMA of all rows of a manifest of one date, in file order.

    Raises:
        DataError: a file cannot be read or breaks the contract. ScoreError: a probability is not a number.
        RuntimeError: rows would be missing or doubled.
    """
    identity = run.checkpoint.model_id
    scenarios = pa.array(manifest.spec.scenarios)
    date = dt.date.fromisoformat(manifest.dates[0])
    names = _RawRows(manifest)
    num_done = 0
    with evaluation_reader(manifest, worker, run.config, mature_only=False) as reader:
        for batch, outputs in score_batches(run.module, run.tables, reader, manifest.spec, worker.device):
            numbers_B = batch.row_number_B.cpu()
            num_rows = int((numbers_B >= 0).sum())  # the last batch ends in padding
            if not torch.equal(numbers_B[:num_rows], torch.arange(num_done, num_done + num_rows)):
                raise RuntimeError(f"rows {num_done} and after of {manifest.table_uri} did not come in file order")
            probs = {name: p[:num_rows].float().cpu() for name, p in training_probabilities(outputs).items()}
            for name, prob_B in probs.items():
                if not bool((prob_B <= 1).all()):
                    raise ScoreError(
                        f"{name} is not a number on a row of {date}, so the model has diverged; train with a lower "
                        "train.learning_rate or train.gradient_clip"
                    )
            raw, known = names.take(num_rows), probability_columns(probs, batch.scenario_B[:num_rows], manifest.spec)
            columns = {
                "impression_id": raw["impression_id"],
                "scenario": scenarios.take(pa.array(batch.scenario_B[:num_rows].cpu().numpy())),
                "event_time": raw["event_time"],
                "impression_date": pa.repeat(pa.scalar(date, pa.date32()), num_rows),
                **{name: known[name] for name in PROBABILITIES},
                **{name: known.get(name, pa.nulls(num_rows, pa.float32())) for name in GLOBAL_PROBABILITIES},
                "model_id": pa.repeat(identity, num_rows),
                "model_step": pa.repeat(pa.scalar(run.checkpoint.step, pa.int64()), num_rows),
                "table_version": pa.repeat(pa.scalar(manifest.version, pa.int64()), num_rows),
                "rows_id": pa.repeat(rows_id(manifest), num_rows),
            }
            yield from pa.table(columns, schema=SCORES_SCHEMA).combine_chunks().to_batches()
            num_done += num_rows
            add_rows(num_rows)
    if num_done != manifest.num_rows:
        raise RuntimeError(f"{manifest.table_uri}, {date}: {num_done} rows scored, {manifest.num_rows} expected")


class _RawRows:
    """impression_id and event_time of the rows of a manifest, in its order, in pieces of any size."""

    def __init__(self, manifest: Manifest) -> None:
        names = ("impression_id", "event_time")
        self._schema = pa.schema([SCORES_SCHEMA.field(name).with_nullable(True) for name in names])
        self._groups = read_rows(manifest, names)
        self._rest = self._schema.empty_table()

    def take(self, num_rows: int) -> pa.Table:
        """The next `num_rows` rows."""
        while self._rest.num_rows < num_rows:
            self._rest = pa.concat_tables([self._rest, next(self._groups)[1].cast(self._schema)])
        taken, self._rest = self._rest.slice(0, num_rows), self._rest.slice(num_rows)
        return taken
