"""A search in its run directory: trials read back from their own folders, and directories that are refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.changed_json import refusals
from tests.unit.samples_table import samples_spec, write_samples
from tests.unit.study_runs import BASE, SETS
from usr_ray.config import UserError
from usr_ray.data.manifest import DataError
from usr_ray.experiments import search
from usr_ray.experiments.record import Base, note_failure
from usr_ray.experiments.search_record import as_row, open_search, read_curve, read_points, write_search, write_values
from usr_ray.experiments.space import TriedPoint, TuneError, choose, load_search
from usr_ray.reporting.page import DASH
from usr_ray.reporting.search import search_section

pytestmark = pytest.mark.integration

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


def test_what_was_changed_of_a_trial_is_named(tmp_path: Path) -> None:
    values = {"train.learning_rate": 0.001, "model.backbone": "ple"}
    folder = write_trial(tmp_path, "a_00000", values, [evaluation(10, 0.6, 0.2)])
    for key in ("train.learning_rate", "model.backbone"):
        write_values(folder, {name: value for name, value in values.items() if name != key}, num_epochs=2)
        with pytest.raises(TuneError, match=rf"trial.json: is damaged \(values.{key} is missing\); remove the trial's"):
            read_points(tmp_path, CONFIG)
    write_values(folder, values, num_epochs=2)
    assert len(read_points(tmp_path, CONFIG)) == 1
    refusals(folder / "trial.json", lambda: read_points(tmp_path, CONFIG))
    row = json.loads(evaluation(10, 0.6, 0.2))
    (folder / "history.jsonl").write_text(json.dumps({key: row[key] for key in row if key != "all/ctr/log_loss"}))
    with pytest.raises(TuneError, match=r"history.jsonl: is damaged \(the evaluation of step 10 lacks 'log_loss'\); "):
        read_points(tmp_path, CONFIG)


def test_an_evaluation_that_full_storage_has_lost_moves_no_other(tmp_path: Path) -> None:
    """As training.loop logs the last step of each epoch, from 0; else two epochs would pass for one."""
    logged = [json.dumps({"kind": "train", "step": step, "epoch": (step - 1) // 10 / 1}) for step in (5, 15, 20, 30)]
    lines = [*logged[:3], evaluation(20, 0.5, 0.1), logged[3], evaluation(30, 0.7, 0.1)]
    write_trial(tmp_path, "a_00000", {"train.learning_rate": 0.001, "model.backbone": "ple"}, lines)
    curve = read_curve(tmp_path / "a_00000" / "history.jsonl", "log_loss")
    assert math.isnan(curve[0])
    assert curve[1:] == pytest.approx((0.3, 0.4))
    assert choose(read_points(tmp_path, CONFIG), CONFIG).num_epochs == 2


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


def test_a_trial_whose_values_do_not_fit_together_is_among_the_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value fits the configuration as given, so the search begins; this pair of them is no configuration."""
    monkeypatch.setattr(search.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "a_00003"))
    values = {"model.interest.rank": 32, "model.interest.over_parameterisation": 16, "train.num_epochs": 3}
    ends = {"rank": [8, 32], "over_parameterisation": [16, 32]}
    space = ", ".join(f'"model.interest.{key}" = {{kind = "choice", values = {of}}}' for key, of in ends.items())
    config = load_search(None, [*SETS, f"tune.space={{{space}}}"])
    line = "model.interest.over_parameterisation (16) must not be below model.interest.rank (32): the product would"
    with pytest.raises(RuntimeError, match=re.escape(line)):
        search.run_drawn(values, config=config.to_dict(), lake="none", folder=str(tmp_path), version=0)
    (point,) = read_points(tmp_path, config)
    assert (point.trial_id, point.values, point.status, point.num_epochs) == ("a_00003", values, "failed", 3)
    assert point.error.startswith(line)


def test_settings_of_asha_that_trials_of_several_workers_leave_without_effect_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two workers are the default."""
    assert isinstance(search._scheduler(CONFIG), search.FIFOScheduler)
    said = "trials of 2 workers run to their end; with ray.num_workers=1 ASHA stops the worse ones (tune.grace_epochs, "
    assert capsys.readouterr().out.startswith(said)
    alone = load_search(None, [*SEARCH.overrides, "ray.num_workers=1"])
    assert isinstance(search._scheduler(alone), search.ASHAScheduler)
    short = load_search(None, [*SEARCH.overrides, "train.num_epochs=1"])
    assert isinstance(search._scheduler(short), search.FIFOScheduler)
    assert capsys.readouterr().out == "", "there is nothing to stop"


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


def test_what_every_trial_would_fail_of_is_refused_before_the_first(tmp_path: Path) -> None:
    """Labels take 25 hours, so the first date has no final one by its end: on that alone the trials would train."""
    write_samples(tmp_path / "lake", samples_spec(), num_rows=200, num_days=4)
    short = Base(None, ("data.train_dates=2026-01-01:2026-01-02", "data.eval_dates=2026-01-03", SPACE))
    with pytest.raises(DataError, match=r"2026-01-01 to 2026-01-01: no row's labels are final by 2026-01-02T00:00:00Z"):
        open_search(load_search(None, short.overrides), str(tmp_path / "lake"), tmp_path / "search", short, [])
    many = Base(None, (*SEARCH.overrides, "ray.num_workers=99"))
    with pytest.raises(UserError, match=r"99 workers cannot share a global batch of 8 groups"):
        open_search(load_search(None, many.overrides), str(tmp_path / "lake"), tmp_path / "search", many, [])
    assert not (tmp_path / "search").exists(), "the corrected command begins anew"


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
    with pytest.raises(TuneError, match=r"search.json: is damaged \(created is missing\)"):
        open_search(CONFIG, str(lake), run_dir, SEARCH, [])


def test_a_search_without_a_space_is_refused() -> None:
    with pytest.raises(TuneError, match=r"tune.space is empty"):
        load_search(None, BASE.overrides)
