"""A small Ray for the folder, a small table, and ways to kill parts of a run."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.config import Config, load_config
from usr_ray.launch.environment import LOOPBACK, prepare_environment
from usr_ray.training.checkpoint import CheckpointStore

OVERRIDES = (
    "data.train_dates='2026-01-01:2026-01-03'",
    "data.eval_dates='2026-01-04:2026-01-04'",
    "train.global_batch_size=128",
    "train.num_epochs=6",
    "train.checkpoint_every_steps=5",
    "train.log_every_steps=5",
    "train.reader_threads=1",
    "model.hidden=[16]",
    "model.tower_hidden=[8]",
    "model.embedding_dim=8",
    "model.contrastive.group_size=32",
    "ray.dashboard=false",
)
"""60 steps of a few hundredths of a second each."""


BACKBONE = Path(__file__).resolve().parents[2] / "examples" / "add_a_backbone"


def small_config(*overrides: str) -> Config:
    return load_config(None, [*OVERRIDES, *overrides])


@pytest.fixture(scope="package", autouse=True)
def _environment() -> Iterator[None]:
    """What jobs/train.py sets before it imports ray; taken back for the tests of other folders."""
    before = dict(os.environ)
    os.environ.pop("RAY_ADDRESS", None)
    prepare_environment(dashboard=False)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="package")
def cluster(_environment: None) -> Iterator[None]:
    """Two logical CPUs, no dashboard. usr_ray.launch.trainer uses a Ray that this process is connected to.

    The folder of a backbone from outside the package is on its PYTHONPATH, as examples/add_a_backbone has it.
    """
    import ray

    os.environ["PYTHONPATH"] = os.pathsep.join([str(BACKBONE), os.environ["PYTHONPATH"]])
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address=LOOPBACK,
        logging_level=logging.WARNING,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lake = tmp_path_factory.mktemp("lake")
    write_samples(lake, samples_spec(), num_rows=3700, num_days=6)
    return lake


def processes(starts_with: tuple[str, ...], parent: int | None = None) -> list[int]:
    """Living processes whose command line starts so."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if entry.name.isdigit() and (entry / "cmdline").read_text().startswith(starts_with):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if fields[0] != "Z" and parent in (None, int(fields[1])):
                    found.append(int(entry.name))
    return found


def raylet_pid() -> int:
    """The raylet of the cluster that this process is connected to."""
    import ray

    session = ray.get_runtime_context().get_session_name()
    (pid,) = [pid for pid in processes(("",)) if "raylet/raylet" in (line := _command(pid)) and session in line]
    return pid


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_text()
    return ""


def training_workers() -> list[int]:
    """Ray Train's workers; Ray renames them while they run a method."""
    return processes(("ray::RayTrainWorker", "ray::execute"), parent=raylet_pid())


def wait_for(what: Callable[[], object], *, timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def newest_step(run_dir: Path) -> int:
    return max(CheckpointStore(run_dir / "checkpoints").steps(), default=0)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint: model, tables, optimisers."""
    checkpoint = CheckpointStore(run_dir / "checkpoints").newest_valid()
    assert checkpoint is not None
    return checkpoint.tensors
