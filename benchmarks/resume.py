"""Does the time to the first step of a resumed run depend on how far into the epoch it was cut off?

    python benchmarks/resume.py [--rows 524288] [--positions 0 0.25 0.5 0.9] [--rounds 5]

A checkpoint of each position is written into a run directory of its own, and `usr_ray.training.loop.train` is called
on a copy
of it with a worker that was already asked to stop: it restores, opens the reader at the position, takes one step, and
ends. The time is from the call to the end of that first step; positions take turns. Writes
benchmarks/results/resume.json and the table in docs/speed.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.doc_tables import markdown
from benchmarks.interleaved import header, interval, publish, ratio, settings_of, spread, take_turns
from benchmarks.reader import DATES, benchmark_spec, write_table
from usr_ray.config import Config
from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.training.checkpoint import CHECKPOINTS, CheckpointStore
from usr_ray.training.loop import train
from usr_ray.training.monitor import Monitor
from usr_ray.training.rows import training_reader
from usr_ray.training.state import TrainState
from usr_ray.training.worker import LocalWorker

TABLE_ROWS = 50_000
RESULTS = Path(__file__).parent / "results" / "resume.json"


class FirstStep(Monitor):
    """Notes when the first step was logged."""

    def __init__(self) -> None:
        self.end_s: float | None = None
        self.step = 0

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        """See train.Monitor."""
        if self.end_s is None:
            self.end_s, self.step = time.perf_counter(), step


def write_checkpoint(config: Config, manifest: Manifest, run_dir: Path, position: float, device: str) -> int:
    """A run that was cut off at `position` of its first epoch; the step."""
    worker = LocalWorker(device)
    with training_reader(config, manifest, rank=worker.rank, world_size=worker.world_size) as reader:
        step = int(position * reader.num_steps)
        state = TrainState(config, manifest, worker, order=reader.fingerprint, total_steps=reader.num_steps)
        state.step = state.epoch_step = step
        store = CheckpointStore(run_dir / CHECKPOINTS, keep_last=2)
        store.save(step, state.tensors(), state.describe(worker))
    return step


def time_to_first_step(config: Config, manifest: Manifest, origin: Path, expected_step: int, device: str) -> float:
    """Seconds from the call of `train` to the end of its first step."""
    run_dir = origin.with_name("resumed")
    shutil.copytree(origin, run_dir)
    worker, monitor = LocalWorker(device), FirstStep()
    worker.request_stop()
    start = time.perf_counter()
    train(config, worker, train_manifest=manifest, run_dir=run_dir, monitor=monitor)
    shutil.rmtree(run_dir)
    assert monitor.end_s is not None
    assert monitor.step == expected_step + 1, f"resumed at step {monitor.step - 1}, not {expected_step}"
    return monitor.end_s - start


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    write_table(folder, benchmark_spec(TABLE_ROWS), arguments.rows)
    manifest = build_manifest(folder, dates=DATES)
    config = Config.from_dict(
        {"train": {"global_batch_size": arguments.batch_rows, "num_epochs": 1, "log_every_steps": 1}}
    )
    steps: dict[str, int] = {}
    ways: dict[str, Callable[[], float]] = {}
    for position in arguments.positions:
        name, origin = f"{position:.0%}", folder / f"run-{position}" / "origin"
        steps[name] = write_checkpoint(config, manifest, origin, position, arguments.device)
        ways[name] = lambda o=origin, n=name: time_to_first_step(config, manifest, o, steps[n], arguments.device)  # type: ignore[misc]
    found = take_turns(ways, arguments.rounds)
    first = next(iter(found.values()))
    return [
        {"position": name, "step": steps[name], "seconds": interval(times), "ratio": ratio(times, first)}
        for name, times in found.items()
    ]


def table(report: Mapping[str, Any]) -> str:
    rows = [
        [f"{r['position']} of the epoch (step {r['step']})", spread(r["seconds"]), spread(r["ratio"]) + "x"]
        for r in report["results"]
    ]
    return markdown(["resumed at", "seconds to the first step", "times position 0"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=524_288)
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--positions", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.9])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments, Path(folder))
    report = header(
        "time from the call of train to the first step of a resumed run", settings_of(arguments), ("torch", "pyarrow")
    )
    publish(report, results, table, output=arguments.output, place=RESULTS)


if __name__ == "__main__":
    main()
