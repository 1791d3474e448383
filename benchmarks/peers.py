"""How many samples a second does training take beside torch-rechub's and Scenario-Wise-Rec's way?

    python benchmarks/peers.py [--rows 100000 10000000] [--models shared_bottom mmoe] [--rounds 5] [--steps 8]

The same shapes: 15 categorical features of dimension 16, batches of 4096, bottom or 4 experts of 128 and 64, four
towers of 32 (2 scenarios x 2 tasks). The same ids, drawn by popularity.

- torch-rechub: its own DataGenerator (a dictionary of arrays through torch's DataLoader, row by row), its SharedBottom
  or MMOE, its MTLTrainer with torch.optim.Adam, whose gradients and steps are as large as the tables.
- Scenario-Wise-Rec is not on PyPI; its trainer is a fork of that loop. What is measured is its way, written here: the
  same loader and Adam, every row through every scenario's towers, the row's own picked by masks.
- usr_ray: batches from a Delta table through the reader, the plain backbone (no part of USR), row-wise Adagrad.

Each way has a process of its own, as its users start it; they take turns.

Peers keep four floats for each weight, 38 GB at 15 tables of 10 million rows. Where `--memory-gb` does not hold that,
only some tables get the full size, and the time of all 15 follows from the line through both sizes (the JSON has
the measured numbers and `tables_at_size`). Writes benchmarks/results/peers.json and the table in docs/speed.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from torch_rechub.basic.features import SparseFeature as RechubFeature
from torch_rechub.models.multi_task import MMOE, SharedBottom
from torch_rechub.trainers import MTLTrainer
from torch_rechub.utils.data import DataGenerator

from benchmarks.doc_tables import markdown
from benchmarks.interleaved import (
    header,
    interval,
    own_process,
    publish,
    ratio,
    settings_of,
    spread,
    take_turns,
    verdict,
)
from benchmarks.reader import DATES, skewed_ids, write_table
from benchmarks.step_cases import PLAIN, Step
from usr_ray.data.feed import Feed
from usr_ray.data.manifest import build_manifest
from usr_ray.schema import FeatureSpec, SparseFeature
from usr_ray.training.rows import training_batches, training_reader

RESULTS = Path(__file__).parent / "results" / "peers.json"
BATCH_ROWS, NUM_FEATURES, DIM = 4096, 15, 16
HIDDEN, TOWER, NUM_EXPERTS, NUM_TOWERS = (128, 64), (32,), 4, 4
SMALL = 100_000
AIMS = {100_000: 3, 10_000_000: 20}
OURS = "usr_ray"


def feature_names() -> list[str]:
    return ["user_id", "item_id", "query", *(f"category_{n}" for n in range(NUM_FEATURES - 3))]


def table_rows(rows: int, num_tables: int) -> list[int]:
    """Sizes of the 15 tables: `num_tables` of `rows`, the others of SMALL."""
    return [rows if n < num_tables else SMALL for n in range(NUM_FEATURES)]


def tables_that_fit(rows: int, memory_gb: float) -> int:
    """Of how many tables of `rows` rows a peer's weights, gradients and two moments fit; at least one."""
    if rows <= SMALL:
        return NUM_FEATURES
    return int(min(NUM_FEATURES, max(1, memory_gb * 1e9 // (rows * DIM * 16))))


class ByScenario(nn.Module):
    """Scenario-Wise-Rec's way: all towers on all rows, then the row's own scenario's by masks; (B, tasks)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        probs_BC = self.model(x)
        found_BT = torch.zeros_like(probs_BC[:, :2])
        for scenario in range(2):
            mask_B1 = (x["scenario"] == scenario).unsqueeze(1)
            found_BT = torch.where(mask_B1, probs_BC[:, 2 * scenario : 2 * scenario + 2], found_BT)
        return found_BT


def peer(
    stack: contextlib.ExitStack,  # noqa: ARG001  # there is nothing to close
    num_threads: int,
    model_name: str,
    sizes: list[int],
    num_steps: int,
    by_scenario: bool,
) -> Callable[[], float]:
    """A function that trains `num_steps` batches the peers' way and returns the seconds of one."""
    torch.set_num_threads(num_threads)
    rng, num_rows = np.random.default_rng(0), num_steps * BATCH_ROWS
    features = [
        RechubFeature(n, vocab_size=size, embed_dim=DIM) for n, size in zip(feature_names(), sizes, strict=True)
    ]
    x = {f.name: skewed_ids(rng, num_rows, f.vocab_size) for f in features}
    towers = [{"dims": list(TOWER)} for _ in range(NUM_TOWERS)]
    tasks = ["classification"] * NUM_TOWERS
    if model_name == "mmoe":
        model = MMOE(features, tasks, NUM_EXPERTS, {"dims": list(HIDDEN)}, towers)
    else:
        model = SharedBottom(features, tasks, {"dims": list(HIDDEN)}, towers)
    num_outputs = NUM_TOWERS
    if by_scenario:
        x["scenario"] = rng.integers(0, 2, num_rows)
        model, num_outputs = ByScenario(model), 2
    y = (rng.random((num_rows, num_outputs)) < 0.2).astype(np.float32)
    trainer = MTLTrainer(model, tasks[:num_outputs], optimizer_params={"lr": 1e-3})
    loader = DataGenerator(x, y).generate_dataloader(x_val=x, y_val=y, x_test=x, y_test=y, batch_size=BATCH_ROWS)[0]

    def run() -> float:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train_one_epoch(loader)
        return (time.perf_counter() - start) / num_steps

    return run


def our_spec(sizes: list[int]) -> FeatureSpec:
    owners = {"user_id": "user", "item_id": "item", "query": "query"}
    return FeatureSpec(
        scenarios=("search", "recommendation"),
        query_scenarios=("search",),
        dense=(),
        history_length=1,
        label_delay_us=0,
        sparse=tuple(
            SparseFeature(name=n, column=f"{n}_index", num_embeddings=size, owner=owners.get(n, "context"))
            for n, size in zip(feature_names(), sizes, strict=True)
        ),
    )


def ours(
    stack: contextlib.ExitStack, num_threads: int, model_name: str, sizes: list[int], num_steps: int
) -> Callable[[], float]:
    """A function that trains `num_steps` batches from a table without histories; seconds of one."""
    torch.set_num_threads(num_threads)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    spec = our_spec(sizes)
    write_table(folder, spec, 64 * BATCH_ROWS, longest=0)
    manifest = build_manifest(folder, dates=DATES)
    model = {
        **PLAIN,
        "backbone": model_name,
        "hidden": HIDDEN,
        "tower_hidden": TOWER,
        "num_experts": NUM_EXPERTS,
        "embedding_dim": DIM,
        "interactions": False,
    }
    step = Step(spec, model, train={"global_batch_size": BATCH_ROWS})
    reader = stack.enter_context(training_reader(step.config, manifest))
    source = training_batches(reader, step.state.tables, epochs=range(10**6), start_step=0, config=step.config.model)
    feed = stack.enter_context(Feed(source, step.worker.device))

    def run() -> float:
        start = time.perf_counter()
        for (batch, unique), _ in itertools.islice(feed, num_steps):
            step(batch, unique)
        return (time.perf_counter() - start) / num_steps

    return run


def measure(model_name: str, rows: int, small_s: Mapping[str, float], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of every way; `small_s` are those of tables of SMALL rows."""
    num_tables = tables_that_fit(rows, arguments.memory_gb)
    sizes = table_rows(rows, num_tables)
    num_steps = arguments.steps if rows < 1_000_000 else 2
    shape = (arguments.threads, model_name, sizes)
    with contextlib.ExitStack() as stack:
        ways = {
            name: stack.enter_context(own_process(peer, *shape, num_steps, name != "torch-rechub"))
            for name in ("torch-rechub", "scenario-wise")
        }
        ways[OURS] = stack.enter_context(own_process(ours, *shape, arguments.steps))
        found = take_turns(ways, arguments.rounds)
    whole = {}
    for name, times in found.items():
        small = small_s.get(name, statistics.median(times))
        whole[name] = [max(small + (t - small) * NUM_FEATURES / num_tables, t) for t in times]
    return {
        "model": model_name,
        "rows": rows,
        "tables_at_size": num_tables,
        "ways": {
            name: {
                "measured_step_s": interval(found[name]),
                "samples_per_s": interval([BATCH_ROWS / t for t in times]),
                "ours_times": ratio(times, whole[OURS]),
            }
            for name, times in whole.items()
        },
    }


def table(report: Mapping[str, Any]) -> str:
    rows = []
    for entry in report["results"]:
        for name, way in entry["ways"].items():
            aim = AIMS.get(entry["rows"])
            partly = "" if entry["tables_at_size"] == NUM_FEATURES else f" ({entry['tables_at_size']} of 15 at size)"
            rows.append(
                [
                    f"{entry['model']}, {entry['rows']:,} rows a table: {name}{partly}",
                    spread(way["samples_per_s"], 0),
                    "" if name == OURS else spread(way["ours_times"], 1) + "x",
                    "" if name == OURS or aim is None else verdict(way["ours_times"]["median"], at_least=aim),
                ]
            )
    return markdown(["training", "samples/s", "ours is faster by", "aim"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[SMALL, 10_000_000])
    parser.add_argument("--models", nargs="+", choices=["shared_bottom", "mmoe"], default=["shared_bottom", "mmoe"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="a round; the peers take 2 where tables are large")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-gb", type=float, default=2.6, help="for the tables of one peer")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = []
    for model_name in arguments.models:
        small_s: dict[str, float] = {}
        for rows in sorted({SMALL, *arguments.rows}):
            results.append(measure(model_name, rows, small_s, arguments))
            if rows == SMALL:
                small_s = {n: way["measured_step_s"]["median"] for n, way in results[-1]["ways"].items()}
            print(results[-1], flush=True)
    report = header(
        "samples a second of training beside the peers' way", settings_of(arguments), ("torch", "torch-rechub")
    )
    publish(report, results, table, output=arguments.output, place=RESULTS)


if __name__ == "__main__":
    main()
