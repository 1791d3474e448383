"""Runs on a table with vectors: written once beside the checkpoints, resumed to the bit, warm started, weighed."""

from __future__ import annotations

import dataclasses
import datetime as dt
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unit.random_batches import VECTORS
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from tests.unit.training.test_importance import evaluated
from tests.unit.training.test_loop import Watcher, assert_equal_states, make_config, run
from usr_ray.data.batch import UsrBatch, UsrOutputs
from usr_ray.data.by_id import read_cold, read_vectors
from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.data.mature import WhichRows
from usr_ray.model.embedding import EmbeddingTables, Lookup
from usr_ray.training.checkpoint import CheckpointError, CheckpointStore
from usr_ray.training.embeddings import load_vectors
from usr_ray.training.evaluate import load_run
from usr_ray.training.importance import importance
from usr_ray.training.rows import read_training_rows
from usr_ray.training.state import TrainState
from usr_ray.training.warm_start import check_warm_start, find_checkpoint
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration

LAST = FIRST_DATE + dt.timedelta(days=2)


def manifest_of(folder: Path, **spec: object) -> Manifest:
    write_samples(folder, samples_spec(vectors=VECTORS, **spec), num_rows=300, num_days=3)
    return build_manifest(folder, dates=(FIRST_DATE, LAST))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A run that was stopped after two steps and resumed, and what it read."""
    folder = tmp_path_factory.mktemp("vectors")
    manifest, worker = manifest_of(folder / "lake"), LocalWorker("cpu")
    config = make_config(train_log_every_steps=1, train_average=0.75)
    stopped = run(config, (manifest, None), folder / "run", Watcher(worker, 1), worker)
    assert stopped.status == "stopped"
    resumed = run(config, (manifest, None), folder / "run")
    assert_equal_states(run(config, (manifest, None), folder / "unbroken"), resumed)
    return folder / "run", manifest


def test_a_run_holds_its_vectors_once_and_needs_no_lake(trained: tuple[Path, Manifest]) -> None:
    run_dir, manifest = trained
    expected = read_vectors(manifest)
    files = sorted(path.name for path in (run_dir / "checkpoints").glob("vectors*"))
    checkpoint = find_checkpoint(str(run_dir))
    assert files == [checkpoint.state["vectors"]]
    assert expected["title_vector"].shape == (42, 6)
    assert not any(tensor.shape == (42, 6) for tensor in checkpoint.tensors.values()), "weights and optimisers' states"
    loaded = load_run(run_dir).tables.vectors
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], torch.from_numpy(expected[name])) for name in expected)
    maps = [checkpoint.tensors[f"model/inputs.vector_maps.{n}"] for n in range(3)]
    fresh = TrainState(make_config(), manifest, LocalWorker("cpu"), order="").module.inputs.vector_maps
    assert all((now != before).any(dim=1).all() for now, before in zip(maps, fresh, strict=True)), "maps are learned"


def test_rows_of_ids_known_by_their_vector_alone_are_never_trained(trained: tuple[Path, Manifest]) -> None:
    """The unknown id's row is, in their place; the run knows which they are, and needs no lake for it."""
    run_dir, manifest = trained
    tensors, expected = find_checkpoint(str(run_dir)).tensors, read_cold(manifest)
    fresh = TrainState(make_config(), manifest, LocalWorker("cpu"), order="").tables.tables
    loaded = load_run(run_dir).tables.cold
    assert {key: cold_N.tolist() for key, cold_N in loaded.items()} == {k: c.tolist() for k, c in expected.items()}
    for key, cold_N in loaded.items():
        assert 5 < cold_N.sum() < 12
        for part in ("tables", "average"):
            now = tensors[f"{part}/{key}"]
            assert torch.equal(now[cold_N], fresh[key][cold_N]), part
            assert (now[1:][~cold_N[1:]] != fresh[key][1:][~cold_N[1:]]).all(), "300 rows have every other id"
        assert not tensors[f"adagrad/{key}"][cold_N].any()
    raw = read_training_rows(replace_vectors(manifest), WhichRows()).item_id_N
    assert np.isin(raw, np.flatnonzero(expected["item_id"])).sum() > 20
    cold = expected["item_id"][raw]
    assert read_training_rows(manifest, WhichRows()).item_id_N.tolist() == np.where(cold, 1, raw).tolist()


def replace_vectors(manifest: Manifest) -> Manifest:
    """The manifest as of a table without vectors."""
    return dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, vectors=()))


def test_vectors_that_are_gone_or_torn_are_one_line(trained: tuple[Path, Manifest], tmp_path: Path) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    (file,) = store.directory.glob("vectors-*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"vectors-\w+.safetensors: does not match its checksum \(torn or chang"):
        load_run(tmp_path / "run")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read .* without its vectors the model cannot be used"):
        load_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"cannot be read|does not match"):
        store.load_vectors("../vectors-0.safetensors")
    found = find_checkpoint(str(trained[0]))
    (store.directory / "vectors.tmp-0f").write_bytes(b"of a process that was killed")
    store.save(found.step, found.tensors, found.state, vectors=load_run(trained[0]).tables.frozen)
    assert file.read_bytes() == content
    assert not list(store.directory.glob("vectors.tmp-*"))


def test_a_warm_start_has_the_vectors_of_now_and_goes_on_with_the_maps(
    trained: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """The vocabulary has grown by ten items; a lake of other vectors is refused."""
    grown = manifest_of(tmp_path / "lake", num_items=50)
    config = make_config(train_warm_start=str(trained[0]))
    check_warm_start(config, grown)
    worker = LocalWorker("cpu")
    state = TrainState(config, grown, worker, order="")
    state.warm_start(str(trained[0]), worker)
    saved = find_checkpoint(str(trained[0])).tensors
    for n in range(len(VECTORS)):
        assert torch.equal(state.module.inputs.vector_maps[n], saved[f"model/inputs.vector_maps.{n}"])
    assert state.tables.vectors["title_vector"].shape == (52, 6)
    assert not state.tables.vectors["title_vector"][46].eq(0).all()
    # An id that was there for its vector alone has a new id's row: it begins so, once it is admitted.
    cold_N = load_run(trained[0]).tables.cold["item_id"].nonzero().flatten()
    fresh = TrainState(make_config(), grown, worker, order="").tables.tables["item_id"]
    assert torch.equal(state.tables.tables["item_id"][cold_N], fresh[cold_N])
    assert torch.equal(state.tables.tables["item_id"][42:], fresh[42:])
    assert not torch.equal(state.tables.tables["item_id"][:42], fresh[:42])
    longer = (dataclasses.replace(VECTORS[0], length=4), *VECTORS[1:])
    other = dataclasses.replace(grown, spec=dataclasses.replace(grown.spec, vectors=longer))
    with pytest.raises(CheckpointError, match=r"vectors of the samples table is face \(4 over 1.0\).* \(3 over 1.0\)"):
        check_warm_start(config, other)
    off = make_config(train_warm_start=str(trained[0]), model_event_sides=False)
    with pytest.raises(CheckpointError, match="title_vector, picture of the item's categories and vectors"):
        check_warm_start(off, grown)


@pytest.mark.parametrize("admitted", [True, False])
def test_importance_weighs_each_vector_by_itself(trained: tuple[Path, Manifest], admitted: bool) -> None:
    """Unseen are rows of the unknown id, which has none, and of ids that are known by their vector alone."""

    class ByVector(nn.Module):
        def forward(self, batch: UsrBatch, lookup: Lookup) -> UsrOutputs:
            value_B = lookup.vectors["picture"][lookup.tables["item_id"].ids.column_B, 0]
            log_p_BT = -1 - torch.stack([value_B, value_B], 1).float() / 100
            return UsrOutputs(log_p_BT, torch.log1p(-log_p_BT.exp()))

    manifest, config = trained[1], make_config(data_mature_only=False)
    vectors: dict[str, Tensor] = load_vectors(manifest)
    cold = read_cold(manifest)["item_id"] & (not admitted)
    if admitted:
        vectors = {name: held for name, held in vectors.items() if not name.endswith("_is_cold")}
    tables, num_unseen = EmbeddingTables(manifest.spec, 4, 0, vectors=vectors), 0
    rows_N = evaluated(manifest)
    for part in importance(ByVector(), tables, manifest, LocalWorker("cpu"), config, rows_N)["parts"]:
        num_unseen += part["num_rows"] * (part["rows"] == "unseen item")
        if part["auc"] is None:
            continue
        used = {name for name, drop in part["drops"].items() if drop["drop"]}
        assert used <= {"picture", "item_id and its vectors"}
        if part["rows"] in ("all", "unseen item"):
            assert ("picture" in used) == (part["rows"] == "all" or not admitted)
        assert {"face", "title_vector"} <= set(part["drops"])
    items = read_training_rows(replace_vectors(manifest), WhichRows()).item_id_N
    assert num_unseen == ((items == 1) | cold[items]).sum()
    assert np.array_equal(tables.vectors["picture"], read_vectors(manifest)["picture"]), "they are as before"
