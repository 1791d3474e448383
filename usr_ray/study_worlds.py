"""Lakes of a study: simulated worlds, one for each combination of its world axes, built by the two ETL jobs.

Spark runs in processes of its own, one world after the other, so neither this process nor Ray's need a JVM. A world
that is whole is kept and used again; one that was cut off is built anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from usr_ray.config import load_config, parse_dates
from usr_ray.files import write_whole
from usr_ray.manifest import Manifest, build_manifest
from usr_ray.study_grid import Resources, Study, StudyError, Trial, as_sets
from usr_ray.study_record import Base
from usr_ray.trainer_environment import ROOT

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


def prepare_worlds(study: Study, base: Base, trials: Sequence[Trial], run_dir: Path) -> dict[str, World]:
    """The lake of each world that the trials name; builds those that are not there.

    Raises:
        StudyError: no spark-submit, or an ETL job failed (its output is in the world's build.log).
    """
    of_world = {trial.world: trial for trial in trials}
    worlds = {}
    for place, (name, trial) in enumerate(of_world.items()):
        folder = run_dir / WORLDS_DIR / name
        if not (folder / _READY).is_file():
            print(f"{study.name}: building world {place + 1} of {len(of_world)}, {name}", flush=True)
            _build(folder, base, trial)
        worlds[name] = World(str(folder / "lake"))
    return worlds


def _build(folder: Path, base: Base, trial: Trial) -> None:
    submit = shutil.which("spark-submit", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if submit is None:
        raise StudyError("a study of worlds needs Spark, and no spark-submit is beside this Python; run `make setup`")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "build.log"
    for job in build_commands(folder, base, trial):
        with log.open("a", encoding="utf-8") as output:
            done = subprocess.run(
                [submit, *job], cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            last = next(
                (s for s in reversed(log.read_text(encoding="utf-8").splitlines()) if s.startswith("error:")), ""
            )
            raise StudyError(
                f"world {folder.name}: {job[0]} failed ({last or f'exit code {done.returncode}'}); see {log}"
            )
    shutil.rmtree(folder / "logs", ignore_errors=True)
    write_whole(folder / _READY, "")


def build_commands(folder: Path, base: Base, trial: Trial) -> list[list[str]]:
    """Arguments of the two jobs that make the world of a trial in `folder`."""
    data = base.config(Resources(), trial).data
    first = parse_dates(data.train_dates, where="data.train_dates")[0]
    last = parse_dates(data.eval_dates, where="data.eval_dates")[1]
    sets = [word for text in (*base.overrides, *as_sets(trial.world_overrides)) for word in ("--set", text)]
    config = ["--config", str(Path(base.config_path).absolute())] if base.config_path else []
    common = [*config, "--logs", str(folder / "logs"), *sets]
    return [
        ["jobs/ingest_logs.py", "--source", "simulated", *common],
        ["jobs/build_samples.py", "--lake", str(folder / "lake"), "--dates", f"{first}:{last}", *common],
    ]


def _environment() -> dict[str, str]:
    environment = os.environ | {"SPARK_LOCAL_IP": "127.0.0.1"}
    environment.setdefault("SPARK_CONF_DIR", str(ROOT / "cluster" / "spark" / "conf"))
    return environment
