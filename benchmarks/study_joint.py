"""The table of study `joint` in docs/study-results.md, from what jobs/study.py left in its folder.

    python benchmarks/study_joint.py --run-dir DIR

A row is a carry, a scenario and a task: mean AUC of one plain model a scenario, of the joint plain and the joint USR
model, and the three gaps with their 95 % intervals over seeds and users (docs/studies.md, how differences are judged).
Of each backbone with at least three seeds, and of all trainings together, each backbone's and seed's four models one of
the pairs. A gap that holds after Holm's correction over all gaps of the table is said to hold. Trials that are not
finished take no part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.doc_tables import markdown, record
from usr_ray.evaluation.metrics import auc
from usr_ray.evaluation.statistics import Judged, cell_rows, corrected, paired_auc_gap
from usr_ray.experiments.analysis import Trials
from usr_ray.experiments.grid import Trial, load_study
from usr_ray.schema import TASKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "study_joint.json"
SCENARIOS = ("search", "recommendation")
PAIRS = (("plain", "separate"), ("usr", "separate"), ("usr", "plain"))
EVERY = "all together"
LEAST_SEEDS = 3
"""Of a backbone with a row of its own."""


def measure(trials: Trials) -> list[dict[str, Any]]:
    """A dict for each carry, backbone (and EVERY), scenario and task; the gaps of all are one family for Holm."""
    found: dict[tuple[str, str], dict[int, dict[str, Trial]]] = {}
    for trial in trials.finished:
        place = found.setdefault((trial.point["carry"], trial.point["backbone"]), {})
        place.setdefault(trial.seed, {})[trial.point["model"]] = trial
    rows = []
    for carry in sorted({carry for carry, _ in found}):
        whole = {
            backbone: sets
            for (own, backbone), by_seed in found.items()
            if own == carry and (sets := [by_seed[seed] for seed in sorted(by_seed) if len(by_seed[seed]) == 4])
        }
        several = {name: sets for name, sets in whole.items() if len(sets) >= LEAST_SEEDS}
        together = {EVERY: [one for sets in whole.values() for one in sets]} if len(whole) > 1 else {}
        for backbone, sets in {**several, **together}.items():
            rows += [_row(trials, carry, backbone, sets, s, task) for s in SCENARIOS for task in range(len(TASKS))]
    judged = corrected([row["gaps"][pair] for row in rows for pair in row["gaps"]])
    names = [(row, pair) for row in rows for pair in row["gaps"]]
    for (row, pair), one in zip(names, judged, strict=True):
        row["gaps"][pair] = _entry(one)
    return rows


def _row(
    trials: Trials, carry: str, backbone: str, sets: Sequence[Mapping[str, Trial]], scenario: str, task: int
) -> dict[str, Any]:
    probs, labels, users = {}, np.zeros(0), np.zeros(0)
    for name in ("separate", "plain", "usr"):
        of_seeds = []
        for models in sets:
            rows = trials.predictions(models[f"only_{scenario}" if name == "separate" else name].trial_id)
            cell = cell_rows(rows, scenario, task, SCENARIOS)
            assert cell is not None
            labels, of_seed, users = cell  # the same rows of all: held-out, of this scenario, in their order
            of_seeds.append(of_seed)
        probs[name] = np.stack(of_seeds)
    return {
        "carry": carry,
        "backbone": backbone,
        "seeds": len(sets),
        "scenario": scenario,
        "task": TASKS[task],
        "auc": {name: round(float(np.mean([auc(labels, p) for p in model])), 5) for name, model in probs.items()},  # type: ignore[arg-type]
        "gaps": {f"{a} - {b}": Judged(gap=paired_auc_gap(labels, probs[a], probs[b], users)) for a, b in PAIRS},
    }


def _entry(one: Judged) -> dict[str, Any]:
    gap = one.gap
    assert gap is not None
    numbers = {"gap": gap.value, "low": gap.low, "high": gap.high, "seed_sd": gap.seed_sd, "user_se": gap.user_se}
    return {name: round(value, 5) for name, value in numbers.items()} | {"holds": one.verdict in ("better", "worse")}


def table(report: Mapping[str, Any]) -> str:
    """A line for each row of `measure`."""
    lines = []
    for row in report["rows"]:
        shown = [
            f"{g['gap']:+.4f} ({g['low']:+.4f} to {g['high']:+.4f}){'' if not g['holds'] else ', holds'}"
            for g in row["gaps"].values()
        ]
        cell = f"{row['scenario']}, {'click' if row['task'] == TASKS[0] else 'order'}"
        name = f"carry {row['carry']}, {row['backbone']} ({row['seeds']}): {cell}"
        lines.append([name, *(f"{value:.4f}" for value in row["auc"].values()), *shown])
    return markdown(["held-out AUC (trainings)", "separate", "plain", "USR", *(f"{a} - {b}" for a, b in PAIRS)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    study = load_study("joint", scale="full", folder=ROOT / "jobs" / "studies")
    report = {"rows": measure(Trials(arguments.run_dir, study))}
    record(report, table(report), arguments.output, document="study-results.md", place=RESULTS)


if __name__ == "__main__":
    main()
