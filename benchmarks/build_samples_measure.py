"""One process and all it starts: seconds, processor time, memory; and what Spark's event log says.

Not a benchmark itself. Memory is the proportional set size (PSS) of the whole tree: pages that Spark's forked Python
workers share count once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PERIOD_S = 0.25
_TICKS = os.sysconf("SC_CLK_TCK")


class RunFailedError(Exception):
    """A system stopped with an error."""


@dataclass
class Usage:
    """What a process and its descendants used."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    """Of all processes at one moment."""
    peak_jvm_bytes: int = 0
    peak_python_bytes: int = 0
    lines: list[str] = field(default_factory=list)
    """What it printed."""


def tree(root: int) -> Iterator[tuple[int, str]]:
    """(pid, name) of a process and its descendants."""
    todo = [root]
    while todo:
        pid = todo.pop()
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            for task in os.listdir(f"/proc/{pid}/task"):
                todo += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except OSError:
            continue  # it ended meanwhile
        yield pid, name


def _memory(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _watch(root: int, usage: Usage, stop: threading.Event) -> None:
    cpu: dict[int, float] = {}
    while not stop.wait(PERIOD_S):
        sizes = {True: 0, False: 0}
        for pid, name in tree(root):
            try:
                cpu[pid] = _cpu_s(pid)
                sizes[name == "java"] += _memory(pid)
            except OSError:
                continue
        usage.peak_bytes = max(usage.peak_bytes, sum(sizes.values()))
        usage.peak_jvm_bytes = max(usage.peak_jvm_bytes, sizes[True])
        usage.peak_python_bytes = max(usage.peak_python_bytes, sizes[False])
        usage.cpu_s = sum(cpu.values())


def measure(command: Sequence[str], *, cwd: Path, env: dict[str, str], timeout_s: float) -> Usage:
    """Run a command to its end and say what it used.

    Raises:
        RunFailedError: it failed, or ran past the limit.
    """
    usage, stop = Usage(), threading.Event()
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    watcher = threading.Thread(target=_watch, args=(process.pid, usage, stop), daemon=True)
    watcher.start()
    timer = threading.Timer(timeout_s, lambda: os.killpg(process.pid, signal.SIGTERM))
    timer.start()
    assert process.stdout is not None
    try:
        usage.lines = [line.rstrip() for line in process.stdout]
        code = process.wait()
        usage.wall_s = time.perf_counter() - started
    finally:
        timer.cancel()
        stop.set()
        watcher.join()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if code:
        tail = "\n".join(usage.lines[-25:])
        raise RunFailedError(f"exit code {code} after {usage.wall_s:.0f} s of {' '.join(command)}\n{tail}")
    return usage


_METRICS = {
    "shuffle_write_bytes": "internal.metrics.shuffle.write.bytesWritten",
    "shuffle_write_rows": "internal.metrics.shuffle.write.recordsWritten",
    "spilled_disk_bytes": "internal.metrics.diskBytesSpilled",
    "gc_ms": "internal.metrics.jvmGCTime",
    "bytes_to_python": "data sent to Python workers",
    "bytes_from_python": "data returned from Python workers",
}


def spark_metrics(events: Path) -> dict[str, int]:
    """Sums over all finished stages of the event logs in a folder."""
    totals = dict.fromkeys(_METRICS, 0)
    totals["stages"] = 0
    for path in events.iterdir():
        for line in path.open(encoding="utf-8"):
            if '"Event":"SparkListenerStageCompleted"' not in line:
                continue
            values = {a["Name"]: a.get("Value") for a in json.loads(line)["Stage Info"]["Accumulables"]}
            totals["stages"] += 1
            for name, metric in _METRICS.items():
                totals[name] += int(values.get(metric) or 0)
    return totals
