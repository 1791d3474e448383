"""Sources: each turns one data set into logs (docs/own-logs.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from etl.sources.jdsearch import write_jdsearch
from etl.sources.kuairand import write_kuairand
from etl.sources.kuaisar import write_kuaisar
from etl.sources.kuaisearch import write_kuaisearch
from etl.sources.simulated import write_simulated
from etl.sources.writer import LogWriter
from usr_ray.config import Config, UserError

Source = Callable[[Path, LogWriter, Config], None]
"""Reads a data set's files in a folder and appends all of its logs; UserError when a file or a column is missing."""
SIMULATED = "simulated"
"""The source that reads no files."""
SOURCES: dict[str, Source] = {
    SIMULATED: write_simulated,
    "kuairand": write_kuairand,
    "kuaisearch": write_kuaisearch,
    "kuaisar": write_kuaisar,
    "jdsearch": write_jdsearch,
}


def find_source(name: str) -> Source:
    """The source called `name`; UserError with the valid names otherwise."""
    if name not in SOURCES:
        raise UserError(f"--source {name!r} is not known; choose from: {', '.join(SOURCES)}")
    return SOURCES[name]
