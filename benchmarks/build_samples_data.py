"""Logs for benchmarks/build_samples.py: the simulated shop at any size, with or without a bot.

Not a benchmark itself.
"""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.sources.writer import CLICKS, IMPRESSIONS, MARKER, text_column
from usr_ray.config import DAY_US, Config, parse_date
from usr_ray.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "jobs" / "configs" / "simulated.toml"
BOT_IMPRESSIONS, BOT_CLICKS = 900_000, 100_000
"""One user's events over all days: a crawler that clicks every ninth impression."""
IMPRESSIONS_A_USER, IMPRESSIONS_AN_ITEM, IMPRESSIONS_A_QUERY = 100, 200, 600
"""The shop grows with its logs: histories stay as long as they are at any size."""


def shop_of(num_impressions: int) -> tuple[str, ...]:
    """Overrides of the configuration for a shop with so many impressions."""
    return (
        f"simulated.num_impressions={num_impressions}",
        f"simulated.num_users={num_impressions // IMPRESSIONS_A_USER}",
        f"simulated.num_items={num_impressions // IMPRESSIONS_AN_ITEM}",
        f"simulated.num_queries={num_impressions // IMPRESSIONS_A_QUERY}",
    )


def make_logs(work: Path, num_impressions: int, *, bot: bool, config: Config, hot: bool = False) -> Path:
    """The folder with the logs; written on the first call, by the project's own ingest job."""
    logs = work / "logs" / str(num_impressions)
    if not (logs / MARKER).exists():
        overrides = [word for override in shop_of(num_impressions) for word in ("--set", override)]
        command = [sys.executable, "jobs/ingest_logs.py", "--source", "simulated", "--logs", str(logs), *overrides]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    if hot:
        return _with_hot_item(logs)
    return _with_bot(logs, config) if bot else logs


def _with_hot_item(logs: Path) -> Path:
    """The same rows under another name; every item of an even number is i0, which so has half of all rows."""
    folder = logs.with_name(f"{logs.name}-hot")
    for path in logs.glob("*/*.parquet"):
        target = folder / path.relative_to(logs)
        table = pq.read_table(path)
        if "item_id" in table.column_names and target.parent.name != "items":
            is_even = pc.match_substring_regex(table["item_id"], "[02468]$")
            place = table.column_names.index("item_id")
            table = table.set_column(place, "item_id", pc.if_else(is_even, "i0", table["item_id"]))
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, target, compression="zstd")
    write_whole(folder / MARKER, (logs / MARKER).read_text(encoding="utf-8"))
    return folder


def _with_bot(logs: Path, config: Config) -> Path:
    """The same files under another name, and one file more for each log of impressions and clicks."""
    folder = logs.with_name(f"{logs.name}-bot")
    if (folder / MARKER).exists():
        return folder
    for path in logs.glob("*/*.parquet"):
        target = folder / path.relative_to(logs)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.link(path, target)
    num_items = pq.read_metadata(next((logs / "items").glob("*.parquet"))).num_rows
    for log, table in bot_rows(config, num_items).items():
        pq.write_table(table, folder / log / "part-bot.parquet", compression="zstd")
    write_whole(folder / MARKER, (logs / MARKER).read_text(encoding="utf-8"))
    return folder


def bot_rows(config: Config, num_items: int) -> dict[str, pa.Table]:
    """The bot's rows of each log: evenly over all days, half in each scenario, clicks two seconds after."""
    rng = np.random.default_rng(config.simulated.seed)
    first = parse_date(config.simulated.first_date, where="simulated.first_date")
    start_us = (first - dt.date(1970, 1, 1)).days * DAY_US
    step_us = config.simulated.num_days * DAY_US // BOT_IMPRESSIONS
    number = np.arange(BOT_IMPRESSIONS)
    item = rng.integers(0, num_items, BOT_IMPRESSIONS)
    time = start_us + number * step_us
    clicked = number % (BOT_IMPRESSIONS // BOT_CLICKS) == 0
    tables = {}
    for scenario, name in enumerate(config.scenarios):
        # Visits of a hundred impressions in one scenario, then the other.
        shown = number[number // 100 % len(config.scenarios) == scenario]
        is_query = name in config.query_scenarios
        tables[f"{name}_impressions"] = pa.table(
            [
                text_column("b", shown),
                text_column("br", shown // 10),
                pa.repeat("bot", len(shown)),
                text_column("i", item[shown]),
                pa.array(time[shown]).cast(pa.timestamp("us", tz="UTC")),
                pa.array((shown % 10).astype(np.int32)),
                text_column("query ", shown % 24) if is_query else pa.nulls(len(shown), pa.string()),
            ],
            schema=IMPRESSIONS,
        )
        rows = shown[clicked[shown]]
        tables[f"{name}_clicks"] = pa.table(
            [
                text_column("bc", rows),
                text_column("b", rows),
                pa.repeat("bot", len(rows)),
                text_column("i", item[rows]),
                pa.array(time[rows] + 2_000_000).cast(pa.timestamp("us", tz="UTC")),
            ],
            schema=CLICKS,
        )
    return tables
