"""Comparisons and the report of a study whose trials are made up: who is better is known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup

from tests.unit.study_runs import BASE, finish, rows, write_study
from usr_ray.evaluation.baseline import TrainingRows
from usr_ray.evaluation.metrics import auc
from usr_ray.evaluation.statistics import PairedGap, corrected
from usr_ray.experiments.analysis import (
    WHOLE,
    Contrast,
    Trials,
    contrasts,
    mean_of,
    means,
    point_name,
    rows_by_part,
)
from usr_ray.experiments.grid import Comparison, Study, StudyError, compared_labels, expand, parse_study
from usr_ray.experiments.record import note_failure, open_study, trial_dir, write_record
from usr_ray.reporting import study as study_page
from usr_ray.reporting.page import Section
from usr_ray.reporting.plots import Bar, Line, axis_plot, forest_plot
from usr_ray.reporting.study import _contrast_section, _glance_section, verdict_sentences, write_study_report
from usr_ray.reporting.study_vectors import collapse, principal_components, separation

pytestmark = pytest.mark.integration

RAW: dict[str, Any] = {
    "title": "Clear and <blurred>",
    "seeds": [0, 1, 2, 3, 4],
    "axes": [
        {"name": "model", "values": {"blurred": {}, "clear": {"model.dropout": 0.1}, "same": {"model.dropout": 0.2}}},
        {"name": "d", "path": "model.embedding_dim", "values": [8, 16]},
    ],
    "comparisons": [{"axis": "model", "of": ["clear", "same"], "against": "blurred"}],
}
PLAIN = {"model.multitask.enabled": False}
NOISES = {"blurred": 2.5, "clear": 0.1, "same": 2.5}


@pytest.fixture(scope="module")
def study() -> Study:
    return parse_study(RAW, name="blur", scale="full")


@pytest.fixture(scope="module")
def run_dir(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("study")
    write_study(run_dir, study, NOISES, "model")
    return run_dir


def test_each_comparison_is_made_at_equal_values_of_the_other_axes(study: Study, run_dir: Path) -> None:
    found = contrasts(Trials(run_dir, study))
    assert len(found) == 2 * 2 * 2 * 2  # labels x d x scenarios x tasks
    clear = next(c for c in found if (c.label, c.scenario, c.task, c.at) == ("clear", "search", "ctr", (("d", "8"),)))
    truth = [rows(noise, seed) for noise in (0.1, 2.5) for seed in range(5)]
    own = truth[0].scenario_N == 0
    areas = [auc(p.labels_NT[own, 0], p.probs_NT[own, 0]) or 0.0 for p in truth]
    assert clear.gap is not None
    assert clear.gap.by_seed == pytest.approx([areas[n] - areas[n + 5] for n in range(5)])
    assert clear.verdict == "better"
    assert {c.verdict for c in found if c.label == "clear"} == {"better"}
    assert {c.verdict for c in found if c.label == "same"} == {"even"}, "the same probabilities: no gap at all"


def test_means_are_over_the_seeds(study: Study, run_dir: Path) -> None:
    trials = Trials(run_dir, study)
    point = next(p for p in trials.by_point if dict(p) == {"model": "clear", "d": "8"})
    values = [trials.metrics(t)["search"]["ctr"]["auc"] for t in trials.by_point[point].values()]
    assert means(trials)[point]["search", "ctr", "auc"] == mean_of([float(v) for v in values if v is not None])
    assert ("global", "ctr", "auc") not in means(trials)[point], "undefined is left out"
    assert (mean_of([1.0, 2.0, 3.0]).value, mean_of([1.0, 2.0, 3.0]).sd, mean_of([4.0]).sd) == (2.0, 1.0, 0.0)


def test_a_failed_seed_is_left_out_on_both_sides_and_named(study: Study, tmp_path: Path) -> None:
    write_record(tmp_path, open_study(tmp_path, study, BASE, lake="/lake", command=[]))
    for trial in expand(study):
        if trial.point["model"] == "clear" and trial.seed == 1:
            note_failure(trial_dir(tmp_path, trial), "the loss is <nan>")
        else:
            finish(tmp_path, study, trial, rows(NOISES[trial.point["model"]], trial.seed))
    clear = next(c for c in contrasts(Trials(tmp_path, study)) if c.label == "clear")
    assert clear.gap is not None
    assert len(clear.gap.by_seed) == 4
    page = write_study_report(tmp_path, study).read_text(encoding="utf-8")
    assert "2 trials without a result" in page
    assert "the loss is &lt;nan&gt;" in page


def test_rows_that_differ_are_never_compared(study: Study, tmp_path: Path) -> None:
    for trial in expand(study):  # as many of them, and so of the same numbers
        of = "beef" if trial.point["model"] == "clear" else "f00d"
        finish(tmp_path, study, trial, rows(1.0, trial.seed), rows_hash=of)
    message = (
        r"trial blurred-8-s0-\w+: was evaluated on other rows than trial clear-8-s0-\w+, with which it is compared"
    )
    with pytest.raises(StudyError, match=message):
        contrasts(Trials(tmp_path, study))


def test_a_model_of_one_scenario_is_compared_on_its_rows(tmp_path: Path) -> None:
    axis = {"name": "model", "values": {"joint": {}, "alone": {"data.only_scenario": "search", **PLAIN}}}
    comparison = {"axis": "model", "of": ["joint"], "against": "alone"}
    raw = {"seeds": [0, 1], "axes": [axis], "comparisons": [comparison]}
    study = parse_study(raw, name="joint", scale="full")
    write_record(tmp_path, open_study(tmp_path, study, BASE, lake="/lake", command=[]))
    for trial in expand(study):
        predictions = rows(0.5 if trial.point["model"] == "joint" else 1.5, trial.seed)
        if trial.point["model"] == "alone":
            predictions = predictions.take(predictions.scenario_N == 0)
        finish(tmp_path, study, trial, predictions)
    turned = replace(study, comparisons=(Comparison(axis="model", against="joint"),))
    both = contrasts(Trials(tmp_path, study)) + contrasts(Trials(tmp_path, turned))
    found = {(c.label, c.scenario, c.task): c.gap for c in both}
    own = rows(0.5, 0).scenario_N == 0
    expected = []
    for seed in (0, 1):
        joint, alone = (rows(noise, seed) for noise in (0.5, 1.5))
        areas = [auc(p.labels_NT[own, 0], p.probs_NT[own, 0]) or 0.0 for p in (joint, alone)]
        expected.append(areas[0] - areas[1])
    gap, back = found["joint", "search", "ctr"], found["alone", "search", "ctr"]
    assert gap is not None
    assert back is not None
    assert gap.by_seed == pytest.approx(expected)
    assert back.by_seed == pytest.approx([-value for value in expected])
    assert found["joint", "recommendation", "ctr"] is None, "it has no row there"
    assert "joint against alone" in write_study_report(tmp_path, study).read_text(encoding="utf-8")


def test_models_of_different_scenarios_cannot_be_compared_and_the_report_counts_no_verdict(tmp_path: Path) -> None:
    alone = {name: {"data.only_scenario": name, **PLAIN} for name in ("search", "recommendation")}
    raw = {"seeds": [0, 1], "axes": [{"name": "model", "values": alone | {"joint": {}}}]}
    study = parse_study({**raw, "comparisons": [{"axis": "model", "against": "search"}]}, name="own", scale="full")
    write_record(tmp_path, open_study(tmp_path, study, BASE, lake="/lake", command=[]))
    for trial in expand(study):
        predictions = rows(0.1 if trial.point["model"] == "joint" else 2.5, trial.seed)
        if trial.point["model"] != "joint":
            predictions = predictions.take(
                predictions.scenario_N == ["search", "recommendation"].index(trial.point["model"])
            )
        finish(tmp_path, study, trial, predictions)
    trials = Trials(tmp_path, study)
    found = contrasts(trials)
    assert {c.verdict for c in found if c.label == "recommendation"} == {"none"}
    words = verdict_sentences(trials, found)
    assert words[0] == "recommendation against search: none of 4 comparisons can be made."
    assert words[1].startswith(
        "joint against search: better in 2 of 2 comparisons after correction; 2 cannot be made (AUC"
    )
    page = write_study_report(tmp_path, study).read_text(encoding="utf-8")
    assert "over the 2 comparisons below that can tell" in page
    totals = {dict(point)["model"]: ("all", "ctr", "auc") in entries for point, entries in means(trials).items()}
    assert totals == {"search": False, "recommendation": False, "joint": True}, "they would be of other rows"


def test_nothing_finished_is_one_line(study: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no trial of study blur is finished; run jobs/study.py"):
        Trials(tmp_path, study)


def gap(value: float, half: float, p_value: float, num_rarer: int = 100) -> PairedGap:
    return PairedGap(value, value - half, value + half, p_value, (value,), 0.0, half / 2, 50, num_rarer)


def contrast(of: PairedGap | None) -> Contrast:
    return Contrast("model", "a", "b", (), "search", "ctr", "all rows", gap=of)


def test_verdicts_hold_after_correction_only() -> None:
    found = corrected(
        [
            contrast(gap(0.02, 0.01, 0.001)),
            contrast(gap(-0.02, 0.01, 0.002)),
            contrast(gap(0.01, 0.009, 0.04)),
            contrast(gap(0.001, 0.01, 0.8)),
            contrast(gap(0.3, 0.1, 0.0, num_rarer=7)),
            contrast(None),
        ]
    )
    assert [c.verdict for c in found] == ["better", "worse", "unsure", "even", "few", "none"]
    # Four have enough rows: 0.001 x 4, 0.002 x 3, 0.04 x 2.
    assert [c.adjusted_p for c in found[:4]] == pytest.approx([0.004, 0.006, 0.08, 0.8])


def test_a_scenario_has_one_colour_in_the_plots_of_both_tasks(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its first part has too few rows for a bar in one of them."""
    drawn: list[Bar] = []
    monkeypatch.setattr(study_page, "forest_plot", lambda bars, **_: drawn.extend(bars) or Markup())
    enough = gap(0.02, 0.01, 0.001)
    cells = [("search", gap(0.3, 0.1, 0.0, num_rarer=7)), ("feed", enough), ("search", enough), ("feed", enough)]
    parts = ["0 past events", "0 past events", "user new", "user new"]
    for task in ("ctr", "ctcvr"):
        rows = [
            Contrast("model", "clear", "same", (("d", "8"),), scenario, own, part, gap=of if own == "ctr" else enough)
            for own in ("ctr", "ctcvr")
            for (scenario, of), part in zip(cells, parts, strict=True)
        ]
        assert study_page._slice_plots(study, rows, task)
    colours = {(bar.name.split(":")[0], bar.colour) for bar in drawn}
    assert colours == {("search", "series-1"), ("feed", "series-2")}


def test_an_axis_of_numbers_has_every_scenario_that_some_point_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first point has no AUC of the feed, and search none of orders: neither hides a line nor takes its colour."""
    drawn: list[list[Line]] = []
    monkeypatch.setattr(study_page, "axis_plot", lambda lines, **_: drawn.append(list(lines)) or Markup())
    axes = [{"name": "d", "path": "model.embedding_dim", "values": [8, 16]}]
    study = parse_study({**RAW, "axes": axes, "comparisons": []}, name="width", scale="full")
    mean = mean_of([0.6, 0.7])
    known = {("search", "ctr", "auc"): mean, ("feed", "ctr", "auc"): mean, ("feed", "ctcvr", "auc"): mean}
    averages = {(("d", "8"),): {("search", "ctr", "auc"): mean}, (("d", "16"),): known}
    assert len(study_page._mean_plots(SimpleNamespace(study=study), averages)) == 2
    lines = [[(line.name, line.place, list(line.x)) for line in plot] for plot in drawn]
    assert lines == [[("search", 0, [8, 16]), ("feed", 1, [16])], [("feed", 1, [16])]]


def test_the_words_claim_no_more_than_the_intervals(study: Study, run_dir: Path) -> None:
    trials = Trials(run_dir, study)
    words = verdict_sentences(trials, contrasts(trials))
    assert words[0].startswith("clear against blurred: better in 8 of 8 comparisons after correction (AUC gap +0.")
    assert words[1].startswith("same against blurred: a difference holds after correction in none of 8 comparisons")
    assert len(words) == 2
    few = parse_study({**RAW, "seeds": [0, 1]}, name="blur", scale="full")  # the same trials, two seeds of them
    words = verdict_sentences(Trials(run_dir, few), contrasts(Trials(run_dir, few)))
    assert words[2].startswith("Only 2 seeds: gaps between models are often 0.001 to 0.01")


@pytest.mark.parametrize("labels", [("on", "off"), ("True", "False"), ("0.1", "-1e-05")])
def test_two_axes_of_the_same_labels_are_told_apart(labels: tuple[str, str], study: Study, run_dir: Path) -> None:
    """The first gains 0.01 whatever the second is; the second loses as much."""
    high, low = labels
    axes = [{"name": name, "values": {high: {f"model.{name}.enabled": True}, low: {}}} for name in ("first", "second")]
    comparisons = [{"axis": name, "against": low} for name in ("first", "second")]
    factorial = parse_study({"seeds": [0], "axes": axes, "comparisons": comparisons}, name="x", scale="full")
    family = []
    for comparison in factorial.comparisons:
        ((label, against),) = compared_labels(factorial, comparison)
        (other,) = {"first", "second"} - {comparison.axis}
        of = gap(0.01 if comparison.axis == "first" else -0.01, 0.001, 1e-6)
        family += [
            Contrast(comparison.axis, label, against, ((other, at),), "search", "ctr", WHOLE, gap=of) for at in labels
        ]
    family = corrected(family)
    glance, full = (section(factorial, family) for section in (_glance_section, _sections_of))
    assert glance.table is not None
    assert full.table is not None
    own = f"first {high} against {low}", f"second {high} against {low}"
    assert [list(row.values[:2]) for row in glance.table.rows] == [
        [f"second {high}, {own[0]}", "+0.0100 ▲"],
        [f"second {low}, {own[0]}", "+0.0100 ▲"],
        [f"first {high}, {own[1]}", "\N{MINUS SIGN}0.0100 ▼"],
        [f"first {low}, {own[1]}", "\N{MINUS SIGN}0.0100 ▼"],
    ]
    assert [list(row.values[:2]) for row in full.table.rows] == [
        [own[0], f"second {high}"],
        [own[0], f"second {low}"],
        [own[1], f"first {high}"],
        [own[1], f"first {low}"],
    ]
    trials = Trials(run_dir, study)
    trials.study = factorial
    assert [sentence.split(" (")[0] for sentence in verdict_sentences(trials, family)[:2]] == [
        f"{own[0]}: better in 2 of 2 comparisons after correction",
        f"{own[1]}: worse in 2 of 2 comparisons after correction",
    ]


def _sections_of(study: Study, found: list[Contrast]) -> Section:
    return _contrast_section(study, "Comparisons", found, [])


def test_a_label_that_says_what_it_is_stands_alone(study: Study) -> None:
    assert point_name(study, (("model", "clear"), ("d", "8"))) == "clear, d 8"


def test_a_name_with_dollar_signs_is_no_formula_and_a_line_goes_by_its_numbers() -> None:
    bars = [Bar(name, 0.1, [(0.0, 0.2)], "series-1", True) for name in ("$5_off_$10", "$5 vs $10 coupon")]
    drawn = forest_plot(bars, label="Uplift", axis="orders")
    assert all(bar.name in drawn for bar in bars)
    lines = [Line("auc", 0, x, y, s) for x, y, s in (([1, 0.1], [3, 2], [0.5, 0.25]), ([0.1, 1], [2, 3], [0.25, 0.5]))]
    turned, sorted_ = (axis_plot([line], label="AUC", x_axis="rate", y_axis="AUC") for line in lines)
    assert turned == sorted_, "not a zigzag"


def test_the_page_needs_no_network_and_escapes_what_it_shows(study: Study, run_dir: Path, tmp_path: Path) -> None:
    page = write_study_report(run_dir, study, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Clear and &lt;blurred&gt;" in page
    assert not re.search(r"https?://|<script|<img|<link", page)
    assert page.count("<svg") >= 4
    assert "/lake version 4" in page
    assert "▲ better" in page
    assert "near collapse" in page


def test_the_alarm_reads_the_last_step_and_leaves_out_what_is_off(study: Study, run_dir: Path) -> None:
    assert set(map(str, collapse(Trials(run_dir, study)).values())) == {"{'i, search': 0.02}"}
    with next(run_dir.glob("trials/*/history.jsonl")).open("a") as history:
        history.write('{"kind": "train", "st')  # the process was killed there
    assert set(map(str, collapse(Trials(run_dir, study)).values())) == {"{'i, search': 0.02}"}


def test_parts_of_the_rows_by_history_and_by_what_training_saw() -> None:
    predictions = rows(1.0, 0)
    trained = TrainingRows(
        scenario_N=np.zeros(2, np.int64),
        user_key_N=predictions.user_key_N[:2],
        item_id_N=predictions.item_id_N[:2],
        labels_NT=np.zeros((2, 4), np.float32),
    )
    parts = rows_by_part(predictions, trained)
    lengths = predictions.history_length_N
    assert int(parts["0 past events"].sum()) == int((lengths == 0).sum())
    assert int(parts["21 or more past events"].sum()) == int((lengths > 20).sum())
    seen = [user in predictions.user_key_N[:2] for user in predictions.user_key_N]
    assert parts["user seen in training"].tolist() == seen


def test_items_that_share_the_unknown_id_are_new_whatever_training_saw_of_others() -> None:
    """min_count 2: two items of one training row each have id 1, as have all that come later."""
    predictions = rows(1.0, 0).take(np.arange(4))
    predictions = replace(predictions, item_id_N=np.array([2, 1, 1, 4]))
    trained = TrainingRows(
        scenario_N=np.zeros(6, np.int64),
        user_key_N=np.zeros(6, np.int64),
        item_id_N=np.array([2, 2, 3, 3, 1, 1]),
        labels_NT=np.zeros((6, 4), np.float32),
    )
    parts = rows_by_part(predictions, trained)
    assert parts["item seen in training"].tolist() == [True, False, False, False]
    assert parts["item new"].tolist() == [False, True, True, True]


def test_separation_and_components_by_hand() -> None:
    # Two rows, views e1 and e2: inside distance 0, outside 1, so 1. Mixed up: inside 1, outside 1/2, so -1/2.
    apart = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    mixed = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    assert separation(apart) == pytest.approx(1.0)
    assert separation(mixed) == pytest.approx(-0.5)
    points, shares = principal_components(
        np.array([[0.0, 3.0, 0.0], [0.0, -3.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    )
    assert np.abs(points[:2, 0]) == pytest.approx([3, 3])
    assert shares == pytest.approx([0.9, 0.1])
