"""A study on the tests' own Ray: trials at once, a failure kept by name, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from tests.ray.conftest import BACKBONE, OVERRIDES
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.experiments.grid import expand, parse_study
from usr_ray.experiments.record import Base, trial_dir
from usr_ray.schema import SAMPLES
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.ray

SETS = (*OVERRIDES, "train.num_epochs=1")
WILD = {"train.learning_rate": 1000.0, "train.weight_decay": 1000.0, "train.gradient_clip": 0.0}
"""Each step multiplies the weights by -999,999: a loss that is not a number, so that a trial fails on purpose."""
GRID: dict[str, Any] = {
    "seeds": [0],
    "axes": [
        {
            "name": "rate",
            "values": {"sound": {}, "diverging": WILD},
        }
    ],
}


@pytest.fixture
def own_lake(tmp_path: Path) -> Path:
    write_samples(tmp_path / "lake", samples_spec(), num_rows=1500, num_days=6)
    return tmp_path / "lake"


def test_failures_are_kept_and_a_second_call_runs_only_what_has_no_result(
    cluster: None, own_lake: Path, tmp_path: Path
) -> None:
    from usr_ray.experiments.study import run_study
    from usr_ray.launch.alone import run_alone

    study, base, run_dir = parse_study(GRID, name="rates", scale="full"), Base(None, SETS), tmp_path / "study"
    first = run_study(study, base, str(own_lake), run_dir)
    assert (first.num_finished, len(first.failures)) == (1, 1)
    assert all("diverged" in why and "diverging" in name for name, why in first.failures.items())
    rows = pq.read_table(first.results).to_pylist()
    assert {row["status"] for row in rows if "diverging" in row["trial_id"]} == {"failed"}
    sound = [row for row in rows if row["status"] == "finished"]
    # (2 scenarios + global + all) x 2 tasks
    assert len(sound) == 8
    assert all(row["num_samples"] > 0 and row["table_version"] == 1 for row in sound)

    # The table moves on, the grid changes, and one new trial was cut off after a step: it goes on from its checkpoint,
    # finished trials are read back, and all stay on the pinned version.
    DeltaTable(own_lake / SAMPLES).alter.set_table_properties({"more": "1"}, raise_if_not_exists=False)
    before = {row["trial_id"]: (trial_files(run_dir, row["trial_id"])) for row in sound}
    calm = {**GRID, "axes": [{"name": "rate", "values": {"sound": {}, "slow": {"train.learning_rate": 1e-4}}}]}
    study = parse_study(calm, name="rates", scale="full")
    half = next(trial for trial in expand(study) if trial.point == {"rate": "slow"})
    cut_off = LocalWorker("cpu")
    cut_off.request_stop()
    config = base.config(study.resources, half, table_version=1)
    run_alone(config, str(own_lake), trial_dir(run_dir, half), worker=cut_off)
    second = run_study(study, base, str(own_lake), run_dir)
    assert (second.num_finished, second.failures) == (2, {})
    assert "resumed at step 1 " in (trial_dir(run_dir, half) / "train.log").read_text()
    assert before == {name: trial_files(run_dir, name) for name in before}
    assert not list(run_dir.glob("trials/sound*/checkpoints")), "a finished trial's take room for nothing"
    assert {row["table_version"] for row in pq.read_table(second.results).to_pylist()} == {1}


@pytest.mark.parametrize(
    "values",
    [
        {"diverging": WILD},
        # In turns: as many at once as tests/unit/experiments/test_study_run.py says.
        pytest.param({"sound": {}, "diverging": WILD}, marks=pytest.mark.slow),
    ],
    ids=list,
)
def test_trials_of_two_workers_each_take_turns_on_two_cpus(
    cluster: None, own_lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """Both at once would wait for each other's CPUs for ever. With a backbone that lies outside the package.

    What the workers of one trial end with is the trial's line, as it is a user's at the end of a training.
    """
    from usr_ray.experiments.study import run_study

    own = "model.backbone='cross_network:CrossNetwork'"
    monkeypatch.syspath_prepend(str(BACKBONE))  # the workers have it from the cluster
    grid = {"seeds": [0], "axes": [{"name": "rate", "values": values}], "resources": {"num_workers": 2}}
    study, run_dir = parse_study(grid, name="pairs", scale="full"), tmp_path / "study"
    result = run_study(study, Base(None, (*SETS, own)), str(own_lake), run_dir)
    assert result.num_finished == len(values) - 1
    ((name, why),) = result.failures.items()
    assert "diverging" in name
    assert "diverged" in why
    assert "Error" not in why, "Ray's own words"
    records = [json.loads(path.read_text()) for path in run_dir.glob("trials/*/config.json")]
    assert [record["config"]["ray"]["num_workers"] for record in records] == [2] * len(values)


def trial_files(run_dir: Path, trial_id: str) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (run_dir / "trials" / trial_id).iterdir() if p.is_file()}
