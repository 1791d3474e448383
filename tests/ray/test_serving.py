"""The service as a deployment of Ray Serve, on the lane's small cluster; a version of the test's own stands in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from google.protobuf import json_format

from tests.unit.serving.test_service import GOOD, Version
from usr_ray.serving.app import deployment, grpc_options
from usr_ray.serving.grpc_service import METHODS, RANKING, message_classes
from usr_ray.serving.ranker import Ranker
from usr_ray.serving.service import Service, Settings
from usr_ray.serving.versions import move_pointer

pytestmark = pytest.mark.ray
PORT, GRPC_PORT = 18_431, 18_432
TOKEN = "secret"


def named_service(settings: Settings) -> Service:
    """In the replica: a version is nothing but its name in the pointer."""
    Ranker.open = lambda folder, **_: Version(folder.name)  # type: ignore[method-assign, assignment, misc]
    return Service(settings)


@pytest.fixture(scope="module")
def address(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    from ray import serve

    registry = tmp_path_factory.mktemp("registry")
    for name in ("one", "two"):
        (registry / "versions" / name).mkdir(parents=True)
    move_pointer(registry, "one")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT}, grpc_options=grpc_options(GRPC_PORT))
    settings = Settings(registry, num_workers=1, max_queued=4, poll_s=0.1, max_wait_s=60)
    serve.run(deployment(settings, TOKEN, make_service=named_service), route_prefix="/")
    yield f"http://127.0.0.1:{PORT}", registry
    serve.shutdown()


def test_a_deployment_answers_refuses_and_follows_the_pointer(address: tuple[str, Path]) -> None:
    base, registry = address
    with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        assert client.post("/v1/score", json=GOOD).json()["version"] == "one"
        assert client.post("/v1/score", json={}).status_code == 422
        assert client.get("/readyz", headers={"Authorization": ""}).status_code == 200
        assert client.get("/v1/model", headers={"Authorization": ""}).status_code == 401
        move_pointer(registry, "two")
        found = {"one"}
        for _ in range(200):
            answer = client.post("/v1/score", json=GOOD)
            assert answer.status_code == 200
            found.add(answer.json()["version"])
            if "two" in found:
                break
        assert found == {"one", "two"}


def test_the_same_deployment_answers_over_grpc(address: tuple[str, Path]) -> None:
    classes = message_classes()
    good = json_format.ParseDict({"candidates": [{"id": "a"}, {"id": "b"}]}, classes["RankRequest"]())

    def asked(name: str, content: bytes, token: str = TOKEN) -> tuple[str, object]:
        with grpc.insecure_channel(f"127.0.0.1:{GRPC_PORT}") as channel:
            call = channel.unary_unary(f"/{RANKING}/{name}", response_deserializer=classes[METHODS[name]].FromString)
            try:
                return "OK", call(content, timeout=60, metadata=(("authorization", f"Bearer {token}"),))
            except grpc.RpcError as error:
                return error.code().name, error.details()

    status, answer = asked("Rank", good.SerializeToString())
    assert status == "OK", answer
    assert [item.id for item in answer.items] == ["b", "a"]
    assert asked("Score", b"\xff") == ("INVALID_ARGUMENT", "request: is no RankRequest of service.proto")
    status, words = asked("Score", good.SerializeToString(), token="other")
    assert (status, words) == ("UNAUTHENTICATED", "authorization: Bearer and the service's token are needed")
    status, answer = asked("Model", b"")
    assert (status, answer["stable"]["version"] in ("one", "two")) == ("OK", True)
