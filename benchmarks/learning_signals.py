"""What does each kind of signal add, alone and with all others, on the demo's worlds and on real rows?

    python benchmarks/learning_signals.py WORLD --lake LAKE [--buckets LAKE] [--seeds 3] [--models plain USR]
        [--signals ...] [--validation]

WORLD is `static`, `needs`, `kuairand`, or that without the counts that its source makes itself: `kuairand, own
counters`, and `kuairand, all earlier` from a lake with `kuairand.all_earlier_impressions`. LAKE was built with every
kind that there is, and --buckets names one whose numbers are in buckets besides (docs/learning.md says how). A model is
given the columns of the kinds that a line names, beside ids, categories and numbers, and else the same rows and
settings. Held out are the days of the configuration, with --validation the last training day. Every training is kept in
--work and is not done again; after each, --output is written. `--report` makes the tables of docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from learning_recipe import WIDE
from learning_runs import Data, Runs, gaps, last_day, mean_auc, save, train_seeds

from benchmarks.doc_tables import gap_text, markdown, put_table
from jobs.demo import PLAIN
from usr_ray.data.manifest import Manifest
from usr_ray.schema import TASKS, TERM

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "learning_signals.json"
MODELS = {"plain": PLAIN, "USR": ()}
NOTHING, WITHOUT_SIDES = "none", ("model.event_sides=false",)
_ALL_DAYS, _LOG_ODDS = "counters of all days", "log odds of counters"
COUNTERS = {"counters": ".", _ALL_DAYS: "_all_", _LOG_ODDS: r"_all_(ctr|cvr)$"}
"""Kind -> columns of the counters, as a regular expression."""
EARLIER = "_earlier_"
"""Numbers that KuaiRand's source counts itself (etl/sources/kuairand.py)."""
VIDEO_CROSSES = [["tag", "tab"], ["author_id", "tab"], ["user_id", "tab"], ["user_active_degree", "tag"]]


@dataclass(frozen=True, slots=True)
class World:
    """A configuration and what its models may be given."""

    config: str
    signals: Mapping[str, tuple[str, ...]]
    """Name of a line -> the kinds that its models are given. The first line is what the others are compared with."""
    crosses: tuple[str, ...] = ()
    without: str = "^$"
    """Numbers that no model is given: a regular expression."""


def alone_and_together(*kinds: str, counters: str) -> dict[str, tuple[str, ...]]:
    """Nothing, each kind, `sides` with those of counters that the last training day prefers, and all of one lake."""
    every = tuple(kind for kind in kinds if kind not in COUNTERS.keys() - {counters} and kind != "buckets")
    together = {f"sides, {counters}": ("sides", counters), "all": every}
    return {NOTHING: (), **{kind: (kind,) for kind in kinds}, **together}


VIDEO_KINDS = ("sides", "tags", *COUNTERS, "crosses")
_VIDEO_WIDE = ("model.wide=true", "model.wide_l2=30", f"features.crosses={json.dumps(VIDEO_CROSSES)}")
WORLDS = {
    "static": World(
        "simulated",
        alone_and_together("sides", "tags", "buckets", "vectors", *COUNTERS, "crosses", counters=_LOG_ODDS),
        WIDE,
    ),
    "needs": World(
        "needs",
        {
            "sides": ("sides",),
            "sides, terms": ("sides", "terms"),
            "sides, vectors": ("sides", "vectors"),
            "sides, terms, vectors": ("sides", "terms", "vectors"),
            f"sides, terms, {_LOG_ODDS}": ("sides", "terms", _LOG_ODDS),
        },
    ),
    "kuairand": World("kuairand", alone_and_together(*VIDEO_KINDS, "buckets", counters=_LOG_ODDS), _VIDEO_WIDE),
    "kuairand, own counters": World(
        "kuairand", alone_and_together(*VIDEO_KINDS, counters=_LOG_ODDS), _VIDEO_WIDE, EARLIER
    ),
    "kuairand, all earlier": World(
        "kuairand", alone_and_together(*VIDEO_KINDS, counters=_ALL_DAYS), _VIDEO_WIDE, EARLIER
    ),
}


def given(manifest: Manifest, kinds: tuple[str, ...]) -> Manifest:
    """The same rows with the lists and vectors of these kinds alone."""
    wanted = {TERM: "terms"}
    lists = tuple(of for of in manifest.spec.lists if wanted.get(of.table, "tags") in kinds)
    vectors = manifest.spec.vectors if "vectors" in kinds else ()
    return replace(manifest, spec=replace(manifest.spec, lists=lists, vectors=vectors))


def data_of(world: World, kinds: tuple[str, ...], lakes: tuple[Path, Path | None], *, validation: bool) -> Data:
    """The rows of a world with the columns of these kinds."""
    config = ROOT / "jobs" / "configs" / f"{world.config}.toml"
    lake = lakes[1] if "buckets" in kinds else lakes[0]
    if lake is None:
        raise SystemExit("learning_signals.py: numbers in buckets have a lake of their own; name it with --buckets")
    (counters,) = [COUNTERS[kind] for kind in kinds if kind in COUNTERS] or ["^$"]
    data = Data.of(config, lake, last_day(config) if validation else (), counters, world.without)
    return replace(data, train=given(data.train, kinds), held_out=given(data.held_out, kinds))


def table(report: Mapping[str, Any]) -> str:
    """A line for each model and signal: mean pooled AUC, and the gap over the line without signals."""
    lines = []
    for name, entry in report["models"].items():
        areas = [f"{entry['auc'][task]['all']:.4f}" for task in TASKS]
        over = [entry["over_none"][task]["all"] for task in TASKS] if "over_none" in entry else []
        gained = [gap_text(gap["gap"], *gap["interval"]) for gap in over]
        lines.append([name, str(entry["seeds"]), *areas, *(gained or ["", ""])])
    return markdown(["model: given", "seeds", "click", "order", "click over the first", "order over the first"], lines)


def report() -> None:
    """Put the tables of the recorded worlds into their places in docs/learning.md."""
    for name, world in json.loads(RESULTS.read_text(encoding="utf-8"))["worlds"].items():
        put_table("learning.md", "learning_signals: " + name, table(world))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS, nargs="?")
    parser.add_argument("--lake", type=Path)
    parser.add_argument("--buckets", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["plain"])
    parser.add_argument("--signals", nargs="+", help="lines of the table; default: all of the world's")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "signals", help="trainings that are done")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only make the tables of what is recorded")
    arguments = parser.parse_args()
    if arguments.report:
        report()
        return
    if not (arguments.world and arguments.lake):
        parser.error("name a world and its --lake, or --report")
    torch.set_num_threads(1)
    world = WORLDS[arguments.world]
    first, *_ = world.signals
    shown = arguments.world + (", validation" if arguments.validation else "")
    for model in arguments.models:
        trained: dict[str, Runs] = {}
        for signal in dict.fromkeys([first, *(arguments.signals or world.signals)]):
            kinds = world.signals[signal]
            data = data_of(world, kinds, (arguments.lake, arguments.buckets), validation=arguments.validation)
            settings = (*MODELS[model], *(() if "sides" in kinds else WITHOUT_SIDES))
            settings = (*settings, *(world.crosses if "crosses" in kinds else ()))
            place = arguments.work / shown / f"{model}-{signal}"
            runs = trained[signal] = train_seeds(data, settings, range(arguments.seeds), place)
            entry: dict[str, Any] = {"auc": mean_auc(runs, data.config().scenarios), "kinds": list(kinds)}
            entry |= {"seconds": round(runs.seconds, 1), "seeds": len(runs.probs_RNT)}
            if signal != first:
                entry["over_none"] = gaps(runs, trained[first], data.config().scenarios)
            worlds = json.loads(arguments.output.read_text())["worlds"] if arguments.output.exists() else {}
            before = worlds.get(shown, {}).get("models", {})
            worlds[shown] = {"models": before | {f"{model}: {signal}": entry}}
            save(arguments.output, {"worlds": worlds})
            print(table(worlds[shown]), flush=True)


if __name__ == "__main__":
    main()
