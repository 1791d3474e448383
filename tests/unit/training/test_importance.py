"""Feature importance: a signal that a model does not use loses exactly nothing, one that is all it uses loses all."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from jobs import evaluate as job
from tests.unit.random_batches import make_lists
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from tests.unit.training.test_evaluate import NoTables, expected_rows, make_config, sizes
from usr_ray.cli import run_job
from usr_ray.config import Config
from usr_ray.data.batch import UsrOutputs
from usr_ray.data.manifest import build_manifest
from usr_ray.evaluation.statistics import comparison_text
from usr_ray.model.unique import ItemSides, table_columns, unique_ids
from usr_ray.reporting.run import importance_section
from usr_ray.schema import UNKNOWN_ID, DenseFeature, VectorFeature
from usr_ray.training import evaluate as evaluate_module
from usr_ray.training import monitor
from usr_ray.training.checkpoint import CheckpointStore
from usr_ray.training.evaluate import Evaluation, evaluate, evaluation_reader
from usr_ray.training.importance import importance, importance_text, signals_of
from usr_ray.training.state import TrainState
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration

HELD_OUT = (FIRST_DATE + dt.timedelta(days=2), FIRST_DATE + dt.timedelta(days=3))


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lake")
    write_samples(folder, samples_spec(sides=("brand",), lists=make_lists(9)), num_rows=1600, num_days=4)
    return folder


@pytest.fixture(scope="module")
def manifest(lake):
    return build_manifest(lake, dates=HELD_OUT)


class OneSignal(nn.Module):
    """log P that follows one value of the row, which `of` takes from a batch."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, batch, lookup):
        log_p_BT = -1 - torch.stack([self.of(batch), self.of(batch)], dim=1).float() / 1000
        return UsrOutputs(log_p_BT, torch.log1p(-log_p_BT.exp()))


def found_of(of, manifest, **options):
    tables, config = NoTables(sizes(manifest.spec)), make_config()
    tables.sides = None
    return importance(OneSignal(of), tables, manifest, LocalWorker("cpu"), config, evaluated(manifest), **options)


def evaluated(manifest):
    """Numbers of the rows with final labels."""
    with evaluation_reader(manifest, LocalWorker("cpu"), make_config()) as reader:
        return np.concatenate([batch.row_number_B[batch.weights_B > 0].numpy() for batch in reader.batches(0)])


def newest_item(batch):
    """The newest item of each row's search history; 0 where it is empty."""
    history = batch.histories[0]
    ends = history.offsets[1:]
    is_empty = ends == history.offsets[:-1]
    return torch.where(is_empty, 0, history.item_ids_V[(ends - 1).clamp(min=0)])


@pytest.mark.parametrize(
    ("signal", "of"),
    [
        ("item_id", lambda batch: batch.sparse_BF[:, 1]),
        ("price", lambda batch: 1000 * batch.dense_BF[:, 0]),
        ("search_history", newest_item),
        ("tags", lambda batch: batch.lists_BW[:, 3:5].sum(1)),  # make_lists: three hobbies, then two tags
        ("item_terms", lambda batch: batch.lists_BW[:, -4:].sum(1)),
    ],
)
def test_only_the_signal_in_use_loses_auc(manifest, signal, of):
    for part in found_of(of, manifest)["parts"]:
        others = {name: drop for name, drop in part["drops"].items() if name != signal}
        assert all(drop == {"drop": 0, "low": 0, "high": 0} for drop in others.values())
        if part["rows"] == "all":
            assert part["drops"][signal]["drop"] != 0


def test_the_drop_is_the_auc_less_that_of_the_exchanged_values(lake, manifest):
    from sklearn.metrics import roc_auc_score

    rows = [row for _, row in expected_rows(lake, manifest)]
    parts = {(p["scenario"], p["rows"]): p for p in found_of(lambda batch: batch.sparse_BF[:, 1], manifest)["parts"]}
    of_part = {("search", "all"): [r for r in rows if r["scenario"] == "search"]}
    of_part["search", "unseen item"] = [r for r in of_part["search", "all"] if r["item_id_index"] == UNKNOWN_ID]
    for key, own in of_part.items():
        labels, items = [r["is_click"] for r in own], np.array([r["item_id_index"] for r in own])
        part = parts[key]
        assert (part["num_rows"], part["num_positives"]) == (len(own), sum(labels))
        whole = roc_auc_score(labels, -items)
        exchanged = roc_auc_score(labels, -items[np.random.default_rng(0).permutation(len(own))])
        assert part["auc"] == pytest.approx(whole)
        assert part["drops"]["item_id"]["drop"] == pytest.approx(whole - exchanged, abs=1e-12)
    assert parts["search", "unseen item"]["drops"]["item_id"]["drop"] == 0, "they all have one id"


def test_it_says_how_far_it_is_in_at_most_ten_lines(manifest, monkeypatch):
    monkeypatch.setattr(monitor, "_SAY_EVERY_S", 0)
    lines = []
    found = found_of(lambda batch: batch.sparse_BF[:, 1], manifest, report=lines.append)
    drawn, scored = ([line for line in lines if line.startswith(f"importance: {what}")] for what in ("rows drawn", ""))
    scored = [line for line in scored if line not in drawn]
    assert 1 <= len(drawn) <= 10
    signals = max(len(part["drops"]) for part in found["parts"])
    rows = sum(part["num_rows"] for part in found["parts"]) * (1 + signals)
    assert 5 <= len(scored) <= 10
    assert all(line.startswith(f"importance: {signals} signals; ") for line in scored)
    assert f" of {rows:,} rows, " in scored[0]
    quiet = []
    monkeypatch.undo()
    assert found_of(lambda batch: batch.sparse_BF[:, 1], manifest, report=quiet.append) == found
    assert quiet == [], "within ten seconds there is nothing to say"


def test_lines_come_at_each_tenth_with_rate_and_time_left(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: seconds[0])
    lines = []
    add = monitor.row_progress("rows evaluated", 1000, lines.append)
    for _ in range(99):
        seconds[0] += 5
        add(10)
    seconds[0] += 5
    add(64)  # a batch that is filled up
    assert len(lines) == 10
    assert lines[0] == "rows evaluated; 100 of 1,000 rows, 10%; 2 rows/s, about 0:07:30 left"
    assert lines[-1] == "rows evaluated; 1,000 of 1,000 rows, 100%; 2 rows/s, about 0:00:00 left"


class SideTables(NoTables):
    """The model sees, in place of a lookup, what brand the event's item has."""

    def __init__(self, spec):
        super().__init__(sizes(spec))
        self.lists = table_columns(spec)
        self.sides = ItemSides(("brand",), torch.arange(sizes(spec)["item_id"])[:, None] % sizes(spec)["brand"])

    def unique_ids(self, batch):
        return unique_ids(batch, self.num_rows(), self.sides, self.lists)

    def lookup(self, batch, unique):
        return unique


def test_the_sides_of_the_events_are_a_signal_of_their_own(manifest):
    class BySides(OneSignal):
        def forward(self, batch, lookup):
            names = [f.name for f in manifest.spec.sparse]
            items, brand = lookup[names.index("item_id")].ids_U, lookup[names.index("brand")]
            brands_U = brand.ids_U[brand.of_items.index_V]
            self.of = lambda batch: brands_U[torch.searchsorted(items, newest_item(batch).long())]
            return super().forward(batch, lookup)

    tables = SideTables(manifest.spec)
    found = importance(BySides(None), tables, manifest, LocalWorker("cpu"), make_config(), evaluated(manifest))
    drops = found["parts"][0]["drops"]
    assert {name for name, drop in drops.items() if drop["drop"]} == {"search_history", "sides of the events"}


def test_a_counter_is_one_signal(manifest):
    names = ["counter_user_brand_7d_ctr", "counter_user_brand_all_clicks", "counter_user_all_clicks", "counter_rate"]
    counters = tuple(DenseFeature(name=name, column=name, owner="user") for name in names)
    signals = signals_of(replace(manifest.spec, dense=counters), None)
    found = {signal.name: signal.dense for signal in signals if signal.dense}
    assert found == {"counter_user_brand": (0, 1), "counter_user": (2,), "counter_rate": (3,)}


def test_rows_are_bounded_and_drawn_alike_each_time(manifest):
    one, two = (found_of(lambda batch: batch.sparse_BF[:, 1], manifest, max_rows=200) for _ in range(2))
    assert one == two
    assert one["num_rows"] == 200 < len(evaluated(manifest)) < manifest.num_rows
    most = found_of(lambda batch: batch.sparse_BF[:, 1], manifest, max_rows=manifest.num_rows - 1)
    assert most["num_rows"] == len(evaluated(manifest)), "rows that are not evaluated take no room"
    assert sum(p["num_rows"] for p in one["parts"] if p["rows"] == "all") == one["num_rows"]


def test_an_id_is_named_with_the_vectors_that_it_is_exchanged_with(manifest):
    vectors = [VectorFeature(name=name, owner=owner, length=2) for name, owner in (("a", "item"), ("b", "item"))]
    assert [s.name for s in signals_of(manifest.spec, None)][:2] == ["user_id", "item_id"]
    for number, name in ((1, "item_id and its vector"), (2, "item_id and its vectors")):
        spec = replace(manifest.spec, vectors=tuple(vectors[:number]))
        assert [s.name for s in signals_of(spec, None)][:2] == ["user_id", name]


def test_a_part_without_both_labels_has_no_drops(manifest):
    found = found_of(lambda batch: batch.sparse_BF[:, 1], manifest, max_rows=1)
    assert [(p["num_rows"], p["auc"], p["drops"]) for p in found["parts"]] == [(1, None, {})]
    assert not importance_section(found, ("search", "recommendation")).plots


@pytest.fixture(scope="module")
def runs(lake, tmp_path_factory):
    """A USR and its plain twin, as they are before the first step."""
    train, folders = build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE + dt.timedelta(days=1))), []
    parts = {"interest": False, "generator": False, "multitask": False}
    for name, changes in (("usr", {}), ("plain", parts)):
        config = make_config(train_dates="2026-01-01:2026-01-02").to_dict()
        for part, is_on in changes.items():
            config["model"][part]["enabled"] = is_on
        state = TrainState(Config.from_dict(config), train, LocalWorker("cpu"), order="x")
        folders.append(tmp_path_factory.mktemp(name))
        store = CheckpointStore(folders[-1] / "checkpoints")
        store.save(1, state.tensors(), state.describe(LocalWorker("cpu")))
        train.save(folders[-1] / "manifest-train.json")
    return folders


def test_the_job_writes_it_and_the_report_shows_it(lake, runs, capsys):
    usr, plain = runs
    command = ["--run-dir", str(usr), "--lake", str(lake), "--dates", "2026-01-03:2026-01-04", "--importance"]
    assert run_job(job.main, [*command, "--compare", str(plain)]) == 0
    about = json.loads((usr / "evaluation-2026-01-03_2026-01-04.json").read_text())["about"]
    drops = about["importance"]["parts"][0]["drops"]
    assert {"user_id", "item_id", "query", "brand", "price", "search_history", "sides of the events"} <= set(drops)
    printed = capsys.readouterr().out
    assert importance_text(about["importance"]) in printed
    section = importance_section(about["importance"], ("search", "recommendation"))
    assert [plot.title for plot in section.plots] == ["Clicks in search", "Clicks in recommendation"]
    assert section.table.head[:3] == [
        "AUC lost without",
        "search",
        "search, unseen item",
    ]  # all unseen users share a key
    (row,) = (row.values for row in section.table.rows if row.values[0] == "brand")
    assert row[1].replace("\N{MINUS SIGN}", "-") == f"{drops['brand']['drop']:+.4f}"
    assert comparison_text(about["comparison"]) in printed
    first = about["comparison"]["cells"][0]["auc"]
    assert list(first) == ["popularity", "logistic regression", "SharedBottom alone", "USR on SharedBottom"]
    metrics = json.loads((usr / "evaluation-2026-01-03_2026-01-04.json").read_text())["eval"]
    assert first["USR on SharedBottom"] == metrics["search"]["ctr"]["auc"]


def test_a_run_that_cannot_be_compared_with_is_named_before_anything_is_evaluated(
    lake, runs, tmp_path, capsys, monkeypatch
):
    usr, plain = runs
    monkeypatch.setattr(evaluate_module, "evaluate", None)
    command = ["--run-dir", str(usr), "--lake", str(lake), "--dates", "2026-01-03", "--compare", str(tmp_path)]
    assert run_job(job.main, command) == 2
    assert capsys.readouterr().err.startswith(f"error: --compare {tmp_path}: holds no valid checkpoint")
    saved = CheckpointStore(plain / "checkpoints").newest_valid()
    spec = saved.state["spec"] | {"history_length": 9}
    CheckpointStore(tmp_path / "checkpoints").save(1, saved.tensors, saved.state | {"spec": spec})
    assert run_job(job.main, command) == 2
    refused = f"error: --compare {tmp_path}: histories.length of the samples table is 5, but the model was trained wi"
    assert capsys.readouterr().err.startswith(refused)


def test_a_comparison_says_what_the_other_run_has_seen_and_which_rows_it_knows(
    lake, runs, tmp_path, capsys, monkeypatch
):
    (usr, plain), own = runs, tmp_path / "own"
    shutil.copytree(usr, own)  # a run of two dates that began with weights of the day before
    of_usr = CheckpointStore(usr / "checkpoints").newest_valid().state["config"]
    (own / "config.json").write_text(json.dumps({"config": of_usr, "trained_dates": "2025-12-31:2026-01-02"}))
    store = CheckpointStore(plain / "checkpoints").newest_valid()
    chosen = {"only_scenario": "search", "eval_dates": "2026-01-04"}
    config = store.state["config"] | {"data": store.state["config"]["data"] | chosen}
    config["train"] = config["train"] | {"early_stopping": True}
    other = tmp_path / "other"
    CheckpointStore(other / "checkpoints").save(1, store.tensors, store.state | {"config": config})
    (other / "config.json").write_text(json.dumps({"config": config, "trained_dates": "2026-01-01:2026-01-03"}))
    command = ["--run-dir", str(own), "--lake", str(lake), "--dates", "2026-01-03:2026-01-04", "--output"]
    assert run_job(job.main, [*command, str(tmp_path / "m.json"), "--compare", str(other)]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    num_rows = {name: found["eval"][name]["ctr"]["num_samples"] for name in ("search", "all")}
    notes = found["about"]["comparison"]["notes"]
    assert notes == [
        f"on the {num_rows['search']:,} of {num_rows['all']:,} rows that both runs evaluate",
        "the logistic regression was fitted on 2026-01-01:2026-01-02 alone, the run and popularity have seen "
        "2025-12-31:2026-01-02",
        f"{other} was trained on 2026-01-03: for it these dates are not held out",
        f"2026-01-04 also chose the epoch of {other} (train.early_stopping), which flatters it",
    ]
    cells = {entry["cell"]: entry for entry in found["about"]["comparison"]["cells"] if entry["task"] == "ctr"}
    assert cells["all"]["auc"] == cells["search"]["auc"], "the search's rows are all"
    assert cells["search"]["auc"]["USR on SharedBottom"] == found["eval"]["search"]["ctr"]["auc"]
    assert cells["recommendation"]["leads"] == {}
    printed = capsys.readouterr().out
    assert [f"warning: --compare: {note}" in printed for note in notes] == [True] * 4
    alone = store.state | {"config": config | {"data": config["data"] | {"only_scenario": "recommendation"}}}
    CheckpointStore(tmp_path / "feed" / "checkpoints").save(1, store.tensors, alone)
    (tmp_path / "feed" / "manifest-train.json").write_bytes((plain / "manifest-train.json").read_bytes())
    command[1] = str(tmp_path / "feed")
    assert run_job(job.main, [*command, str(tmp_path / "n.json"), "--compare", str(other)]) == 2
    assert "evaluate no row in common (data.only_scenario); name a run" in capsys.readouterr().err

    def none_of_its_rows(*arguments, **options):
        found = evaluate(*arguments, **options)
        return Evaluation(found.predictions.take(np.arange(0)), found.metrics)

    monkeypatch.setattr("usr_ray.training.evaluate.evaluate", none_of_its_rows)
    assert run_job(job.main, [*command, str(tmp_path / "n.json")]) == 2
    assert "rows is of recommendation (data.only_scenario) with final labels; name other" in capsys.readouterr().err
    assert not (tmp_path / "n.json").exists()


def test_a_run_without_it_has_no_such_section():
    assert not importance_section(None, ("search",)).plots
