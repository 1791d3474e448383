"""The loop on small Delta tables: it learns, resumes bit for bit, agrees over ranks and leaks no label."""

from __future__ import annotations

import dataclasses
import datetime as dt
import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable

from tests.unit.samples_table import read_manifests
from tests.unit.two_ranks import run_ranks
from usr_ray.config import Config, ConfigError
from usr_ray.data.batch import UsrBatch, UsrOutputs
from usr_ray.data.manifest import Manifest
from usr_ray.evaluation.metrics import CellMetrics
from usr_ray.model.embedding import EmbeddingTables, Lookup
from usr_ray.model.multitask import REST_SHARE
from usr_ray.model.usr import UsrModel
from usr_ray.schema import OPEN_LABEL, TASKS, FeatureSpec
from usr_ray.training import checkpoint
from usr_ray.training.checkpoint import CheckpointError, CheckpointStore
from usr_ray.training.evaluate import evaluate, load_run
from usr_ray.training.loop import TrainError, TrainResult, train
from usr_ray.training.monitor import Monitor, StepMeter, summarise
from usr_ray.training.rows import training_reader
from usr_ray.training.state import refusal
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration

NUM_STEPS = 8
"""Steps of an epoch of the table below."""


def make_config(**changes: Any) -> Config:
    """USR round SharedBottom, small; a change is named section_key, or section for all of it."""
    raw: dict[str, Any] = {
        "data": {"train_dates": "2026-01-01:2026-01-03", "eval_dates": "2026-01-04"},
        "model": {
            "embedding_dim": 4,
            "trigger_dim": 4,
            "hidden": [8],
            "tower_hidden": [4],
            "interest": {"rank": 2, "over_parameterisation": 4},
            "generator": {"hidden": 4},
            "contrastive": {"group_size": 16},
        },
        "train": {
            "global_batch_size": 64,
            "num_epochs": 1,
            "checkpoint_every_steps": 100,
            "learning_rate": 0.01,
            "reader_threads": 1,
            "log_every_steps": 4,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("_")
        if name:
            raw[section][name] = value
        else:
            raw[section] = value
    return Config.from_dict(raw)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of `one_epoch`; tests leave it as it is."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def one_epoch(manifests: tuple[Manifest, Manifest], finished_run: Path) -> TrainResult:
    """Of make_config(), as the next: what other runs end as, which tests leave as it is."""
    return run(make_config(), (manifests[0], None), finished_run)


@pytest.fixture(scope="module")
def two_epochs(manifests: tuple[Manifest, Manifest], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(make_config(train_num_epochs=2), (manifests[0], None), tmp_path_factory.mktemp("two"))


class Watcher(Monitor):
    """Keeps what it is told; asks the worker to stop at `stop_at`."""

    def __init__(self, worker: LocalWorker | None = None, stop_at: int = -1) -> None:
        self.worker, self.stop_at = worker, stop_at
        self.steps: dict[int, Mapping[str, float]] = {}
        self.evaluations: list[int] = []
        self.checkpoints: list[tuple[int, Path | None]] = []
        self.num_ends = 0

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = metrics
        if step == self.stop_at and self.worker is not None:
            self.worker.request_stop()

    def on_evaluation(self, step: int, metrics: CellMetrics) -> None:
        self.evaluations.append(step)

    def on_checkpoint(self, step: int, path: Path | None) -> None:
        self.checkpoints.append((step, path))

    def on_end(self) -> None:
        self.num_ends += 1


def run(
    config: Config,
    manifests: tuple[Manifest, Manifest | None],
    run_dir: Path,
    watcher: Watcher | None = None,
    worker: LocalWorker | None = None,
) -> TrainResult:
    return train(
        config,
        worker or LocalWorker("cpu"),
        train_manifest=manifests[0],
        eval_manifest=manifests[1],
        run_dir=run_dir,
        monitor=watcher,
    )


def assert_equal_states(one: TrainResult, other: TrainResult) -> None:
    mine, theirs = one.state.tensors(), other.state.tensors()
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different


def assert_close_states(one: TrainResult, other: TrainResult) -> None:
    mine, theirs = one.state.tensors(), other.state.tensors()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_loop_trains_what_torch_compiles_and_keeps_the_model_itself(
    manifests: tuple[Manifest, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    steps: list[int] = []

    class Compiled(torch.nn.Module):
        """What torch.compile gives: a module that has the other and calls it."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.inner = module
            compiled.append(module)

        def forward(self, *given: Any, **more: Any) -> Any:
            steps.append(len(steps))
            return self.inner(*given, **more)

    changes = {"model_backbone": "mmoe", "train_global_batch_size": 512}
    plain = run(make_config(**changes), (manifests[0], None), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", Compiled)
    found = run(make_config(**changes, train_compile=True), (manifests[0], None), tmp_path / "compiled")
    assert compiled == [found.state.module]
    assert len(steps) == found.step == plain.step
    assert_close_states(found, plain)


# tests/unit/model/test_backbones.py traces the model whole; the test above has what the loop does with it.
@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(
    manifests: tuple[Manifest, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Dynamo traces it, with torch's own kernels; what Inductor makes of it needs minutes and a compiler."""
    compiled_modules: list[torch.nn.Module] = []
    compile_model = torch.compile

    def with_own_kernels(module: torch.nn.Module) -> torch.nn.Module:
        compiled_modules.append(module)
        return compile_model(module, backend="eager")  # type: ignore[return-value]

    monkeypatch.setattr(torch, "compile", with_own_kernels)
    changes = {"model_backbone": "mmoe", "train_global_batch_size": 512}
    plain = run(make_config(**changes), (manifests[0], None), tmp_path / "plain")
    assert not compiled_modules
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    try:
        compiled = run(make_config(**changes, train_compile=True), (manifests[0], None), tmp_path / "compiled")
        assert compiled_modules == [compiled.state.module]
        assert len(torch._dynamo.utils.counters["stats"]), "nothing was traced"
    finally:
        torch.compiler.reset()
    assert_close_states(compiled, plain)


def test_the_loss_falls_and_the_numbers_are_reported(
    manifests: tuple[Manifest, Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watcher, worker = Watcher(), LocalWorker("cpu")
    reports: list[Mapping[str, float]] = []
    monkeypatch.setattr(worker, "report", reports.append)
    result = run(make_config(train_num_epochs=6), manifests, tmp_path, watcher, worker)
    assert (result.status, result.step) == ("finished", 6 * NUM_STEPS)
    losses = [m["loss/search/ctr"] + m["loss/recommendation/ctr"] for m in watcher.steps.values()]
    assert losses[-1] < 0.8 * losses[0]
    last = watcher.steps[6 * NUM_STEPS]
    assert 0 <= last["data_stall"] <= 1
    assert last["samples_per_s"] > 0
    assert last["eta_s"] == 0
    assert watcher.evaluations == [NUM_STEPS * n for n in range(1, 7)]
    assert result.evaluation is not None
    assert result.evaluation.metrics is not None
    assert reports[-1]["log_loss"] == summarise(result.evaluation.metrics)["log_loss"]
    lines = [line for line in capsys.readouterr().out.splitlines() if " step 8/48 " in line]
    assert len(lines) == 1
    assert re.search(r"epoch 1/6 step 8/48 loss [\d.]+ [\d,]+ samples/s data stall \d+% left 0:00:\d\d", lines[0])


def test_what_is_logged_of_a_cell_is_the_mean_over_the_rows_that_have_its_label(
    manifests: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    """In small batches, of which some hold no search row, and with orders still open in the last two days; a last batch
    that is not full. The weights stand still, so that the plain mean over all rows of the epoch is what was logged.
    """
    still = {"train_learning_rate": 1e-12, "train_embedding_learning_rate": 1e-12}
    once = {"train_log_every_steps": 10_000, "train_checkpoint_every_steps": 10_000}
    small = {"train_global_batch_size": 4, "model_contrastive": {"group_size": 4, "every_nth_group": 1}}
    config = make_config(**still, **once, **small, data_final_labels="clicks")
    table = manifests[0]
    spec = dataclasses.replace(table.spec, label_delay_us=40 * 3_600_000_000)
    slow = dataclasses.replace(table, spec=spec)
    watcher = Watcher()
    result = run(config, (slow, None), tmp_path, watcher)
    model, tables = result.state.module.eval(), result.state.tables
    model.get_buffer(REST_SHARE).fill_(1)  # training does not see them
    labels, losses, scenarios, found_in = [], [], [], []
    with training_reader(config, slow) as reader, torch.inference_mode():
        for batch in reader.batches(0):
            kept_B = batch.weights_B > 0
            outputs = model(batch, tables.lookup(batch))
            log_p = torch.cat([outputs.log_p_BT, outputs.log_p_global_BT], 1).double()[kept_B]
            own = batch.labels_BT[kept_B].double()
            losses.append(-torch.where(own > 0, log_p, torch.log1p(-log_p.exp())))
            labels.append(own)
            scenarios.append(batch.scenario_B[kept_B])
            found_in.append(set(scenarios[-1].tolist()))
    known = torch.cat(labels) != OPEN_LABEL
    loss, scenario = torch.cat(losses), torch.cat(scenarios)
    assert 0.1 < known[:, 1].double().mean() < 0.9, "some orders are open"
    assert min(map(len, found_in)) < len(spec.scenarios), "some steps have no row of a scenario"
    last = watcher.steps[len(found_in)]
    for s, name in enumerate(spec.scenarios):
        for t, task in enumerate(TASKS):
            rows = known[:, t] & (scenario == s)
            assert last[f"loss/{name}/{task}"] == pytest.approx(float(loss[rows, t].mean()), rel=1e-5)
    for t, task in enumerate(TASKS):
        assert last[f"loss/global/{task}"] == pytest.approx(float(loss[known[:, t], 2 + t].mean()), rel=1e-5)


def test_a_window_without_a_row_of_a_cell_has_no_loss_of_it() -> None:
    """Two search rows in the first step, none in the second: 4 a row, where a mean of the steps' means would be 2."""
    meter, number = StepMeter(LocalWorker("cpu")), torch.tensor
    search, rest = [(number(8.0), number(2.0)), (number(0.0), number(0.0))], [(number(1.0), number(2.0))] * 2
    for own, others in zip(search, rest, strict=True):
        meter.add({"loss": number(3.0)}, {"loss/search/ctr": own, "loss/b/ctr": others}, number(1.0), num_rows=4)
    found = meter.read()
    assert (found["loss"], found["loss/search/ctr"], found["loss/b/ctr"]) == (3.0, 4.0, 0.5)
    meter.add({"loss": number(3.0)}, {"loss/search/ctr": search[1], "loss/b/ctr": rest[0]}, number(1.0), num_rows=2)
    found = meter.read()
    assert "loss/search/ctr" not in found, "0 would be a perfect fit"
    assert found["loss/b/ctr"] == 0.5


def test_progress_is_nine_lines_however_often_a_run_logs(
    manifests: tuple[Manifest, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = Watcher()
    run(make_config(train_num_epochs=2, train_log_every_steps=1), (manifests[0], None), tmp_path, watcher)
    assert len(watcher.steps) == 16, "history, TensorBoard and Ray have every one"
    steps = re.findall(r"step (\d+)/16 loss", capsys.readouterr().out)
    assert steps == ["1", "2", "4", "6", "8", "10", "12", "14", "16"]


def test_evaluations_come_as_often_as_asked_and_at_the_end(
    manifests: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    watcher = Watcher()
    result = run(make_config(train_num_epochs=3, train_evaluate_every_epochs=2), manifests, tmp_path, watcher)
    assert watcher.evaluations == [2 * NUM_STEPS, 3 * NUM_STEPS]
    assert result.evaluation is not None


@pytest.fixture(scope="module")
def unbroken(manifests: tuple[Manifest, Manifest], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(stoppable_config(), (manifests[0], None), tmp_path_factory.mktemp("unbroken"))


def stoppable_config() -> Config:
    return make_config(
        train_num_epochs=2, train_log_every_steps=1, train_warmup_steps=6, train_schedule="cosine", model_dropout=0.2
    )


@pytest.mark.parametrize("stop_at", [1, pytest.param(5, marks=pytest.mark.slow), NUM_STEPS, NUM_STEPS + 3])
def test_a_run_stopped_at_any_step_resumes_bit_for_bit(
    manifests: tuple[Manifest, Manifest], unbroken: TrainResult, tmp_path: Path, stop_at: int
) -> None:
    config = stoppable_config()
    worker = LocalWorker("cpu")
    stopped = run(config, (manifests[0], None), tmp_path / "run", Watcher(worker, stop_at), worker)
    # The flag is seen with the row counts of the step after the one it was raised in.
    assert (stopped.status, stopped.step) == ("stopped", stop_at + 1)
    resumed = run(config, (manifests[0], None), tmp_path / "run")
    assert (resumed.status, resumed.step) == ("finished", 2 * NUM_STEPS)
    assert_equal_states(unbroken, resumed)


def test_a_torn_checkpoint_costs_steps_but_no_bits(manifests: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    config = make_config(train_checkpoint_every_steps=3)
    unbroken = run(config, (manifests[0], None), tmp_path)
    torn = tmp_path / "checkpoints" / f"step-{NUM_STEPS:08d}" / "tensors.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    watcher = Watcher()
    assert_equal_states(unbroken, run(config, (manifests[0], None), tmp_path, watcher))
    assert [step for step, _ in watcher.checkpoints] == [NUM_STEPS], "steps 7 and 8 again, from the checkpoint of 6"


def fill_disk(monkeypatch: pytest.MonkeyPatch, *, steps: set[int]) -> None:
    """The storage takes no tensors of the checkpoints of these steps."""

    def write(folder: Path, tensors: Mapping[str, torch.Tensor], state: str, *, whole: Any = checkpoint._write) -> None:
        if int(folder.name.split("-")[1].split(".")[0]) in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        whole(folder, tensors, state)

    monkeypatch.setattr(checkpoint, "_write", write)


def test_a_full_disk_costs_checkpoints_but_not_the_run(
    manifests: tuple[Manifest, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, steps={3, 6})
    watcher = Watcher()
    result = run(make_config(train_checkpoint_every_steps=3), (manifests[0], None), tmp_path, watcher)
    assert result.status == "finished"
    last = tmp_path / "checkpoints" / f"step-{NUM_STEPS:08d}"
    assert watcher.checkpoints == [(3, None), (6, None), (NUM_STEPS, last)]


def test_a_run_whose_last_checkpoint_finds_no_room_has_no_result_until_it_is_resumed(
    manifests: tuple[Manifest, Manifest], one_epoch: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished without its last weights, it would be evaluated and scored with older ones."""
    config = make_config(train_checkpoint_every_steps=3)
    with monkeypatch.context() as full:
        fill_disk(full, steps={NUM_STEPS})
        with pytest.raises(CheckpointError, match=rf"step {NUM_STEPS} not written .* run the same command"):
            run(config, (manifests[0], None), tmp_path / "run")
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == [3, 6]
    assert_equal_states(one_epoch, run(config, (manifests[0], None), tmp_path / "run"))


def test_a_best_epoch_that_finds_no_room_is_not_passed_over(
    manifests: tuple[Manifest, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, *_: Any, whole: Any = checkpoint._write) -> None:
        if folder.name.startswith("best-"):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        whole(folder, *_)

    monkeypatch.setattr(checkpoint, "_write", refuse)
    with pytest.raises(CheckpointError, match="without it the run has no result"):
        run(make_config(train_num_epochs=2, train_early_stopping=True), manifests, tmp_path)


def test_a_finished_run_started_again_only_evaluates(manifests: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    first = run(make_config(), manifests, tmp_path)
    watcher = Watcher()
    again = run(make_config(), manifests, tmp_path, watcher)
    assert_equal_states(first, again)
    assert (watcher.steps, watcher.evaluations) == ({}, [NUM_STEPS])
    assert first.evaluation is not None
    assert again.evaluation is not None
    assert first.evaluation.metrics == again.evaluation.metrics


class SameRank(LocalWorker):
    """The same rank with a stop flag of its own."""

    def __init__(self, worker: LocalWorker) -> None:
        super().__init__(worker.device)


AVERAGED = make_config(train_average=0.8)


def first_gradients(worker: LocalWorker, manifests: tuple[Manifest, Manifest], folder: Path) -> dict[str, torch.Tensor]:
    """One step; its gradients as the optimisers' states hold them.

    STAR besides the plain backbone: its statistics are reduced inside the model. Later steps say less of it: directions
    that its normalisation makes flat have rounding for a gradient, which Adam turns into whole steps.
    """
    found = {}
    for backbone in ("shared_bottom", "star"):
        asked = SameRank(worker)
        asked.request_stop()
        result = run(make_config(model_backbone=backbone), (manifests[0], None), folder / backbone, None, asked)
        assert (result.status, result.step) == ("stopped", 1)
        for name, tensor in result.state.tensors().items():
            if name.endswith("/exp_avg") or name.startswith("adagrad/"):
                found[f"{backbone}/{name}"] = tensor.clone()
    return found


def _two_ranks(worker: LocalWorker, folder: Path) -> dict[str, torch.Tensor]:
    manifests = read_manifests(folder / "lake")
    found = first_gradients(worker, manifests, folder / "first")
    watcher = Watcher(worker if worker.rank == 1 else None, stop_at=4)  # one rank is asked, both stop
    stopped = run(AVERAGED, (manifests[0], None), folder / "run", watcher, worker)
    assert (stopped.status, stopped.step) == ("stopped", 5)
    result = run(AVERAGED, manifests, folder / "epoch", None, SameRank(worker))
    found |= {f"epoch/{name}": tensor.clone() for name, tensor in result.state.tensors().items()}
    metrics = result.evaluation.metrics if result.evaluation else None
    log_loss = summarise(metrics)["log_loss"] if metrics else None
    found["log_loss"] = torch.tensor(-1.0 if log_loss is None else log_loss, dtype=torch.float64)
    result.state.check_replicas(worker)
    if worker.rank == 1:
        result.state.tables.tables["item_id"][3, 1] += 1e-6
    with pytest.raises(RuntimeError, match=r"step 8: the replicas of the weights differ \(hashes by rank: \["):
        result.state.check_replicas(worker)
    return found


def test_two_ranks_agree_bitwise_with_each_other_and_closely_with_one(
    lake: Path, manifests: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    (tmp_path / "lake").symlink_to(lake)
    first, second = run_ranks(_two_ranks, 2, tmp_path)
    for name in first:
        assert torch.equal(first[name], second[name]) or name == "log_loss", f"{name}: the replicas drifted apart"
    for name, tensor in first_gradients(LocalWorker("cpu"), manifests, tmp_path / "first-alone").items():
        atol = 1e-4 * float(tensor.abs().max()) + 1e-9
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    alone = run(AVERAGED, manifests, tmp_path / "alone")
    for name, tensor in alone.state.tensors().items():
        if name.startswith(("model/", "tables/", "average")):
            torch.testing.assert_close(first[f"epoch/{name}"], tensor, rtol=1e-3, atol=1e-4)
    assert alone.evaluation is not None
    assert alone.evaluation.metrics is not None
    assert float(first["log_loss"]) == pytest.approx(summarise(alone.evaluation.metrics)["log_loss"], abs=1e-5)
    assert float(second["log_loss"]) == -1.0, "metrics are rank 0's alone"
    # Two ranks stopped after step 5; one rank goes on from their checkpoint.
    resumed = run(AVERAGED, (manifests[0], None), tmp_path / "run")
    assert resumed.step == NUM_STEPS
    for name, tensor in resumed.state.tables.tables.items():
        torch.testing.assert_close(tensor, first[f"epoch/tables/{name}"], rtol=1e-3, atol=1e-4)


def test_each_step_draws_its_own_masks(
    manifests: tuple[Manifest, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    forward = UsrModel.forward

    def noted(self: UsrModel, batch: UsrBatch, lookup: Lookup, step_seed: int = 0) -> UsrOutputs:
        if self.training:
            seeds.append(step_seed)
        return forward(self, batch, lookup, step_seed)

    monkeypatch.setattr(UsrModel, "forward", noted)
    run(make_config(), (manifests[0], None), tmp_path / "a")
    run(make_config(train_seed=1), (manifests[0], None), tmp_path / "b")
    assert len(set(seeds)) == 2 * NUM_STEPS


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.precision must be 'float32' or 'bf16', got 'fp8'"):
        make_config(train_precision="fp8")


def changed(manifest: Manifest, **changes: Any) -> Manifest:
    return dataclasses.replace(manifest, **changes)


def other_spec(spec: FeatureSpec) -> FeatureSpec:
    return dataclasses.replace(spec, history_length=spec.history_length + 1)


@pytest.mark.parametrize(
    ("config", "manifest_change", "message"),
    [
        (
            make_config(),
            lambda m: changed(m, sha256="f" * 64),
            r"trained on other rows \(manifest .* than this run reads \(manifest ffffffffffff .*; "
            "train in another --run-dir, or pin the table version and dates",
        ),
        (make_config(), lambda m: changed(m, spec=other_spec(m.spec)), "the table's features changed"),
        (
            make_config(model_embedding_dim=8),
            lambda m: m,
            "it has model.embedding_dim = 4, this run 8; set it back, or train in another --run-dir",
        ),
        (
            make_config(model_contrastive={"group_size": 32}),
            lambda m: m,
            "model.contrastive.group_size = 16, this run 32",
        ),
        (
            make_config(model_contrastive={"group_size": 16, "every_nth_group": 1}),
            lambda m: m,
            "model.contrastive.every_nth_group = 4, this run 1",
        ),
        (make_config(train_seed=1), lambda m: m, "train.seed = 0, this run 1"),
        (make_config(train_global_batch_size=128), lambda m: m, "train.global_batch_size = 64, this run 128"),
        (make_config(train_reader_shards=2), lambda m: m, "train.reader_shards = 1, this run 2"),
        (make_config(data_mature_only=False), lambda m: m, "data.mature_only = True, this run False"),
        (make_config(train_order="by_date"), lambda m: m, "train.order = 'shuffled', this run 'by_date'"),
        (make_config(train_early_stopping=True), lambda m: m, "train.early_stopping = False, this run True"),
    ],
)
def test_a_checkpoint_of_other_rows_or_another_model_is_refused(
    manifests: tuple[Manifest, Manifest],
    one_epoch: TrainResult,
    finished_run: Path,
    config: Config,
    manifest_change: Any,
    message: str,
) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        run(config, (manifest_change(manifests[0]), None), finished_run)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_without_keys_that_came_later_is_gone_on_with(
    one_epoch: TrainResult, finished_run: Path, manifests: tuple[Manifest, Manifest]
) -> None:
    found = CheckpointStore(finished_run / "checkpoints").newest_valid()
    assert found is not None
    order = training_reader(make_config(), manifests[0]).fingerprint
    del found.state["config"]["model"]["multitask"], found.state["config"]["train"]["reader_shards"]
    assert refusal(found, make_config(), manifests[0], order) is None
    assert "train.reader_shards = 1, this run 2" in str(
        refusal(found, make_config(train_reader_shards=2), manifests[0], order)
    )


def test_other_learning_rates_and_more_epochs_may_continue(
    manifests: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    run(make_config(), (manifests[0], None), tmp_path)
    longer = run(make_config(train_num_epochs=2, train_learning_rate=0.1), (manifests[0], None), tmp_path)
    assert longer.step == 2 * NUM_STEPS


def test_rows_whose_labels_close_after_the_train_cut_off_do_not_count(manifests: tuple[Manifest, Manifest]) -> None:
    """Windows close 25 h after the impression: of days 1 to 3 only rows up to day 2, 23:00 may be trained on."""
    manifest = manifests[0]
    reader = training_reader(make_config(), manifest)
    with reader:
        batches = list(reader.batches(0))
    kept = torch.cat([b.row_number_B[b.weights_B > 0] for b in batches])
    times = pa.table(DeltaTable(manifest.table_uri).to_pyarrow_table(columns=["event_time"])).column("event_time")
    cut_off = dt.datetime(2026, 1, 2, 23, tzinfo=dt.UTC)
    expected = sum(time <= cut_off for time in times.to_pylist())
    assert len(kept) == expected
    assert 0 < expected < manifest.num_rows


def test_decoded_rows_kept_on_disk_change_no_bit(
    manifests: tuple[Manifest, Manifest], two_epochs: TrainResult, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cached = run(make_config(train_num_epochs=2, train_reader_cache=str(cache)), (manifests[0], None), tmp_path / "run")
    assert any(cache.rglob("*"))
    assert_equal_states(two_epochs, cached)


def test_a_run_that_diverges_stops_with_one_line_and_saves_nothing(
    manifests: tuple[Manifest, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = EmbeddingTables.__init__

    def poisoned(self: EmbeddingTables, *arguments: Any) -> None:
        load(self, *arguments)
        self.tables["item_id"].fill_(float("nan"))

    monkeypatch.setattr(EmbeddingTables, "__init__", poisoned)
    with pytest.raises(TrainError, match=r"step 4: the loss is nan .* lower train.learning_rate or train.embedding"):
        run(make_config(), (manifests[0], None), tmp_path)
    assert CheckpointStore(tmp_path / "checkpoints").newest_valid() is None


def test_early_stopping_ends_with_the_best_epoch(
    manifests: tuple[Manifest, Manifest], two_epochs: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log losses 0.6, 0.5, 0.7 are put in place of the evaluations': epoch 2 is the best and epoch 4 never runs."""
    losses = {NUM_STEPS: 0.6, 2 * NUM_STEPS: 0.5, 3 * NUM_STEPS: 0.7}
    watcher = Watcher()
    monkeypatch.setattr("usr_ray.training.loop.summarise", lambda _: {"log_loss": losses[watcher.evaluations[-1]]})
    config = make_config(train_num_epochs=4, train_early_stopping=True)
    result = run(config, manifests, tmp_path / "run", watcher)
    assert (result.status, result.step, watcher.num_ends) == ("early_stopped", 3 * NUM_STEPS, 1)
    for name, tensor in two_epochs.state.tables.tables.items():
        assert torch.equal(tensor, result.state.tables.tables[name]), name
    best = CheckpointStore(tmp_path / "run" / "checkpoints").best_valid()
    assert best is not None
    assert (best.step, best.state["log_loss"]) == (2 * NUM_STEPS, 0.5)
    again = run(config, manifests, tmp_path / "run", watcher)
    assert (again.status, again.step) == ("early_stopped", 3 * NUM_STEPS)
    assert_equal_states(result, again)


def test_the_best_epoch_is_restored_when_no_early_stop_fires(
    manifests: tuple[Manifest, Manifest], one_epoch: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {NUM_STEPS: 0.5, 2 * NUM_STEPS: 0.6}
    watcher = Watcher()
    monkeypatch.setattr("usr_ray.training.loop.summarise", lambda _: {"log_loss": losses[watcher.evaluations[-1]]})
    result = run(make_config(train_num_epochs=2, train_early_stopping=True), manifests, tmp_path / "run", watcher)
    assert (result.status, watcher.num_ends) == ("finished", 1)
    assert_equal_states(result, one_epoch)


def test_bf16_keeps_weights_in_float32_and_still_learns(manifests: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    watcher = Watcher()
    result = run(make_config(train_precision="bf16", train_num_epochs=3), (manifests[0], None), tmp_path, watcher)
    assert {t.dtype for t in result.state.module.parameters()} == {torch.float32}
    losses = [m["loss"] for m in watcher.steps.values()]
    assert losses[-1] < losses[0]


# The others have parameters alone, as SharedBottom above; STAR has statistics of its own, APG a factored layer.
@pytest.mark.parametrize(
    "backbone",
    ["star", "apg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mmoe", "ple", "m2m", "pepnet"))],
)
def test_every_backbone_resumes_bit_for_bit(
    manifests: tuple[Manifest, Manifest], tmp_path: Path, backbone: str
) -> None:
    config = make_config(model_backbone=backbone, train_log_every_steps=1)
    unbroken = run(config, (manifests[0], None), tmp_path / "unbroken")
    worker = LocalWorker("cpu")
    run(config, (manifests[0], None), tmp_path / "run", Watcher(worker, 3), worker)
    assert_equal_states(unbroken, run(config, (manifests[0], None), tmp_path / "run"))


def test_averaged_weights_are_evaluated_saved_and_resumed_to_the_bit(
    manifests: tuple[Manifest, Manifest], one_epoch: TrainResult, tmp_path: Path
) -> None:
    whole = run(AVERAGED, manifests, tmp_path / "whole")
    worker = LocalWorker("cpu")
    stopped = run(AVERAGED, manifests, tmp_path / "parts", Watcher(worker, stop_at=4), worker)
    assert stopped.status == "stopped"
    resumed = run(AVERAGED, manifests, tmp_path / "parts")
    for name, tensor in whole.state.tensors().items():
        assert torch.equal(tensor, resumed.state.tensors()[name]), name
    loaded, state = load_run(tmp_path / "whole"), whole.state
    trained = state.module.state_dict()["scenario_embedding_SE"].clone()
    with state.averaged():
        for name, tensor in state.module.state_dict().items():
            assert torch.equal(tensor, loaded.module.state_dict()[name]), name
        for name, table in state.tables.tables.items():
            assert torch.equal(table, loaded.tables.tables[name]), name
        assert not torch.equal(trained, state.module.state_dict()["scenario_embedding_SE"])
    assert torch.equal(trained, state.module.state_dict()["scenario_embedding_SE"])
    again = evaluate(loaded.module, loaded.tables, manifests[1], LocalWorker("cpu"), AVERAGED)
    assert whole.evaluation is not None
    assert again.metrics == whole.evaluation.metrics
    for name, tensor in one_epoch.state.tables.tables.items():
        assert torch.equal(tensor, state.tables.tables[name]), "averages change no training"
