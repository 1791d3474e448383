"""What does each kind of signal cost: bytes a row, the reader's time, and a training step's?

    python benchmarks/signal_cost.py --lake LAKE [--rounds 7] [--world static]

LAKE has every kind (docs/learning.md, "Each kind of signal"); a way reads and trains on the columns of its kinds
alone. Bytes are those of the columns in the table's Parquet files, and of the tables by encoded id a value; times are
of the processor, and the ways take turns. Writes results/signal_cost.json and the table in docs/speed.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow.parquet as pq
import torch
from learning_signals import WORLDS, data_of

from benchmarks.doc_tables import markdown
from benchmarks.interleaved import header, interval, publish, ratio, spread, take_turns
from jobs.demo import PLAIN
from usr_ray.config import Config
from usr_ray.data.manifest import Manifest
from usr_ray.training.loss import row_counts, usr_loss
from usr_ray.training.rows import training_reader
from usr_ray.training.state import TrainState
from usr_ray.training.worker import LocalWorker

RESULTS = Path(__file__).parent / "results" / "signal_cost.json"
WAYS: dict[str, tuple[str, ...]] = {
    "none": (),
    "sides": ("sides",),
    "tags": ("tags",),
    "vectors": ("vectors",),
    "log odds of counters": ("log odds of counters",),
    "counters": ("counters",),
    "sides, tags, vectors, counters": ("sides", "tags", "vectors", "counters"),
}
NUM_STEPS = 40


def bytes_a_row(manifest: Manifest, columns: set[str]) -> float:
    """Of some columns in the files of the samples table."""
    size = 0
    for file in manifest.files:
        metadata = pq.ParquetFile(Path(manifest.table_uri) / file.path).metadata
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            parts = map(group.column, range(group.num_columns))
            size += sum(part.total_compressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)
    return size / manifest.num_rows


def cpu_of_reader(config: Config, manifest: Manifest) -> float:
    """Seconds of the processor, all threads, for an epoch of the training rows."""
    start = time.process_time()
    with training_reader(config, manifest) as reader:
        for _ in reader.batches(epoch=1):
            pass
    return time.process_time() - start


def step_timer(config: Config, manifest: Manifest) -> Callable[[], float]:
    """Seconds of the processor a step, mean over NUM_STEPS on real batches; one model keeps on training."""
    state = TrainState(config, manifest, LocalWorker("cpu"), order="none")
    with training_reader(config, manifest) as reader:
        batches = [batch for _, batch in zip(range(NUM_STEPS), reader.batches(epoch=1), strict=False)]
    ready = [(batch, state.tables.unique_ids(batch)) for batch in batches]

    def timed() -> float:
        start = time.process_time()
        for batch, unique in ready:
            lookup = state.tables.lookup(batch, unique)
            outputs = state.model(batch, lookup, state.step)
            loss = usr_loss(outputs, batch, row_counts(batch, len(batch.histories), config.model), config.model).total
            state.dense.zero_grad()
            loss.backward()
            state.apply_gradients(lookup)
        return (time.process_time() - start) / len(ready)

    return timed


def shown(found: Mapping[str, float], rounds: int) -> str:
    return f"{found['median']:.2f}x" if rounds == 1 else f"{spread(found)}x"


def table(report: Mapping[str, Any]) -> str:
    """A line a way; the ratio of a single round has no interval."""
    rounds = report["settings"]["rounds"]
    rows = [
        [
            name,
            f"{way['bytes_a_row']:.0f}",
            *(shown(way[f"{what}_ratio"], rounds) for what in ("reader", "plain", "usr")),
        ]
        for name, way in report["results"].items()
    ]
    return markdown(["given", "bytes a row", "reader's time", "step, plain", "step, USR"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="static")
    parser.add_argument("--lake", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, dict[str, Callable[[], float]]] = {"reader": {}, "plain": {}, "usr": {}}
    sizes = {}
    for name, kinds in WAYS.items():
        data = data_of(WORLDS[arguments.world], kinds, (arguments.lake, None), validation=False)
        sides = () if "sides" in kinds else ("model.event_sides=false",)
        config, spec = data.config(sides), data.train.spec
        columns = {f.column for f in spec.sparse} | {f.column for f in spec.dense} | {f.column for f in spec.lists}
        for history in spec.histories:
            columns |= {history.item_ids, history.actions, history.ages_s, history.query_ids or ""}
        sizes[name] = bytes_a_row(data.train, columns)
        ways["reader"][name] = lambda config=config, data=data: cpu_of_reader(config, data.train)  # type: ignore[misc]
        ways["plain"][name] = step_timer(data.config((*PLAIN, *sides)), data.train)
        ways["usr"][name] = step_timer(config, data.train)
    timings = {what: take_turns(found, arguments.rounds) for what, found in ways.items()}
    results = {
        name: {"bytes_a_row": round(sizes[name], 1)}
        | {f"{what}_cpu_s": interval(found[name]) for what, found in timings.items()}
        | {f"{what}_ratio": ratio(found[name], found["none"]) for what, found in timings.items()}
        for name in WAYS
    }
    settings = {"rounds": arguments.rounds, "steps": NUM_STEPS, "world": arguments.world}
    report = header("processor seconds of an epoch's reading and of a step", settings, ("pyarrow", "torch"))
    publish(report, results, table, output=arguments.output, place=RESULTS)


if __name__ == "__main__":
    main()
