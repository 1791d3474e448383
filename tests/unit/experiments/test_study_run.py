"""How many trials of a study run at once, and how its worlds are built."""

from __future__ import annotations

import datetime as dt
import functools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs import build_worlds
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.config import Config, DataConfig, UserError, load_config
from usr_ray.data.manifest import build_manifest
from usr_ray.experiments import study as study_module
from usr_ray.experiments.grid import Resources, StudyError, expand, load_study, parse_study
from usr_ray.experiments.record import Base
from usr_ray.experiments.trials import num_slots
from usr_ray.experiments.worlds import build_commands, check_same_rows, prepare_worlds
from usr_ray.launch.environment import SUBMITTED

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
AXIS = {"name": "d", "path": "model.embedding_dim", "values": [8]}


@pytest.mark.parametrize(
    ("resources", "present", "slots"),
    [
        (Resources(), {"CPU": 2.0}, 2),
        (Resources(num_workers=2), {"CPU": 2.0}, 1),
        (Resources(num_workers=2), {"CPU": 7.0}, 3),
        (Resources(max_concurrent=1), {"CPU": 8.0}, 1),
        (Resources(cpus_per_worker=0.1), {"CPU": 0.3}, 3),
    ],
)
def test_as_many_trials_run_as_have_all_their_workers(
    resources: Resources, present: dict[str, float], slots: int
) -> None:
    assert num_slots(resources, present, use_gpu=False) == slots


def test_a_trial_that_never_fits_is_refused() -> None:
    with pytest.raises(StudyError, match=r"a trial needs 4 CPU, 4 GPU, the cluster has 8 CPU, 1 GPU; lower"):
        num_slots(Resources(num_workers=4), {"CPU": 8.0, "GPU": 1.0}, use_gpu=True)


def test_a_world_is_built_from_the_same_configuration_as_it_is_trained_with(tmp_path: Path) -> None:
    axis = {"name": "similarity", "path": "simulated.similarity", "values": [0.25], "world": True}
    raw = {"seeds": [0], "world": {"simulated.num_impressions": 5000}, "base": {"train.num_epochs": 3}, "axes": [axis]}
    (trial,) = expand(parse_study(raw, name="w", scale="full"))
    base = Base(tmp_path / "c.toml", ("features.user_numbers=['age']",))
    (tmp_path / "c.toml").write_text("data.train_dates = '2026-01-01:2026-01-03'\ndata.eval_dates = '2026-01-04'\n")
    ingest, build = build_commands(tmp_path / "w", base, trial)
    shared = [
        "--config",
        str(tmp_path / "c.toml"),
        "--logs",
        str(tmp_path / "w" / "logs"),
        "--set",
        "features.user_numbers=['age']",
        "--set",
        "simulated.num_impressions=5000",
        "--set",
        "simulated.similarity=0.25",
    ]
    assert ingest == ["jobs/ingest_logs.py", "--source", "simulated", *shared]
    lake = str(tmp_path / "w" / "lake")
    assert build == ["jobs/build_samples.py", "--lake", lake, "--dates", "2026-01-01:2026-01-04", *shared]
    trained = base.config(Resources(), trial)
    assert (trained.simulated.similarity, trained.features.user_numbers, trained.train.num_epochs) == (
        0.25,
        ("age",),
        3,
    )


def test_worlds_of_real_logs_need_their_files(tmp_path: Path) -> None:
    real = load_study("scenarios_kuairand", scale="small", folder=ROOT / "jobs" / "studies")
    base = Base(ROOT / "jobs" / "configs" / "kuairand.toml", ())
    five = next(trial for trial in expand(real) if trial.point["scenarios"] == "5")
    assert base.config(Resources(), five).kuairand.tab_groups["tab_6"] == (6,)
    ingest, _ = build_commands(tmp_path / "w", base, five, source=real.source, input_dir=tmp_path / "files")
    assert ingest[:5] == ["jobs/ingest_logs.py", "--source", "kuairand", "--input", str(tmp_path / "files")]
    run = functools.partial(study_module.run_study, lake=None, run_dir=tmp_path / "run")
    with pytest.raises(
        StudyError, match=r"--input is missing: study scenarios_kuairand makes its worlds of kuairand's"
    ):
        run(real, base)
    with pytest.raises(StudyError, match=r"--input .*nowhere: no such folder; name the one with kuairand's files"):
        run(real, base, input_dir=tmp_path / "nowhere")
    made = load_study("scenarios", scale="small", folder=ROOT / "jobs" / "studies")
    with pytest.raises(StudyError, match=r"study scenarios reads no data set; leave --input out"):
        run(made, base, input_dir=tmp_path)


def test_trials_of_several_workers_do_not_run_here(tmp_path: Path) -> None:
    raw = {"seeds": [0], "axes": [AXIS], "resources": {"num_workers": 2}}
    with pytest.raises(StudyError, match=r"^ray.num_workers=0: a trial of study wide has 2 workers, which needs Ray;"):
        study_module.run_study(
            parse_study(raw, name="wide", scale="full"), Base(None, ("ray.num_workers=0",)), "lake", tmp_path / "run"
        )


def test_the_dates_that_compare_do_not_choose_an_epoch(tmp_path: Path) -> None:
    study = parse_study({"seeds": [0], "axes": [AXIS]}, name="early", scale="full")
    base = Base(None, ("train.early_stopping=true",))
    with pytest.raises(StudyError, match=r"^trial .*: train.early_stopping would choose its epoch on data.eval_dates,"):
        study_module.run_study(study, base, "lake", tmp_path / "run")


def test_dates_of_a_studys_own_base_are_those_of_its_worlds_and_of_the_rows_that_are_kept_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command's configuration has none, or others, on which vocabularies would be fitted."""
    write_samples(tmp_path / "lake", samples_spec(label_delay_us=0), num_rows=90, num_days=3)
    base = Base(None, ("ray.num_workers=0", "data.train_dates=2026-01-01:2026-01-02", "data.eval_dates=2026-01-03"))
    dates = {"data.train_dates": "2026-01-01", "data.eval_dates": "2026-01-02"}
    raw = {"seeds": [0], "axes": [AXIS], "base": {**dates, "train.num_epochs": 2}}
    monkeypatch.setattr(study_module, "run_here", lambda jobs: None)
    study_module.run_study(parse_study(raw, name="w", scale="full"), base, str(tmp_path / "lake"), tmp_path / "run")
    (table,) = json.loads((tmp_path / "run" / "study.json").read_text())["tables"].values()
    days = [FIRST_DATE, FIRST_DATE + dt.timedelta(days=1)]
    assert table["rows"] == [build_manifest(tmp_path / "lake", dates=(day, day)).sha256 for day in days]
    study = parse_study(raw | {"axes": [AXIS | {"world": True}]}, name="w", scale="full")
    _, build = build_commands(tmp_path / "world", base.of_study(study), expand(study)[0])
    sets = [word for word in build if word.startswith("data.")]
    assert load_config(None, sets).data == DataConfig(train_dates="2026-01-01", eval_dates="2026-01-02")
    assert "train.num_epochs=2" not in build


def test_trials_look_for_relative_paths_where_the_command_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A trial's process may have another working directory."""
    write_samples(tmp_path / "lake", samples_spec(label_delay_us=0), num_rows=60, num_days=2)
    monkeypatch.chdir(tmp_path)
    jobs: list[study_module.Job] = []
    monkeypatch.setattr(study_module, "run_here", jobs.extend)
    dates = ("data.train_dates=2026-01-01", "data.eval_dates=2026-01-02")
    base = Base(None, (*dates, "ray.num_workers=0", "train.reader_cache=cache", "train.warm_start=before"))
    study = parse_study({"seeds": [0], "axes": [AXIS]}, name="w", scale="full")
    study_module.run_study(study, base, "lake", tmp_path / "run")
    (job,) = jobs
    assert (job.config.train.reader_cache, job.config.train.warm_start) == (
        str(tmp_path / "cache"),
        str(tmp_path / "before"),
    )


def test_a_submitted_study_wants_whole_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A submitted job runs in a copy of the folder that is thrown away."""
    monkeypatch.chdir(tmp_path)
    dates = ("data.train_dates=2026-01-01", "data.eval_dates=2026-01-02", "ray.num_workers=0")
    study = parse_study({"seeds": [0], "axes": [AXIS]}, name="w", scale="full")
    whole, lake = tmp_path / "run", str(tmp_path / "lake")
    for key, lake_dir, run_dir in (("", "lake", whole), ("", lake, Path("run")), ("train.warm_start=a", lake, whole)):
        base = Base(None, (*dates, *([key] if key else [])))
        with pytest.raises(UserError, match=r": is relative, and a submitted job runs in"):
            study_module.run_study(study, base, lake_dir, run_dir, cluster=SUBMITTED)
    assert not list(tmp_path.iterdir())


def test_a_kill_between_two_trials_begins_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever was told to end goes on with the same command; the signal's own meaning is back afterwards."""
    begun: list[str] = []

    def killed(config: Config, lake: str, run_dir: Path, **_: Any) -> str:
        begun.append(run_dir.name)
        run_dir.mkdir()
        (run_dir / "metrics.json").write_text("{}")
        (run_dir / "config.json").write_text('{"status": "finished"}')
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    monkeypatch.setattr(study_module, "run_trial", killed)
    monkeypatch.setattr(study_module, "is_finished", lambda folder: folder.exists())
    before = signal.getsignal(signal.SIGTERM)
    (trial,) = expand(parse_study({"seeds": [0], "axes": [AXIS]}, name="w", scale="full"))
    study_module.run_here([study_module.Job(trial, Config(), "lake", tmp_path / name) for name in ("a", "b")])
    assert begun == ["a"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.integration
def test_a_world_that_cannot_be_built_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axis = {"name": "similarity", "path": "simulated.similarity", "values": [0.25], "world": True}
    study = parse_study({"seeds": [0], "axes": [axis]}, name="w", scale="full")
    base = Base(None, ("data.train_dates='2026-01-01'", "data.eval_dates='2026-01-02'"))
    submit = tmp_path / "spark-submit"
    submit.write_text("#!/bin/sh\necho starting\necho 'error: world a: jobs/ingest_logs.py: seed is odd'\nexit 2\n")
    submit.chmod(0o755)
    monkeypatch.setattr(build_worlds, "spark_submit", lambda: str(submit))
    with pytest.raises(StudyError, match=r"^world a: jobs/ingest_logs.py: seed is odd; see .*spark.log$"):
        prepare_worlds(study, base, expand(study), tmp_path / "run", build=build_worlds.in_spark)
    submit.write_text("#!/bin/sh\nexit 137\n")
    with pytest.raises(StudyError, match=r"^jobs/build_worlds.py failed with exit code 137; see .*spark.log$"):
        prepare_worlds(study, base, expand(study), tmp_path / "run", build=build_worlds.in_spark)
    with pytest.raises(ValueError, match=r"study w makes worlds: hand in what builds them"):
        prepare_worlds(study, base, expand(study), tmp_path / "run")


def test_a_lake_that_was_built_anew_is_not_that_of_earlier_trials(tmp_path: Path) -> None:
    """Its path and the number of its version may be those of the old one."""
    record: dict[str, Any] = {}
    for _ in range(2):
        write_samples(tmp_path / "lake", samples_spec(), num_rows=20, num_days=2)
        manifests = [build_manifest(tmp_path / "lake", dates=(FIRST_DATE, FIRST_DATE))]
        if not record:
            check_same_rows(record, manifests, tmp_path / "run")
            check_same_rows(record, manifests, tmp_path / "run")
            shutil.rmtree(tmp_path / "lake")
    with pytest.raises(StudyError, match=r"run: holds trials on other files of \S+lake/samples than version 1 has now"):
        check_same_rows(record, manifests, tmp_path / "run")
