"""The service in one process: its queue, its versions, its answers; the versions stand in for real ones."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient

from jobs.serve import read_token
from usr_ray.config import UserError
from usr_ray.serving.app import make_app
from usr_ray.serving.ranker import Ranker, RequestError
from usr_ray.serving.service import OverloadError, Service, Settings, parsed
from usr_ray.serving.versions import RegistryError, move_pointer

pytestmark = pytest.mark.unit


class Version:
    """Answers with its name; waits where it is told to."""

    gate = threading.Event()

    def __init__(self, name: str) -> None:
        self.version = {"version": name, "model_id": name, "files": {"x": 1}}

    def answer(self, raw: Any, *, ranked: bool) -> dict[str, Any]:
        if raw.get("wait"):
            assert self.gate.wait(30)
        if "candidates" not in raw:
            raise RequestError("candidates: NoneType; a list is needed")
        items = [{"id": c} for c in raw["candidates"]]
        return {"version": self.version["version"], "items": items[:: -1 if ranked else 1], "degraded": "slow" in raw}


@pytest.fixture
def service(tmp_path, monkeypatch):
    def load(registry, *, num_threads):
        name = json.loads((registry / "current.json").read_text())["stable"]
        if name == "torn":
            raise RegistryError("versions/torn: missing or changed since it was published; publish again")
        return Version(name)

    monkeypatch.setattr(Ranker, "load", load)
    Version.gate.clear()
    move_pointer(tmp_path, "one")
    service = Service(Settings(tmp_path, num_workers=1, max_queued=2, poll_s=60))
    yield service
    Version.gate.set()
    service.close()


@pytest.fixture
def client(service):
    return TestClient(make_app(service))


GOOD = {"candidates": ["a", "b"]}


def test_answers_come_in_the_candidates_order_or_ranked(client):
    answer = client.post("/v1/score", json=GOOD)
    assert (answer.status_code, [i["id"] for i in answer.json()["items"]]) == (200, ["a", "b"])
    assert [i["id"] for i in client.post("/v1/rank", json=GOOD).json()["items"]] == ["b", "a"]


@pytest.mark.parametrize("body", [b"", b"{", b'{"a": NaN}', b"\xff", b"[" * 100_000, b" " * (5 << 20), b"{}"])
def test_bad_bodies_are_422_and_one_line(client, body):
    answer = client.post("/v1/score", content=body)
    assert answer.status_code == 422
    assert "\n" not in answer.json()["error"]
    if body != b"{}":
        with pytest.raises(RequestError, match=r"^request: "):
            parsed(body)


def test_more_requests_than_the_queue_takes_are_429_at_once(service, client):
    waiting = [service.submit(json.dumps(GOOD | {"wait": 1}).encode(), ranked=False) for _ in range(2)]
    refused = client.post("/v1/score", json=GOOD)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    with pytest.raises(OverloadError):
        service.submit(b"{}", ranked=False)
    Version.gate.set()
    assert [future.result(30)[0] for future in waiting] == [200, 200]
    assert client.post("/v1/score", json=GOOD).status_code == 200


def test_the_pointer_swaps_the_version_and_a_torn_one_stays_out(service, client, tmp_path):
    held = service.submit(json.dumps(GOOD | {"wait": 1}).encode(), ranked=False)
    while not held.running():
        pass
    move_pointer(tmp_path, "two")
    assert service.look()
    assert not service.look()
    Version.gate.set()
    assert held.result(30)[1]["version"] == "one"  # what had begun ends with the version that it began with
    assert client.post("/v1/score", json=GOOD).json()["version"] == "two"
    move_pointer(tmp_path, "torn")
    assert not service.look()
    about = client.get("/v1/model").json()
    assert about["stable"] == {"version": "two", "model_id": "two"}
    assert about["last_error"].startswith("versions/torn: missing or changed")
    (tmp_path / "current.json").write_text("{")
    assert not service.look()
    assert client.get("/readyz").json() == {"version": "two"}
    move_pointer_text(tmp_path, "two")
    assert not service.look()
    assert client.get("/v1/model").json()["last_error"] == ""


def move_pointer_text(registry, name):
    (registry / "current.json").write_text(json.dumps({"stable": name, "before": []}))


def test_metrics_count_requests_candidates_and_answers_without_history(client):
    client.post("/v1/score", json=GOOD)
    client.post("/v1/score", json=GOOD | {"slow": 1})
    client.post("/v1/rank", json={})
    text = client.get("/metrics").text
    for line in (
        'usr_ray_serving_requests_total{path="/v1/score",status="200"} 2.0',
        'usr_ray_serving_requests_total{path="/v1/rank",status="422"} 1.0',
        "usr_ray_serving_candidates_total 4.0",
        "usr_ray_serving_degraded_total 1.0",
        "usr_ray_serving_seconds_count 3.0",
        "usr_ray_serving_queue 0.0",
    ):
        assert line in text


def test_the_token_is_asked_for_everywhere_but_where_only_numbers_are(service):
    client = TestClient(make_app(service, "secret"))
    assert client.post("/v1/score", json=GOOD).status_code == 401
    for header in ("secret", "Bearer", "Bearer wrong", "Bearer secret2"):
        assert client.get("/v1/model", headers={"Authorization": header}).status_code == 401
    assert client.post("/v1/score", json=GOOD, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200


def test_others_than_this_machine_need_a_token(tmp_path):
    (tmp_path / "token").write_text(" abc\n")
    (tmp_path / "empty").write_text("\n")
    assert read_token(None, "127.0.0.1") is None
    assert read_token(None, "::1") is None
    assert read_token(tmp_path / "token", "0.0.0.0") == "abc"
    with pytest.raises(UserError, match=r"--host 0.0.0.0: whoever reaches it could ask; name a --token-file"):
        read_token(None, "0.0.0.0")
    with pytest.raises(UserError, match=r"empty: holds no token; write one"):
        read_token(tmp_path / "empty", "127.0.0.1")
    with pytest.raises(UserError, match=r"--host localhost: is not an IP address"):
        read_token(None, "localhost")
