"""Runs on Ray: what they leave, any number of workers, workers and drivers that are killed, what workers refuse."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deltalake import DeltaTable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import report, score
from tests.ray.conftest import (
    OVERRIDES,
    newest_step,
    processes,
    raylet_pid,
    small_config,
    training_workers,
    wait_for,
    weights,
)
from usr_ray.cli import run_job
from usr_ray.config import UserError
from usr_ray.data.manifest import build_manifest
from usr_ray.launch.alone import run_alone
from usr_ray.schema import TASKS

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


def history(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]


def evaluation(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text())["eval"]


@pytest.fixture(scope="module")
def unbroken(cluster: None, lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two workers that nothing happened to, in a folder whose name is no plain one."""
    from usr_ray.launch.trainer import run

    run_dir = tmp_path_factory.mktemp("unbroken") / "für-dich 北京 #1"
    summary = run(small_config(), lake, run_dir)
    assert (summary.outcome, summary.step, summary.was_finished) == ("finished", STEPS, False)
    return run_dir


def test_a_run_leaves_what_the_contract_names(unbroken: Path) -> None:
    metrics = evaluation(unbroken)
    assert set(metrics) == {"search", "recommendation", "global", "all"}
    assert all(set(cells) == set(TASKS) for cells in metrics.values())
    assert metrics["search"]["ctr"]["num_samples"] > 0
    record = json.loads((unbroken / "config.json").read_text())
    assert (record["status"], record["step"]) == ("finished", STEPS)
    (state, *_) = unbroken.glob("checkpoints/step-*/state.json")
    assert json.loads(state.read_text())["trained_dates"] == record["trained_dates"]
    assert (unbroken / "predictions.parquet").is_file()
    assert not (unbroken / "ray").exists(), "Ray's own files of an attempt are of no use to anyone"


def test_a_run_of_any_name_is_scored_and_reported(unbroken: Path, lake: Path, tmp_path: Path) -> None:
    output = tmp_path / "it's 50% of 北京 🙂"
    common = ["--run-dir", str(unbroken), "--lake", str(lake)]
    assert run_job(score.main, [*common, "--dates", "2026-01-05:2026-01-06", "--output", str(output / "scores")]) == 0
    table = DeltaTable(str(output / "scores")).to_pyarrow_table()
    assert table.num_rows == build_manifest(lake, dates=(dt.date(2026, 1, 5), dt.date(2026, 1, 6))).num_rows
    assert run_job(report.main, [*common[:2], "--output", str(output / "r.html")]) == 0
    assert unbroken.name in (output / "r.html").read_text(encoding="utf-8")


def test_every_log_step_and_evaluation_is_in_the_history_and_in_tensorboard(unbroken: Path) -> None:
    rows = history(unbroken)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(5, STEPS + 1, 5))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == list(range(10, STEPS + 1, 10))
    events = EventAccumulator(str(unbroken / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(5, STEPS + 1, 5))
    assert "eval/search/ctr/auc" in events.Tags()["scalars"]


def test_the_same_command_on_a_finished_run_says_so_and_trains_nothing(
    unbroken: Path, lake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from usr_ray.launch.trainer import run

    before = (unbroken / "config.json").read_text()
    summary = run(small_config(), lake, unbroken)
    assert summary.was_finished
    assert summary.metrics == evaluation(unbroken)
    assert "this run is finished" in capsys.readouterr().out
    assert (unbroken / "config.json").read_text() == before


def test_one_rank_without_ray_trains_what_two_workers_train(unbroken: Path, lake: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_alone(small_config("ray.num_workers=0"), lake, tmp_path / "run")
    signal.signal(signal.SIGTERM, before)
    assert_close_runs(tmp_path / "run", unbroken)


@pytest.mark.slow  # tests/unit/training/test_embeddings.py has the same loop on two gloo ranks
@pytest.mark.skipif(
    importlib.util.find_spec("torchrec") is None,
    reason="TorchRec is not installed; `make setup` does it (setup.cfg, extra [sharded])",
)
def test_two_workers_with_sharded_tables_train_what_two_train(unbroken: Path, lake: Path, tmp_path: Path) -> None:
    from usr_ray.launch.trainer import run

    run(small_config("train.embedding_strategy='sharded'"), lake, tmp_path / "run")
    assert_close_runs(tmp_path / "run", unbroken)


def assert_close_runs(run_dir: Path, unbroken: Path) -> None:
    one, two = weights(run_dir), weights(unbroken)
    assert set(one) == set(two)
    for name, tensor in one.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, two[name], rtol=2e-3, atol=2e-4, msg=lambda text, name=name: name + text)
    aucs = [
        [cells[task]["auc"] for cells in evaluation(folder).values() for task in TASKS]
        for folder in (run_dir, unbroken)
    ]
    assert aucs[0] == pytest.approx(aucs[1], abs=2e-3)


def test_a_killed_worker_costs_only_the_steps_since_the_checkpoint_and_one_asked_to_end_ends_the_run(
    unbroken: Path, lake: Path, tmp_path: Path
) -> None:
    """A worker is killed, one of the group that is started again is asked to end, and the same call goes on."""
    from usr_ray.launch.trainer import run

    run_dir = tmp_path / "run"
    killed: list[int] = []

    def disturb() -> None:
        wait_for(lambda: newest_step(run_dir) >= 15)
        workers = training_workers()
        assert len(workers) == 2
        os.kill(workers[-1], signal.SIGKILL)
        killed.append(newest_step(run_dir))
        wait_for(lambda: newest_step(run_dir) > killed[0] and len(set(training_workers()) - set(workers)) == 2)
        os.kill(max(set(training_workers()) - set(workers)), signal.SIGTERM)

    thread = threading.Thread(target=disturb)
    thread.start()
    stopped = run(small_config(), lake, run_dir)
    thread.join()
    assert killed
    assert 15 <= killed[0] < STEPS, "the kill came after the end; make the run longer"
    assert stopped.outcome == "stopped"
    assert killed[0] < stopped.step < STEPS, "the signal came after the end; make the run longer"
    assert newest_step(run_dir) == stopped.step

    summary = run(small_config(), lake, run_dir)
    assert (summary.outcome, summary.step, summary.was_finished) == ("finished", STEPS, False)
    expected, found = weights(unbroken), weights(run_dir)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps = [row["step"] for row in history(run_dir) if row["kind"] == "train"]
    expected_steps = sorted({*range(5, STEPS + 1, 5), stopped.step})  # a run that stops says where
    assert steps == expected_steps, "each step once, although some were trained twice"


# The test above has a worker that is asked, tests/ray/test_local_ray.py a job that is stopped and gone on with.
@pytest.mark.slow
def test_a_worker_asked_to_end_ends_the_run_with_all_others_and_a_killed_driver_is_gone_on_with(
    unbroken: Path, lake: Path, tmp_path: Path
) -> None:
    """Each part goes on with the last; the second one as a user runs the job, alone with a Ray of its own, killed."""
    from usr_ray.launch.trainer import run

    run_dir = tmp_path / "run"
    by_epoch = "train.checkpoint_every_steps=1000"  # but at the end of each epoch, of 10 steps
    config = small_config(by_epoch)

    def terminate() -> None:
        wait_for(lambda: newest_step(run_dir) >= 10)
        os.kill(training_workers()[-1], signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    stopped = run(config, lake, run_dir)
    thread.join()
    assert stopped.outcome == "stopped"
    assert 10 < stopped.step < STEPS, "the signal came after the end; make the run longer"
    assert newest_step(run_dir) == stopped.step

    overrides = [word for override in (*OVERRIDES, by_epoch) for word in ("--set", override)]
    command = [sys.executable, "jobs/train.py", "--lake", lake, "--run-dir", run_dir, *overrides]
    log = tmp_path / "log"
    with log.open("w") as file:
        job = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=file, stderr=file)
        try:
            # Ray brings the worker's words here a second late, by when it may have saved the next checkpoint.
            said = f"resumed at step {stopped.step} "
            wait_for(
                lambda: (newest_step(run_dir) > stopped.step and said in log.read_text()) or job.poll() is not None
            )
        finally:
            job.kill()
            job.wait()
    assert said in log.read_text()
    assert stopped.step < newest_step(run_dir) < STEPS, log.read_text()[-2000:]

    summary = run(config, lake, run_dir)
    assert (summary.outcome, summary.step, summary.was_finished) == ("finished", STEPS, False)
    expected, found = weights(unbroken), weights(run_dir)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow  # tests/ray/test_study.py has the line of two workers that end, tests/unit/data that of a lost file
def test_what_a_worker_refuses_is_the_users_one_line(cluster: None, lake: Path, tmp_path: Path) -> None:
    from usr_ray.launch.trainer import run
    from usr_ray.runs.plan import plan_run, write_plan

    own_lake = Path(shutil.copytree(lake, tmp_path / "lake"))
    plan = plan_run(small_config(), own_lake, tmp_path / "run")
    write_plan(plan)
    lost = own_lake / "samples" / plan.train_manifest.files[0].path
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        run(small_config(), own_lake, tmp_path / "run")


@pytest.mark.parametrize("flag", ["--lake", "--run-dir"])
def test_a_submitted_job_needs_whole_paths(flag: str, lake: Path, tmp_path: Path) -> None:
    from usr_ray.launch.trainer import run

    paths = {"--lake": lake, "--run-dir": tmp_path / "run"} | {flag: Path("runs/demo")}
    with pytest.raises(UserError, match=rf"{flag} runs/demo: is relative, .*; give the whole path"):
        run(small_config(), paths["--lake"], paths["--run-dir"], cluster="submitted")


def test_more_gpus_than_the_machine_has_are_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from usr_ray.config import RayConfig
    from usr_ray.launch.session import ray_session

    config = RayConfig(use_gpu=True, num_workers=torch.cuda.device_count() + 1)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the folder's own Ray stays as it is
    monkeypatch.delattr(ray, "init")
    with pytest.raises(UserError, match=r"ray.use_gpu: .* need a GPU each"), ray_session(config, cluster="own"):
        pass


def test_no_run_starts_actors_of_ray_that_would_do_nothing() -> None:
    from ray.train.torch import TorchTrainer

    from usr_ray.launch import trainer

    of_ray, of_ours, on_own_ray = (
        {type(callback).__name__ for callback in kind(print)._create_default_callbacks()}
        for kind in (TorchTrainer, trainer._Trainer, trainer._LocalTrainer)
    )
    assert of_ray - of_ours == {"DatasetsCallback"}
    assert of_ours - on_own_ray == {"PlacementGroupCleanerCallback"}


def test_ray_has_the_private_names_by_which_a_run_is_shorter() -> None:
    """Where one is gone, nothing breaks, but an actor is started again, or an end takes a second more."""
    from ray._private.node import Node
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    from usr_ray.launch.trainer import POLICY_REQUESTS

    assert callable(Node.kill_monitor)
    assert all(callable(getattr(FixedScalingPolicy, name)) for name in POLICY_REQUESTS)


ACTORS_LEFT_OUT = ("ray::PlacementGroupCleaner", "ray::_AutoscalingCoordinator")


def test_workers_that_were_started_ahead_wait_for_their_run_and_train_what_others_train(
    unbroken: Path, lake: Path, tmp_path: Path
) -> None:
    from usr_ray.launch.trainer import run, workers_ahead

    run_dir, others = tmp_path / "run", set(processes(ACTORS_LEFT_OUT, parent=raylet_pid()))
    seen: list[set[int]] = []

    def look() -> None:
        wait_for(lambda: newest_step(run_dir) > 0)
        seen.append(set(training_workers()))

    with workers_ahead(small_config(), run_dir):
        wait_for(lambda: len(training_workers()) == 2)
        waiting = set(training_workers())
        assert not (run_dir / "config.json").exists()
        thread = threading.Thread(target=look)
        thread.start()
        summary = run(small_config(), lake, run_dir)
        thread.join()
    assert (summary.outcome, summary.step) == ("finished", STEPS)
    assert seen == [waiting], "others trained than those that waited"
    assert set(processes(ACTORS_LEFT_OUT, parent=raylet_pid())) <= others
    expected, found = weights(unbroken), weights(run_dir)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_workers_that_no_run_took_end_with_the_block(cluster: None, tmp_path: Path) -> None:
    from usr_ray.launch.trainer import workers_ahead

    with workers_ahead(small_config(), tmp_path / "run"):
        wait_for(lambda: len(training_workers()) == 2)
    assert not list((tmp_path / "run").iterdir())
    assert "fit" not in [thread.name for thread in threading.enumerate()]
    wait_for(lambda: not training_workers())


def test_a_run_whose_workers_failed_before_it_came_starts_others(
    cluster: None, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from usr_ray.launch import trainer

    results: list[object] = [RuntimeError("killed for its memory, beside a JVM")]

    def fit(_: object) -> object:
        if isinstance(found := results.pop(), BaseException):
            raise found
        return found

    monkeypatch.setattr(trainer._LocalTrainer, "fit", fit)
    with trainer.workers_ahead(small_config(), tmp_path / "run"):
        wait_for(lambda: not results and "fit" not in [thread.name for thread in threading.enumerate()])
        results.append(SimpleNamespace(return_value={"outcome": "stopped", "step": 3}))
        summary = trainer.run(small_config(), lake, tmp_path / "run")
    assert (summary.outcome, summary.step, results) == ("stopped", 3, [])


def test_a_worker_waits_until_its_configuration_is_whole(tmp_path: Path) -> None:
    from usr_ray.launch.trainer import wait_for_order

    path, config = tmp_path / "order.json", small_config()
    whole, found = json.dumps(config.to_dict()), []
    path.touch()
    thread = threading.Thread(target=lambda: found.append(wait_for_order(path)), daemon=True)
    thread.start()
    for part in ("", whole[:100]):
        path.write_text(part)
        thread.join(0.3)
        assert thread.is_alive()
    path.write_text(whole)
    thread.join(30)
    assert found == [config]


def test_the_demo_goes_on_where_workers_cannot_be_started_ahead(cluster: None, tmp_path: Path) -> None:
    from jobs import demo
    from usr_ray.launch import trainer

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(trainer, "reserve_refusal", lambda path: path.write_text("no such folder"))
        demo.load_ahead(small_config(), tmp_path / "run", stack, cluster="own", serves=False)
        assert not trainer._ahead
