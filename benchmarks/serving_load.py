"""The service under load at a given rate, beside the same program in other servers, and while versions change.

    python benchmarks/serving_load.py [--rounds 6] [--seconds 4] [--users 50000] [--others PYTHON]

A version as of benchmarks/serving.py, served by `jobs/serve.py --alone`: one process, two requests at once. Cells take
turns in rounds; a number is the median of the rounds with its interval:

- closed loop, 200 and 500 candidates, four clients: the most that is answered a second;
- open loop at 70 % of that, and at twice it: requests come at times of their own (Poisson), and are timed from when
  they were due;
- 50 requests a second of 200 candidates, steady, and while the pointer moves every second;
- 500 candidates, one and four clients, ours beside model.onnx on tiled rows under FastAPI with uvicorn, BentoML and
  LitServe (serving_rivals.py, run by --others, a Python that has them; those that it has not are left out and said).
  They get their encoded inputs for nothing. `ms of CPU` is of a server's processes, whatever else the machine does;
- `--rollback` until the version before is served, five times.

The client is this process, on the same cores. Writes benchmarks/results/serving_load.json and the table in
docs/serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import uvloop

from benchmarks.doc_tables import markdown, record
from benchmarks.interleaved import header, interval, ratio, settings_of, spread
from benchmarks.serving import published, requests
from usr_ray.serving.batching import tiled
from usr_ray.serving.ranker import Ranker
from usr_ray.serving.runtime import ONNX
from usr_ray.serving.versions import MODEL, VERSIONS, model_spec, move_pointer, roll_back

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "serving_load.json"
OURS, RIVALS = "usr-ray", ("fastapi", "bentoml", "litserve")
FIRST_PORT = 18_460
SIZES, AT_ONCE, SWAP_RATE, ROLLBACKS = (200, 500), 4, 50.0, 5
QUICK_S = 0.005


class Asked(NamedTuple):
    """One request: its status (0: no answer), seconds from when it was due, and from when it was sent."""

    status: int
    since_due: float
    since_sent: float


class Client:
    """Kept connections to one server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, wire: bytes, due: float) -> Asked:
        sent = time.perf_counter()
        try:
            reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(wire)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            assert length is not None, head
            await reader.readexactly(int(length[1]))
        except (OSError, asyncio.IncompleteReadError):
            return Asked(0, time.perf_counter() - due, time.perf_counter() - sent)
        end = time.perf_counter()
        self._free.append((reader, writer))
        return Asked(int(head[9:12]), end - due, end - sent)

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()


def run_loop(make: Callable[[Client], Awaitable[list[Asked]]], port: int) -> list[Asked]:
    async def whole() -> list[Asked]:
        client = Client(port)
        try:
            return await make(client)
        finally:
            client.close()

    return uvloop.run(whole())


def closed(port: int, wires: Sequence[bytes], clients: int, seconds: float) -> list[Asked]:
    """Each client asks again as soon as it was answered."""

    async def whole(client: Client) -> list[Asked]:
        found: list[Asked] = []
        end = time.perf_counter() + seconds

        async def one() -> None:
            while (now := time.perf_counter()) < end:
                found.append(await client.ask(wires[len(found) % len(wires)], now))

        await asyncio.gather(*(one() for _ in range(clients)))
        return found

    return run_loop(whole, port)


def opened(port: int, wires: Sequence[bytes], rate: float, seconds: float, seed: int) -> list[Asked]:
    """A Poisson process of requests, whether the last one was answered or not."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(int(rate * seconds), 1))

    async def whole(client: Client) -> list[Asked]:
        start = time.perf_counter() + 0.05
        tasks = []
        for number, due in enumerate((start + np.cumsum(gaps)).tolist()):
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            tasks.append(asyncio.ensure_future(client.ask(wires[number % len(wires)], due)))
        return list(await asyncio.gather(*tasks))

    return run_loop(whole, port)


# ---- servers


def wire(body: dict[str, Any]) -> bytes:
    """A whole HTTP request."""
    content = json.dumps(body).encode()
    lines = ["POST /v1/score HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


def installed(python: str, name: str) -> str:
    """The version of a package for another Python; empty: it has none."""
    if not python:
        return ""
    words = [python, "-c", f"from importlib import metadata; print(metadata.version({name!r}))"]
    return subprocess.run(words, check=False, capture_output=True, text=True).stdout.strip()


def prepare(folder: Path, version: Path, bodies: Sequence[dict[str, Any]]) -> None:
    """What a rival gets for nothing."""
    folder.mkdir()
    for path in (version / MODEL).glob(f"{ONNX}*"):
        (folder / path.name).symlink_to(path)
    ranker, spec = Ranker.load(version.parents[1]), model_spec(version)
    for body in bodies:
        inputs = ranker.encoded(ranker.checked(body))[0]
        np.savez(folder / f"{body['request_id']}.npz", **tiled(inputs, spec))  # type: ignore[arg-type]  # no name is one of its options


@contextmanager
def server(command: Sequence[str], port: int, request: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process of its own, once it answers."""
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(300):
            if run_loop(lambda client: _once(client, request), port)[0].status == 200:
                break
            time.sleep(0.3)
            assert process.poll() is None, f"{command} has ended"
        else:
            raise SystemExit(f"{command} does not answer")
        yield process
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


async def _once(client: Client, request: bytes) -> list[Asked]:
    return [await client.ask(request, time.perf_counter())]


def cpu_s(root: int) -> float:
    """Processor seconds of a process and of all that it started."""
    parents: dict[int, list[int]] = defaultdict(list)
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        parents[int(fields[1])].append(pid)
        ticks[pid] = int(fields[11]) + int(fields[12])
    whole, found = [root], 0
    while whole:
        pid = whole.pop()
        found += ticks.get(pid, 0)
        whole += parents[pid]
    return found / os.sysconf("SC_CLK_TCK")


def quick_refusals(port: int) -> tuple[float, float]:
    """Refusals (429) that the server gave within 5 ms, and all of them, so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r'usr_ray_serving_seconds_bucket\{le="(0\.005|\+Inf)".*?status="429"\} (\S+)', text)
    by = {bound: float(number) for bound, number in found}
    return by.get("0.005", 0.0), by.get("+Inf", 0.0)


# ---- cells


class Cells:
    """What each cell found, round by round: name -> number -> values."""

    def __init__(self) -> None:
        self.rounds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, name: str, asked: Sequence[Asked], seconds: float, **more: float) -> None:
        good = [one for one in asked if one.status == 200]
        refused = [one for one in asked if one.status == 429]
        found = {
            "answered_per_s": len(good) / seconds,
            "failed": float(len(asked) - len(good) - len(refused)),
            "refused_share": len(refused) / max(len(asked), 1),
            **more,
        }
        for key, times in (
            ("", [one.since_due for one in good]),
            ("refused_", [one.since_due for one in refused]),
            ("refused_sent_", [one.since_sent for one in refused]),
        ):
            if times:
                found |= {f"{key}p{q}_ms": float(np.percentile(times, q)) * 1e3 for q in (50, 99)}
        if refused:
            found["refused_quick_share"] = sum(one.since_sent <= QUICK_S for one in refused) / len(refused)
        for key, value in found.items():
            self.rounds[name][key].append(value)

    def median(self, name: str, key: str) -> float:
        return interval(self.rounds[name][key])["median"]


def load_cells(
    cells: Cells, port: int, wires: dict[int, list[bytes]], most: dict[int, float], seconds: float, seed: int
) -> None:
    """One round of closed and open loop."""
    for size in SIZES:
        cells.add(f"{size}: closed loop, {AT_ONCE} at once", closed(port, wires[size], AT_ONCE, seconds), seconds)
        asked = opened(port, wires[size], 0.7 * most[size], seconds, seed)
        cells.add(f"{size}: open loop, 70 %", asked, seconds, per_s=0.7 * most[size])
    before = quick_refusals(port)
    asked = opened(port, wires[SIZES[0]], 2 * most[SIZES[0]], seconds, seed)
    after = quick_refusals(port)
    at_server = (after[0] - before[0]) / max(after[1] - before[1], 1.0)
    more = {"per_s": 2 * most[SIZES[0]], "refused_quick_share_at_server": at_server}
    cells.add(f"{SIZES[0]}: open loop, twice the most", asked, seconds, **more)


def swap_cells(cells: Cells, port: int, registry: Path, wires: list[bytes], seconds: float, seed: int) -> None:
    """One round at 50 requests a second, steady and while the pointer moves every second."""
    cells.add(f"{SIZES[0]}: 50 requests/s", opened(port, wires, SWAP_RATE, seconds, seed), seconds)
    mover = "import sys, time; from pathlib import Path; from usr_ray.serving.versions import move_pointer\n"
    mover += "for n in range(int(float(sys.argv[2]))):\n"
    mover += "    time.sleep(1); move_pointer(Path(sys.argv[1]), ('again', 'drawn')[n % 2])"
    process = subprocess.Popen([sys.executable, "-c", mover, str(registry), str(seconds)], cwd=ROOT)
    asked = opened(port, wires, SWAP_RATE, seconds + 2, seed)
    process.wait()
    cells.add(f"{SIZES[0]}: 50 requests/s, pointer moves", asked, seconds + 2)


def rival_cells(cells: Cells, servers: dict[str, tuple[int, int]], wires: list[bytes], seconds: float) -> None:
    """One round of all servers side by side."""
    for clients in (1, AT_ONCE):
        for name, (port, pid) in servers.items():
            before = cpu_s(pid)
            asked = closed(port, wires, clients, seconds)
            used = (cpu_s(pid) - before) / max(len(asked), 1) * 1e3
            cells.add(f"{SIZES[1]}: {name}, {clients} at once", asked, seconds, cpu_ms=used)


def rollback_s(port: int, registry: Path) -> float:
    """Seconds from the pointer's move until the version before answers."""

    def served() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/model") as answer:
            return str(json.loads(answer.read())["stable"]["version"])

    move_pointer(registry, "drawn")
    move_pointer(registry, "again")
    while served() != "again":
        time.sleep(0.02)
    start = time.perf_counter()
    roll_back(registry)
    while served() != "drawn":
        time.sleep(0.02)
    return time.perf_counter() - start


def measured(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    registry = work / "registry"
    version = published(registry, arguments.users)
    shutil.copytree(version, registry / VERSIONS / "again")
    again = json.loads((registry / VERSIONS / "again" / "version.json").read_text())
    (registry / VERSIONS / "again" / "version.json").write_text(json.dumps(again | {"version": "again"}))
    bodies = {
        size: [body | {"request_id": str(n)} for n, body in enumerate(requests(size, arguments.users))]
        for size in SIZES
    }
    wires = {size: [wire(body) for body in of_size] for size, of_size in bodies.items()}
    prepare(work / "prepared", version, bodies[SIZES[1]])
    cells, servers, absent, rivals = Cells(), dict[str, tuple[int, int]](), [], dict[str, str]()
    with ExitStack() as stack:
        job = [sys.executable, str(ROOT / "jobs/serve.py"), "--registry", str(registry), "--alone"]
        servers[OURS] = FIRST_PORT, stack.enter_context(server(job, FIRST_PORT, wires[200][0])).pid
        for n, name in enumerate(RIVALS, 1):
            if not (version_of := installed(arguments.others, name)):
                absent.append(name)
                continue
            rivals[name] = version_of
            prepared = ["--prepared", str(work / "prepared")]
            command = [arguments.others, str(ROOT / "benchmarks/serving_rivals.py"), name, *prepared]
            port = FIRST_PORT + n
            servers[name] = port, stack.enter_context(server(command, port, wires[500][0])).pid
        for port, _ in servers.values():
            closed(port, wires[500], AT_ONCE, 1.0)
        port = FIRST_PORT
        most = {
            size: len(closed(port, wires[size], AT_ONCE, 2 * arguments.seconds)) / 2 / arguments.seconds
            for size in SIZES
        }
        for number in range(arguments.rounds):
            rival_cells(cells, servers, wires[500], arguments.seconds)
            load_cells(cells, port, wires, most, arguments.seconds, number)
            swap_cells(cells, port, registry, wires[200], arguments.seconds, number)
            print(f"round {number + 1} of {arguments.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
        back = [rollback_s(port, registry) for _ in range(ROLLBACKS)]
    return {
        "most_per_s": most,
        "absent": absent,
        "rivals": rivals,
        "rollback_s": interval(back),
        "cells": {
            name: {key: interval(values) for key, values in found.items()} for name, found in cells.rounds.items()
        },
        "ours_to": {
            name: {
                str(clients): ratio(
                    cells.rounds[f"500: {OURS}, {clients} at once"]["answered_per_s"],
                    cells.rounds[f"500: {name}, {clients} at once"]["answered_per_s"],
                )
                for clients in (1, AT_ONCE)
            }
            for name in servers
            if name != OURS
        },
    }


# ---- what is said


def aims(found: dict[str, Any]) -> list[list[str]]:
    """Aim, what was found, met or missed."""
    cells = found["cells"]

    def of(cell: str, key: str) -> float:
        value = cells.get(cell, {}).get(key)
        return float("nan") if value is None else value["median"]

    two, five = "200: open loop, 70 %", "500: open loop, 70 %"
    twice, steady, moving = "200: open loop, twice the most", "200: 50 requests/s", "200: 50 requests/s, pointer moves"
    failed = sum(cell["failed"]["high"] for cell in cells.values())
    refused = max(cells.get(name, {}).get("refused_share", {"median": 0.0})["median"] for name in (two, five, moving))
    rows = [
        ("200 candidates: p50 <= 10 ms", of(two, "p50_ms"), 10, "ms"),
        ("200 candidates: p99 <= 25 ms", of(two, "p99_ms"), 25, "ms"),
        (
            "200 candidates: >= 100 requests/s",
            -of(f"200: closed loop, {AT_ONCE} at once", "answered_per_s"),
            -100,
            "/s",
        ),
        ("500 candidates: p99 <= 40 ms", of(five, "p99_ms"), 40, "ms"),
        ("500 candidates: >= 60 requests/s", -of(f"500: closed loop, {AT_ONCE} at once", "answered_per_s"), -60, "/s"),
        ("no answer but 200 and 429: others", failed, 0, ""),
        ("no 429 at 70 % and while the pointer moves: largest share", refused, 0, ""),
        ("twice the load: p99 of what is answered <= 60 ms", of(twice, "p99_ms"), 60, "ms"),
        (
            "twice the load: 429 within 5 ms at the server, share",
            -of(twice, "refused_quick_share_at_server"),
            -0.99,
            "",
        ),
        (
            "twice the load: 429 within 5 ms of being sent, at the client, share",
            -of(twice, "refused_quick_share"),
            -0.99,
            "",
        ),
        ("hot swap at 50/s: p99 <= 2x", of(moving, "p99_ms") / of(steady, "p99_ms"), 2, "x"),
        ("rollback <= 2 s", found["rollback_s"]["median"], 2, "s"),
    ]
    for name, by_clients in found["ours_to"].items():
        rows.append(
            (f"500 candidates, {AT_ONCE} at once: >= 1.0x {name}", -by_clients[str(AT_ONCE)]["median"], -1.0, "x")
        )
    return [
        [words, f"{abs(value):,.2f} {unit}".strip(), "met" if value <= bound else "missed"]
        for words, value, bound, unit in rows
    ]


def table(report: dict[str, Any]) -> str:
    found = report["results"]
    rows = []
    for name, cell in sorted(found["cells"].items()):
        times = [spread(cell[key], 1) if key in cell else "" for key in ("p50_ms", "p99_ms")]
        refused = f"{cell['refused_share']['median']:.0%}" if "refused_share" in cell else ""
        cpu = spread(cell["cpu_ms"], 1) if "cpu_ms" in cell else ""
        rows.append([name, *times, spread(cell["answered_per_s"], 0), refused, cpu])
    head = ["candidates: what", "p50 ms", "p99 ms", "answered/s", "refused", "ms of CPU"]
    return markdown(head, rows) + "\n\n" + markdown(["aim", "found", ""], aims(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each cell")
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--others", default="", metavar="PYTHON", help="that has fastapi, bentoml and litserve")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    settings = settings_of(arguments) | {"others": bool(arguments.others)}
    report = header("the service under load, beside other servers", settings, ("onnxruntime", "fastapi", "uvicorn"))
    with tempfile.TemporaryDirectory() as name:
        report |= {"results": measured(arguments, Path(name))}
    record(report, table(report), arguments.output, document="serving.md", place=RESULTS)


if __name__ == "__main__":
    main()
