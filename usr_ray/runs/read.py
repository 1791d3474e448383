"""What a report is made of: the files of a run directory and of a lake, read once, with gaps where a file is absent."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileType

from usr_ray.cli import flags
from usr_ray.config import UserError, dates_in
from usr_ray.config.stored import NUMBER, REPORT, REPORT_WAY_OUT, Shape, misfit, parse_json
from usr_ray.data.lineage import difference
from usr_ray.data.manifest import STORE_HINT, Manifest, open_filesystem, open_samples, table_address
from usr_ray.evaluation.files import read_predictions
from usr_ray.evaluation.metrics import CellMetrics, Predictions
from usr_ray.files import whole_line
from usr_ray.runs.evaluations import (
    CONFIG_FILE,
    HISTORY_FILE,
    Evaluated,
    evaluations,
    manifest_path,
    newest,
    read_record,
)
from usr_ray.schema import REPORTS, SAMPLES

_ROW: Shape = {"kind?": str, "step": int, "*": NUMBER}
"""A line of history.jsonl."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run directory."""

    run_dir: Path
    record: Mapping[str, Any]
    """config.json: the resolved configuration under 'config', beside it versions, command and times."""
    history: list[dict[str, Any]]
    """history.jsonl: one object a log step, in order of steps."""
    evaluations: list[Evaluated]
    """All, the newest first."""
    evaluation: Evaluated | None
    """The one to report: the newest on held-out dates; where there is none, the newest."""
    predictions: Predictions | None
    """The rows of that evaluation."""
    baseline: Predictions | None

    @property
    def metrics(self) -> CellMetrics | None:
        """Metrics of the evaluation to report."""
        return self.evaluation.metrics if self.evaluation else None

    @property
    def is_held_out(self) -> bool:
        """The evaluation to report is on held-out dates, or there is none."""
        return self.evaluation is None or self.evaluation.is_held_out

    @property
    def about(self) -> Mapping[str, Any]:
        """Dates, checkpoint and table version of the evaluation to report."""
        return self.evaluation.about if self.evaluation else {}

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        return self.record.get("config", self.record)

    @property
    def scenarios(self) -> tuple[str, ...]:
        """Scenarios in the order of the configuration."""
        return tuple(self.config["scenarios"])


def read_run(run_dir: Path) -> RunRecord:
    """Everything that is there of a run; only config.json must be.

    Raises:
        UserError: the directory or its config.json is missing, or a file in it cannot be read.
    """
    if not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: no such directory; name the --run-dir of jobs/train.py")
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"--run-dir {run_dir}: holds no {CONFIG_FILE}, so no run was started here; run jobs/train.py")
    record = read_record(run_dir)
    scenarios = tuple(record.get("config", record).get("scenarios", ()))
    if not scenarios:
        raise UserError(f"{run_dir / CONFIG_FILE}: has no scenarios; this is no run's configuration")
    found = evaluations(run_dir, record)
    evaluation, predictions, baseline = newest(found), None, None
    if evaluation is not None and (path := evaluation.predictions) is not None:
        predictions, baseline, _ = read_predictions(path, scenarios)
    return RunRecord(
        run_dir=run_dir,
        record=record,
        history=read_history(run_dir / HISTORY_FILE),
        evaluations=found,
        evaluation=evaluation,
        predictions=predictions,
        baseline=baseline,
    )


def next_step(run: RunRecord) -> str:
    """What gives a run its metrics, as a command: whole, as far as config.json knows the lake and the dates."""
    table, dates = (run.record.get("table") or {}).get("uri", ""), run.config.get("data", {}).get("eval_dates")
    trained = run.record.get("trained_dates") or run.config.get("data", {}).get("train_dates")
    places = flags(run_dir=run.run_dir, lake=table.rpartition("/")[0] or "DIR", dates=dates or "A:B")
    later = f", dates after {max(dates_in(trained))}" if trained and not dates else ""
    step = f"evaluate the run with {shlex.join(['python', 'jobs/evaluate.py', *places])}{later}."
    command = ([{}, *(run.record.get("attempts") or [])][-1]).get("command")
    if run.record.get("status") == "running" and command:
        return f"the run is not finished. Where it was stopped, go on with {shlex.join(command)}. Then {step}"
    return step


def check_lake(run_dir: Path, lake: Path | str) -> None:
    """Refuse a lake whose samples mean something else than those that the run was trained on.

    A lake without samples, and a run without the manifest of its rows, are let pass.

    Raises:
        UserError: naming what differs.
    """
    path = manifest_path(run_dir, "train")
    filesystem, samples = open_filesystem(table_address(lake, SAMPLES))
    if not path.is_file() or filesystem.get_file_info(samples).type != FileType.Directory:
        return
    trained_on = Manifest.load(path)
    problem = difference(trained_on.spec, trained_on.built_with, open_samples(lake))
    if problem:
        raise UserError(f"--lake {lake}: {problem}; name the lake that the run was trained on")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of history.jsonl by step, the newest row of a step that a resumed run went through twice.

    A line that a crash cut short is left out; a missing file is an empty history.

    Raises:
        UserError: a line was changed by hand.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if problem := misfit(row, _ROW):
            raise UserError(f"{path}: line {number} is damaged ({problem}); remove the line")
        rows[row.get("kind", "train"), row["step"]] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def read_etl_reports(lake: Path | str | None) -> list[dict[str, Any]]:
    """`<lake>/reports/*.json`, by file name; none without a lake. The lake may be in an object store.

    Raises:
        UserError: the lake is missing, or a report cannot be read.
    """
    if lake is None:
        return []
    filesystem, folder = open_filesystem(table_address(lake, REPORTS))
    try:
        if filesystem.get_file_info(folder.rpartition("/")[0]).type != FileType.Directory:
            raise UserError(f"--lake {lake}: no such directory; name the --lake of jobs/build_samples.py")
        found = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
        names = sorted(info.path for info in found if info.path.endswith(".json"))
        texts = [(name, filesystem.open_input_stream(name).read()) for name in names]
    except OSError as error:
        raise UserError(f"--lake {lake}: cannot be reached ({whole_line(error)}); {STORE_HINT}") from error
    return [parse_json(text, REPORT, where=name, way_out=REPORT_WAY_OUT) for name, text in texts]
