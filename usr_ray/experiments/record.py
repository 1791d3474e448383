"""What a study writes to disk, and what is done already. No Ray.

    <run-dir>/study.json           the declared grid, the base configuration, lakes and their pinned versions
    <run-dir>/trials/<trial-id>/   a run directory as of jobs/train.py, with train.log; failure.json where it failed
    <run-dir>/results.parquet      a row for each trial, split, scenario and task

The same command on the same directory reads finished trials back, resumes unfinished ones and retries failed ones
again.
"""

from __future__ import annotations

import datetime as dt
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from usr_ray.config import Config, ConfigError, UserError, first_difference, load_config
from usr_ray.config.stored import TIME, Shape, read_json
from usr_ray.evaluation.files import read_metrics, write_table
from usr_ray.experiments.grid import Resources, Study, StudyError, Trial, as_sets
from usr_ray.files import now, write_whole
from usr_ray.runs.evaluations import CONFIG_FILE, METRICS_FILE, read_record
from usr_ray.runs.plan import FINISHED

STUDY_FILE, RESULTS_FILE, FAILURE_FILE, TRIALS_DIR = "study.json", "results.parquet", "failure.json", "trials"
_NOT_MEANT = ("ray", "data.table_version", "data.allow_missing_dates", "online", "tune")
"""Keys that may differ when a study resumes: where it runs, not what it computes."""
_COMMON: Shape = {"created": TIME, "config": dict, "lake": str}
_STUDY: Shape = {
    "study": str,
    "tables": {"*": {"lake": str, "version": int}},
    "commands": [{"started": TIME, "command": [str]}],
}
_TRIAL_AGAIN = "remove the trial's folder, and it is trained anew"


@dataclass(frozen=True, slots=True)
class Base:
    """What the trials have in common, as the command line gave it."""

    config_path: Path | None
    overrides: tuple[str, ...]

    @property
    def is_here(self) -> bool:
        """Trials run in the job's own process (ray.num_workers = 0), without Ray."""
        return load_config(self.config_path, self.overrides).ray.num_workers == 0

    def of_study(self, study: Study) -> Base:
        """With what the study's [base] says of [data]: its worlds, the rows that are pinned and the doubts of them are
        those of its trials.
        """
        of_data = {key: value for key, value in study.base.items() if key.startswith("data.")}
        return Base(self.config_path, (*self.overrides, *as_sets(of_data)))

    def config(self, resources: Resources, trial: Trial | None = None, *, table_version: int = -1) -> Config:
        """The configuration of a trial; None: of none, the defaults that the study starts from.

        Raises:
            StudyError: the trial's overrides do not make a configuration.
        """
        sets = [
            *self.overrides,
            *(as_sets(trial.overrides) if trial else []),
            f"ray.num_workers={resources.num_workers}",
            f"ray.cpus_per_worker={float(resources.cpus_per_worker)}",
            f"data.table_version={table_version}",
        ]
        try:
            return load_config(self.config_path, sets)
        except ConfigError as error:
            raise (StudyError(f"trial {trial.trial_id}: {error}") if trial else error) from error


def open_study(run_dir: Path, study: Study, base: Base, *, lake: str, command: Sequence[str]) -> dict[str, Any]:
    """The record of a new study, or of the one that `run_dir` holds; writes nothing.

    Raises:
        StudyError: the directory holds something else, another study, or this one on another base configuration, lake
            or version of its table.
    """
    config = base.config(study.resources).to_dict()
    record = {
        "study": study.name,
        "title": study.title,
        "created": now(),
        "config": config,
        "lake": lake,
        "tables": {},
        "commands": [],
    }
    earlier = resumed(run_dir / STUDY_FILE, "study", config, lake, but=_NOT_MEANT, needs=_STUDY)
    record = earlier or record
    if record["study"] != study.name:
        raise StudyError(
            f"--run-dir {run_dir}: holds study {record['study']}, this command names {study.name}; name that one, or "
            "use another --run-dir"
        )
    asked = load_config(base.config_path, base.overrides).data.table_version
    for table in (earlier or {"tables": {}})["tables"].values():
        if asked >= 0 and asked != table["version"]:
            raise StudyError(
                f"--run-dir {run_dir}: holds a study on version {table['version']} of {table['lake']}, this command "
                f"has data.table_version = {asked}; leave it out to go on, or use another --run-dir"
            )
    return record | {
        "study": study.name,
        "grid": asdict(study),
        "commands": [*record["commands"], {"started": now(), "command": list(command)}],
        "python": platform.python_version(),
    }


def resumed(
    path: Path,
    what: str,
    config: Mapping[str, Any],
    lake: str,
    *,
    but: Sequence[str],
    needs: Shape,
    error: type[UserError] = StudyError,
) -> dict[str, Any] | None:
    """The record of a study or search that goes on; None where its directory is new or empty. Keys `but` may differ;
    the record must have the entries of the shape `needs`.

    Raises:
        UserError: `error`: the directory holds something else, or one on another configuration or lake.
    """
    run_dir = path.parent
    if not path.is_file():
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise error(f"--run-dir {run_dir}: is there and holds no {what}; name a new or empty folder")
        return None
    way_out = "use another --run-dir, or remove this one"
    record: dict[str, Any] = read_json(path, {**_COMMON, **needs}, way_out=way_out, error=error)
    old_lake = record["lake"]
    if difference := first_difference(Config.completed(record["config"]), config, but=but):
        key, before, after = difference
        raise error(
            f"--run-dir {run_dir}: holds a {what} with {key} = {before!r}, this command has {after!r}; set it back "
            f"to go on with that {what}, or use another --run-dir"
        )
    if old_lake != lake:
        raise error(
            f"--run-dir {run_dir}: holds a {what} on {old_lake or 'worlds of its own'}, this command names "
            f"{lake or 'none'}; name that one, or use another --run-dir"
        )
    return record


def write_record(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Write study.json, whole."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / STUDY_FILE, json.dumps(record, indent=2) + "\n")


def read_study(run_dir: Path) -> dict[str, Any]:
    """study.json; StudyError where there is none, or it is damaged."""
    path = run_dir / STUDY_FILE
    if not path.is_file():
        raise StudyError(f"--run-dir {run_dir}: holds no study (no {STUDY_FILE}); run jobs/study.py first")
    return read_json(path, _COMMON | _STUDY, way_out="put it back as it was", error=StudyError)


def trial_dir(run_dir: Path, trial: Trial) -> Path:
    """The run directory of a trial."""
    return run_dir / TRIALS_DIR / trial.trial_id


def is_finished(folder: Path) -> bool:
    """Whether a run directory holds a result."""
    return _record_of(folder).get("status") == FINISHED and (folder / METRICS_FILE).is_file()


def note_failure(folder: Path, error: str, trace: str = "") -> None:
    """Record why a trial failed; a later success removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FAILURE_FILE, json.dumps({"error": error, "traceback": trace, "time": now()}, indent=2) + "\n")


def failure_of(folder: Path) -> str:
    """Why a trial failed; '' when it did not, or has not run yet."""
    path = folder / FAILURE_FILE
    return str(read_json(path, {"error": str}, way_out=_TRIAL_AGAIN)["error"]) if path.is_file() else ""


def result_rows(run_dir: Path, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row for each trial x split x scenario x task; one row with `status` and `error` for a trial without a result.

    Metrics are null where undefined. `overrides`, `point` and `packages` are JSON.
    """
    rows = []
    for trial in trials:
        folder = trial_dir(run_dir, trial)
        record, error = _record_of(folder), failure_of(folder)
        status = FINISHED if is_finished(folder) else "failed" if error else "open"
        shared = {
            "trial_id": trial.trial_id,
            "status": status,
            "error": error if status == "failed" else None,
            "seed": trial.seed,
            "point": json.dumps(trial.point),
            "world": trial.world or None,
            "overrides": json.dumps(dict(trial.overrides)),
            "table_uri": record.get("table", {}).get("uri"),
            "table_version": record.get("table", {}).get("version"),
            "steps": record.get("step"),
            "seconds": _seconds(record),
            "packages": json.dumps(record.get("packages", {})),
        }
        if status != FINISHED:
            rows.append(shared)
            continue
        for split, cells in read_metrics(folder / METRICS_FILE).items():
            for scenario, tasks in cells.items():
                for task, metrics in tasks.items():
                    rows.append({**shared, "split": split, "scenario": scenario, "task": task, **metrics})
    return rows


_TEXTS = (
    "trial_id",
    "status",
    "error",
    "point",
    "world",
    "overrides",
    "table_uri",
    "packages",
    "split",
    "scenario",
    "task",
)
_COUNTS = ("seed", "table_version", "steps", "num_samples", "num_positives", "num_unknown")


def write_results(run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """results.parquet of `result_rows`, whole or not at all."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    kinds = {**dict.fromkeys(_TEXTS, pa.string()), **dict.fromkeys(_COUNTS, pa.int64())}
    table = pa.table({n: pa.array([row.get(n) for row in rows], kinds.get(n, pa.float64())) for n in names})
    return write_table(run_dir / RESULTS_FILE, table)


def _seconds(record: Mapping[str, Any]) -> float | None:
    """Seconds of the last attempt: earlier ones were cut off at an unknown time."""
    started, ended = ([{}, *(record.get("attempts") or [])][-1]).get("started"), record.get("ended")
    if not started or not ended:
        return None
    return (dt.datetime.fromisoformat(ended) - dt.datetime.fromisoformat(started)).total_seconds()


def _record_of(folder: Path) -> dict[str, Any]:
    """config.json of a trial; empty before it was begun."""
    return read_record(folder, way_out=_TRIAL_AGAIN) if (folder / CONFIG_FILE).is_file() else {}
