"""How fast does a published version answer, by the number of candidates: its program, one request, the whole service?

    python benchmarks/serving.py [--candidates 1 100 500] [--calls 200] [--seconds 5] [--users 100000] [--ray]

Publishes a model of the default sizes (12 categories, 4 numbers, two histories of up to 50 events) with random weights,
100,000 items and as many users with 0 to 100 events. Then, call by call in turns and on one thread each: request.onnx,
model.onnx on the same rows with the user repeated on each, and `Ranker.score` with its stages. Then the service in a
process of its own (`jobs/serve.py --alone`, with --ray on Ray Serve too), asked by this process over kept connections:
one after the other, and four at once without a pause; the sizes take turns in rounds. Client and service share the
machine's cores; load at a given rate is serving_load.py's. Prints tables and writes benchmarks/results/serving.json and
the table in docs/serving.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.doc_tables import markdown, record
from benchmarks.interleaved import header, settings_of
from benchmarks.score import exported_run
from usr_ray.serving.batching import tiled
from usr_ray.serving.encode import Encoder, Profile, UserEvents, ValueIndex
from usr_ray.serving.ranker import Ranker, iso_time
from usr_ray.serving.runtime import ExportedModel
from usr_ray.serving.stores import USERS, put_items, put_users
from usr_ray.serving.versions import (
    FORMAT,
    GOLDEN,
    MODEL,
    VERSION,
    VERSIONS,
    VOCABULARY_FOLDER,
    model_spec,
    move_pointer,
    open_encoder,
    version_files,
    vocabulary_paths,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "serving.json"
NUM_ITEMS, NUM_QUERIES, NUM_REQUESTS = 100_000, 50_000, 64
NOW_US = 1_767_225_600_000_000
AT_ONCE, ROUNDS = 4, 3
PROGRAM, TILED, RANKER = "request.onnx", "model.onnx, tiled", "Ranker.score"
ALONE = "HTTP"
QUANTILES = (50, 95, 99)


def published(registry: Path, num_users: int) -> Path:
    """A version of drawn items and users; its folder."""
    folder = registry / VERSIONS / "drawn"
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        exported_run(Path(name), "shared_bottom")
        (Path(name) / "export").rename(folder / MODEL)
    spec = model_spec(folder)
    (folder / VOCABULARY_FOLDER).mkdir()
    for feature, path in vocabulary_paths(folder, spec).items():
        number = spec.sparse_feature(feature).num_embeddings - 2
        ValueIndex.write(path, [f"{feature}-{n}" for n in range(number)], np.arange(2, 2 + number))
    encoder, rng = open_encoder(folder), np.random.default_rng(0)
    items = [f"item_id-{n}" for n in range(NUM_ITEMS)]
    put_items(folder, items, profiles(encoder, "item", NUM_ITEMS, rng), encoder)
    users = [f"user_id-{n}" for n in range(num_users)]
    put_users(folder, users, [events(rng) for _ in users], profiles(encoder, "user", num_users, rng))
    (folder / GOLDEN).write_text("[]")
    about = {"format": FORMAT, "version": "drawn", "model_id": "drawn", "as_of": iso_time(NOW_US)}
    about["rules"] = {"click_window": 0, "order_window": 0}
    (folder / VERSION).write_text(json.dumps(about | {"files": version_files(folder)}))
    move_pointer(registry, "drawn")
    return folder


def profiles(encoder: Encoder, owner: str, rows: int, rng: np.random.Generator) -> Profile:
    limits = [encoder.spec.sparse_feature(name).num_embeddings for name in encoder.categories[owner]]
    ids = rng.integers(2, limits, (rows, len(limits))).astype(np.int32)
    return Profile(ids, rng.normal(size=(rows, len(encoder.numbers[owner]))).astype(np.float32))


def events(rng: np.random.Generator) -> UserEvents:
    """0 to 100 of them, in either scenario."""
    number = rng.integers(101)
    time = np.sort(NOW_US - rng.integers(1, 30 * 86_400_000_000, number))
    scenario, action = rng.integers(2, size=number), rng.integers(1, 3, number)
    item, query = rng.integers(2, NUM_ITEMS, number), rng.integers(2, NUM_QUERIES, number)
    small, ids = (scenario.astype(np.uint8), action.astype(np.uint8)), (item.astype(np.int32), query.astype(np.int32))
    return UserEvents(time, time, *small, *ids, rng.integers(1 << 63, size=number).astype(np.uint64))


def requests(num_candidates: int, num_users: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(num_candidates)
    return [
        {
            "scenario": "search",
            "user_id": f"user_id-{rng.integers(num_users)}",
            "query": f"query-{rng.integers(NUM_QUERIES - 2)}",
            "time": iso_time(NOW_US),
            "candidates": [f"item_id-{n}" for n in rng.integers(NUM_ITEMS, size=num_candidates)],
        }
        for _ in range(NUM_REQUESTS)
    ]


def in_process(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Candidates -> way or stage -> milliseconds; the ways and stages take turns call by call."""
    model, spec = folder / MODEL, model_spec(folder)
    program, rows = ExportedModel(model, per_request=True), ExportedModel(model)
    ranker = Ranker.load(folder.parents[1])
    ways: dict[str, Callable[[Any], Any]] = {
        PROGRAM: lambda case: program.predict(case[2]),
        TILED: lambda case: rows.predict(case[3]),
        RANKER: lambda case: ranker.score(case[0]),
        "checks": lambda case: ranker.checked(case[0]),
        "stores and encoder": lambda case: ranker.encoded(case[1]),
        "user's read alone": lambda case: ranker._users.get(case[0]["user_id"]),
        "items' read alone": lambda case: ranker._items.find(case[0]["candidates"], ranker.encoder),
    }
    found: dict[str, Any] = {}
    for number in arguments.candidates:
        cases = []
        for raw in requests(number, arguments.users):
            checked = ranker.checked(raw)
            inputs = ranker.encoded(checked)[0]
            cases.append((raw, checked, inputs, tiled(inputs, spec)))
        whole, repeated = ways[PROGRAM](cases[0]), ways[TILED](cases[0])
        gap = max(float(np.abs(whole[name] - repeated[name]).max()) for name in whole)
        assert gap <= 1e-6, f"the programs differ by {gap}"
        times: dict[str, list[float]] = {name: [] for name in ways}
        for call in range(-NUM_REQUESTS // 4, arguments.calls):  # those before 0 warm caches and are not kept
            for name, way in ways.items():
                start = time.perf_counter()
                way(cases[call % NUM_REQUESTS])
                if call >= 0:
                    times[name].append(time.perf_counter() - start)
        found[str(number)] = {name: quantiles(seconds) for name, seconds in times.items()} | {"gap": gap}
    return found


def quantiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}_ms": round(float(np.percentile(seconds, q)) * 1e3, 3) for q in QUANTILES}


@contextmanager
def serving(registry: Path, port: int, *words: str) -> Iterator[None]:
    """The service in a process of its own, once it answers."""
    command = [sys.executable, str(ROOT / "jobs/serve.py"), "--registry", str(registry), "--port", str(port), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.2)
            assert process.poll() is None, "the service has ended"
        yield
    finally:
        process.terminate()
        process.wait(60)


def asked(port: int, bodies: list[bytes], seconds: float) -> list[float]:
    """Seconds of each answer over one kept connection, until the time is over."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        connection.request("POST", "/v1/score", bodies[len(found) % len(bodies)])
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        found.append(time.perf_counter() - start)
    connection.close()
    return found


def over_http(registry: Path, arguments: argparse.Namespace, port: int, *words: str) -> dict[str, Any]:
    """Candidates -> requests at once -> milliseconds and requests a second."""
    bodies = {n: [json.dumps(r).encode() for r in requests(n, arguments.users)] for n in arguments.candidates}
    cells = [(number, clients) for number in arguments.candidates for clients in (1, AT_ONCE)]
    times: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    with serving(registry, port, *words), ThreadPoolExecutor(AT_ONCE) as pool:
        for cell in cells:
            asked(port, bodies[cell[0]], 0.5)
        for _ in range(ROUNDS):
            for number, clients in cells:
                runs = [pool.submit(asked, port, bodies[number], arguments.seconds / ROUNDS) for _ in range(clients)]
                times[number, clients] += [second for run in runs for second in run.result()]
    found: dict[str, Any] = {}
    for (number, clients), seconds in times.items():
        rate = round(clients * len(seconds) / sum(seconds), 1)
        found.setdefault(str(number), {})[str(clients)] = quantiles(seconds) | {"requests_per_s": rate}
    return found


def sizes(folder: Path, num_users: int) -> dict[str, float]:
    """Bytes a user and an item on disk."""
    users = sum(path.stat().st_size for path in (folder / USERS).iterdir())
    items = sum(path.stat().st_size for path in folder.glob("items*"))
    return {"bytes_per_user": round(users / num_users), "bytes_per_item": round(items / NUM_ITEMS)}


def table(report: dict[str, Any]) -> str:
    """Ways by number of candidates: milliseconds, and what follows of them."""
    results = report["results"]
    rows = []
    for number, ways in results["in_process"].items():
        for name, found in ways.items():
            if name == "gap":
                continue
            cells = [f"{found[f'p{q}_ms']:.2f}" for q in QUANTILES]
            rate = f"{int(number) / found['p50_ms'] * 1e3:,.0f}" if name in (PROGRAM, TILED, RANKER) else ""
            times = f"{ways[TILED]['p50_ms'] / found['p50_ms']:.1f}x" if name in (PROGRAM, RANKER) else ""
            rows.append([f"{number}: {name}", *cells, rate, times])
    for way, by_number in results["service"].items():
        for number, by_clients in by_number.items():
            for clients, found in by_clients.items():
                cells = [f"{found[f'p{q}_ms']:.2f}" for q in QUANTILES]
                rate = f"{int(number) * found['requests_per_s']:,.0f}"
                rows.append([f"{number}: {way}, {clients} at once", *cells, rate, ""])
    head = ["candidates: what", *(f"p{q} ms" for q in QUANTILES), "candidates/s", "times tiled"]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 100, 500])
    parser.add_argument("--calls", type=int, default=200, help="of each way in this process")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each cell of the service")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--ray", action="store_true", help="the service on Ray Serve too")
    parser.add_argument("--port", type=int, default=18_437)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    report = header("how fast a published version answers", settings_of(arguments), ("onnxruntime", "fastapi", "ray"))
    with tempfile.TemporaryDirectory() as name:
        registry = Path(name)
        folder = published(registry, arguments.users)
        results: dict[str, Any] = {"sizes": sizes(folder, arguments.users), "service": {}}
        results["service"][ALONE] = over_http(registry, arguments, arguments.port, "--alone")
        if arguments.ray:
            results["service"]["Ray Serve"] = over_http(registry, arguments, arguments.port)
        results["in_process"] = in_process(folder, arguments)
    report |= {"results": results}
    record(report, table(report), arguments.output, document="serving.md", place=RESULTS)


if __name__ == "__main__":
    main()
