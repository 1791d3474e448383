"""Several scorers of the same rows beside one another: AUC of each, and how far one is ahead of each other one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from usr_ray.evaluation.files import aligned
from usr_ray.evaluation.metrics import ALL, Predictions, auc
from usr_ray.evaluation.statistics import Judged, cell_rows, corrected, paired_auc_gap
from usr_ray.schema import TASKS


def on_common_rows(scored: Mapping[str, Predictions]) -> dict[str, Predictions]:
    """The rows that every scorer has, in the order of the manifest: runs may know a scenario alone, or immature rows.

    Args:
        scored: name -> rows of one manifest, sorted by row_number.
    """
    common_M = functools.reduce(np.intersect1d, [rows.row_number_N for rows in scored.values()])
    return {name: rows.take(np.searchsorted(rows.row_number_N, common_M)) for name, rows in scored.items()}


def compare(scored: Mapping[str, Predictions], ours: str, scenarios: Sequence[str]) -> dict[str, Any]:
    """A comparison as an evaluation's file holds it.

    Args:
        scored: name -> the same rows in one order; `ours` among them.
        ours: whose lead over each of the others is judged.
        scenarios: in the order of the table.

    Returns:
        {"ours": name, "cells": [{"cell", "task", "auc": {name: AUC or null}, "leads": {other: {"value", "low", "high",
        "verdict"}}}]}, a lead with a paired 95 % interval over users; verdicts after Holm over all leads. A cell
        without both labels has no leads.
    """
    cells: list[dict[str, Any]] = []
    family = []
    for cell in (*scenarios, ALL):
        for place, task in enumerate(TASKS):
            parts = {name: cell_rows(rows, cell, place, scenarios) for name, rows in scored.items()}
            known = {name: part for name, part in parts.items() if part is not None}
            areas = {name: auc(labels, probs) for name, (labels, probs, _) in known.items()}
            cells.append({"cell": cell, "task": task, "auc": areas, "leads": {}})
            labels, probs, users = known[ours]
            for other in [name for name in known if name != ours]:
                gap = paired_auc_gap(labels, probs[None], known[other][1][None], users)
                family.append((cells[-1]["leads"], other, Judged(gap=gap)))
    for (leads, other, _), judged in zip(family, corrected([one for _, _, one in family]), strict=True):
        if judged.gap is not None:
            ends = {"value": judged.gap.value, "low": judged.gap.low, "high": judged.gap.high}
            leads[other] = ends | {"verdict": judged.verdict}
    return {"ours": ours, "cells": cells}


def comparison_text(found: Mapping[str, Any]) -> str:
    """For the terminal: a line for each cell, task and scorer, with the lead of ours over it."""
    ours = found["ours"]
    lines = [("scenario", "task", "scorer", "AUC", f"{ours} is ahead by", "95% interval", "verdict")]
    for entry in found["cells"]:
        for name, area in entry["auc"].items():
            lead = entry["leads"].get(name)
            texts = ("", "", "")
            if lead:
                texts = (f"{lead['value']:+.4f}", f"{lead['low']:+.4f} to {lead['high']:+.4f}", lead["verdict"])
            lines.append((entry["cell"], entry["task"], name, "-" if area is None else f"{area:.4f}", *texts))
    return "\n".join(aligned(lines))
