"""Requests that share a call of the program for rows, on the CPU; no GPU was at hand."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.chaos.serving_bench import write_version
from tests.unit.random_batches import make_lists
from tests.unit.samples_table import samples_spec
from usr_ray.serving import batching
from usr_ray.serving.batching import Batcher, LateError, tiled
from usr_ray.serving.check import drawn_batch, one_request
from usr_ray.serving.model import padded_inputs, request_inputs
from usr_ray.serving.ranker import Ranker
from usr_ray.serving.runtime import ExportError, _provider

pytestmark = pytest.mark.unit
SPEC = samples_spec(lists=make_lists(9))


def request_of(num_items, seed):
    """Inputs of request.onnx, and the rows that they are."""
    batch = one_request(drawn_batch(SPEC, num_items, seed=seed), SPEC, 0)
    rows = padded_inputs(batch, SPEC)
    as_numpy = (
        {name: value.numpy() for name, value in inputs.items()} for inputs in (request_inputs(rows, SPEC), rows)
    )
    return tuple(as_numpy)


def scores(inputs):
    """A program for rows: p_ctr is a sum over everything of the row, in float64 so that no batch changes it."""
    whole = np.zeros(len(inputs["scenario"]))
    for n, value in enumerate(inputs[name] for name in sorted(inputs)):
        whole += np.sin(value.reshape(len(whole), -1).astype(np.float64) * (n + 1)).sum(axis=1)
    return {"p_ctr": (np.sin(whole) ** 2).astype(np.float32)}


@pytest.mark.parametrize("num_items", [1, 2, 9])
def test_the_rows_of_a_request_are_those_of_the_table(num_items):
    request, rows = request_of(num_items, seed=num_items)
    found = tiled(request, SPEC)
    assert set(found) == set(rows)
    for name, value in rows.items():
        assert (found[name].dtype, found[name].tolist()) == (value.dtype, value.tolist()), name


def test_requests_that_share_calls_have_the_answers_of_each_alone(monkeypatch):
    monkeypatch.setattr(batching, "MAX_ROWS", 60)
    sizes = []

    def run(inputs):
        sizes.append(len(inputs["scenario"]))
        time.sleep(0.01)  # a device that is busy: more requests gather
        return scores(inputs)

    asked = [request_of(1 + n % 17, seed=n)[0] for n in range(40)] + [request_of(70, seed=99)[0]]
    batcher = Batcher(run, SPEC, wait_s=0.01)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(batcher.predict, asked))
    for request, answer in zip(asked, found, strict=True):
        alone = scores(tiled(request, SPEC))["p_ctr"]
        assert answer["p_ctr"].shape == alone.shape
        assert np.abs(answer["p_ctr"] - alone).max() <= 1e-6
    assert len(sizes) < len(asked) / 2
    assert sum(sizes) == sum(len(request["item_sparse"]) for request in asked)
    assert max(size for size in sizes if size != 70) <= 60


def test_a_device_that_hangs_costs_the_requests_their_deadline_and_no_more():
    gate = threading.Event()

    def run(inputs):
        assert gate.wait(30)
        return scores(inputs)

    batcher = Batcher(run, SPEC, wait_s=0.0)
    request = request_of(3, seed=0)[0]
    batcher.deadline_s = 0.2
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(batcher.predict, request)
        time.sleep(0.05)
        started = time.monotonic()
        for late in [pool.submit(batcher.predict, request) for _ in range(3)]:
            with pytest.raises(LateError):
                late.result(10)
        assert time.monotonic() - started < 5
        gate.set()
        first.exception(10)  # it ran, and may have been late
        batcher.deadline_s = None
        assert np.array_equal(batcher.predict(request)["p_ctr"], scores(tiled(request, SPEC))["p_ctr"])


def test_a_leader_that_is_late_hands_the_next_request_on_which_is_not():
    gate, begun = threading.Event(), threading.Event()

    def run(inputs):
        begun.set()
        assert gate.wait(30)
        return scores(inputs)

    batcher = Batcher(run, SPEC, wait_s=0.0)
    request = request_of(3, seed=0)[0]
    with ThreadPoolExecutor(3) as pool:
        busy = pool.submit(batcher.predict, request)
        assert begun.wait(10)
        batcher.deadline_s = 0.2
        leader = pool.submit(batcher.predict, request)
        while not batcher._waiting:
            time.sleep(0.001)
        batcher.deadline_s = 30.0
        next_one = pool.submit(batcher.predict, request)
        with pytest.raises(LateError):
            leader.result(10)
        gate.set()
        for answered in (busy, next_one):
            assert np.array_equal(answered.result(10)["p_ctr"], scores(tiled(request, SPEC))["p_ctr"])
    assert (batcher._waiting, batcher._is_busy) == ([], False)


def test_a_scenario_may_be_named_like_a_part_of_the_inputs():
    spec = samples_spec(scenarios=("item_page", "request_again"), query_scenarios=("item_page",))
    rows = padded_inputs(one_request(drawn_batch(spec, 4, seed=3), spec, 0), spec)
    request = {name: value.numpy() for name, value in request_inputs(rows, spec).items()}
    found = tiled(request, spec)
    assert "item_page_history_item_ids" in found
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in rows.items()
    }


def test_what_the_program_raises_reaches_each_request():
    def run(inputs):
        raise RuntimeError("out of memory")

    batcher = Batcher(run, SPEC)
    with ThreadPoolExecutor(3) as pool:
        for failed in [pool.submit(batcher.predict, request_of(2, seed=n)[0]) for n in range(3)]:
            with pytest.raises(RuntimeError, match="out of memory"):
                failed.result(10)


def test_without_a_gpu_or_the_program_for_rows_there_is_one_line(tmp_path):
    folder = write_version(tmp_path, "one", 1.0)
    with pytest.raises(ExportError, match=r"holds no model.onnx; publish the run with jobs/publish.py --for-gpu"):
        Ranker.open(folder, device="cuda")
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(
            ExportError, match=r"--device cuda: ONNX Runtime finds no GPU here; install onnxruntime-gpu"
        ):
            _provider("cuda")
