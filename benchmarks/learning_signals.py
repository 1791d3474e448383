"""What do terms and vectors add to the world with needs, each alone and both together?

    python benchmarks/learning_signals.py --lake LAKE [--seeds 3] [--models plain USR] [--validation]

LAKE is one of jobs/configs/needs.toml that was built with all of them (docs/learning.md says how); a model is given the
columns of one kind, of both, or of none, and else the same rows and settings. Held out are 7 and 8 January, with
--validation the last training day. Every training is kept in --work and is not done again; after each, the table of
docs/learning.md and results/learning_signals.json are written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from learning_recipe import VALIDATION
from learning_runs import Data, Runs, gaps, mean_auc, save, train_seeds

from benchmarks.doc_tables import markdown, show
from jobs.demo import PLAIN
from usr_ray.data.manifest import Manifest
from usr_ray.schema import TASKS, TERM

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "jobs" / "configs" / "needs.toml"
RESULTS = Path(__file__).parent / "results" / "learning_signals.json"
MODELS = {"plain": PLAIN, "USR": ()}
SIGNALS = {"none": (), "terms": ("terms",), "vectors": ("vectors",), "both": ("terms", "vectors")}
"""Name -> the kinds that a model is given."""


def given(manifest: Manifest, kinds: tuple[str, ...]) -> Manifest:
    """The same rows with the columns of these kinds alone, beside ids, categories and numbers."""
    lists = tuple(of for of in manifest.spec.lists if of.table == TERM and "terms" in kinds)
    vectors = manifest.spec.vectors if "vectors" in kinds else ()
    return replace(manifest, spec=replace(manifest.spec, lists=lists, vectors=vectors))


def table(report: Mapping[str, Any]) -> str:
    """A line for each model and signal: mean AUC by scenario, and the gap over none, all scenarios pooled."""
    scenarios = [cell for cell in next(iter(report["models"].values()))["auc"][TASKS[0]] if cell != "all"]
    lines = []
    for name, entry in report["models"].items():
        areas = [f"{entry['auc'][task][cell]:.4f}" for task in TASKS for cell in ("all", *scenarios)]
        over = [entry["over_none"][task]["all"] for task in TASKS] if "over_none" in entry else []
        gained = [f"{gap['gap']:+.4f} ({gap['interval'][0]:+.4f} to {gap['interval'][1]:+.4f})" for gap in over]
        lines.append([name, *areas, *(gained or ["", ""])])
    head = [f"{word}, {cell}" for word in ("click", "order") for cell in ("pooled", *scenarios)]
    return markdown(["model: given", *head, "click over none", "order over none"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "signals", help="trainings that are done")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = Data.of(CONFIG, arguments.lake, VALIDATION if arguments.validation else ())
    scenarios, models = data.config().scenarios, {}
    for model in arguments.models:
        trained: dict[str, Runs] = {}
        for signal, kinds in SIGNALS.items():
            own = replace(data, train=given(data.train, kinds), held_out=given(data.held_out, kinds))
            place = arguments.work / ("validation" if arguments.validation else "held-out") / f"{model}-{signal}"
            runs = trained[signal] = train_seeds(own, MODELS[model], range(arguments.seeds), place)
            entry: dict[str, Any] = {"auc": mean_auc(runs, scenarios), "seconds": round(runs.seconds, 1)}
            if signal != "none":
                entry["over_none"] = gaps(runs, trained["none"], scenarios)
            models[f"{model}: {signal}"] = entry
            print(f"{model}: {signal}", entry["auc"], flush=True)
            report = {"seeds": arguments.seeds, "validation": arguments.validation, "models": models}
            save(arguments.output, report)
    text = table(json.loads(arguments.output.read_text()))
    show(text, arguments.output, document="learning.md", place=RESULTS)


if __name__ == "__main__":
    main()
