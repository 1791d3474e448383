"""Running a study: its trials as Ray tasks, as many at once as the cluster holds, each a run directory of its own.

A trial of one worker is the loop in the task's own process; a trial of more is a task without CPUs that starts Ray
Train's worker group. The number of tasks is bounded by what their workers need, so no trial waits for another's CPUs.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from usr_ray.config import Config, UserError
from usr_ray.data.pins import remove_pin, write_pin
from usr_ray.experiments.grid import SIMULATED, Resources, Study, StudyError, Trial, expand
from usr_ray.experiments.record import (
    FAILURE_FILE,
    Base,
    failure_of,
    is_finished,
    note_failure,
    open_study,
    result_rows,
    trial_dir,
    write_record,
    write_results,
)
from usr_ray.experiments.worlds import BuildWorlds, World, pinned_rows, prepare_worlds, table_version, whole_path
from usr_ray.launch.environment import OWN, SUBMITTED
from usr_ray.launch.monitor import RayMonitor
from usr_ray.launch.session import ray_session
from usr_ray.launch.trainer import refuse_relative, run
from usr_ray.runs.folder import write_result
from usr_ray.runs.plan import load_manifest, mark_finished, plan_run, write_plan
from usr_ray.training.loop import train
from usr_ray.training.worker import LocalWorker

LOG_FILE = "train.log"
_LOSSES = 2
"""Times that Ray starts a trial again whose process was lost; it goes on from its checkpoint."""
_POLL_S = 30.0


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a call of `run_study` ended with."""

    results: Path
    num_finished: int
    failures: dict[str, str]
    """Trial id -> what it failed of."""


def run_study(
    study: Study,
    base: Base,
    lake: str | None,
    run_dir: Path,
    *,
    input_dir: Path | None = None,
    build_worlds: BuildWorlds | None = None,
    cluster: str = OWN,
    command: Sequence[str] = (),
) -> StudyResult:
    """Run what is not finished of a study, and write results.parquet.

    Args:
        study: the grid.
        base: configuration file and overrides that every trial starts from.
        lake: folder with the samples table; None for a study that makes its own worlds.
        run_dir: a new folder, or that of the same study.
        input_dir: the data set's files, for a study that makes worlds of real logs.
        build_worlds: what builds the lakes of a study that makes worlds.
        cluster: what trainer_environment.prepare_environment returned.
        command: noted in study.json.

    Raises:
        UserError: a trial's configuration, the lake or the directory cannot be used; nothing has been trained then.
    """
    _check_source(study, lake, input_dir)
    if cluster == SUBMITTED:
        refuse_relative({"--run-dir": run_dir} | ({"--lake": lake} if lake else {}))
    run_dir = Path(run_dir).absolute()
    lake = whole_path(lake) if lake else None
    trials = expand(study)
    for trial in trials:
        base.config(study.resources, trial)  # every mistake in the grid is found before anything is trained
    record = open_study(run_dir, study, base, lake=str(lake or ""), command=command)
    if study.has_worlds:
        write_record(run_dir, record)  # the worlds are built in its directory; else nothing is written for a wrong lake
    todo = [trial for trial in trials if not is_finished(trial_dir(run_dir, trial))]
    print(f"{study.name}: {len(trials)} trials, {len(trials) - len(todo)} of them finished already", flush=True)
    worlds = {"": World(str(lake))}
    if study.has_worlds:
        worlds = prepare_worlds(study, base, trials, run_dir, input_dir, build=build_worlds)
    record["tables"] = tables = {
        name: record["tables"].get(name) or {"lake": world.lake, "version": table_version(world.lake, base)}
        for name, world in worlds.items()
    }
    write_record(run_dir, record)
    pinned = [pinned_rows(table["lake"], base, table["version"]) for table in tables.values()] if todo else []
    for manifests in pinned:  # trials to come read these files too, and have no pin of their own yet
        write_pin(manifests, run_dir)
    jobs = [
        Job(
            trial,
            base.config(study.resources, trial, table_version=tables[trial.world]["version"]),
            tables[trial.world]["lake"],
            trial_dir(run_dir, trial),
            keep_model=study.representations,
        )
        for trial in todo
    ]
    if jobs:
        run_jobs(jobs, study.resources, cluster=cluster)
    rows = result_rows(run_dir, trials)
    path = write_results(run_dir, rows)
    unfinished = [trial for trial in trials if not is_finished(trial_dir(run_dir, trial))]
    failures = {trial.trial_id: failure_of(trial_dir(run_dir, trial)) or "no result" for trial in unfinished}
    if not failures:
        for manifests in pinned:
            remove_pin(manifests[0].table_uri, run_dir)
    return StudyResult(path, len(trials) - len(failures), failures)


def _check_source(study: Study, lake: str | None, input_dir: Path | None) -> None:
    if study.has_worlds and lake:
        raise StudyError(f"--lake {lake}: study {study.name} makes worlds of its own; leave --lake out")
    if not study.has_worlds and not lake:
        raise StudyError(f"--lake is missing: study {study.name} trains on a table of jobs/build_samples.py; name it")
    is_real = study.source != SIMULATED
    if input_dir is None and is_real:
        raise StudyError(
            f"--input is missing: study {study.name} makes its worlds of {study.source}'s files; name their folder"
        )
    if input_dir is not None and not is_real:
        raise StudyError(f"--input {input_dir}: study {study.name} reads no data set; leave --input out")
    if input_dir is not None and not input_dir.is_dir():
        raise StudyError(f"--input {input_dir}: no such folder; name the one with {study.source}'s files")


@dataclass(frozen=True, slots=True)
class Job:
    """A trial that can be started."""

    trial: Trial
    config: Config
    lake: str
    run_dir: Path
    keep_model: bool = False
    """Keep the checkpoints of a finished trial; otherwise only its metrics and predictions stay."""


def run_jobs(
    jobs: Sequence[Job], resources: Resources, *, cluster: str, say: Callable[[str], None] | None = None
) -> None:
    """Run every job, with a line of progress and the time left after each; a failure is noted and the others go on."""
    say = say or (lambda text: print(text, flush=True))
    session = jobs[0].config.ray
    with ray_session(session, cluster=cluster):
        slots = num_slots(resources, ray.cluster_resources(), use_gpu=session.use_gpu)
        slots = min(slots, len(jobs))
        say(f"{len(jobs)} trials to run, {slots} at once, {resources.num_workers} workers each")
        progress = Progress(len(jobs), slots, say)
        waiting = list(jobs)
        running: dict[Any, Job] = {}
        remote = _remote_trial(resources, use_gpu=session.use_gpu)
        while waiting or running:
            while waiting and len(running) < slots:
                job = waiting.pop(0)
                running[remote.remote(job)] = job
            done, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_S)
            if not done:
                progress.still_running([job.run_dir for job in running.values()])
            for reference in done:
                job = running.pop(reference)
                try:
                    ray.get(reference)
                except Exception as error:  # the process was lost more than _LOSSES times
                    note_failure(job.run_dir, f"{type(error).__name__}: {str(error).splitlines()[0]}")
                progress.ended(job)


def num_slots(resources: Resources, present: Mapping[str, float], *, use_gpu: bool) -> int:
    """Trials that run at once without waiting for one another's workers.

    Raises:
        StudyError: not even one fits.
    """
    needed = {"CPU": resources.num_workers * resources.cpus_per_worker}
    if use_gpu:
        needed["GPU"] = float(resources.num_workers)
    fit = min(math.floor(present.get(name, 0.0) / count + 1e-9) for name, count in needed.items())
    if fit < 1:
        words = ", ".join(f"{count:g} {name}" for name, count in needed.items())
        have = ", ".join(f"{present.get(name, 0.0):g} {name}" for name in needed)
        raise StudyError(f"resources: a trial needs {words}, the cluster has {have}; lower resources.num_workers")
    return min(fit, resources.max_concurrent) if resources.max_concurrent else fit


class Progress:
    """Lines about a study: what ended, and when all will have."""

    def __init__(self, total: int, slots: int, say: Callable[[str], None]) -> None:
        self._total, self._slots, self._say = total, slots, say
        self._num_ended, self._start_s = 0, time.monotonic()

    def ended(self, job: Job) -> None:
        """One trial has a result, or has failed."""
        self._num_ended += 1
        passed_s = time.monotonic() - self._start_s
        left = dt.timedelta(seconds=round(passed_s / self._num_ended * (self._total - self._num_ended)))
        failure = "" if is_finished(job.run_dir) else failure_of(job.run_dir) or "stopped"
        outcome = f"FAILED: {failure}" if failure else "finished"
        self._say(f"[{self._num_ended}/{self._total}] {job.trial.trial_id} {outcome}; left {left}")

    def still_running(self, folders: Sequence[Path]) -> None:
        """The last line of each log."""
        for folder in folders:
            with contextlib.suppress(OSError, IndexError):
                line = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()[-1]
                self._say(f"  {folder.name}: {line}")


def _remote_trial(resources: Resources, *, use_gpu: bool) -> Any:
    alone = resources.num_workers == 1
    options: dict[str, Any] = {"num_cpus": resources.cpus_per_worker if alone else 0, "max_retries": _LOSSES}
    if alone and use_gpu:
        options["num_gpus"] = 1
    return ray.remote(run_trial).options(**options)


def run_trial(job: Job) -> None:
    """One trial, in a Ray task's process: to its result, or to a failure.json."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with (job.run_dir / LOG_FILE).open("a", encoding="utf-8", buffering=1) as log, contextlib.redirect_stdout(log):
        try:
            if job.config.ray.num_workers == 1:
                worker = LocalWorker()
                worker.stop_on_signal()
                train_alone(job.config, job.lake, job.run_dir, worker, command=[job.trial.trial_id])
            else:
                run(job.config, job.lake, job.run_dir, command=[job.trial.trial_id])
        except UserError as error:
            note_failure(job.run_dir, " ".join(str(error).split()))
        except Exception as error:
            note_failure(job.run_dir, f"{type(error).__name__}: {error}", traceback.format_exc())
        else:
            (job.run_dir / FAILURE_FILE).unlink(missing_ok=True)
    if is_finished(job.run_dir) and not job.keep_model:
        shutil.rmtree(job.run_dir / "checkpoints", ignore_errors=True)


def train_alone(config: Config, lake: str, run_dir: Path, worker: LocalWorker, *, command: Sequence[str] = ()) -> None:
    """jobs/train.py's run on one worker in this process; goes on with what `run_dir` holds.

    Raises:
        UserError: as trainer.run.
    """
    plan = plan_run(config, lake, run_dir, command=command)
    if is_finished(run_dir):
        return
    write_plan(plan)
    torch.set_num_threads(max(1, math.floor(config.ray.cpus_per_worker)))
    train_manifest = load_manifest(run_dir, "train")
    assert train_manifest is not None
    monitor = RayMonitor(run_dir, run_name=run_dir.name, rank=0)
    try:
        result = train(
            config,
            worker,
            train_manifest=train_manifest,
            eval_manifest=plan.eval_manifest,
            run_dir=run_dir,
            monitor=monitor,
        )
    finally:
        monitor.close()
    if result.status == "stopped":
        return
    if plan.eval_manifest is not None:
        write_result(run_dir, config, result, plan.eval_manifest)
    mark_finished(plan, outcome=result.status, step=result.step)
