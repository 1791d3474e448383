"""Versions with other features side by side: what clients send for one of them is no error to the others."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import serving_bench
from tests.chaos.serving_bench import NOW_US, requests, write_version
from usr_ray.schema import DenseFeature
from usr_ray.serving.ranker import Ranker, iso_time
from usr_ray.serving.service import Service, Settings
from usr_ray.serving.versions import Pointer, move_pointer, roll_back

pytestmark = pytest.mark.unit
REQUEST = requests()[1]


def with_depth(monkeypatch: pytest.MonkeyPatch, registry: Path, name: str) -> None:
    """Publish a version whose model takes a context feature more."""
    depth = DenseFeature(name="depth", column="depth_scaled", owner="context")
    spec = replace(serving_bench.SPEC, dense=(*serving_bench.SPEC.dense, depth))
    with monkeypatch.context() as patch:
        patch.setattr(serving_bench, "SPEC", spec)
        write_version(registry, name, 1.0)


@pytest.fixture
def service(tmp_path: Path):
    write_version(tmp_path, "one", 1.0)
    move_pointer(tmp_path, "one")
    service = Service(Settings(tmp_path, poll_s=3600.0, store_deadline_s=30.0))
    yield service
    service.close()


def asked(service: Service, context: dict[str, Any] | None, **more: Any) -> tuple[int, Any]:
    """Status, and probabilities or the words of the refusal."""
    body = json.dumps(REQUEST | {"context": context} | more).encode()
    status, answer = service.submit(body, ranked=False).result(60)
    return status, answer.get("error") or [item["p_ctr"] for item in answer["items"]]


def test_a_feature_of_another_version_is_left_out_before_its_version_serves_and_after_a_rollback(
    service, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.WARNING)
    refused = 422, "context: unknown feature 'depth'; features of the context are: none"
    plain = asked(service, None)
    assert asked(service, {"depth": 7.0}) == refused
    with_depth(monkeypatch, tmp_path, "two")
    assert asked(service, {"depth": 7.0}) == asked(service, {"depth": "odd"}) == plain
    assert asked(service, {"dept": 7.0}) == (422, "context: unknown feature 'dept'; features of the context are: none")
    (line,) = caplog.messages  # once, however many requests carry it
    assert line == "one: leaves out depth of requests, which another version takes"
    move_pointer(tmp_path, "two")
    assert service.look()
    deep = asked(service, {"depth": 7.0})
    assert deep[0] == 200
    assert all(abs(a - b) > 1e-4 for a, b in zip(deep[1], asked(service, None)[1], strict=True))
    assert asked(service, {"depth": "odd"})[0] == 422
    roll_back(tmp_path)
    assert service.look()
    assert asked(service, {"depth": 7.0}) == plain


def test_canary_shadow_and_stable_version_answer_the_same_requests(service, tmp_path, monkeypatch):
    with_depth(monkeypatch, tmp_path, "two")
    Pointer("one", canary="two", share=0.5, shadow="two").write(tmp_path)
    assert service.look()
    buckets = set()
    for n in range(20):
        body = json.dumps(REQUEST | {"context": {"depth": 7.0}, "user_id": f"user_id-{n}"}).encode()
        status, answer = service.submit(body, ranked=True).result(60)
        buckets.add((status, answer["bucket"], answer["version"]))
    assert buckets == {(200, "stable", "one"), (200, "canary", "two")}
    service._shadow_pool.shutdown()
    assert service.metrics.registry.get_sample_value("usr_ray_serving_shadows_total", {"outcome": "failed"}) is None
    assert service.metrics.registry.get_sample_value("usr_ray_serving_shadows_total", {"outcome": "logged"}) == 20


def test_the_age_is_that_of_the_oldest_version(service, tmp_path):
    def age_days() -> float:
        seconds = service.metrics.registry.get_sample_value("usr_ray_serving_age_seconds")
        return (seconds - (time.time() - NOW_US / 1e6)) / 86_400

    assert abs(age_days()) < 0.01
    version = write_version(tmp_path, "two", 1.0) / "version.json"
    about = json.loads(version.read_text())
    version.write_text(json.dumps(about | {"as_of": iso_time(NOW_US - 3 * 86_400_000_000)}))
    for place in ("canary", "shadow"):
        Pointer("one", **{place: "two"}).write(tmp_path)
        assert service.look()
        assert abs(age_days() - 3) < 0.01
    Pointer("one").write(tmp_path)
    assert service.look()
    assert abs(age_days()) < 0.01


def test_what_is_torn_or_gone_takes_nothing(service, tmp_path, monkeypatch):
    refused = asked(service, {"depth": 7.0})
    plain = asked(service, None)
    with_depth(monkeypatch, tmp_path, "two")
    assert asked(service, {"depth": 7.0}) == plain
    spec = tmp_path / "versions" / "two" / "model" / "feature_spec.json"
    text = spec.read_text()
    for n, torn in enumerate((text[:100], "[]", "{}")):
        spec.write_text(torn)
        os.utime(tmp_path / "versions", ns=(n, n))  # as if a version had come, so that the others are read again
        assert asked(service, {"depth": 7.0}) == refused
    spec.write_text(text)
    (tmp_path / "versions" / "more").mkdir()
    assert asked(service, {"depth": 7.0}) == plain
    (tmp_path / "versions").rename(tmp_path / "gone")
    assert asked(service, {"depth": 7.0}) == plain


def test_items_and_programs_too(service, tmp_path, monkeypatch):
    stock = DenseFeature(name="stock", column="stock_scaled", owner="item")
    sent = [{"id": "new", "features": {"price": 3.0, "stock": 2}}]
    assert asked(service, None, candidates=sent)[0] == 422
    spec = replace(serving_bench.SPEC, lists=(), dense=(stock, *serving_bench.SPEC.dense))
    other = tmp_path / "versions" / "two" / "model"
    other.mkdir(parents=True)
    (other / "feature_spec.json").write_text(spec.to_json())
    without = [{"id": "new", "features": {"price": 3.0}}]
    assert asked(service, None, candidates=sent) == asked(service, None, candidates=without)
    ranker = Ranker.load(tmp_path)
    assert (
        ranker.score(REQUEST | {"candidates": sent})["items"]
        == ranker.score(REQUEST | {"candidates": without})["items"]
    )


@pytest.mark.parametrize("field", ["scenario", "user_id", "time", "task", "k", "candidates", "context", "unknown"])
def test_a_refusal_does_not_send_back_all_that_was_sent(service, field):
    long = "x" * 100_000
    sent = {"context": {long: 1}, "candidates": [{"id": "a", long: 1}], "user_id": [long], "k": long}
    body = REQUEST | {long if field == "unknown" else field: sent.get(field, long)}
    status, answer = service.submit(json.dumps(body).encode(), ranked=True).result(60)
    assert (status, "\n" in answer["error"]) == (422, False)
    assert len(answer["error"]) < 400
