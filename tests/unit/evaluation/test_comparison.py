"""Scorers beside one another: areas and leads against scikit-learn, and the report's table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.reporting.test_run import SCENARIOS, make_predictions
from usr_ray.evaluation.statistics import compare, comparison_text, on_common_rows
from usr_ray.reporting.run import comparison_section

pytestmark = pytest.mark.unit


def test_every_scorer_has_its_auc_and_ours_its_lead():
    from sklearn.metrics import roc_auc_score

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


def test_scorers_of_other_rows_are_compared_on_those_in_common():
    whole = make_predictions()
    alone = whole.take(np.flatnonzero(whole.scenario_N == 1))  # a run of one scenario
    late = whole.take(np.flatnonzero(whole.row_number_N >= 100))
    found = on_common_rows({"whole": whole, "alone": alone, "late": late})
    for rows in found.values():
        assert (rows.row_number_N >= 100).all()
        assert (rows.scenario_N == 1).all()
        assert len(rows) == ((whole.scenario_N == 1) & (whole.row_number_N >= 100)).sum()
        np.testing.assert_array_equal(rows.probs_NT, whole.probs_NT[rows.row_number_N])
        assert rows.global_probs_NT is None
    assert len(on_common_rows({"one": alone, "other": whole.take(np.flatnonzero(whole.scenario_N == 0))})["one"]) == 0


def test_what_one_must_mind_of_a_comparison_is_in_the_report():
    assert "Mind: on 3 of 5 rows." in comparison_section({"cells": [], "notes": ["on 3 of 5 rows"]}).note


def test_without_a_comparison_the_report_has_no_such_section():
    assert not comparison_section(None).table.rows
