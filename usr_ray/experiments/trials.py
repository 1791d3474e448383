"""One training of a study or a search: in its process, in its folder, to a result or to a failure that is written down.

A trial of one worker is the loop in the trial's own process; a trial of more starts Ray Train's worker group.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from usr_ray.config import Config, UserError
from usr_ray.experiments.grid import Resources, StudyError
from usr_ray.experiments.record import FAILURE_FILE, note_failure
from usr_ray.launch.alone import run_alone
from usr_ray.launch.environment import ADDRESS
from usr_ray.launch.monitor import RayMonitor
from usr_ray.launch.trainer import run
from usr_ray.training.worker import LocalWorker

LOG_FILE = "train.log"


def run_trial(
    config: Config,
    lake: str,
    run_dir: Path,
    *,
    worker: Callable[[], LocalWorker] = LocalWorker,
    callbacks: Sequence[Any] = (),
    command: Sequence[str] = (),
) -> str:
    """Train as `config` says, or go on with what `run_dir` holds; what is printed goes into its train.log.

    Args:
        worker: makes the only rank of a trial of one worker.
        callbacks: for Ray Train's RunConfig, in a trial of more workers.

    Returns:
        Why the trial failed, in one line, also in failure.json; '' where it did not.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOG_FILE).open("a", encoding="utf-8", buffering=1) as log, contextlib.redirect_stdout(log):
        try:
            if config.ray.num_workers <= 1:
                torch.set_num_threads(max(1, math.floor(config.ray.cpus_per_worker)))
                run_alone(config, lake, run_dir, command=command, worker=worker(), monitor=_ray_monitor)
            else:
                # The search's or study's Ray outlives its trials.
                run(config, lake, run_dir, cluster=ADDRESS, command=command, callbacks=callbacks)
        except UserError as error:
            failure, trace = " ".join(str(error).split()), ""
        except Exception as error:
            failure, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        else:
            (run_dir / FAILURE_FILE).unlink(missing_ok=True)
            return ""
    note_failure(run_dir, failure, trace)
    return failure


def _ray_monitor(run_dir: Path) -> RayMonitor:
    return RayMonitor(run_dir, run_name=run_dir.name, rank=0)


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
    """A line for each trial that ended, with the time that the others still take."""

    def __init__(self, total: int) -> None:
        self._total, self._num_ended, self._start_s = total, 0, time.monotonic()

    def ended(self, name: str, how: str) -> None:
        """One trial has a result, or has failed."""
        self._num_ended += 1
        per_trial_s = (time.monotonic() - self._start_s) / self._num_ended
        left = dt.timedelta(seconds=round(per_trial_s * max(0, self._total - self._num_ended)))
        print(f"[{self._num_ended}/{self._total}] {name} {how}; at most {left} left", flush=True)
