"""Where the truth is known: plain backbones and "+USR" beside the oracle, on worlds at the ends of the dials.

    python benchmarks/learning_simulated.py [--work DIR] [--seeds 5] [--worlds default similarity-0 ...]

Builds each world with the two ETL jobs (needs a JDK; one to three minutes a world; kept in DIR for the next call),
trains every model with every seed and reports AUC, the gap to the oracle (the probabilities the labels were drawn
from) and the gap of +USR over its plain backbone with paired intervals. Results: results/learning_simulated.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from deltalake import DeltaTable
from learning_runs import Data, Runs, gaps, mean_auc, save, show_gap, train_seeds

from jobs.demo import PLAIN
from usr_ray.config import BACKBONES, load_config
from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.mature import WhichRows
from usr_ray.evaluation.metrics import Predictions
from usr_ray.schema import TASKS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "learning_simulated.json"
CONFIG = ROOT / "jobs" / "configs" / "simulated.toml"
SIZE = ("simulated.num_impressions=100000",)
WORLDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "similarity-0": ("simulated.similarity=0.0",),
    "similarity-1": ("simulated.similarity=1.0",),
    "no-crossing": ("simulated.cross_exposure=0.0",),
    "noisy-global": ("simulated.global_noise=1.0",),
}
"""The default dials, and one dial at an end in each of the others."""


def build(work: Path, world: str) -> Path:
    """Lake of the world; made by the ETL jobs unless it is there already."""
    folder, ready = work / world, work / world / "ready"
    lake = folder / "lake"
    if ready.exists():
        return lake
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sets = [word for override in (*SIZE, *WORLDS[world]) for word in ("--set", override)]
    config = load_config(CONFIG)
    first, last = config.data.train_dates.split(":")[0], config.data.eval_dates.split(":")[-1]
    common = ["--config", str(CONFIG), "--logs", str(folder / "logs"), *sets]
    submit = shutil.which("spark-submit", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if submit is None:
        raise SystemExit("learning_simulated: no spark-submit beside this Python; run `make setup` first")
    environment = os.environ | {"SPARK_LOCAL_IP": "127.0.0.1"}
    environment.setdefault("SPARK_CONF_DIR", str(ROOT / "cluster" / "spark" / "conf"))
    for job in (
        ["jobs/ingest_logs.py", "--source", "simulated", *common],
        ["jobs/build_samples.py", "--lake", str(lake), "--dates", f"{first}:{last}", *common],
    ):
        subprocess.run([submit, *job], cwd=ROOT, check=True, env=environment)
    ready.touch()
    return lake


def oracle(data: Data, rows: Predictions, logs: Path) -> Runs:
    """The true P(click) and P(order) of the held-out rows. No model can reach it: it knows what no log holds."""
    truth = pq.read_table(logs / "truth").to_pandas().set_index("impression_id")
    probs_NT = truth.loc[_impression_ids(data, rows), ["p_click", "p_order"]].to_numpy()
    return Runs(rows, probs_NT[None])


def _impression_ids(data: Data, rows: Predictions) -> np.ndarray:
    """impression_id of each row: `row_number` counts the rows of the manifest's files in order."""
    decoder = RowGroupDecoder(data.held_out, WhichRows())
    decoder.columns = ["impression_id"]
    parts = [decoder.read(ref)["impression_id"].to_numpy(zero_copy_only=False) for ref in data.held_out.row_groups()]
    return np.concatenate(parts)[rows.row_number_N]


def shares(lake: Path) -> dict[str, float]:
    """P(is_click | is_click_global) by scenario over the whole table: at 1, GLMT has nothing to give."""
    table = (
        DeltaTable(lake / "samples").to_pyarrow_table(columns=["scenario", "is_click", "is_click_global"]).to_pandas()
    )
    table = table[table["is_click_global"] > 0]
    return {name: round(float(rows["is_click"].mean()), 4) for name, rows in table.groupby("scenario")}


def measure_world(world: str, backbones: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    lake = build(arguments.work, world)
    data = Data.of(CONFIG, lake, (*SIZE, *WORLDS[world], *arguments.set))
    scenarios, seeds = data.config().scenarios, list(range(arguments.seeds))
    models: dict[str, Runs] = {}
    for backbone in backbones:
        for name, switches in ((backbone, PLAIN), (f"{backbone} + USR", ())):
            models[name] = train_seeds(data, [f"model.backbone={backbone}", *switches], seeds)
            auc = mean_auc(models[name], scenarios)
            print(
                f"{world:14s} {name:24s} {models[name].seconds:4.0f} s  "
                + "  ".join(f"{task} {auc[task]['all']:.4f}" for task in TASKS),
                flush=True,
            )
    rows = next(iter(models.values())).rows
    models["popularity"] = Runs(rows, data.popularity(rows).probs_NT[None])
    truth = oracle(data, rows, arguments.work / world / "logs")
    best = mean_auc(truth, scenarios)
    result: dict[str, Any] = {"oracle": {"auc": best}}
    for name, runs in models.items():
        found = mean_auc(runs, scenarios)
        below = {t: {c: round(best[t][c] - found[t][c], 5) for c in best[t]} for t in TASKS}
        result[name] = {"auc": found, "below_oracle": below, "seconds": round(runs.seconds, 1)}
        if name.endswith("+ USR"):
            result[name]["over_plain"] = gaps(runs, models[name.removesuffix(" + USR")], scenarios)
        if name != "popularity":
            result[name]["over_popularity"] = gaps(runs, models["popularity"], scenarios)
    return {"click_given_global_click": shares(lake), "held_out_rows": len(rows), "models": result}


def show(worlds: dict[str, Any]) -> str:
    """Markdown: a row for each world and model, pooled AUC; then USR over plain by cell."""
    lines = ["| world | model | ctr | below oracle | ctcvr | below oracle |", "|---|---|---|---|---|---|"]
    for world, result in worlds.items():
        for name, entry in result["models"].items():
            texts = [
                f"{entry['auc'][t]['all']:.4f} | "
                + (f"{entry['below_oracle'][t]['all']:.4f}" if "below_oracle" in entry else "")
                for t in TASKS
            ]
            lines.append(f"| {world} | {name} | " + " | ".join(texts) + " |")
    first = next(iter(worlds.values()))["models"]["oracle"]["auc"]["ctr"]
    columns = [(task, cell) for task in TASKS for cell in first]
    lines += ["", "| world | USR over plain | " + " | ".join(f"{t} {c}" for t, c in columns) + " |"]
    lines += ["|---" * (len(columns) + 2) + "|"]
    for world, result in worlds.items():
        for name, entry in result["models"].items():
            if "over_plain" in entry:
                texts = [show_gap(entry["over_plain"][t][c]) for t, c in columns]
                lines.append(f"| {world} | {name.removesuffix(' + USR')} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "learning-simulated")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["shared_bottom"])
    parser.add_argument(
        "--default-backbones",
        nargs="+",
        choices=BACKBONES,
        default=["shared_bottom", "mmoe", "star"],
        help="trained on the default world besides",
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    worlds: dict[str, Any] = {}
    for world in arguments.worlds:
        extra = arguments.default_backbones if world == "default" else []
        worlds[world] = measure_world(world, list(dict.fromkeys([*arguments.backbones, *extra])), arguments)
        save(
            arguments.output,
            {
                "settings": {
                    "seeds": arguments.seeds,
                    "size": SIZE,
                    "set": arguments.set,
                    "dials": {w: WORLDS[w] for w in worlds},
                },
                "worlds": worlds,
            },
        )
    print(show(worlds))


if __name__ == "__main__":
    main()
