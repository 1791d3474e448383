"""Pins: what a run leaves in the lake while it trains."""

from __future__ import annotations

import json
from pathlib import Path

import deltalake
import pytest

from tests.unit.docs.test_tables_doc import documented_keys
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.config import load_config
from usr_ray.data.manifest import build_manifest
from usr_ray.data.pins import pin_name, write_pin
from usr_ray.runs.plan import mark_finished, plan_run, write_plan

pytestmark = pytest.mark.unit

OVERRIDES = (
    "data.train_dates='2026-01-01:2026-01-02'",
    "data.eval_dates='2026-01-03'",
    "train.global_batch_size=64",
    "model.contrastive.group_size=16",
)


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    write_samples(tmp_path / "lake", samples_spec(), num_rows=200, num_days=5)
    return tmp_path / "lake"


def test_a_run_holds_its_files_from_its_start_until_it_is_finished(lake: Path, tmp_path: Path) -> None:
    plan = plan_run(load_config(None, OVERRIDES), lake, tmp_path / "my run")
    assert not (lake / "pins").exists()
    write_plan(plan)
    write_plan(plan)  # going on with a run renews its pin
    (path,) = (lake / "pins").iterdir()
    pin = json.loads(path.read_text())
    assert path.name.startswith("my_run-")
    assert set(pin) == documented_keys("pins")
    assert (pin["run"], pin["version"]) == (str(tmp_path / "my run"), deltalake.DeltaTable(lake / "samples").version())
    files = deltalake.DeltaTable(lake / "samples").get_add_actions(flatten=True)
    days = files["partition.impression_date"].to_pylist()
    wanted = {name for name, day in zip(files["path"].to_pylist(), days, strict=True) if day.isoformat() < "2026-01-04"}
    assert set(pin["files"]) == wanted
    mark_finished(plan, outcome="finished", step=7)
    assert not list((lake / "pins").iterdir())
    mark_finished(plan, outcome="finished", step=7)  # no pin is no error


def test_two_runs_of_one_name_have_pins_of_their_own(tmp_path: Path) -> None:
    assert pin_name(tmp_path / "a" / "run") != pin_name(tmp_path / "b" / "run")


def test_a_lake_that_takes_no_pin_is_said_and_no_error(
    lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lake / "pins").write_text("in the way")  # as a lake that is read-only here, for root too
    write_pin([build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE))], tmp_path / "run")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"no pin at {lake}/pins/run-")
    assert f"must name {tmp_path / 'run'} with --runs" in line
