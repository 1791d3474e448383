"""How much memory do the embedding tables take? The formulae of docs/embeddings.md as its table; nothing is measured.

python benchmarks/table_memory.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.doc_tables import markdown, put_table

ROWS, DIMS, WORKERS = (10_000_000, 100_000_000, 1_000_000_000), (16, 32, 64), (2, 8)


def bytes_per_row(dim: int, optimizer: str) -> int:
    """Weights and state of one row."""
    return {"rowwise_adagrad": 4 * dim + 4, "rowwise_adam": 8 * dim + 8}[optimizer]


def table() -> str:
    rows = []
    for num_rows in ROWS:
        for dim in DIMS:
            adagrad, adam = (num_rows * bytes_per_row(dim, o) / 1e9 for o in ("rowwise_adagrad", "rowwise_adam"))
            cells = [f"{adagrad:.1f}", f"{adam:.1f}", *(f"{adagrad / w:.1f}" for w in WORKERS)]
            rows.append([f"{num_rows:,} x {dim}", *cells])
    header = ["rows x d", "replicated, Adagrad", "replicated, Adam", *(f"sharded, W = {w}" for w in WORKERS)]
    return markdown(header, rows)


if __name__ == "__main__":
    print(table())
    put_table("embeddings.md", "memory", table())
