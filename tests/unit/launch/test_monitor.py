"""history.jsonl, TensorBoard and Ray's metrics; Ray's own objects are replaced by a note of what was set."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from usr_ray.launch.monitor import FileMonitor, RayMetrics, RayMonitor, metric_tag

pytestmark = pytest.mark.unit

CELL = {"auc": 0.75, "gauc": None, "log_loss": 0.5, "pcoc": 1.0, "num_samples": 10, "num_positives": 3}
EVALUATION: Any = {"search": {"ctr": dict(CELL), "ctcvr": {**CELL, "auc": None}}}


class Recorder:
    """Stands in for ray.util.metrics: remembers the last value of each (name, tags)."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def __call__(self, kind: str, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        recorder = self
        assert description

        class Metric:
            def set(self, value: float, tags: dict[str, str]) -> None:
                assert kind == "gauge"
                assert set(tags) == set(tag_keys), "Ray refuses tags that were not declared"
                recorder.values[name, tuple(sorted(tags.items()))] = value

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert kind == "counter"
                assert set(tags) == set(tag_keys)
                key = name, tuple(sorted(tags.items()))
                recorder.values[key] = recorder.values.get(key, 0.0) + value

        return Metric()

    def named(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        return {tags: value for (metric, tags), value in self.values.items() if metric == name}


def rows(run_dir: Path) -> list[tuple[str, int]]:
    lines = (run_dir / "history.jsonl").read_text().splitlines()
    return [(row["kind"], row["step"]) for row in map(json.loads, lines)]


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def watch(run_dir: Path, *steps: int, loss: float, evaluate_at: tuple[int, ...] = ()) -> None:
    monitor = FileMonitor(run_dir)
    for step in steps:
        monitor.on_step(step, {"loss": loss, "loss/search/ctr": loss / 2})
        if step in evaluate_at:
            monitor.on_evaluation(step, EVALUATION)
    monitor.close()


def test_history_has_one_object_a_log_step_and_an_evaluation(tmp_path: Path) -> None:
    watch(tmp_path, 10, 20, loss=2.0, evaluate_at=(20,))
    first, _, last = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    assert first["loss"] == 2.0
    assert first["loss/search/ctr"] == 1.0
    assert rows(tmp_path) == [("train", 10), ("train", 20), ("eval", 20)]
    assert last["search/ctr/auc"] == 0.75
    assert last["search/ctcvr/auc"] is None
    assert scalars(tmp_path, "train/loss") == [(10, 2.0), (20, 2.0)]
    assert scalars(tmp_path, "eval/search/ctr/auc") == [(20, 0.75)]


def test_a_resumed_run_notes_every_step_once(tmp_path: Path) -> None:
    watch(tmp_path, 10, 20, 30, loss=2.0, evaluate_at=(10, 30))
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # the crash came in the middle of a line
    watch(tmp_path, 20, 30, 40, loss=1.0)
    assert rows(tmp_path) == [("train", 10), ("eval", 10), ("train", 20), ("train", 30), ("train", 40)]
    losses = [json.loads(line).get("loss") for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert losses == [2.0, None, 1.0, 1.0, 1.0]
    assert scalars(tmp_path, "train/loss") == [(10, 2.0), (20, 1.0), (30, 1.0), (40, 1.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer thread
def test_a_full_disk_costs_lines_but_neither_the_run_nor_the_lines_after(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard reads files in the order of their names. Those of one second end in a number that counts the writers
    # of the process, so that the tenth writer's file would be read before the ninth's.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10))
    wide = {f"loss/term-{n}": 0.123456789 for n in range(300)}
    monitor = FileMonitor(tmp_path)
    monitor.on_step(1, wide)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        for step in (2, 3, 4):
            monitor.on_step(step, wide)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len((tmp_path / "history.jsonl").read_text()) <= 20_000
    monitor.on_step(5, wide)
    monitor.close()
    found = rows(tmp_path)
    assert found[0] == ("train", 1)
    assert found[-1] == ("train", 5)
    assert len(found) < 5, "a line was lost, else this shows nothing"
    assert scalars(tmp_path, "loss/term-7")[-1][0] == 5
    assert caplog.text.count("the storage is full (File too large); training goes on") == 1


def test_an_evaluation_that_comes_first_after_a_resume_keeps_the_log_line_of_its_step(tmp_path: Path) -> None:
    watch(tmp_path, 10, 20, loss=2.0)
    monitor = FileMonitor(tmp_path)
    monitor.on_evaluation(20, EVALUATION)
    monitor.close()
    assert rows(tmp_path) == [("train", 10), ("train", 20), ("eval", 20)]
    assert scalars(tmp_path, "train/loss") == [(10, 2.0), (20, 2.0)]


def test_rank_0_publishes_what_is_shared_and_every_rank_its_own(tmp_path: Path) -> None:
    recorder = Recorder()
    for rank in (0, 1):
        monitor = RayMonitor(tmp_path, run_name="r", rank=rank, factory=recorder)
        monitor.on_step(50, {"loss": 2.0, "loss/search/ctr": 1.0, "samples_per_s": 900.0, "data_stall": 0.25 * rank})
        monitor.close()
    tags = [(("rank", str(rank)), ("run", "r")) for rank in (0, 1)]
    assert recorder.named("usr_ray_step") == dict.fromkeys(tags, 50.0)
    assert recorder.named("usr_ray_data_stall_fraction") == {tags[0]: 0.0, tags[1]: 0.25}
    assert recorder.named("usr_ray_loss") == {tags[0]: 2.0}
    assert recorder.named("usr_ray_loss_term") == {(*tags[0], ("term", "loss/search/ctr")): 1.0}
    assert recorder.named("usr_ray_attempts") == dict.fromkeys(tags, 1.0)


def test_no_time_is_left_of_a_run_that_early_stopping_ended(tmp_path: Path) -> None:
    recorder = Recorder()
    monitor = RayMonitor(tmp_path, run_name="r", rank=0, factory=recorder)
    monitor.on_step(50, {"eta_s": 7200.0})
    assert list(recorder.named("usr_ray_seconds_left").values()) == [7200.0]
    monitor.on_end()
    monitor.close()
    assert list(recorder.named("usr_ray_seconds_left").values()) == [0.0]
    assert rows(tmp_path) == [("train", 50)], "history.jsonl has lines of steps alone"


def test_auc_is_a_gauge_of_scenario_and_task_and_undefined_is_absent() -> None:
    recorder = Recorder()
    RayMetrics("r", 0, factory=recorder).on_evaluation(50, EVALUATION)
    tags = (("rank", "0"), ("run", "r"), ("scenario", "search"), ("task", "ctr"))
    assert recorder.named("usr_ray_auc") == {tags: 0.75}


def test_checkpoints_are_counted_by_outcome_and_their_age_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("usr_ray.launch.monitor.time.monotonic", lambda: now[0])
    recorder = Recorder()
    metrics = RayMetrics("r", 0, factory=recorder)
    now[0] = 130.0
    metrics.on_step(1, {})
    assert list(recorder.named("usr_ray_checkpoint_age_s").values()) == [30.0]
    metrics.on_checkpoint(1, None)
    assert list(recorder.named("usr_ray_checkpoint_age_s").values()) == [30.0]
    metrics.on_checkpoint(2, Path("step-00000002"))
    assert list(recorder.named("usr_ray_checkpoint_age_s").values()) == [0.0]
    assert {dict(tags)["outcome"]: n for tags, n in recorder.named("usr_ray_checkpoints").items()} == {
        "storage_full": 1.0,
        "written": 1.0,
    }


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("run-1.b (c)", "run-1.b (c)"),
        ("für-dich", "f%C3%BCr-dich"),
        ("50%", "50%25"),
        ("类", "%E7%B1%BB"),
        ('a"b\\c', "a%22b%5Cc"),
        ("x" * 300, "x" * 255),
    ],
)
def test_a_runs_name_becomes_a_tag_that_rays_metrics_take(name: str, tag: str) -> None:
    assert metric_tag(name) == tag
