"""Which part of a training step is spent waiting for the reader?

    python benchmarks/data_stall.py [--rows 262144] [--batch-rows 1024] [--rounds 3] [--models plain usr]
                                    [--device cuda] [--precision bf16]

An epoch of a shuffled table in the page cache is trained through the product's own reader and feed, then as many steps
on batches that lie ready, then again. Two answers: `waiting` is the share of the epoch's time in which the step waited
for a batch (what a run prints as data stall; on a GPU the host's waiting); `slower` is how much longer a step took than
on resident batches, which also holds the processor time and the memory traffic that the reader takes from the step.
The first batch of an epoch is not counted: a run has it once. Writes benchmarks/results/data_stall.json and the
table in docs/speed.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.doc_tables import markdown
from benchmarks.interleaved import header, interval, publish, ratio, settings_of, spread, take_turns, verdict
from benchmarks.reader import DATES, benchmark_spec, write_table
from benchmarks.step_cases import PLAIN, Step
from usr_ray.data.batch import map_tensors
from usr_ray.data.feed import Feed
from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.training.rows import training_batches, training_reader

TABLE_ROWS = 50_000
RESULTS = Path(__file__).parent / "results" / "data_stall.json"
MODELS: Mapping[str, Mapping[str, Any]] = {"plain": PLAIN, "usr": {}}
AIMS = {"cpu": 0.05, "cuda": 0.10}
_NUM_RESIDENT = 8


class Epochs:
    """Epochs of one model through the reader, and as many steps on batches that are there already."""

    def __init__(self, manifest: Manifest, model: Mapping[str, Any], arguments: argparse.Namespace) -> None:
        train = {
            "global_batch_size": arguments.batch_rows,
            "precision": arguments.precision,
            "reader_threads": arguments.reader_threads,
        }
        self.step = Step(manifest.spec, model, train=train, device=arguments.device)
        self.reader = training_reader(self.step.config, manifest)
        self.num_steps = self.reader.num_steps - 1
        self.epoch = 0
        self.waited: list[float] = []
        """Share of each epoch."""
        device = self.step.worker.device
        self.resident = []
        source = self._source()
        for _ in range(min(_NUM_RESIDENT, self.reader.num_steps)):
            moved = next(source)[0]
            # A copy: the reader's batches are views of its blocks.
            self.resident.append(map_tensors(moved, lambda t: t.to(device, copy=True)))
        source.close()

    def _source(self) -> Any:
        return training_batches(
            self.reader,
            self.step.state.tables,
            epochs=range(self.epoch, self.epoch + 1),
            start_step=0,
            config=self.step.config.model,
        )

    def read(self) -> float:
        """Seconds a step of an epoch through the reader."""
        waited_s = 0.0
        with Feed(self._source(), self.step.worker.device) as feed:
            self.step(*next(feed)[0])
            self.step.wait()
            start = time.perf_counter()
            for _ in range(self.num_steps):
                before = time.perf_counter()
                (batch, unique), _ = next(feed)
                waited_s += time.perf_counter() - before
                self.step(batch, unique)
            self.step.wait()
            whole_s = time.perf_counter() - start
        self.epoch += 1
        self.waited.append(waited_s / whole_s)
        return whole_s / self.num_steps

    def reuse(self) -> float:
        """Seconds a step on resident batches."""
        self.step.wait()
        start = time.perf_counter()
        for number in range(self.num_steps):
            self.step(*self.resident[number % len(self.resident)])
        self.step.wait()
        return (time.perf_counter() - start) / self.num_steps


def measure(manifest: Manifest, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    epochs = Epochs(manifest, {**MODELS[name], "backbone": arguments.backbone}, arguments)
    with epochs.reader:
        found = take_turns({"read": epochs.read, "resident": epochs.reuse}, arguments.rounds)
    waiting = interval(epochs.waited[-arguments.rounds :])
    return {
        "model": name,
        "steps_a_round": epochs.num_steps,
        "samples_per_s": interval([arguments.batch_rows / seconds for seconds in found["read"]]),
        "step_ms": interval([seconds * 1e3 for seconds in found["read"]]),
        "resident_step_ms": interval([seconds * 1e3 for seconds in found["resident"]]),
        "waiting": waiting,
        "slower": ratio(found["read"], found["resident"]),
    }


def table(report: Mapping[str, Any]) -> str:
    aim = AIMS["cuda" if str(report["settings"]["device"]).startswith("cuda") else "cpu"]
    percent = ("median", "low", "high")
    rows = [
        [
            f"{r['model']}, {report['settings']['batch_rows']:,} rows a step",
            spread(r["samples_per_s"], 0),
            spread(r["step_ms"], 1),
            spread(r["resident_step_ms"], 1),
            spread(r["slower"]) + "x",
            spread({key: 100 * r["waiting"][key] for key in percent}, 1) + " %",
            verdict(100 * r["waiting"]["median"], at_most=100 * aim),
        ]
        for r in report["results"]
    ]
    head = ["model", "samples/s", "ms a step", "on resident batches", "times resident", "waiting", "aim, %"]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--backbone", default="shared_bottom")
    parser.add_argument("--threads", type=int, default=1, help="of the step")
    parser.add_argument("--reader-threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder), benchmark_spec(TABLE_ROWS), arguments.rows)
        manifest = build_manifest(Path(folder), dates=DATES)
        results = []
        for name in arguments.models:
            results.append(measure(manifest, name, arguments))
            print(results[-1], flush=True)
    report = header(
        "share of a training step spent waiting for the reader", settings_of(arguments), ("torch", "pyarrow")
    )
    publish(report, results, table, output=arguments.output, place=RESULTS)


if __name__ == "__main__":
    main()
