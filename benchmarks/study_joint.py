"""The table of study `joint` in docs/study-results.md, from what jobs/study.py left in its folder.

    python benchmarks/study_joint.py --run-dir DIR

A row of the JSON is a backbone, a carry, a scenario and a task: mean AUC of one plain model a scenario, of the joint
plain and the joint USR model, in which scenarios weigh alike or by their rows (`model.scenario_weights`), and the three
gaps with their 95 % intervals over seeds and users (docs/studies.md, how differences are judged). Of each backbone with
at least two seeds; "every carry" and "carry 0.5 and 1" are means over worlds. A gap that holds after Holm's correction
over all gaps of the JSON is said to hold. Trials that are not finished take no part. The document shows the means, then
the clicks of each world, then the best models of each world.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from benchmarks.doc_tables import gap_text, judged_entry, judged_text, markdown, record
from usr_ray.evaluation.metrics import auc
from usr_ray.evaluation.statistics import CONFIDENCE, Judged, cell_rows, corrected, paired_auc_gap
from usr_ray.experiments.analysis import Trials
from usr_ray.experiments.grid import Trial, load_study
from usr_ray.schema import TASKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "study_joint.json"
SCENARIOS = ("search", "recommendation")
"""The larger one first."""
PAIRS = (("plain", "separate"), ("usr", "separate"), ("usr", "plain"))
SEPARATE = ("only_search", "only_recommendation")
WEIGHTS = {"equal": ("plain", "usr"), "rows": ("plain_rows", "usr_rows")}
"""model.scenario_weights -> the joint models trained with it."""
LEAST_SEEDS = 2
CARRIES, EVERY, CARRIED = ("0.0", "0.5", "1.0"), "every", "0.5 and 1"
"""Worlds; what the means over all, and over those in which needs show in both scenarios, are called."""


def measure(trials: Trials) -> list[dict[str, Any]]:
    """A dict for each carry, backbone, scenario and task; the gaps of all are one family for Holm."""
    rows = []
    for (carry, backbone), by_seed in sorted(_by_seed(trials).items(), key=lambda entry: entry[0][::-1]):
        for weights, joint in WEIGHTS.items():
            sets = [m for _, m in sorted(by_seed.items()) if m.keys() >= {*SEPARATE, *joint}]
            if len(sets) >= LEAST_SEEDS:
                point = (carry, backbone, weights)
                rows += [_row(trials, point, sets, s, task) for s in SCENARIOS for task in range(len(TASKS))]
    judged = corrected([row["gaps"][pair] for row in rows for pair in row["gaps"]])
    names = [(row, pair) for row in rows for pair in row["gaps"]]
    for (row, pair), one in zip(names, judged, strict=True):
        row["gaps"][pair] = _entry(one)
    return rows + _means_of(rows, EVERY, CARRIES) + _means_of(rows, CARRIED, CARRIES[1:])


def _by_seed(trials: Trials) -> dict[tuple[str, str], dict[int, dict[str, Trial]]]:
    """(carry, backbone) -> seed -> model -> its finished trial."""
    found: dict[tuple[str, str], dict[int, dict[str, Trial]]] = {}
    for trial in trials.finished:
        place = found.setdefault((trial.point["carry"], trial.point["backbone"]), {})
        place.setdefault(trial.seed, {})[trial.point["model"]] = trial
    return found


def best_models(trials: Trials, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The best backbone of each kind in each world, by mean AUC on these very rows; and USR's over the plain one's.

    Scenarios weigh alike. The choice by the rows that judge favours both; the seeds are those that both finished.
    """
    found, best = _by_seed(trials), []
    equal = [row for row in rows if row["weights"] == "equal" and row["carry"] in CARRIES]
    for carry, scenario, task in dict.fromkeys((r["carry"], r["scenario"], r["task"]) for r in equal):
        own = [row for row in equal if (row["carry"], row["scenario"], row["task"]) == (carry, scenario, task)]
        first = {kind: max(own, key=lambda row: row["auc"][kind]) for kind in own[0]["auc"]}
        of = {kind: found[carry, first[kind]["backbone"]] for kind in ("plain", "usr")}
        seeds = sorted(seed for seed in of["usr"] if "usr" in of["usr"][seed] and "plain" in of["plain"].get(seed, {}))
        (labels, theirs, users), (_, ours, _) = (
            _stacked(trials, [of[kind][seed][kind] for seed in seeds], scenario, TASKS.index(task))
            for kind in ("plain", "usr")
        )
        gap = paired_auc_gap(labels, ours, theirs, users)
        assert gap is not None
        best.append(
            {
                "carry": carry,
                "scenario": scenario,
                "task": task,
                "seeds": len(seeds),
                "backbone": {kind: row["backbone"] for kind, row in first.items()},
                "auc": {kind: row["auc"][kind] for kind, row in first.items()},
                "gap": {end: round(v, 5) for end, v in (("gap", gap.value), ("low", gap.low), ("high", gap.high))},
            }
        )
    return best


def _means_of(rows: Sequence[Mapping[str, Any]], name: str, carries: Sequence[str]) -> list[dict[str, Any]]:
    """The means over some worlds of a backbone that has them, as of independent worlds; no test, so none holds.

    Most users are in all three worlds: what they have in common would widen the intervals by 3 to 8 %.
    """
    means = []
    keys = ("backbone", "weights", "scenario", "task")
    for key in dict.fromkeys(tuple(r[k] for k in keys) for r in rows):
        own = [r for r in rows if tuple(r[k] for k in keys) == key and r["carry"] in carries]
        if len(own) < len(carries):
            continue
        gaps: dict[str, Any] = {}
        for pair in own[0]["gaps"]:
            of_worlds = [r["gaps"][pair] for r in own]
            of_users = np.array([g["user_se"] ** 2 for g in of_worlds])
            of_seeds = np.array([g["seed_sd"] ** 2 / r["seeds"] for r, g in zip(own, of_worlds, strict=True)])
            variance = float(of_users.sum() + of_seeds.sum())
            parts = of_users**2 / [g["num_users"] - 1 for g in of_worlds] + of_seeds**2 / [r["seeds"] - 1 for r in own]
            quantile = float(student.ppf((1 + CONFIDENCE) / 2, variance**2 / parts.sum()))  # Welch and Satterthwaite
            half = quantile * variance**0.5 / len(own)
            mean = float(np.mean([g["gap"] for g in of_worlds]))
            ends = {"gap": mean, "low": mean - half, "high": mean + half}
            gaps[pair] = {end: round(value, 5) for end, value in ends.items()} | {"holds": False}
        areas = {name: round(float(np.mean([r["auc"][name] for r in own])), 5) for name in own[0]["auc"]}
        named = {"carry": name, **dict(zip(keys, key, strict=True)), "seeds": sum(r["seeds"] for r in own)}
        means.append(named | {"auc": areas, "gaps": gaps})
    return means


def _row(
    trials: Trials, names: tuple[str, str, str], sets: Sequence[Mapping[str, Trial]], scenario: str, task: int
) -> dict[str, Any]:
    carry, backbone, weights = names
    models_of = dict(zip(("separate", "plain", "usr"), (f"only_{scenario}", *WEIGHTS[weights]), strict=True))
    probs = {}
    for name, model in models_of.items():  # the same rows of all: held-out, of this scenario, in their order
        labels, probs[name], users = _stacked(trials, [models[model] for models in sets], scenario, task)
    return {
        "carry": carry,
        "backbone": backbone,
        "weights": weights,
        "seeds": len(sets),
        "scenario": scenario,
        "task": TASKS[task],
        "auc": {name: round(_mean_auc(labels, model), 5) for name, model in probs.items()},
        "gaps": {f"{a} - {b}": Judged(gap=paired_auc_gap(labels, probs[a], probs[b], users)) for a, b in PAIRS},
    }


def _stacked(trials: Trials, of_seeds: Sequence[Trial], scenario: str, task: int) -> tuple[NDArray, NDArray, NDArray]:
    """Labels (N), probabilities (R, N) and users (N) of one cell, a trial a seed."""
    probs, labels, users = [], np.zeros(0), np.zeros(0)
    for trial in of_seeds:
        cell = cell_rows(trials.predictions(trial.trial_id), scenario, task, SCENARIOS)
        assert cell is not None
        labels, of_seed, users = cell
        probs.append(of_seed)
    return labels, np.stack(probs), users


def _mean_auc(labels_N: NDArray, probs_RN: NDArray) -> float:
    return float(np.mean([auc(labels_N, probs_N) or 0.0 for probs_N in probs_RN]))


def _entry(one: Judged) -> dict[str, Any]:
    gap = one.gap
    assert gap is not None
    spread = {"seed_sd": round(gap.seed_sd, 5), "user_se": round(gap.user_se, 5), "num_users": round(gap.num_users, 1)}
    return judged_entry(one) | spread


def _shown(row: Mapping[str, Any]) -> str:
    names = {EVERY: "every carry", CARRIED: f"carry {CARRIED}"}
    carry = names.get(row["carry"]) or f"carry {float(row['carry']):g}"
    return f"{row['backbone']}, {row['weights']}, {carry} ({row['seeds']})"


def table(report: Mapping[str, Any]) -> str:
    """Three tables: the means over the worlds, the clicks of each world, and the best models beside each other."""
    return "\n\n".join((_means(report["rows"]), _worlds(report["rows"]), _best(report["best"])))


def _means(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["carry"] == EVERY:
            areas = (f"{value:.4f}" for value in row["auc"].values())
            lines.append([f"{_shown(row)}: {_cell(row)}", *areas, *map(judged_text, row["gaps"].values())])
    head = ["means over the worlds (trainings)", "separate", "plain", "USR"]
    return markdown([*head, *(f"{a} - {b}" for a, b in PAIRS)], lines)


def _worlds(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [(scenario, pair) for scenario in SCENARIOS for pair in PAIRS[1:]]
    lines: dict[str, list[str]] = {}
    for row in rows:
        if row["carry"] != EVERY and row["task"] == TASKS[0]:
            gaps = [judged_text(row["gaps"][f"{a} - {b}"]) for a, b in PAIRS[1:]]
            lines.setdefault(_shown(row), []).extend(gaps)
    head = ["clicks in each world (seeds)", *(f"{scenario}: {a} - {b}" for scenario, (a, b) in cells)]
    return markdown(head, [[name, *gaps] for name, gaps in lines.items()])


def _best(best: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [f"carry {float(one['carry']):g}: {_cell(one)} ({one['seeds']})"]
        + [f"{one['auc'][kind]:.4f} ({one['backbone'][kind]})" for kind in ("separate", "plain", "usr")]
        + [gap_text(one["gap"]["gap"], one["gap"]["low"], one["gap"]["high"])]
        for one in best
    ]
    return markdown(["best of all backbones (seeds)", "separate", "plain", "USR", "usr - plain"], lines)


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['scenario']}, {'click' if row['task'] == TASKS[0] else 'order'}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The gaps of clicks with their intervals: a panel for each scenario and pair; blue above 0, thick for means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    clicks = [row for row in report["rows"] if row["task"] == TASKS[0] and row["carry"] != CARRIED]
    of_scenario = {scenario: [row for row in clicks if row["scenario"] == scenario] for scenario in SCENARIOS}
    figure, panels = plt.subplots(2, 2, figsize=(11, 0.42 * len(clicks)), sharey=True)
    for line, scenario in zip(panels, reversed(SCENARIOS), strict=True):
        rows = of_scenario[scenario]
        for panel, (a, b) in zip(line, PAIRS[1:], strict=True):
            for place, row in enumerate(rows):
                gap, is_mean = row["gaps"][f"{a} - {b}"], row["carry"] == EVERY
                color = "#1b6ec2" if gap["low"] > 0 else "#8a8a8a"
                panel.plot([gap["low"], gap["high"]], [-place] * 2, color=color, lw=2.5 if is_mean else 1.5)
                panel.plot(gap["gap"], -place, "o", color=color, ms=7 if is_mean else 5)
            panel.axvline(0, color="#444", lw=0.8, ls="--")
            size = "smaller" if scenario == "recommendation" else "larger"
            panel.set_title(f"{size} scenario: joint USR - {'separate models' if b == 'separate' else 'joint plain'}")
            panel.set_yticks(range(0, -len(rows), -1), [_shown(row) for row in rows], fontsize=8)
            panel.grid(axis="x", alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("gap of held-out AUC, 95 % interval over seeds and users")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    study = load_study("joint", scale="full", folder=ROOT / "jobs" / "studies")
    trials = Trials(arguments.run_dir, study)
    rows = measure(trials)
    report = {"rows": rows, "best": best_models(trials, rows)}
    record(report, table(report), arguments.output, document="study-results.md", place=RESULTS)
    if arguments.output == RESULTS:
        draw(report, ROOT / "docs" / "images" / "study_joint.png")


if __name__ == "__main__":
    main()
