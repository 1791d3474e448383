"""Sources: each turns one data set into the logs of the contract (section 1)."""

from __future__ import annotations

from etl.sources.jdsearch import JdSearchSource
from etl.sources.kuairand import KuaiRandSource
from etl.sources.kuaisar import KuaiSarSource
from etl.sources.kuaisearch import KuaiSearchSource
from etl.sources.simulated import SimulatedSource
from etl.sources.writer import LogWriter, Source
from usr_ray.config import UserError

__all__ = ["SOURCES", "LogWriter", "Source", "find_source"]

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (SimulatedSource(), KuaiRandSource(), KuaiSearchSource(), KuaiSarSource(), JdSearchSource())
}


def find_source(name: str) -> Source:
    """The source called `name`; UserError with the valid names otherwise."""
    if name not in SOURCES:
        raise UserError(f"--source {name!r} is not known; choose from: {', '.join(SOURCES)}")
    return SOURCES[name]
