"""The table of the studies of several worlds in docs/study-results.md, from what jobs/study.py left in their folders.

    python benchmarks/study_worlds.py --studies DIR

DIR/NAME is the folder of study NAME. A row is a world: held-out AUC of the plain model, mean over seeds, and the gap
usr - plain with its 95 % interval over seeds and users (docs/studies.md), all scenarios pooled and in each one. A gap
that holds after Holm's correction over all gaps of its study is said to hold. The document shows the pooled gaps and
the clicks of the scenarios with the most and the fewest held-out rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.doc_tables import judged_entry, judged_text, markdown, record
from usr_ray.evaluation.metrics import ALL, auc
from usr_ray.evaluation.statistics import Judged, cell_rows, corrected, paired_auc_gap
from usr_ray.experiments.analysis import Point, Trials
from usr_ray.experiments.grid import Trial, load_study
from usr_ray.schema import TASKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "study_worlds.json"
STUDIES = ("similarity", "label_quality", "scenarios", "scenarios_kuairand")
MODEL, PLAIN, USR = "model", "plain", "usr"
"""The axis that is compared, and its values."""


def rows_of(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A dict for each world in which a seed finished both models; the gaps of all are one family for Holm."""
    trials = Trials(folder, load_study(name, scale="full", folder=ROOT / "jobs" / "studies"))
    rows: list[dict[str, Any]] = []
    family: list[Judged] = []
    for world, pairs in _pairs(trials).items():
        row: dict[str, Any] = {"study": name, "world": " ".join(label for _, label in world), "seeds": len(pairs)}
        scenarios = trials.config(pairs[0][0]).scenarios
        row["rows"] = {s: _rows(trials, pairs[0][0], s) for s in scenarios}
        row["auc"], row["cells"] = {}, {}
        for cell in (ALL, *scenarios):
            for task in range(len(TASKS)):
                area, judged = _cell(trials, pairs, cell, task)
                row["auc"][f"{cell}/{TASKS[task]}"] = area
                row["cells"][f"{cell}/{TASKS[task]}"] = len(family)
                family.append(judged)
        rows.append(row)
    of_study = corrected(family)
    for row in rows:
        yield row | {"cells": {cell: _entry(of_study[place]) for cell, place in row["cells"].items()}}


def _pairs(trials: Trials) -> dict[Point, list[tuple[Trial, Trial]]]:
    """World -> the plain and the USR trial of each seed that finished both."""
    by_world: dict[Point, dict[str, dict[int, Trial]]] = {}
    for point, by_seed in trials.by_point.items():
        world = tuple((axis, label) for axis, label in point if axis != MODEL)
        by_world.setdefault(world, {})[dict(point)[MODEL]] = by_seed
    found = {}
    for world, models in by_world.items():
        plain, usr = models.get(PLAIN, {}), models.get(USR, {})
        if shared := [seed for seed in plain if seed in usr]:
            found[world] = [(plain[seed], usr[seed]) for seed in shared]
    return found


def _rows(trials: Trials, trial: Trial, scenario: str) -> int:
    predictions = trials.predictions(trial.trial_id)
    return int((predictions.scenario_N == list(trials.config(trial).scenarios).index(scenario)).sum())


def _cell(trials: Trials, pairs: list[tuple[Trial, Trial]], cell: str, task: int) -> tuple[float | None, Judged]:
    """Mean AUC of the plain models and the gap of USR over them; no AUC where the cell lacks one of the labels."""
    scenarios = trials.config(pairs[0][0]).scenarios
    sides = [
        [cell_rows(trials.predictions(t.trial_id), cell, task, scenarios) for t in side]
        for side in zip(*pairs, strict=True)
    ]
    (plain, usr) = ([of_seed for of_seed in side if of_seed is not None] for side in sides)
    labels, _, users = plain[0]
    areas = [auc(labels, probs) for _, probs, _ in plain]
    area = None if None in areas else round(float(np.mean([a for a in areas if a is not None])), 5)
    gap = paired_auc_gap(labels, np.stack([c[1] for c in usr]), np.stack([c[1] for c in plain]), users)
    return area, Judged(gap=gap)


def _entry(one: Judged) -> dict[str, Any] | None:
    """None where there are too few rows or users for a verdict."""
    return None if one.gap is None or one.verdict == "few" else judged_entry(one)


def table(report: Mapping[str, Any]) -> str:
    """A line for each world."""
    click, order = TASKS
    lines = []
    for row in report["rows"]:
        largest, smallest = (of(row["rows"], key=row["rows"].get) for of in (max, min))
        cells = (f"{ALL}/{click}", f"{ALL}/{order}", f"{largest}/{click}", f"{smallest}/{click}")
        areas = (f"{row['auc'][cell]:.4f}" for cell in cells[:2])
        gaps = (judged_text(row["cells"][cell]) for cell in cells)
        lines.append([f"{row['study']}: {row['world']} ({row['seeds']})", *areas, *gaps])
    head = ["world (seeds)", "plain, click", "plain, order", "click", "order", "largest scenario, click"]
    return markdown([*head, "smallest scenario, click"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = [name for name in STUDIES if (arguments.studies / name / "study.json").is_file()]
    report = {"rows": [row for name in found for row in rows_of(name, arguments.studies / name)]}
    record(report, table(report), arguments.output, document="study-results.md", place=RESULTS)


if __name__ == "__main__":
    main()
