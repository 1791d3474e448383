"""Does a training step take longer when the embedding tables are larger?

    python benchmarks/table_size.py [--rows 100000 1000000 10000000] [--batch-rows 1024] [--steps 30] [--threads 1]

A whole step of USR round SharedBottom on one CPU worker (lookup, forward, loss, backward, both optimisers), with three
tables of the given rows (user, item, query) and histories of 0-50 events. Two ways of drawing ids:

- spread: the same 100,000 different ids whatever the size, spread evenly over the table: what the code costs;
- uniform: any id alike, so larger tables also have fewer repeats in a batch: the worst a data set can do.

Beside them `dense Adam`: torch.optim.Adam on tables whose gradients are dense, the common mistake; only up to a
million rows. The sizes take turns, step by step, so that a busy moment of the machine meets them all. Writes
benchmarks/results/table_size.json and the table in docs/embeddings.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.doc_tables import markdown, record
from benchmarks.interleaved import header
from usr_ray.config import Config
from usr_ray.data.batch import UsrBatch
from usr_ray.data.manifest import make_manifest
from usr_ray.schema import FeatureSpec, SparseFeature
from usr_ray.serving.check import drawn_batch
from usr_ray.training.embeddings import ReplicatedEmbeddings
from usr_ray.training.loss import row_counts, usr_loss
from usr_ray.training.state import TrainState
from usr_ray.training.worker import LocalWorker

RESULTS = Path(__file__).parent / "results" / "table_size.json"
NUM_DIFFERENT = 100_000
LARGEST_DENSE = 1_000_000
DENSE_ADAM = "dense Adam"


def spec_of(num_rows: int) -> FeatureSpec:
    owners = {"user_id": "user", "item_id": "item", "query": "query"}
    tables = [SparseFeature(name=n, column=f"{n}_index", num_embeddings=num_rows, owner=o) for n, o in owners.items()]
    hours = SparseFeature(name="event_hour", column="event_hour_index", num_embeddings=26, owner="context")
    return FeatureSpec(
        scenarios=("search", "recommendation"),
        query_scenarios=("search",),
        sparse=(*tables, hours),
        dense=(),
        history_length=50,
        label_delay_us=0,
    )


def spread_ids(batch: UsrBatch, num_rows: int) -> UsrBatch:
    """The batch of a table of NUM_DIFFERENT rows with its ids spread over one of `num_rows`; padding stays 0."""
    factor = num_rows // NUM_DIFFERENT
    columns_F = torch.tensor([factor, factor, factor, 1], dtype=batch.sparse_BF.dtype)
    histories = tuple(
        dataclasses.replace(
            h, item_ids_V=h.item_ids_V * factor, query_ids_V=None if h.query_ids_V is None else h.query_ids_V * factor
        )
        for h in batch.histories
    )
    return dataclasses.replace(batch, sparse_BF=batch.sparse_BF * columns_F, histories=histories)


def make_step(num_rows: int, optimizer: str) -> Callable[[UsrBatch], None]:
    """A function that takes one training step on the batch it is given."""
    worker = LocalWorker("cpu")
    spec = spec_of(num_rows)
    is_dense = optimizer == DENSE_ADAM
    config = Config.from_dict({"train": {} if is_dense else {"embedding_optimizer": optimizer}})
    manifest = make_manifest(table_uri="none", version=0, spec=spec, files=[])
    state = TrainState(config, manifest, worker, order="none")
    assert isinstance(state.tables, ReplicatedEmbeddings)
    dense = {name: table.requires_grad_() for name, table in state.tables.tables.items()} if is_dense else {}
    adam = torch.optim.Adam(dense.values(), lr=1e-3) if is_dense else None

    def step(batch: UsrBatch) -> None:
        with torch.set_grad_enabled(not is_dense):
            lookup = state.tables.lookup(batch)
        if is_dense:
            rows = {n: dataclasses.replace(t, rows_UD=dense[n][t.ids.ids_U]) for n, t in lookup.tables.items()}
            lookup = dataclasses.replace(lookup, tables=rows)
        outputs = state.model(batch, lookup, state.step)
        loss = usr_loss(outputs, batch, row_counts(batch, 2, config.model), config.model).total
        state.dense.zero_grad()
        loss.backward()
        if adam is None:
            state.apply_gradients(lookup)
        else:
            state.dense.step()
            adam.step()
            adam.zero_grad(set_to_none=False)

    return step


def draw(num_rows: int, ids: str, batch_rows: int, seed: int) -> UsrBatch:
    if ids == "uniform":
        return drawn_batch(spec_of(num_rows), batch_rows, seed=seed)
    return spread_ids(drawn_batch(spec_of(NUM_DIFFERENT), batch_rows, seed=seed), num_rows)


def measure(optimizer: str, ids: str, sizes: list[int], arguments: argparse.Namespace) -> list[dict[str, float]]:
    """One entry a size: median milliseconds of a step, by the clock and by the processor."""
    steps = {size: make_step(size, optimizer) for size in sizes}
    times: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for number in range(arguments.steps + arguments.warm):
        for size, step in steps.items():
            batch = draw(size, ids, arguments.batch_rows, seed=number)
            start, cpu_start = time.perf_counter(), time.process_time()
            step(batch)
            if number >= arguments.warm:
                times[size].append((time.perf_counter() - start, time.process_time() - cpu_start))
    results = []
    for size in sizes:
        clock, cpu = (statistics.median(values) * 1e3 for values in zip(*times[size], strict=True))
        results.append({"rows": size, "step_ms": round(clock, 2), "step_cpu_ms": round(cpu, 2)})
    for entry in results:
        entry["ratio"] = round(entry["step_cpu_ms"] / results[0]["step_cpu_ms"], 2)
    return results


def table(report: dict) -> str:
    sizes = report["settings"]["rows"]
    rows = []
    for entry in report["results"]:
        by_size = {r["rows"]: r for r in entry["sizes"]}
        cells = [f"{by_size[s]['step_cpu_ms']:.1f} ({by_size[s]['ratio']:.2f}x)" if s in by_size else "" for s in sizes]
        rows.append([f"{entry['optimizer']}, {entry['ids']} ids", *cells])
    header = ["processor ms a step (times the smallest)", *(f"{size:,} rows a table" for size in sizes)]
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5, help="steps before the measured ones")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dense_sizes = [size for size in arguments.rows if size <= LARGEST_DENSE]
    ways = [(o, i, arguments.rows) for o in ("rowwise_adagrad", "rowwise_adam") for i in ("spread", "uniform")]
    results = []
    for optimizer, ids, sizes in [*ways, (DENSE_ADAM, "spread", dense_sizes)]:
        results.append({"optimizer": optimizer, "ids": ids, "sizes": measure(optimizer, ids, sizes, arguments)})
        gc.collect()
        print(results[-1], flush=True)
    settings = {
        "rows": arguments.rows,
        "batch_rows": arguments.batch_rows,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "embedding_dim": 16,
        "history_length": 50,
        "tables": 3,
    }
    question = "time of a training step by the rows of the embedding tables"
    report = header(question, settings) | {"results": results}
    record(report, table(report), arguments.output, document="embeddings.md", place=RESULTS)


if __name__ == "__main__":
    main()
