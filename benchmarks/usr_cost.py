"""What does USR cost beside its plain backbone, part by part, and where does the time of its step go?

    python benchmarks/usr_cost.py [--cases demo large] [--backbones shared_bottom mmoe] [--steps 15] [--threads 1]
                                  [--device cuda] [--compile] [--append]

Whole training steps (lookup, forward, loss, backward, both optimisers) on the same drawn batches, the models in turn
on each batch; ratios by processor time on a CPU, since neighbours shake the clock, and by the clock on a GPU. `plain`
is the backbone on the mean of the histories. Writes benchmarks/results/usr_cost.json and the tables in docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.doc_tables import markdown
from benchmarks.interleaved import header, interval, publish, ratio, settings_of, spread, verdict
from benchmarks.step_cases import CASES, PLAIN, Step
from usr_ray.launch.environment import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "usr_cost.json"
AIMS = {("demo", "mmoe"): 2.0, ("large", "shared_bottom"): 2.4}
AIM = 2.5
"""Of all others."""
_OFF = {"enabled": False}
_NO_CL = {"interest_weight": 0, "feature_weight": 0}
PARTS: Mapping[str, Mapping[str, Any]] = {
    "plain": PLAIN,
    "GLMT alone": {"interest": _OFF, "generator": _OFF},
    "FG alone": {"interest": _OFF, "multitask": _OFF, "contrastive": _NO_CL},
    "IE alone": {"generator": _OFF, "multitask": _OFF, "contrastive": _NO_CL},
    "IE, FG, GLMT": {"contrastive": _NO_CL},
    "all, without CL(f)": {"contrastive": {"feature_weight": 0}},
    "USR, all groups in CL": {"contrastive": {"every_nth_group": 1}},
    "USR, every second group": {"contrastive": {"every_nth_group": 2}},
    "USR, every eighth group": {"contrastive": {"every_nth_group": 8}},
    "USR": {},
}
"""Models from the plain backbone to all of USR; GLMT and CL want both views of every row, the parts alone only one."""
_NUM_OPERATORS = 12


def measure(case_name: str, backbone: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of all models of one case, in turn on the same batches; the profile of the last."""
    case = CASES[case_name]
    parts = PARTS if backbone == arguments.backbones[0] else {n: PARTS[n] for n in ("plain", "USR")}
    train = {"compile": arguments.compile}
    steps = {
        name: Step(case.spec, {**case.model, **part, "backbone": backbone}, train=train, device=arguments.device)
        for name, part in parts.items()
    }
    clock: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.warm + arguments.steps):
        batch = case.draw(number)
        for name, step in steps.items():
            clock_s, cpu_s = step.timed(batch)
            if number >= arguments.warm:
                clock[name].append(clock_s * 1e3)
                cpu[name].append(cpu_s * 1e3)
    by = clock if arguments.device == "cuda" else cpu
    return {
        "case": case_name,
        "backbone": backbone,
        "batch_rows": case.batch_rows,
        "parts": {
            name: {"clock_ms": interval(clock[name]), "cpu_ms": interval(cpu[name]), "ratio": ratio(times, by["plain"])}
            for name, times in by.items()
        },
        "operators": operators(steps["USR"], case.draw(0)),
    }


def operators(step: Step, batch: Any, *, repeats: int = 15) -> list[dict[str, Any]]:
    """The operators that take most of a step's time by torch's profiler, their share, calls a step and sizes.

    A call counts with the low fifth of the times of its like (name and shapes): the profiler's own memory makes the
    large tensors of some calls come from pages new to the process, which a run without a profiler does not see.
    """
    kinds = [ProfilerActivity.CPU]
    on_gpu = step.worker.device.type == "cuda"
    if on_gpu:
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds, record_shapes=True) as profiled:
        for _ in range(repeats):
            step.timed(batch)
    alike: dict[tuple[str, str], list[float]] = {}
    for e in profiled.events():
        time_us = e.self_device_time_total if on_gpu else e.self_cpu_time_total
        alike.setdefault((e.name, str(e.input_shapes)), []).append(time_us)
    times: dict[str, tuple[float, int]] = {}
    for (name, _), found in alike.items():
        total, calls = times.get(name, (0.0, 0))
        times[name] = total + sorted(found)[len(found) // 5] * len(found), calls + len(found)
    return shares([(name, total, calls) for name, (total, calls) in times.items()], repeats)


def shares(times: Sequence[tuple[str, float, int]], repeats: int) -> list[dict[str, Any]]:
    """The operators of most time, then all others together, of (name, time, calls) over `repeats` steps."""
    ordered = sorted(times, key=lambda entry: -entry[1])
    total = sum(time for _, time, _ in times)
    others = ordered[_NUM_OPERATORS:]
    rest = [("all others", sum(time for _, time, _ in others), sum(calls for *_, calls in others))]
    return [
        {"operator": name.removeprefix("aten::"), "share": round(time / total, 4), "calls_a_step": calls / repeats}
        for name, time, calls in ordered[:_NUM_OPERATORS] + rest
    ]


def table(report: Mapping[str, Any]) -> str:
    """Cost of each part in each case, then where USR's step goes."""
    unit = "clock_ms" if report["settings"]["device"] == "cuda" else "cpu_ms"
    rows = []
    for entry in report["results"]:
        for name, part in entry["parts"].items():
            at_most = AIMS.get((entry["case"], entry["backbone"]), AIM)
            aim = verdict(part["ratio"]["median"], at_most=at_most) if name == "USR" else ""
            title = f"{entry['case']}, {entry['backbone']}: {name}"
            rows.append([title, spread(part[unit], 1), spread(part["ratio"]) + "x", aim])
    cost = markdown(["training step", "ms of one thread", "times plain", "aim"], rows)
    firsts = {entry["case"]: entry for entry in report["results"][::-1]}
    blocks = [cost]
    for case, entry in firsts.items():
        lines = [[o["operator"], f"{o['share']:.1%}", f"{o['calls_a_step']:.0f}"] for o in entry["operators"]]
        blocks.append(markdown([f"operator ({case}, {entry['backbone']}, USR)", "share of the step", "calls"], lines))
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--backbones", nargs="+", default=["shared_bottom", "mmoe"])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the dense part of all models")
    parser.add_argument("--append", action="store_true", help="what was recorded of other cases stays")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as a training does
    results = []
    for case in arguments.cases:
        for backbone in arguments.backbones:
            results.append(measure(case, backbone, arguments))
            usr = results[-1]["parts"]["USR"]["ratio"]
            print(f"{case}, {backbone}: USR {spread(usr)}x plain", flush=True)
    if arguments.append and arguments.output.exists():
        new = {(entry["case"], entry["backbone"]) for entry in results}
        old = json.loads(arguments.output.read_text())["results"]
        results = [entry for entry in old if (entry["case"], entry["backbone"]) not in new] + results
    report = header("time of a training step of USR beside its plain backbone", settings_of(arguments))
    publish(report, results, table, output=arguments.output, place=RESULTS)


if __name__ == "__main__":
    main()
