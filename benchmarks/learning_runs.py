"""What the two benchmarks of learning share: training in this process, AUC by scenario and task, paired intervals.

Not a benchmark itself: learning_kuairand.py and learning_simulated.py import it.

Shape letters: N held-out rows, R runs (seeds) of one model.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from usr_ray.config import Config, date_ranges, dates_in, load_config
from usr_ray.data.manifest import Manifest
from usr_ray.evaluation.baseline import popularity_baseline
from usr_ray.evaluation.files import read_predictions, write_predictions
from usr_ray.evaluation.metrics import Predictions, auc
from usr_ray.evaluation.statistics import paired_auc_gap
from usr_ray.runs.plan import split_manifest
from usr_ray.schema import TASKS
from usr_ray.training.loop import train
from usr_ray.training.rows import baseline_rows
from usr_ray.training.worker import LocalWorker


def last_day(config: Path) -> tuple[str, ...]:
    """Overrides that train on all training days but the last and evaluate on that one."""
    dates = sorted(dates_in(load_config(config).data.train_dates))
    return (f"data.train_dates={date_ranges(dates[:-1])}", f"data.eval_dates={dates[-1]}")


class StoppedError(Exception):
    """A training was asked to stop (SIGTERM, Ctrl-C): what is finished is still worth saving."""


@dataclass(frozen=True)
class Data:
    """One lake: rows to train on, rows held out, and the configuration that names their dates."""

    config_path: Path
    overrides: tuple[str, ...]
    train: Manifest
    held_out: Manifest

    @classmethod
    def of(
        cls,
        config_path: Path,
        lake: Path,
        overrides: Sequence[str] = (),
        counters: str = ".",
        without: str = "^$",
    ) -> Data:
        """Two regular expressions: of the lake's counter columns models get those that `counters` is found in, of its
        other numbers those that `without` is not.
        """
        config = load_config(config_path, overrides)
        parts = [split_manifest(lake, config, split, version=None) for split in ("train", "eval")]
        spec = parts[0].spec
        dense = [
            f
            for f in spec.dense
            if (re.search(counters, f.column) if f.column.startswith("counter_") else not re.search(without, f.column))
        ]
        spec = replace(spec, dense=tuple(dense))
        return cls(config_path, tuple(overrides), *(replace(part, spec=spec) for part in parts))

    def config(self, overrides: Sequence[str] = ()) -> Config:
        quiet = ("train.checkpoint_every_steps=1000000", "train.keep_checkpoints=1")
        return load_config(self.config_path, [*self.overrides, *quiet, *overrides])

    def popularity(self, rows: Predictions) -> Predictions:
        config = self.config(["data.mature_only=true"])
        return popularity_baseline(baseline_rows(config, self.train), rows, len(config.scenarios))


@dataclass(frozen=True)
class Runs:
    """Held-out probabilities of one model, one entry a seed; a baseline without seeds has one."""

    rows: Predictions
    """Labels and keys, the same for every run."""
    probs_RNT: NDArray[np.float64]
    seconds: float = 0.0
    """Training time of a run, mean."""


def train_seeds(data: Data, overrides: Sequence[str], seeds: Sequence[int], kept: Path | None = None) -> Runs:
    """One training a seed, with jobs/train.py's loop on one worker, evaluated after the last epoch.

    With `kept`, a folder, each seed's predictions stay there, and those of the same settings, rows and columns are not
    trained again: after a change of the code, name an empty folder.
    """
    worker, probs, seconds = LocalWorker("cpu"), [], 0.0
    worker.stop_on_signal()
    for seed in seeds:
        config = data.config([*overrides, f"train.seed={seed}"])
        file = kept and kept / f"{seed}.parquet"
        spec = data.train.spec
        columns = [f.column for f in spec.sparse] + [f.column for f in spec.dense]
        columns += [f.column for f in spec.lists] + [f.name for f in spec.vectors]
        settings = [data.config_path.read_text(), *data.overrides, *overrides]
        meant = {"settings": settings, "rows": [data.train.sha256, data.held_out.sha256], "columns": columns}
        if file and file.exists():
            rows, _, about = read_predictions(file, config.scenarios)
            if about["meant"] == meant:
                probs.append(rows.probs_NT)
                seconds += about["seconds"]
                continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as run_dir, contextlib.redirect_stdout(io.StringIO()):
            result = train(
                config, worker, train_manifest=data.train, eval_manifest=data.held_out, run_dir=Path(run_dir)
            )
        took = time.perf_counter() - start
        if result.evaluation is None or result.evaluation.predictions is None:
            raise StoppedError
        rows = result.evaluation.predictions
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_predictions(file, rows, config.scenarios, about={"meant": meant, "seconds": took})
        probs.append(rows.probs_NT)
        seconds += took
    return Runs(rows, np.stack(probs), seconds / len(seeds))


def cells(rows: Predictions, scenarios: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """'all' and each scenario -> its rows."""
    parts = {name: rows.scenario_N == place for place, name in enumerate(scenarios)}
    return {"all": np.ones(len(rows), dtype=bool)} | parts


def known_auc(labels_N: NDArray, probs_N: NDArray) -> float:
    """AUC of rows that must have both labels."""
    found = auc(labels_N, probs_N)
    assert found is not None
    return found


def mean_auc(runs: Runs, scenarios: Sequence[str]) -> dict[str, dict[str, float]]:
    """Task -> cell -> AUC, mean over the runs."""
    return {
        task: {
            cell: round(float(np.mean([known_auc(runs.rows.labels_NT[own, t], p[own, t]) for p in runs.probs_RNT])), 5)
            for cell, own in cells(runs.rows, scenarios).items()
        }
        for t, task in enumerate(TASKS)
    }


def gaps(runs: Runs, others: Runs, scenarios: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Task -> cell -> AUC of `runs` minus AUC of `others` with a 95 % interval, and the gap of each pair of seeds."""
    runs, others = _in_one_order(runs, others)
    return {
        task: {
            cell: _gap(
                runs.rows.labels_NT[own, t],
                runs.probs_RNT[:, own, t],
                others.probs_RNT[:, own, t],
                runs.rows.user_key_N[own],
            )
            for cell, own in cells(runs.rows, scenarios).items()
        }
        for t, task in enumerate(TASKS)
    }


def _in_one_order(runs: Runs, others: Runs) -> tuple[Runs, Runs]:
    """Both by user, request, item and history: two lakes of the same logs have the same rows in another order."""
    if len(runs.rows) != len(others.rows):
        raise SystemExit(f"{len(runs.rows)} held-out rows beside {len(others.rows)}: compare models on the same rows")
    # Of one lake they stand alike, and there an item may be known by its vector alone to one of two models.
    of_lake = ("row_number_N", "user_key_N", "request_key_N", "history_length_N", "labels_NT")
    if all(np.array_equal(getattr(runs.rows, k), getattr(others.rows, k), equal_nan=True) for k in of_lake):
        return runs, others
    found = []
    for one in (runs, others):
        rows = one.rows
        keys = (rows.labels_NT.T, rows.history_length_N, rows.item_id_N, rows.request_key_N, rows.user_key_N)
        order_N = np.lexsort([column for key in keys for column in np.atleast_2d(key)])
        found.append(replace(one, rows=rows.take(order_N), probs_RNT=one.probs_RNT[:, order_N]))
    for key in ("user_key_N", "request_key_N", "item_id_N", "history_length_N", "labels_NT"):
        ours, theirs = (getattr(one.rows, key) for one in found)
        if not np.array_equal(ours, theirs, equal_nan=True):
            raise SystemExit(f"the held-out rows differ in {key}: compare models on the same rows")
    return found[0], found[1]


def _gap(labels: NDArray, ours_RN: NDArray, theirs_RN: NDArray, users: NDArray) -> dict[str, Any]:
    """The interval of studies (docs/studies.md), over users and seeds; a side without seeds stands beside each one."""
    seeds = np.arange(max(len(ours_RN), len(theirs_RN)))
    ours, theirs = (probs_RN[seeds % len(probs_RN)] for probs_RN in (ours_RN, theirs_RN))
    gap = paired_auc_gap(labels, ours, theirs, users)
    assert gap is not None
    return {
        "gap": round(gap.value, 5),
        "interval": [round(gap.low, 5), round(gap.high, 5)],
        "by_seed": [round(one, 5) for one in gap.by_seed],
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Write `result` with the date, machine and versions it was measured with."""
    stamp = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stamp | result, indent=1) + "\n", encoding="utf-8")


def show_gap(gap: dict[str, Any]) -> str:
    return f"{gap['gap']:+.4f} [{gap['interval'][0]:+.4f}, {gap['interval'][1]:+.4f}]"
