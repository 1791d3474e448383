"""Faults of storage: kills in the middle of a checkpoint, torn checkpoints and snapshots, full disks."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import harm
from tests.chaos.bench import GOES_ON, RESUMES, STRIKE_STEP, Bench, Fault, note_struck
from tests.chaos.inside import ANY_RANK, Strike
from tests.chaos.observe import Seen
from usr_ray.training.checkpoint import CheckpointStore

_MOST_BYTES = 200_000
"""Where no file system can be mounted: no file of a training process may grow beyond this."""


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A folder whose storage can be filled: a tmpfs of its own, or one whose writers' files are limited in size."""

    folder: Path
    is_mounted: bool

    def strike(self, *, step: int, until: int | None = None) -> Strike:
        """Full from `step` on; free again from `until` on."""
        if self.is_mounted:
            return Strike(kind="fill_disk", step=step, options={"folder": str(self.folder), "until": until})
        return Strike(kind="limit_files", step=step, rank=ANY_RANK, options={"bytes": _MOST_BYTES, "until": until})

    def free(self) -> None:
        """Make room."""
        (self.folder / "filler").unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(bench: Bench, folder: Path, *, megabytes: int) -> Iterator[SmallDisk]:
    """A tmpfs of so many megabytes where this user may mount one on the workers' machine, else a plain folder."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    may = bench.is_local and os.geteuid() == 0
    is_mounted = may and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield SmallDisk(folder, is_mounted)
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def killed_in_checkpoint(bench: Bench) -> Seen:
    """Rank 0 is killed with half of the tensors written."""
    case = bench.case("killed-in-checkpoint")
    seen = bench.compare(Seen(), case, bench.train(case, strike=Strike(kind="kill_in_checkpoint", step=STRIKE_STEP)))
    note_struck(seen, case)
    left = [path.name for path in (case / "run" / "checkpoints").iterdir() if ".tmp-" in path.name]
    seen.note("clean", not left, "no half checkpoint left" if not left else f"left: {left}")
    return seen


def checkpoint_torn(bench: Bench) -> Seen:
    """The three newest checkpoints are torn (half of the tensors, no state.json, wrong sums)."""
    case = bench.cut("checkpoint-torn")
    folder = case / "run" / "checkpoints"
    whole = f"{CheckpointStore(folder).steps()[-4]}" if len(CheckpointStore(folder).steps()) > 3 else "0"
    torn = harm.tear_checkpoints(folder)
    ended = bench.train(case)
    seen = bench.compare(Seen(), case, ended)
    named = [name for name in torn if re.search(rf"skipped: checkpoint .*{name}", ended.output)]
    seen.note("named", named == torn, f"{len(named)} of {len(torn)} torn ones named")
    start = re.search(r"resumed at step (\d+)", ended.output)
    found = start[1] if start else "0"
    seen.note("resumed", found == whole, f"went on from step {found}, the newest whole one")
    return seen


def snapshot_torn(bench: Bench) -> Seen:
    """The attempt has a torn snapshot of Ray's, put there as our runs leave none; no JSON beside it is whole."""
    case = bench.cut("snapshot-torn")
    num_torn = harm.tear_snapshots(case / "run" / "ray")
    seen = bench.compare(Seen(), case, bench.train(case))
    seen.note("torn", num_torn > 0, f"{num_torn} files of the attempt torn")
    return seen


def disk_full_for_a_while(bench: Bench) -> Seen:
    """The run directory's storage is full for fifteen steps of the first epoch."""
    case = bench.case("disk-full-for-a-while")
    with small_disk(bench, case / "run", megabytes=64) as disk:
        strike = disk.strike(step=14, until=29)
        ended = bench.train(case, strike=strike)
        seen = bench.compare(Seen(), case, ended)
    warned = re.findall(r"checkpoint of step (\d+) not written to \S+: (.*)", ended.output)
    steps = sorted({int(step) for step, _ in warned})
    seen.note(
        "warned",
        {16, 20, 24} <= set(steps),
        f"warned at steps {steps}: '{warned[0][1][:110]}'" if warned else "no warning",
    )
    return seen


def disk_full_to_the_end(bench: Bench) -> Seen:
    """The run directory's storage is full from the second epoch on; then it is freed."""
    case = bench.case("disk-full-to-the-end")
    with small_disk(bench, case / "run", megabytes=64) as disk:
        ended = bench.train(case, strike=disk.strike(step=46))
        seen = Seen()
        bench.expect_end(seen, ended, 2)
        seen.note("line", "the storage is full" in ended.error, f"'{ended.error[:160]}'")
        newest = CheckpointStore(case / "run" / "checkpoints").newest_valid()
        seen.note("kept", newest is not None, f"checkpoint {newest and newest.step} is whole")
        disk.free()
        return bench.compare(seen, case, bench.train(case))


def disk_full_on_cache(bench: Bench) -> Seen:
    """The folder of train.reader_cache takes a third of the rows."""
    case = bench.case("disk-full-on-cache")
    with small_disk(bench, case / "disk", megabytes=1) as disk:
        if not disk.is_mounted:
            return Seen(skipped="mounts a small file system, which this user may not")
        ended = bench.train(case, f"train.reader_cache='{disk.folder}'")
    seen = bench.compare(Seen(), case, ended)
    warned = re.search(r"train.reader_cache: (.*)", ended.output)
    seen.note("warned", warned is not None, f"'{warned[0][:140]}'" if warned else "no warning")
    return seen


FAULTS = (
    Fault("killed-in-checkpoint", "SIGKILL of rank 0 with half a checkpoint written", GOES_ON, killed_in_checkpoint),
    Fault(
        "checkpoint-torn",
        "the three newest checkpoints torn: tensors cut, no JSON, wrong sums",
        f"each named in a line; the newest whole one is used; {RESUMES}",
        checkpoint_torn,
    ),
    Fault("snapshot-torn", "Ray's own snapshot of the attempt torn", RESUMES, snapshot_torn),
    Fault(
        "disk-full-for-a-while",
        "storage of the run full for 15 steps",
        f"a line each; {GOES_ON}",
        disk_full_for_a_while,
    ),
    Fault(
        "disk-full-to-the-end",
        "storage of the run full until the end, then freed",
        f"exit code 2 and one line, earlier checkpoint whole; freed, {RESUMES}",
        disk_full_to_the_end,
    ),
    Fault("disk-full-on-cache", "storage of train.reader_cache too small", f"one line; {GOES_ON}", disk_full_on_cache),
)
