"""Lakes of a study: worlds, one for each combination of its world axes, built by the two ETL jobs.

A world that is whole is kept and used again; one that was cut off is built anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usr_ray.config import load_config, parse_dates
from usr_ray.data.manifest import Manifest
from usr_ray.experiments.grid import SIMULATED, Resources, Study, StudyError, Trial, as_sets
from usr_ray.experiments.record import Base
from usr_ray.runs.plan import SPLITS, split_manifest

WORLDS_DIR, _READY = "worlds", "ready"


@dataclass(frozen=True, slots=True)
class WorldPlan:
    """A lake to build."""

    folder: str
    mark: str
    """Name of an empty file that says the world is whole."""
    commands: Sequence[Sequence[str]]
    """The ETL jobs to run, each its file and its arguments."""


BuildWorlds = Callable[[Sequence[WorldPlan], Path], None]
"""Builds worlds and logs into a folder. It knows the ETL, which this library does not: jobs/study.py hands it in."""


def table_version(lake: str, base: Base) -> int:
    """The version to pin: data.table_version where it is set, else the newest now.

    Raises:
        UserError: no dates, no table, no such version.
    """
    data = base.config(Resources()).data
    if not data.train_dates or not data.eval_dates:
        raise StudyError("data.train_dates and data.eval_dates must both be set: a study compares on held-out dates")
    return pinned_rows(lake, base, _asked_version(base))[0].version


def pinned_rows(lake: str, base: Base, version: int | None) -> list[Manifest]:
    """The rows to train on and the held-out ones, for a pin on their files.

    Raises:
        UserError: as build_manifest.
    """
    config = base.config(Resources())
    return [split_manifest(lake, config, split, version=version) for split in SPLITS]


def check_same_rows(record: dict[str, Any], manifests: Sequence[Manifest], run_dir: Path) -> None:
    """Keep the hashes of the rows in `record`, or compare them: a lake built anew counts its versions from 0 again.

    Raises:
        StudyError: trials that ended were trained on other files than those that are to come.
    """
    found = [manifest.sha256 for manifest in manifests]
    if record.setdefault("rows", found) != found:
        raise StudyError(
            f"--run-dir {run_dir}: holds trials on other files of {manifests[0].table_uri} than version "
            f"{manifests[0].version} has now (was the lake built anew?); use another --run-dir"
        )


def rows_of(table: dict[str, Any], base: Base, run_dir: Path) -> list[Manifest]:
    """`pinned_rows` of a study's table (`lake`, `version`), which must be those that its earlier trials had.

    Raises:
        UserError: as pinned_rows and check_same_rows.
    """
    manifests = pinned_rows(table["lake"], base, table["version"])
    check_same_rows(table, manifests, run_dir)
    return manifests


def whole_path(lake: str) -> str:
    """A lake as processes with other working directories find it."""
    return lake if "://" in lake else str(Path(lake).resolve())


def _asked_version(base: Base) -> int | None:
    version = load_config(base.config_path, base.overrides).data.table_version
    return version if version >= 0 else None


def prepare_worlds(
    study: Study,
    base: Base,
    trials: Sequence[Trial],
    run_dir: Path,
    input_dir: Path | None = None,
    *,
    build: BuildWorlds | None = None,
) -> dict[str, str]:
    """The lake of each world that the trials name; builds those that are not there.

    Raises:
        StudyError: an ETL job failed.
        ValueError: there are worlds to build and no `build`.
    """
    folders = {trial.world: run_dir / WORLDS_DIR / trial.world for trial in trials}
    missing = {trial.world: trial for trial in trials if not (folders[trial.world] / _READY).is_file()}
    if missing:
        if build is None:
            raise ValueError(f"study {study.name} makes worlds: hand in what builds them, as jobs/study.py does")
        print(f"{study.name}: {len(missing)} of {len(folders)} worlds to build", flush=True)
        plans = [
            WorldPlan(
                str(folders[name]),
                _READY,
                build_commands(folders[name], base, trial, source=study.source, input_dir=input_dir),
            )
            for name, trial in missing.items()
        ]
        build(plans, run_dir / WORLDS_DIR)
    return {name: str(folder / "lake") for name, folder in folders.items()}


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
