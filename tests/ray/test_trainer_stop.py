"""How a wish to stop travels: a signal to an event, a file to a call."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def test_the_first_sigterm_sets_the_event_and_a_second_one_does_what_it_did_before() -> None:
    from usr_ray.launch.stop import sigterm_sets

    taken: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    try:
        asked = threading.Event()
        with sigterm_sets(asked):
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.wait(5)
            assert taken == []
            os.kill(os.getpid(), signal.SIGTERM)
        assert taken == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert taken == [signal.SIGTERM] * 2, "after the block the signal is as it was"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_watcher_calls_once_the_file_says_so_and_ends_with_its_block(tmp_path: Path) -> None:
    from usr_ray.launch.stop import ask_to_stop, make_empty, watch_stop_file

    path, stopped = tmp_path / "attempt" / "stop", threading.Event()
    make_empty(path)
    with watch_stop_file(path, stopped.set):
        assert not stopped.wait(0.5), "an empty file is no wish"
        ask_to_stop(path)
        assert stopped.wait(5)
    assert "usr-ray-stop" not in [thread.name for thread in threading.enumerate()]


def test_a_file_that_is_not_there_is_no_wish(tmp_path: Path) -> None:
    from usr_ray.launch.stop import watch_stop_file

    stopped = threading.Event()
    with watch_stop_file(tmp_path / "stop", stopped.set):
        assert not stopped.wait(0.5)
