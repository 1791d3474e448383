"""tests/lanes.py: every lane runs under its own name, two at a time, and one that fails fails all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import lanes


@pytest.mark.integration
@pytest.mark.parametrize(("code_of_b", "expected"), [(0, 0), (1, 1), (lanes.NO_TESTS, 0)])
def test_lanes_start_in_turn_and_are_printed_under_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code_of_b: int, expected: int
) -> None:
    monkeypatch.setattr(lanes, "LOGS", tmp_path)
    monkeypatch.setattr(lanes, "LANES", {"a": (), "b": (), "c": ()})
    started: dict[str, subprocess.Popen[bytes]] = {}
    at_once: list[int] = []

    def start(name: str, words: list[str], ray_files: str) -> subprocess.Popen[bytes]:
        at_once.append(1 + sum(process.poll() is None for process in started.values()))
        (tmp_path / f"{name}.log").write_text(f"said by {name}\n")
        code = code_of_b if name == "b" else 0
        return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(0.3); raise SystemExit({code})"])

    monkeypatch.setattr(lanes, "start", start)
    assert lanes.follow([], "", started) == expected
    assert list(started) == ["a", "b", "c"]
    assert max(at_once) <= lanes.AT_A_TIME
    printed = capsys.readouterr().out
    for name, code in {"a": 0, "b": code_of_b, "c": 0}.items():
        assert f"== lane {name}: exit code {code} after" in printed
        assert f"said by {name}" in printed.split(f"== lane {name}:")[1].split("== lane")[0]
