"""Learning curves of the report: which numbers of history.jsonl share a plot, under which names and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from usr_ray.evaluation.metrics import GLOBAL
from usr_ray.reporting.page import TASK_NAMES
from usr_ray.reporting.plots import Line, line_plot


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One plot."""

    title: str
    caption: str
    keys: Mapping[str, str]
    """Name of a line -> key of a row of history.jsonl."""
    from_zero: bool = False
    percent: bool = False


def plans(scenarios: Sequence[str]) -> list[Plan]:
    """The plots in the order of the page. A line keeps its colour when others are absent."""
    views = [s.replace("_", " ") for s in scenarios]
    by_task = [
        Plan(
            title=f"Loss of {name}",
            caption="Mean binary cross-entropy a row, by scenario; global: of the global labels, before its weight.",
            keys={v: f"loss/{s}/{task}" for v, s in zip([*views, GLOBAL], [*scenarios, GLOBAL], strict=True)},
        )
        for task, name in TASK_NAMES.items()
    ]
    variances = {
        f"{letter} in {v}": f"variance/{part}/{s}"
        for letter, part in (("i", "interest"), ("f", "feature"))
        for v, s in zip(views, scenarios, strict=True)
    }
    held_out = [
        Plan(
            title=f"Held-out AUC of {name}",
            caption="After each epoch.",
            keys={v: f"{s}/{task}/auc" for v, s in zip(views, scenarios, strict=True)},
        )
        for task, name in TASK_NAMES.items()
    ]
    return [
        Plan(title="Loss", caption="The weighted sum that the optimisers see.", keys={"loss": "loss"}),
        *by_task,
        *held_out,
        Plan(
            title="Contrastive loss",
            caption="Of interests (i) and of features (f), before their weights.",
            keys={"i": "contrastive/interest", "f": "contrastive/feature"},
        ),
        Plan(
            title="Variance inside a view",
            caption="Near 0 the vectors of a view have collapsed into one.",
            keys=variances,
            from_zero=True,
        ),
        Plan(
            title="Gradient norm",
            caption="Largest of the dense gradients since the log step before, unclipped.",
            keys={"norm": "gradient_norm"},
            from_zero=True,
        ),
        Plan(
            title="Samples per second",
            caption="Rows that count, all workers together, over wall time.",
            keys={"rows/s": "samples_per_s"},
            from_zero=True,
        ),
        Plan(
            title="Data stall",
            caption="Share of the time that the loop waited for the reader.",
            keys={"stall": "data_stall"},
            from_zero=True,
            percent=True,
        ),
    ]


def curves_part(history: Sequence[Mapping[str, Any]], scenarios: Sequence[str]) -> dict[str, Any]:
    """What the template shows; a term that is zero throughout is switched off and left out."""
    curves = []
    for plan in plans(scenarios):
        lines = []
        for place, (name, key) in enumerate(plan.keys.items()):
            points = [(row["step"], row[key]) for row in history if isinstance(row.get(key), int | float)]
            is_off = key.startswith(("loss/", "contrastive/", "variance/")) and not any(y for _, y in points)
            if points and not is_off:
                lines.append(Line(name, place, [x for x, _ in points], [y for _, y in points]))
        if lines:
            svg = line_plot(lines, label=plan.title, from_zero=plan.from_zero, percent=plan.percent)
            curves.append({"title": plan.title, "caption": plan.caption, "svg": Markup(svg)})
    num_steps = sum(row.get("kind", "train") == "train" for row in history)
    note = f"From history.jsonl, {num_steps:,} log steps; a value is the mean since the log step before."
    return {"curves": curves, "curves_note": note}
