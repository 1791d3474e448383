"""Training in the job's own process (ray.num_workers = 0): Ray is not even imported."""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from deltalake import DeltaTable

from jobs import train as job
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.cli import run_job
from usr_ray.config import RayConfig, UserError
from usr_ray.launch.alone import refuse_missing_gpus
from usr_ray.launch.environment import SUBMITTED
from usr_ray.launch.monitor import FileMonitor
from usr_ray.schema import SAMPLES
from usr_ray.training.checkpoint import CheckpointStore

pytestmark = pytest.mark.integration

SETS = (
    "ray.num_workers=0",
    "data.train_dates=2026-01-01:2026-01-02",
    "data.eval_dates=2026-01-03",
    "train.global_batch_size=64",
    "train.num_epochs=2",
    "train.checkpoint_every_steps=100",
    "train.log_every_steps=1",
    "train.reader_threads=1",
    "model.hidden=[8]",
    "model.tower_hidden=[4]",
    "model.embedding_dim=4",
    "model.contrastive.group_size=16",
)
STEPS = 8


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "usr_ray.launch.trainer" or name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a job changes in its process."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    write_samples(folder, samples_spec(), num_rows=960, num_days=4)
    return folder


def train(lake: Path, run_dir: Path, *overrides: str) -> int:
    sets = [word for override in (*SETS, *overrides) for word in ("--set", override)]
    return run_job(job.main, ["--lake", str(lake), "--run-dir", str(run_dir), *sets])


def tensors(run_dir: Path) -> Mapping[str, torch.Tensor]:
    checkpoint = CheckpointStore(run_dir / "checkpoints").newest_valid()
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    return checkpoint.tensors


def test_a_run_that_was_asked_to_stop_goes_on_to_what_it_would_have_been(
    lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(lake, whole) == 0
    out = capsys.readouterr().out
    assert f"{whole}: finished at step {STEPS}" in out
    assert "data.eval_dates: " not in out
    metrics = json.loads((whole / "metrics.json").read_text())["eval"]
    assert metrics["all"]["ctr"]["num_samples"] > 100
    assert (whole / "predictions.parquet").is_file()

    plain = FileMonitor.on_step

    def on_step(self: FileMonitor, step: int, numbers: Mapping[str, float]) -> None:
        plain(self, step, numbers)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(FileMonitor, "on_step", on_step)
        with pytest.raises(SystemExit, match="1"):  # whoever waits for this job must not believe it finished
            train(lake, stopped)
    assert f"{stopped}: stopped at step 3" in capsys.readouterr().out
    assert json.loads((stopped / "config.json").read_text())["status"] == "running"
    assert train(lake, stopped) == 0
    assert "resumed at step 3 " in capsys.readouterr().out
    expected, found = tensors(whole), tensors(stopped)
    assert set(expected) == set(found)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    lines = [json.loads(line) for line in (stopped / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))

    assert train(lake, stopped) == 0
    assert f"{stopped}: this run is finished (step {STEPS})" in capsys.readouterr().out
    lost = (stopped / "metrics.json").read_bytes()
    (stopped / "metrics.json").unlink()
    assert train(lake, stopped) == 0
    assert f"resumed at step {STEPS} " in capsys.readouterr().out
    assert (stopped / "metrics.json").read_bytes() == lost
    before = (stopped / "config.json").read_bytes()
    assert train(lake, stopped, "train.learning_rate=0.5", "train.num_epochs=1") == 2
    assert "holds a run that has begun its epoch 2, this command has train.num_epochs = 1" in capsys.readouterr().err
    assert train(lake, stopped, "train.learning_rate=0.5") == 2
    assert "was trained to its end with train.learning_rate = 0.001, this command has 0.5" in capsys.readouterr().err
    assert (stopped / "config.json").read_bytes() == before


def test_a_finished_run_without_its_rows_prints_its_metrics_and_one_without_checkpoints_is_not_trained_anew(
    lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(lake, tmp_path / "run") == 0
    capsys.readouterr()
    rows = tmp_path / "run" / "predictions.parquet"
    rows.write_bytes(rows.read_bytes()[:-9])
    assert train(lake, tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith(f"error: {rows}: cannot be read (Parquet magic bytes not found in footer")
    rows.unlink()
    assert train(lake, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "this run is finished" in out
    assert "search" in out
    assert "warning: data.eval_dates" not in out
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    record = (tmp_path / "run" / "config.json").read_bytes()
    assert train(lake, tmp_path / "run") == 2
    assert capsys.readouterr().err == (
        f"error: --run-dir {tmp_path / 'run'}: is finished, but metrics.json and all checkpoints are gone; put the "
        "checkpoints back to evaluate again, or train in another --run-dir\n"
    )
    assert (tmp_path / "run" / "config.json").read_bytes() == record


def test_a_checkpoint_holds_whole_paths(lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever evaluates it from another folder would else make the cache there."""
    monkeypatch.chdir(tmp_path)
    assert train(lake, tmp_path / "run", "train.reader_cache=cache", "train.num_epochs=1") == 0
    state = CheckpointStore(tmp_path / "run" / "checkpoints").newest_state()
    assert state is not None
    assert state["config"]["train"]["reader_cache"] == str(tmp_path / "cache")


def test_a_training_says_which_held_out_rows_its_metrics_are_without_and_what_flatters_them(
    lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels of the last date take 25 hours, and the table's watermark lies half a day behind it."""
    table = DeltaTable(lake / SAMPLES).to_pyarrow_table().filter(pc.field("impression_date") == dt.date(2026, 1, 4))
    final, of_all = pc.sum(table["is_mature"]).as_py(), table.num_rows
    assert 0 < final < of_all
    assert train(lake, tmp_path, "data.eval_dates=2026-01-03:2026-01-04", "train.early_stopping=true") == 0
    out = capsys.readouterr().out
    third = json.loads((tmp_path / "metrics.json").read_text())["eval"]["all"]["ctr"]["num_samples"] - final
    lines = [
        f"warning: data.eval_dates: {third + final} of {third + of_all} rows are evaluated: labels of the others may "
        "still change",
        "warning: data.eval_dates: 2026-01-03:2026-01-04 also chose the epoch (train.early_stopping), which flatters",
    ]
    assert [line for line in out.splitlines() if "data.eval_dates: " in line] == lines
    assert train(lake, tmp_path, "data.eval_dates=2026-01-03:2026-01-04", "train.early_stopping=true") == 0
    again = capsys.readouterr().out
    assert "this run is finished" in again
    assert [line for line in again.splitlines() if "data.eval_dates: " in line] == lines


def test_a_copied_checkpoint_is_not_judged_on_dates_that_it_has_seen(
    lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two trainings back, and none of their run directories is left."""
    dates = ("2026-01-03", "2026-01-01")
    warm_start: tuple[str, ...] = ()
    for name, trained_on in zip(("a", "b"), dates, strict=True):
        sets = (f"data.train_dates={trained_on}", "data.eval_dates=2026-01-04", "data.mature_only=false")
        assert train(lake, tmp_path / name, *sets, "train.num_epochs=1", *warm_start) == 0
        (checkpoint,) = (tmp_path / name / "checkpoints").glob("step-*")
        shutil.copytree(checkpoint, tmp_path / f"models-{name}" / checkpoint.name)
        warm_start = (f"train.warm_start={tmp_path / f'models-{name}' / checkpoint.name}",)
        shutil.rmtree(tmp_path / name)
    shutil.rmtree(tmp_path / "models-a")
    capsys.readouterr()
    assert train(lake, tmp_path / "c", *warm_start) == 2
    refusal = "error: data.eval_dates {}: the run of train.warm_start was trained on {}, and held-out dates must come"
    assert capsys.readouterr().err.startswith(refusal.format("2026-01-03", "2026-01-03"))
    between = ("data.train_dates=2026-01-01", "data.eval_dates=2026-01-02", "data.mature_only=false")
    assert train(lake, tmp_path / "c", *warm_start, *between) == 2
    assert capsys.readouterr().err.startswith(refusal.format("2026-01-02", "dates after these (to 2026-01-03)"))


def test_a_submitted_job_wants_whole_paths_here_too(
    lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray job submit -- python jobs/train.py --set ray.num_workers=0` runs in a copy that is thrown away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "prepare_environment", lambda **_: SUBMITTED)
    assert train(lake, Path("run")) == 2
    assert capsys.readouterr().err.startswith("error: --run-dir run: is relative, and a submitted job runs in an upl")
    assert train(lake, tmp_path / "run", "train.reader_cache=cache") == 2
    assert capsys.readouterr().err.startswith("error: train.reader_cache cache: is relative, and a submitted job runs")
    assert not (tmp_path / "run").exists()


def test_two_trainings_in_one_directory_are_refused(
    lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert train(lake, tmp_path / "run") == 2
    expected = f"error: --run-dir {tmp_path / 'run'}: another process trains here; wait for it, or use another\n"
    assert capsys.readouterr().err == expected


def test_a_table_without_mature_rows_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(tmp_path / "lake", samples_spec(label_delay_us=10**15), num_rows=200, num_days=4)
    assert train(tmp_path / "lake", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "mature" in line
    assert not (tmp_path / "run").exists()


def test_workers_that_cannot_share_a_batch_are_refused_before_torch_is_loaded(
    lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert train(lake, tmp_path / "run", "ray.num_workers=5") == 2
    assert capsys.readouterr().err == (
        "error: 5 workers cannot share a global batch of 4 groups (train.global_batch_size 64 / "
        "model.contrastive.group_size 16): raise train.global_batch_size to at least 80 or lower ray.num_workers to at "
        "most 4\n"
    )


@pytest.mark.parametrize(("num_workers", "needed", "fewer"), [(0, 1, ""), (3, 3, "ray.num_workers=2, ")])
def test_a_gpu_each_is_wanted(num_workers: int, needed: int, fewer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: needed - 1)
    refusal = rf"ray.use_gpu: {needed} workers need a GPU each, this machine has {needed - 1}; set {fewer}ray.use_gpu="
    with pytest.raises(UserError, match=refusal):
        refuse_missing_gpus(RayConfig(use_gpu=True, num_workers=num_workers))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: needed)
    refuse_missing_gpus(RayConfig(use_gpu=True, num_workers=num_workers))
