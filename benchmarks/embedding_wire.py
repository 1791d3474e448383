"""How many bytes does a step of the embedding tables move, and how long does it take, replicated and sharded?

    python benchmarks/embedding_wire.py [--ids 20000 80000] [--dim 32] [--workers 2 4] [--rows 1000000] [--steps 10]

Gloo workers on this machine, each with ids drawn alike from one table, look their rows up, get random gradients and
take a step of row-wise Adagrad: the work of the tables alone, no model. Bytes are those of the loopback interface
(/proc/net/dev, Linux only), so nothing else should talk on it; they are compared with the formulae of
docs/embeddings.md. Times on more workers than processors, or on a busy machine, say
nothing and are left out. Writes
benchmarks/results/embedding_wire.json and the table in docs/embeddings.md.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.doc_tables import markdown, record
from benchmarks.interleaved import header
from usr_ray.config import Config
from usr_ray.model.unique import TableIds
from usr_ray.schema import FeatureSpec, SparseFeature
from usr_ray.training.state import build_embeddings
from usr_ray.training.worker import LocalWorker

RESULTS = Path(__file__).parent / "results" / "embedding_wire.json"
STRATEGIES = ("replicated", "sharded")
WARM = 2


def spec_of(num_rows: int) -> FeatureSpec:
    table = SparseFeature(name="item_id", column="item_id_index", num_embeddings=num_rows, owner="item")
    return FeatureSpec(
        scenarios=("feed",), query_scenarios=(), sparse=(table,), dense=(), history_length=1, label_delay_us=0
    )


def loopback_bytes() -> int:
    """Received on the loopback interface since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise SystemExit("no loopback interface in /proc/net/dev")


def formula(strategy: str, num_ids: int, dim: int, num_workers: int) -> float:
    """Bytes that one worker receives in a step (docs/embeddings.md)."""
    if strategy == "replicated":
        return (num_workers - 1) * num_ids * (8 + 4 * dim)
    return (num_workers - 1) / num_workers * num_ids * (8 + 8 * dim)


def measure_rank(rank: int, num_workers: int, port: int, arguments: argparse.Namespace, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=num_workers)
    worker = LocalWorker("cpu")
    results = []
    for strategy in STRATEGIES:
        config = Config.from_dict(
            {"model": {"embedding_dim": arguments.dim}, "train": {"embedding_strategy": strategy}}
        )
        embeddings = build_embeddings(spec_of(arguments.rows), config, worker)
        memory = embeddings.memory()
        for num_ids in arguments.ids:
            times = []
            for step in range(WARM + arguments.steps):
                generator = torch.Generator().manual_seed(step * num_workers + rank)
                ids_U = torch.randperm(arguments.rows - 1, generator=generator)[:num_ids].sort().values + 1
                ids = TableIds(torch.cat([ids_U.new_zeros(1), ids_U]), ids_U[:0], None)
                grads_UD = torch.randn(num_ids + 1, arguments.dim, generator=generator)
                worker.any_true(False)
                if step == WARM:
                    before = loopback_bytes()
                    worker.any_true(False)
                start = time.perf_counter()
                lookup = embeddings.lookup(None, (ids,))  # type: ignore[arg-type]  # the ids are all it needs
                lookup.tables["item_id"].rows_UD.grad = grads_UD
                embeddings.apply_gradients(lookup)
                times.append(time.perf_counter() - start)
            worker.any_true(False)
            received = (loopback_bytes() - before) / num_workers / arguments.steps
            num_processors = os.cpu_count() or 1
            has_time = num_workers <= num_processors and os.getloadavg()[0] <= num_processors + 1
            results.append(
                {
                    "strategy": strategy,
                    "workers": num_workers,
                    "ids": num_ids,
                    "formula_bytes": round(formula(strategy, num_ids, arguments.dim, num_workers)),
                    "received_bytes": round(received),
                    "step_ms": round(statistics.median(times[WARM:]) * 1e3, 1) if has_time else None,
                    "memory_bytes": memory.weight_bytes + memory.optimizer_bytes,
                }
            )
    if rank == 0:
        queue.put(results)
    dist.destroy_process_group()


def measure(num_workers: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measure_rank, args=(num_workers, port, arguments, queue), nprocs=num_workers)
    return queue.get()


def table(report: dict) -> str:
    rows = []
    for r in sorted(report["results"], key=lambda r: (r["workers"], r["ids"], r["strategy"])):
        rows.append(
            [
                f"{r['workers']} workers, {r['ids']:,} ids, {r['strategy']}",
                f"{r['formula_bytes'] / 1e6:.2f}",
                f"{r['received_bytes'] / 1e6:.2f}",
                "" if r["step_ms"] is None else f"{r['step_ms']:.0f}",
                f"{r['memory_bytes'] / 1e6:.0f}",
            ]
        )
    return markdown(["a step of one worker", "MB by formula", "MB measured", "ms", "MB held"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, nargs="+", default=[20_000, 80_000], help="different ids of each worker")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the table")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = [entry for num_workers in arguments.workers for entry in measure(num_workers, arguments)]
    settings = {
        "rows": arguments.rows,
        "embedding_dim": arguments.dim,
        "steps": arguments.steps,
        "backend": "gloo",
        "threads": 1,
    }
    question = "bytes that a worker receives in a step of the embedding tables, and the time of it"
    report = header(question, settings, ("torch", "torchrec")) | {"results": results}
    record(report, table(report), arguments.output, document="embeddings.md", place=RESULTS)


if __name__ == "__main__":
    main()
