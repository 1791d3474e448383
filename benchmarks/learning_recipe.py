"""What do averaged weights, the tables' learning rate and the towers add on the static world, plain and with USR?

    python benchmarks/learning_recipe.py [--config jobs/configs/simulated.toml] [--lake runs/demo-static/lake]
                                         [--seeds 3] [--models "plain, recipe" ...]

Trains each model with each seed on the demo's training days and reports held-out AUC (mean and every seed's), and the
paired gap of each over the model named in GAPS. `--validation` trains on all training days but the last and evaluates
on that one: the numbers that the recipe was chosen by. Results: results/learning_recipe.json, models added one by one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from learning_runs import Data, Runs, cells, gaps, known_auc, mean_auc, save, train_seeds

from jobs.demo import PLAIN
from usr_ray.schema import TASKS

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "jobs" / "configs" / "simulated.toml"
RESULTS = Path(__file__).parent / "results" / "learning_recipe.json"
VALIDATION = ("data.train_dates=2026-01-01:2026-01-05", "data.eval_dates=2026-01-06")

OF_NOVEMBER = ("data.final_labels=all", "model.interaction_histories=all")
"""The recipe as it first was, on rows whose orders are final too and with one history."""
BEFORE = (
    *OF_NOVEMBER,
    "train.average=0",
    "train.embedding_learning_rate=0.03",
    "train.num_epochs=2",
    "model.interaction_hidden=0",
)
"""The demo's configuration before the recipe; the configuration itself is the recipe."""
NO_CL = ("model.contrastive.interest_weight=0", "model.contrastive.feature_weight=0")
CROSSES = [
    ["age_band", "category_id"],
    ["age_band", "category_id", "scenario"],
    ["city", "category_id"],
    ["city", "category_id", "scenario"],
    ["age_band", "city", "category_id", "scenario"],
    ["user_id", "category_id"],
    ["user_id", "category_id", "scenario"],
    ["query", "category_id"],
]
"""Those of the logistic regression in docs/learning.md, as far as they name categories."""
WIDE = ("model.wide=true", "model.wide_l2=30", f"features.crosses={json.dumps(CROSSES)}")
MODELS: dict[str, tuple[str, ...]] = {
    "plain, before": (*PLAIN, *BEFORE),
    "plain, recipe without towers": (*PLAIN, "model.interaction_hidden=0"),
    "plain, recipe without averages": (*PLAIN, "train.average=0"),
    "plain, recipe": PLAIN,
    "plain, recipe of November": (*PLAIN, *OF_NOVEMBER),
    "plain, recipe and one history": (*PLAIN, OF_NOVEMBER[1]),
    "plain, recipe and first-order part": (*PLAIN, *WIDE),
    "USR, before": BEFORE,
    "USR, recipe without CL": NO_CL,
    "USR, recipe": (),
    "USR, all groups in CL": ("model.contrastive.every_nth_group=1",),
    "plain, without sides": (*PLAIN, "model.event_sides=false"),
    "USR, without sides": ("model.event_sides=false",),
    "USR, recipe and first-order part": WIDE,
}
GAPS = {
    "plain, recipe and first-order part": "plain, recipe",
    "USR, recipe and first-order part": "USR, recipe",
    "plain, recipe": "plain, before",
    "USR, recipe": "plain, recipe",
    "USR, all groups in CL": "USR, recipe",
    "USR, before": "plain, before",
}


def by_seed(runs: Runs) -> dict[str, list[float]]:
    """Task -> pooled AUC of each seed."""
    return {
        task: [round(known_auc(runs.rows.labels_NT[:, t], p[:, t]), 4) for p in runs.probs_RNT]
        for t, task in enumerate(TASKS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--lake", type=Path, default=ROOT / "runs" / "demo-static" / "lake")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--counters", default="^$", help="regular expression of the lake's counter columns that count")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = Data.of(
        arguments.config,
        arguments.lake,
        (*(VALIDATION if arguments.validation else ()), *arguments.set),
        arguments.counters,
    )
    scenarios, seeds, trained = data.config().scenarios, list(range(arguments.seeds)), {}
    for name in arguments.models:
        runs = trained[name] = train_seeds(data, MODELS[name], seeds)
        entry: dict[str, Any] = {"auc": mean_auc(runs, scenarios), "by_seed": by_seed(runs)}
        entry["seconds"] = round(runs.seconds, 1)
        if GAPS.get(name) in trained:
            entry["gap_over"] = {GAPS[name]: gaps(runs, trained[GAPS[name]], scenarios)}
        rows = {cell: int(own.sum()) for cell, own in cells(runs.rows, scenarios).items()}
        print(name, entry["by_seed"], flush=True)
        old = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        models = old.get("models", {}) | {name: entry}
        settings = {
            "seeds": len(seeds),
            "validation": arguments.validation,
            "set": arguments.set,
            "counters": arguments.counters,
        }
        save(arguments.output, {"settings": settings, "held_out_rows": rows, "models": models})


if __name__ == "__main__":
    main()
