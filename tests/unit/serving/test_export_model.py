"""The serving model against the training model, on batches read from Delta; its inputs by hand."""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import math
import shutil
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from tests.unit.export_runs import MODELS, NAMES, PLAIN, make_run
from tests.unit.random_batches import VECTORS, make_batch, make_config, make_lists, make_spec, make_tables
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.data.manifest import build_manifest
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.model.history import NUM_AGES, age_buckets
from usr_ray.model.usr import UsrModel
from usr_ray.schema import UNKNOWN_ID
from usr_ray.serving.check import drawn_batch, training_probabilities
from usr_ray.serving.export import ExportError, export_run, known_values
from usr_ray.serving.model import (
    GLOBAL_PROBABILITIES,
    RequestModel,
    ServingModel,
    input_shapes,
    padded_inputs,
    request_inputs,
    request_shapes,
)
from usr_ray.serving.runtime import ExportedModel, require_packages, verified_manifest
from usr_ray.training.evaluate import known_ids, load_run

pytestmark = pytest.mark.integration

torch.set_num_threads(1)  # rows this few are slower on more threads
DATES = (FIRST_DATE, FIRST_DATE + dt.timedelta(days=1))


def make_lake(folder, **spec):
    write_samples(folder, samples_spec(**spec), num_rows=100, num_days=2)
    return folder


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    return make_lake(tmp_path_factory.mktemp("lake"))


@pytest.fixture(scope="module")
def run_of(lake, tmp_path_factory):
    """(backbone, is_plain) -> a run of it on the lake, made once; its model stays as it is."""

    @functools.cache
    def made(backbone, is_plain):
        folder = tmp_path_factory.mktemp("run")
        return load_run(make_run(folder, lake, backbone=backbone, **(PLAIN if is_plain else {})))

    return made


@functools.cache
def real_batches(lake, size=64):
    """Batches of all rows, the last one with padding rows."""
    manifest = build_manifest(lake, dates=DATES)
    with SampleReader(
        manifest, Reading(global_batch_size=size, group_size=16, order="file", mature_only=False)
    ) as reader:
        return list(reader.batches(0))


def both(run, batch):
    """(training model's, serving model's) probabilities by name."""
    with torch.inference_mode():
        expected = training_probabilities(run.module(batch, run.tables.lookup(batch)))
    return expected, ServingModel(run.module, run.tables, run.spec)(padded_inputs(batch, run.spec))


def assert_parity(run, lake):
    num_rows = 0
    for batch in real_batches(lake):
        expected, found = both(run, batch)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert value.std() > 1e-4  # rows differ, so that agreement says something
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
        num_rows += len(batch)
    assert num_rows >= 100


@pytest.mark.parametrize(("backbone", "is_plain"), MODELS, ids=NAMES)
def test_every_backbone_serves_what_it_was_trained_to_say(lake, run_of, backbone, is_plain):
    assert_parity(run_of(backbone, is_plain), lake)


@pytest.mark.parametrize(
    "switches",
    [
        {"interest": {"enabled": False}},
        {"generator": {"enabled": False}},
        {"multitask": {"enabled": False}},
        {"multitask": {"variant": "B"}},
        {"interest": {"enabled": False}, "generator": {"enabled": False}},
        {"recent_queries": 50},
    ],
    ids=str,
)
def test_every_switch_is_served(lake, tmp_path, switches):
    run = load_run(make_run(tmp_path, lake, **switches))
    assert_parity(run, lake)
    has_global = ServingModel(run.module, run.tables, run.spec).output_names[2:] == GLOBAL_PROBABILITIES
    assert has_global == switches.get("multitask", {}).get("enabled", True)


@pytest.mark.parametrize(
    "spec",
    [{"scenarios": ("feed",), "query_scenarios": ()}, {"scenarios": ("a", "b", "c"), "query_scenarios": ("a", "c")}],
    ids=["one scenario without queries", "three scenarios, two with queries"],
)
def test_any_number_of_scenarios_is_served(tmp_path, spec):
    lake = make_lake(tmp_path / "lake", **spec)
    assert_parity(load_run(make_run(tmp_path / "run", lake, backbone="star")), lake)


@pytest.mark.parametrize("is_plain", [False, True], ids=["USR", "plain"])
def test_products_of_each_history_are_served(tmp_path, is_plain):
    lake = make_lake(tmp_path / "lake", sides=("brand",))
    switches = {"interaction_histories": "each", **(PLAIN if is_plain else {})}
    assert_parity(load_run(make_run(tmp_path / "run", lake, **switches)), lake)


@pytest.mark.parametrize("is_plain", [False, True], ids=["USR", "plain"])
def test_events_are_served_with_their_items_categories(tmp_path, is_plain):
    """The checkpoint holds them: once it is written, the lake is not asked again."""
    lake = make_lake(tmp_path / "lake", sides=("brand",))
    real_batches(lake)
    run = load_run(make_run(tmp_path / "run", lake, **(PLAIN if is_plain else {})))
    assert run.tables.sides.ids_NC[2:, 0].tolist() == [n % 7 + 1 for n in range(2, 42)]
    assert_parity(run, lake)
    without = load_run(make_run(tmp_path / "off", lake, event_sides=False, **(PLAIN if is_plain else {})))
    assert without.tables.sides is None
    assert_parity(without, lake)


@pytest.mark.parametrize("is_plain", [False, True], ids=["USR", "plain"])
def test_the_first_order_part_is_served(lake, tmp_path, is_plain):
    """Crosses with a query have no value on rows without one; ids newer than the tables are unknown to both sides."""
    wide = {"wide": True, "wide_buckets": 500, "crosses": [["user_id", "item_id", "scenario"], ["item_id", "query"]]}
    run = load_run(make_run(tmp_path / "run", lake, **wide, **(PLAIN if is_plain else {})))
    assert_parity(run, lake)
    assert_a_request_equals_its_rows(run.module, run.tables, run.spec)
    batch = real_batches(lake)[0]
    known = both(run, batch)[0]["p_ctr"]
    run.module.wide.weights_NH.data.zero_()
    assert not torch.allclose(both(run, batch)[0]["p_ctr"], known, atol=1e-3)


# Vectors are an input, which a backbone has no part in: plain ones are one, and each is served by the tests above.
WITH_VECTORS = [
    pytest.param(*model, id=name, marks=[pytest.mark.slow] if model[1] and model[0] != "shared_bottom" else [])
    for model, name in zip(MODELS, NAMES, strict=True)
]


@pytest.mark.parametrize(("backbone", "is_plain"), WITH_VECTORS)
def test_vectors_are_served_by_every_backbone(tmp_path, backbone, is_plain):
    """The run holds them once: when it is written, the lake is not asked again."""
    lake = make_lake(tmp_path / "lake", vectors=VECTORS, sides=("brand",))
    real_batches(lake)
    run = load_run(make_run(tmp_path / "run", lake, backbone=backbone, **(PLAIN if is_plain else {})))
    shutil.rmtree(lake)
    assert not any("vector" in name for name in run.checkpoint.tensors if "inputs.vector_maps" not in name)
    assert_parity(run, lake)
    assert_a_request_equals_its_rows(run.module, run.tables, run.spec)
    if backbone != "shared_bottom":
        return
    batch = real_batches(lake)[0]
    known = both(run, batch)[0]["p_ctr"]
    without = {name: torch.zeros_like(v_NP) for name, v_NP in run.tables.vectors.items()}
    for name, zeros_NP in without.items():
        of_all, run.tables.vectors[name] = run.tables.vectors[name], zeros_NP
        assert not torch.allclose(both(run, batch)[0]["p_ctr"], known, atol=1e-4), name
        run.tables.vectors[name] = of_all


@pytest.mark.parametrize("is_plain", [False, True], ids=["USR", "plain"])
def test_tags_and_terms_are_served(tmp_path, is_plain):
    """Of every owner, by rows and by requests; ids that came after the training are unknown."""
    lake = make_lake(tmp_path / "lake", lists=make_lists(9))
    run = load_run(make_run(tmp_path / "run", lake, **(PLAIN if is_plain else {})))
    assert_parity(run, lake)
    assert_a_request_equals_its_rows(run.module, run.tables, run.spec)
    batch = real_batches(lake)[0]
    grown = replace(batch, lists_BW=torch.where(batch.lists_BW > 6, batch.lists_BW + 90, batch.lists_BW))
    unknown = replace(batch, lists_BW=torch.where(batch.lists_BW > 6, 1, batch.lists_BW))
    smaller = {name: 7 if name in ("term", "tags") else size for name, size in run.tables.num_rows().items()}
    wide = replace(run.spec, lists=tuple(replace(f, num_embeddings=99) for f in run.spec.lists))
    found = known_ids(grown, wide, smaller | dict.fromkeys(("hobbies", "intents", "moods"), 7))
    assert torch.equal(found.lists_BW, unknown.lists_BW)
    assert not torch.allclose(both(run, batch)[0]["p_ctr"], both(run, unknown)[0]["p_ctr"])


def every_kind(tmp_path, is_plain):
    """A batch and a run with event sides, products of each history, the first-order part, vectors, tags and terms.

    The lake is gone when the run is exported.
    """
    lake = make_lake(tmp_path / "lake", sides=("brand",), vectors=VECTORS, lists=make_lists(9))
    batch = real_batches(lake)[0]
    wide = {"wide": True, "wide_buckets": 500, "crosses": [["user_id", "item_id", "scenario"], ["item_id", "query"]]}
    switches = {"interaction_histories": "each", **wide, **(PLAIN if is_plain else {})}
    run = load_run(make_run(tmp_path / "run", lake, **switches))
    shutil.rmtree(lake)
    return batch, run


def test_a_row_alone_equals_the_row_in_a_batch(lake, run_of):
    run = run_of("m2m", False)
    model = ServingModel(run.module, run.tables, run.spec)
    inputs = padded_inputs(real_batches(lake, 16)[0], run.spec)
    together = model(inputs)
    for row in range(16):
        alone = model({name: value[row : row + 1] for name, value in inputs.items()})
        for name, value in alone.items():
            torch.testing.assert_close(value, together[name][row : row + 1], rtol=0, atol=1e-6)


def test_the_training_model_is_left_as_it_was(lake, tmp_path):
    run = load_run(make_run(tmp_path, lake, backbone="apg"))  # its own: that of `run_of` may have been served before
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    model = ServingModel(run.module, run.tables, run.spec)
    after = run.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    names = [name for name in model.state_dict() if "backbone" in name and "factors" in name]
    assert len(names) == 2 * 4  # U and V of two bottom layers and of a tower layer of each task: one matrix each
    assert all(parameter.requires_grad for parameter in run.module.parameters())


def test_ids_that_no_table_holds_are_unknown(lake, tmp_path):
    run = load_run(make_run(tmp_path, lake))
    model = ServingModel(run.module, run.tables, run.spec)
    inputs = padded_inputs(real_batches(lake, 16)[0], run.spec)
    unknown, outside = dict(inputs), dict(inputs)
    is_event = inputs["search_history_actions"] > 0
    unknown["sparse"] = torch.full_like(inputs["sparse"], UNKNOWN_ID)
    outside["sparse"] = torch.full_like(inputs["sparse"], 10**12)
    outside["sparse"][:, 1] = -3
    for name in ("search_history_item_ids", "search_history_query_ids"):
        unknown[name] = torch.where(is_event, UNKNOWN_ID, 0)
        outside[name] = torch.where(is_event, 10**12, 0)
    for name, value in model(outside).items():
        assert torch.equal(value, model(unknown)[name])
        assert not torch.equal(value, model(inputs)[name])


def test_age_buckets_are_exact_at_powers_of_two():
    ages = [0.0, 0.5, 1e9, 2.0**31 - 1, -5.0, *(2.0**n - 1 + step for n in range(1, 23) for step in (-0.5, 0, 0.5))]
    expected = [math.frexp(1 + max(age, 0.0))[1] - 1 for age in ages]
    assert age_buckets(torch.tensor(ages)).tolist() == expected
    assert age_buckets(torch.tensor([2.0**40, math.inf, math.nan])).tolist() == [NUM_AGES - 1] * 3


def test_inputs_are_padded_on_the_left_in_the_order_of_the_spec():
    spec = make_spec()
    batch = make_batch(spec, 4, num_padding=0)
    inputs = padded_inputs(batch, spec)
    assert {name: (value.dtype, tuple(value.shape[1:])) for name, value in inputs.items()} == input_shapes(spec)
    assert list(inputs) == list(input_shapes(spec))
    history = batch.histories[1]
    events = history.item_ids_V[history.offsets[2] : history.offsets[3]].tolist()
    assert inputs["recommendation_history_item_ids"][2].tolist() == [0] * (6 - len(events)) + events
    assert "recommendation_history_query_ids" not in inputs
    assert "dense" not in input_shapes(make_spec(dense=False))


def test_drawn_rows_cover_scenarios_histories_and_ids():
    spec = make_spec()
    batch = drawn_batch(spec, 64)
    assert set(batch.scenario_B.tolist()) == {0, 1}
    lengths = batch.histories[0].offsets.diff()
    assert (int(lengths.min()), int(lengths.max())) == (0, spec.history_length)
    assert int(batch.sparse_BF.max()) < 40


def vocabulary(**sizes):
    rows = [(name, f"{name}-{n}", n) for name, size in sizes.items() for n in range(2, size)]
    return pa.table(dict(zip(("feature", "value", "id"), zip(*rows, strict=True), strict=True)))


SIZES = {"user_id": 32, "item_id": 42, "query": 22, "brand": 8}


def test_values_newer_than_the_model_are_left_out_of_its_vocabularies():
    grown = vocabulary(**SIZES | {"item_id": 50, "colour": 9})
    kept = known_values(grown, samples_spec(), "lake")
    assert kept.sort_by([("feature", "ascending"), ("id", "ascending")]) == vocabulary(**dict(sorted(SIZES.items())))


def test_vocabularies_of_another_lake_are_refused():
    with pytest.raises(ExportError, match=r"^--lake other: has 38 values of item_id where the model has 40 embeddings"):
        known_values(vocabulary(**SIZES | {"item_id": 40}), samples_spec(), "other")


def test_exports_that_cannot_be_are_refused_in_one_line(lake, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ExportError, match=r"--output .*used: is not empty; name another directory"):
        export_run(tmp_path, tmp_path / "used")
    with pytest.raises(ExportError, match=r"not installed here: no_such_package; install usr-ray\[serve\]"):
        require_packages("json", "no_such_package")
    with pytest.raises(ExportError, match=r"holds no readable manifest.json; export the run again"):
        verified_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(ExportError, match="format 9, this version reads 1"):
        verified_manifest(tmp_path)
    with pytest.raises(ExportError, match="runtime 'tf' is not known; choose from: torch, onnx"):
        ExportedModel(tmp_path, runtime="tf")


def test_a_model_is_named_by_its_weights(lake, tmp_path):
    one = load_run(make_run(tmp_path / "one", lake)).checkpoint
    same = load_run(make_run(tmp_path / "same", lake, step=9)).checkpoint
    other = load_run(make_run(tmp_path / "other", lake, seed=1)).checkpoint
    assert one.model_id == same.model_id != other.model_id
    assert len(one.model_id) == 16


def candidates(spec, num_items, row=3):
    """Rows of one user, query, context and history with different items, as a table would have them, in float64."""
    drawn = padded_inputs(drawn_batch(spec, num_items + row, seed=3), spec)
    inputs = {name: value[row : row + 1].repeat(num_items, *[1] * (value.dim() - 1)) for name, value in drawn.items()}
    for name, features in (("sparse", spec.sparse), ("dense", spec.dense)):
        for column, feature in enumerate(features):
            if feature.owner == "item":
                inputs[name][:, column] = drawn[name][row:, column]
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def assert_a_request_equals_its_rows(module, tables, spec, of_rows=(3,)):
    # In float64: float32 sums of other shapes differ by rounding, which these wild weights carry to 1e-5.
    model = ServingModel(module, tables, spec).double()
    for row, num_items in itertools.product(of_rows, (1, 2, 500)):
        rows = candidates(spec, num_items, row)
        request = request_inputs(rows, spec)
        assert {n: v.shape for n, v in request.items()} == {
            n: tuple(num_items if size is None else size for size in shape)
            for n, (_, shape) in request_shapes(spec).items()
        }
        with torch.inference_mode():
            expected, found = model(rows), RequestModel(model)(request)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert num_items < 500 or value.std() > 1e-4
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("backbone", "is_plain"), MODELS, ids=NAMES)
def test_a_request_equals_its_rows_one_by_one(run_of, backbone, is_plain):
    run = run_of(backbone, is_plain)
    assert_a_request_equals_its_rows(run.module, run.tables, run.spec)


@pytest.mark.parametrize(
    "switches",
    [{}, {"interest": {"enabled": False}}, {"multitask": {"enabled": False}}, {"wide": True, "wide_buckets": 99}],
    ids=str,
)
def test_a_request_with_features_of_every_owner_equals_its_rows(switches):
    for spec in (make_spec(3), make_spec(3, dense=False), make_spec(3, sides=("brand", "kind"))):
        config = make_config(**switches)
        torch.manual_seed(0)
        module = UsrModel(spec, config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        tables = make_tables(spec, config.embedding_dim, seed=0)
        for table_ND in tables.tables.values():
            table_ND[1:] += torch.randn(table_ND[1:].shape)
        assert_a_request_equals_its_rows(module, tables, spec, of_rows=range(3))  # a row of each scenario
