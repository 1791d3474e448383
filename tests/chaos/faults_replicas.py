"""Faults of Ray Serve's replicas: a service of two, on a Ray of its own, asked over HTTP while they are killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tests.chaos.bench import ROOT, Bench, Fault
from tests.chaos.observe import Seen
from tests.chaos.serving_bench import HARMLESS, NUM_CLIENTS, Judge, write_version
from usr_ray.launch.environment import LOOPBACK, free_port
from usr_ray.serving.versions import move_pointer

NUM_REPLICAS, NUM_KILLS = 2, 3
FIRST_PORT = 18_555
_LOST = 500
"""What Serve's proxy says of a request that the killed replica had in work."""


class OverHttp:
    """A service by its address, as the judge asks one; a connection a thread."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._own = threading.local()

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and content of an answer; a connection that the server closed is opened again."""
        if not hasattr(self._own, "connection"):
            self._own.connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=60)
        self._own.connection.request(method, path, body)
        answer = self._own.connection.getresponse()
        return answer.status, answer.read()

    def submit(self, body: bytes, *, ranked: bool) -> Any:
        """As Service.submit."""
        found: Future[tuple[int, Any]] = Future()
        status, content = self.ask("POST", "/v1/rank" if ranked else "/v1/score", body)
        found.set_result((status, json.loads(content) if status in HARMLESS else {"error": content.decode()}))
        return found

    def replicas(self) -> set[int]:
        """Process ids, by the label of their metrics: a scrape meets one of them, another each time."""
        texts = [self.ask("GET", "/metrics")[1].decode() for _ in range(20)]
        return {int(pid) for text in texts for pid in re.findall(r'replica="[^"]*-(\d+)"', text)}


@contextlib.contextmanager
def on_ray(bench: Bench, registry: Any) -> Iterator[OverHttp]:
    """The service as a user starts it, on a Ray of its own: a replica is a process of this machine."""
    port = free_port(FIRST_PORT)
    words = ["--registry", registry, "--port", port, "--replicas", NUM_REPLICAS, "--workers", 1]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (registry / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "jobs/serve.py", *map(str, words)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    try:
        ends = time.monotonic() + bench.timeout_s
        while b"serving at" not in (registry / "log.txt").read_bytes():
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"the service did not start:\n{(registry / 'log.txt').read_text()[-3000:]}")
            time.sleep(0.2)
        yield OverHttp(port)
    finally:
        process.terminate()
        process.wait(60)


def replica_killed(bench: Bench) -> Seen:
    """SIGKILL of one replica after the other, each time the other one is back, while clients ask."""
    registry, seen = bench.case("replica-killed"), Seen()
    judge = Judge([write_version(registry, "one", 1.0)], harmless=(*HARMLESS, _LOST))
    move_pointer(registry, "one")
    with on_ray(bench, registry) as service, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        over = threading.Event()

        def ask_on() -> None:
            while not over.is_set():
                judge.ask(service, sum(judge.counts.values()) % len(judge.asked))

        clients = [pool.submit(ask_on) for _ in range(NUM_CLIENTS)]
        longest, killed = 0.0, set[int]()
        try:
            for _ in range(NUM_KILLS):
                killed.add(victim := min(service.replicas()))
                os.kill(victim, signal.SIGKILL)
                struck = time.monotonic()
                while len(service.replicas() - killed) < NUM_REPLICAS:
                    if time.monotonic() - struck > bench.timeout_s:
                        raise RuntimeError("the replica did not come back")
                longest = max(longest, time.monotonic() - struck)
        finally:
            over.set()
        for client in clients:
            client.result()
        lost = judge.counts.pop(str(_LOST), 0)
        # A client has one request in work: more would be of requests that came after.
        seen.note("lost", lost <= NUM_KILLS * NUM_CLIENTS, f"{lost} requests in work at the killed replica: status 500")
        seen.note(
            "back", len(killed) == NUM_KILLS, f"{NUM_KILLS} replicas killed, each replaced in {longest:.0f} s or less"
        )
        judge.ask_all(service)
    return judge.note(seen, "one")


FAULTS = (
    Fault(
        "serving-replica-killed",
        "SIGKILL of Ray Serve's replicas under load",
        "500 for what the replica had in work; all else right",
        replica_killed,
    ),
)
