"""Runs that take turns, so that a busy moment of the machine meets them all, and what is said of them.

A median has a distribution-free interval from the order statistics; a ratio of two ways is the median of the ratios of
the rounds, each of which had both ways side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import math
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.doc_tables import record

_COVERAGE = 0.95


def take_turns(ways: Mapping[str, Callable[[], float]], rounds: int, *, warm: int = 1) -> dict[str, list[float]]:
    """What each way returns in each round; the first `warm` rounds are not kept, and every other round goes backwards.

    Backwards, because the way that follows a heavy one finds a colder machine.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm + rounds):
        names = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in names:
            value = ways[name]()
            if number >= warm:
                found[name].append(value)
    return found


@contextlib.contextmanager
def own_process(make: Callable[..., Callable[[], float]], *arguments: Any) -> Iterator[Callable[[], float]]:
    """A way in a process of its own, where no other way's allocator, threads or settings reach it.

    Args:
        make: called there as make(stack, *arguments), with an ExitStack for what is to be closed; returns the way.
        arguments: as they can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, arguments))
    process.start()
    theirs.close()

    def way() -> float:
        try:
            ours.send("go")
            return float(ours.recv())
        except (EOFError, OSError):
            raise SystemExit(
                f"the process of {make.__name__}{arguments} has ended; what it printed stands above"
            ) from None

    try:
        yield way
    finally:
        ours.close()
        process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[[], float]], arguments: tuple[Any, ...]) -> None:
    with contextlib.ExitStack() as stack:
        way = make(stack, *arguments)
        while True:
            try:
                pipe.recv()
            except EOFError:
                return
            pipe.send(way())


def interval(values: Sequence[float]) -> dict[str, float]:
    """Median, and the narrowest pair of order statistics round it that covers it with at least 95 %.

    With fewer than six values no pair does: then the smallest and the largest, as `coverage` says.
    """
    ordered, n = sorted(values), len(values)
    below = [sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n)]
    outside = max([k for k in range(n // 2) if 1 - 2 * below[k] >= _COVERAGE], default=0)
    return {
        "median": statistics.median(ordered),
        "low": ordered[outside],
        "high": ordered[n - 1 - outside],
        "coverage": round(1 - 2 * below[outside], 3) if n > 1 else 0.0,
    }


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """`interval` of the ratios of the rounds."""
    return interval([a / b for a, b in zip(of, to, strict=True)])


def spread(found: Mapping[str, float], digits: int = 2, unit: str = "") -> str:
    """Median and interval for a table: 1.20 (1.10-1.31)."""
    return f"{found['median']:,.{digits}f}{unit} ({found['low']:,.{digits}f}-{found['high']:,.{digits}f})"


def verdict(value: float, *, at_most: float | None = None, at_least: float | None = None) -> str:
    """'met' or 'missed', with the aim, for a table."""
    if at_most is not None:
        return f"<= {at_most:g}: {'met' if value <= at_most else 'missed'}"
    assert at_least is not None
    return f">= {at_least:g}: {'met' if value >= at_least else 'missed'}"


def header(question: str, settings: Mapping[str, Any], packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """First part of a report: question, date, machine, versions, settings."""
    return {
        "question": question,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "load_1_min": round(os.getloadavg()[0], 1),
        },
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "settings": dict(settings),
    }


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """A script's arguments, but where its result goes."""
    return {name: value for name, value in vars(arguments).items() if name != "output"}


def publish(
    report: dict[str, Any], results: Any, table: Callable[[dict[str, Any]], str], *, output: Path, place: Path
) -> None:
    """Write a `header` with its results as JSON, print its table and put it into docs/speed.md (doc_tables.record)."""
    report |= {"results": results}
    record(report, table(report), output, document="speed.md", place=place)
