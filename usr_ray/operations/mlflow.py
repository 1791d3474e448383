"""A run directory as a run of MLflow: its configuration, every number of its history, its files.

Written from the files that training leaves, so that training never waits for a tracking server, and none of a server's
failures ends a run. Called again it adds what is new: by hand, by cron while a run goes on, or once at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from usr_ray.config import UserError, check_address, dotted
from usr_ray.runs.evaluations import CONFIG_FILE, HISTORY_FILE, METRICS_FILE, read_record
from usr_ray.runs.read import read_history

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RUN_TAG, STEP_TAG = "usr_ray.run", "usr_ray.step"
"""Which run directory it is, by its path and its start; the last (step, kind) that was logged."""
ARTIFACTS = (CONFIG_FILE, METRICS_FILE, HISTORY_FILE, "manifest-train.json", "manifest-eval.json", "report.html")
_BATCH, _PARAM_LENGTH = 900, 5000
"""MLflow takes 1,000 numbers and 100 parameters a call, and 6,000 characters a parameter."""
_STATES = {"finished": "FINISHED", "running": "RUNNING"}


def client(tracking_uri: str) -> MlflowClient:
    """MLflow's client of a tracking server or store.

    Raises:
        UserError: mlflow is not installed, the address holds a key, or the store does not open.
    """
    check_address(tracking_uri, flag="--tracking-uri")
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise UserError("mlflow is not installed here; install usr-ray[mlflow]") from error
    try:
        return MlflowClient(tracking_uri=tracking_uri)
    except MlflowException as error:
        raise UserError(f"--tracking-uri {tracking_uri}: does not open ({str(error).splitlines()[0][:200]})") from error


def log_run(run_dir: Path, tracking: MlflowClient, *, experiment: str) -> tuple[str, int]:
    """Make or bring up to date the MLflow run of a run directory, in an experiment that is made when it is not there.

    Params are the dotted keys of the configuration; metrics by step are named as in TensorBoard (`train/<name>`,
    `loss/...`, `eval/<scenario>/<task>/<name>`), with the times of the history, undefined ones left out; artifacts are
    the files of ARTIFACTS that are there.

    Returns:
        MLflow's id of the run, and how many numbers were added.

    Raises:
        UserError: no run there, or no experiment.
    """
    record = read_record(run_dir, "config", "table", "created", "status")
    if not experiment.strip():
        raise UserError("--experiment '': is empty; name a place in MLflow for the runs, such as usr-ray")
    found = tracking.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else tracking.create_experiment(experiment)
    name = run_tag(run_dir, record["created"])
    runs = list(tracking.search_runs([experiment_id], f'tags.`{RUN_TAG}` = "{name}"'))
    if runs:
        run_id, last = runs[0].info.run_id, _position(runs[0].data.tags.get(STEP_TAG, ""))
    else:
        run_id = tracking.create_run(experiment_id, tags={RUN_TAG: name}, run_name=run_dir.name).info.run_id
        last = (-1, "")
        _log_params(tracking, run_id, record)
    num_added = 0
    # 'eval' comes after 'train' of its step, but sorts before it.
    rows = sorted(read_history(run_dir / HISTORY_FILE), key=lambda row: (row["step"], row["kind"] == "eval"))
    new = [row for row in rows if _after(row, last)]
    for batch in _batches(new):
        tracking.log_batch(run_id, metrics=batch)
        num_added += len(batch)
    if new:
        tracking.set_tag(run_id, STEP_TAG, f"{new[-1]['step']} {new[-1]['kind']}")
    for artifact in ARTIFACTS:
        if (run_dir / artifact).is_file():
            tracking.log_artifact(run_id, str(run_dir / artifact))
    if record["status"] != "running":
        tracking.set_terminated(run_id, status=_STATES.get(record["status"], "FAILED"))
    return run_id, num_added


def run_tag(run_dir: Path, created: str) -> str:
    """What finds the run of a directory again, in printable ASCII without quotes, which a filter of MLflow's takes
    literally.
    """
    return quote(f"{run_dir.resolve()} {created}", safe=" /:+~@,=()&;!#$*[]{}^|")


def param_key(key: str) -> str:
    """A dotted key as MLflow takes it: letters, digits and /_.- : and blanks; any other sign by its number."""
    return re.sub(r"[^/\w. :-]", lambda found: f"-x{ord(found[0]):x}-", key)


def _log_params(tracking: MlflowClient, run_id: str, record: dict[str, Any]) -> None:
    from mlflow.entities import Param

    table = {f"table.{key}": value for key, value in record["table"].items()}
    values = dotted(record["config"]) | table
    params = [Param(param_key(key), str(value)[:_PARAM_LENGTH]) for key, value in values.items()]
    for start in range(0, len(params), 100):
        tracking.log_batch(run_id, params=params[start : start + 100])


def _batches(rows: list[dict[str, Any]]) -> Iterator[list[Any]]:
    from mlflow.entities import Metric

    batch: list[Any] = []
    for row in rows:
        is_eval = row["kind"] == "eval"
        time_ms = int(row["time"] * 1000)
        for key, value in row.items():
            if key not in ("kind", "step", "time") and isinstance(value, int | float):
                # As in TensorBoard: a file store keeps train/loss as a file, so no name may go on below it.
                name = f"train/{key}" if not is_eval and "/" not in key else f"eval/{key}" if is_eval else key
                batch.append(Metric(name, float(value), time_ms, row["step"]))
        if len(batch) >= _BATCH:
            yield batch[:1000]
            batch = batch[1000:]
    if batch:
        yield batch


def _position(text: str) -> tuple[int, str]:
    step, _, kind = text.partition(" ")
    return (int(step), kind) if step.isdigit() else (-1, "")


def _after(row: dict[str, Any], last: tuple[int, str]) -> bool:
    return (row["step"], row["kind"] == "eval") > (last[0], last[1] == "eval")
