"""The tests that need a JVM or Ray, in two processes at a time: one waits where the other computes.

    python tests/lanes.py [words for pytest, such as -m slow]

The longest two lanes begin, and each of the others when one has ended, so that no core is idle before the last. Each
lane writes to its own file, and the file is printed when the lane has ended: what failed stands together. The exit code
is 1 if any lane failed. Ctrl-C (or SIGTERM) ends them all, with what they started.

The tests of Ray itself are in one lane: a machine has one list of clusters for Prometheus and one "cluster that was
started last" (docs/decisions.md), so two at once would be a test of that. Jobs on real logs and studies, which start a
Ray of their own, are in other lanes, whose Rays keep such files in a folder apart.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".cache" / "tests"
REAL = ("tests/e2e/test_real_logs.py", "tests/e2e/test_export.py", "tests/e2e/test_studies.py")
"""Exports and studies in the lane's process, one after another; with the slow tests, jobs on real logs as well."""
JOBS = ("tests/spark/test_standalone.py", "tests/spark/test_ingest.py", "tests/spark/test_real_logs.py")
"""The same of Spark, and real logs, which need no other test's lake: with them Spark's lane would end minutes after the
others."""
LANES = {
    "spark": ("tests/spark", *(f"--ignore={path}" for path in JOBS)),
    "ray": ("tests/ray", "tests/e2e", *(f"--ignore={path}" for path in REAL)),
    "jobs": JOBS,
    "real": REAL,
}
"""Lane -> what pytest is told to run. A new file of these folders is in one of them by itself."""
AT_A_TIME = 2
NO_TESTS = 5
"""pytest's exit code where `words` leave a lane none (-m slow)."""
REPORT_EVERY_S = 60
TIME_TO_END_S = 60


def start(name: str, words: list[str], ray_files: str) -> subprocess.Popen[bytes]:
    """A lane in a process group of its own: Ctrl-C at the terminal reaches this process, and it tells the lanes."""
    environment = os.environ if name == "ray" else os.environ | {"RAY_TMPDIR": ray_files}
    command = [sys.executable, "-m", "pytest", "--durations=15", "-o", f"cache_dir=.cache/pytest-{name}", *LANES[name]]
    with (LOGS / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, *words], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def end(lanes: dict[str, subprocess.Popen[bytes]]) -> None:
    """As Ctrl-C does it, so that fixtures take down what they started; by force what is left after a while."""
    for number in (signal.SIGINT, signal.SIGKILL):
        for process in lanes.values():
            if process.poll() is None:
                os.killpg(process.pid, number)
        until = time.monotonic() + TIME_TO_END_S
        while any(process.poll() is None for process in lanes.values()) and time.monotonic() < until:
            time.sleep(0.1)


def last_line(name: str) -> str:
    """What a lane has said last: pytest's dots and its share."""
    lines = (LOGS / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1][-100:] if lines else "begins"


def follow(words: list[str], ray_files: str, lanes: dict[str, subprocess.Popen[bytes]]) -> int:
    """Start the lanes in turn, print each as it ends, and now and then how far the others are; 1 if any failed.

    `lanes` is filled: whoever catches an interruption ends those.
    """
    started = reported = time.monotonic()
    codes: dict[str, int] = {}
    waiting = list(LANES)
    while len(codes) < len(LANES):
        if waiting and len(lanes) - len(codes) < AT_A_TIME:
            name = waiting.pop(0)
            lanes[name] = start(name, words, ray_files)
            continue
        time.sleep(0.2)
        seconds = time.monotonic() - started
        for name, process in lanes.items():
            if name not in codes and process.poll() is not None:
                codes[name] = process.returncode
                print(f"\n== lane {name}: exit code {process.returncode} after {seconds:.0f} s", flush=True)
                sys.stdout.write((LOGS / f"{name}.log").read_text(encoding="utf-8", errors="replace"))
                sys.stdout.flush()
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            left = (f"{name} {last_line(name)}" for name in lanes if name not in codes)
            print(f"{seconds:5.0f} s: {'; '.join(left)}", flush=True)
    return int(any(code != NO_TESTS for code in codes.values() if code))


def main(words: list[str]) -> int:
    """Run the lanes; the exit code."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    LOGS.mkdir(parents=True, exist_ok=True)
    lanes: dict[str, subprocess.Popen[bytes]] = {}
    ray_files = tempfile.mkdtemp(prefix="usr-")  # short: Ray's sockets lie deep in it, and their paths have 107 bytes
    try:
        return follow(words, ray_files, lanes)
    except KeyboardInterrupt:
        print("\nended on request; the lanes are told to end", file=sys.stderr, flush=True)
        end(lanes)
        return 130
    finally:
        end(lanes)
        shutil.rmtree(ray_files, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
