"""The exported directory, opened as a user opens it: every backbone, both runtimes, on batches read from Delta."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable, write_deltalake
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from safetensors.torch import load_file

from jobs import export as job
from tests.unit.export_runs import MODELS, NAMES, PLAIN, make_run
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from tests.unit.serving.test_export_model import both, every_kind, vocabulary
from usr_ray.cli import run_job
from usr_ray.config import BACKBONES
from usr_ray.data.manifest import build_manifest
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.schema import FeatureSpec
from usr_ray.serving.check import drawn_batch, one_request, training_probabilities
from usr_ray.serving.export import export_run
from usr_ray.serving.model import padded_inputs, request_inputs
from usr_ray.serving.runtime import ExportedModel, ExportError
from usr_ray.training.evaluate import load_run

pytestmark = pytest.mark.e2e

RUN, OUT = "für-dich 北京 #1", "it's 50% of 北京 🙂"
"""Folders of the export that most tests look at: those of any name can be exported and opened."""
SIZES = {"user_id": 32, "item_id": 42, "query": 22, "brand": 8}


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lake")
    write_samples(folder, samples_spec(), num_rows=100, num_days=2)
    write_deltalake(folder / "vocabularies", vocabulary(**SIZES | {"item_id": 50}))
    return folder


def batches(lake, dates=(FIRST_DATE, FIRST_DATE + dt.timedelta(days=1))):
    manifest = build_manifest(lake, dates=dates)
    with SampleReader(
        manifest, Reading(global_batch_size=64, group_size=16, order="file", mature_only=False)
    ) as reader:
        yield from reader.batches(0)


def arrays(batch, spec):
    return {name: value.numpy() for name, value in padded_inputs(batch, spec).items()}


# All programs of the first backbone, with USR round it and alone; those of the others are slow, for the request's
# program (the test below) has every operation of a backbone, and tests/unit/serving has the model that is exported.
CASES = [
    pytest.param(*model, id=name, marks=[] if model[0] == "shared_bottom" else [pytest.mark.slow])
    for model, name in zip(MODELS, NAMES, strict=True)
]


OTHERS = [name for name in BACKBONES if name != "shared_bottom"]
WITH_USR = "apg"
"""Of the others round which USR lies."""


@pytest.mark.parametrize(
    ("backbone", "is_plain"),
    [pytest.param(name, True, id=name) for name in OTHERS if name != WITH_USR]
    + [pytest.param(n, False, id=f"{n}+usr", marks=[] if n == WITH_USR else pytest.mark.slow) for n in OTHERS],
)
def test_a_request_of_every_backbone_is_answered_as_the_training_model_answers(
    lake, tmp_path, backbone, is_plain, monkeypatch
):
    """Those of one backbone with large weights, which lie beside the ONNX file.

    USR's operations are those round shared_bottom (below) and one other.
    """
    is_large = backbone == "mmoe"
    if is_large:
        monkeypatch.setattr("usr_ray.serving.export._EXTERNAL_BYTES", 100)
    run_dir = make_run(tmp_path / "run", lake, backbone=backbone, **(PLAIN if is_plain else {}))
    manifest = export_run(run_dir, tmp_path / "out", lake, requests_only=True)
    assert ("request.onnx.data" in manifest["files"]) == is_large
    run = load_run(run_dir)
    model = ExportedModel(tmp_path / "out", per_request=True)
    for row in (0, 17):
        batch = one_request(next(batches(lake)), run.spec, row)
        with torch.inference_mode():
            expected = training_probabilities(run.module(batch, run.tables.lookup(batch)))
        inputs = request_inputs(padded_inputs(batch, run.spec), run.spec)
        found = model.predict({name: value.numpy() for name, value in inputs.items()})
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert value.std() > 1e-4
            np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("backbone", "is_plain"), CASES)
def test_both_programs_say_what_the_training_model_says(lake, tmp_path, request, backbone, is_plain):
    if (backbone, is_plain) == ("shared_bottom", False):  # the defaults, which `exported` has
        folder = request.getfixturevalue("exported")
        run_dir, out = folder / RUN, folder / "deep" / OUT
    else:
        run_dir, out = tmp_path / "run", tmp_path / "out"
        make_run(run_dir, lake, backbone=backbone, **(PLAIN if is_plain else {}))
        export_run(run_dir, out, lake)
    manifest = json.loads((out / "manifest.json").read_text())
    assert max(manifest["largest_difference_from_training_model"].values()) <= 1e-5
    run = load_run(run_dir)
    assert (run.config.model.backbone, run.config.model.interest.enabled) == (backbone, not is_plain)
    for runtime in ("torch", "onnx"):
        model = ExportedModel(out, runtime=runtime)
        for batch in batches(lake):
            with torch.inference_mode():
                expected = training_probabilities(run.module(batch, run.tables.lookup(batch)))
            inputs = arrays(batch, run.spec)
            found = model.predict(inputs)
            assert list(found) == list(expected)
            for name, value in expected.items():
                assert value.std() > 1e-4
                np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-5)
            for row in (0, 17):
                alone = model.predict({name: value[row : row + 1] for name, value in inputs.items()})
                for name, value in alone.items():
                    np.testing.assert_allclose(value, found[name][row : row + 1], rtol=0, atol=1e-6)


def test_a_request_of_every_kind_of_input_is_answered_as_the_run_answers(tmp_path):
    batch, run = every_kind(tmp_path, is_plain=False)
    manifest = export_run(tmp_path / "run", tmp_path / "export", None, requests_only=True)
    assert max(manifest["largest_difference_from_training_model"].values()) < 1e-5
    shapes = {entry["name"]: entry["shape"] for entry in manifest["request_inputs"]}
    assert (shapes["tags_indices"], shapes["item_terms_indices"]) == (["items", 2], ["items", 4])
    assert (shapes["hobbies_indices"], shapes["query_terms_indices"]) == ([1, 3], [1, 3])
    model = ExportedModel(tmp_path / "export", per_request=True)
    for row in (0, 17):
        request = one_request(batch, run.spec, row)
        inputs = request_inputs(padded_inputs(request, run.spec), run.spec)
        found = model.predict({name: value.numpy() for name, value in inputs.items()})
        for name, value in both(run, request)[0].items():
            assert value.std() > 1e-4
            torch.testing.assert_close(torch.from_numpy(found[name]), value, rtol=0, atol=1e-5)


# The request's program above has the same operations; the model that is exported says of each kind what the run says
# (tests/unit/serving), and the tests above have programs for rows.
@pytest.mark.slow
@pytest.mark.parametrize("is_plain", [False, True], ids=["USR", "plain"])
def test_the_programs_say_what_the_run_says_with_every_kind_of_input(tmp_path, is_plain):
    batch, run = every_kind(tmp_path, is_plain)
    manifest = export_run(tmp_path / "run", tmp_path / "export", None)
    assert max(manifest["largest_difference_from_training_model"].values()) < 1e-5
    inputs = {name: value.numpy() for name, value in padded_inputs(batch, run.spec).items()}
    for runtime in ("torch", "onnx"):
        found = ExportedModel(tmp_path / "export", runtime=runtime).predict(inputs)
        for name, value in both(run, batch)[0].items():
            torch.testing.assert_close(torch.from_numpy(found[name]), value, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def exported(lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    make_run(folder / RUN, lake, step=9)
    make_run(folder / RUN, lake, step=7, best=True, seed=1)
    words = ["--run-dir", folder / RUN, "--output", folder / "deep" / OUT, "--lake", lake]
    assert run_job(job.main, [str(word) for word in words]) == 0
    return folder


def test_the_request_program_takes_any_number_of_candidates(exported):
    run = load_run(exported / RUN)
    model = ExportedModel(exported / "deep" / OUT, per_request=True)
    rows = ExportedModel(exported / "deep" / OUT)
    assert [i["shape"][0] for i in model.manifest["request_inputs"]].count("items") == 2
    for num_items in (1, 2, 500):
        batch = one_request(drawn_batch(run.spec, num_items, seed=5), run.spec, 0)
        inputs = request_inputs(padded_inputs(batch, run.spec), run.spec)
        found = model.predict({name: value.numpy() for name, value in inputs.items()})
        for name, value in rows.predict(arrays(batch, run.spec)).items():
            assert found[name].shape == (num_items,)
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6)


def test_the_directory_holds_what_its_manifest_says(lake, exported):
    out = exported / "deep" / OUT
    manifest = json.loads((out / "manifest.json").read_text())
    names = {
        "model.pt2",
        "model.onnx",
        "request.onnx",
        "weights.safetensors",
        "vocabularies.parquet",
        "feature_spec.json",
    }
    assert {path.name for path in out.iterdir()} == names | {"manifest.json"}
    assert set(manifest["files"]) == names
    for name, file in manifest["files"].items():
        content = (out / name).read_bytes()
        assert file == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert manifest["checkpoint"]["name"] == "best-00000007"
    assert manifest["table"]["version"] == DeltaTable(lake / "samples").version()
    assert manifest["model"]["backbone"] == "shared_bottom"
    assert [i["name"] for i in manifest["inputs"]][:3] == ["scenario", "sparse", "dense"]
    assert manifest["inputs"][1] == {"name": "sparse", "dtype": "int64", "shape": ["rows", 5]}
    assert [o["name"] for o in manifest["outputs"]] == ["p_ctr", "p_ctcvr", "p_ctr_global", "p_ctcvr_global"]
    assert FeatureSpec.from_json((out / "feature_spec.json").read_text()) == samples_spec()
    values = pq.read_table(out / "vocabularies.parquet")
    assert values.num_rows == sum(size - 2 for size in SIZES.values())  # item_id has grown since: 8 values left out
    assert set(manifest["versions"]) >= {"usr_ray", "torch", "onnx", "onnxruntime"}
    run = load_run(exported / RUN)
    weights = load_file(out / "weights.safetensors")
    assert torch.equal(weights["embeddings.tables.1"], run.tables.tables["item_id"])
    assert not [path for path in (exported / "deep").iterdir() if path.name != OUT]


def test_inputs_that_do_not_fit_are_refused(lake, exported):
    model = ExportedModel(exported / "deep" / OUT)
    inputs = arrays(next(batches(lake)), samples_spec())
    with pytest.raises(ExportError, match="inputs: missing dense, unknown numbers; the model takes: scenario, sparse"):
        model.predict({("numbers" if name == "dense" else name): value for name, value in inputs.items()})
    with pytest.raises(ExportError, match=r"input scenario: is int32 \(64,\); the model takes int64 \(64,\)"):
        model.predict(inputs | {"scenario": inputs["scenario"].astype(np.int32)})
    with pytest.raises(ExportError, match=r"input sparse: is int64 \(64, 4\); the model takes int64 \(64, 5\)"):
        model.predict(inputs | {"sparse": inputs["sparse"][:, 1:]})
    with pytest.raises(ExportError, match="input scenario: holds 0 to 2; the model has scenarios 0 to 1"):
        model.predict(inputs | {"scenario": np.arange(64) % 3})


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_no_rows_give_no_rows(lake, exported, runtime):
    model = ExportedModel(exported / "deep" / OUT, runtime=runtime)
    none = {name: value[:0] for name, value in arrays(next(batches(lake)), samples_spec()).items()}
    assert [value.shape for value in model.predict(none).values()] == [(0,)] * 4


@pytest.mark.parametrize("scenario", [-1, 2])
def test_the_programs_themselves_refuse_a_scenario_they_lack(lake, exported, scenario):
    inputs = arrays(next(batches(lake)), samples_spec()) | {"scenario": np.full(64, scenario)}
    session = onnxruntime.InferenceSession(exported / "deep" / OUT / "model.onnx")
    with pytest.raises(InvalidArgument):
        session.run(None, inputs)
    with pytest.raises(IndexError):
        torch.export.load(exported / "deep" / OUT / "model.pt2").module()(
            {name: torch.from_numpy(value) for name, value in inputs.items()}
        )


def test_an_export_that_cannot_be_written_leaves_nothing(lake, exported, tmp_path, capsys, monkeypatch):
    words = ["--run-dir", str(exported / RUN), "--output", str(tmp_path / "new" / "out")]
    assert run_job(job.main, [*words, "--lake", str(tmp_path)]) == 2
    assert "no Delta table at" in capsys.readouterr().err

    def written_before(model, spec, folder, *, requests_only):
        for name in ("model.pt2", "model.onnx", "request.onnx"):
            os.link(exported / "deep" / OUT / name, folder / name)

    monkeypatch.setattr("usr_ray.serving.export.write_programs", written_before)
    monkeypatch.setattr("usr_ray.serving.export.largest_differences", lambda *_, **__: {"model.onnx": float("nan")})
    assert run_job(job.main, words) == 1
    assert "differs from the training model" in capsys.readouterr().err
    assert not any((tmp_path / "new").iterdir())
    words[-1] = str(exported / "deep" / OUT)
    assert run_job(job.main, words) == 2
    assert "is not empty; name another directory, or delete this one" in capsys.readouterr().err


def test_a_changed_file_is_refused(exported, tmp_path):
    for path in (exported / "deep" / OUT).iterdir():
        os.link(path, tmp_path / path.name)
    ExportedModel(tmp_path)
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model.onnx").write_bytes(b"other")
    with pytest.raises(ExportError, match=r"model.onnx: missing or changed since the export; export the run again"):
        ExportedModel(tmp_path)
