"""Every chosen fault, one after the other, and the table of what was expected and what was seen."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.chaos import faults_processes, faults_replicas, faults_serving, faults_storage, faults_table
from tests.chaos.bench import Bench, Fault
from tests.chaos.observe import Seen
from usr_ray.config import UserError
from usr_ray.files import write_whole
from usr_ray.training.state import package_versions

FAULTS: tuple[Fault, ...] = (
    *faults_processes.FAULTS,
    *faults_storage.FAULTS,
    *faults_table.FAULTS,
    *faults_serving.FAULTS,
    *faults_replicas.FAULTS,
)
GOOD, BAD, SKIPPED = "good", "bad", "skipped"
JSON_FILE, TABLE_FILE = "chaos.json", "chaos.md"


def choose(names: Sequence[str]) -> list[Fault]:
    """The faults called so, in the order of FAULTS; all of them for no names. UserError: there is no such fault."""
    known = [fault.name for fault in FAULTS]
    for name in names:
        if name not in known:
            raise UserError(f"--fault {name}: there is no such fault; there are: {', '.join(known)}")
    return [fault for fault in FAULTS if not names or fault.name in names]


def run_all(faults: Sequence[Fault], bench: Bench, *, heal: Callable[[], None] | None = None) -> list[dict[str, Any]]:
    """Run the faults and print what comes of each at once.

    Args:
        faults: of `choose`.
        bench: where.
        heal: brings back nodes that a fault took; called after each.

    Returns:
        A row a fault: name, what, expected, seen, seconds, longest_job_s, verdict, checks.
    """
    shutil.rmtree(bench.work / "cases", ignore_errors=True)  # of an earlier call: another version may have written them
    rows = []
    for number, fault in enumerate(faults, 1):
        print(f"[{number}/{len(faults)}] {fault.name}: {fault.what} ...", flush=True)
        started, bench.longest_s = time.monotonic(), 0.0
        seen = _observe(fault, bench)
        verdict = SKIPPED if seen.skipped else GOOD if seen.is_right else BAD
        seconds = time.monotonic() - started
        words = seen.skipped or "; ".join(seen.words)
        print(f"    {verdict} in {seconds:.0f} s: {words}", flush=True)
        rows.append(
            {
                "fault": fault.name,
                "what": fault.what,
                "expected": fault.expected,
                "seen": words,
                "seconds": round(seconds, 1),
                "longest_job_s": round(bench.longest_s, 1),
                "verdict": verdict,
                "checks": seen.checks,
            }
        )
        save(rows, bench.work)  # after each: an hour's table is not lost to an interrupt
        if heal:
            with contextlib.redirect_stdout(io.StringIO()):
                heal()
    return rows


def _observe(fault: Fault, bench: Bench) -> Seen:
    """A fault that cannot even be tried is bad, and the others are tried all the same."""
    try:
        return fault.observe(bench)
    except (RuntimeError, OSError, AssertionError, LookupError) as error:
        seen = Seen()
        seen.note("tried", False, f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}")
        return seen


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| fault | what happens | expected | seen | seconds | verdict |", "|---|---|---|---|---:|---|"]
    for row in rows:
        cells = [row["fault"], row["what"], row["expected"], row["seen"], f"{row['seconds']:.0f}", row["verdict"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def save(rows: Sequence[dict[str, Any]], work: Path) -> str:
    """Write the table with its circumstances to `work`; one line of counts."""
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in (GOOD, BAD, SKIPPED)}
    about = {
        "at": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "versions": package_versions(),
        "seconds": round(sum(row["seconds"] for row in rows)),
        **counts,
    }
    write_whole(work / JSON_FILE, json.dumps({"about": about, "faults": list(rows)}, indent=1) + "\n")
    write_whole(work / TABLE_FILE, table(rows))
    return f"{counts[GOOD]} good, {counts[BAD]} bad, {counts[SKIPPED]} skipped in {about['seconds']} s"


def write(rows: Sequence[dict[str, Any]], work: Path) -> None:
    """Print the table, and say where it was written."""
    total = save(rows, work)
    print(f"\n{table(rows)}\n{total}; written to {work / TABLE_FILE} and {JSON_FILE}", flush=True)
