"""The table of the studies of one table in docs/study-results.md, from what jobs/study.py left in their folders.

    python benchmarks/study_parts.py --studies DIR

DIR/NAME is the folder of study NAME. A row is a comparison of one of them: the AUC gap on the held-out rows in each
scenario and task, with its 95 % interval over seeds and users (docs/studies.md), and the variance inside a view of i
and of f, mean over seeds and views. A gap that holds after Holm's correction over its study's gaps is said to hold.
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
from usr_ray.experiments.analysis import WHOLE, Contrast, Point, Trials, contrasts
from usr_ray.experiments.grid import load_study
from usr_ray.reporting.study_vectors import collapse
from usr_ray.schema import TASKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "study_parts.json"
STUDIES = ("ablation", "contrastive", "temperature", "dimension", "glmt_only", "cold_start")
CELLS = tuple((scenario, task) for scenario in ("search", "recommendation") for task in TASKS)


def rows_of(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A dict for each comparison whose trials are there."""
    trials = Trials(folder, load_study(name, scale="full", folder=ROOT / "jobs" / "studies"))
    spreads = collapse(trials)
    groups: dict[tuple[str, Point, str, str], dict[tuple[str, str], Contrast]] = {}
    for one in contrasts(trials):
        if one.gap is not None and one.verdict != "few":
            groups.setdefault((one.label, one.at, one.against, one.part), {})[one.scenario, one.task] = one
    for (label, at, against, part), cells in groups.items():
        first = next(iter(cells.values()))
        point = next(p for p in trials.by_point if set(p) == {*at, (first.axis, label)})
        spread = spreads.get(point, {})
        views = {kind: [v for name, v in spread.items() if name.startswith(f"{kind}, ")] for kind in "if"}
        assert first.gap is not None
        yield {
            "study": name,
            "gap_of": ", ".join((f"{label} - {against}", *(of for _, of in at), *([] if part == WHOLE else [part]))),
            "seeds": len(first.gap.by_seed),
            "cells": {"/".join(cell): judged_entry(one) for cell, one in cells.items()},
            "variance": {kind: round(float(np.mean(found)), 3) for kind, found in views.items() if found},
        }


def table(report: Mapping[str, Any]) -> str:
    """A line for each comparison."""
    lines = []
    for row in report["rows"]:
        shown = (judged_text(row["cells"].get("/".join(cell))) for cell in CELLS)
        spread = [f"{row['variance'][kind]:.2f}" if kind in row["variance"] else "" for kind in "if"]
        lines.append([f"{row['study']}: {row['gap_of']} ({row['seeds']})", *shown, *spread])
    tasks = [f"{scenario}, {'click' if task == TASKS[0] else 'order'}" for scenario, task in CELLS]
    return markdown(["gap of (seeds)", *tasks, "variance, i", "variance, f"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = [name for name in STUDIES if (arguments.studies / name).is_dir()]
    report = {"rows": [row for name in found for row in rows_of(name, arguments.studies / name)]}
    record(report, table(report), arguments.output, document="study-results.md", place=RESULTS)


if __name__ == "__main__":
    main()
