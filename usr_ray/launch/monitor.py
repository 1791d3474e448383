"""What a run reports: history.jsonl and TensorBoard for one run, Ray's metrics (Prometheus, dashboard) for a cluster.

The loop calls the same hooks on every rank (training.monitor.Monitor): rank 0 keeps the files, every rank may publish.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from usr_ray.config.stored import misfit
from usr_ray.evaluation.metrics import CellMetrics
from usr_ray.files import write_whole
from usr_ray.runs.evaluations import HISTORY_FILE
from usr_ray.training.checkpoint import STORAGE_FULL
from usr_ray.training.monitor import Monitor

_log = logging.getLogger(__name__)
TENSORBOARD_DIR = "tensorboard"
RANK_GAUGES = {
    "step": ("usr_ray_step", "Steps done of the whole run"),
    "step_s": ("usr_ray_step_seconds", "Seconds a step"),
    "samples_per_s": ("usr_ray_samples_per_s", "Rows that count, over all ranks, per second"),
    "data_stall": ("usr_ray_data_stall_fraction", "Share of this rank's time spent waiting for batches"),
    "exchange_bytes": ("usr_ray_exchange_bytes_per_step", "Other ranks' ids and row gradients received, bytes a step"),
}
"""Key of a log step's numbers -> (metric, description), for every rank; Ray exports each as ray_<metric>."""
RUN_GAUGES = {
    "loss": ("usr_ray_loss", "Loss, mean of the steps since the last log step"),
    "gradient_norm": ("usr_ray_gradient_norm", "Largest norm of the dense gradients since the last log step"),
    "epoch": ("usr_ray_epoch", "Epoch, from 0"),
    "eta_s": ("usr_ray_seconds_left", "Estimated time to the end of training"),
}
"""Equal on all ranks, so from rank 0 alone."""
EVALUATION_GAUGES = {
    "auc": ("usr_ray_auc", "AUC on the held-out rows"),
    "log_loss": ("usr_ray_log_loss", "Log loss on the held-out rows"),
    "pcoc": ("usr_ray_pcoc", "Sum of predictions over sum of positives on the held-out rows"),
}
TERM_GAUGE, CHECKPOINT_AGE_GAUGE = "usr_ray_loss_term", "usr_ray_checkpoint_age_s"
_AGE = "Seconds of training that a crash would cost now"
CHECKPOINT_COUNTER, ATTEMPT_COUNTER = "usr_ray_checkpoints", "usr_ray_attempts"


class FileMonitor(Monitor):
    """history.jsonl (an object per log step and per evaluation) and TensorBoard events of a run; for rank 0.

    A resumed run repeats some steps: what the interrupted attempt recorded of them is dropped from history.jsonl and
    purged from TensorBoard before the first new line, so that each step is there once.

    history.jsonl: {"kind": "train", "step", "time", "loss", "loss/<term>", "samples_per_s", "data_stall", ...} and
    {"kind": "eval", "step", "time", "<scenario>/<task>/<metric>"}; undefined is null.
    """

    def __init__(self, run_dir: Path) -> None:
        self._history = run_dir / HISTORY_FILE
        self._events_dir = run_dir / TENSORBOARD_DIR
        self._writer: Any = None
        self._is_full = False

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See training.monitor.Monitor."""
        numbers = {key: _finite(value) for key, value in metrics.items()}
        events = {key if "/" in key else f"train/{key}": value for key, value in metrics.items()}
        self._write(step, {"kind": "train", "step": step, "time": _now(), **numbers}, events)

    def on_evaluation(self, step: int, metrics: CellMetrics) -> None:
        """See training.monitor.Monitor."""
        numbers = {f"{cell}/{task}/{name}": value for cell, task, name, value in _flat(metrics)}
        events = {f"eval/{key}": value for key, value in numbers.items() if value is not None}
        self._write(step, {"kind": "eval", "step": step, "time": _now(), **numbers}, events)

    def close(self) -> None:
        """Flush and close the event file; what does not fit on full storage is lost, after a warning."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(*([OSError] if self._is_full else [])):
                writer.close()

    def _write(self, step: int, row: dict[str, Any], events: Mapping[str, float]) -> None:
        """One line and its events. Full storage must not end a sound run: the line is lost, with one warning."""
        try:
            self._add(step, row)
            for key, value in events.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        except OSError as error:
            if error.errno not in STORAGE_FULL:
                raise
            if not self._is_full:
                _log.warning(
                    "step %d not noted in %s: the storage is full (%s); training goes on, the lines until there is "
                    "room again are lost: free space on this storage",
                    step,
                    self._history,
                    error.strerror,
                )
            self._is_full = True
            self.close()  # the next line reopens it, and first removes a partial line
        else:
            self._is_full = False

    def _add(self, step: int, row: dict[str, Any]) -> None:
        if self._writer is None:
            self._resume(step, row["kind"])
        with self._history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def _resume(self, step: int, kind: str) -> None:
        """Drop what was recorded from here on. An evaluation comes after the log line of the same step, which stays."""
        from torch.utils.tensorboard import SummaryWriter

        kept = []
        for line in self._history.read_text(encoding="utf-8").splitlines() if self._history.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # cut short by a crash
                continue
            if misfit(row, {"step": int, "kind": str}):  # changed by hand
                continue
            if row["step"] < step or (row["step"] == step and row["kind"] == "train" and kind == "eval"):
                kept.append(line + "\n")
        write_whole(self._history, "".join(kept))
        # purge_step hides events of this step and later ones, of earlier attempts' files too.
        purge = (step + 1 if kind == "eval" else step) if self._events_dir.exists() else None
        self._writer = SummaryWriter(str(self._events_dir), purge_step=purge)


MetricFactory = Callable[[str, str, str, tuple[str, ...]], Any]
"""(kind 'gauge' or 'counter', name, description, tag keys) -> something with Ray's `set` or `inc`."""


def ray_metric(kind: str, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
    """A metric of Ray's: shown at each node's metrics endpoint as ray_<name>, a counter as ray_<name>_total."""
    from ray.util import metrics

    return (metrics.Gauge if kind == "gauge" else metrics.Counter)(name, description=description, tag_keys=tag_keys)


def metric_tag(name: str) -> str:
    """A name as Ray's metrics take it, at most 255 printable ASCII characters; every other byte as %XX."""
    return quote(name, safe=" !#$&'()*+,-./:;<=>?@[]^_`{|}~")[:255]


class RayMetrics:
    """Ray metrics of one rank, tagged with the run's name and the rank."""

    def __init__(self, run_name: str, rank: int, *, factory: MetricFactory = ray_metric) -> None:
        self._tags = {"run": metric_tag(run_name), "rank": str(rank)}
        self._factory = factory
        self._metrics: dict[str, Any] = {}
        self._last_checkpoint_s = time.monotonic()
        self._count(ATTEMPT_COUNTER, "Times this rank of the run was started")

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See training.monitor.Monitor."""
        is_main = self._tags["rank"] == "0"
        for key, value in [("step", float(step)), *metrics.items()]:
            if key in RANK_GAUGES:
                self._set(*RANK_GAUGES[key], value)
            elif is_main and key in RUN_GAUGES:
                self._set(*RUN_GAUGES[key], value)
            elif is_main and "/" in key:
                self._set(TERM_GAUGE, "One term of the loss, or a watched variance", value, term=key)
        if is_main:
            self._set(CHECKPOINT_AGE_GAUGE, _AGE, time.monotonic() - self._last_checkpoint_s)

    def on_evaluation(self, step: int, metrics: CellMetrics) -> None:  # noqa: ARG002
        """See training.monitor.Monitor."""
        for cell, task, name, value in _flat(metrics):
            if name in EVALUATION_GAUGES and value is not None:
                self._set(*EVALUATION_GAUGES[name], value, scenario=cell, task=task)

    def on_checkpoint(self, step: int, path: Path | None) -> None:  # noqa: ARG002
        """See training.monitor.Monitor."""
        outcome = "storage_full" if path is None else "written"
        self._count(CHECKPOINT_COUNTER, "Checkpoints by outcome", outcome=outcome)
        if path is not None:
            self._last_checkpoint_s = time.monotonic()
            self._set(CHECKPOINT_AGE_GAUGE, _AGE, 0.0)

    def on_end(self) -> None:
        """See training.monitor.Monitor. Else the time of the steps that early stopping saved would be the last word."""
        self._set(*RUN_GAUGES["eta_s"], 0.0)

    def _metric(self, kind: str, name: str, description: str, tags: Mapping[str, str]) -> Any:
        if name not in self._metrics:
            self._metrics[name] = self._factory(kind, name, description, (*self._tags, *tags))
        return self._metrics[name]

    def _set(self, name: str, description: str, value: float, **tags: str) -> None:
        self._metric("gauge", name, description, tags).set(value, tags={**self._tags, **tags})

    def _count(self, name: str, description: str, **tags: str) -> None:
        self._metric("counter", name, description, tags).inc(1.0, tags={**self._tags, **tags})


class RayMonitor(Monitor):
    """The monitor of a run under Ray: Ray metrics of every rank, files of rank 0 (a training.monitor.Monitor)."""

    def __init__(self, run_dir: Path, *, run_name: str, rank: int, factory: MetricFactory = ray_metric) -> None:
        self._monitors: list[FileMonitor | RayMetrics] = [RayMetrics(run_name, rank, factory=factory)]
        self._files = FileMonitor(run_dir) if rank == 0 else None
        if self._files is not None:
            self._monitors.append(self._files)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See training.monitor.Monitor."""
        for monitor in self._monitors:
            monitor.on_step(step, metrics)

    def on_evaluation(self, step: int, metrics: CellMetrics) -> None:
        """See training.monitor.Monitor."""
        for monitor in self._monitors:
            monitor.on_evaluation(step, metrics)

    def on_checkpoint(self, step: int, path: Path | None) -> None:
        """See training.monitor.Monitor."""
        for monitor in self._monitors:
            monitor.on_checkpoint(step, path)

    def on_end(self) -> None:
        """See training.monitor.Monitor."""
        for monitor in self._monitors:
            monitor.on_end()

    def close(self) -> None:
        """Close the files."""
        if self._files is not None:
            self._files.close()


def _flat(metrics: CellMetrics) -> Iterator[tuple[str, str, str, float | None]]:
    for cell, tasks in metrics.items():
        for task, values in tasks.items():
            for name, value in values.items():
                yield cell, task, name, value if value is None else float(value)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _now() -> float:
    return round(time.time(), 3)
