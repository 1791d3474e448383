"""How fast does the exported model score, beside the training model: one row at a time, and in batches?

    python benchmarks/score.py [--backbone shared_bottom] [--calls 300] [--batch-rows 1024] [--repeats 7] [--threads 1]

Builds a model of the default sizes (12 categories, 4 numbers, two histories of 0-50 events) with random weights,
exports it as jobs/export.py does, and lets the ways take turns on the same rows, so that a busy moment of the machine
meets them all. Every way gets inputs in its own form, on the CPU: jagged batches for the training model, padded arrays
for the exported ones. Seconds are of the clock, and of the processor, which other programs on the machine change
little. Prints a table and writes benchmarks/results/score.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.interleaved import header
from benchmarks.step_cases import spec_of
from usr_ray.config import BACKBONES, Config
from usr_ray.data.batch import UsrBatch
from usr_ray.data.manifest import make_manifest
from usr_ray.schema import FeatureSpec
from usr_ray.serving.check import drawn_batch, training_probabilities
from usr_ray.serving.export import TOLERANCE, export_run
from usr_ray.serving.model import padded_inputs
from usr_ray.serving.runtime import ExportedModel
from usr_ray.training.checkpoint import CHECKPOINTS, CheckpointStore
from usr_ray.training.evaluate import TrainedRun, load_run
from usr_ray.training.state import TrainState
from usr_ray.training.worker import LocalWorker

RESULTS = Path(__file__).parent / "results" / "score.json"
NUM_LATENCY_ROWS = 64
TRAINING, PT2, ONNX = "training model", "exported, torch", "exported, onnxruntime"


def benchmark_spec() -> FeatureSpec:
    sizes = {"user_id": (200_000, "user"), "item_id": (100_000, "item"), "query": (50_000, "query")}
    sizes |= {"event_hour": (26, "context")}
    sizes |= {f"category_{n}": (1_000, "item" if n % 2 else "user") for n in range(8)}
    return spec_of(sizes, [f"number_{n}" for n in range(4)])


def exported_run(folder: Path, backbone: str) -> TrainedRun:
    """A run with an untrained model, and its export in `folder`/export."""
    worker = LocalWorker("cpu")
    manifest = make_manifest(table_uri="none", version=0, spec=benchmark_spec(), files=[])
    state = TrainState(Config.from_dict({"model": {"backbone": backbone}}), manifest, worker, order="none")
    CheckpointStore(folder / "run" / CHECKPOINTS).save(1, state.tensors(), state.describe(worker))
    export_run(folder / "run", folder / "export")
    return load_run(folder / "run")


def make_ways(run: TrainedRun, directory: Path, num_threads: int) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (batch to this way's inputs, inputs to probabilities); only the second is timed."""

    @torch.inference_mode()
    def training(batch: UsrBatch) -> dict[str, np.ndarray]:
        probs = training_probabilities(run.module(batch, run.tables.lookup(batch)))
        return {name: value.numpy() for name, value in probs.items()}

    def padded(batch: UsrBatch) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in padded_inputs(batch, run.spec).items()}

    return {
        TRAINING: (lambda batch: batch, training),
        PT2: (padded, ExportedModel(directory, runtime="torch").predict),
        ONNX: (padded, ExportedModel(directory, runtime="onnx", num_threads=num_threads).predict),
    }


def check(ways: dict[str, tuple[Callable, Callable]], batch: UsrBatch) -> None:
    """Ways that disagree are not worth timing; also the first, slow call of each."""
    expected = ways[TRAINING][1](batch)
    for name, (prepare, predict) in ways.items():
        for key, value in predict(prepare(batch)).items():
            assert np.abs(value - expected[key]).max() <= TOLERANCE, f"{name} differs in {key}"


def seconds(
    ways: dict[str, tuple[Callable, Callable]], batches: list[UsrBatch], num_calls: int
) -> dict[str, np.ndarray]:
    """(calls, 2) seconds of the clock and of the processor of each way, the ways taking turns call by call."""
    prepared = {name: [prepare(batch) for batch in batches] for name, (prepare, _) in ways.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for call in range(num_calls):
        for name, (_, predict) in ways.items():
            inputs = prepared[name][call % len(batches)]
            start, cpu_start = time.perf_counter(), time.process_time()
            predict(inputs)
            times[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {name: np.array(values) for name, values in times.items()}


def measure(backbone: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = exported_run(folder, backbone)
        ways = make_ways(run, folder / "export", arguments.threads)
        rows = drawn_batch(run.spec, NUM_LATENCY_ROWS, seed=1)
        single = [rows.slice_rows(n, n + 1) for n in range(NUM_LATENCY_ROWS)]
        batch = drawn_batch(run.spec, arguments.batch_rows, seed=2)
        for each in (single[0], batch):
            check(ways, each)
        seconds(ways, single, NUM_LATENCY_ROWS)  # warm
        latency = seconds(ways, single, arguments.calls)
        throughput = seconds(ways, [batch], arguments.repeats)
    result = {}
    for way in ways:
        clock_ms, cpu_ms = latency[way].T * 1e3
        clock_s, cpu_s = np.median(throughput[way], axis=0)
        result[way] = {
            "one_row_ms_p50": round(float(np.median(clock_ms)), 3),
            "one_row_ms_p99": round(float(np.percentile(clock_ms, 99)), 3),
            "one_row_cpu_ms_p50": round(float(np.median(cpu_ms)), 3),
            "batch_rows_per_s": round(arguments.batch_rows / clock_s),
            "batch_rows_per_cpu_s": round(arguments.batch_rows / cpu_s),
        }
    trained = result[TRAINING]
    for values in result.values():
        values["latency_ratio"] = round(trained["one_row_cpu_ms_p50"] / values["one_row_cpu_ms_p50"], 2)
        values["throughput_ratio"] = round(values["batch_rows_per_cpu_s"] / trained["batch_rows_per_cpu_s"], 2)
    return result


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A line for each way; 'times' compares processor time with the training model's."""
    lines = [
        f"{'':<36} {'one row':>9} {'':>9} {'':>9} {'':>6}   {'batch':>9} {'':>11}",
        f"{'backbone':<14} {'way':<21} {'p50 ms':>9} {'p99 ms':>9} {'cpu ms':>9} {'times':>6}   {'rows/s':>9} "
        f"{'rows/cpu s':>11} {'times':>6}",
    ]
    for backbone, ways in results.items():
        for way, v in ways.items():
            lines.append(
                f"{backbone:<14} {way:<21} {v['one_row_ms_p50']:>9.2f} {v['one_row_ms_p99']:>9.2f} "
                f"{v['one_row_cpu_ms_p50']:>9.2f} {v['latency_ratio']:>6.1f}   {v['batch_rows_per_s']:>9,} "
                f"{v['batch_rows_per_cpu_s']:>11,} {v['throughput_ratio']:>6.1f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["shared_bottom"], choices=BACKBONES)
    parser.add_argument("--calls", type=int, default=300, help="of one row, for each way")
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7, help="batches of each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {backbone: measure(backbone, arguments) for backbone in arguments.backbone}
    settings = {
        "calls": arguments.calls,
        "batch_rows": arguments.batch_rows,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "embedding_dim": 16,
        "history_length": 50,
    }
    question = "seconds to score on a CPU, inputs ready: one row, and rows of a batch"
    report = header(question, settings, ("torch", "onnxruntime")) | {"results": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
