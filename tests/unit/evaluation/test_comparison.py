"""Scorers beside one another: areas and leads against scikit-learn, and the report's table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.unit.reporting.test_run import SCENARIOS, make_predictions
from usr_ray.evaluation.comparison import compare, comparison_text
from usr_ray.reporting.run import comparison_section

pytestmark = pytest.mark.unit


def test_every_scorer_has_its_auc_and_ours_its_lead():
    ours = make_predictions()
    chance = replace(ours, probs_NT=np.random.default_rng(5).random((len(ours), 2)))
    found = compare({"chance": chance, "ours": ours}, "ours", SCENARIOS)
    cells = {(entry["cell"], entry["task"]): entry for entry in found["cells"]}
    assert list(cells) == [(cell, task) for cell in (*SCENARIOS, "all") for task in ("ctr", "ctcvr")]
    inside = ours.scenario_N == 1
    areas = [roc_auc_score(ours.labels_NT[inside, 0], s.probs_NT[inside, 0]) for s in (chance, ours)]
    entry = cells["recommendation", "ctr"]
    assert [entry["auc"]["chance"], entry["auc"]["ours"]] == pytest.approx(areas)
    lead = entry["leads"]["chance"]
    assert lead["value"] == pytest.approx(areas[1] - areas[0])
    assert lead["low"] < lead["value"] < lead["high"]
    assert lead["verdict"] == "better"
    assert cells["search", "ctcvr"]["leads"] == {}, "no order there"
    lines = [line.split() for line in comparison_text(found).splitlines()]
    assert ["recommendation", "ctr", "chance", f"{areas[0]:.4f}", f"{lead['value']:+.4f}"] in [
        line[:5] for line in lines
    ]
    assert ["search", "ctcvr", "ours", "-"] in lines
    section = comparison_section(found)
    assert [row.values[2:5] for row in section.table.rows if row.values[:2] == ["Recommendation", "CTR"]] == [
        ["chance", f"{areas[0]:.4f}", f"{lead['value']:+.4f}"],
        ["ours", f"{areas[1]:.4f}", ""],
    ]


def test_two_equal_scorers_are_even():
    ours = make_predictions()
    found = compare({"twin": ours, "ours": ours}, "ours", SCENARIOS)
    assert {lead["verdict"] for entry in found["cells"] for lead in entry["leads"].values()} == {"even"}


def test_without_a_comparison_the_report_has_no_such_section():
    assert not comparison_section(None).table.rows
