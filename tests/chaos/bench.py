"""Where chaos runs happen: the small lake, one folder a case, and the training job as a user starts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.inside import STRUCK_FILE, Strike
from tests.chaos.observe import Seen, note_batches, note_rows, note_weights

ROOT = Path(__file__).resolve().parents[2]
NUM_EPOCHS = 2
SETTINGS = (
    f"train.num_epochs={NUM_EPOCHS}",
    "train.global_batch_size=128",
    "train.checkpoint_every_steps=4",
    "train.keep_checkpoints=4",
    "train.log_every_steps=4",
    "train.reader_threads=1",
    "model.contrastive.group_size=32",
    "ray.timeout='60 s'",
    "ray.dashboard=false",
)
"""Steps of hundredths of a second, a checkpoint every four of them."""
STRIKE_STEP = 19
"""In the first epoch, past four checkpoints. Batches are drawn a few steps before they are trained on."""


GOES_ON = "goes on by itself; batches, rows and weights as unbroken"
RESUMES = "the same command goes on; batches, rows and weights as unbroken"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that can go wrong, and what has to come of it."""

    name: str
    what: str
    expected: str
    observe: Callable[[Bench], Seen]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a training job ended."""

    code: int
    """Its exit code; negative: the signal that ended it; 124: it hung, and was ended."""
    seconds: float
    output: str

    @property
    def error(self) -> str:
        """The one line of a user's error; empty when there is none."""
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return lines[-1].removeprefix("error: ") if lines else ""


@dataclass
class Bench:
    """One work folder on one cluster.

    Args:
        work: cases go to <work>/cases; every node of the cluster must see it under this name.
        lake: with the samples table.
        arguments: of jobs/train.py besides --lake and --run-dir.
        environment: of the jobs; RAY_ADDRESS names the cluster.
        timeout_s: no job may take longer.
        is_local: the cluster is this machine's and ours: nodes may be killed, file systems mounted.
    """

    work: Path
    lake: Path
    arguments: Sequence[str]
    environment: Mapping[str, str]
    timeout_s: float = 240.0
    is_local: bool = True
    longest_s: float = field(default=0.0, init=False)
    """The longest job since `forget_times`."""

    def case(self, name: str) -> Path:
        """A fresh folder."""
        folder = self.work / "cases" / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def train(self, case: Path, *overrides: str, strike: Strike | None = None, lake: Path | None = None) -> Ended:
        """Run the training job of a case to its end; a strike of an earlier call is over."""
        (case / "strike.json").unlink(missing_ok=True)
        if strike:
            strike.save(case)
        command = [sys.executable, "tests/chaos/train_job.py", case, *self.arguments]
        command += [word for setting in (*SETTINGS, *overrides) for word in ("--set", setting)]
        command += ["--lake", lake or self.lake, "--run-dir", case / "run"]
        started = time.monotonic()
        with (case / "log").open("ab") as log:
            begins = log.tell()
            job = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                code = job.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                code = 124
            finally:
                if job.poll() is None:
                    os.killpg(job.pid, signal.SIGKILL)
                    job.wait()
        seconds = time.monotonic() - started
        self.longest_s = max(self.longest_s, seconds)
        output = (case / "log").read_bytes()[begins:].decode(errors="replace")
        return Ended(code, seconds, output)

    def unbroken(self) -> Path:
        """The case of a run that nothing happened to; trained once."""
        case = self.work / "cases" / "unbroken"
        if not (case / "done").exists():
            self._require(self.train(self.case("unbroken")), 0)
            (case / "done").touch()
        return case

    def cut(self, name: str) -> Path:
        """A fresh case with a run whose driver was killed at STRIKE_STEP; trained once, then copied."""
        source = self.work / "cases" / "cut"
        if not (source / "done").exists():
            self._require(self.train(self.case("cut"), strike=kill_driver()), -signal.SIGKILL)
            (source / "done").touch()
        case = self.case(name)
        shutil.copytree(source, case, dirs_exist_ok=True)
        return case

    def compare(self, seen: Seen, case: Path, ended: Ended, *, tolerance: float = 0.0) -> Seen:
        """Note whether the case ended as the unbroken run did."""
        unbroken = self.unbroken()
        self.expect_end(seen, ended, 0)
        if ended.code == 0:
            note_batches(seen, case, unbroken)
            note_rows(seen, case, case / "run", num_epochs=NUM_EPOCHS)
            note_weights(seen, case / "run", unbroken / "run", tolerance=tolerance)
        return seen

    def expect_end(self, seen: Seen, ended: Ended, code: int) -> None:
        """Note the exit code, if it is not the expected one."""
        words = {0: "finished", 2: "exit code 2"}.get(code, f"ended with {code}")
        if ended.code != code:
            tail = ended.output.strip().splitlines()[-1:] or ["nothing printed"]
            words = f"exit code {ended.code}, not {code}: {tail[0][:200]}"
            words = f"hung: ended after {self.timeout_s:.0f} s" if ended.code == 124 else words
        seen.note("end", ended.code == code, words)

    def _require(self, ended: Ended, code: int) -> None:
        if ended.code != code:
            raise RuntimeError(
                f"exit code {ended.code}, {code} was needed; the end of its words:\n{ended.output[-3000:]}"
            )


def kill_driver(step: int = STRIKE_STEP) -> Strike:
    """The driver dies while rank 0 waits before `step`."""
    return Strike(kind="kill_driver", step=step)


def note_struck(seen: Seen, case: Path) -> dict[str, Any]:
    """Note that the strike fell, for a run that nothing happened to proves nothing; who it struck (pid, rank, time)."""
    path = case / STRUCK_FILE
    struck = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    seen.note("struck", bool(struck), f"struck rank {struck.get('rank')}" if struck else "the fault never struck")
    return struck
