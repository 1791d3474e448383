"""gRPC beside HTTP: one service, the same requests, the same answers and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from jobs.serve import main as serve_job
from jobs.serve import serve_alone
from tests.unit.samples_table import samples_spec
from usr_ray.config import UserError
from usr_ray.launch.environment import free_port
from usr_ray.serving import grpc_service
from usr_ray.serving.app import make_app
from usr_ray.serving.encode import Encoder, Profile, UserEvents
from usr_ray.serving.grpc_service import METHODS as ANSWERS
from usr_ray.serving.grpc_service import RANKING, GrpcServer, message_classes
from usr_ray.serving.ranker import Ranker, RequestError
from usr_ray.serving.service import Service, Settings
from usr_ray.serving.stores import ItemTable, UserStore, put_items, put_users
from usr_ray.serving.versions import move_pointer

grpc = pytest.importorskip("grpc", reason="the package grpcio is not installed: pip install 'usr-ray[grpc]'")
json_format = pytest.importorskip("google.protobuf.json_format")
pytestmark = pytest.mark.integration
NOW_US = 1_767_225_600_000_000
TOKEN = "secret"
PATHS = {"Score": "/v1/score", "Rank": "/v1/rank", "Events": "/v1/events"}
GOOD = {
    "scenario": "search",
    "user_id": "u1",
    "candidates": [{"id": "v1"}, {"id": "v2"}],
    "time": "2026-01-02T00:00:00Z",
}


class Program:
    """Probabilities that item, brand, price and user have their part in, in float32 as a program has them."""

    gate = threading.Event()
    gate.set()

    def predict(self, inputs):
        assert self.gate.wait(30)
        p = inputs["item_sparse"].sum(1) / 97 + inputs["item_dense"][:, 0] / 7 + inputs["request_sparse"].sum() / 1e4
        return {"p_ctr": (p % 1).astype(np.float32), "p_ctcvr": (p * 3 % 1).astype(np.float32)}


@pytest.fixture
def service(tmp_path, monkeypatch):
    folder, encoder = tmp_path / "versions" / "one", Encoder(samples_spec(), {}, 50)
    folder.mkdir(parents=True)
    put_items(folder, ["v1", "v2"], Profile(np.array([[2], [3]], np.int32), np.ones((2, 1), np.float32)), encoder)
    put_users(folder, ["u1"], [UserEvents.none()], Profile(np.zeros((1, 0), np.int32), np.ones((1, 1), np.float32)))
    version = {"version": "one", "model_id": "m", "rules": {"click_window": 0, "order_window": 0}, "items": 2}

    def opened(folder, *, num_threads, log, deadline_s, device):
        stores = ItemTable(folder), UserStore(folder, encoder)
        ranker = Ranker(version, Program(), encoder, stores, exact_from_us=NOW_US)
        ranker._log = log
        return ranker

    monkeypatch.setattr(Ranker, "open", opened)
    move_pointer(tmp_path, "one")
    service = Service(Settings(tmp_path, num_workers=1, max_queued=2, poll_s=60, max_wait_s=30))
    yield service
    Program.gate.set()
    service.close()


@pytest.fixture
def ask(service):
    """(method, fields, token) -> (status name, answer as a dictionary or the words of the refusal)."""
    server = GrpcServer(service, TOKEN, host="127.0.0.1", port=0)
    classes = message_classes()

    def asked(name, fields, token=TOKEN, message=None):
        kind = {"Events": "EventsRequest", "Model": "ModelRequest"}.get(name, "RankRequest")
        message = json_format.ParseDict(fields, classes[kind]()).SerializeToString() if message is None else message
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = channel.unary_unary(
                f"/{RANKING}/{name}",
                response_deserializer=classes[ANSWERS[name]].FromString,
            )
            try:
                found = call(message, timeout=30, metadata=(("authorization", f"Bearer {token}"),))
            except grpc.RpcError as error:
                asked.metadata = dict(error.trailing_metadata())
                return error.code().name, error.details()
        return "OK", json_format.MessageToDict(found, preserving_proto_field_name=True)

    yield asked
    server.close()


@pytest.fixture
def http(service):
    client = TestClient(make_app(service, TOKEN))
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    return client


CLICK = {"click_id": 7, "user_id": "u1", "item_id": "v1", "event_time": "2026-01-01T00:00:00Z"}
ASKED = [
    ("Score", GOOD),
    ("Rank", GOOD | {"task": "ctcvr", "k": 1, "request_id": "r"}),
    ("Rank", GOOD | {"task": {"ctr": 1, "ctcvr": 2.5}, "query": "red shoes"}),
    (
        "Score",
        GOOD | {"candidates": [{"id": "new", "features": {"brand": 7, "price": -3.5}}, {"id": "v1"}], "context": {}},
    ),
    ("Score", GOOD | {"candidates": [{"id": "new", "features": {"brand": True, "price": None}}]}),
    ("Score", GOOD | {"user_id": "nobody"}),
    ("Events", {"search_clicks": [CLICK]}),
]
REFUSED = [
    ("Score", {}),
    ("Score", GOOD | {"scenario": "cart"}),
    ("Score", GOOD | {"user_id": ""}),
    ("Score", GOOD | {"candidates": []}),
    ("Score", GOOD | {"candidates": [{"features": {}}]}),
    ("Score", GOOD | {"candidates": [{"id": "v", "features": {"prise": 3}}]}),
    ("Score", GOOD | {"candidates": [{"id": "v", "features": {"brand": 1.5}}]}),
    ("Score", GOOD | {"context": {"x": 1}}),
    ("Score", GOOD | {"time": "noon"}),
    ("Rank", GOOD | {"k": 0}),
    ("Rank", GOOD | {"task": "cvr"}),
    ("Rank", GOOD | {"task": [1]}),
    ("Events", {"carts": []}),
    ("Events", {"search_clicks": [CLICK | {"event_time": 3}]}),
    ("Events", {}),
]


def fields_of(name, body):
    return {"logs": body} if name == "Events" else body


@pytest.mark.parametrize(("name", "body"), ASKED)
def test_answers_are_those_of_http(ask, http, name, body):
    wanted = http.post(PATHS[name], json=body).json()
    if name == "Events":
        wanted = {"accepted": 0, "known_before": 1}  # by HTTP it was posted already
    status, found = ask(name, fields_of(name, body))
    assert status == "OK", found
    if name == "Events":
        assert {key: int(value) for key, value in found.items()} == wanted
        return
    assert len(wanted["items"]) > 0
    wanted["unknown"] = {key: value for key, value in wanted["unknown"].items() if value != []}
    assert found == {key: value for key, value in wanted.items() if value is not None}


@pytest.mark.parametrize(("name", "body"), REFUSED)
def test_refusals_have_the_words_of_http(ask, http, name, body):
    wanted = http.post(PATHS[name], json=body)
    assert wanted.status_code == 422
    assert ask(name, fields_of(name, body)) == ("INVALID_ARGUMENT", wanted.json()["error"])


def test_a_refusal_that_names_many_features_fits_a_header(ask, service):
    service.ranker.encoder.names["context"] = dict.fromkeys(f"feature_{n}" for n in range(200))
    status, words = ask("Score", GOOD | {"context": {"x": 1}})
    assert (status, len(words), words[:29]) == ("INVALID_ARGUMENT", 1_000, "context: unknown feature 'x';")


def test_the_model_is_told_alike(ask, http):
    status, found = ask("Model", {})
    assert status == "OK"
    assert found == http.get("/v1/model").json()


def test_fields_and_numbers_that_json_has_not_are_refused(ask):
    classes = message_classes()
    for message, words in (
        (b"\xa0\x06\x01", "request: has a field that service.proto does not have"),  # field 100, a number
        (b"\xff", "request: is no RankRequest of service.proto"),
    ):
        assert ask("Score", {}, message=message) == ("INVALID_ARGUMENT", words)
    message = json_format.ParseDict(GOOD, classes["RankRequest"]())
    message.candidates[0].features["price"] = float("nan")
    status, words = ask("Score", {}, message=message.SerializeToString())
    assert (status, words.startswith("request: ")) == ("INVALID_ARGUMENT", True)
    assert "\n" not in words


def test_an_integer_that_a_message_may_have_rounded_is_no_id(ask):
    status, words = ask("Events", {"logs": {"search_clicks": [CLICK | {"click_id": 2**53 + 1}]}})
    assert (status, words[:27]) == ("INVALID_ARGUMENT", "search_clicks[0].click_id: ")
    assert ask("Events", {"logs": {"search_clicks": [CLICK | {"click_id": 2**53 - 1}]}})[0] == "OK"
    candidate = {"id": "new", "features": {"price": 1e37}}
    assert ask("Score", GOOD | {"candidates": [candidate]})[0] == "OK"


def scaled_by_nothing(monkeypatch, service, where):
    """The service's numbers are taken as they are, and its program is NaN where `where` (inputs) says so."""
    encoder = service.ranker.encoder
    dense = tuple(dataclasses.replace(feature, scale="none") for feature in encoder.spec.dense)
    encoder.dense.update({feature.name: feature for feature in dense})
    predict = Program.predict

    def without(self, inputs):
        probs = predict(self, inputs)
        return {name: np.where(where(inputs), np.float32("nan"), value) for name, value in probs.items()}

    monkeypatch.setattr(Program, "predict", without)


def test_a_number_that_leaves_no_probability_is_named_and_refused(ask, http, service, monkeypatch):
    scaled_by_nothing(monkeypatch, service, lambda inputs: np.abs(inputs["item_dense"][:, 0]) > 1e20)
    body = GOOD | {"candidates": [{"id": "v1"}, {"id": "new", "features": {"price": -1e25}}]}
    words = (
        "candidates[1]: 'new' has a probability that is no number with candidates[1].features.price, which is -1e+25 "
        "as the model takes it; send null where a value is not known"
    )
    found = http.post("/v1/rank", json=body)
    assert (found.status_code, found.json()) == (422, {"error": words})
    assert ask("Rank", body) == ("INVALID_ARGUMENT", words)
    with pytest.raises(RequestError, match="has a probability that is no number with"):
        service.ranker.score(body)
    body["candidates"][1]["features"]["price"] = -1e19
    assert http.post("/v1/rank", json=body).status_code == 200


def test_a_probability_that_is_none_without_such_a_number_is_a_fault_of_ours(ask, http, service, monkeypatch):
    scaled_by_nothing(monkeypatch, service, lambda inputs: inputs["item_sparse"][:, -1] == 3)  # of v2, in the lake
    words = (
        "version one: 'v2' has a probability that is no number; the model, or a number that the lake has of it or of "
        "the user, is to blame: publish again"
    )
    found = http.post("/v1/score", json=GOOD)
    assert (found.status_code, found.json()) == (500, {"error": words})
    assert ask("Score", GOOD) == ("INTERNAL", words)
    sent = GOOD | {"candidates": [{"id": "v2"}, {"id": "v1", "features": {"price": 9.5}}]}
    assert http.post("/v1/score", json=sent).status_code == 500
    assert http.post("/v1/score", json=GOOD | {"candidates": [{"id": "v1"}]}).status_code == 200
    counted = service.metrics.registry.get_sample_value
    assert counted("usr_ray_serving_requests_total", {"path": "grpc/Score", "status": "500"}) == 1


def test_an_answer_that_fits_no_message_is_counted_as_a_fault(ask, service, monkeypatch):
    answered = Ranker.answer
    monkeypatch.setattr(Ranker, "answer", lambda *a, **kw: answered(*a, **kw) | {"a field that it has not": 1})
    assert ask("Score", GOOD) == ("INTERNAL", "internal error; the service's own output has its stack trace")
    assert [service.metrics.requests.labels("grpc/Score", status)._value.get() for status in (200, 500)] == [0, 1]


def test_without_the_token_and_beyond_the_queue_nothing_is_answered(ask, service):
    for name in ANSWERS:
        status, words = ask(name, {}, token="other")
        assert (status, words) == ("UNAUTHENTICATED", "authorization: Bearer and the service's token are needed")
    # What is refused is not read: these bytes are no message.
    assert ask("Score", {}, token="other", message=b"\xff")[0] == "UNAUTHENTICATED"
    Program.gate.clear()
    waiting = [service.submit(json.dumps(GOOD).encode(), ranked=False) for _ in range(2)]
    assert ask("Score", {}, message=b"\xff")[0] == "RESOURCE_EXHAUSTED"
    assert ask.metadata["retry-after"] == "1"
    Program.gate.set()
    assert [future.result(30)[0] for future in waiting] == [200, 200]
    counted = service.metrics.registry.get_sample_value
    assert counted("usr_ray_serving_requests_total", {"path": "grpc/Score", "status": "429"}) == 1
    assert counted("usr_ray_serving_requests_total", {"path": "grpc/Score", "status": "401"}) == 2


def test_a_disk_that_does_not_take_events_is_unavailable(ask, service, tmp_path):
    (tmp_path / "file").touch()
    service.log.folder = tmp_path / "file" / "x"
    status, words = ask("Events", {"logs": {"search_clicks": [CLICK]}})
    assert (status, words[:22]) == ("UNAVAILABLE", "events: cannot be kept")


def test_the_compiled_messages_are_those_of_the_file():
    """Held to the text, as protoc is not at hand in every place."""
    text = Path(grpc_service.__file__).with_name("service.proto").read_text(encoding="utf-8")
    classes = message_classes()
    written = dict(re.findall(r"^message (\w+) \{(.*?)\}$", text, re.MULTILINE | re.DOTALL))
    assert set(written) | {"Struct"} == set(classes)
    for name, body in written.items():
        fields = {f.name: f.number for f in classes[name].DESCRIPTOR.fields}
        assert fields == {field: int(n) for field, n in re.findall(r"(\w+) = (\d+);", body)}
        kinds = re.findall(r"^  (optional|repeated|map)\b", body, re.MULTILINE)
        for field, kind in zip(classes[name].DESCRIPTOR.fields, kinds, strict=True):
            assert (kind == "optional") == field.has_presence
    rpcs = re.findall(r"rpc (\w+)\((\w+)\) returns \(([\w.]+)\)", text)
    methods = classes["RankRequest"].DESCRIPTOR.file.services_by_name["Ranking"].methods
    assert [(m.name, m.input_type.name, m.output_type.name) for m in methods] == [
        (name, of, answer.rpartition(".")[2]) for name, of, answer in rpcs
    ]
    assert {name: answer for name, _, answer in rpcs} == {
        n: a.replace("Struct", "google.protobuf.Struct") for n, a in ANSWERS.items()
    }


def test_ports_that_cannot_be_are_refused(service, tmp_path):
    server = GrpcServer(service, None, host="127.0.0.1", port=0)
    with pytest.raises(UserError, match=r"--grpc-port \d+: cannot be listened on; name another"):
        GrpcServer(service, None, host="127.0.0.1", port=server.port)
    port = server.port
    with pytest.raises(UserError, match=rf"--port {port}: cannot be listened on at 127.0.0.1 \(.*\); name another"):
        serve_alone(service, None, host="127.0.0.1", port=port, grpc_port=None)
    server.close()
    with pytest.raises(UserError, match="--grpc-port: Ray Serve listens for gRPC on every address; name a --token"):
        serve_job(["--registry", str(tmp_path), "--grpc-port", "18999"])


def test_a_service_that_is_told_to_end_answers_what_it_has_begun(service):
    port, grpc_port = free_port(18_800), free_port(18_850)
    classes, found = message_classes(), []

    def ask_and_end():
        while True:  # until uvicorn has its own handlers of signals
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10).close()
                break
            except OSError:
                time.sleep(0.02)
        Program.gate.clear()
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            call = channel.unary_unary(
                f"/{RANKING}/Score",
                request_serializer=lambda m: m.SerializeToString(),
                response_deserializer=classes["RankAnswer"].FromString,
            ).future(json_format.ParseDict(GOOD, classes["RankRequest"]()), timeout=30)
            while service.num_queued == 0:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            Program.gate.set()
            found.append([item.id for item in call.result().items])

    before = signal.getsignal(signal.SIGTERM)
    asking = threading.Thread(target=ask_and_end)
    asking.start()
    try:
        with pytest.raises(SystemExit) as end:
            serve_alone(service, None, host="127.0.0.1", port=port, grpc_port=grpc_port)
    finally:
        signal.signal(signal.SIGTERM, before)
    asking.join(30)
    assert (end.value.code, found) == (None, [["v1", "v2"]])
