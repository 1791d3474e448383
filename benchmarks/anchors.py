"""Is ours ahead of what others would build first? Logistic regression, boosted trees and torch-rechub on our rows.

    python benchmarks/anchors.py static --lake LAKE [--seeds 3] [--models ...] [--counters [KIND]]

`static` and `needs` are the lakes of jobs/configs/simulated.toml and needs.toml, `kuairand` that of kuairand.toml;
`kuairand, own counters` and `kuairand, all earlier` are without the counts that its source makes itself, as in
learning_signals.py. Every model has the same rows, categories and numbers, the scenario among them; --counters adds the
lake's counters (`counters.defaults`), all columns or those of a kind of learning_signals.py, under a name of its own.
Histories are ours alone: no peer takes several of them. Where the lake has terms, ours are trained without and with
them. Each peer's settings come from a grid by mean AUC of both tasks on the last training day, trained on those before
with the first seed; then it is trained on all training days. Ours have the configuration of the file: on the simulated
worlds chosen on that day too, on KuaiRand on the held-out days (docs/learning.md).

Every training is kept in --work and is not done again, so that the command goes on where it stopped. After each model
it writes results/anchors.json and, once there is something to compare, the table of docs/learning.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from learning_kuairand import Rows, peer_rows, rechub_model, train_rechub
from learning_runs import Data, Runs, gaps, last_day, mean_auc, save, train_seeds
from learning_signals import COUNTERS, EARLIER, given
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.doc_tables import gap_text, markdown, show
from jobs.demo import PLAIN
from usr_ray.config import load_config
from usr_ray.evaluation.metrics import Predictions, auc
from usr_ray.schema import OPEN_LABEL, TASKS, FeatureSpec
from usr_ray.training.logistic import PlainRows, logistic_regression

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "anchors.json"
OWN_COUNTERS = ("kuairand, own counters", "kuairand, all earlier")
WORLDS = {"static": "simulated", "needs": "needs", "kuairand": "kuairand", **dict.fromkeys(OWN_COUNTERS, "kuairand")}
"""World -> its file in jobs/configs."""
OURS = {"ours, plain": PLAIN, "ours, USR": ()}
WITH_TERMS = {f"{name}, with terms": overrides for name, overrides in OURS.items()}
RECHUB = ("SharedBottom", "MMoE", "PLE", "DCNv2", "DeepFM")
NUM_EPOCHS = 4
GRIDS: dict[str, list[dict[str, Any]]] = {
    "logistic regression": [{"C": c} for c in (0.02, 0.05, 0.1, 0.2)],
    "LightGBM": [{"num_leaves": leaves, "cat_smooth": smooth} for leaves in (7, 31) for smooth in (10, 100)],
    **{f"torch-rechub, {name}": [{"lr": lr, "decay": 1e-5} for lr in (0.0005, 0.001, 0.002)] for name in RECHUB},
}
MODELS = [*OURS, *WITH_TERMS, "popularity", *GRIDS]


@dataclass(frozen=True, slots=True)
class Pair:
    """Rows to fit on and rows to score."""

    spec: FeatureSpec
    train: Rows
    scored: Rows
    batch_size: int
    dim: int

    @classmethod
    def of(cls, data: Data) -> Pair:
        config = data.config()
        return cls(data.train.spec, *peer_rows(data), config.train.global_batch_size, config.model.embedding_dim)


Fit = Callable[[Pair, Mapping[str, Any], int], list[NDArray[np.float64]]]
"""(rows, settings, seed) -> probabilities (N, T) after each length of the training that may be chosen."""


def fit_logistic(pair: Pair, settings: Mapping[str, Any], seed: int) -> list[NDArray[np.float64]]:  # noqa: ARG001
    """L2; the same whatever the seed."""
    train, scored = (plain_rows(pair.spec, rows) for rows in (pair.train, pair.scored))
    return [logistic_regression(pair.spec, train, scored, settings["C"])]


def plain_rows(spec: FeatureSpec, rows: Rows) -> PlainRows:
    """The same rows, as the logistic regression takes them."""
    width = (len(rows.labels), 0)
    return PlainRows(
        np.stack([rows.columns[f.name].numpy().astype(np.int64) for f in spec.sparse], axis=1),
        np.stack([rows.columns[f.name].numpy() for f in spec.dense], axis=1) if spec.dense else np.zeros(width, "f4"),
        rows.columns["scenario"].numpy(),
        rows.labels.numpy(),
        rows.row_number.numpy(),
    )


def fit_trees(pair: Pair, settings: Mapping[str, Any], seed: int) -> list[NDArray[np.float64]]:
    """Its own handling of categories; after 100, 200 and 400 trees."""
    import lightgbm

    sparse = ["scenario", *(f.name for f in pair.spec.sparse)]
    names = [*sparse, *(f.name for f in pair.spec.dense)]
    train, scored = (
        np.stack([rows.columns[name].double().numpy() for name in names], axis=1) for rows in (pair.train, pair.scored)
    )
    labels_NT = pair.train.labels.numpy()
    options = {"objective": "binary", "learning_rate": 0.05, "bagging_fraction": 0.8, "bagging_freq": 1}
    options |= {"feature_fraction": 0.8, "num_threads": 1, "seed": seed, "verbose": -1, **settings}
    models = [
        lightgbm.train(
            options,
            lightgbm.Dataset(train[known_N], labels_NT[known_N, task], categorical_feature=list(range(len(sparse)))),
            num_boost_round=400,
        )
        for task in range(len(TASKS))
        for known_N in [labels_NT[:, task] != OPEN_LABEL]
    ]
    return [np.stack([m.predict(scored, num_iteration=n) for m in models], axis=1) for n in (100, 200, 400)]


class OneATask(nn.Module):
    """torch-rechub's rankers have one output: one of them a task."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.rankers = nn.ModuleList([make() for _ in TASKS])

    def forward(self, columns: dict[str, Tensor]) -> Tensor:
        return torch.stack([ranker(columns) for ranker in self.rankers], dim=1)


def ranker(name: str, spec: FeatureSpec, dim: int) -> nn.Module:
    """torch-rechub's DCNv2 or DeepFM, sizes as ours."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.ranking import DCNv2, DeepFM

    sparse = [SparseFeature(f.name, f.num_embeddings, embed_dim=dim) for f in spec.sparse]
    sparse += [SparseFeature("scenario", len(spec.scenarios), embed_dim=dim)]
    every = [*sparse, *(DenseFeature(f.name) for f in spec.dense)]
    if name == "DCNv2":
        return DCNv2(every, 2, {"dims": [128, 64]})
    return DeepFM(every, sparse, {"dims": [128, 64]})


def fit_rechub(name: str, pair: Pair, settings: Mapping[str, Any], seed: int) -> list[NDArray[np.float64]]:
    """After each epoch."""
    torch.manual_seed(seed)
    if name in ("DCNv2", "DeepFM"):
        model: nn.Module = OneATask(partial(ranker, name, pair.spec, pair.dim))
    else:
        model = rechub_model(name, pair.spec, pair.dim)
    sizes: dict[str, Any] = {"epochs": NUM_EPOCHS, "batch": pair.batch_size}
    return train_rechub(model, pair.train, pair.scored, **settings, **sizes)


FITS: dict[str, Fit] = {
    "logistic regression": fit_logistic,
    "LightGBM": fit_trees,
    **{f"torch-rechub, {name}": partial(fit_rechub, name) for name in RECHUB},
}


def kept(path: Path, make: Callable[[], list[NDArray[np.float64]]]) -> list[NDArray[np.float64]]:
    """What `make` gives, from the file where it was made before."""
    if not path.exists():
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".partial.npy")
        np.save(partial_file, np.stack(found))
        partial_file.replace(path)
    return list(np.load(path))


@dataclass(slots=True)
class World:
    """One lake; the rows of the peers are read when the first of them wants any."""

    name: str
    config: Path
    lake: Path
    work: Path
    columns: str
    pairs: dict[str, Pair]
    without: str = "^$"

    def data(self, stage: str) -> Data:
        return Data.of(
            self.config, self.lake, last_day(self.config) if stage == "chosen" else (), self.columns, self.without
        )

    def pair(self, stage: str) -> Pair:
        """The rows of 'chosen' (the choosing day) or 'judged' (the held-out days)."""
        if stage not in self.pairs:
            self.pairs[stage] = Pair.of(self.data(stage))
        return self.pairs[stage]

    def rows(self) -> Predictions:
        """Labels and keys of the held-out rows, as our first run has them."""
        return self.ours("ours, plain", [0]).rows

    def ours(self, name: str, seeds: Sequence[int]) -> Runs:
        data = self.data("judged")
        kinds = ("terms",) if name in WITH_TERMS else ()  # the others have the columns that the peers have
        data = replace(data, train=given(data.train, kinds), held_out=given(data.held_out, kinds))
        return train_seeds(data, (OURS | WITH_TERMS)[name], seeds, self.work / name)

    def peer(self, name: str, seeds: Sequence[int]) -> tuple[Runs, dict[str, Any]]:
        """The setting that the choosing day prefers, then all seeds on the held-out days."""
        fit, tried, pair = FITS[name], [], self.pair("chosen")
        labels_NT = pair.scored.labels.numpy()
        for settings in GRIDS[name]:
            file = self.work / name / f"chosen-{json.dumps(settings)}.npy"
            for length, probs_NT in enumerate(kept(file, partial(fit, pair, settings, seeds[0]))):
                areas = [auc(labels_NT[:, t], probs_NT[:, t]) for t in range(len(TASKS))]
                mean = round(float(np.mean(areas)), 5)  # type: ignore[arg-type]
                tried.append({**settings, "length": length, "auc": mean})
        best = max(tried, key=lambda entry: entry["auc"])
        settings = {key: best[key] for key in GRIDS[name][0]}
        pair, rows = self.pair("judged"), self.rows()
        assert (pair.scored.row_number.numpy() == rows.row_number_N).all(), "all score the same rows in one order"
        started = time.perf_counter()
        seeds = seeds[:1] if name == "logistic regression" else seeds
        probs = []
        for seed in seeds:
            file = self.work / name / f"judged-{json.dumps(settings)}-{seed}.npy"
            probs.append(kept(file, partial(fit, pair, settings, seed))[best["length"]])
        seconds = (time.perf_counter() - started) / len(seeds)
        return Runs(rows, np.stack(probs), seconds), {"best": best, "tried": tried}


def measure(world: World, models: Sequence[str], seeds: Sequence[int], output: Path) -> None:
    """Train what is missing, and write the result after each model; ours first, since the others are held to them."""
    scenarios, ours, termed = load_config(world.config).scenarios, {}, []
    if not world.data("judged").train.spec.lists:
        models = [name for name in models if name not in WITH_TERMS]
    for name in OURS | dict.fromkeys(sorted(models, key=MODELS.index)):
        details: dict[str, Any] = {}
        if name in OURS:
            runs = ours[name] = world.ours(name, seeds)
        elif name in WITH_TERMS:
            runs = world.ours(name, seeds)
            termed.append(runs)
        elif name in GRIDS:
            runs, details = world.peer(name, seeds)
        else:
            rows = world.rows()
            runs = Runs(rows, world.data("judged").popularity(rows).probs_NT[None])
        entry: dict[str, Any] = {"auc": mean_auc(runs, scenarios), "seeds": len(runs.probs_RNT), **details}
        entry |= {f"{one} over it": gaps(own, runs, scenarios) for one, own in ours.items() if one != name}
        if name in WITH_TERMS and len(termed) > 1:
            entry["over plain with terms"] = gaps(termed[1], termed[0], scenarios)
        print(name, entry["auc"], flush=True)
        worlds = json.loads(output.read_text())["worlds"] if output.exists() else {}
        before = worlds.get(world.name, {}).get("models", {})
        worlds[world.name] = {"rows": len(runs.rows), "models": before | {name: entry}}
        save(output, {"worlds": worlds})


def table(report: Mapping[str, Any]) -> str:
    """A line for each world and model: pooled AUC, and how far ours are ahead."""
    lines = []
    for world, entry in report["worlds"].items():
        for model, found in entry["models"].items():
            ahead = []
            for ours, task in itertools.product(OURS, TASKS):
                gap = found.get(f"{ours} over it", {}).get(task, {}).get("all")
                ahead.append(gap_text(gap["gap"], *gap["interval"]) if gap else "")
            areas = [f"{found['auc'][task]['all']:.4f}" for task in TASKS]
            lines.append([f"{world}: {model}", str(found["seeds"]), *areas, *ahead])
    head = ["held-out AUC, pooled", "seeds", "click", "order"]
    head += [f"{ours.removeprefix('ours, ')} over it, {task}" for ours in OURS for task in ("click", "order")]
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS, nargs="?", default="static")
    parser.add_argument("--lake", type=Path, help="default: runs/demo-CONFIG/lake")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--counters", nargs="?", choices=COUNTERS, const="counters", help="all models get these")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "anchors", help="trainings that are done")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    name = WORLDS[arguments.world]
    lake = arguments.lake or ROOT / "runs" / f"demo-{name}" / "lake"
    if not (lake / "samples").exists():
        print(f"skipped: no samples table in {lake}; docs/learning.md says how to make one", file=sys.stderr)
        return
    torch.set_num_threads(1)
    shown = arguments.world + (f", {arguments.counters}" if arguments.counters else "")
    columns = COUNTERS.get(arguments.counters, "^$")
    without = EARLIER if arguments.world in OWN_COUNTERS else "^$"
    world = World(shown, ROOT / "jobs" / "configs" / f"{name}.toml", lake, arguments.work / shown, columns, {}, without)
    measure(world, arguments.models, range(arguments.seeds), arguments.output)
    text = table(json.loads(arguments.output.read_text()))
    show(text, arguments.output, document="learning.md", place=RESULTS)


if __name__ == "__main__":
    main()
