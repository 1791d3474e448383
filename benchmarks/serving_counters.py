"""What do counters cost a request, and how much do they take on disk?

    python benchmarks/serving_counters.py [--candidates 1 100 500] [--calls 100] [--users 20000]

Two versions of the model of benchmarks/serving.py with random weights: one without counters, one with the 12
default counters of two item categories (180 columns), whose daily sums are drawn: of each item, user, query, pair. Both
answer the same requests in one process, in turns, on one thread; a pair's difference is what counters cost. Writes
benchmarks/results/serving_counters.json and the table in docs/serving.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa

from benchmarks.doc_tables import markdown, record
from benchmarks.interleaved import header, settings_of
from benchmarks.score import benchmark_spec
from benchmarks.serving import NOW_US, NUM_ITEMS, NUM_QUERIES, NUM_REQUESTS, published, requests
from usr_ray.config import CountersConfig
from usr_ray.config.counters import COUNTED, counter_columns
from usr_ray.schema import DenseFeature, FeatureSpec
from usr_ray.serving.counters import LakeCounters, write_counters
from usr_ray.serving.ranker import Ranker

RESULTS = Path(__file__).parent / "results" / "serving_counters.json"
CATEGORIES = ("category_1", "category_3")
DAYS = 10
PLAIN, COUNTING = "without counters", "with counters"
Rows = tuple[str, list[str]]


def counters() -> dict[str, Any]:
    return CountersConfig(defaults=True).every(CATEGORIES, has_queries=True)


def counting_spec() -> FeatureSpec:
    spec = benchmark_spec()
    dense = [
        DenseFeature(
            name=column,
            column=column,
            owner="item" if {"item_id", *CATEGORIES} & set(one.keys) else one.keys[0].removesuffix("_id"),
        )
        for name, one in counters().items()
        for column in counter_columns(name, one)
    ]
    return replace(spec, dense=(*spec.dense, *dense))


def drawn_sums(num_users: int) -> pa.Table:
    """Sums of ten days before the requests: ten of each user and its pairs, five of an item, three of a query."""
    rng = np.random.default_rng(1)
    users = [f"user_id-{n}" for n in np.repeat(np.arange(num_users), 10)]
    items = [f"item_id-{n}" for n in np.repeat(np.arange(NUM_ITEMS), 5)]
    queries = [f"query-{n}" for n in np.repeat(np.arange(NUM_QUERIES - 2), 3)]
    parts: list[Rows] = [("user_id", users), ("item_id", items), ("query", queries), ("*", ["*"] * 500)]
    for name in CATEGORIES:
        values = rng.integers(998, size=len(users))
        parts.append((f"user_id:{name}", [f"{u}|{name}-{v}" for u, v in zip(users, values, strict=True)]))
        parts.append((f"item_id:{name}", [f"item_id-{n}|{name}-{n % 998}" for n in range(NUM_ITEMS)]))
    pairs = rng.integers((NUM_QUERIES - 2, NUM_ITEMS), size=(300_000, 2))
    parts.append(("query:item_id", [f"query-{q}|item_id-{i}" for q, i in pairs.tolist()]))
    names = np.repeat([name for name, _ in parts], [len(keys) for _, keys in parts])
    days = rng.integers(NOW_US // 86_400_000_000 - DAYS, NOW_US // 86_400_000_000, len(names)).astype(np.int32)
    shown = rng.integers(1, 100, len(names))
    dates = pa.array(days).cast(pa.date32())
    scenarios = pa.array(benchmark_spec().scenarios).take(pa.array(rng.integers(2, size=len(names))))
    columns: dict[str, Any] = {"name": names, "key": [key for _, keys in parts for key in keys]}
    columns |= {"date": dates, "event_date": dates, "scenario": scenarios}
    return pa.table(columns | dict(zip(COUNTED, (shown, shown // 3, shown // 9), strict=True)))


def meaning() -> str:
    raw = {
        name: {"keys": c.keys, "windows": c.windows, "events": c.events, "per_scenario": c.per_scenario}
        for name, c in counters().items()
    }
    return json.dumps({"counters": {"prior": 20.0, **raw}})


def measured(rankers: dict[str, Ranker], arguments: argparse.Namespace) -> dict[str, Any]:
    """Candidates -> stage -> version -> p50 in milliseconds, and the median of the pairs' differences."""
    stages: dict[str, Callable[[Ranker, Any], Any]] = {
        "Ranker.score": lambda ranker, raw: ranker.score(raw),
        "stores and encoder": lambda ranker, raw: ranker.encoded(ranker.checked(raw)),
    }
    found: dict[str, Any] = {}
    for number in arguments.candidates:
        raws = requests(number, arguments.users)
        for stage, work in stages.items():
            times = {name: list[float]() for name in rankers}
            for call in range(-NUM_REQUESTS // 4, arguments.calls):
                for name, ranker in rankers.items():
                    start = time.perf_counter()
                    work(ranker, raws[call % NUM_REQUESTS])
                    if call >= 0:
                        times[name].append(time.perf_counter() - start)
            gap = np.median(np.subtract(times[COUNTING], times[PLAIN]))
            medians = {name: round(float(np.median(seconds)) * 1e3, 3) for name, seconds in times.items()}
            found.setdefault(str(number), {})[stage] = medians | {"difference": round(float(gap) * 1e3, 3)}
    return found


def sizes(folders: dict[str, Path], table: pa.Table, num_users: int) -> dict[str, float]:
    """Bytes of a sum in the shared files, texts of its keys included, and what the sums of a user take."""
    of_user = np.array([name.startswith("user_id") for name in table["name"].to_pylist()])
    shared = sum(path.stat().st_size for path in (folders[COUNTING] / "counters").iterdir())
    mapped, plain = ((folders[name] / "users" / "data.mdb").stat().st_size for name in (COUNTING, PLAIN))
    return {
        "sums": table.num_rows,
        "shared_bytes_per_sum": round(shared / int((~of_user).sum()), 1),
        "bytes_per_user": round((mapped - plain) / num_users),
        "sums_per_user": round(int(of_user.sum()) / num_users),
    }


def rows_of(report: dict[str, Any]) -> str:
    rows = [
        [f"{number}: {stage}", *(f"{cell[name]:.2f}" for name in (PLAIN, COUNTING, "difference"))]
        for number, stages in report["results"]["in_process"].items()
        for stage, cell in stages.items()
    ]
    return markdown(["candidates: what", f"{PLAIN}, p50 ms", f"{COUNTING}, p50 ms", "median difference"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 100, 500])
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    report = header("what counters cost a request", settings_of(arguments), ("onnxruntime", "numpy"))
    table, spec = drawn_sums(arguments.users), counting_spec()

    def write(folder: Path) -> LakeCounters:
        return write_counters(folder, spec, meaning(), table, as_of_us=NOW_US)

    with tempfile.TemporaryDirectory() as name:
        folders = {
            PLAIN: published(Path(name) / "plain", arguments.users),
            COUNTING: published(Path(name) / "counting", arguments.users, spec, write),
        }
        rankers = {way: Ranker.load(folder.parents[1]) for way, folder in folders.items()}
        results = {"sizes": sizes(folders, table, arguments.users), "in_process": measured(rankers, arguments)}
    report |= {"results": results}
    record(report, rows_of(report), arguments.output, document="serving.md", place=RESULTS)
    print(json.dumps(results["sizes"]), dt.date.today())


if __name__ == "__main__":
    main()
