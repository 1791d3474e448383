"""Running a study: its trials as Ray tasks, as many at once as the cluster holds, each a run directory of its own.

A trial of more than one worker is a task without CPUs that starts Ray Train's worker group. The number of tasks is
bounded by what their workers need, so no trial waits for another's CPUs.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from usr_ray.config import Config
from usr_ray.data.lineage import doubts, warn
from usr_ray.data.manifest import Manifest
from usr_ray.data.pins import remove_pin, write_pin
from usr_ray.experiments.grid import SIMULATED, Resources, Study, StudyError, Trial, expand
from usr_ray.experiments.record import (
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
from usr_ray.experiments.trials import LOG_FILE, Progress, num_slots, run_trial
from usr_ray.experiments.worlds import (
    BuildWorlds,
    prepare_worlds,
    rows_of,
    table_version,
    whole_path,
)
from usr_ray.launch.alone import refuse_relative_run
from usr_ray.launch.environment import OWN, SUBMITTED
from usr_ray.launch.session import ray_session
from usr_ray.runs.plan import with_whole_paths
from usr_ray.runs.telltale import telltales
from usr_ray.training.checkpoint import CHECKPOINTS
from usr_ray.training.worker import LocalWorker

_LOSSES = 2
"""Times that Ray starts a trial again whose process was lost; it goes on from its checkpoint."""
_POLL_S = 30.0


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a call of `run_study` ended with."""

    results: Path
    num_finished: int
    failures: dict[str, str]
    """Trial id -> why it failed."""


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
        base: configuration file and overrides that every trial starts from.
        lake: None for a study that makes its own worlds.
        run_dir: a new folder, or that of the same study.
        input_dir: the data set's files, for a study that makes worlds of real logs.
        build_worlds: what builds the lakes of a study that makes worlds.
        cluster: what launch/environment.prepare_environment returned.

    Raises:
        UserError: a trial's configuration, the lake or the directory cannot be used; nothing has been trained then.
    """
    _check_source(study, lake, input_dir)
    _check_workers(study, base)
    base = base.of_study(study)
    if cluster == SUBMITTED:
        refuse_relative_run(base.config(study.resources), lake or run_dir, run_dir)
    run_dir = Path(run_dir).absolute()
    lake = whole_path(lake) if lake else None
    trials = expand(study)
    for trial in trials:
        _check_trial(base.config(study.resources, trial), trial)  # all of the grid before anything is trained
    record = open_study(run_dir, study, base, lake=str(lake or ""), command=command)
    if study.has_worlds:
        write_record(run_dir, record)  # the worlds are built in its directory; else nothing is written for a wrong lake
    todo = [trial for trial in trials if not is_finished(trial_dir(run_dir, trial))]
    print(f"{study.name}: {len(trials)} trials, {len(trials) - len(todo)} of them finished already", flush=True)
    worlds = {"": str(lake)}
    if study.has_worlds:
        worlds = prepare_worlds(study, base, trials, run_dir, input_dir, build=build_worlds)
    record["tables"] = tables = {
        name: record["tables"].get(name) or {"lake": place, "version": table_version(place, base)}
        for name, place in worlds.items()
    }
    pinned = [rows_of(table, base, run_dir) for table in tables.values()] if todo else []
    write_record(run_dir, record)
    _pin(pinned, base.config(study.resources), run_dir)
    jobs = [
        Job(
            trial,
            with_whole_paths(base.config(study.resources, trial, table_version=tables[trial.world]["version"])),
            tables[trial.world]["lake"],
            trial_dir(run_dir, trial),
            keep_model=study.representations,
        )
        for trial in todo
    ]
    if jobs:
        run_here(jobs) if base.is_here else run_jobs(jobs, study.resources, cluster=cluster)
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


def _check_trial(config: Config, trial: Trial) -> None:
    if config.train.early_stopping:
        raise StudyError(
            f"trial {trial.trial_id}: train.early_stopping would choose its epoch on data.eval_dates, on which the "
            "study compares; switch it off"
        )


def _check_workers(study: Study, base: Base) -> None:
    if base.is_here and (wanted := study.resources.num_workers) > 1:
        raise StudyError(
            f"ray.num_workers=0: a trial of study {study.name} has {wanted} workers, which needs Ray; leave it out, or "
            "set resources.num_workers to 1 in the study's file"
        )


def _pin(pinned: Sequence[list[Manifest]], config: Config, run_dir: Path) -> None:
    """Trials to come read these files too, and have no pin of their own yet. Doubts about them are printed once."""
    for manifests in pinned:
        write_pin(manifests, run_dir)
    told = [*(doubts(config, train, held_out, first_counted=None) for train, held_out in pinned)]
    told += [telltales(config, train) for train, _ in pinned]
    warn(dict.fromkeys(doubt for found in told for doubt in found))


@dataclass(frozen=True, slots=True)
class Job:
    """A trial that can be started."""

    trial: Trial
    config: Config
    lake: str
    run_dir: Path
    keep_model: bool = False
    """Keep the checkpoints of a finished trial; otherwise only its metrics and predictions stay."""


def run_jobs(jobs: Sequence[Job], resources: Resources, *, cluster: str) -> None:
    """Run every job, with a line of progress and the time left after each; a failure is noted and the others go on."""
    session = jobs[0].config.ray
    with ray_session(session, cluster=cluster):
        slots = min(num_slots(resources, ray.cluster_resources(), use_gpu=session.use_gpu), len(jobs))
        print(f"{len(jobs)} trials to run, {slots} at once, {resources.num_workers} workers each", flush=True)
        progress = Progress(len(jobs))
        waiting = list(jobs)
        running: dict[Any, Job] = {}
        remote = _remote_trial(resources, use_gpu=session.use_gpu)
        while waiting or running:
            while waiting and len(running) < slots:
                job = waiting.pop(0)
                running[remote.remote(job)] = job
            done, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_S)
            if not done:
                _print_last_lines([job.run_dir for job in running.values()])
            for reference in done:
                job = running.pop(reference)
                try:
                    ray.get(reference)
                except Exception as error:  # the process was lost more than _LOSSES times
                    note_failure(job.run_dir, f"{type(error).__name__}: {str(error).splitlines()[0]}")
                failure = "" if is_finished(job.run_dir) else failure_of(job.run_dir) or "stopped"
                progress.ended(job.trial.trial_id, f"FAILED: {failure}" if failure else "finished")


def run_here(jobs: Sequence[Job]) -> None:
    """Every job in this process, one after the other, without Ray; SIGTERM ends the one that runs, with a save."""
    progress, worker = Progress(len(jobs)), LocalWorker()
    before = signal.getsignal(signal.SIGTERM)
    worker.stop_on_signal()
    try:
        for job in jobs:
            if worker.should_stop():  # between two of them, too
                break
            run_job(job, lambda: worker)
            failure = failure_of(job.run_dir)
            if not failure and not is_finished(job.run_dir):
                break
            progress.ended(job.trial.trial_id, f"FAILED: {failure}" if failure else "finished")
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_last_lines(folders: Sequence[Path]) -> None:
    """How far the running trials are."""
    for folder in folders:
        with contextlib.suppress(OSError, IndexError):
            line = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()[-1]
            print(f"  {folder.name}: {line}", flush=True)


def _remote_trial(resources: Resources, *, use_gpu: bool) -> Any:
    alone = resources.num_workers == 1
    options: dict[str, Any] = {"num_cpus": resources.cpus_per_worker if alone else 0, "max_retries": _LOSSES}
    if alone and use_gpu:
        options["num_gpus"] = 1
    return ray.remote(run_job).options(**options)


def _stoppable() -> LocalWorker:
    worker = LocalWorker()
    worker.stop_on_signal()
    return worker


def run_job(job: Job, worker: Callable[[], LocalWorker] = _stoppable) -> None:
    """One trial, in a Ray task's process or in this one: to its result, or to a failure.json."""
    run_trial(job.config, job.lake, job.run_dir, worker=worker, command=[job.trial.trial_id])
    if is_finished(job.run_dir) and not job.keep_model:
        shutil.rmtree(job.run_dir / CHECKPOINTS, ignore_errors=True)
