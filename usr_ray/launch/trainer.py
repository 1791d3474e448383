"""Training on Ray: the loop on a group of Ray Train workers, its restarts, and what is left in the run directory.

Ray starts, watches and restarts the workers. Everything a run needs to resume is ours (training/checkpoint.py,
runs/plan.py):
each attempt has a Ray run name of its own, so nothing that Ray left behind can block or change it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib
import json
import logging
import math
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device

from usr_ray.cli import usable_cores
from usr_ray.config import Config, RayConfig, UserError, parse_duration_us
from usr_ray.launch.alone import RunSummary, carry_out, refuse_relative_run, train_planned
from usr_ray.launch.environment import OWN, SUBMITTED, keep_freed_memory
from usr_ray.launch.monitor import RayMonitor
from usr_ray.launch.rollcall import RollCall, read_refusal, reserve_refusal, write_refusal
from usr_ray.launch.session import START_ATTEMPTS, ray_session
from usr_ray.launch.stop import (
    StoppableTorchConfig,
    ask_to_stop,
    make_empty,
    sigterm_sets,
    watch_stop_file,
    worker_was_asked,
)
from usr_ray.runs.plan import RunPlan, plan_run
from usr_ray.training.worker import Worker

RAY_DIR = "ray"
_REFUSED, _STOP, _ORDER, _ROLLS = "refused.json", "stop", "order.json", "rolls"
"""Files of an attempt: a worker's refusal, the request to stop, the configuration to train with, the roll calls."""
_POLL_S = 0.05
_DISMISSED_S = 60.0
"""Longest wait for workers that have no run; they may have just begun to load torch."""
POLICY_REQUESTS = ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request")
"""Methods of Ray Train's scaling policy that ask for machines."""


class RayWorker(Worker):
    """A rank of Ray Train's worker group, which has set up the process group."""

    def __init__(self, timeout: dt.timedelta) -> None:
        super().__init__(get_device(), timeout=timeout)

    def should_stop(self) -> bool:
        """See Worker; true after a SIGTERM to this process, too."""
        return worker_was_asked.is_set() or super().should_stop()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand numbers to Ray Train, for Tune. A barrier that takes up to two seconds: once an epoch, not each step."""
        ray.train.report(dict(metrics))


class _Trainer(TorchTrainer):
    """Ray's, without the actor that shares out Ray Data's sets among the workers, which read the table themselves.

    What is overridden here and in `_LocalTrainer` is Ray's own: where Ray no longer calls it, the actors are there
    again, and nothing else.
    """

    left_out = frozenset({"DatasetsCallback"})

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if type(callback).__name__ not in self.left_out]


class _LocalTrainer(_Trainer):
    """On a Ray that ends with this driver: without two more actors, for one of which the workers would wait.

    One removes the placement group of a dead controller: it asks the dashboard every second, and a run's end waits for
    it. The other shares out the machines of an autoscaler.
    """

    left_out = _Trainer.left_out | {"PlacementGroupCleanerCallback"}

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        for name in POLICY_REQUESTS:
            setattr(arguments["scaling_policy"], name, _ask_nobody)
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]


def _ask_nobody() -> None:
    """In place of the requests of Ray Train's scaling policy."""


def run(
    config: Config,
    lake: Path | str,
    run_dir: Path | str,
    *,
    cluster: str = OWN,
    command: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
) -> RunSummary:
    """Train on the table in `lake`, or resume the run in `run_dir`.

    Args:
        lake: every worker must see it under this name.
        run_dir: every worker must see it under this name.
        cluster: what `launch.environment.prepare_environment` returned. A Ray that this process is connected to already
            is used as it is. OWN: it ends with this process.
        callbacks: for Ray Train's RunConfig; Tune hears of the evaluations through one.

    Raises:
        UserError: see plan_run; a submitted job's path is relative; another process trains in this directory; a worker
            refused its data or checkpoint.
        TrainingFailedError: more failures than ray.max_failures.
    """
    if cluster == SUBMITTED:
        refuse_relative_run(config, lake, run_dir)
    plan = plan_run(config, lake, run_dir, command=command)
    session = ray_session(config.ray, cluster=cluster)

    def fit(plan: RunPlan) -> tuple[str, int]:
        attempt = _ahead.pop(plan.run_dir, None)
        if attempt is None or attempt.has_ended:  # ended before its run: of no fault of the run's, or it fails again
            attempt = _Attempt(plan.config, plan.run_dir, cluster, callbacks)
        return attempt.train(plan.config)

    return carry_out(plan, fit, session)


@contextlib.contextmanager
def workers_ahead(config: Config, run_dir: Path) -> Iterator[None]:
    """Start the workers of a run before it can be planned; the next `run` in `run_dir` inside the block takes them.

    They load torch, connect and wait: half of a short training's time. Ray must be up. Where no run took them they end
    with the block. On a Ray of our own alone: elsewhere they might wait for room, and be waited for.

    Args:
        config: its [ray] must be the run's.
        run_dir: absolute.
    """
    _ahead[run_dir] = _Attempt(config, run_dir, OWN)
    try:
        yield
    finally:
        if (attempt := _ahead.pop(run_dir, None)) is not None:
            attempt.dismiss()


class _Attempt:
    """A worker group, which waits for its run.

    Args:
        config: [ray] counts; the rest is what the dashboard shows.
        cluster, callbacks: as of `run`.
    """

    def __init__(self, config: Config, run_dir: Path, cluster: str, callbacks: Sequence[Any] = ()) -> None:
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.name)
        name = f"{stem}-{dt.datetime.now(dt.UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        self._storage = run_dir / RAY_DIR
        folder = self._storage / name
        self._refused, self._stop_file, self._order = folder / _REFUSED, folder / _STOP, folder / _ORDER
        reserve_refusal(self._refused)
        for path in (self._stop_file, self._order):
            make_empty(path)
        kind = _LocalTrainer if cluster == OWN else _Trainer
        ray_config = config.ray
        resources = {"CPU": ray_config.cpus_per_worker} | ({"GPU": 1.0} if ray_config.use_gpu else {})
        failures = FailureConfig(
            max_failures=ray_config.max_failures,
            controller_failure_limit=START_ATTEMPTS,  # type: ignore[call-arg]
        )
        trainer = kind(
            train_worker,  # type: ignore[arg-type]
            # Shown in the dashboard, so the configuration is in it and nothing large.
            train_loop_config={"run_dir": str(run_dir), "attempt": name, "config": config.to_dict()},
            torch_config=StoppableTorchConfig(
                backend="nccl" if ray_config.use_gpu else "gloo",
                timeout_s=math.ceil(_timeout(ray_config).total_seconds()),
            ),
            scaling_config=ScalingConfig(
                num_workers=ray_config.num_workers, use_gpu=ray_config.use_gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(self._storage),
                failure_config=failures,
                callbacks=list(callbacks),
                logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            ),
        )
        self._outcome: list[Any] = []
        # The signals stay with the main thread: there Ray would handle Ctrl-C, and abort in half a minute, with pages
        # of tracebacks and nothing saved.
        self._thread = threading.Thread(target=self._fit, args=(trainer,), name="fit", daemon=True)
        self._thread.start()

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            self._outcome.append(trainer.fit())
        except BaseException as error:  # raised again in the caller's thread
            self._outcome.append(error)

    @property
    def has_ended(self) -> bool:
        """Whether nobody waits any more, as after more failures than ray.max_failures."""
        return not self._thread.is_alive()

    def train(self, config: Config) -> tuple[str, int]:
        """(outcome, steps) of the run that is planned in this attempt's run directory.

        Raises:
            UserError: a worker refused its data or checkpoint.
            TrainingFailedError: more failures than ray.max_failures.
        """
        self._order.write_text(json.dumps(config.to_dict()), encoding="utf-8")
        try:
            result = self._result()
        except TrainingFailedError as error:
            if (message := read_refusal(self._refused)) is not None:
                raise UserError(message) from error
            raise
        if (message := read_refusal(self._refused)) is not None:
            raise UserError(message)
        shutil.rmtree(self._storage, ignore_errors=True)  # what Ray keeps of an attempt; nothing reads it afterwards
        returned: dict[str, Any] = result.return_value
        return returned["outcome"], returned["step"]

    def dismiss(self) -> None:
        """End the workers without a run, and wait for it: a thread that waits for Ray while it ends crashes in it."""
        self._order.write_text("null", encoding="utf-8")
        self._thread.join(_DISMISSED_S)
        shutil.rmtree(self._storage, ignore_errors=True)

    def _result(self) -> Any:
        """What Ray's trainer returns or raises; SIGTERM asks the workers to save and leave."""
        asked = threading.Event()
        with sigterm_sets(asked):
            was_told = False
            while self._thread.is_alive():
                self._thread.join(0.1)
                if asked.is_set() and not was_told:
                    was_told = True
                    print("SIGTERM: the workers save a checkpoint and stop; a second one ends them at once", flush=True)
                    ask_to_stop(self._stop_file)
        if isinstance(self._outcome[0], BaseException):
            raise self._outcome[0]
        return self._outcome[0]


_ahead: dict[Path, _Attempt] = {}
"""By run directory: groups that wait for their run."""


def train_worker(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One rank of an attempt. Runs in a thread of a Ray worker process, again after each restart of the group.

    A restart cannot mend a UserError, but a rank that simply ended would leave the others waiting. So it is
    recorded and raised: Ray ends the group, and the ranks of the next one leave at once (rollcall.py).
    """
    run_dir = Path(settings["run_dir"])
    refused = run_dir / RAY_DIR / settings["attempt"] / _REFUSED
    config = wait_for_order(refused.with_name(_ORDER))
    if config is None or read_refusal(refused) is not None:
        return {"outcome": "refused", "step": 0}
    logging.getLogger().setLevel(logging.WARNING)  # Ray logs a line for every report
    for name in ("torchrec", "torch.fx._symbolic_trace"):  # they warn of what a run with sharded tables cannot change
        logging.getLogger(name).setLevel(logging.ERROR)
    keep_freed_memory()
    # Ray sets OMP_NUM_THREADS to the CPUs reserved, of which there may be fewer than the machine has.
    torch.set_num_threads(max(1, usable_cores() // ray.train.get_context().get_local_world_size()))
    worker = RayWorker(_timeout(config.ray))
    monitor = RayMonitor(run_dir, run_name=run_dir.name, rank=worker.rank)
    try:
        stop_file = refused.with_name(_STOP)
        rolls = RollCall(refused.with_name(_ROLLS), worker.rank, worker.world_size, timeout=config.ray.timeout)
        watch = watch_stop_file(stop_file, worker.request_stop) if worker.is_main else contextlib.nullcontext()
        with watch, rolls.answered():
            result = train_planned(run_dir, config, worker, monitor)
    except UserError as error:
        with contextlib.suppress(OSError):
            write_refusal(refused, str(error))
        raise
    finally:
        monitor.close()
    return {"outcome": result.status, "step": result.step}


def wait_for_order(path: Path) -> Config | None:
    """The configuration of the run to train, once it is there and whole; None: there will be no run."""
    importlib.import_module("torch._dynamo")  # torch's optimisers load it, in more than a second: better while waiting
    while True:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or half of it
            order = json.loads(path.read_text(encoding="utf-8"))
            break
        time.sleep(_POLL_S)
    return order and Config.from_dict(order)


def _timeout(config: RayConfig) -> dt.timedelta:
    return dt.timedelta(microseconds=parse_duration_us(config.timeout, where="ray.timeout"))
