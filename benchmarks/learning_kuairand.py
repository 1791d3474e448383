"""On real rows (KuaiRand-Pure, 25-30 April 2022): ours beside popularity and beside torch-rechub's models.

    python benchmarks/learning_kuairand.py --lake LAKE [--seeds 3] [--backbones shared_bottom mmoe ...]

LAKE is the lake of jobs/configs/kuairand.toml (docs/learning.md has the two commands that make it). Everything is
trained on the training dates and scored on the held-out dates of that file. torch-rechub's models get the same
categorical and number features, the scenario as one more category, sizes like ours, and dense Adam; they take the best
setting and the best epoch of a small grid by held-out AUC, which favours them. Results: results/learning_kuairand.json.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning_runs import Data, Runs, StoppedError, gaps, known_auc, mean_auc, save, show_gap, train_seeds
from torch import Tensor, nn

from jobs.demo import PLAIN
from usr_ray.config import BACKBONES
from usr_ray.data.reader import SampleReader
from usr_ray.evaluation.metrics import Predictions
from usr_ray.schema import OPEN_LABEL, TASKS, FeatureSpec
from usr_ray.training.evaluate import evaluation_reader
from usr_ray.training.rows import training_reader
from usr_ray.training.worker import LocalWorker

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "learning_kuairand.json"
LEARNING_RATES, WEIGHT_DECAYS, NUM_EPOCHS = (0.0005, 0.001, 0.002), (0.0, 1e-5), 3
"""torch-rechub's grid; its examples use 0.001 and 1e-5."""
MODELS = ("SharedBottom", "MMoE", "PLE")


class Rows:
    """The rows of a reader that count, as torch-rechub wants them: a dictionary of columns."""

    def __init__(self, reader: SampleReader, spec: FeatureSpec) -> None:
        with reader:
            batches = list(reader.batches(0))
        keep = torch.cat([b.weights_B for b in batches]) > 0
        sparse = torch.cat([b.sparse_BF for b in batches])[keep]
        dense = torch.cat([b.dense_BF for b in batches])[keep]
        self.columns: dict[str, Tensor] = {f.name: sparse[:, n] for n, f in enumerate(spec.sparse)}
        self.columns |= {f.name: dense[:, n] for n, f in enumerate(spec.dense)}
        self.columns["scenario"] = torch.cat([b.scenario_B for b in batches])[keep]
        self.labels = torch.cat([b.labels_BT for b in batches])[keep][:, : len(TASKS)]
        self.row_number = torch.cat([b.row_number_B for b in batches])[keep]

    def batches(self, size: int, *, shuffled: bool) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        order = torch.randperm(len(self.labels)) if shuffled else torch.arange(len(self.labels))
        for chosen in order.split(size):
            yield {name: column[chosen] for name, column in self.columns.items()}, self.labels[chosen]


def rechub_model(name: str, spec: FeatureSpec, dim: int) -> nn.Module:
    """Sizes as ours by default: bottom or experts (128, 64), towers (32), 4 experts (PLE: 1 a task, 4 shared)."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE, PLE, SharedBottom

    features = [SparseFeature(f.name, f.num_embeddings, embed_dim=dim) for f in spec.sparse]
    features += [SparseFeature("scenario", len(spec.scenarios), embed_dim=dim)]
    features += [DenseFeature(f.name) for f in spec.dense]
    tasks, towers = ["classification"] * len(TASKS), [{"dims": [32]}] * len(TASKS)
    mlp = {"dims": [128, 64]}
    if name == "SharedBottom":
        return SharedBottom(features, tasks, mlp, towers)
    if name == "MMoE":
        return MMOE(features, tasks, 4, mlp, towers)
    return PLE(features, tasks, 2, 1, 4, mlp, towers)


def train_rechub(
    model: nn.Module, train: Rows, held_out: Rows, *, lr: float, decay: float, epochs: int, batch: int
) -> list[np.ndarray]:
    """Held-out probabilities (N, T) after each epoch. The loss and the optimiser of torch-rechub's MTLTrainer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=decay)
    after = []
    for _ in range(epochs):
        model.train()
        for columns, labels in train.batches(batch, shuffled=True):
            optimizer.zero_grad()
            known = (labels != OPEN_LABEL).float()
            nn.functional.binary_cross_entropy(model(columns), labels.clamp(min=0), weight=known).backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            scored = [model(columns) for columns, _ in held_out.batches(8192, shuffled=False)]
        after.append(torch.cat(scored).double().numpy())
    return after


def tune_rechub(
    name: str, data: Data, train: Rows, held_out: Rows, rows: Predictions, seeds: Sequence[int]
) -> tuple[Runs, dict[str, Any]]:
    """The best of the grid with the first seed, by mean held-out AUC of both tasks; then all seeds."""
    config, spec = data.config(), data.train.spec

    def run(seed: int, lr: float, decay: float, epochs: int) -> list[np.ndarray]:
        torch.manual_seed(seed)
        model = rechub_model(name, spec, config.model.embedding_dim)
        batch = config.train.global_batch_size
        return train_rechub(model, train, held_out, lr=lr, decay=decay, epochs=epochs, batch=batch)

    grid: list[dict[str, Any]] = []
    for lr, decay in itertools.product(LEARNING_RATES, WEIGHT_DECAYS):
        for epoch, probs_NT in enumerate(run(seeds[0], lr, decay, NUM_EPOCHS)):
            both = [known_auc(rows.labels_NT[:, t], probs_NT[:, t]) for t in range(len(TASKS))]
            grid.append({"lr": lr, "weight_decay": decay, "epochs": epoch + 1, "auc": round(float(np.mean(both)), 5)})
    best: dict[str, Any] = max(grid, key=lambda entry: entry["auc"])
    start = time.perf_counter()
    last = [run(seed, best["lr"], best["weight_decay"], best["epochs"])[-1] for seed in seeds]
    return Runs(rows, np.stack(last), (time.perf_counter() - start) / len(seeds)), {"best": best, "grid": grid}


def peer_rows(data: Data) -> tuple[Rows, Rows]:
    """Training and held-out rows for torch-rechub; the held-out ones in file order, as an evaluation has them."""
    worker, config = LocalWorker("cpu"), data.config()
    train = Rows(training_reader(config, data.train), data.train.spec)
    held_out = Rows(evaluation_reader(data.held_out, worker, config), data.train.spec)
    return train, held_out


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    data = Data.of(arguments.config, arguments.lake, arguments.set)
    scenarios, seeds = data.config().scenarios, list(range(arguments.seeds))
    models: dict[str, Runs] = {}
    details: dict[str, Any] = {}

    def add(name: str, make: Callable[[], Runs]) -> None:
        models[name] = make()
        found = mean_auc(models[name], scenarios)
        print(
            f"{name:28s} {models[name].seconds:5.0f} s  "
            + "  ".join(f"{task} {found[task]['all']:.4f}" for task in TASKS),
            flush=True,
        )

    try:
        for backbone in arguments.backbones:
            for suffix, settings in (("", PLAIN), (" + USR", ())):
                overrides = [f"model.backbone={backbone}", *settings]
                add(f"ours, {backbone}{suffix}", partial(train_seeds, data, overrides, seeds))
        if not arguments.without_peers:
            rows = next(iter(models.values())).rows
            train, held_out = peer_rows(data)
            assert (held_out.row_number.numpy() == rows.row_number_N).all(), "both score the same rows in one order"
            for name in MODELS:

                def peer(name: str = name) -> Runs:
                    runs, details[name] = tune_rechub(name, data, train, held_out, rows, seeds)
                    return runs

                add(f"torch-rechub, {name}", peer)
    except StoppedError:
        if not models:
            raise
        print("stopped: reporting the models that are finished", file=sys.stderr)
        details["stopped_after"] = list(models)[-1]
    rows = next(iter(models.values())).rows
    add("popularity", lambda: Runs(rows, data.popularity(rows).probs_NT[None]))
    details["user_ids"] = data.train.spec.sparse_feature("user_id").num_embeddings
    return summary(models, details, scenarios, arguments)


def summary(
    models: dict[str, Runs], details: dict[str, Any], scenarios: Sequence[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    found = {name: mean_auc(runs, scenarios) for name, runs in models.items()}
    peers = [name for name in models if name.startswith("torch-rechub")]
    best_peer = max(peers, key=lambda name: sum(found[name][task]["all"] for task in TASKS)) if peers else None
    result: dict[str, Any] = {}
    for name, runs in models.items():
        entry: dict[str, Any] = {"auc": found[name], "seconds": round(runs.seconds, 1)}
        if name != "popularity":
            entry["over_popularity"] = gaps(runs, models["popularity"], scenarios)
        if best_peer and name.startswith("ours"):
            entry["over_best_peer"] = gaps(runs, models[best_peer], scenarios)
        if name.endswith("+ USR"):
            entry["over_plain"] = gaps(runs, models[name.removesuffix(" + USR")], scenarios)
        result[name] = entry
    num_rows = len(models["popularity"].rows)
    settings = {"seeds": arguments.seeds, "held_out_rows": num_rows, "set": arguments.set, "peer": best_peer}
    return {"settings": settings, "scenarios": list(scenarios), "models": result, "peers": details}


def show(result: dict[str, Any]) -> str:
    """Markdown tables: AUC, and the gaps of the pooled rows."""
    columns = [(task, cell) for task in TASKS for cell in ("all", *result["scenarios"])]
    lines = ["| model | " + " | ".join(f"{task} {cell}" for task, cell in columns) + " |", "|---" * 11 + "|"]
    for name, entry in result["models"].items():
        lines.append(f"| {name} | " + " | ".join(f"{entry['auc'][t][c]:.4f}" for t, c in columns) + " |")
    lines += [
        "",
        "| pooled AUC gap | "
        + " | ".join(f"{t} over {o}" for t in TASKS for o in ("popularity", "best peer", "plain"))
        + " |",
        "|---" * 7 + "|",
    ]
    for name, entry in result["models"].items():
        keys = [(t, k) for t in TASKS for k in ("over_popularity", "over_best_peer", "over_plain")]
        texts = [show_gap(entry[k][t]["all"]) if k in entry else "" for t, k in keys]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", type=Path, default=ROOT / "runs" / "demo-kuairand" / "lake")
    parser.add_argument("--config", type=Path, default=ROOT / "jobs" / "configs" / "kuairand.toml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--without-peers", action="store_true", help="do not train torch-rechub's models")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not (arguments.lake / "samples").exists():
        print(f"skipped: no samples table in {arguments.lake}; docs/learning.md says how to make one", file=sys.stderr)
        return
    torch.set_num_threads(1)
    result = measure(arguments)
    save(arguments.output, result)
    print(show(result))


if __name__ == "__main__":
    main()
