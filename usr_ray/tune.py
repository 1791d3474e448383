"""A search for hyper-parameters on Ray Tune: random draws, ASHA, trials of one or of several workers, resumable.

Each trial is a driver function. With one worker it runs the loop in its own process; with more it reserves no CPU and
starts Ray Train's worker group, and as many trials run at once as the cluster holds worker groups: so no driver waits
for CPUs that other drivers hold. Afterwards the chosen and the given configuration are trained on all of
data.train_dates and compared on data.eval_dates, which the search has not seen (a study of two points, study.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from usr_ray.config import Config, UserError, dotted
from usr_ray.config_tune import METRICS, SpaceConfig, TuneConfig
from usr_ray.files import write_whole
from usr_ray.study import LOG_FILE, StudyResult, num_slots, run_study, train_alone
from usr_ray.study_grid import Axis, Comparison, Resources, Study
from usr_ray.study_record import Base, now
from usr_ray.study_worlds import table_version
from usr_ray.trainer import run
from usr_ray.trainer_environment import OWN
from usr_ray.trainer_session import ray_session
from usr_ray.tune_space import (
    Choice,
    TriedPoint,
    TuneError,
    choose,
    choosing_dates,
    config_toml,
    default_point,
    load_search,
    trial_config,
    with_values,
)
from usr_ray.worker import LocalWorker

SEARCH_FILE, BEST_FILE, TRIALS_DIR, RAY_DIR, FINAL_DIR = "search.json", "best.toml", "trials", "ray", "final"
_EXPERIMENT = "search"
_DRIVER_MEMORY_BYTES = 200_000_000
"""What a driver of a worker group reserves: Ray wants something, and a CPU would be one that its workers wait for."""


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
    """Search, or go on with the search that `run_dir` holds; then judge the choice on the reporting dates.

    Args:
        base: configuration file and overrides; section [tune] declares the search.
        lake: folder with the samples table.
        run_dir: a new folder, or that of the same search.
        cluster: what trainer_environment.prepare_environment returned.
        command: noted in search.json.

    Raises:
        UserError: the space, dates, lake or directory cannot be used; every trial failed.
    """
    config, run_dir = load_search(base.config_path, base.overrides), Path(run_dir).absolute()
    record = _open(config, lake, run_dir, base, command)
    dates = choosing_dates(config)
    print(f"trials train on {dates.train}, {dates.choose} chooses, {config.data.eval_dates} judges", flush=True)
    with ray_session(config.ray, cluster=cluster):
        points = _search(config, lake, run_dir, record["table_version"])
        choice = choose(points, config)
        record |= {"trials": [_as_row(point) for point in points], "chosen": choice.point.trial_id, "ended": now()}
        record["best"] = {"value": choice.value, "overrides": choice.overrides()}
        _write(run_dir, record)
        best = run_dir / BEST_FILE
        write_whole(best, _best_toml(config, choice, record))
        print(
            f"chosen: {choice.overrides()} with {config.tune.metric} {choice.value:.5f}; written to {best}", flush=True
        )
        study = final_study(config, choice)
        pinned = Base(base.config_path, (*base.overrides, f"data.table_version={record['table_version']}"))
        final = run_study(study, pinned, lake, run_dir / FINAL_DIR, cluster=cluster, command=command)
    return TuneResult(choice, points, best, final, study)


def final_study(config: Config, choice: Choice) -> Study:
    """The study of two points that judges the choice."""
    return Study(
        name="final",
        title="Tuned against given",
        question=f"Does the configuration chosen by {config.tune.metric} beat the given one on dates that it was not "
        "chosen on?",
        seeds=config.tune.final_seeds,
        base={},
        axes=(Axis("configuration", {"given": {}, "tuned": choice.overrides()}),),
        comparisons=(Comparison(axis="configuration", of=("tuned",), against="given"),),
        resources=_resources(config),
    )


def _resources(config: Config) -> Resources:
    return Resources(
        num_workers=config.ray.num_workers,
        cpus_per_worker=config.ray.cpus_per_worker,
        max_concurrent=config.tune.max_concurrent,
    )


def _open(config: Config, lake: str, run_dir: Path, base: Base, command: Sequence[str]) -> dict[str, Any]:
    """The record of a new search, written, or of the one to go on with."""
    path, meaning = run_dir / SEARCH_FILE, config.to_dict()
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            saved, found_lake, _ = dotted(Config.completed(record["config"])), record["lake"], record["table_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TuneError(f"{path}: cannot be read ({error}); use another --run-dir, or remove this one") from error
        for key, value in dotted(meaning).items():
            if not key.startswith("ray.") and saved.get(key) != value:
                raise TuneError(
                    f"--run-dir {run_dir}: holds a search with {key} = {saved.get(key)!r}, this command has {value!r}; "
                    "set it back to go on with that search, or use another --run-dir"
                )
        if found_lake != lake:
            raise TuneError(
                f"--run-dir {run_dir}: holds a search on {found_lake}, this command names {lake}; name that one"
            )
        return record
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise TuneError(f"--run-dir {run_dir}: is there and holds no search; name a new or empty folder")
    record = {"created": now(), "command": list(command), "config": meaning, "lake": lake,
              "table_version": table_version(lake, base), "train_seed": config.train.seed}  # fmt: skip
    trial_config(config, {}, table_version=record["table_version"])
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir, record)
    return record


def _write(run_dir: Path, record: Mapping[str, Any]) -> None:
    write_whole(run_dir / SEARCH_FILE, json.dumps(record, indent=2) + "\n")


def _best_toml(config: Config, choice: Choice, record: Mapping[str, Any]) -> str:
    best = with_values(config, choice.overrides())
    return config_toml(
        best,
        comment=f"Chosen by jobs/tune.py: trial {choice.point.trial_id}, {config.tune.metric} {choice.value:.6f} on "
        f"{choosing_dates(config).choose}.\nTable version {record['table_version']}, train.seed {config.train.seed}.\n"
        f"Found: {json.dumps(choice.overrides())}",
    )


def _search(config: Config, lake: str, run_dir: Path, version: int) -> list[TriedPoint]:
    """Every trial that was drawn, run to its end or until ASHA stopped it."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    resources, storage = _resources(config), run_dir / RAY_DIR
    slots = num_slots(resources, ray.cluster_resources(), use_gpu=config.ray.use_gpu)
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial, config=config.to_dict(), lake=lake, folder=str(run_dir / TRIALS_DIR), version=version
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
                name=_EXPERIMENT,
                storage_path=str(storage),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
    print(f"{config.tune.num_trials} trials, {slots} at once, {resources.num_workers} workers each", flush=True)
    results = tuner.fit()
    return [_tried(results[n], config) for n in range(len(results))]


def _tune_config(config: Config, slots: int) -> tune.TuneConfig:
    settings: TuneConfig = config.tune
    default = default_point(config)
    longest = _most_epochs(config)
    scheduler = ASHAScheduler(
        time_attr="epoch",
        max_t=longest,
        grace_period=min(settings.grace_epochs, longest),
        reduction_factor=settings.reduction,
    )
    return tune.TuneConfig(
        metric=settings.metric,
        mode=METRICS[settings.metric],
        num_samples=settings.num_trials,
        scheduler=scheduler,
        search_alg=BasicVariantGenerator(
            points_to_evaluate=[default] if default else None, random_state=settings.seed, max_concurrent=slots
        ),
        trial_name_creator=lambda trial: f"trial_{trial.trial_id}",
        trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
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
    """The one rank of a trial; Tune hears of its evaluations."""

    def report(self, metrics: Mapping[str, float]) -> None:
        tune.report(dict(metrics))


def run_trial(values: Mapping[str, Any], *, config: Mapping[str, Any], lake: str, folder: str, version: int) -> None:
    """A trial's driver, in a process of its own; started again it goes on from its checkpoint.

    Raises:
        RuntimeError: of what a UserError said, so that Tune notes one line.
    """
    given = Config.from_dict(config)
    own = trial_config(given, values, table_version=version)
    run_dir = Path(folder) / tune.get_context().get_trial_id()
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOG_FILE).open("a", encoding="utf-8", buffering=1) as log, contextlib.redirect_stdout(log):
        try:
            if own.ray.num_workers == 1:
                train_alone(own, lake, run_dir, _TuneWorker())
            else:
                run(own, lake, run_dir, callbacks=[TuneReportCallback()])
        except UserError as error:
            raise RuntimeError(" ".join(str(error).split())) from None


def _tried(result: Any, config: Config) -> TriedPoint:
    """A trial as its reports tell it."""
    values = dict(result.config)
    by_epoch: dict[int, float] = {}
    frame = result.metrics_dataframe
    if frame is not None and "epoch" in frame:
        for row in frame.to_dict("records"):  # a trial that was cut off reports some epochs again
            by_epoch[int(row["epoch"])] = float(row.get(config.tune.metric, math.nan))
    error = str(result.error).strip().splitlines()[-1] if result.error else ""
    epochs = int(values.get("train.num_epochs", config.train.num_epochs))
    trial_id = Path(result.path).name.removeprefix("trial_")
    curve = tuple(by_epoch.get(epoch, math.nan) for epoch in range(1, max(by_epoch, default=0) + 1))
    return TriedPoint(trial_id, values, curve, epochs, error)


def _as_row(point: TriedPoint) -> dict[str, Any]:
    return {
        "trial_id": point.trial_id, "status": point.status, "values": dict(point.values), "error": point.error,
        "curve": [value if math.isfinite(value) else None for value in point.curve], "num_epochs": point.num_epochs,
    }  # fmt: skip
