"""How fast are shuffled, checked batches beside a bare Parquet decode of the same columns, and beside Ray Data?

    python benchmarks/reader.py [--rows 1000000] [--repeats 5] [--threads 2] [--ray]

    MIMALLOC_PURGE_DELAY=-1 python benchmarks/reader.py ...      # Arrow keeps freed pages (see docs/operations.md)

Writes a samples table (20 categorical features, two histories of 0-50 events, four labels) into a temporary folder,
then reads it whole in each way, in turn. Writes benchmarks/results/reader.json and the table in docs/speed.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import torch
from deltalake import DeltaTable, WriterProperties, write_deltalake
from numpy.typing import NDArray

from benchmarks.doc_tables import markdown
from benchmarks.interleaved import header, interval, publish, ratio, spread, verdict
from benchmarks.step_cases import spec_of
from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.data.mature import WhichRows
from usr_ray.data.order import BLOCK_ROWS, shuffle_quality
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.launch.environment import LOOPBACK, prepare_environment
from usr_ray.schema import ALL_LABELS, FEATURE_SPEC_PROPERTY, SAMPLES, FeatureSpec

RESULTS = Path(__file__).parent / "results" / "reader.json"
ROW_GROUP_ROWS = 65_536
NUM_DAYS = 4
Compression = Literal["ZSTD", "SNAPPY", "UNCOMPRESSED"]
COMPRESSION: Compression = "ZSTD"
"""Of the samples table as the ETL writes it."""
FIRST_DAY = dt.date(2026, 1, 1)
DATES = (FIRST_DAY, FIRST_DAY + dt.timedelta(days=NUM_DAYS - 1))
BATCH_ROWS, GROUP_ROWS = 8192, 128
BARE, TO_TENSORS, SHUFFLED = "pyarrow decode", "pyarrow decode to tensors", "reader, shuffled"
FIRST_EPOCH, CACHED = "reader, shuffled, writing the cache", "reader, shuffled, from the cache"
RAY, RAY_SHUFFLED = "ray data, numpy batches, no shuffle", "ray data, numpy batches, local shuffle"
AIMS = (
    (SHUFFLED, BARE, 0.7),
    (SHUFFLED, TO_TENSORS, 0.7),
    (SHUFFLED, RAY, 2.0),
    (SHUFFLED, RAY_SHUFFLED, 3.0),
    (CACHED, FIRST_EPOCH, 3.0),
)
"""A way, the way it is compared with, and how many times its rate is aimed at."""


def benchmark_spec(num_embeddings: int = 500_000) -> FeatureSpec:
    names = ["user_id", "item_id", "query", "event_hour", *(f"category_{n}" for n in range(16))]
    owners = {"user_id": "user", "item_id": "item", "query": "query"}
    sizes = {name: (num_embeddings, owners.get(name, "context")) for name in names}
    return spec_of(sizes, [f"number_{n}" for n in range(4)])


def skewed_ids(rng: np.random.Generator, count: int, limit: int) -> NDArray[np.int64]:
    """Ids below `limit` whose popularity falls as a power of the rank, as on real logs (full dictionaries)."""
    return (rng.random(count) ** 4 * (limit - 1)).astype(np.int64)


def write_table(
    lake: Path, spec: FeatureSpec, num_rows: int, *, longest: int = 50, compression: Compression = COMPRESSION
) -> None:
    rng = np.random.default_rng(0)
    per_day = num_rows // NUM_DAYS
    for day in range(NUM_DAYS):
        date = FIRST_DAY + dt.timedelta(days=day)
        start_us = (date - dt.date(1970, 1, 1)).days * 86_400_000_000
        ranks = [rng.random(per_day) < 0.3**n for n in range(1, 5)]
        click_global, click = ranks[0], ranks[0] & ranks[1]
        order_global = click_global & ranks[2]
        labels = dict(zip(ALL_LABELS, (click, click & order_global, click_global, order_global), strict=True))
        columns: dict[str, Any] = {name: values.astype(np.float32) for name, values in labels.items()}
        columns |= {
            "impression_date": pa.array([date] * per_day, pa.date32()),
            "event_time": pa.array(start_us + rng.integers(0, 86_400_000_000, per_day), pa.timestamp("us", tz="UTC")),
            "is_mature": np.ones(per_day, dtype=bool),
            "scenario_index": rng.integers(0, 2, per_day),
            "user_key": rng.integers(0, 1 << 62, per_day),
            "request_key": rng.integers(0, 1 << 62, per_day),
        }
        columns |= {f.column: skewed_ids(rng, per_day, f.num_embeddings) for f in spec.sparse}
        columns |= {f.column: rng.standard_normal(per_day).astype(np.float32) for f in spec.dense}
        for history in spec.histories:
            offsets = np.concatenate([[0], np.cumsum(rng.integers(0, longest + 1, per_day))]).astype(np.int32)
            events = int(offsets[-1])
            lists = {history.item_ids: skewed_ids(rng, events, spec.sparse_feature("item_id").num_embeddings)}
            lists |= {history.actions: rng.integers(1, 3, events)}
            lists |= {history.ages_s: (rng.integers(1, 600_000, events) / 2).astype(np.float32)}
            if history.query_ids:
                lists[history.query_ids] = skewed_ids(rng, events, spec.sparse_feature("query").num_embeddings)
            columns |= {name: pa.ListArray.from_arrays(pa.array(offsets), pa.array(v)) for name, v in lists.items()}
        writer = WriterProperties(max_row_group_size=ROW_GROUP_ROWS, compression=compression)
        write_deltalake(
            lake / SAMPLES, pa.table(columns), partition_by=["impression_date"], mode="append", writer_properties=writer
        )
    DeltaTable(lake / SAMPLES).alter.set_table_properties(
        {FEATURE_SPEC_PROPERTY: spec.to_json()}, raise_if_not_exists=False
    )


def decode_only(manifest: Manifest, num_threads: int) -> int:
    """Bare pyarrow: every row group decoded to Arrow by a pool of threads, nothing kept, nothing checked."""
    decoder = RowGroupDecoder(manifest, WhichRows())
    with ThreadPoolExecutor(num_threads) as pool:
        return sum(table.num_rows for table in pool.map(decoder.read, manifest.row_groups()))


def decode_to_tensors(manifest: Manifest, num_threads: int) -> int:
    """As `decode_only`, and the columns of each row group as checked tensors: all but the shuffle and the batches."""
    decoder = RowGroupDecoder(manifest, WhichRows())
    with ThreadPoolExecutor(num_threads) as pool:
        return sum(pool.map(lambda ref: len(decoder.decode(ref)), manifest.row_groups()))


def read_batches(manifest: Manifest, num_threads: int, **options: object) -> int:
    """An epoch of one rank, the batches thrown away."""
    num_rows = 0
    reading = Reading(
        global_batch_size=BATCH_ROWS,
        group_size=GROUP_ROWS,
        num_threads=num_threads,
        **options,  # type: ignore[arg-type]
    )
    with SampleReader(manifest, reading) as reader:
        for batch in reader.batches(epoch=1):
            num_rows += len(batch)
    return num_rows


def ray_data_batches(manifest: Manifest, batch_format: str, shuffle_rows: int | None = None) -> int:
    """Ray Data over the same files and columns, with or without its local shuffle; no tensors of the histories."""
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
    columns = RowGroupDecoder(manifest, WhichRows()).columns
    files = [f"{manifest.table_uri}/{file.path}" for file in manifest.files]
    dataset = ray.data.read_parquet(files, columns=columns, partitioning=None)
    batches = dataset.iter_batches(
        batch_size=BATCH_ROWS, batch_format=batch_format, local_shuffle_buffer_size=shuffle_rows
    )
    return sum(len(batch["user_key"]) for batch in batches)


def fill_cache(manifest: Manifest, num_threads: int, cache_dir: Path) -> int:
    """A first epoch, which writes the cache."""
    shutil.rmtree(cache_dir, ignore_errors=True)
    return read_batches(manifest, num_threads, cache_dir=cache_dir)


def contestants(manifest: Manifest, num_threads: int, with_ray: bool, cache_dir: Path) -> dict[str, Callable[[], int]]:
    ways: dict[str, Callable[[], int]] = {
        BARE: lambda: decode_only(manifest, num_threads),
        TO_TENSORS: lambda: decode_to_tensors(manifest, num_threads),
        SHUFFLED: lambda: read_batches(manifest, num_threads),
        "reader, file order": lambda: read_batches(manifest, num_threads, order="file"),
        FIRST_EPOCH: lambda: fill_cache(manifest, num_threads, cache_dir),
        CACHED: lambda: read_batches(manifest, num_threads, cache_dir=cache_dir),
        "reader, rank 0 of 4": lambda: 4 * read_batches(manifest, num_threads, rank=0, world_size=4),
        "reader, rank 0 of 4, 4 shards": lambda: (
            4 * read_batches(manifest, num_threads, rank=0, world_size=4, num_shards=4)
        ),
    }
    if with_ray:
        ways["ray data, arrow batches, no shuffle"] = lambda: ray_data_batches(manifest, "pyarrow")
        ways[RAY] = lambda: ray_data_batches(manifest, "numpy")
        # As many rows as a block of ours at least: its shuffle is then as wide as ours.
        ways[RAY_SHUFFLED] = lambda: ray_data_batches(manifest, "numpy", BLOCK_ROWS)
    return ways


def quality_of_shuffle(manifest: Manifest) -> dict[str, float]:
    """How far an epoch's order moves the rows, by what it hands out."""
    with SampleReader(manifest, Reading(global_batch_size=BATCH_ROWS, group_size=GROUP_ROWS)) as reader:
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
    for number in range(1 + repeats):  # once for page cache, imports, allocator
        for name, way in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            read = way()
            wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
            assert read >= num_rows, f"{name} read {read} of {num_rows} rows"
            if number:
                timings[name].append(Timing(num_rows / wall_s, cpu_s / num_rows * 1e6))
    return timings


def summary(timings: dict[str, list[Timing]]) -> dict[str, Any]:
    """By way: rows a second, processor seconds, ratio to a decode to tensors; and the ratios that are aimed at."""
    rates = {name: [t.rows_per_second for t in found] for name, found in timings.items()}
    ways = {
        name: {
            "rows_per_second": interval(rates[name]),
            "ratio_to_pyarrow_decode_to_tensors": ratio(rates[name], rates[TO_TENSORS]),
            "cpu_seconds_per_million_rows": round(
                statistics.median(t.cpu_seconds_per_million_rows for t in timings[name]), 2
            ),
        }
        for name in timings
    }
    aims = [
        {"way": way, "beside": other, "aim": aim, "ratio": ratio(rates[way], rates[other])}
        for way, other, aim in AIMS
        if other in rates
    ]
    return {"ways": ways, "aims": aims}


def table(report: Mapping[str, Any]) -> str:
    """Rates of all ways, then the aims."""
    rows = [
        [
            name,
            spread(way["rows_per_second"], 0),
            spread(way["ratio_to_pyarrow_decode_to_tensors"]) + "x",
            f"{way['cpu_seconds_per_million_rows']:.2f}",
        ]
        for name, way in report["results"]["ways"].items()
    ]
    aims = [
        [f"{a['way']} / {a['beside']}", spread(a["ratio"]) + "x", verdict(a["ratio"]["median"], at_least=a["aim"])]
        for a in report["results"]["aims"]
    ]
    head = ["way", "rows/s", "times decode to tensors", "processor s a million rows"]
    return markdown(head, rows) + "\n\n" + markdown(["rates compared", "ratio", "aim"], aims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compression", choices=get_args(Compression), default=COMPRESSION, help="of the Parquet files"
    )
    parser.add_argument("--ray", action="store_true", help="also measure Ray Data (starts a local Ray)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.ray:
        prepare_environment(dashboard=False)
    num_rows = arguments.rows // NUM_DAYS * NUM_DAYS
    with tempfile.TemporaryDirectory() as folder:
        lake = Path(folder)
        write_table(lake, benchmark_spec(), num_rows, compression=arguments.compression)
        manifest = build_manifest(lake, dates=DATES)
        ways = contestants(manifest, arguments.threads, arguments.ray, lake / "cache")
        quality = quality_of_shuffle(manifest)
        timings = measure(ways, num_rows, arguments.repeats)
    settings = {
        "rows": num_rows,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "batch_rows": BATCH_ROWS,
        "row_group_rows": ROW_GROUP_ROWS,
        "compression": arguments.compression,
        "MIMALLOC_PURGE_DELAY": os.environ.get("MIMALLOC_PURGE_DELAY"),
    }
    packages = ("pyarrow", "numpy", "torch", "deltalake", "ray")
    report = header("rows per second of one rank over a whole table in the page cache", settings, packages)
    report |= {"shuffle_quality": {name: round(value, 4) for name, value in quality.items()}}
    publish(report, summary(timings), table, output=arguments.output, place=RESULTS)


if __name__ == "__main__":
    main()
