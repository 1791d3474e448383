"""Training on Ray: the loop on a group of Ray Train workers, its restarts, and what is left in the run directory.

Ray starts, watches and restarts the workers. Everything a run needs to resume is ours (training/checkpoint.py,
runs/plan.py):
each attempt has a Ray run name of its own, so nothing that Ray left behind can block or change it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import math
import re
import shutil
import threading
import uuid
from collections.abc import Mapping, Sequence
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
    open_stop_file,
    sigterm_sets,
    watch_stop_file,
    worker_was_asked,
)
from usr_ray.runs.plan import RunPlan, plan_run
from usr_ray.training.worker import Worker

RAY_DIR = "ray"
_REFUSED, _STOP, _ROLLS = "refused.json", "stop", "rolls"
"""Files of an attempt: a worker's refusal, the request to stop, the roll calls."""


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

    `_create_default_callbacks` is Ray's own: where Ray no longer calls it, that actor is there again, and nothing else.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if type(callback).__name__ != "DatasetsCallback"]


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
            is used as it is.
        callbacks: for Ray Train's RunConfig; Tune hears of the evaluations through one.

    Raises:
        UserError: see plan_run; a submitted job's path is relative; another process trains in this directory; a worker
            refused its data or checkpoint.
        TrainingFailedError: more failures than ray.max_failures.
    """
    if cluster == SUBMITTED:
        refuse_relative_run(config, lake, run_dir)
    plan = plan_run(config, lake, run_dir, command=command)
    return carry_out(plan, lambda plan: _fit(plan, callbacks), ray_session(config.ray, cluster=cluster))


def _fit(plan: RunPlan, callbacks: Sequence[Any]) -> tuple[str, int]:
    """(outcome, steps) of the worker group."""
    config = plan.config.ray
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", plan.run_dir.name)
    name = f"{stem}-{dt.datetime.now(dt.UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    storage = plan.run_dir / RAY_DIR
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if config.use_gpu else {})
    failures = FailureConfig(
        max_failures=config.max_failures,
        controller_failure_limit=START_ATTEMPTS,  # type: ignore[call-arg]
    )
    trainer = _Trainer(
        train_worker,  # type: ignore[arg-type]
        # Shown in the dashboard, so the configuration is in it and nothing large.
        train_loop_config={"run_dir": str(plan.run_dir), "attempt": name, "config": plan.config.to_dict()},
        torch_config=StoppableTorchConfig(
            backend="nccl" if config.use_gpu else "gloo", timeout_s=math.ceil(_timeout(config).total_seconds())
        ),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=failures,
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
    )
    refused, stop_file = storage / name / _REFUSED, storage / name / _STOP
    reserve_refusal(refused)
    open_stop_file(stop_file)
    try:
        result = _fit_in_background(trainer, stop_file)
    except TrainingFailedError as error:
        if (message := read_refusal(refused)) is not None:
            raise UserError(message) from error
        raise
    if (message := read_refusal(refused)) is not None:
        raise UserError(message)
    shutil.rmtree(storage, ignore_errors=True)  # what Ray keeps of an attempt; nothing reads it afterwards
    returned: dict[str, Any] = result.return_value  # type: ignore[attr-defined]
    return returned["outcome"], returned["step"]


def _fit_in_background(trainer: TorchTrainer, stop_file: Path) -> Any:
    """trainer.fit(), leaving the signals to this thread: SIGTERM asks the workers to save and leave, Ctrl-C ends Ray.

    In the main thread Ray handles Ctrl-C: it aborts in half a minute, with pages of tracebacks, and saves
    nothing.
    """
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:  # raised again in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    asked = threading.Event()
    with sigterm_sets(asked):
        thread.start()
        was_told = False
        while thread.is_alive():
            thread.join(0.1)
            if asked.is_set() and not was_told:
                was_told = True
                print("SIGTERM: the workers save a checkpoint and stop; a second one ends them at once", flush=True)
                ask_to_stop(stop_file)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def train_worker(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One rank of an attempt. Runs in a thread of a Ray worker process, again after each restart of the group.

    A restart cannot mend a UserError, but a rank that simply ended would leave the others waiting. So it is
    recorded and raised: Ray ends the group, and the ranks of the next one leave at once (rollcall.py).
    """
    run_dir, config = Path(settings["run_dir"]), Config.from_dict(settings["config"])
    refused = run_dir / RAY_DIR / settings["attempt"] / _REFUSED
    if read_refusal(refused) is not None:
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


def _timeout(config: RayConfig) -> dt.timedelta:
    return dt.timedelta(microseconds=parse_duration_us(config.timeout, where="ray.timeout"))
