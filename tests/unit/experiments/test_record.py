"""What a study leaves on disk: which trials are done, rows of results, and directories that are refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.unit.changed_json import refusals
from tests.unit.study_runs import BASE, SETS, finish, rows, write_study
from usr_ray.experiments.analysis import Trials
from usr_ray.experiments.grid import Study, StudyError, expand, parse_study
from usr_ray.experiments.record import (
    Base,
    failure_of,
    is_finished,
    note_failure,
    open_study,
    read_study,
    result_rows,
    trial_dir,
    write_record,
    write_results,
)

pytestmark = pytest.mark.unit

RAW: dict[str, Any] = {"seeds": [0, 1], "axes": [{"name": "d", "path": "model.embedding_dim", "values": [8, 16]}]}


def study(**changes: Any) -> Study:
    return parse_study({**RAW, **changes}, name="d", scale="full")


def test_results_hold_a_row_for_each_trial_split_scenario_and_task_and_one_for_a_failure(tmp_path: Path) -> None:
    first, second, third, _ = expand(study())
    finish(tmp_path, study(), first, rows(0.5, 0))
    note_failure(trial_dir(tmp_path, second), "the loss is nan", "Traceback ...")
    assert failure_of(trial_dir(tmp_path, second)) == "the loss is nan"
    found = pq.read_table(write_results(tmp_path, result_rows(tmp_path, expand(study())))).to_pylist()
    of_first = [row for row in found if row["trial_id"] == first.trial_id]
    assert {(r["split"], r["scenario"], r["task"]) for r in of_first} == {
        ("eval", s, t) for s in ("search", "recommendation", "global", "all") for t in ("ctr", "ctcvr")
    }
    assert len(of_first) == 8
    row = next(r for r in of_first if (r["scenario"], r["task"]) == ("search", "ctr"))
    saved = json.loads((trial_dir(tmp_path, first) / "metrics.json").read_text())["eval"]["search"]["ctr"]
    assert (row["auc"], row["num_samples"], row["gauc"]) == (saved["auc"], 600, saved["gauc"])
    assert (row["status"], row["seed"], row["table_version"], row["seconds"]) == ("finished", 0, 4, 42.0)
    assert json.loads(row["overrides"])["model.embedding_dim"] == 8
    assert next(r for r in of_first if r["scenario"] == "global")["auc"] is None, "no global heads: null, not 0"
    states = {r["trial_id"]: (r["status"], r["error"]) for r in found}
    assert states[second.trial_id] == ("failed", "the loss is nan")
    assert states[third.trial_id] == ("open", None)


def test_a_trial_is_finished_only_with_its_metrics(tmp_path: Path) -> None:
    trial = expand(study())[0]
    folder = finish(tmp_path, study(), trial, rows(0.5, 0))
    assert is_finished(folder)
    (folder / "metrics.json").unlink()
    assert not is_finished(folder)
    assert not is_finished(tmp_path / "nowhere")


def test_a_study_goes_on_with_a_larger_grid_and_remembers_each_command(tmp_path: Path) -> None:
    write_study(tmp_path, study(), {"8": 0.5, "16": 0.4}, "d")
    grown = study(seeds=[0, 1, 2])
    record = open_study(tmp_path, grown, BASE, lake="/lake", command=["again"])
    assert [c["command"][-1] for c in record["commands"]] == ["d", "again"]
    assert record["tables"] == {"": {"lake": "/lake", "version": 4}}
    assert sum(not is_finished(trial_dir(tmp_path, t)) for t in expand(grown)) == 2


def test_another_base_lake_or_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "study"
    write_record(run_dir, open_study(run_dir, study(), BASE, lake="/lake", command=[]))
    other = Base(None, (*SETS, "model.dropout=0.3"))
    with pytest.raises(StudyError, match=r"holds a study with model.dropout = 0.0, this command has 0.3; set it back"):
        open_study(run_dir, study(), other, lake="/lake", command=[])
    with pytest.raises(StudyError, match=r"holds a study on /lake, this command names /pond; name that one"):
        open_study(run_dir, study(), BASE, lake="/pond", command=[])
    with pytest.raises(StudyError, match=r"study: holds study d, this command names e; name that one, or use another"):
        open_study(run_dir, replace(study(), name="e"), BASE, lake="/lake", command=[])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(StudyError, match=r"full: is there and holds no study; name a new or empty folder"):
        open_study(tmp_path / "full", study(), BASE, lake="/lake", command=[])
    with pytest.raises(StudyError, match=r"nowhere: holds no study"):
        read_study(tmp_path / "nowhere")
    record = json.loads((run_dir / "study.json").read_text())
    for damaged in ("{", json.dumps({key: value for key, value in record.items() if key != "tables"})):
        (run_dir / "study.json").write_text(damaged)
        with pytest.raises(StudyError, match=r"study.json: is (not readable JSON|damaged \(tables is missing\))"):
            open_study(run_dir, study(), BASE, lake="/lake", command=[])


@pytest.mark.integration
def test_a_file_of_a_study_that_was_changed_is_one_line(tmp_path: Path) -> None:
    one = study(seeds=[0], axes=[{"name": "d", "path": "model.embedding_dim", "values": [8]}])
    write_study(tmp_path, one, {"8": 0.5}, "d")
    folder = trial_dir(tmp_path, expand(one)[0])
    note_failure(folder, "the loss is nan", "Traceback ...")
    for path in (tmp_path / "study.json", folder / "config.json"):  # some sections say all there is to say of the shape
        record = json.loads(path.read_text())
        record["config"] = {key: record["config"][key] for key in ("scenarios", "data", "counters")}
        record["config"]["model"] = {"contrastive": {"every_nth_group": 4}}
        path.write_text(json.dumps(record))

    def opened() -> None:
        open_study(tmp_path, one, BASE, lake="/lake", command=[])
        read_study(tmp_path)

    def trials() -> None:
        result_rows(tmp_path, expand(one))
        found = Trials(tmp_path, one)
        for trial in found.finished:
            found.config(trial)
            found.rows_hash(trial)
            found.metrics(trial)
        found.dates()

    for path, read, least in (
        (tmp_path / "study.json", opened, 30),
        (folder / "config.json", trials, 60),
        (folder / "failure.json", trials, 8),
    ):
        read()
        lines = refusals(path, read)
        assert len(lines) >= least
        assert all(re.match(f"(--run-dir )?{tmp_path}", line) and "; " in line for line in lines)


def test_a_study_stays_on_the_version_that_it_began_on(tmp_path: Path) -> None:
    write_study(tmp_path, study(), {"8": 0.5, "16": 0.4}, "d")  # on version 4
    same, other = (Base(None, (*SETS, f"data.table_version={version}")) for version in (4, 0))
    assert open_study(tmp_path, study(), same, lake="/lake", command=[])["tables"][""]["version"] == 4
    message = r"holds a study on version 4 of /lake, this command has data.table_version = 0; leave it out to go on"
    with pytest.raises(StudyError, match=message):
        open_study(tmp_path, study(), other, lake="/lake", command=[])


def test_a_trial_that_makes_no_configuration_is_named() -> None:
    wrong = study(axes=[{"name": "d", "path": "model.embedding_dim", "values": [0]}])
    with pytest.raises(StudyError, match=r"trial 0-s0-\w{8}: model.embedding_dim must be in \[1, 65536\], got 0"):
        BASE.config(wrong.resources, expand(wrong)[0])


def test_what_does_not_change_a_result_may_change(tmp_path: Path) -> None:
    write_record(tmp_path, open_study(tmp_path, study(), BASE, lake="/lake", command=[]))
    elsewhere = Base(None, (*SETS, "ray.dashboard=false", "ray.max_failures=9"))
    assert open_study(tmp_path, study(), elsewhere, lake="/lake", command=[])["study"] == "d"
