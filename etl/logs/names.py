"""Names of logs in a folder: known without Spark, so that a log that is missing is refused before a JVM starts."""

from __future__ import annotations

import os
from collections.abc import Collection

from etl.checks import DataCheckError
from usr_ray.config import Config

_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
_PACKED = (".gz", ".zst", ".bz2", ".snappy", ".lz4")


def format_of(name: str) -> str | None:
    """Format of a file by its name, packed or not; None: no known one."""
    name = name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)


def entry_of(log: str, root: str, entries: Collection[str]) -> str | None:
    """The folder or file of a log among what `root` holds; None where it has none. DataCheckError where it has two."""
    names = [n for n in entries if n == log or (n.startswith(f"{log}.") and format_of(n))]
    if len(names) > 1:
        raise DataCheckError(f"log {log}: {root} has {' and '.join(sorted(names))}; keep one of them")
    return names[0] if names else None


def missing(log: str, root: str, entries: Collection[str]) -> DataCheckError:
    """The error of a log that is not there."""
    there = ", ".join(sorted(entries)) or "nothing"
    return DataCheckError(f"log {log}: is missing in {root}, which holds: {there}; add a folder or file {log}")


def has_table(config: Config, owner: str) -> bool:
    """Whether a build reads the table of "user" or "item": the configuration names a feature of theirs."""
    features = config.features
    numbers = {"user": features.user_numbers, "item": features.item_numbers}[owner]
    keys = [feature.key for feature in features.lists] + [feature.key for feature in features.vectors]
    return bool(features.categories_of(owner) or numbers) or f"{owner}_id" in keys


def check_logs_there(config: Config, root: str) -> None:
    """DataCheckError where a local folder lacks a log that a build needs; addresses and mapped logs are not looked at.

    A build itself looks again, at all that it reads.
    """
    if "://" in root:
        return
    entries = os.listdir(root)

    def has(log: str) -> bool:
        return log in config.logs or entry_of(log, root, entries) is not None

    logs = [f"{scenario}_{kind}" for scenario in config.scenarios for kind in ("impressions", "clicks")]
    orders = [f"{scenario}_orders" for scenario in config.scenarios]
    if len(config.labels.no_order_scenarios) < len(config.scenarios) and not any(map(has, orders)):
        logs.append("orders")
    logs += [f"{owner}s" for owner in ("user", "item") if has_table(config, owner)]
    for log in logs:
        if not has(log):
            raise missing(log, root, entries)
