"""What do counters cost a request, and how much do they take on disk?

    python benchmarks/serving_counters.py [--candidates 1 100 500] [--calls 200] [--users 5000]

Two versions answer the same requests in one process, in turns: one without counters, one with the 12 default counters
of two item categories (60 columns) on drawn sums. Their program answers 0 at once, so what is timed is checks, stores,
encoder and answer; the times are the processor's, of the thread. Writes benchmarks/results/serving_counters.json and
the table in docs/serving.md. Takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa

from benchmarks.doc_tables import markdown, record
from benchmarks.interleaved import header, settings_of
from usr_ray.config.counters import COUNTED, CounterConfig, CountersConfig, counter_columns
from usr_ray.schema import DenseFeature, FeatureSpec, SparseFeature
from usr_ray.serving.counters import Counters, LakeCounters, write_counters
from usr_ray.serving.encode import Encoder, Profile, UserEvents
from usr_ray.serving.ranker import Ranker
from usr_ray.serving.stores import ItemTable, UserStore, put_items, put_users

RESULTS = Path(__file__).parent / "results" / "serving_counters.json"
CATEGORIES = ("category_1", "category_3")
NUM_ITEMS, NUM_QUERIES, NUM_PAIRS, NUM_VALUES, NUM_REQUESTS = 50_000, 20_000, 200_000, 998, 32
NOW_US, DAY_US = 1_767_225_600_000_000, 86_400_000_000
DAYS = 10
PLAIN, COUNTING = "without counters", "with counters"


def default_counters() -> dict[str, CounterConfig]:
    return CountersConfig(defaults=True).every(CATEGORIES, has_queries=True)


def spec_of(way: str) -> FeatureSpec:
    owners = {"user_id": "user", "item_id": "item", "query": "query", "event_hour": "context"}
    owners |= {f"category_{n}": "item" if n % 2 else "user" for n in range(8)}
    dense = [DenseFeature(name=f"number_{n}", column=f"number_{n}_scaled", owner="item") for n in range(4)]
    for name, one in default_counters().items() if way == COUNTING else ():
        owner = "item" if {"item_id", *CATEGORIES} & set(one.keys) else one.keys[0].removesuffix("_id")
        dense += [DenseFeature(name=c, column=c, owner=owner) for c in counter_columns(name, one)]
    return FeatureSpec(
        scenarios=("search", "recommendation"),
        query_scenarios=("search",),
        sparse=tuple(
            SparseFeature(name=n, column=f"{n}_index", num_embeddings=1_000, owner=o) for n, o in owners.items()
        ),
        dense=tuple(dense),
        history_length=50,
        label_delay_us=0,
    )


def drawn_sums(num_users: int) -> pa.Table:
    """Sums of ten days before the requests: ten of each user and of each of its pairs, five an item, three a query."""
    rng = np.random.default_rng(1)
    users = [f"user_id-{n}" for n in np.repeat(np.arange(num_users), 10)]
    parts = {"user_id": users, "item_id": [f"item_id-{n}" for n in np.repeat(np.arange(NUM_ITEMS), 5)]}
    parts |= {"query": [f"query-{n}" for n in np.repeat(np.arange(NUM_QUERIES), 3)], "*": ["*"] * 500}
    for name in CATEGORIES:
        values = rng.integers(NUM_VALUES, size=len(users)).tolist()
        parts[f"user_id:{name}"] = [f"{u}|{name}-{v}" for u, v in zip(users, values, strict=True)]
        parts[f"item_id:{name}"] = [f"item_id-{n}|{name}-{n % NUM_VALUES}" for n in range(NUM_ITEMS)]
    pairs = rng.integers((NUM_QUERIES, NUM_ITEMS), size=(NUM_PAIRS, 2)).tolist()
    parts["query:item_id"] = [f"query-{q}|item_id-{i}" for q, i in pairs]
    names = np.repeat(list(parts), [len(keys) for keys in parts.values()])
    days = rng.integers(NOW_US // DAY_US - DAYS, NOW_US // DAY_US, len(names)).astype(np.int32)
    shown = rng.integers(1, 100, len(names))
    columns: dict[str, Any] = {"name": names, "key": [key for keys in parts.values() for key in keys]}
    columns |= dict.fromkeys(("date", "event_date"), pa.array(days).cast(pa.date32()))
    columns["scenario"] = pa.array(("search", "recommendation")).take(pa.array(rng.integers(2, size=len(names))))
    return pa.table(columns | dict(zip(COUNTED, (shown, shown // 3, shown // 9), strict=True)))


def meaning() -> str:
    raw = {
        name: {"keys": c.keys, "windows": c.windows, "events": c.events, "per_scenario": c.per_scenario}
        for name, c in default_counters().items()
    }
    return json.dumps({"counters": {"prior": 20.0, **raw}})


class Nothing:
    """A program that takes no time."""

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(("p_ctr", "p_ctcvr"), np.zeros(len(inputs["item_sparse"]), np.float32))


def profiles(encoder: Encoder, owner: str, rows: int, lake: LakeCounters | None) -> Profile:
    rng = np.random.default_rng(2)
    ids = rng.integers(2, NUM_VALUES, (rows, len(encoder.categories[owner])))
    owners = pa.array([f"{owner}_id-{n}" for n in range(rows)], pa.large_string())
    codes = [] if lake is None else [lake.codes(name, owners, encoder) for name in encoder.counted[owner]]
    numbers = rng.normal(size=(rows, len(encoder.numbers[owner])))
    return Profile(np.column_stack([ids, *codes]).astype(np.int32), numbers.astype(np.float32))


def events(rng: np.random.Generator) -> UserEvents:
    """0 to 100 of them, in either scenario."""
    number = int(rng.integers(101))
    time_us = np.sort(NOW_US - rng.integers(1, 30 * DAY_US, number))
    scenario = rng.integers(2, size=number).astype(np.uint8)
    ids = rng.integers(2, NUM_ITEMS, number).astype(np.int32)
    keys = rng.integers(1 << 60, size=number).astype(np.uint64)
    return UserEvents(time_us, time_us, scenario, scenario * 0 + 1, ids, ids, keys)


def version(folder: Path, way: str, table: pa.Table, num_users: int) -> Ranker:
    folder.mkdir()
    spec, rng = spec_of(way), np.random.default_rng(3)
    lake = write_counters(folder, spec, meaning(), table, as_of_us=NOW_US) if way == COUNTING else None
    counters = None if lake is None else Counters(folder)
    encoder = Encoder(spec, {}, 100_000, None if counters is None else counters.indexes)
    items, users = (
        [f"{owner}_id-{n}" for n in range(rows)] for owner, rows in (("item", NUM_ITEMS), ("user", num_users))
    )
    put_items(folder, items, profiles(encoder, "item", NUM_ITEMS, lake), encoder)
    put_users(folder, users, [events(rng) for _ in users], profiles(encoder, "user", num_users, lake), lake)
    about = {"version": "drawn", "model_id": "drawn", "rules": {"click_window": 0, "order_window": 0}}
    program: Any = Nothing()
    stores = ItemTable(folder), UserStore(folder, encoder)
    return Ranker(about, program, encoder, stores, exact_from_us=NOW_US, counters=counters)


def measured(rankers: dict[str, Ranker], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Candidates -> version -> median milliseconds of the processor, and the median of the pairs' differences."""
    rng, found = np.random.default_rng(4), {}
    for number in arguments.candidates:
        requests = [
            {
                "scenario": "search",
                "user_id": f"user_id-{rng.integers(arguments.users)}",
                "query": f"query-{rng.integers(NUM_QUERIES)}",
                "time": "2026-01-01T00:00:00Z",
                "candidates": [f"item_id-{n}" for n in rng.integers(NUM_ITEMS, size=number)],
            }
            for _ in range(NUM_REQUESTS)
        ]
        times: dict[str, list[float]] = {name: [] for name in rankers}
        for call in range(-NUM_REQUESTS // 4, arguments.calls):  # those before 0 warm caches and are not kept
            for name, ranker in rankers.items():
                start = time.thread_time()
                ranker.score(requests[call % NUM_REQUESTS])
                if call >= 0:
                    times[name].append(time.thread_time() - start)
        times["difference"] = np.subtract(times[COUNTING], times[PLAIN]).tolist()
        found[str(number)] = {name: round(float(np.median(values)) * 1e3, 2) for name, values in times.items()}
    return found


def sizes(folder: Path, table: pa.Table, num_users: int) -> dict[str, float]:
    """Bytes of a sum that is not of a user, without and with the texts of values; and of a user's sums."""
    names = table["name"].to_pylist()
    shared = sum(not name.startswith(("user_id", "item_id:", "*")) for name in names)
    files = {path.name: path.stat().st_size for path in (folder / COUNTING / "counters").iterdir()}
    numbers = sum(size for name, size in files.items() if name.endswith(".npy"))
    plain, counting = ((folder / way / "users" / "data.mdb").stat().st_size for way in (PLAIN, COUNTING))
    return {
        "bytes_per_sum": round(numbers / shared, 1),
        "bytes_per_sum_with_texts": round(sum(files.values()) / shared, 1),
        "sums_per_user": round(sum(name.startswith("user_id") for name in names) / num_users),
        "bytes_per_user": round((counting - plain) / num_users),
    }


def table_of(results: dict[str, Any]) -> str:
    columns = (PLAIN, COUNTING, "difference")
    rows = [[number, *(f"{cell[name]:.2f}" for name in columns)] for number, cell in results["requests"].items()]
    return markdown(["candidates", *(f"{name}, ms" for name in columns)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 100, 500])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--users", type=int, default=5_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    report = header("what counters cost a request", settings_of(arguments), ("numpy", "pyarrow"))
    table = drawn_sums(arguments.users)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rankers = {way: version(folder / way, way, table, arguments.users) for way in (PLAIN, COUNTING)}
        results = {"sizes": sizes(folder, table, arguments.users), "requests": measured(rankers, arguments)}
    report |= {"results": results}
    record(report, table_of(results), arguments.output, document="serving.md", place=RESULTS)


if __name__ == "__main__":
    main()
