"""The process of `jobs/serve.py --alone`: clients that hang up or send no more, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from jobs.serve import serve_alone
from tests.chaos.serving_bench import requests, write_version
from usr_ray.launch.environment import free_port
from usr_ray.serving.service import Service, Settings
from usr_ray.serving.versions import move_pointer

pytestmark = pytest.mark.unit
HALF = b'POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"scenario":'


@contextlib.contextmanager
def half_sent(port: int):
    """A client that has sent half of a request, and hangs up in the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(HALF)
        time.sleep(0.2)
        yield client


def asked(port: int, path: str, body: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", body, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.integration
def test_clients_that_hang_up_are_no_faults_and_one_that_sends_no_more_does_not_hold_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    write_version(tmp_path, "one", 1.0)
    move_pointer(tmp_path, "one")
    service = Service(Settings(tmp_path, poll_s=3600.0, store_deadline_s=30.0))
    port, found = free_port(18_900), list[int]()
    monkeypatch.setattr("jobs.serve.GRACE_S", 1)

    def ask_and_end() -> None:
        while True:  # until uvicorn has its own handlers of signals
            with contextlib.suppress(OSError):
                found.append(asked(port, "/readyz"))
                break
            time.sleep(0.02)
        with half_sent(port):
            pass
        time.sleep(0.2)
        found.append(asked(port, "/v1/score", json.dumps(requests()[1]).encode()))
        found.append(asked(port, "/v1/score/", b"{}"))
        with half_sent(port):
            ends.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            is_over.wait(60)

    before, is_over, ends = signal.getsignal(signal.SIGTERM), threading.Event(), list[float]()
    client = threading.Thread(target=ask_and_end)
    client.start()
    try:
        with pytest.raises(SystemExit):
            serve_alone(service, None, host="127.0.0.1", port=port, grpc_port=None)
        assert 0.5 < time.monotonic() - ends[0] < 20
    finally:
        is_over.set()
        signal.signal(signal.SIGTERM, before)
        client.join(30)
        service.close()
    assert found == [200, 200, 404]
    seen = [*(record.getMessage() for record in caplog.records), capfd.readouterr().err]
    assert not any("ASGI" in words or "Traceback" in words for words in seen)
