"""Going on from another run's weights: day after day, with vocabularies that grew; and what is refused."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from deltalake import DeltaTable, WriterProperties, write_deltalake

from tests.unit.random_batches import make_lists
from tests.unit.samples_table import FIRST_DATE, samples_arrow, samples_spec, write_samples
from tests.unit.training.test_loop import assert_equal_states, make_config, run
from usr_ray.config import Config
from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.multitask import REST_SHARE
from usr_ray.schema import FEATURE_SPEC_PROPERTY, ITEM_FEATURES_PROPERTY, SAMPLES, FeatureSpec
from usr_ray.training.checkpoint import CheckpointError
from usr_ray.training.evaluate import load_run
from usr_ray.training.state import TrainState
from usr_ray.training.warm_start import check_warm_start, find_checkpoint, warm_start_refusal
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration

DAYS = [FIRST_DATE + dt.timedelta(days=n) for n in range(3)]
ROWS_A_DAY = 128
NO_DRAWS = {"group_size": 16, "interest_weight": 0.0, "feature_weight": 0.0}
"""Without twins: their masks are drawn by step, and a run of one day counts its own."""


@pytest.fixture(scope="module")
def even_days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dates of 128 rows, in row groups of 32: whole batches of 64."""
    folder, spec = tmp_path_factory.mktemp("even"), samples_spec()
    table = samples_arrow(spec, num_rows=600, num_days=3)
    for day in DAYS:
        rows = table.filter(pc.equal(table["impression_date"], day)).slice(0, ROWS_A_DAY)
        assert rows.num_rows == ROWS_A_DAY
        properties = WriterProperties(max_row_group_size=32, write_batch_size=32)
        write_deltalake(
            folder / SAMPLES, rows, partition_by=["impression_date"], mode="append", writer_properties=properties
        )
    DeltaTable(folder / SAMPLES).alter.set_table_properties(
        {FEATURE_SPEC_PROPERTY: spec.to_json()}, raise_if_not_exists=False
    )
    return folder


def by_date(first: dt.date, last: dt.date, **changes: Any) -> Config:
    return make_config(
        data_train_dates=f"{first}:{last}",
        data_eval_dates="",
        data_mature_only=False,
        train_order="by_date",
        model_contrastive=NO_DRAWS,
        **changes,
    )


def test_a_run_for_each_day_ends_as_one_run_by_date(even_days: Path, tmp_path: Path) -> None:
    all_days = build_manifest(even_days, dates=(DAYS[0], DAYS[-1]))
    whole = run(by_date(DAYS[0], DAYS[-1]), (all_days, None), tmp_path / "whole")
    before = ""
    for day in DAYS:
        folder = tmp_path / f"{day}"
        config = by_date(day, day, train_warm_start=before)
        daily = run(config, (build_manifest(even_days, dates=(day, day)), None), folder)
        before = str(folder)
    assert (whole.step, daily.step) == (6, 2)
    for result in (whole, daily):  # of three days' rows, and of the last day's
        result.state.module.get_buffer(REST_SHARE).fill_(1)
    assert_equal_states(whole, daily)


def test_a_stopped_run_goes_on_from_itself_and_not_from_its_warm_start(even_days: Path, tmp_path: Path) -> None:
    manifest = build_manifest(even_days, dates=(DAYS[0], DAYS[0]))
    run(by_date(DAYS[0], DAYS[0]), (manifest, None), tmp_path / "first")
    config = by_date(DAYS[0], DAYS[0], train_warm_start=str(tmp_path / "first"), train_num_epochs=2)
    unbroken = run(config, (manifest, None), tmp_path / "unbroken")
    asked = LocalWorker("cpu")
    asked.request_stop()
    assert run(config, (manifest, None), tmp_path / "run", None, asked).step == 1
    assert_equal_states(unbroken, run(config, (manifest, None), tmp_path / "run"))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """(a finished run, its rows)."""
    lake, run_dir = tmp_path_factory.mktemp("lake"), tmp_path_factory.mktemp("run")
    write_samples(lake, samples_spec(), num_rows=300, num_days=3)
    manifest = build_manifest(lake, dates=(DAYS[0], DAYS[-1]))
    run(make_config(), (manifest, None), run_dir)
    return run_dir, manifest


def with_spec(manifest: Manifest, spec: FeatureSpec) -> Manifest:
    return dataclasses.replace(manifest, spec=spec)


def resized(spec: FeatureSpec, sizes: dict[str, int]) -> FeatureSpec:
    sparse = [dataclasses.replace(f, num_embeddings=sizes.get(f.name, f.num_embeddings)) for f in spec.sparse]
    return dataclasses.replace(spec, sparse=tuple(sparse))


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_tables_that_grew_hold_the_old_rows_and_then_fresh_ones(
    earlier: tuple[Path, Manifest], with_optimizer: bool
) -> None:
    run_dir, manifest = earlier
    grown = with_spec(manifest, resized(manifest.spec, {"item_id": 60, "query": 33}))
    config = make_config(train_warm_start=str(run_dir), train_warm_start_optimizer=with_optimizer)
    worker = LocalWorker("cpu")
    state = TrainState(config, grown, worker, order="")
    assert Path(state.warm_start(str(run_dir), worker)).parent == run_dir / "checkpoints"
    old, new = find_checkpoint(str(run_dir)).tensors, state.tensors()
    fresh = EmbeddingTables(grown.spec, config.model.embedding_dim, config.train.seed).tables
    assert {name: len(fresh[name]) for name in ("item_id", "query", "user_id")} == {
        "item_id": 60,
        "query": 33,
        "user_id": 32,
    }
    for name, table in fresh.items():
        size = len(old[f"tables/{name}"])
        assert torch.equal(new[f"tables/{name}"], torch.cat([old[f"tables/{name}"], table[size:]]))
        sums = old[f"adagrad/{name}"] if with_optimizer else torch.zeros(size)
        assert torch.equal(new[f"adagrad/{name}"], torch.cat([sums, torch.zeros(len(table) - size)]))
    assert all(torch.equal(new[name], old[name]) for name in old if name.startswith("model/"))
    assert any(name.startswith("adamw/") for name in new) == with_optimizer
    assert (state.step, state.epoch) == (0, 0)


@pytest.mark.parametrize(
    ("config", "spec_change", "message"),
    [
        (
            make_config(),
            lambda s: resized(s, {"item_id": 41}),
            "item_id had 42 ids, .* has 41; vocabularies only grow, so this is an older table; name another, or set",
        ),
        (
            make_config(),
            lambda s: dataclasses.replace(s, history_length=9),
            r"histories.length of the samples table is 9, but the model was trained with 5 \(.*\); name another",
        ),
        (
            make_config(),
            lambda s: dataclasses.replace(s, sparse=s.sparse[:-1]),
            "categories of the samples table is user_id, .*event_hour, but the model was trained with user_id, .*brand",
        ),
        (make_config(), lambda s: dataclasses.replace(s, label_delay_us=1), "labels' delay in microseconds"),
        (make_config(model_embedding_dim=8), lambda s: s, "it has model.embedding_dim = 4, this run 8; set it so, or"),
        (
            make_config(model_wide=True),
            lambda s: s,
            "it has model.wide = False, this run True; set it so, or name another",
        ),
        (
            make_config(train_embedding_optimizer="rowwise_adam"),
            lambda s: s,
            "it has train.embedding_optimizer = 'rowwise_adagrad', this run 'rowwise_adam'",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_at_plan_time_and_by_the_workers(
    earlier: tuple[Path, Manifest], config: Config, spec_change: Any, message: str
) -> None:
    run_dir, manifest = earlier
    other = with_spec(manifest, spec_change(manifest.spec))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, warm_start=str(run_dir)))
    with pytest.raises(CheckpointError, match=message) as planned:
        check_warm_start(config, other)
    worker = LocalWorker("cpu")
    with pytest.raises(CheckpointError, match=message) as raised:
        TrainState(config, other, worker, order="").warm_start(str(run_dir), worker)
    assert str(planned.value) == str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_optimisers_kind_may_change_when_its_state_is_left_behind(earlier: tuple[Path, Manifest]) -> None:
    run_dir, manifest = earlier
    config = make_config(
        train_warm_start=str(run_dir), train_warm_start_optimizer=False, train_embedding_optimizer="rowwise_adam"
    )
    check_warm_start(config, manifest)


def test_terms_go_on_while_their_vocabulary_grows(tmp_path: Path) -> None:
    spec = samples_spec(lists=make_lists(9))
    write_samples(tmp_path / "lake", spec, num_rows=300, num_days=3)
    manifest = build_manifest(tmp_path / "lake", dates=(DAYS[0], DAYS[-1]))
    run(make_config(), (manifest, None), tmp_path / "run")
    saved = find_checkpoint(str(tmp_path / "run")).tensors["tables/term"]
    lists = tuple(dataclasses.replace(f, num_embeddings=12 if f.table == "term" else 9) for f in spec.lists)
    grown = dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, lists=lists))
    config, worker = make_config(train_warm_start=str(tmp_path / "run")), LocalWorker("cpu")
    state = TrainState(config, grown, worker, order="")
    fresh = state.tensors()["tables/term"].clone()
    state.warm_start(str(tmp_path / "run"), worker)
    now = state.tensors()["tables/term"]
    assert (saved[1:] != fresh[1:9]).all(dim=1).any(), "nothing was learned"
    assert torch.equal(now, torch.cat([saved, fresh[9:]]))
    shorter = dataclasses.replace(grown, spec=dataclasses.replace(grown.spec, lists=lists[:-1]))
    with pytest.raises(CheckpointError, match="item_terms"):
        check_warm_start(config, shorter)


def test_a_folder_without_a_checkpoint_is_refused(earlier: tuple[Path, Manifest], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no run directory with a whole checkpoint, and no checkpoint; name"):
        check_warm_start(make_config(train_warm_start=str(tmp_path / "nothing")), earlier[1])


def test_a_checkpoint_itself_may_be_named(earlier: tuple[Path, Manifest]) -> None:
    newest = find_checkpoint(str(earlier[0])).path
    assert find_checkpoint(str(newest)).path == newest
    check_warm_start(make_config(train_warm_start=str(newest)), earlier[1])


def test_events_with_sides_go_on_with_the_features_of_now_and_refuse_a_run_without(tmp_path: Path) -> None:
    write_samples(tmp_path / "lake", samples_spec(sides=("brand",)), num_rows=300, num_days=3)
    manifest = build_manifest(tmp_path / "lake", dates=(DAYS[0], DAYS[-1]))
    run(make_config(), (manifest, None), tmp_path / "with")
    run(make_config(model_event_sides=False), (manifest, None), tmp_path / "without")
    worker = LocalWorker("cpu")
    saved = find_checkpoint(str(tmp_path / "with")).tensors
    # A brand that was renamed since: the run of now says what its items are, not the checkpoint.
    features = DeltaTable(tmp_path / "lake" / "item_features").to_pyarrow_table()
    brands = pa.array([1] * features.num_rows)
    write_deltalake(
        tmp_path / "lake" / "item_features",
        features.set_column(1, "brand_index", brands),
        mode="overwrite",
    )
    DeltaTable(tmp_path / "lake" / SAMPLES).alter.set_table_properties(
        {ITEM_FEATURES_PROPERTY: "1"}, raise_if_not_exists=False
    )
    later = build_manifest(tmp_path / "lake", dates=(DAYS[0], DAYS[-1]))
    assert later.sha256 != manifest.sha256
    state = TrainState(make_config(train_warm_start=str(tmp_path / "with")), later, worker, order="")
    state.warm_start(str(tmp_path / "with"), worker)
    now = state.tensors()
    assert now["sides/item_id"][2:].unique().tolist() == [1]
    assert saved["sides/item_id"][2:].unique().tolist() != [1]
    assert all(torch.equal(now[name], saved[name]) for name in saved if name.startswith(("model/", "tables/")))
    refused = r"none of the item's categories and vectors, this run's brand; set model.event_sides to false"
    with pytest.raises(CheckpointError, match=refused):
        check_warm_start(make_config(train_warm_start=str(tmp_path / "without")), later)
    off = make_config(train_warm_start=str(tmp_path / "without"), model_event_sides=False)
    check_warm_start(off, later)
    bare = replace(later, spec=replace(later.spec, history_item_features=()))
    refused = r"brand of the item's .*, this run's none; build a date with the features.history_item_features of then"
    with pytest.raises(CheckpointError, match=refused):
        check_warm_start(make_config(train_warm_start=str(tmp_path / "with")), bare)


def test_the_first_order_part_goes_on_while_the_vocabularies_grow_and_keeps_its_crosses(
    earlier: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """Checkpoints from before there was such a part fit a run without it: `earlier`'s, with the keys taken out."""
    run_dir, manifest = earlier
    state = dict(find_checkpoint(str(run_dir)).state)
    state["config"] = json.loads(json.dumps(state["config"]))
    del state["config"]["features"]["crosses"]
    for key in ("wide", "wide_buckets", "wide_l2", "pepnet_hidden"):
        del state["config"]["model"][key]
    del state["config"]["model"]["contrastive"]["every_nth_group"]
    assert warm_start_refusal(state, "old", make_config(), manifest) is None
    assert Config.completed(state["config"])["model"]["contrastive"]["every_nth_group"] == 1, "a resumed run's"

    crosses = [["user_id", "item_id"], ["item_id", "query", "scenario"]]
    wide = {"model_wide": True, "model_wide_buckets": 200, "features": {"crosses": crosses}}
    run(make_config(**wide), (manifest, None), tmp_path / "wide")
    saved = find_checkpoint(str(tmp_path / "wide")).tensors
    grown = with_spec(manifest, resized(manifest.spec, {"item_id": 60}))
    worker, again = LocalWorker("cpu"), make_config(**wide, train_warm_start=str(tmp_path / "wide"))
    later = TrainState(again, grown, worker, order="")
    later.warm_start(str(tmp_path / "wide"), worker)
    weights = later.tensors()["model/wide.weights_NH"]
    assert torch.equal(weights, saved["model/wide.weights_NH"])
    assert weights[1:].any()
    assert not weights[0].any()
    ids_BP = torch.randint(1, 42, (50, len(later.module.wide.parts) + 1))
    before = load_run(tmp_path / "wide").module.wide
    assert torch.equal(later.module.wide.buckets(ids_BP), before.buckets(ids_BP))
    other = make_config(**wide | {"features": {"crosses": crosses[:1]}}, train_warm_start=str(tmp_path / "wide"))
    with pytest.raises(
        CheckpointError, match=r"it has features.crosses = \[\['user_id', 'item_id'\], .*; set it so, or"
    ):
        check_warm_start(other, grown)
