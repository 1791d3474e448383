"""Users in a real Redis: the values of the LMDB, whole or absent, and a server that hangs, dies or is emptied."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient

from jobs.publish import main as publish_job
from tests.unit.samples_table import samples_spec
from usr_ray.config import UserError
from usr_ray.launch.environment import free_port
from usr_ray.serving.app import make_app
from usr_ray.serving.encode import Encoder, Profile, UserEvents
from usr_ray.serving.ranker import Ranker
from usr_ray.serving.redis_users import RedisUsers, check_address, check_server, forget_users, move_users
from usr_ray.serving.service import Service, Settings
from usr_ray.serving.stores import ItemTable, StoreError, UserStore, put_items, put_users
from usr_ray.serving.versions import Pointer, in_use, move_pointer

redis = pytest.importorskip("redis", reason="the package redis is not installed: pip install 'usr-ray[redis]'")
pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server on PATH (Debian: redis-server)"),
]
NUM_USERS = 2_500
NOW_US = 1_767_225_600_000_000


class Server:
    """A redis-server that keeps nothing on the disk."""

    def __init__(self, folder) -> None:
        self.port, self._folder = free_port(18_700), folder
        self.address = f"redis://127.0.0.1:{self.port}/3"
        self.start()

    def start(self) -> None:
        words = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self._folder)]
        command = ["redis-server", "--port", str(self.port), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                assert self.process.poll() is None
                time.sleep(0.02)

    @property
    def client(self):
        return redis.Redis.from_url(self.address, socket_timeout=5)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.kill()


def written(folder, encoder):
    """A version's folder with users of 0 to 6 events in search."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    put_items(folder, ["v1"], Profile(np.ones((1, 1), np.int32), np.ones((1, 1), np.float32)), encoder)
    events = []
    for n in range(NUM_USERS):
        time_us = np.sort(NOW_US - rng.integers(1, 10**9, n % 7))
        small, ids = np.ones(n % 7, np.uint8), rng.integers(2, 30, n % 7).astype(np.int32)
        keys = rng.integers(1 << 60, size=n % 7).astype(np.uint64)
        events.append(UserEvents(time_us, time_us, small * 0, small, ids, ids, keys))
    profiles = Profile(np.zeros((NUM_USERS, 0), np.int32), rng.normal(size=(NUM_USERS, 1)).astype(np.float32))
    put_users(folder, [f"u{n}" for n in range(NUM_USERS)], events, profiles)
    return folder


@pytest.fixture
def encoder():
    return Encoder(samples_spec(), {}, 50)


def same(one, other):
    events = all(np.array_equal(getattr(one[0], n), getattr(other[0], n)) for n in UserEvents.__slots__)
    return events and np.array_equal(one[1].ids, other[1].ids) and np.array_equal(one[1].numbers, other[1].numbers)


@pytest.mark.integration
def test_users_are_those_of_the_lmdb_and_old_versions_go(server, encoder, tmp_path):
    folder = written(tmp_path / "a", encoder)
    of_lmdb = {name: UserStore(folder, encoder).get(name) for name in (f"u{n}" for n in range(0, NUM_USERS, 7))}
    with pytest.raises(StoreError, match=r"redis://.* has none of version one; publish again"):
        RedisUsers(server.address, "id:one", encoder)
    place = {}
    for name in ("one", "two", "three"):
        of_version = folder if name == "one" else written(tmp_path / name, encoder)
        place[name] = move_users(of_version, server.address, name, tmp_path)
    assert not (folder / "users").exists()
    users = RedisUsers(server.address, place["one"], encoder)
    assert all(same(users.get(name), value) for name, value in of_lmdb.items())
    assert users.get("nobody") is None
    before = server.client.info("stats")["total_commands_processed"]
    users.get("u8")
    assert server.client.info("stats")["total_commands_processed"] - before <= 5  # one, and what the client asks here
    # What a crash has left is a version without a mark; both go; another registry's of the same name stays.
    server.client.delete(f"usr-ray:{place['three']}")
    (tmp_path / "other").mkdir()
    others = move_users(written(tmp_path / "b", encoder), server.address, "one", tmp_path / "other")
    assert forget_users(server.address, tmp_path, ["two"]) == ["one", "three"]
    assert forget_users(server.address, tmp_path, ["two"]) == []
    ids = {(path / "redis_id").read_text() for path in (tmp_path, tmp_path / "other")}
    left = {
        tuple(part.decode() for part in key.split(b":")[1:3])
        for key in server.client.scan_iter(match="usr-ray:*", count=5_000)
    }
    assert left == {tuple(place["two"].split(":")), tuple(others.split(":"))} | {(id_,) for id_ in ids}
    assert server.client.dbsize() == 2 * (NUM_USERS + 1) + 2
    with pytest.raises(StoreError, match="has none of version one"):
        users.get("u8")
    assert same(
        RedisUsers(server.address, place["two"], encoder).get("u8"),
        RedisUsers(server.address, others, encoder).get("u8"),
    )


@pytest.mark.integration
def test_a_publication_that_breaks_off_leaves_no_version(server, encoder, tmp_path):
    folder = written(tmp_path / "a", encoder)
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + 400_000)
    with pytest.raises(StoreError, match=r"does not take the users \(.*; nothing was published"):
        move_users(folder, server.address, "one", tmp_path)
    assert (folder / "users" / "data.mdb").exists()
    with pytest.raises(StoreError, match="has none of version one"):
        RedisUsers(server.address, f"{(tmp_path / 'redis_id').read_text()}:one", encoder)
    assert server.client.dbsize() > 100
    assert forget_users(server.address, tmp_path, []) == ["one"]
    assert server.client.dbsize() == 0
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(StoreError, match=r"drops keys when it is full \(maxmemory-policy allkeys-lru\), and a user"):
        check_server(server.address)
    server.client.config_set("maxmemory-policy", "volatile-lru")
    check_server(server.address)
    server.kill()
    with pytest.raises(StoreError, match=r"does not answer \(.*\); start Redis there"):
        check_server(server.address)
    with pytest.raises(StoreError, match=r"old users cannot be removed"):
        forget_users(server.address, tmp_path, [])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:6379", "is no address of Redis; write redis://HOST:PORT/DB"),
        ("redis://host:99999/0", "is no address of Redis"),
        ("redis://host/zero", "is no address of Redis"),
        ("redis://:secret@host/zero", "holds a password, which would be kept in version.json"),
        ("redis://:secret@host/0", "holds a password, which would be kept in version.json; set USR_RAY_REDIS_PASSWORD"),
    ],
)
def test_addresses_that_cannot_be_are_refused_before_the_export(tmp_path, address, message):
    with pytest.raises(UserError, match=message) as error:
        check_address(address)
    assert "secret" not in str(error.value)
    for name in ("run", "lake"):
        (tmp_path / name).mkdir()
    places = ["--run-dir", str(tmp_path / "run"), "--lake", str(tmp_path / "lake"), "--registry", str(tmp_path / "r")]
    with pytest.raises(UserError):
        publish_job([*places, "--users", address])
    for flag, words in (("users", ["--rollback"]), ("users", ["--stable"]), ("run-dir", [*places[:4], "--rollback"])):
        with pytest.raises(UserError, match=rf"^--{flag}: is for a new version, and {words[-1]} serves one that is "):
            publish_job([*words, "--registry", str(tmp_path / "r"), "--users", "redis://127.0.0.1/0"])


@pytest.mark.integration
def test_a_server_with_a_password(server, monkeypatch):
    server.client.config_set("requirepass", "pässword")
    with pytest.raises(StoreError, match="does not answer"):
        check_server(server.address)
    monkeypatch.setenv("USR_RAY_REDIS_PASSWORD", "pässword")
    check_server(server.address)


def test_versions_in_use_are_those_of_the_pointer_and_of_one_rollback(tmp_path):
    assert in_use(tmp_path) == set()
    for name in "abc":
        (tmp_path / "versions" / name).mkdir(parents=True)
    Pointer("d", ("a", "b", "c"), canary="e", share=0.1, shadow="f").write(tmp_path)
    assert in_use(tmp_path) == {"c", "d", "e", "f"}


class Program:
    """p_ctr is a sum over the history that the model sees."""

    def predict(self, inputs):
        return {"p_ctr": np.full(len(inputs["item_sparse"]), inputs["search_history_item_ids"].sum() / 1e4)}


@pytest.fixture
def client(server, encoder, tmp_path, monkeypatch):
    folder = written(tmp_path / "versions" / "one", encoder)
    place = move_users(folder, server.address, "one", tmp_path)
    version = {"version": "one", "model_id": "m", "rules": {"click_window": 0, "order_window": 0}}
    stores = ItemTable(folder), RedisUsers(server.address, place, encoder)

    def opened(folder, *, num_threads, log, deadline_s, device):
        ranker = Ranker(version, Program(), encoder, stores, exact_from_us=NOW_US)
        ranker.read_within(deadline_s)
        return ranker

    monkeypatch.setattr(Ranker, "open", opened)
    move_pointer(tmp_path, "one")
    service = Service(Settings(tmp_path, poll_s=60, max_wait_s=30, store_deadline_s=0.5))
    yield TestClient(make_app(service))
    service.close()


@pytest.mark.integration
def test_a_server_that_hangs_dies_or_is_empty_costs_the_history_and_no_answer(server, client):
    wanted = {}

    def asked(user):
        body = {"scenario": "search", "user_id": user, "candidates": ["v1", "x"], "time": "2026-01-01T00:00:00Z"}
        answer = client.post("/v1/score", content=json.dumps(body))
        assert answer.status_code == 200, answer.text
        return answer.json()

    users = [f"u{n}" for n in range(3, 40, 5)]
    for user in users:
        answer = asked(user)
        assert not answer["degraded"]
        wanted[user] = [item["p_ctr"] for item in answer["items"]]
    assert len({tuple(p) for p in wanted.values()}) > 5

    def checked(*, degraded):
        for user in users:
            answer = asked(user)
            assert answer["degraded"] == degraded
            assert [item["p_ctr"] for item in answer["items"]] == ([0.0, 0.0] if degraded else wanted[user])

    os.kill(server.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    checked(degraded=True)
    assert time.monotonic() - started < 0.5 * len(users) + 3
    os.kill(server.process.pid, signal.SIGCONT)
    time.sleep(0.5)  # readers that hung give up
    checked(degraded=False)  # late answers of the stopped server reach nobody
    server.kill()
    checked(degraded=True)
    server.start()  # empty: no user is taken for an unknown one
    checked(degraded=True)


@pytest.mark.integration
def test_a_golden_request_without_its_user_is_no_other_answer(server, encoder, tmp_path):
    folder = written(tmp_path / "a", encoder)
    place = move_users(folder, server.address, "one", tmp_path)
    version = {"version": "one", "model_id": "m", "rules": {"click_window": 0, "order_window": 0}}
    stores = ItemTable(folder), RedisUsers(server.address, place, encoder)
    ranker = Ranker(version, Program(), encoder, stores, exact_from_us=NOW_US)
    request = {"scenario": "search", "user_id": "u8", "candidates": ["v1"], "time": "2026-01-01T00:00:00Z"}
    golden = [{"request": request, "items": ranker.golden_items(request)}]
    ranker.check_golden(golden)
    server.kill()
    with pytest.raises(StoreError, match=r"version one: user 'u8' of a golden request cannot be read; see that the"):
        ranker.check_golden(golden)
