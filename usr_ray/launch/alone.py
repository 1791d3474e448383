"""A run in this process, one rank without Ray (ray.num_workers = 0), and what a run under Ray shares with it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from usr_ray.config import Config, RayConfig, UserError, dates_in
from usr_ray.data.lineage import warn
from usr_ray.data.order import order_text
from usr_ray.evaluation.files import PREDICTIONS_FILE, SPLIT, read_about, read_metrics
from usr_ray.evaluation.metrics import ALL, CellMetrics
from usr_ray.launch.environment import OWN, SUBMITTED, keep_freed_memory
from usr_ray.launch.monitor import FileMonitor, RayMonitor
from usr_ray.runs.evaluations import METRICS_FILE, caveats, manifest_path, read_record
from usr_ray.runs.plan import RunPlan, load_manifest, mark_finished, plan_run, write_plan, write_result
from usr_ray.schema import TASKS
from usr_ray.training.loop import TrainResult, train
from usr_ray.training.monitor import Monitor
from usr_ray.training.worker import LocalWorker, Worker


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run ended with."""

    run_dir: Path
    outcome: str
    """'finished', 'early_stopped' or 'stopped' (training.loop.TrainResult.status)."""
    step: int
    metrics: CellMetrics | None
    """Metrics on the held-out rows; None without held-out dates or when stopped."""
    was_finished: bool
    """The run directory held the result already; nothing was trained."""


def run_alone(
    config: Config,
    lake: Path | str,
    run_dir: Path | str,
    *,
    cluster: str = OWN,
    command: Sequence[str] = (),
    worker: LocalWorker | None = None,
    monitor: Callable[[Path], FileMonitor | RayMonitor] = FileMonitor,
) -> RunSummary:
    """`trainer.run` without Ray: the only rank is this process, so nothing restarts it.

    Args:
        worker: the rank; None: one that SIGTERM stops with a save.
        monitor: makes the one of a run directory.

    Raises:
        UserError: as trainer.run; ray.use_gpu without a GPU.
    """
    if cluster == SUBMITTED:
        refuse_relative_run(config, lake, run_dir)
    refuse_missing_gpus(config.ray)

    def fit(plan: RunPlan) -> tuple[str, int]:
        keep_freed_memory()
        rank = worker or LocalWorker(None if config.ray.use_gpu else "cpu")
        if worker is None:
            rank.stop_on_signal()
        with contextlib.closing(monitor(plan.run_dir)) as watching:
            result = train_planned(plan.run_dir, plan.config, rank, watching)
        return result.status, result.step

    return carry_out(plan_run(config, lake, run_dir, command=command), fit)


def train_planned(run_dir: Path, config: Config, worker: Worker, monitor: Monitor) -> TrainResult:
    """One rank of a written plan, or of one that goes on; rank 0 writes the result."""
    held_out = load_manifest(run_dir, "eval") if manifest_path(run_dir, "eval").exists() else None
    result = train(
        config,
        worker,
        train_manifest=load_manifest(run_dir, "train"),
        eval_manifest=held_out,
        trained_dates=read_record(run_dir, "trained_dates")["trained_dates"],
        run_dir=run_dir,
        monitor=monitor,
    )
    if worker.is_main and held_out is not None:
        write_result(run_dir, result, held_out)
    return result


def carry_out(
    plan: RunPlan,
    fit: Callable[[RunPlan], tuple[str, int]],
    session: AbstractContextManager[None] | None = None,
) -> RunSummary:
    """Train a plan that is not finished, and read the metrics on the held-out rows.

    Args:
        plan: from plan_run, not written yet.
        fit: trains the plan and returns (outcome, steps).
        session: what `fit` needs around it; not entered for a finished run.

    Raises:
        UserError: another process trains in this directory.
    """
    if plan.is_finished:
        print(f"{plan.run_dir}: this run is finished (step {plan.record['step']:,})")
        return _summary(plan, plan.record["outcome"], plan.record["step"], was_finished=True)
    if len(plan.record["attempts"]) > 1:
        table = plan.record["table"]
        print(f"{plan.run_dir}: goes on with version {table['version']} of {table['uri']}, on which it was started")
    with session or contextlib.nullcontext(), _only_one(plan.run_dir):
        write_plan(plan)
        warn(plan.doubts)
        print(f"{plan.run_dir}: rows {order_text(plan.record['shuffle'])}", flush=True)
        outcome, step = fit(plan)
    if outcome != "stopped":
        mark_finished(plan, outcome=outcome, step=step)
    print(f"{plan.run_dir}: {outcome} at step {step:,}")
    return _summary(plan, outcome, step, was_finished=False)


def refuse_relative(paths: Mapping[str, Path | str]) -> None:
    """UserError for a path, by its flag, that a submitted job would look for in its uploaded copy."""
    for flag, path in paths.items():
        if "://" not in str(path) and not Path(path).is_absolute():
            raise UserError(
                f"{flag} {path}: is relative, and a submitted job runs in an uploaded copy of the working directory, "
                "which is thrown away; give the whole path"
            )


def refuse_relative_run(config: Config, lake: Path | str, run_dir: Path | str) -> None:
    """`refuse_relative` for all paths of a training."""
    named = {f"train.{key}": getattr(config.train, key) for key in ("warm_start", "reader_cache")}
    refuse_relative({"--lake": lake, "--run-dir": run_dir} | {key: path for key, path in named.items() if path})


def refuse_missing_gpus(config: RayConfig) -> None:
    """UserError for ray.use_gpu on a machine with fewer GPUs than a run of this machine's own needs."""
    needed, present = max(1, config.num_workers), torch.cuda.device_count()
    if config.use_gpu and present < needed:
        fewer = f"ray.num_workers={present}, " if present else ""  # 0 needs one too
        raise UserError(
            f"ray.use_gpu: {needed} workers need a GPU each, this machine has {present}; set {fewer}ray.use_gpu=false, "
            "or submit the job to a cluster"
        )


def _summary(plan: RunPlan, outcome: str, step: int, *, was_finished: bool) -> RunSummary:
    metrics = None
    if plan.eval_manifest is not None and outcome != "stopped":
        metrics = read_metrics(plan.run_dir / METRICS_FILE, SPLIT)[SPLIT]
        found = caveats(plan.config, plan.eval_manifest, _evaluated_dates(plan), metrics[ALL][TASKS[0]]["num_samples"])
        warn(f"data.eval_dates: {one}" for one in found)
    return RunSummary(plan.run_dir, outcome, step, metrics, was_finished)


def _evaluated_dates(plan: RunPlan) -> Collection[str]:
    """Dates of the held-out rows that the metrics are of; all, where the file of the rows does not say."""
    assert plan.eval_manifest is not None
    try:
        said = read_about(plan.run_dir / PREDICTIONS_FILE).get("dates") or ""
    except UserError:  # gone or torn: the metrics are whole all the same
        said = ""
    return dates_in(said) or plan.eval_manifest.dates


@contextlib.contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Two trainings in one directory would overwrite each other's checkpoints. The lock ends with the process."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--run-dir {run_dir}: another process trains here; wait for it, or use another") from error
        except OSError:  # this storage has no locks
            pass
        yield
