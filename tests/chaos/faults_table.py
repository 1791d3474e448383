"""Faults of the table: versions that advance, files that are harmed before a run is planned and while it runs."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from tests.chaos import harm
from tests.chaos.bench import RESUMES, STRIKE_STEP, Bench, Fault, note_struck
from tests.chaos.inside import Strike
from tests.chaos.observe import Seen
from usr_ray.runs.plan import load_manifest

HARM_TIMEOUT_S = 90.0
"""From the harm (or, when the table is harmed first, from the job's start) until all ranks have stopped."""


def table_advanced(bench: Bench) -> Seen:
    """Somebody removes a date's rows in a new version while the run is on."""
    case = bench.case("table-advanced")
    lake = harm.copy_lake(bench.lake, case / "lake")
    strike = Strike(kind="advance_table", step=STRIKE_STEP, options={"table": str(lake / "samples")})
    seen = bench.compare(Seen(), case, bench.train(case, strike=strike, lake=lake))
    note_struck(seen, case)
    return seen


def table_advanced_then_resumed(bench: Bench) -> Seen:
    """The driver is killed, the table advances, the same command is run again; then a run of another folder."""
    case = bench.cut("table-advanced-resumed")
    lake = harm.copy_lake(bench.lake, case / "lake")
    pinned = _version(case / "run")
    harm.advance_table(lake / "samples")
    ended = bench.train(case, lake=lake)
    seen = bench.compare(Seen(), case, ended)
    said = f"goes on with version {pinned}" in ended.output
    seen.note(
        "said", said, f"said that it stays on version {pinned}" if said else "does not say which version it reads"
    )
    refused = bench.train(case, f"data.table_version={pinned + 1}", lake=lake)
    seen.note("refused", refused.code == 2 and f"version {pinned}" in refused.error, "another version is refused there")
    for name, asked, expected in (("afresh", (), pinned + 1), ("pinned", (f"data.table_version={pinned}",), pinned)):
        fresh = bench.case(f"table-advanced-{name}")
        ended = bench.train(fresh, *asked, "train.num_epochs=1", lake=lake)
        found = _version(fresh / "run") if ended.code == 0 else None
        seen.note(name, found == expected, f"a new run {name} reads version {found}")
    return seen


def _version(run_dir: Path) -> int:
    manifest = load_manifest(run_dir, "train")
    return manifest.version


def harmed_before(bench: Bench, kind: str, *, needs: tuple[str, ...]) -> Seen:
    """The table is harmed before the job starts: refused before any worker is."""
    case = bench.case(f"{kind}-before")
    lake = harm.copy_lake(bench.lake, case / "lake")
    name = harm.first_file(lake)
    harm.HARMS[kind](lake / "samples", name)
    ended = bench.train(case, lake=lake)
    seen = Seen()
    bench.expect_end(seen, ended, 2)
    words = [name if word == "FILE" else word for word in needs]
    missing = [word for word in words if word not in ended.error]
    _note_line(seen, ended.error, missing, lake)
    nothing = not (case / "run").exists()
    seen.note("nothing", nothing, "nothing written" if nothing else "a run directory was made")
    seen.note("time", ended.seconds <= HARM_TIMEOUT_S, f"{ended.seconds:.0f} s")
    return seen


def harmed_during(bench: Bench, kind: str) -> Seen:
    """A file is harmed after the run was planned: every rank stops, and the line names file and row group."""
    case = bench.case(f"{kind}-during")
    lake = harm.copy_lake(bench.lake, case / "lake")
    ended = bench.train(case, lake=lake, strike=Strike(kind="harm_table", options={"harm": kind}))
    ended_at = time.time()
    seen = Seen()
    bench.expect_end(seen, ended, 2)
    struck = (case / "struck").exists()
    seen.note("struck", struck, "struck both ranks" if struck else "the fault never struck")
    missing = [word for word in (harm.first_file(lake), "row group") if word not in ended.error]
    _note_line(seen, ended.error, missing, lake)
    if struck:  # a busy machine may take long to start a job; that is not the subject
        seconds = ended_at - (case / "struck").stat().st_mtime
        seen.note("time", seconds <= HARM_TIMEOUT_S, f"all ranks stopped within {seconds:.0f} s of it")
    return seen


def _note_line(seen: Seen, line: str, missing: list[str], lake: Path) -> None:
    shown = line.replace(f"{lake}/", "")[:170]
    seen.note("line", not missing, f"'{shown}'" + (f" does not name {', '.join(missing)}" if missing else ""))


_BEFORE = {
    "truncated": ("FILE", "bytes"),
    "zero-byte": ("FILE", "bytes"),
    "missing": ("FILE", "missing"),
    "changed-table-schema": ("user_key",),
    "column-mapping": ("columnMapping",),
    "deletion-vectors": ("FILE", "deletion vectors"),
}
_DURING = ("truncated", "zero-byte", "missing", "changed-schema", "garbled")

FAULTS = (
    Fault(
        "table-advanced",
        "a new version without a date's rows while the run is on",
        "stays on its version; batches, rows and weights as unbroken",
        table_advanced,
    ),
    Fault(
        "table-advanced-resumed",
        "driver killed, a new version, the same command",
        f"stays on its version and says so; {RESUMES}; a new run reads the new version, or the one asked for",
        table_advanced_then_resumed,
    ),
    *(
        Fault(
            f"{kind}-before",
            f"table harmed before the start: {kind}",
            "exit code 2, one line, before any worker starts",
            partial(harmed_before, kind=kind, needs=needs),
        )
        for kind, needs in _BEFORE.items()
    ),
    *(
        Fault(
            f"{kind}-during",
            f"file harmed after the plan, two ranks: {kind}",
            "all ranks stop; exit code 2; one line with file and row group",
            partial(harmed_during, kind=kind),
        )
        for kind in _DURING
    ),
)
