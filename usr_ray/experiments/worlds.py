"""Lakes of a study: worlds, one for each combination of its world axes, built by the two ETL jobs.

Spark runs in a process of its own, one world after the other, so neither this process nor Ray's need a JVM. A world
that is whole is kept and used again; one that was cut off is built anew.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from usr_ray.config import load_config, parse_dates
from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.experiments.grid import SIMULATED, Resources, Study, StudyError, Trial, as_sets
from usr_ray.experiments.record import Base
from usr_ray.files import write_whole
from usr_ray.launch.environment import ROOT
from usr_ray.launch.spark import spark_environment, spark_submit

WORLDS_DIR, _READY = "worlds", "ready"


@dataclass(frozen=True, slots=True)
class World:
    """A lake to train on."""

    lake: str


def table_version(lake: str, base: Base) -> int:
    """The version to pin: data.table_version where it is set, else the newest now.

    Raises:
        UserError: no dates, no table, no such version.
    """
    data = base.config(Resources()).data
    config_version = _asked_version(base)
    if not data.train_dates or not data.eval_dates:
        raise StudyError("data.train_dates and data.eval_dates must both be set: a study compares on held-out dates")
    dates = parse_dates(data.train_dates, where="data.train_dates")
    return build_manifest(lake, dates=dates, version=config_version).version


def pinned_rows(lake: str, base: Base, version: int) -> list[Manifest]:
    """The rows to train on and the held-out ones, for a pin on their files.

    Raises:
        UserError: as build_manifest.
    """
    data = base.config(Resources()).data
    spans = {"data.train_dates": data.train_dates, "data.eval_dates": data.eval_dates}
    return [build_manifest(lake, dates=parse_dates(text, where=key), version=version) for key, text in spans.items()]


def whole_path(lake: str) -> str:
    """A lake as processes with other working directories find it."""
    return lake if "://" in lake else str(Path(lake).resolve())


def _asked_version(base: Base) -> int | None:
    version = load_config(base.config_path, base.overrides).data.table_version
    return version if version >= 0 else None


def prepare_worlds(
    study: Study, base: Base, trials: Sequence[Trial], run_dir: Path, input_dir: Path | None = None
) -> dict[str, World]:
    """The lake of each world that the trials name; builds those that are not there, in one Spark process.

    Raises:
        StudyError: no spark-submit, or an ETL job failed (what Spark said is in worlds/spark.log).
    """
    folders = {trial.world: run_dir / WORLDS_DIR / trial.world for trial in trials}
    missing = {trial.world: trial for trial in trials if not (folders[trial.world] / _READY).is_file()}
    if missing:
        print(f"{study.name}: {len(missing)} of {len(folders)} worlds to build", flush=True)
        commands = {
            str(folders[name]): build_commands(folders[name], base, trial, source=study.source, input_dir=input_dir)
            for name, trial in missing.items()
        }
        _build(commands, run_dir / WORLDS_DIR)
    return {name: World(str(folder / "lake")) for name, folder in folders.items()}


def _build(worlds: Mapping[str, list[list[str]]], folder: Path) -> None:
    plan, log = folder / "plan.json", folder / "spark.log"
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"folder": world, "mark": _READY, "commands": commands} for world, commands in worlds.items()]
    write_whole(plan, json.dumps(entries, indent=2) + "\n")
    command = [spark_submit(), "jobs/build_worlds.py", "--plan", str(plan)]
    error = ""
    with (
        log.open("w", encoding="utf-8", buffering=1) as output,
        subprocess.Popen(
            command, cwd=ROOT, env=spark_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            output.write(line)
            if line.startswith("world "):
                print(f"  {line}", end="", flush=True)
            error = line.strip().removeprefix("error: ") if line.startswith("error: ") else error
    if process.returncode:
        raise StudyError(f"{error or f'jobs/build_worlds.py failed with exit code {process.returncode}'}; see {log}")


def build_commands(
    folder: Path, base: Base, trial: Trial, *, source: str = SIMULATED, input_dir: Path | None = None
) -> list[list[str]]:
    """Arguments of the two jobs that make the world of a trial in `folder`."""
    files = ["--input", str(Path(input_dir).absolute())] if input_dir else []
    data = base.config(Resources(), trial).data
    first = parse_dates(data.train_dates, where="data.train_dates")[0]
    last = parse_dates(data.eval_dates, where="data.eval_dates")[1]
    sets = [word for text in (*base.overrides, *as_sets(trial.world_overrides)) for word in ("--set", text)]
    config = ["--config", str(Path(base.config_path).absolute())] if base.config_path else []
    common = [*config, "--logs", str(folder / "logs"), *sets]
    return [
        ["jobs/ingest_logs.py", "--source", source, *files, *common],
        ["jobs/build_samples.py", "--lake", str(folder / "lake"), "--dates", f"{first}:{last}", *common],
    ]
