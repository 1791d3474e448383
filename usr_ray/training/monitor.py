"""What a run reports of its steps: loss terms, samples per second, time left, data stall."""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from usr_ray.evaluation.metrics import ALL, GLOBAL, CellMetrics
from usr_ray.schema import TASKS
from usr_ray.training.worker import Worker

Batch = TypeVar("Batch")
_SAY_EVERY_S = 10.0
"""Least time between two lines of RowProgress."""


class RowProgress:
    """Lines with the rate and the time left of a job that goes over rows.

    Args:
        num_rows: of the whole job.
        report: is given each line.
        least: share of the rows between two lines, besides the seconds.
    """

    def __init__(self, num_rows: int, report: Callable[[str], None], *, least: float = 0.0) -> None:
        self._total, self._report, self._least = num_rows, report, least * num_rows
        self.num_done = self._num_said = 0
        self._start = self._last = time.monotonic()
        self._name = ""

    def start(self, name: str) -> None:
        """Begin a part of the job."""
        self._name = name

    def add(self, num_rows: int) -> None:
        """Count rows of the current part; of a last batch that is filled up, no more than there are."""
        self.num_done = min(self.num_done + num_rows, self._total)
        if time.monotonic() - self._last >= _SAY_EVERY_S and self.num_done - self._num_said >= self._least:
            self.say()

    def say(self, done: str = "") -> None:
        """A line now; `done`: what became of the part."""
        self._last, self._num_said = time.monotonic(), self.num_done
        rate = self.num_done / max(self._last - self._start, 1e-9)
        left = dt.timedelta(seconds=round((self._total - self.num_done) / max(rate, 1e-9)))
        share = self.num_done / max(self._total, 1)
        self._report(
            f"{self._name}{done}; {self.num_done:,} of {self._total:,} rows, {share:.0%}; {rate:,.0f} rows/s, "
            f"about {left} left"
        )


def row_progress(name: str, num_rows: int, report: Callable[[str], None]) -> Callable[[int], None]:
    """What counts the rows of a job of one part, with at most ten lines."""
    progress = RowProgress(num_rows, report, least=0.1)
    progress.start(name)
    return progress.add


class Monitor:
    """Watches a run; this one does nothing. `on_step` is called on every rank, the others on rank 0."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of the steps since the last call, every train.log_every_steps."""

    def on_evaluation(self, step: int, metrics: CellMetrics) -> None:
        """One split of metrics.json, at the end of an epoch."""

    def on_checkpoint(self, step: int, path: Path | None) -> None:
        """A checkpoint was written; None: the storage is full."""

    def on_end(self) -> None:
        """No step is left: the last one is done, or early stopping ended the run before it."""


class StepMeter:
    """Adds up the steps since the last `read`; sums stay on the device, so adding never waits for a GPU."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._said = (0, -math.inf)
        """Step and time of the last line of progress."""
        self._restart()

    def _restart(self) -> None:
        self._sums: Tensor | None = None
        self._norm: Tensor | None = None
        self._num_steps = 0
        self._num_rows = 0.0
        self._waited_s = 0.0
        self._start_bytes = self._worker.received_bytes
        self._start_s = time.perf_counter()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time it takes to get each counts as waiting. Starts a new window."""
        self._restart()
        iterator = iter(batches)
        while True:
            start_s = time.perf_counter()
            batch = next(iterator, None)
            self._waited_s += time.perf_counter() - start_s
            if batch is None:
                return
            yield batch

    def add(
        self,
        terms: Mapping[str, Tensor],
        by_row: Mapping[str, tuple[Tensor, Tensor]],
        norm: Tensor,
        *,
        num_rows: float,
    ) -> None:
        """Count one step.

        Args:
            terms: this rank's share of each loss term, scalars on the device; the same names in every step.
            by_row: (sum over rows, rows) of this rank, as `terms`.
            norm: that of the dense gradients, a scalar on the device, equal on all ranks.
            num_rows: rows of weight > 0 over all ranks.
        """
        self._names = tuple(terms), tuple(by_row)
        numbers = [*terms.values(), *(part for parts in zip(*by_row.values(), strict=True) for part in parts)]
        sums = torch.stack([number.detach().float() for number in numbers]).double()  # float32 counts to 2^24 alone
        self._sums = sums if self._sums is None else self._sums + sums
        self._norm = norm.detach() if self._norm is None else torch.maximum(self._norm, norm.detach())
        self._num_steps += 1
        self._num_rows += num_rows

    def read(self) -> dict[str, float]:
        """The window's numbers, then a new window. All ranks must call it; the loss terms are equal on all of them.

        Returns:
            The names of `add`: of `terms` the mean over the window's steps, summed over all ranks; of `by_row` the mean
            over the window's rows on all ranks, left out where there was none. "gradient_norm": the window's largest,
            before clipping. "samples_per_s": rows that count, over all ranks. "step_s": seconds a step. "data_stall":
            share of this rank's time spent waiting for batches, 0 to 1. "exchange_bytes": what this rank received a
            step of the others' ids and row gradients (Worker.received_bytes; sharded tables exchange inside TorchRec,
            uncounted). Empty without steps.
        """
        if self._sums is None or self._norm is None:
            return {}
        sums = self._worker.all_reduce_sum(self._sums).tolist()
        wall_s = max(time.perf_counter() - self._start_s, 1e-9)
        numbers, (terms, by_row) = iter(sums), self._names
        metrics = {name: next(numbers) / self._num_steps for name in terms}
        totals = {name: next(numbers) for name in by_row}
        metrics |= {name: total / rows for (name, total), rows in zip(totals.items(), numbers, strict=True) if rows}
        metrics |= {
            "gradient_norm": float(self._norm),
            "samples_per_s": self._num_rows / wall_s,
            "step_s": wall_s / self._num_steps,
            "data_stall": min(self._waited_s / wall_s, 1.0),
            "exchange_bytes": (self._worker.received_bytes - self._start_bytes) / self._num_steps,
        }
        self._restart()
        return metrics

    def is_time_to_say(self, step: int, total_steps: int) -> bool:
        """A line of progress is due: at the first log step, in each eighth of the training, and once a minute."""
        now_s, (last_step, last_s) = time.perf_counter(), self._said
        if 8 * last_step // total_steps == 8 * step // total_steps and now_s - last_s < 60:
            return False
        self._said = (step, now_s)
        return True


def progress(metrics: Mapping[str, float]) -> str:
    """The end of a line of progress, of StepMeter.read's numbers and "eta_s"."""
    left = dt.timedelta(seconds=round(metrics["eta_s"]))
    return (
        f"loss {metrics['loss']:.4f} {metrics['samples_per_s']:,.0f} samples/s "
        f"data stall {metrics['data_stall']:.0%} left {left}"
    )


def summarise(metrics: CellMetrics) -> dict[str, float | None]:
    """The few numbers of an evaluation that progress, Ray Train and Tune see; None where undefined.

    "log_loss": mean of the tasks' log loss over all rows, what early stopping watches. "<task>_auc": mean of the
    scenarios' AUC, over the scenarios that have one.
    """
    losses = [metrics[ALL][task]["log_loss"] for task in TASKS]
    known = [loss for loss in losses if loss is not None]
    summary: dict[str, float | None] = {"log_loss": sum(known) / len(known) if known else None}
    for task in TASKS:
        aucs = [cell[task]["auc"] for name, cell in metrics.items() if name not in (ALL, GLOBAL)]
        defined = [auc for auc in aucs if auc is not None]
        summary[f"{task}_auc"] = sum(defined) / len(defined) if defined else None
    return summary
