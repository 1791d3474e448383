"""Evaluation: every mature row once for any number of ranks and any batch size; files read back; the job's errors."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable
from torch import nn

from jobs import evaluate as job
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.cli import run_job
from usr_ray.config import Config, end_of_us
from usr_ray.data.batch import UsrOutputs
from usr_ray.data.lineage import built_with, difference
from usr_ray.data.manifest import build_manifest
from usr_ray.data.mature import WhichRows
from usr_ray.evaluation.baseline import TrainingRows, popularity_baseline
from usr_ray.evaluation.files import metrics_text, read_predictions, write_metrics, write_predictions
from usr_ray.evaluation.metrics import metrics_by_scenario
from usr_ray.evaluation.statistics import auc_gaps
from usr_ray.schema import ALL_LABELS, SAMPLES, UNKNOWN_ID
from usr_ray.training.checkpoint import CheckpointError, CheckpointStore
from usr_ray.training.evaluate import EvaluationError, evaluate, load_run
from usr_ray.training.rows import read_training_rows
from usr_ray.training.state import TrainState
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.unit

HELD_OUT = (FIRST_DATE + dt.timedelta(days=2), FIRST_DATE + dt.timedelta(days=3))
"""Labels of the last rows of the second day close after the table's watermark: they are not mature."""
SCENARIOS = ("search", "recommendation")


def make_config(global_batch_size=64, **data):
    return Config.from_dict(
        {
            "data": {"train_dates": "2026-01-01", "eval_dates": "2026-01-03:2026-01-04", **data},
            "model": {
                "embedding_dim": 4,
                "trigger_dim": 4,
                "hidden": [8],
                "tower_hidden": [4],
                "interest": {"rank": 2, "over_parameterisation": 4},
                "generator": {"hidden": 4},
                "contrastive": {"group_size": 16},
            },
            "train": {"global_batch_size": global_batch_size, "reader_threads": 1},
        }
    )


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lake")
    write_samples(folder, samples_spec(), num_rows=700, num_days=4)
    return folder


@pytest.fixture(scope="module")
def manifest(lake):
    return build_manifest(lake, dates=HELD_OUT)


class OneRank:
    """A Worker among threads: gathers through a shared list."""

    device = torch.device("cpu")

    def __init__(self, rank, world_size, shared, barrier):
        self.rank, self.world_size, self._shared, self._barrier = rank, world_size, shared, barrier

    @property
    def is_main(self):
        return self.rank == 0

    def all_gather_rows(self, rows):
        self._shared[self.rank] = rows
        self._barrier.wait(30)
        gathered = torch.cat(self._shared[: self.world_size])
        self._barrier.wait(30)
        return gathered

    def any_true(self, flag):
        return bool(self.all_gather_rows(torch.tensor([flag])).any())


def on_ranks(world_size, function):
    """`function(worker)` on every rank, in threads; results in rank order."""
    shared, barrier, results = [None] * world_size, threading.Barrier(world_size), [None] * world_size

    def run(rank):
        try:
            results[rank] = function(OneRank(rank, world_size, shared, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class NoTables:
    """Stands for the embedding tables; remembers the batches that were looked up."""

    def __init__(self, sizes):
        self.sizes, self.batches, self.cold = sizes, [], {}

    def num_rows(self):
        return self.sizes

    def unique_ids(self, batch):
        return ()

    def lookup(self, batch, unique):
        self.batches.append(batch)


class KnownScores(nn.Module):
    """log P made of the row's user and item alone, so that the test can work it out from the table."""

    def __init__(self, *, has_global=True, value=None):
        super().__init__()
        self.has_global, self.value = has_global, value

    def forward(self, batch, lookup):
        assert not self.training
        user_B, item_B = batch.sparse_BF[:, 0], batch.sparse_BF[:, 1]
        log_p_BT = -torch.stack([1 + (user_B * 3 + item_B) % 7, 2 + item_B % 5], dim=1).float()
        if self.value is not None:
            log_p_BT = torch.full_like(log_p_BT, self.value)
        log_not_p_BT = torch.log1p(-log_p_BT.exp())
        extra = (log_p_BT / 2, log_not_p_BT) if self.has_global else ()
        return UsrOutputs(log_p_BT, log_not_p_BT, *extra)


def sizes(spec):
    return {name: feature.num_embeddings for name, feature in spec.vocabularies.items()}


def expected_rows(lake, manifest):
    """Mature rows of the held-out dates as the files hold them, in file order."""
    parts = [pq.read_table(Path(lake) / SAMPLES / file.path, partitioning=None) for file in manifest.files]
    return [(number, row) for number, row in enumerate(r for p in parts for r in p.to_pylist()) if row["is_mature"]]


@pytest.fixture(scope="module")
def alone(manifest):
    return evaluate(KnownScores(), NoTables(sizes(manifest.spec)), manifest, LocalWorker("cpu"), make_config())


def test_every_mature_row_is_there_once_in_file_order(lake, manifest, alone):
    rows = expected_rows(lake, manifest)
    assert 0 < len(rows) < manifest.num_rows  # some rows are not mature
    p = alone.predictions
    assert p.row_number_N.tolist() == [number for number, _ in rows]
    assert p.labels_NT.tolist() == [[row[label] for label in ALL_LABELS] for _, row in rows]
    assert p.scenario_N.tolist() == [row["scenario_index"] for _, row in rows]
    assert p.user_key_N.tolist() == [row["user_key"] for _, row in rows]
    assert p.request_key_N.tolist() == [row["request_key"] for _, row in rows]
    assert p.item_id_N.tolist() == [row["item_id_index"] for _, row in rows]
    lengths = [sum(len(row[f"{s}_history_actions"]) for s in SCENARIOS) for _, row in rows]
    assert p.history_length_N.tolist() == lengths
    expected = [np.exp(-(1 + (row["user_id_index"] * 3 + row["item_id_index"]) % 7)) for _, row in rows]
    assert p.probs_NT[:, 0] == pytest.approx(expected)
    assert p.global_probs_NT[:, 0] == pytest.approx(np.sqrt(expected))


def test_metrics_are_those_of_all_rows_at_once(lake, manifest, alone):
    from sklearn.metrics import roc_auc_score

    rows = [row for _, row in expected_rows(lake, manifest) if row["scenario"] == "search"]
    scores = [-((row["user_id_index"] * 3 + row["item_id_index"]) % 7) for row in rows]
    cell = alone.metrics["search"]["ctr"]
    assert cell["auc"] == pytest.approx(roc_auc_score([row["is_click"] for row in rows], scores))
    assert cell["num_samples"] == len(rows)
    assert cell["num_positives"] == sum(row["is_click"] for row in rows)


def test_items_known_by_their_vector_alone_are_cold(lake, manifest, alone):
    tables = NoTables(sizes(manifest.spec))
    tables.cold = {"item_id": torch.arange(sizes(manifest.spec)["item_id"]) % 4 == 3}
    result = evaluate(KnownScores(), tables, manifest, LocalWorker("cpu"), make_config())
    items = [row["item_id_index"] for _, row in expected_rows(lake, manifest)]
    assert result.predictions.item_id_N.tolist() == [1 if item % 4 == 3 else item for item in items]
    assert result.predictions.probs_NT.tolist() == alone.predictions.probs_NT.tolist(), "the model has their ids"


@pytest.mark.parametrize(("world_size", "global_batch_size"), [(1, 16), (1, 1024), (2, 64), (3, 48), (4, 1024)])
def test_neither_ranks_nor_batches_change_a_bit(manifest, alone, world_size, global_batch_size):
    tables = NoTables(sizes(manifest.spec))
    results = on_ranks(
        world_size, lambda worker: evaluate(KnownScores(), tables, manifest, worker, make_config(global_batch_size))
    )
    assert results[0].metrics == alone.metrics
    assert results[0].predictions.row_number_N.tolist() == alone.predictions.row_number_N.tolist()
    assert results[0].predictions.probs_NT.tolist() == alone.predictions.probs_NT.tolist()
    assert all(r.predictions is None and r.metrics is None for r in results[1:])


def test_immature_rows_do_not_count_when_the_run_was_trained_on_such(manifest, alone):
    config = make_config(mature_only=False)
    result = evaluate(KnownScores(), NoTables(sizes(manifest.spec)), manifest, LocalWorker("cpu"), config)
    assert result.predictions.row_number_N.tolist() == alone.predictions.row_number_N.tolist()
    assert result.metrics == alone.metrics


def test_a_model_without_global_heads_has_no_global_metrics(manifest):
    model = KnownScores(has_global=False)
    result = evaluate(model, NoTables(sizes(manifest.spec)), manifest, LocalWorker("cpu"), make_config())
    assert result.predictions.global_probs_NT is None
    assert result.metrics["global"]["ctr"]["auc"] is None
    assert result.metrics["global"]["ctr"]["num_samples"] == len(result.predictions)


def test_a_scenario_whose_orders_no_log_knows_has_no_ctcvr(lake, manifest, alone, tmp_path):
    spec = replace(manifest.spec, no_order_scenarios=("search",))
    masked = replace(manifest, spec=spec)
    result = evaluate(KnownScores(), NoTables(sizes(spec)), masked, LocalWorker("cpu"), make_config())
    assert result.metrics["search"]["ctcvr"]["log_loss"] is None
    assert result.metrics["search"]["ctr"] == alone.metrics["search"]["ctr"]
    assert result.metrics["recommendation"] == alone.metrics["recommendation"]
    in_search = result.predictions.scenario_N == 0
    assert np.isnan(result.predictions.labels_NT).tolist() == [[False, own, False, own] for own in in_search.tolist()]
    train = read_training_rows(masked, WhichRows())
    baseline = popularity_baseline(train, result.predictions, 2)
    whole_train = read_training_rows(manifest, WhichRows())
    whole = popularity_baseline(whole_train, alone.predictions, 2)
    assert (baseline.probs_NT[~in_search] == whole.probs_NT[~in_search]).all()
    assert (baseline.global_probs_NT[:, 0] == whole.global_probs_NT[:, 0]).all()
    assert (baseline.global_probs_NT[:, 1] != whole.global_probs_NT[:, 1]).any(), "counted on recommendation alone"
    write_predictions(tmp_path / "p.parquet", result.predictions, SCENARIOS, baseline=baseline, about={})
    assert pq.read_table(tmp_path / "p.parquet")["is_order"].null_count == in_search.sum() > 0
    read, _, _ = read_predictions(tmp_path / "p.parquet", SCENARIOS)
    assert metrics_by_scenario(read, SCENARIOS) == result.metrics
    gaps = auc_gaps(read, baseline, SCENARIOS)
    assert gaps["search", "ctcvr"].gap is None
    assert gaps["global", "ctcvr"].gap.value == pytest.approx(
        result.metrics["global"]["ctcvr"]["auc"] - metrics_by_scenario(baseline, SCENARIOS)["global"]["ctcvr"]["auc"]
    )
    lines = [line.split() for line in metrics_text({"eval": result.metrics}).splitlines()]
    assert ["search", "ctcvr", "model", "-", "-", "-", "-", "0", "0"] in lines
    assert " ".join(lines[-1]) == f"search ctcvr: the logs know no orders of these {in_search.sum()} rows"


def test_a_head_that_learnt_no_orders_is_not_measured_on_a_lake_that_knows_them(manifest):
    trained = replace(manifest.spec, no_order_scenarios=("search",))
    assert difference(trained, "", manifest).startswith(
        "labels.no_order_scenarios of the samples table is none, but the model was trained with search"
    )
    assert difference(trained, "", replace(manifest, spec=trained)) is None


def test_training_mode_comes_back(manifest):
    model = KnownScores().train()
    evaluate(model, NoTables(sizes(manifest.spec)), manifest, LocalWorker("cpu"), make_config())
    assert model.training


def test_a_diverged_model_is_refused(manifest):
    with pytest.raises(EvaluationError, match=r"not numbers on \d+ of \d+ rows.*train.learning_rate"):
        evaluate(
            KnownScores(value=float("nan")), NoTables(sizes(manifest.spec)), manifest, LocalWorker("cpu"), make_config()
        )


def test_ids_newer_than_the_model_are_unknown_to_it(manifest):
    tables = NoTables(sizes(manifest.spec) | {"item_id": 10, "query": 5})
    evaluate(KnownScores(), tables, manifest, LocalWorker("cpu"), make_config())
    items = torch.cat([b.sparse_BF[:, 1] for b in tables.batches])
    events = torch.cat([h.item_ids_V for b in tables.batches for h in b.histories])
    queries = torch.cat([b.histories[0].query_ids_V for b in tables.batches])
    assert items.max() < 10 and events.max() < 10 and queries.max() < 5  # noqa: PT018
    assert (items == UNKNOWN_ID).sum() > 100  # 3 of 4 items are too new
    users = torch.cat([b.sparse_BF[:, 0] for b in tables.batches])
    assert users.max() > 10  # tables that did not grow are left alone


def test_baseline_counts_the_rows_that_training_counts(lake):
    first = build_manifest(lake, dates=(FIRST_DATE, HELD_OUT[1]))
    ready_before_us = end_of_us(HELD_OUT[1])
    rows = read_training_rows(first, WhichRows(ready_before_us=ready_before_us))
    table = DeltaTable(str(lake / SAMPLES)).to_pyarrow_table()
    closes = pc.add(table["event_time"].cast("int64"), 25 * 3_600_000_000)
    wanted = table.filter(pc.and_(pc.less_equal(closes, ready_before_us), table["is_mature"]))
    assert 0 < wanted.num_rows < first.num_rows
    assert sorted(rows.item_id_N) == sorted(wanted["item_id_index"].to_pylist())
    assert rows.labels_NT.sum(axis=0).tolist() == [pc.sum(wanted[label]).as_py() for label in ALL_LABELS]


def test_a_part_of_the_training_rows_is_spread_over_all(lake):
    manifest = build_manifest(lake, dates=(FIRST_DATE, HELD_OUT[0]))
    groups = [ref.row_group.num_rows for ref in manifest.row_groups()]
    every_row = read_training_rows(manifest, WhichRows(mature_only=False)).item_id_N
    assert len(groups) >= 4 and sum(groups) == len(every_row)  # noqa: PT018
    starts = np.cumsum([0, *groups])
    for at_most, number in ((len(every_row), len(groups)), (-(-len(every_row) // 2), -(-len(groups) // 2)), (1, 1)):
        part, again = (
            read_training_rows(manifest, WhichRows(mature_only=False), at_most=at_most).item_id_N.tolist() for _ in "12"
        )
        wanted = [
            np.concatenate([every_row[starts[n] : starts[n + 1]] for n in picked]).tolist()
            for picked in itertools.combinations(range(len(groups)), number)
        ]
        assert part in wanted, "so many whole row groups, in their order"
        assert part == again


def test_baseline_does_not_count_orders_that_are_open(lake):
    first = build_manifest(lake, dates=(FIRST_DATE, HELD_OUT[1]))
    ready_before_us, wait_us = end_of_us(HELD_OUT[1]), 24 * 3_600_000_000
    rows = read_training_rows(first, WhichRows(ready_before_us=ready_before_us, order_wait_us=wait_us))
    table = DeltaTable(str(lake / SAMPLES)).to_pyarrow_table().filter(pc.field("is_mature"))
    time_us = table["event_time"].cast("int64")
    clicks_final, final = (
        table.filter(pc.less_equal(pc.add(time_us, hours * 3_600_000_000), ready_before_us)) for hours in (1, 25)
    )
    assert len(rows.labels_NT) == clicks_final.num_rows > final.num_rows > 0
    for place, label in enumerate(ALL_LABELS):
        of = final if "order" in label else clicks_final
        assert np.isfinite(rows.labels_NT[:, place]).sum() == of.num_rows
        assert np.nansum(rows.labels_NT[:, place]) == pc.sum(of[label]).as_py()


@pytest.mark.parametrize("has_baseline", [True, False])
@pytest.mark.parametrize("has_global", [True, False])
def test_predictions_read_back_as_written(alone, tmp_path, has_baseline, has_global):
    written = alone.predictions if has_global else replace(alone.predictions, global_probs_NT=None)
    baseline = alone.predictions if has_baseline else None
    write_predictions(tmp_path / "p.parquet", written, SCENARIOS, baseline=baseline, about={"step": 7})
    read, read_baseline, about = read_predictions(tmp_path / "p.parquet", SCENARIOS)
    for name in written.__dataclass_fields__:
        before, after = getattr(written, name), getattr(read, name)
        assert (before is None and after is None) or before.tolist() == after.tolist()
    assert (read_baseline is not None) == has_baseline
    assert about == {"step": 7}
    assert [p.name for p in tmp_path.iterdir()] == ["p.parquet"]


def test_terminal_table_marks_what_is_undefined(alone):
    metrics = json.loads(json.dumps(alone.metrics))
    metrics["search"]["ctr"]["auc"] = None
    lines = metrics_text({"eval": metrics, "eval_popularity": alone.metrics}).splitlines()
    assert lines[0].split() == [
        "scenario",
        "task",
        "scorer",
        "AUC",
        "GAUC",
        "log",
        "loss",
        "PCOC",
        "samples",
        "positives",
    ]
    assert lines[1].split()[:4] == ["search", "ctr", "model", "-"]
    assert lines[2].split()[2] == "popularity"
    assert len(lines) == 1 + 4 * 2 * 2


def test_undefined_metrics_are_null_in_the_file(tmp_path):
    write_metrics(tmp_path / "m.json", {"eval": {"search": {"ctr": {"auc": None, "num_samples": 0}}}})
    assert json.loads((tmp_path / "m.json").read_text())["eval"]["search"]["ctr"] == {"auc": None, "num_samples": 0}


@pytest.fixture(scope="module")
def run_dir(lake, tmp_path_factory):
    """A run with one checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    state = TrainState(
        make_config(), build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE)), LocalWorker("cpu"), order="x"
    )
    CheckpointStore(folder / "checkpoints").save(5, state.tensors(), state.describe(LocalWorker("cpu")))
    return folder


def test_the_job_writes_metrics_in_the_shape_of_the_contract(lake, run_dir, capsys):
    # No row of the first day alone has final labels by its end (they take 25 hours), so the baseline is left out.
    arguments = ["--run-dir", str(run_dir), "--lake", str(lake), "--dates", "2026-01-03:2026-01-04"]
    assert run_job(job.main, arguments) == 0
    out = capsys.readouterr().out
    manifest = build_manifest(lake, dates=HELD_OUT)
    final = len(expected_rows(lake, manifest))
    assert f"warning: {final} of {manifest.num_rows} rows are evaluated: labels of the others may still change\n" in out
    assert "no popularity baseline:" in out
    assert "step-00000005 on 2026-01-03 to 2026-01-04" in out
    splits = json.loads((run_dir / "evaluation-2026-01-03_2026-01-04.json").read_text())
    assert list(splits) == ["about", "eval"]
    assert set(splits["eval"]) == {*SCENARIOS, "global", "all"}
    keys = {"auc", "gauc", "log_loss", "pcoc", "num_samples", "num_positives"}
    assert all(keys <= set(metrics) for cell in splits["eval"].values() for metrics in cell.values())
    read, _, about = read_predictions(run_dir / "predictions-2026-01-03_2026-01-04.parquet", SCENARIOS)
    assert len(read) == splits["eval"]["all"]["ctr"]["num_samples"]
    assert about == splits["about"]
    assert (about["step"], about["dates"], about["held_out"]) == (5, "2026-01-03:2026-01-04", True)
    assert about["table_rows"] == manifest.num_rows, "the report says from it that some are left out"


@pytest.mark.integration
def test_an_evaluation_on_training_dates_says_so_and_leaves_the_others(lake, run_dir, tmp_path, capsys):
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    arguments = ["--run-dir", str(folder), "--lake", str(lake), "--dates"]
    (folder / "predictions.parquet").write_text("of the training")
    assert run_job(job.main, [*arguments, "2026-01-03:2026-01-04"]) == 0
    assert "\nheld-out dates 2026-01-03:2026-01-04:\n" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert run_job(job.main, [*arguments, "2026-01-01:2026-01-03"]) == 0
    heading = "dates 2026-01-01:2026-01-03, not held out: the run was trained on 2026-01-01:\n"
    assert heading in capsys.readouterr().out
    splits = json.loads((folder / "evaluation-2026-01-01_2026-01-03.json").read_text())
    assert list(splits) == ["about", "train"]
    assert (splits["about"]["held_out"], splits["about"]["trained_on"]) == (False, "2026-01-01")
    assert {name: (folder / name).read_bytes() for name in before} == before
    state = folder / "checkpoints" / "step-00000005" / "state.json"
    (folder / "config.json").write_text(json.dumps(json.loads(state.read_text()) | {"trained_dates": "2026-01-03"}))
    assert run_job(job.main, [*arguments, "2026-01-01:2026-01-02"]) == 0
    heading = "dates 2026-01-01:2026-01-02, not held out: the run was trained on dates after these (to 2026-01-03):\n"
    assert heading in capsys.readouterr().out
    splits = json.loads((folder / "evaluation-2026-01-01_2026-01-02.json").read_text())
    assert (list(splits), splits["about"]["held_out"]) == (["about", "train"], False)
    (folder / "config.json").unlink()
    # Other rows of the same dates: the lake has been rebuilt. The earlier evaluation keeps its files.
    rebuilt = Path(shutil.copytree(lake, tmp_path / "lake"))
    DeltaTable(rebuilt / SAMPLES).delete("impression_id = 'i599'")
    assert run_job(job.main, [*arguments[:3], str(rebuilt), "--dates", "2026-01-03:2026-01-04"]) == 0
    kept = [path for path in folder.glob("*2026-01-03_2026-01-04-*") if path.is_file()]
    assert sorted(path.suffix for path in kept) == [".json", ".parquet"]
    assert {path.read_bytes() for path in kept} <= set(before.values())


def test_files_of_other_evaluations_are_neither_replaced_nor_a_stack_trace(
    lake, run_dir, tmp_path, capsys, monkeypatch
):
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    (folder / "config.json").write_text("{}")
    arguments = ["--run-dir", folder, "--lake", lake, "--dates", "2026-01-04"]
    other, own = (folder / f"evaluation-2026-01-{day}_2026-01-{day}.json" for day in ("03", "04"))
    line = refused(capsys, [*arguments, "--output", other])
    assert f"--output {other}: is a file that the run of {folder} needs; name another file" in line
    assert run_job(job.main, [str(word) for word in [*arguments, "--output", own]]) == 0
    capsys.readouterr()
    torn = own.with_name("predictions-2026-01-04_2026-01-04.parquet")
    torn.write_bytes(torn.read_bytes()[:-9])
    line = refused(capsys, arguments)
    assert f"{torn}: cannot be read (Parquet magic bytes not found in footer" in line
    assert line.endswith("; remove it\n")
    torn.unlink()
    own.write_text("[1]")
    with monkeypatch.context() as patch:
        patch.setattr("usr_ray.training.evaluate.evaluate", None)  # said before the work
        line = refused(capsys, arguments)
    assert line == f"error: {own}: is damaged (it is a list, needed an object); remove it\n"


def test_what_an_evaluation_used_is_what_it_says(lake, run_dir, tmp_path, capsys):
    """Of dates that are partly absent, or whose labels are not final yet, the others are named."""
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    own = Path(shutil.copytree(lake, tmp_path / "lake"))
    DeltaTable(own / SAMPLES).delete("impression_date = '2026-01-02'")
    arguments = ["--run-dir", folder, "--lake", own, "--dates", "2026-01-02:2026-01-03"]
    line = refused(capsys, arguments)
    assert "--dates 2026-01-02:2026-01-03: 1 of these 2 dates have no rows: 2026-01-02; the table" in line
    assert not list(folder.glob("*2026-01-02*"))
    assert run_job(job.main, [str(word) for word in [*arguments, "--allow-missing-dates"]]) == 0
    out = capsys.readouterr().out
    assert "warning: --dates 2026-01-02:2026-01-03: without 2026-01-02, of which there are no rows\n" in out
    assert "held-out dates 2026-01-03:\n" in out
    splits = json.loads((folder / "evaluation-2026-01-02_2026-01-03.json").read_text())
    assert splits["about"]["dates"] == "2026-01-03"
    DeltaTable(own / SAMPLES).update({"is_mature": "false"}, predicate="impression_date = '2026-01-03'")
    assert run_job(job.main, [str(word) for word in [*arguments[:-1], "2026-01-03:2026-01-04"]]) == 0
    out = capsys.readouterr().out
    assert "warning: without 2026-01-03, of which no row has final labels\n" in out
    assert "held-out dates 2026-01-04:\n" in out


def test_a_run_of_before_the_windows_of_counters_had_a_key_fits_its_own_lake(lake, tmp_path):
    """Its three windows were no part of the configuration, and are not the default of now."""
    config = Config.from_dict(
        make_config().to_dict() | {"counters": {"defaults": True, "windows": ["1d", "7d", "all"]}}
    )
    state = TrainState(config, build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE)), LocalWorker("cpu"), order="x")
    described = state.describe(LocalWorker("cpu"))
    del described["config"]["counters"]["windows"], described["config"]["counters"]["events"]
    CheckpointStore(tmp_path / "checkpoints").save(5, state.tensors(), described)
    assert load_run(tmp_path).config == config
    assert built_with(load_run(tmp_path).config) == built_with(config)


def test_the_job_shows_the_baseline_and_takes_the_best_checkpoint(lake, tmp_path, capsys):
    config = make_config(train_dates="2026-01-01:2026-01-02", eval_dates="")
    state = TrainState(config, build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE)), LocalWorker("cpu"), order="x")
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(3, state.tensors(), state.describe(LocalWorker("cpu")), best=True)
    store.save(9, state.tensors(), state.describe(LocalWorker("cpu")))
    arguments = ["--run-dir", str(tmp_path), "--lake", str(lake), "--dates", "2026-01-03"]
    assert run_job(job.main, [*arguments, "--output", str(tmp_path / "m.json")]) == 0
    splits = json.loads((tmp_path / "m.json").read_text())
    assert list(splits) == ["about", "eval", "eval_popularity"]
    counts = [splits[s]["search"]["ctr"]["num_samples"] for s in ("eval", "eval_popularity")]
    assert counts[0] == counts[1] > 0
    assert "best-00000003 on 2026-01-03" in capsys.readouterr().out


def test_items_that_the_vocabulary_got_since_share_popularitys_counter_of_unknown_ones(lake, manifest, alone):
    """Their training rows were built anew and have the new ids; to the model, and so in its predictions, they are 1."""
    num_items, days = 20, ["2026-01-01", "2026-01-02"]
    config = make_config(train_dates=":".join(days), eval_dates="", mature_only=False)
    unknown_N = alone.predictions.item_id_N >= num_items
    rows = replace(alone.predictions, item_id_N=np.where(unknown_N, UNKNOWN_ID, alone.predictions.item_id_N))
    sparse = [replace(f, num_embeddings=num_items if f.name == "item_id" else 99) for f in manifest.spec.sparse]
    run = SimpleNamespace(config=config, spec=replace(manifest.spec, sparse=tuple(sparse)))
    found = job.baseline_of(run, str(lake), manifest, rows, days)
    table = DeltaTable(str(lake / SAMPLES)).to_pyarrow_table().to_pylist()
    train = [row for row in table if str(row["impression_date"]) in days and row["scenario"] == "search"]
    place = int(np.flatnonzero(unknown_N & (rows.scenario_N == 0))[0])

    def rate_of(chosen, rate=None):
        clicks, number = sum(row["is_click"] for row in chosen), len(chosen)
        return (clicks + 0.5) / (number + 1) if rate is None else (clicks + 20 * rate) / (number + 20)

    def logit(p):
        return np.log(p / (1 - p))

    rate = rate_of(train)
    user = rate_of([row for row in train if row["user_key"] == rows.user_key_N[place]], rate)
    new = [row for row in train if row["item_id_index"] in (UNKNOWN_ID, *range(num_items, 42))]
    assert len(new) > len(train) / 3
    expected = 1 / (1 + np.exp(-(logit(user) + logit(rate_of(new, rate)) - logit(rate))))
    assert found.probs_NT[place, 0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("own", "seen", "most", "fitted_on"),
    [
        ("2026-01-02", ["2026-01-02"], 10**6, ["2026-01-02"]),  # none of its labels is final at its end
        ("2026-01-03", ["2026-01-01", "2026-01-03"], 10**6, ["2026-01-01", "2026-01-03"]),  # the 2nd was left out
        ("2026-01-03", ["2026-01-01", "2026-01-02", "2026-01-03"], 250, ["2026-01-02", "2026-01-03"]),
        ("2026-01-03", ["2025-12-31", "2026-01-03"], 10**6, ["2026-01-03"]),  # deleted since
    ],
)
def test_popularity_is_fitted_on_what_the_model_was_trained_on(
    lake, manifest, alone, capsys, monkeypatch, own, seen, most, fitted_on
):
    monkeypatch.setattr(job, "MAX_EARLIER_ROWS", most)
    config = make_config(train_dates=own, eval_dates="", mature_only=False)
    found = job.baseline_of(
        SimpleNamespace(config=config, spec=manifest.spec), str(lake), manifest, alone.predictions, seen
    )
    parts = [
        read_training_rows(build_manifest(lake, dates=(day, day)), WhichRows(mature_only=False))
        for day in map(dt.date.fromisoformat, fitted_on)
    ]
    rows = TrainingRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in TrainingRows.__slots__))
    expected = popularity_baseline(rows, alone.predictions, 2)
    assert found.probs_NT.tolist() == expected.probs_NT.tolist()
    assert found.global_probs_NT.tolist() == expected.global_probs_NT.tolist()
    assert ("of which there are no rows" in capsys.readouterr().out) == ("2025-12-31" in seen)


def refused(capsys, arguments):
    assert run_job(job.main, [str(word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_user_errors_are_one_line(lake, run_dir, tmp_path, capsys):
    dates = ("--dates", "2026-01-02")
    line = refused(capsys, ["--run-dir", tmp_path / "none", "--lake", lake, *dates])
    assert "none: no such directory; name the --run-dir of jobs/train.py" in line
    line = refused(capsys, ["--run-dir", tmp_path, "--lake", lake, *dates])
    assert "holds no valid checkpoint; train with jobs/train.py first" in line
    line = refused(capsys, ["--run-dir", run_dir, "--lake", tmp_path, *dates])
    assert "no Delta table at" in line
    line = refused(capsys, ["--run-dir", run_dir, "--lake", lake, "--dates", "2031-01-01"])
    assert "no rows in 2031-01-01" in line
    line = refused(capsys, ["--run-dir", run_dir, "--lake", lake, "--dates", "tomorrow"])
    assert "--dates: 'tomorrow' is not a date" in line
    line = refused(capsys, ["--run-dir", run_dir, "--lake", lake])
    assert "--dates" in line


def test_a_lake_of_other_features_is_refused(run_dir, tmp_path, capsys):
    write_samples(tmp_path, samples_spec(scenarios=("search", "feed")), num_rows=80, num_days=3)
    line = refused(capsys, ["--run-dir", run_dir, "--lake", tmp_path, "--dates", "2026-01-02"])
    assert (
        "scenarios of the samples table is search, feed, but the model was trained with search, recommendation" in line
    )


def test_a_checkpoint_of_another_version_is_refused(run_dir, tmp_path):
    source = CheckpointStore(run_dir / "checkpoints").newest_valid()
    state = source.state | {"config": {"no_such_key": 1}}
    CheckpointStore(tmp_path / "checkpoints").save(1, source.tensors, state)
    with pytest.raises(CheckpointError, match=r"not written by this version.*no_such_key"):
        load_run(tmp_path)
