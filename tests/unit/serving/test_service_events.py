"""Posted events beside answers: neither the disk nor a long log may cost a request its answer or its history."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.serving_bench import requests, write_version
from usr_ray.serving.events import CLICK, IMPRESSION, EventLog, Row
from usr_ray.serving.service import OverloadError, Service, Settings
from usr_ray.serving.versions import move_pointer

pytestmark = pytest.mark.integration
BODY = json.dumps(requests()[1]).encode()


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    write_version(tmp_path, "one", 1.0)
    move_pointer(tmp_path, "one")
    return tmp_path


def post(service: Service, n: int) -> Any:
    """A future of a click that is posted."""
    row = {"click_id": f"c{n}", "user_id": "u", "item_id": "x", "event_time": "2026-01-01T00:00:00Z"}
    return service.submit_events(json.dumps({"search_clicks": [row]}).encode())


def test_requests_are_answered_while_posts_wait_for_the_disk(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, sync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert gate.wait(60)
        sync(descriptor)

    monkeypatch.setattr("usr_ray.serving.events.os.fsync", slow)
    service = Service(Settings(registry, num_workers=2, max_queued=4, poll_s=3600.0, max_wait_s=60.0))
    try:
        posted = [post(service, n) for n in range(4)]
        with pytest.raises(OverloadError):
            post(service, 4)
        assert service.num_queued == 4
        assert [service.submit(BODY, ranked=False).result(30)[0] for _ in range(8)] == [200] * 8
        assert not any(future.done() for future in posted)
        gate.set()
        assert [future.result(30) for future in posted] == [(200, {"accepted": 1, "known_before": 0})] * 4
        assert len(service.log.of_user("u")) == 4
    finally:
        gate.set()
        service.close()


def test_the_first_answer_has_the_history_of_a_log_that_takes_long_to_read(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = requests()[1]
    asked_us = 1_767_225_600_000_000
    shown = Row(IMPRESSION, "i", request["user_id"], "item_id-3", request["scenario"], asked_us - 9, asked_us - 9, None)
    EventLog(registry / "log" / "events").append([shown, shown._replace(kind=CLICK, id="c", time=asked_us - 8, of="i")])
    read = EventLog._read

    def slowly(self: EventLog, name: str) -> None:
        time.sleep(1.6)
        read(self, name)

    def answer(log_dir: Path | None) -> Any:
        service = Service(Settings(registry, poll_s=3600.0, store_deadline_s=1.2, log_dir=log_dir))
        try:
            return service.submit(BODY, ranked=False).result(30)[1]
        finally:
            service.close()

    without = answer(registry / "empty")
    monkeypatch.setattr(EventLog, "_read", slowly)
    found = answer(None)
    assert (found["degraded"], without["degraded"]) == (False, False)
    assert found["items"] != without["items"]  # the click is in the history
