"""A search in its run directory: trials read back from their own folders, and directories that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.unit.samples_table import samples_spec, write_samples
from tests.unit.study_runs import BASE, SETS
from usr_ray.experiments.record import Base, note_failure
from usr_ray.experiments.search_record import as_row, open_search, read_curve, read_points, write_search, write_values
from usr_ray.experiments.space import TriedPoint, TuneError, choose, load_search
from usr_ray.reporting.page import DASH
from usr_ray.reporting.search import search_section

pytestmark = pytest.mark.unit

SPACE = (
    'tune.space={"train.learning_rate" = {kind = "log_uniform", low = 1e-4, high = 1e-2}, '
    '"model.backbone" = {kind = "choice", values = ["mmoe", "ple"]}}'
)
SEARCH = Base(None, (*SETS, SPACE, "train.num_epochs=2"))
CONFIG = load_search(None, SEARCH.overrides)


def evaluation(step: int, click: float, order: float) -> str:
    cells = {
        "all/ctr/log_loss": click,
        "all/ctcvr/log_loss": order,
        "all/ctr/auc": 0.5,
        "all/ctcvr/auc": 0.5,
        "search/ctr/auc": 0.6,
        "search/ctcvr/auc": None,
        "feed/ctr/auc": 0.8,
        "feed/ctcvr/auc": None,
    }
    return json.dumps({"kind": "eval", "step": step, "time": 0.0, **cells})


def write_trial(trials: Path, name: str, values: dict[str, object], lines: list[str]) -> Path:
    folder = trials / name
    write_values(folder, values, num_epochs=2)
    (folder / "history.jsonl").write_text("\n".join([json.dumps({"kind": "train", "step": 1}), *lines]) + "\n")
    return folder


def test_a_curve_is_the_mean_over_tasks_of_each_evaluation(tmp_path: Path) -> None:
    folder = write_trial(tmp_path, "a_00000", {}, [evaluation(10, 0.6, 0.2), evaluation(20, 0.5, 0.1)])
    assert read_curve(folder / "history.jsonl", "log_loss") == pytest.approx((0.4, 0.3))
    assert read_curve(folder / "history.jsonl", "ctr_auc") == pytest.approx((0.7, 0.7)), "of the scenarios, not of all"
    assert all(math.isnan(v) for v in read_curve(folder / "history.jsonl", "ctcvr_auc"))
    assert read_curve(tmp_path / "none.jsonl", "log_loss") == ()


def test_a_line_that_a_kill_cut_short_is_no_evaluation(tmp_path: Path) -> None:
    folder = write_trial(tmp_path, "a_00000", {}, [evaluation(10, 0.6, 0.2), evaluation(20, 0.5, 0.1)[:40]])
    assert read_curve(folder / "history.jsonl", "log_loss") == pytest.approx((0.4,))


def test_trials_are_read_back_in_the_order_drawn_with_what_they_failed_of(tmp_path: Path) -> None:
    one, two = ({"train.learning_rate": rate, "model.backbone": "ple"} for rate in (0.001, 0.01))
    write_trial(tmp_path, "f_00001", two, [evaluation(10, 0.4, 0.2)])
    write_trial(tmp_path, "f_00000", one, [evaluation(10, 0.6, 0.2), evaluation(20, 0.5, 0.3)])
    note_failure(write_trial(tmp_path, "f_00002", one, []), "diverged")
    write_trial(tmp_path, "f_00003", one, [])
    points = read_points(tmp_path, CONFIG, {"f_00003": "the process was killed", "f_00002": "RuntimeError"})
    assert [p.trial_id for p in points] == ["f_00000", "f_00001", "f_00002", "f_00003"]
    assert [p.status for p in points] == ["finished", "stopped", "failed", "failed"]
    assert [p.error for p in points] == ["", "", "diverged", "the process was killed"]
    chosen = choose(points, CONFIG)
    assert (chosen.point.trial_id, chosen.num_epochs) == ("f_00001", 1)
    assert chosen.overrides() == {**two, "train.num_epochs": 1}
    assert as_row(points[0]) == {
        "trial_id": "f_00000",
        "status": "finished",
        "values": one,
        "error": "",
        "curve": pytest.approx([0.4, 0.4]),
        "num_epochs": 2,
    }
    section = search_section(CONFIG, points, chosen.point)
    assert [row.values[0] for row in section.table.rows] == ["f_00001", "f_00000", "f_00002", "f_00003"]
    assert section.table.rows[0].values[-1] == "chosen"
    assert section.table.rows[2].values[-1] == "diverged"
    assert len(section.plots) == 1, "two scored trials are too few for importance"


def test_with_a_schedule_the_report_of_a_search_has_what_stands_for_a_run() -> None:
    config = load_search(None, [*SEARCH.overrides, "train.schedule=cosine"])
    values = {"train.learning_rate": 0.001, "model.backbone": "ple"}
    curves = {"middle": (0.3, 0.49), "chosen": (0.5, 0.47), "stopped": (0.2,)}
    points = [TriedPoint(name, values, curve, 2) for name, curve in curves.items()]
    section = search_section(config, points, choose(points, config).point)
    assert [(row.values[0], row.values[2], row.values[-1]) for row in section.table.rows] == [
        ("chosen", "0.4700", "chosen"),
        ("middle", "0.4900", ""),
        ("stopped", DASH, ""),
    ]


def test_a_search_goes_on_only_as_itself(tmp_path: Path) -> None:
    lake, run_dir = tmp_path / "lake", tmp_path / "search"
    write_samples(lake, samples_spec(), num_rows=400, num_days=4)
    record = open_search(CONFIG, str(lake), run_dir, SEARCH, ["jobs/tune.py"])
    assert (record["table_version"], record["train_seed"]) == (1, 0)
    assert open_search(CONFIG, str(lake), run_dir, SEARCH, ["again"]) == record
    other = load_search(None, [*SEARCH.overrides, "tune.num_trials=99"])
    with pytest.raises(TuneError, match=r"holds a search with tune.num_trials = 16, this command has 99; set it back"):
        open_search(other, str(lake), run_dir, SEARCH, [])
    fewer = load_search(None, [*SETS, SPACE[: SPACE.index(', "model.backbone"')] + "}", "train.num_epochs=2"])
    with pytest.raises(
        TuneError, match=r"holds a search with tune.space.model.backbone.\w+ = .*, this command has None"
    ):
        open_search(fewer, str(lake), run_dir, SEARCH, [])
    with pytest.raises(TuneError, match=r"holds a search on .*lake, this command names /pond; name that one"):
        open_search(CONFIG, "/pond", run_dir, SEARCH, [])
    with pytest.raises(TuneError, match=r"lake: is there and holds no search; name a new or empty folder"):
        open_search(CONFIG, str(lake), lake, SEARCH, [])
    write_search(run_dir, {"half": True})
    with pytest.raises(TuneError, match=r"search.json: cannot be read"):
        open_search(CONFIG, str(lake), run_dir, SEARCH, [])


def test_a_search_without_a_space_is_refused() -> None:
    with pytest.raises(TuneError, match=r"tune.space is empty"):
        load_search(None, BASE.overrides)
