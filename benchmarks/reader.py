"""How fast are shuffled, checked batches beside a bare Parquet decode of the same columns, and beside Ray Data?

    python benchmarks/reader.py [--rows 1000000] [--repeats 5] [--threads 2] [--ray]

    MIMALLOC_PURGE_DELAY=-1 python benchmarks/reader.py ...      Arrow keeps freed pages (see docs/operations.md)

Writes a samples table (20 categorical features, two histories of 0-50 events, four labels) into a temporary folder,
then reads it whole in each way, in turn, and reports the median of the rates in benchmarks/results/reader.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import deltalake
import numpy as np
import pyarrow as pa
import torch
from deltalake import DeltaTable, WriterProperties, write_deltalake

from usr_ray.manifest import Manifest, build_manifest
from usr_ray.order_quality import shuffle_quality
from usr_ray.reader import SampleReader
from usr_ray.reader_decode import RowGroupDecoder
from usr_ray.schema import ALL_LABELS, FEATURE_SPEC_PROPERTY, SAMPLES, DenseFeature, FeatureSpec, SparseFeature
from usr_ray.trainer_environment import LOOPBACK, prepare_environment

RESULTS = Path(__file__).parent / "results" / "reader.json"
ROW_GROUP_ROWS = 65_536
NUM_DAYS = 4
FIRST_DAY = dt.date(2026, 1, 1)
BATCH_ROWS, GROUP_ROWS = 8192, 128


def benchmark_spec() -> FeatureSpec:
    names = ["user_id", "item_id", "query", "event_hour", *(f"category_{n}" for n in range(16))]
    owners = {"user_id": "user", "item_id": "item", "query": "query"}
    return FeatureSpec(
        scenarios=("search", "recommendation"),
        query_scenarios=("search",),
        sparse=tuple(
            SparseFeature(name=n, column=f"{n}_index", num_embeddings=500_000, owner=owners.get(n, "context"))
            for n in names
        ),
        dense=tuple(DenseFeature(name=f"number_{n}", column=f"number_{n}_scaled", owner="item") for n in range(4)),
        history_length=50,
        label_delay_us=0,
    )


def write_table(lake: Path, spec: FeatureSpec, num_rows: int) -> None:
    rng = np.random.default_rng(0)
    per_day = num_rows // NUM_DAYS
    for day in range(NUM_DAYS):
        date = FIRST_DAY + dt.timedelta(days=day)
        start_us = (date - dt.date(1970, 1, 1)).days * 86_400_000_000
        ranks = [rng.random(per_day) < 0.3**n for n in range(1, 5)]
        click_global, click = ranks[0], ranks[0] & ranks[1]
        order_global = click_global & ranks[2]
        labels = dict(zip(ALL_LABELS, (click, click & order_global, click_global, order_global), strict=True))
        columns = {name: values.astype(np.float32) for name, values in labels.items()}
        columns |= {
            "impression_date": pa.array([date] * per_day, pa.date32()),
            "event_time": pa.array(start_us + rng.integers(0, 86_400_000_000, per_day), pa.timestamp("us", tz="UTC")),
            "is_mature": np.ones(per_day, dtype=bool),
            "scenario_index": rng.integers(0, 2, per_day),
            "user_key": rng.integers(0, 1 << 62, per_day),
            "request_key": rng.integers(0, 1 << 62, per_day),
        }
        # Popularity falls as a power of the rank, so that dictionaries are as full as on real logs.
        columns |= {f.column: (rng.random(per_day) ** 4 * 499_999).astype(np.int64) for f in spec.sparse}
        columns |= {f.column: rng.standard_normal(per_day).astype(np.float32) for f in spec.dense}
        for history in spec.histories:
            offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 51, per_day))]).astype(np.int32)
            events = int(offsets[-1])
            lists = {history.item_ids: (rng.random(events) ** 4 * 499_999).astype(np.int64)}
            lists |= {history.actions: rng.integers(1, 3, events)}
            lists |= {history.ages_s: (rng.integers(1, 600_000, events) / 2).astype(np.float32)}
            if history.query_ids:
                lists[history.query_ids] = (rng.random(events) ** 4 * 499_999).astype(np.int64)
            columns |= {name: pa.ListArray.from_arrays(pa.array(offsets), pa.array(v)) for name, v in lists.items()}
        writer = WriterProperties(max_row_group_size=ROW_GROUP_ROWS)
        write_deltalake(
            lake / SAMPLES, pa.table(columns), partition_by=["impression_date"], mode="append", writer_properties=writer
        )
    DeltaTable(lake / SAMPLES).alter.set_table_properties(
        {FEATURE_SPEC_PROPERTY: spec.to_json()}, raise_if_not_exists=False
    )


def decode_only(manifest: Manifest, num_threads: int) -> int:
    """Bare pyarrow: every row group decoded to Arrow by a pool of threads, nothing kept, nothing checked."""
    decoder = RowGroupDecoder(manifest, ready_before_us=None, mature_only=True)
    with ThreadPoolExecutor(num_threads) as pool:
        return sum(table.num_rows for table in pool.map(decoder.read, manifest.row_groups()))


def decode_to_tensors(manifest: Manifest, num_threads: int) -> int:
    """As `decode_only`, and the columns of each row group as checked tensors: all but the shuffle and the batches."""
    decoder = RowGroupDecoder(manifest, ready_before_us=None, mature_only=True)
    with ThreadPoolExecutor(num_threads) as pool:
        return sum(pool.map(lambda ref: len(decoder.decode(ref)), manifest.row_groups()))


def read_batches(manifest: Manifest, num_threads: int, **options: object) -> int:
    """An epoch of one rank, the batches thrown away."""
    num_rows = 0
    with SampleReader(
        manifest,
        global_batch_size=BATCH_ROWS,
        group_size=GROUP_ROWS,
        num_threads=num_threads,
        **options,  # type: ignore[arg-type]
    ) as reader:
        for batch in reader.batches(epoch=1):
            num_rows += len(batch)
    return num_rows


def ray_data_batches(manifest: Manifest, batch_format: str) -> int:
    """Ray Data over the same files and columns; no shuffle, no tensors of the histories."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            log_to_driver=False,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
    columns = RowGroupDecoder(manifest, ready_before_us=None, mature_only=True).columns
    files = [f"{manifest.table_uri}/{file.path}" for file in manifest.files]
    dataset = ray.data.read_parquet(files, columns=columns, partitioning=None)
    return sum(
        len(batch["user_key"]) for batch in dataset.iter_batches(batch_size=BATCH_ROWS, batch_format=batch_format)
    )


def contestants(manifest: Manifest, num_threads: int, with_ray: bool, cache_dir: Path) -> dict[str, Callable[[], int]]:
    ways: dict[str, Callable[[], int]] = {
        "pyarrow decode": lambda: decode_only(manifest, num_threads),
        "pyarrow decode to tensors": lambda: decode_to_tensors(manifest, num_threads),
        "reader, shuffled": lambda: read_batches(manifest, num_threads),
        "reader, file order": lambda: read_batches(manifest, num_threads, order="file"),
        "reader, shuffled, from the cache": lambda: read_batches(manifest, num_threads, cache_dir=cache_dir),
        "reader, rank 0 of 4": lambda: 4 * read_batches(manifest, num_threads, rank=0, world_size=4),
        "reader, rank 0 of 4, 4 shards": lambda: (
            4 * read_batches(manifest, num_threads, rank=0, world_size=4, num_shards=4)
        ),
    }
    if with_ray:
        ways["ray data, arrow batches, no shuffle"] = lambda: ray_data_batches(manifest, "pyarrow")
        ways["ray data, numpy batches, no shuffle"] = lambda: ray_data_batches(manifest, "numpy")
    return ways


def quality_of_shuffle(manifest: Manifest) -> dict[str, float]:
    """How far an epoch's order moves the rows, by what it hands out."""
    with SampleReader(manifest, global_batch_size=BATCH_ROWS, group_size=GROUP_ROWS) as reader:
        numbers = torch.cat([batch.row_number_B for batch in reader.batches(epoch=1)])
    return asdict(shuffle_quality(numbers[numbers >= 0].numpy()))


@dataclass(frozen=True)
class Timing:
    """One reading of the table."""

    rows_per_second: float
    cpu_seconds_per_million_rows: float
    """Of this process alone, all threads (Ray Data decodes in others); less shaken by neighbours than the clock is."""


def measure(ways: dict[str, Callable[[], int]], num_rows: int, repeats: int) -> dict[str, list[Timing]]:
    """Timings of every way, the ways taking turns so that a busy moment of the machine meets them all."""
    timings: dict[str, list[Timing]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # warm: page cache, imports, allocator
    for _ in range(repeats):
        for name, way in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            read = way()
            wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
            assert read >= num_rows, f"{name} read {read} of {num_rows} rows"
            timings[name].append(Timing(num_rows / wall_s, cpu_s / num_rows * 1e6))
    return timings


def summary(timings: dict[str, list[Timing]]) -> dict[str, dict[str, object]]:
    rates = {name: [t.rows_per_second for t in found] for name, found in timings.items()}
    bare, tensors = (statistics.median(rates[name]) for name in ("pyarrow decode", "pyarrow decode to tensors"))
    return {
        name: {
            "rows_per_second": round(statistics.median(rates[name])),
            "rows_per_second_min_max": [round(min(rates[name])), round(max(rates[name]))],
            "ratio_to_pyarrow_decode": round(statistics.median(rates[name]) / bare, 3),
            "ratio_to_pyarrow_decode_to_tensors": round(statistics.median(rates[name]) / tensors, 3),
            "cpu_seconds_per_million_rows": round(
                statistics.median(t.cpu_seconds_per_million_rows for t in timings[name]), 2
            ),
        }
        for name in timings
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ray", action="store_true", help="also measure Ray Data (starts a local Ray)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.ray:
        prepare_environment(dashboard=False)
    num_rows = arguments.rows // NUM_DAYS * NUM_DAYS
    with tempfile.TemporaryDirectory() as folder:
        lake = Path(folder)
        write_table(lake, benchmark_spec(), num_rows)
        manifest = build_manifest(lake, dates=(FIRST_DAY, FIRST_DAY + dt.timedelta(days=NUM_DAYS - 1)))
        ways = contestants(manifest, arguments.threads, arguments.ray, lake / "cache")
        quality = quality_of_shuffle(manifest)
        timings = measure(ways, num_rows, arguments.repeats)
    versions = {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__}
    versions |= {"torch": torch.__version__, "deltalake": deltalake.__version__}
    result = {
        "question": "rows per second of one rank over a whole table in the page cache",
        "date": dt.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "load_average": os.getloadavg(),
        "versions": versions,
        "settings": {
            "rows": num_rows,
            "repeats": arguments.repeats,
            "threads": arguments.threads,
            "batch_rows": BATCH_ROWS,
            "row_group_rows": ROW_GROUP_ROWS,
            "MIMALLOC_PURGE_DELAY": os.environ.get("MIMALLOC_PURGE_DELAY"),
        },
        "shuffle_quality": {name: round(value, 4) for name, value in quality.items()},
        "results": summary(timings),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
