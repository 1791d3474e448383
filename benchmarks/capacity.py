"""How many machines a day needs, and what a billion samples cost: arithmetic on the rates of benchmarks/results.

    python benchmarks/capacity.py          # the tables of docs/operations.md, from the JSON that is there

Nothing is measured here. Rates are processor seconds of this project's own benchmarks, scaled in a straight line; what
no benchmark has measured (a GPU's rate, the different ids of your rows) is asked for, not assumed away.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.doc_tables import markdown, put_table

RESULTS = Path(__file__).resolve().parent / "results"
DAYS = (1e6, 1e7, 1e8, 1e9, 1e10)
ETL_HOURS, TRAIN_HOURS = 2, 4
CORES_A_MACHINE, USEFUL = 4, 0.7
"""Of the cores' time; the rest is stragglers, starts and lost machines (docs/scale.md)."""
EMBEDDING_DIM = 16
IDS_A_ROW = 10
WORKERS = 8


@dataclass(frozen=True)
class Rates:
    """Processor seconds a million rows, and bytes a row; each measured."""

    build_s: float
    train_s: float
    score_s: float
    shuffle_bytes: float
    table_bytes: float
    sources: Mapping[str, str]


def read_rates(results: Path = RESULTS) -> Rates:
    """The rates of the recorded benchmarks: the largest build, a step on the largest tables, the training model."""
    builds = json.loads((results / "build_samples.json").read_text())
    ours = max(
        (run for run in builds["runs"] if run["system"] == "ours" and not run["bot"]),
        key=lambda run: run["impressions"],
    )
    millions = ours["impressions"] / 1e6
    steps = json.loads((results / "table_size.json").read_text())
    step = next(r for r in steps["results"] if r["optimizer"] == "rowwise_adagrad" and r["ids"] == "spread")["sizes"][
        -1
    ]
    scores = json.loads((results / "score.json").read_text())
    size, batch = f"{step['rows']:,} rows", f"batches of {steps['settings']['batch_rows']:,}"
    return Rates(
        build_s=ours["cpu_s"] / millions,
        train_s=step["step_cpu_ms"] / 1e3 / steps["settings"]["batch_rows"] * 1e6,
        score_s=1e6 / scores["results"]["shared_bottom"]["training model"]["batch_rows_per_cpu_s"],
        shuffle_bytes=ours["spark"]["shuffle_write_bytes"] / ours["impressions"],
        table_bytes=ours["output_bytes"] / ours["impressions"],
        sources={
            "build_s": f"build_samples.json, {millions:g} M impressions",
            "train_s": f"table_size.json (USR around SharedBottom, tables of {size}, {batch})",
            "score_s": "score.json, shared_bottom, training model",
        },
    )


def machines(rows: float, seconds_a_million: float, hours: float) -> int:
    """Machines of four cores that do `rows` in `hours`."""
    return max(1, math.ceil(rows / 1e6 * seconds_a_million / 3600 / hours / CORES_A_MACHINE / USEFUL))


def wire_bytes_a_row(workers: int, ids_a_row: float, dim: int, *, sharded: bool) -> float:
    """Bytes that one worker receives for each row of the global batch, of `ids_a_row` new ids (docs/embeddings.md)."""
    ids = ids_a_row / workers  # of one worker, for a row of the global batch
    return (workers - 1) / workers * ids * (8 + 8 * dim) if sharded else (workers - 1) * ids * (8 + 4 * dim)


def capacity_table(rates: Rates) -> str:
    """A line for each size of a day."""
    machine = f"{CORES_A_MACHINE} cores"
    header = [
        "rows a day",
        f"Spark: machines of {machine}, done in {ETL_HOURS} h",
        "shuffled GB",
        "table GB",
        f"training on CPUs: workers of {machine}, one pass in {TRAIN_HOURS} h",
        f"on GPUs: samples/s of all together, one pass in {TRAIN_HOURS} h",
        f"wire, GB a worker and pass: replicated / sharded, {WORKERS} workers",
    ]
    lines = []
    for rows in DAYS:
        wire = [wire_bytes_a_row(WORKERS, IDS_A_ROW, EMBEDDING_DIM, sharded=s) * rows / 1e9 for s in (False, True)]
        lines.append(
            [
                f"{rows:,.0f}",
                f"{machines(rows, rates.build_s, ETL_HOURS):,}",
                f"{rates.shuffle_bytes * rows / 1e9:,.1f}",
                f"{rates.table_bytes * rows / 1e9:,.2f}",
                f"{machines(rows, rates.train_s, TRAIN_HOURS):,}",
                f"{rows / TRAIN_HOURS / 3600:,.0f}",
                f"{wire[0]:,.1f} / {wire[1]:,.1f}",
            ]
        )
    return markdown(header, lines)


def cost_table(rates: Rates) -> str:
    """Core-hours a billion samples, by part, and the formula of the price."""
    parts = {"build": rates.build_s, "train, one pass": rates.train_s, "score": rates.score_s}
    keys = {"build": "build_s", "train, one pass": "train_s", "score": "score_s"}
    rows = [
        [part, f"{seconds:.0f}", f"{seconds * 1000 / 3600:.0f}", rates.sources[keys[part]]]
        for part, seconds in parts.items()
    ]
    header = ["part", "processor seconds per million (measured)", "core-hours per billion (computed)", "where from"]
    total = sum(parts.values()) * 1000 / 3600
    return (
        markdown(header, rows) + f"\n\nA billion samples built, trained on once and scored: {total:.0f} core-hours, so "
        f"{total / USEFUL:.0f} p with the price p of a core-hour and {USEFUL:.0%} useful time. On a GPU: "
        "1e9 / (3600 r) GPU-hours a pass, with r samples/s that your GPU reaches (`usr_ray_samples_per_s`)."
    )


def main() -> None:
    """Write the two tables into docs/operations.md."""
    rates = read_rates()
    text: dict[str, Any] = {"capacity": capacity_table(rates), "cost": cost_table(rates)}
    for name, table in text.items():
        print(table, end="\n\n")
        put_table("operations.md", name, table)


if __name__ == "__main__":
    main()
