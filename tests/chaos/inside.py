"""Inside the training processes of a chaos run: every step's rows are noted, and one fault strikes at a named step.

The product knows nothing of this. `train_worker` stands in for usr_ray.launch.trainer's in the driver (train_job.py),
and in the worker it wraps the one function that opens the training rows, so a run without chaos pays nothing.

    <case>/strike.json                 what is to happen, to which rank, before which step
    <case>/struck                      it has happened: a group that is started again is left alone
    <case>/batches/<group>-<rank>-of-<world>.jsonl     {"step", "rows"}: row numbers of the batches this rank drew
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.chaos import harm
from usr_ray.config import Config
from usr_ray.data.batch import UsrBatch
from usr_ray.data.manifest import Manifest
from usr_ray.data.reader import SampleReader
from usr_ray.training import checkpoint
from usr_ray.training.loop import TrainResult, train
from usr_ray.training.rows import training_reader
from usr_ray.training.worker import Worker

STRIKE_FILE, STRUCK_FILE, BATCHES, KILL_DRIVER = "strike.json", "struck", "batches", "kill-driver"
HOLD_S = 600.0
"""A rank that waits to be killed from outside waits no longer than this."""
ANY_RANK = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Strike:
    """One fault of one run."""

    kind: str
    """Name of a function of this module, without the leading underscore."""
    step: int = 0
    """Steps of the run that are done when it strikes."""
    rank: int = 0
    """Where; ANY_RANK: on each."""
    options: dict[str, Any] = field(default_factory=dict)

    def save(self, case: Path) -> None:
        """Put it where the workers of `case` look."""
        (case / STRUCK_FILE).unlink(missing_ok=True)
        (case / STRIKE_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")


def train_worker(settings: Mapping[str, Any]) -> dict[str, Any]:
    """usr_ray.launch.trainer.train_worker, watched."""
    # Imports ray, which reads the environment: a reader of this may not be ready.
    from usr_ray.launch import alone, trainer

    case = Path(settings["run_dir"]).parent

    def watched(config: Config, worker: Worker, **rest: Any) -> TrainResult:
        def reader(config: Config, manifest: Manifest, *, rank: int, world_size: int) -> SampleReader:
            assert (rank, world_size) == (worker.rank, worker.world_size)
            return _watch(case, config, manifest, worker)

        with patch("usr_ray.training.loop.training_reader", reader):
            return train(config, worker, **rest)

    with patch.object(alone, "train", watched):
        return trainer.train_worker(settings)


def _watch(case: Path, config: Config, manifest: Manifest, worker: Worker) -> SampleReader:
    """The rank's reader; its batches are noted as they are drawn, and the strike falls when its step has come."""
    strike = _load(case)
    if strike and strike.kind == "harm_table":
        if worker.is_main and _first(case):
            harm.HARMS[strike.options["harm"]](Path(manifest.table_uri), manifest.files[0].path)
        worker.any_true(False)  # all ranks wait here
    reader = training_reader(config, manifest, rank=worker.rank, world_size=worker.world_size)
    # One name for the ranks that train together; a restarted group has another.
    group = int(worker.broadcast(torch.tensor(time.time_ns())))
    folder = case / BATCHES
    folder.mkdir(exist_ok=True)
    notes = folder / f"{group}-{worker.rank}-of-{worker.world_size}.jsonl"
    batches = reader.batches

    def noted(epoch: int, start_step: int = 0) -> Iterator[UsrBatch]:
        # Opened for each line: a process that is killed loses none.
        for n, batch in enumerate(batches(epoch, start_step), start_step):
            step = epoch * reader.num_steps + n
            if strike and strike.rank in (ANY_RANK, worker.rank):
                _strike(strike, step, case, worker)
            with notes.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "rows": batch.row_number_B.tolist()}) + "\n")
            yield batch

    reader.batches = noted  # type: ignore[method-assign]
    return reader


def _load(case: Path) -> Strike | None:
    try:
        return Strike(**json.loads((case / STRIKE_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _first(case: Path) -> bool:
    """True once a case, whoever asks."""
    try:
        os.close(os.open(case / STRUCK_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _strike(strike: Strike, step: int, case: Path, worker: Worker) -> None:
    if strike.kind in _EVERY_STEP:
        _EVERY_STEP[strike.kind](step, strike, case)
        return
    # A node with the driver on it takes the run along: that is another fault.
    has_come = step == strike.step and not (strike.kind == "kill_node" and _is_on_head())
    if has_come and _first(case):
        note = {"pid": os.getpid(), "rank": worker.rank, "time": time.time()}
        (case / STRUCK_FILE).write_text(json.dumps(note), encoding="utf-8")
        _ONCE[strike.kind](strike, case)


def _kill_self(strike: Strike, case: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_driver(strike: Strike, case: Path) -> None:
    """The driver ends itself when it sees the file: it may be on another machine. No rank goes a step further."""
    (case / KILL_DRIVER).touch()
    time.sleep(HOLD_S)


def _kill_node(strike: Strike, case: Path) -> None:
    """A raylet that is gone takes its workers along, and Ray declares the node dead: a machine that lost power."""
    raylet = os.getppid()
    command = Path(f"/proc/{raylet}/cmdline").read_text(encoding="utf-8")
    assert "raylet/raylet" in command, f"the parent of this worker is no raylet: {command}"
    os.kill(raylet, signal.SIGKILL)
    time.sleep(HOLD_S)


def _kill_in_checkpoint(strike: Strike, case: Path) -> None:
    """The next checkpoint is cut off in the middle of its tensors."""
    whole = checkpoint.save_file

    def half(tensors: dict[str, torch.Tensor], path: Path) -> None:
        whole(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = half


def _hang(strike: Strike, case: Path) -> None:
    time.sleep(HOLD_S)


def _advance_table(strike: Strike, case: Path) -> None:
    harm.advance_table(Path(strike.options["table"]))


def _slow_down(step: int, strike: Strike, case: Path) -> None:
    if step >= strike.step:
        time.sleep(strike.options["seconds"])


def _fill_disk(step: int, strike: Strike, case: Path) -> None:
    """From strike.step to options['until'] (or for good) the storage of options['folder'] takes nothing more."""
    filler, until = Path(strike.options["folder"]) / "filler", strike.options.get("until")
    if step == strike.step:
        harm.fill(filler)
    elif step == until:
        filler.unlink(missing_ok=True)


def _limit_files(step: int, strike: Strike, case: Path) -> None:
    """Like _fill_disk where no file system can be mounted: this process may not let a file grow beyond a size."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if step == strike.step:
        soft = strike.options["bytes"]
    elif step == strike.options.get("until"):
        soft = hard
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _is_on_head() -> bool:
    """Whether this process shares its node with the cluster's head, and so with the driver."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return any("node:__internal_head__" in n["Resources"] for n in ray.nodes() if n["NodeID"] == here)


_ONCE: dict[str, Callable[[Strike, Path], None]] = {
    "kill_self": _kill_self,
    "kill_driver": _kill_driver,
    "kill_node": _kill_node,
    "kill_in_checkpoint": _kill_in_checkpoint,
    "hang": _hang,
    "advance_table": _advance_table,
}
_EVERY_STEP: dict[str, Callable[[int, Strike, Path], None]] = {
    "slow_down": _slow_down,
    "fill_disk": _fill_disk,
    "limit_files": _limit_files,
}
