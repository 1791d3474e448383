"""A search for hyper-parameters on Ray Tune: random draws or Optuna's, ASHA, trials of one or more workers, resumable.

Each trial is a driver function. With one worker it runs the loop in its own process; with more it reserves no CPU and
starts Ray Train's worker group, and as many trials run at once as the cluster holds worker groups: so no driver waits
for CPUs that other drivers hold. Afterwards the chosen and the given configuration are trained on all of
data.train_dates and compared on data.eval_dates, which the search has not seen (a study of two points, study.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from usr_ray.config import Config, UserError
from usr_ray.config.training import METRICS, SpaceConfig, TuneConfig
from usr_ray.data.pins import remove_pin, write_pin
from usr_ray.experiments.grid import Resources, Study
from usr_ray.experiments.record import Base, failure_of, note_failure
from usr_ray.experiments.search_record import FINAL_DIR, as_row, open_search, read_points, write_search, write_values
from usr_ray.experiments.space import (
    Choice,
    TriedPoint,
    TuneError,
    best_toml,
    choose,
    choosing_dates,
    default_point,
    final_study,
    load_search,
    search_resources,
    trial_config,
)
from usr_ray.experiments.study import StudyResult, run_study
from usr_ray.experiments.trials import Progress, num_slots, run_trial
from usr_ray.experiments.worlds import check_same_rows, pinned_rows, whole_path
from usr_ray.files import now, write_whole
from usr_ray.launch.alone import refuse_relative_run
from usr_ray.launch.environment import OWN, SUBMITTED
from usr_ray.launch.session import ray_session
from usr_ray.runs.plan import with_whole_paths
from usr_ray.training.worker import LocalWorker

BEST_FILE, TRIALS_DIR, RAY_DIR = "best.toml", "trials", "ray"
_EXPERIMENT = "search"
_DRIVER_MEMORY_BYTES = 200_000_000
"""What a driver of a worker group reserves: Ray refuses nothing at all, and its workers would wait for a CPU."""


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What a call of `run_search` ended with."""

    choice: Choice
    points: list[TriedPoint]
    best_config: Path
    """TOML that jobs/train.py takes."""
    final: StudyResult
    """The chosen and the given configuration on data.eval_dates, in `<run-dir>/final`."""
    study: Study


def run_search(base: Base, lake: str, run_dir: Path, *, cluster: str = OWN, command: Sequence[str] = ()) -> TuneResult:
    """Search, or resume the search in `run_dir`; then judge the choice on the reporting dates.

    Args:
        base: declares the search in its section [tune].
        run_dir: a new folder, or that of the same search.
        cluster: what launch/environment.prepare_environment returned.

    Raises:
        UserError: the space, dates, lake or directory cannot be used; every trial failed.
    """
    config = load_search(base.config_path, base.overrides)
    if cluster == SUBMITTED:
        refuse_relative_run(config, lake, run_dir)
    lake, run_dir = whole_path(lake), Path(run_dir).absolute()
    record = open_search(config, lake, run_dir, base, command)
    dates = choosing_dates(config)
    print(f"trials train on {dates.train}, {dates.choose} chooses, {config.data.eval_dates} judges", flush=True)
    with ray_session(config.ray, cluster=cluster):
        manifests = pinned_rows(lake, base, record["table_version"])
        check_same_rows(record, manifests, run_dir)
        write_search(run_dir, record)
        write_pin(manifests, run_dir)
        points = _search(config, lake, run_dir, record["table_version"])
        choice = choose(points, config)
        record |= {"trials": [as_row(point) for point in points], "chosen": choice.point.trial_id, "ended": now()}
        record["best"] = {"value": choice.value, "overrides": choice.overrides()}
        write_search(run_dir, record)
        best = run_dir / BEST_FILE
        write_whole(best, best_toml(config, choice, record))
        print(
            f"chosen: {choice.overrides()} with {config.tune.metric} {choice.value:.5f}; written to {best}", flush=True
        )
        study = final_study(config, choice)
        pinned = Base(base.config_path, (*base.overrides, f"data.table_version={record['table_version']}"))
        final = run_study(study, pinned, lake, run_dir / FINAL_DIR, cluster=cluster, command=command)
    for folder in [run_dir, *(run_dir / TRIALS_DIR / point.trial_id for point in points)]:
        remove_pin(manifests[0].table_uri, folder)  # a trial that ASHA stopped could not remove its own
    return TuneResult(choice, points, best, final, study)


def _search(config: Config, lake: str, run_dir: Path, version: int) -> list[TriedPoint]:
    """Every trial that was drawn, run to its end or until ASHA stopped it."""
    # Of a failed trial Tune logs a traceback of thirty lines; `_Progress` says why it failed in one.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    resources, storage = search_resources(config), run_dir / RAY_DIR
    slots = num_slots(resources, ray.cluster_resources(), use_gpu=config.ray.use_gpu)
    trainable = tune.with_resources(
        tune.with_parameters(
            run_drawn,
            config=with_whole_paths(config).to_dict(),
            lake=lake,
            folder=str(run_dir / TRIALS_DIR),
            version=version,
        ),
        _reserved(resources, use_gpu=config.ray.use_gpu),
    )
    experiment = str(storage / _EXPERIMENT)
    if tune.Tuner.can_restore(experiment):
        print(f"{run_dir}: goes on with the search it holds", flush=True)
        try:
            tuner = tune.Tuner.restore(experiment, trainable, resume_unfinished=True)
        except Exception as error:
            raise TuneError(
                f"{experiment}: what Ray kept of the search cannot be read ({type(error).__name__}: {error}); remove "
                "that folder to search anew"
            ) from error
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={path: draw(space) for path, space in config.tune.space.items()},
            tune_config=_tune_config(config, slots),
            run_config=tune.RunConfig(
                name=_EXPERIMENT, storage_path=str(storage), verbose=0, callbacks=[_Progress(run_dir / TRIALS_DIR)]
            ),
        )
    print(f"{config.tune.num_trials} trials, {slots} at once, {resources.num_workers} workers each", flush=True)
    results = tuner.fit()
    lost = {
        Path(result.path).name.removeprefix("trial_"): str(result.error).strip().splitlines()[-1]
        for result in (results[n] for n in range(len(results)))
        if result.error and result.path
    }
    return read_points(run_dir / TRIALS_DIR, config, lost)


class _Progress(tune.Callback):
    """A line for each trial that ended, with the time left."""

    def __init__(self, trials_dir: Path) -> None:
        self._trials_dir = trials_dir

    # Tune passes everything by name.
    def setup(self, **info: Any) -> None:  # type: ignore[override]
        """See tune.Callback; called at the start of a resumed search too, from which its time is counted."""
        self._progress = Progress(info.get("total_num_samples") or 0)

    def on_trial_complete(self, **info: Any) -> None:  # type: ignore[override]
        """See tune.Callback."""
        trial = info["trial"]
        self._progress.ended(trial.trial_id, f"ended after {(trial.last_result or {}).get('epoch', 0)} epochs")

    def on_trial_error(self, **info: Any) -> None:  # type: ignore[override]
        """See tune.Callback."""
        trial_id = info["trial"].trial_id
        failure = failure_of(self._trials_dir / trial_id) or "its process ended"
        self._progress.ended(trial_id, f"FAILED: {failure}")


def _search_algorithm(config: Config, slots: int) -> SearchAlgorithm | Searcher:
    """The drawer of trials; the configuration as given comes first, where the space holds it."""
    settings, default = config.tune, default_point(config)
    first = [default] if default else None
    if first is None:
        print(
            "the space does not hold the configuration as given, which is no trial; the end compares with it",
            flush=True,
        )
    if settings.search == "random":
        return BasicVariantGenerator(points_to_evaluate=first, random_state=settings.seed, max_concurrent=slots)
    from ray.tune.search.optuna import OptunaSearch  # load_search has seen that Optuna is installed

    logging.getLogger("optuna").setLevel(logging.WARNING)
    return ConcurrencyLimiter(OptunaSearch(points_to_evaluate=first, seed=settings.seed), max_concurrent=slots)


def _tune_config(config: Config, slots: int) -> tune.TuneConfig:
    settings: TuneConfig = config.tune
    return tune.TuneConfig(
        metric=settings.metric,
        mode=METRICS[settings.metric],
        num_samples=settings.num_trials,
        scheduler=_scheduler(config),
        search_alg=_search_algorithm(config, slots),
        trial_name_creator=lambda trial: f"trial_{trial.trial_id}",
        trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
    )


def _scheduler(config: Config) -> Any:
    """ASHA for trials in their own processes; trials of several workers always run to the end.

    Ray ends a trial that ASHA stops by killing its driver. In 2.60 the placement group of its worker group then stays
    until an actor of Ray's has asked the dashboard whether the controller is dead, for ever where there is none, and
    the next trial waits for those CPUs. max_t lies beyond the last epoch, since there too ASHA would kill: a trial
    that is just writing its result.
    """
    longest = _most_epochs(config)
    if config.ray.num_workers > 1 and longest > 1:
        print(
            f"trials of {config.ray.num_workers} workers run to their end; with ray.num_workers=1 ASHA stops the worse "
            "ones (tune.grace_epochs, tune.reduction)",
            flush=True,
        )
    if config.ray.num_workers > 1 or longest == 1:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        max_t=longest + 1,
        grace_period=min(config.tune.grace_epochs, longest),
        reduction_factor=config.tune.reduction,
    )


def _most_epochs(config: Config) -> int:
    space = config.tune.space.get("train.num_epochs")
    if space is None:
        return config.train.num_epochs
    return int(max((float(v) for v in space.values), default=space.high))


def _reserved(resources: Resources, *, use_gpu: bool) -> dict[str, float]:
    if resources.num_workers > 1:
        return {"memory": float(_DRIVER_MEMORY_BYTES)}
    return {"CPU": resources.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})


def draw(space: SpaceConfig) -> Any:
    """Ray Tune's domain of a key."""
    if space.kind == "choice":
        return tune.choice(list(space.values))
    if space.kind == "int":
        return tune.randint(int(space.low), int(space.high) + 1)
    return (tune.loguniform if space.kind == "log_uniform" else tune.uniform)(space.low, space.high)


class _TuneWorker(LocalWorker):
    """The only rank of a trial; it reports its evaluations to Tune."""

    def report(self, metrics: Mapping[str, float]) -> None:
        tune.report(dict(metrics))


def run_drawn(values: Mapping[str, Any], *, config: Mapping[str, Any], lake: str, folder: str, version: int) -> None:
    """A trial's driver, in its own process; started again it resumes from its checkpoint.

    Raises:
        RuntimeError: the trial failed; in one line, which Tune records.
    """
    given = Config.from_dict(config)
    run_dir = Path(folder) / tune.get_context().get_trial_id()
    write_values(run_dir, values, num_epochs=int(values.get("train.num_epochs", given.train.num_epochs)))
    try:
        own = trial_config(given, values, table_version=version)
    except UserError as error:  # values that fit alone need not fit together
        note_failure(run_dir, str(error))
        raise RuntimeError(str(error)) from error
    callbacks = [TuneReportCallback()] if own.ray.num_workers > 1 else []
    failure = run_trial(own, lake, run_dir, worker=_TuneWorker, callbacks=callbacks)
    if failure:
        raise RuntimeError(failure)
