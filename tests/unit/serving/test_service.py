"""The service in one process: its queue, its versions, its answers; the versions stand in for real ones."""

from __future__ import annotations

import dataclasses
import datetime as dt
import gc
import json
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from jobs.publish import main as publish_job
from jobs.serve import check_registry, read_token
from tests.unit.samples_table import samples_spec
from usr_ray.config import UserError
from usr_ray.serving.app import make_app
from usr_ray.serving.events import EventError, EventLog, checked_rows
from usr_ray.serving.ranker import _FIELDS, Ranker, RequestError, iso_time
from usr_ray.serving.service import OverloadError, Service, Settings, parsed
from usr_ray.serving.versions import Pointer, RegistryError, move_pointer, read_pointer, roll_back

pytestmark = pytest.mark.unit


class Version:
    """Answers with its name; waits where it is told to."""

    gate = threading.Event()

    def __init__(self, name: str, log: EventLog | None = None) -> None:
        self.version = {"version": name, "model_id": name, "files": {"x": 1}, "as_of": "2026-01-08T00:00:00Z"}
        self.asked: list[Any] = []
        self.encoder = SimpleNamespace(spec=samples_spec())
        self.null_values = {"search_clicks": ["-"]}
        self.log = log

    def score(self, raw: Any) -> dict[str, Any]:
        self.asked.append(raw)
        return self.answer(raw, ranked=False)

    def answer(self, raw: Any, *, ranked: bool, spent: Any = None) -> dict[str, Any]:
        if spent is not None:
            spent("program", 0.25)
        if raw.get("wait"):
            assert self.gate.wait(30)
        if "candidates" not in raw:
            raise RequestError("candidates: NoneType; a list is needed")
        items = [{"id": c["id"] if isinstance(c, dict) else c} for c in raw["candidates"]]
        if raw.get("events"):
            items = [{"id": row.id} for row in self.log.of_user(raw["user_id"])]
        return {
            "request_id": None,
            "version": self.version["version"],
            "items": items[:: -1 if ranked else 1][: raw.get("k")],
            "unknown": {"user": "user_id" not in raw, "candidates": [item["id"] for item in items[1:]]},
            "degraded": "slow" in raw,
        }


@pytest.fixture
def service(tmp_path, monkeypatch):
    def opened(folder, *, num_threads, log, deadline_s, device):
        if folder.name == "torn":
            raise RegistryError("versions/torn: missing or changed since it was published; publish again")
        if folder.name == "fails":
            raise OSError("a disk that fails")
        return Version(folder.name, log)

    monkeypatch.setattr(Ranker, "open", opened)
    Version.gate.clear()
    for name in ("one", "two", "torn"):
        (tmp_path / "versions" / name).mkdir(parents=True)
    move_pointer(tmp_path, "one")
    service = Service(Settings(tmp_path, num_workers=1, max_queued=2, poll_s=60, max_wait_s=60))
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


def test_a_request_that_has_waited_too_long_is_not_computed(service):
    service.settings = dataclasses.replace(service.settings, max_wait_s=0.0)
    status, answer = service.submit(json.dumps(GOOD).encode(), ranked=False).result(30)
    assert (status, answer["error"][:15]) == (429, "waited too long")


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
    assert about["stable"] == {"version": "two", "model_id": "two", "as_of": "2026-01-08T00:00:00Z"}
    assert about["last_error"].startswith("versions/torn: missing or changed")
    (tmp_path / "current.json").write_text("{")
    assert not service.look()
    assert client.get("/readyz").json() == {"version": "two"}
    move_pointer_text(tmp_path, "two")
    assert service.look()
    assert client.get("/v1/model").json()["last_error"] == ""


def move_pointer_text(registry, name):
    (registry / "current.json").write_text(json.dumps({"stable": name, "before": []}))


def test_the_canary_answers_to_its_users_and_the_shadow_to_nobody(service, client, tmp_path):
    Pointer("one", canary="two", share=0.5, shadow="two").write(tmp_path)
    assert service.look()
    assert not service.look()
    answers = [client.post("/v1/score", json=GOOD | {"user_id": f"u{n}"}).json() for n in range(40)]
    found = {(answer["bucket"], answer["version"]) for answer in answers}
    assert found == {("stable", "one"), ("canary", "two")}
    again = client.post("/v1/score", json=GOOD | {"user_id": "u0"}).json()
    assert (again["bucket"], "shadow" in again) == (answers[0]["bucket"], False)
    # No Unicode: what refuses it is the version (these stand-ins look at no user), not the choice between them.
    body = b'{"candidates": ["a"], "user_id": "\\ud800"}'
    assert client.post("/v1/score", content=body).status_code == 200
    about = client.get("/v1/model").json()
    assert (about["canary"]["version"], about["shadow"]["version"], about["share"]) == ("two", "two", 0.5)
    # The rollback ends both.
    Pointer("two", ("one",), canary="torn", share=0.5).write(tmp_path)
    assert roll_back(tmp_path) == "one"
    assert service.look()
    assert {client.post("/v1/score", json=GOOD | {"user_id": f"u{n}"}).json()["version"] for n in range(40)} == {"one"}


def asked_of_many(client):
    """Bucket and version of the answers to forty users."""
    answers = [client.post("/v1/score", json=GOOD | {"user_id": f"u{n}"}).json() for n in range(40)]
    return {(answer["bucket"], answer["version"]) for answer in answers}


@pytest.mark.integration
@pytest.mark.parametrize("place", ["canary", "shadow"])
@pytest.mark.parametrize("broken", ["torn", "gone", "fails"])
def test_without_its_canary_or_shadow_the_stable_version_starts_changes_and_answers_to_all(
    service, client, tmp_path, place, broken
):
    (tmp_path / "versions" / "fails").mkdir()
    words = {
        "torn": "versions/torn: missing or changed since it was published",
        "gone": f"--registry {tmp_path}: current.json names gone, which is not there; publish",
        "fails": "OSError: a disk that fails",
    }
    named = {place: broken, "share": 0.5 if place == "canary" else 0.0}
    Pointer("one", **{place: "two"}, share=named["share"]).write(tmp_path)
    assert service.look()
    Pointer("one", **named).write(tmp_path)
    assert service.look()  # no longer with the version that the pointer does not name
    Pointer("two", **named).write(tmp_path)
    assert service.look()
    started = Service(Settings(tmp_path, poll_s=60))
    try:
        for other in (service, started):
            about = other.about()
            assert about["last_error"].startswith(f"served without its {place}: {words[broken]}")
            assert (about["stable"]["version"], about[place], about["share"]) == ("two", None, 0.0)
            assert other.metrics.registry.get_sample_value("usr_ray_serving_unopened") == 1
            assert other.metrics.registry.get_sample_value("usr_ray_serving_failed_swaps_total") == 1
            assert asked_of_many(TestClient(make_app(other))) == {("stable", "two")}
    finally:
        started.close()
    Pointer("two").write(tmp_path)
    service.look()
    assert service.metrics.registry.get_sample_value("usr_ray_serving_unopened") == service.about()["share"] == 0
    Pointer(broken).write(tmp_path)
    with pytest.raises(OSError if broken == "fails" else UserError):  # without a stable one there is no service
        Service(Settings(tmp_path))


def test_a_start_on_ray_is_refused_for_the_stable_version_alone(service, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / "versions" / name / "version.json").write_text('{"format": 3}')
    Pointer("one", canary="gone", share=0.1, shadow="torn").write(tmp_path)
    check_registry(tmp_path, "cpu")
    canary, shadow = capsys.readouterr().out.splitlines()
    assert canary.startswith(f"warning: served without its canary: --registry {tmp_path}: current.json names gone, ")
    assert shadow.startswith(f"warning: served without its shadow: {tmp_path}/versions/torn: holds no readable version")
    Pointer("torn", canary="two", share=0.1).write(tmp_path)
    with pytest.raises(RegistryError, match=r"versions/torn: holds no readable version.json"):
        check_registry(tmp_path, "cpu")


def test_a_canary_that_is_gone_can_be_ended_but_gets_no_users(service, tmp_path):
    Pointer("one", canary="gone", share=0.1, shadow="gone too").write(tmp_path)
    for words in (["--stable"], ["--canary", "0.5"]):
        with pytest.raises(RegistryError, match=r"current.json names gone, which is not there; publish one"):
            publish_job(["--registry", str(tmp_path), *words])
    assert read_pointer(tmp_path) == Pointer("one", canary="gone", share=0.1, shadow="gone too")
    publish_job(["--registry", str(tmp_path), "--canary", "0"])
    assert read_pointer(tmp_path).canary is None
    Pointer("one", canary="gone", share=0.1, shadow="gone too").write(tmp_path)
    move_pointer(tmp_path, "two")  # a publication ends what is gone
    assert read_pointer(tmp_path) == Pointer("two", ("one",))


def test_what_was_not_opened_is_tried_again_at_longer_and_longer_times(service, tmp_path, monkeypatch):
    now, tried = [100.0], []
    opened = Ranker.open

    def noted(folder, **settings):
        tried.append((now[0], folder.name))
        return opened(folder, **settings)

    monkeypatch.setattr(Ranker, "open", noted)
    monkeypatch.setattr("usr_ray.serving.service.time.monotonic", lambda: now[0])
    move_pointer(tmp_path, "torn")
    for tenth in range(0, 2000, 5):  # as the thread looks, twice a second, for 200 seconds
        now[0] = 100 + tenth / 10
        assert not service.look()
    assert tried == [(100.0 + after, "torn") for after in (0, 1, 3, 7, 15, 31, 63, 123, 183)]
    assert service.metrics.failed_swaps._value.get() == 1
    # A pointer that is moved is tried at once; with an error that is another one the waits begin anew.
    del tried[:]
    (tmp_path / "versions" / "torn").rmdir()
    Pointer("two", shadow="torn").write(tmp_path)
    for tenth in range(0, 60, 5):
        now[0] = 400 + tenth / 10
        assert service.look() == (tenth == 0)
    assert tried == [(400.0, "two")]  # a folder that is not there costs nothing
    assert service.metrics.failed_swaps._value.get() == 2
    (tmp_path / "versions" / "torn").mkdir()
    monkeypatch.setattr(Ranker, "open", lambda folder, **settings: Version(folder.name))
    now[0] = 406.5
    assert not service.look()
    now[0] = 407.0
    assert service.look()
    assert (service.about()["shadow"]["version"], service.last_error) == ("torn", "")


def test_the_shadows_scores_are_logged_and_its_faults_are_its_own(service, client, tmp_path):
    Pointer("one", shadow="two").write(tmp_path)
    assert service.look()
    asked = GOOD | {"user_id": "u", "scenario": "search"}
    answer = client.post("/v1/rank", json=asked).json()
    assert client.post("/v1/score", json=GOOD).status_code == 200  # without a user the shadow's line cannot be written
    service._shadow_pool.shutdown()
    (file,) = (tmp_path / "log").glob("shadow-*.jsonl")
    (line,) = map(json.loads, file.read_text().splitlines())
    assert (line["version"], line["items"], line["bucket"]) == ("one", answer["items"], "stable")
    assert line["shadow"] == {"version": "two", "items": [{"id": "a"}, {"id": "b"}]}
    counted = service.metrics.registry.get_sample_value
    for outcome in ("logged", "failed"):
        assert counted("usr_ray_serving_shadows_total", {"outcome": outcome}) == 1
    # Its "now" is the request's, for a request waits for the shadow, and past midnight its counters would be others.
    first, second = service._served[1]["two"].asked
    assert first == asked | {"time": first["time"]}
    assert first["time"] < second["time"] < iso_time(time.time_ns() // 1000)


def test_the_shadow_scores_what_was_returned_where_only_the_best_k_are(service, client, tmp_path):
    Pointer("one", shadow="two").write(tmp_path)
    assert service.look()
    asked = {"candidates": ["a", "b", "c", "d"], "k": 2, "user_id": "u", "scenario": "search"}
    assert [item["id"] for item in client.post("/v1/rank", json=asked).json()["items"]] == ["d", "c"]
    service._shadow_pool.shutdown()
    (file,) = (tmp_path / "log").glob("shadow-*.jsonl")
    line = json.loads(file.read_text())
    assert line["items"] == [{"id": "d"}, {"id": "c"}]
    assert line["shadow"]["items"] == [{"id": "c"}, {"id": "d"}]
    assert service.metrics.registry.get_sample_value("usr_ray_serving_candidates_total") == 4


def test_a_time_that_was_asked_for_is_the_shadows_too(service, client, tmp_path):
    Pointer("one", shadow="two").write(tmp_path)
    assert service.look()
    asked = GOOD | {"user_id": "u", "scenario": "search", "time": "2026-01-09T10:00:00Z"}
    assert client.post("/v1/rank", json=asked).status_code == 200
    service._shadow_pool.shutdown()
    assert service._served[1]["two"].asked == [asked]


def test_metrics_count_requests_candidates_and_answers_without_history(service, client):
    client.post("/v1/score", json=GOOD)
    client.post("/v1/score", json=GOOD | {"slow": 1})
    client.post("/v1/score", json=GOOD | {"k": 1, "user_id": "u"})
    client.post("/v1/rank", json={})
    text = client.get("/metrics").text
    replica = f'replica="{service.metrics.replica}"'  # a scrape reaches one replica of several
    for line in (
        f'usr_ray_serving_requests_total{{path="/v1/score",{replica},status="200"}} 3.0',
        f'usr_ray_serving_requests_total{{path="/v1/rank",{replica},status="422"}} 1.0',
        f"usr_ray_serving_candidates_total{{{replica}}} 6.0",
        f"usr_ray_serving_degraded_total{{{replica}}} 1.0",
        f'usr_ray_serving_unknown_total{{{replica},what="users"}} 2.0',
        f'usr_ray_serving_unknown_total{{{replica},what="candidates"}} 3.0',
        f'usr_ray_serving_seconds_count{{path="/v1/score",{replica},status="200"}} 3.0',
        f'usr_ray_serving_seconds_count{{path="/v1/rank",{replica},status="422"}} 1.0',
        f'usr_ray_serving_stage_seconds_count{{{replica},stage="wait"}} 4.0',
        f'usr_ray_serving_stage_seconds_sum{{{replica},stage="program"}} 1.0',
        f"usr_ray_serving_queue{{{replica}}} 0.0",
    ):
        assert line in text
    assert all(replica in line for line in text.splitlines() if not line.startswith("#"))
    published = dt.datetime(2026, 1, 8, tzinfo=dt.UTC).timestamp()
    age = service.metrics.registry.get_sample_value("usr_ray_serving_age_seconds")
    assert abs(time.time() - published - age) < 60


def test_a_fault_of_the_service_is_counted_and_one_line(service, client, monkeypatch):
    def fails(self, raw, *, ranked, spent=None):
        raise OverflowError("date value out of range")

    monkeypatch.setattr(Version, "answer", fails)
    answer = client.post("/v1/score", json=GOOD)
    assert answer.status_code == 500
    assert answer.json() == {"error": "internal error; the service's own output has its stack trace"}
    counted = service.metrics.registry.get_sample_value
    assert counted("usr_ray_serving_requests_total", {"path": "/v1/score", "status": "500"}) == 1
    assert counted("usr_ray_serving_seconds_count", {"path": "/v1/score", "status": "500"}) == 1


def test_posted_events_are_kept_before_they_are_answered_and_seen_by_the_next_request(service, client, tmp_path):
    click = {"click_id": "c", "user_id": "u", "item_id": "x", "event_time": "2026-01-01T00:00:00Z"}
    answer = client.post("/v1/events", json={"search_clicks": [click]})
    assert (answer.status_code, answer.json()) == (200, {"accepted": 1, "known_before": 0})
    assert client.post("/v1/events", json={"search_clicks": [click]}).json() == {"accepted": 0, "known_before": 1}
    assert client.post("/v1/score", json=GOOD | {"user_id": "u", "events": 1}).json()["items"] == [{"id": "c"}]
    bad = client.post("/v1/events", json={"search_clicks": [click | {"click_id": "d"}, {}]})
    assert (bad.status_code, bad.json()["error"][:26]) == (422, "search_clicks[1].click_id:")
    null = client.post("/v1/events", json={"search_clicks": [click | {"user_id": "-"}]})
    assert (null.status_code, null.json()["error"][:24]) == (422, "search_clicks[0].user_id")
    assert [row.id for row in EventLog(tmp_path / "log" / "events").of_user("u")] == ["c"]
    assert service.metrics.registry.get_sample_value("usr_ray_serving_events_total") == 1
    service.log.folder = tmp_path / "versions" / "one" / "x"
    service.log.folder.parent.rmdir()
    service.log.folder.parent.touch()  # no folder can be made there
    gone = client.post("/v1/events", json={"search_clicks": [click | {"click_id": "d"}]})
    assert (gone.status_code, gone.json()["error"][:23]) == (503, "events: cannot be kept ")


def test_the_token_is_asked_for_everywhere_but_where_only_numbers_are(service):
    client = TestClient(make_app(service, "secret"))
    assert client.post("/v1/score", json=GOOD).status_code == 401
    for header in ("secret", "Bearer", "Bearer wrong", "Bearer secret2"):
        assert client.get("/v1/model", headers={"Authorization": header}).status_code == 401
    assert client.post("/v1/score", json=GOOD, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200


def test_requests_without_the_token_are_counted_under_one_path_whatever_they_ask_for(service):
    client = TestClient(make_app(service, "secret"))
    for path in ("/v1/model", "/v1/rank", "/anything"):
        assert client.get(path).status_code == 401
    text = client.get("/metrics").text
    replica = f'replica="{service.metrics.replica}"'
    assert f'usr_ray_serving_requests_total{{path="any",{replica},status="401"}} 3.0' in text
    assert f'usr_ray_serving_seconds_count{{path="any",{replica},status="401"}} 3.0' in text
    assert "/anything" not in text


def test_the_page_is_off_unless_asked_for_and_its_data_need_the_token(service, tmp_path):
    paths = ("/", "/v1/examples", "/v1/explain")
    off = TestClient(make_app(service))
    assert off.get("/").json() == {"error": "/ is no path of this service; /docs has them all"}
    assert off.get("/v1/rank").json() == {"error": "/v1/rank does not take GET; it takes POST"}
    assert (off.get("/v1/rank").status_code, off.get("/v1/rank").headers["allow"]) == (405, "POST")
    assert [off.request("POST" if "explain" in path else "GET", path).status_code for path in paths] == [404] * 3
    service.settings = dataclasses.replace(service.settings, page=True)
    golden = [{"request": GOOD | {"scenario": "search", "user_id": "u"}, "items": []}]
    (tmp_path / "versions" / "one" / "golden.json").write_text(json.dumps(golden))
    client = TestClient(make_app(service, "secret"))
    page = client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http" not in page.text.replace("http-equiv", "")  # nothing is fetched from elsewhere
    assert client.get("/v1/examples").status_code == client.post("/v1/explain", json=GOOD).status_code == 401
    client.headers["Authorization"] = "Bearer secret"
    examples = client.get("/v1/examples").json()
    assert (examples["version"], examples["requests"]) == ("one", [golden[0]["request"]])
    assert (examples["scenarios"], examples["query_scenarios"]) == (["search", "recommendation"], ["search"])
    assert client.post("/v1/explain", content=b"{").status_code == 422


def test_the_openapi_document_names_the_fields_that_are_taken_and_answered(service, client):
    service.settings = dataclasses.replace(service.settings, page=True)
    paths = TestClient(make_app(service)).get("/openapi.json").json()["paths"]

    def schema(path, status=None):
        post = paths[path]["post"]
        return (post["responses"][status] if status else post["requestBody"])["content"]["application/json"]["schema"]

    for path in ("/v1/score", "/v1/rank", "/v1/explain"):
        assert tuple(schema(path)["properties"]) == _FIELDS
    logs = schema("/v1/events")["properties"]
    for log, rows in logs.items():
        row = {name: "2026-01-01T00:00:00Z" if "time" in name else "x" for name in rows["items"]["properties"]}
        assert len(checked_rows({log: [row]}, samples_spec().scenarios)) == 1
        needed = {name: row[name] for name in rows["items"]["required"]}
        assert len(checked_rows({log: [needed]}, samples_spec().scenarios)) == 1
        for name in needed:
            with pytest.raises(EventError):
                checked_rows({log: [{k: v for k, v in needed.items() if k != name}]}, samples_spec().scenarios)
    assert len(logs) == 7
    click = {"click_id": "c", "user_id": "u", "item_id": "x", "event_time": "2026-01-01T00:00:00Z"}
    kept = client.post("/v1/events", json={"search_clicks": [click]}).json()
    assert set(schema("/v1/events", "200")["properties"]) == set(kept)
    page = client.get("/docs").text
    for word in (
        "POST /v1/rank",
        "candidates[].features",
        "items[].p_ctcvr_global",
        "search_clicks[].click_id",
        "Retry-After",
    ):
        assert word in page
    assert TestClient(make_app(service, "secret")).get("/docs").status_code == 401


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


@pytest.mark.integration
def test_a_version_that_is_no_longer_served_is_let_go_though_it_explained(service, tmp_path, monkeypatch):
    made = []

    def explainer(ranker):
        made.append(ranker.version["version"])
        return SimpleNamespace(ranker=ranker, answer=lambda raw: {})

    monkeypatch.setattr("usr_ray.serving.service.Explainer", explainer)
    old = weakref.ref(service.ranker)
    for _ in range(2):
        assert service.submit_explained(b"{}").result(30)[0] == 200
    move_pointer(tmp_path, "two")
    assert service.look()
    assert service.submit_explained(b"{}").result(30)[0] == 200
    gc.collect()
    assert (old(), made) == (None, ["one", "two"])


def test_explainers_are_added_and_let_go_under_one_lock(service, tmp_path, monkeypatch):
    """A worker that adds one while the watcher goes through them would end the watcher's look with an error."""

    class Guarded(dict):
        def __setitem__(self, key, value):
            assert service._lock.locked()
            super().__setitem__(key, value)

        def items(self):
            assert service._lock.locked()
            return super().items()

    monkeypatch.setattr("usr_ray.serving.service.Explainer", lambda ranker: SimpleNamespace(answer=lambda raw: {}))
    service._explainers = Guarded()
    assert service.submit_explained(b"{}").result(30)[0] == 200
    assert len(service._explainers) == 1
    move_pointer(tmp_path, "two")
    assert service.look()
    assert service._explainers == {}
