"""A run before any process starts: configuration, pinned rows, run directory; and its result there. No Ray.

    <run-dir>/config.json          resolved configuration, table version, manifest hashes, packages, attempts, status
    <run-dir>/manifest-train.json  the rows to train on; manifest-eval.json: the held-out rows

Every mistake a user can make is found here, before anything is written. The same command on the same directory resumes
the run it holds, on the rows that the run was started on, however far the table has moved since.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from usr_ray.cli import check_no_store
from usr_ray.config import Config, UserError, date_ranges, dates_in, differences, first_difference, parse_dates
from usr_ray.data.lineage import check_config, doubts
from usr_ray.data.manifest import Manifest, build_manifest, first_counted_date
from usr_ray.data.mature import WhichRows, usable_row_groups
from usr_ray.data.order import ShuffleQuality
from usr_ray.data.pins import remove_pin, write_pin
from usr_ray.data.rows import read_rows
from usr_ray.evaluation.files import (
    PREDICTIONS_FILE,
    SPLIT,
    metrics_text,
    read_metrics,
    write_metrics,
    write_predictions,
)
from usr_ray.evaluation.statistics import far_off
from usr_ray.files import now, write_whole
from usr_ray.model.backbones import check_own_backbone
from usr_ray.runs.evaluations import (
    CONFIG_FILE,
    METRICS_FILE,
    about_rows,
    dates_heading,
    dates_of,
    evaluations,
    manifest_path,
    read_record,
    trained_on,
    warm_start_dates,
)
from usr_ray.runs.telltale import telltales
from usr_ray.training.checkpoint import CHECKPOINTS, CheckpointStore
from usr_ray.training.loop import TrainResult
from usr_ray.training.rows import training_reader
from usr_ray.training.state import FIXED_KEYS, package_versions
from usr_ray.training.warm_start import check_warm_start

RUNNING, FINISHED = "running", "finished"
SPLITS = ("train", "eval")
_FIXED = ("scenarios", "data", "counters", *FIXED_KEYS)
"""What gives the run its meaning: another value needs another run directory."""
_VERSION_KEY = "data.table_version"
_CACHE_KEY = "train.reader_cache"
_NOT_MEANT = (_VERSION_KEY, "data.allow_missing_dates", _CACHE_KEY)
"""Keys that may change: a run keeps the rows it was started on, wherever it has them decoded."""
_TRAINED_FROM = ("scenarios", "data", "counters", "model", "train")
"""Sections that training computes from; with any other change a finished run stays finished."""
_MORE_PACKAGES = ("ray", "deltalake")
_OF_A_RESULT = ("outcome", "step", "ended")
"""Entries of config.json that `mark_finished` adds."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run that can be started: everything is checked, nothing is written yet."""

    config: Config
    run_dir: Path
    """Absolute, since workers have working directories of their own."""
    train_manifest: Manifest
    eval_manifest: Manifest | None
    """None without data.eval_dates; nothing is evaluated then."""
    record: dict[str, Any]
    """config.json as it will be written; `status` tells whether there is anything left to do."""
    doubts: tuple[str, ...] = ()
    """Warnings, to be shown where the run is trained (lineage.doubts, telltale.telltales)."""

    @property
    def is_finished(self) -> bool:
        """The directory holds this run's result already."""
        return self.record["status"] == FINISHED


def plan_run(config: Config, lake: Path | str, run_dir: Path | str, *, command: Sequence[str] = ()) -> RunPlan:
    """Check everything that can be checked without starting Ray; writes nothing.

    Args:
        lake: folder (or object-store address) with the samples table.
        run_dir: a new folder, or that of a run to resume.

    Raises:
        UserError: no dates, no table, no rows, no rows that count, a batch that these workers cannot share, a run
            directory that cannot be used or holds another run.
    """
    if "://" in str(run_dir):
        raise UserError(f"--run-dir {run_dir}: must be a folder that every machine of the cluster sees, not an address")
    folder = Path(run_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--run-dir {run_dir}: {existing} is not a folder that can be written; name another")
    if not config.data.train_dates:
        raise UserError(
            "data.train_dates is empty; name the dates to train on: --set data.train_dates=2026-01-01:2026-01-06"
        )
    if config.train.early_stopping and not config.data.eval_dates:
        raise UserError("train.early_stopping watches data.eval_dates, which is empty; set one or switch off the other")
    config = with_whole_paths(config)
    record, changed = _read_record(folder), {}
    if record is None:
        manifests = _build_all(config, lake)
        record = {"created": now(), "status": RUNNING, "attempts": []}
    else:
        _refuse_other_run(config, record, folder)
        _refuse_other_version(config, record, folder)
        manifests = {s: _saved_manifest(lake, folder, record, split=s) for s in SPLITS}
        # The run is pinned to its version, asked or not.
        saved = Config.completed(record["config"])
        changed = differences(saved, config.to_dict())
        is_lost = manifests["eval"] is not None and _has_lost_metrics(folder, record)
        if is_lost or first_difference(saved, config.to_dict(), _TRAINED_FROM, but=_NOT_MEANT):
            record["status"] = RUNNING  # more epochs, for example, or an evaluation once more
    train_manifest = manifests["train"]
    assert train_manifest is not None
    shuffle, num_steps = _check_rows(config, train_manifest)
    if "config" in record:
        _refuse_settings_without_steps(config, record, folder, num_steps)
    if manifests["eval"] is not None:
        _refuse_nothing_to_evaluate(config, manifests["eval"])
    before = _seen_before(config, record, folder, train_manifest)
    if manifests["eval"] is not None and (why := trained_on(manifests["eval"].dates, before)):
        raise UserError(
            f"data.eval_dates {config.data.eval_dates}: the run of train.warm_start was trained on {why}, and held-out "
            "dates must come after all that is trained on; name later dates, or another run"
        )
    record |= {
        "config": config.to_dict(),
        "shuffle": {"order": config.train.order, **{k: round(v, 4) for k, v in asdict(shuffle).items()}},
        "table": {"uri": train_manifest.table_uri, "version": train_manifest.version},
        "manifests": {s: _about(m) for s, m in manifests.items() if m is not None},
        "trained_dates": date_ranges(before | set(train_manifest.dates)),
        "packages": package_versions() | _installed(_MORE_PACKAGES),
    }
    if record["status"] == RUNNING:
        record = {key: value for key, value in record.items() if key not in _OF_A_RESULT}
    attempt = {"started": now(), "command": list(command), **({"changed": changed} if changed else {})}
    record["attempts"] = [*record["attempts"], attempt]
    first_counted = first_counted_date(lake) if config.every_counter else None
    found = doubts(config, train_manifest, manifests["eval"], first_counted=first_counted)
    if len(record["attempts"]) == 1:  # a finished run needs no file of the lake
        found += telltales(config, train_manifest)
    return RunPlan(config, folder, train_manifest, manifests["eval"], record, tuple(found))


def with_whole_paths(config: Config) -> Config:
    """The configuration without relative paths: workers have working directories of their own, as trials may have.

    Raises:
        UserError: one of them is no place of a file system.
    """
    paths = {key: getattr(config.train, key) for key in ("warm_start", "reader_cache") if getattr(config.train, key)}
    for key, path in paths.items():
        check_no_store(path, flag=f"train.{key}")
    whole: dict[str, Any] = {key: str(Path(path).absolute()) for key, path in paths.items()}
    return replace(config, train=replace(config.train, **whole))


def _has_lost_metrics(folder: Path, record: Mapping[str, Any]) -> bool:
    """Its metrics are not there.

    Raises:
        UserError: of a finished run, whose checkpoints are gone as well: it would be trained anew.
    """
    if (folder / METRICS_FILE).is_file():
        return False
    if record["status"] == FINISHED and CheckpointStore(folder / CHECKPOINTS).newest_state() is None:
        raise UserError(
            f"--run-dir {folder}: is finished, but {METRICS_FILE} and all checkpoints are gone; put the checkpoints "
            "back to evaluate again, or train in another --run-dir"
        )
    return True


def write_plan(plan: RunPlan) -> None:
    """Make the run directory and write its manifests and config.json, each whole or not at all, config.json last.

    The lake gets a pin, so that nobody deletes the files of the run's table version before `mark_finished`. The result
    of a run that trains on goes: its metrics would stand beside weights that they are not of.
    """
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    for name in (METRICS_FILE, PREDICTIONS_FILE):
        (plan.run_dir / name).unlink(missing_ok=True)
    plan.train_manifest.save(manifest_path(plan.run_dir, "train"))
    if plan.eval_manifest is not None:
        plan.eval_manifest.save(manifest_path(plan.run_dir, "eval"))
    write_pin([m for m in (plan.train_manifest, plan.eval_manifest) if m is not None], plan.run_dir)
    _write_record(plan.run_dir, plan.record)


def mark_finished(plan: RunPlan, *, outcome: str, step: int) -> None:
    """Note in config.json that the result is there; take back the pin. `outcome`: training.loop.TrainResult.status."""
    _write_record(plan.run_dir, plan.record | {"status": FINISHED, "outcome": outcome, "step": step, "ended": now()})
    remove_pin(plan.train_manifest.table_uri, plan.run_dir)


def load_manifest(run_dir: Path, split: str) -> Manifest:
    """The saved rows of a split; UserError where the run has none."""
    return Manifest.load(manifest_path(run_dir, split))


def _check_rows(config: Config, manifest: Manifest) -> tuple[ShuffleQuality, int]:
    """Refuse what the workers would; how well the first epoch's order mixes rows and dates, and an epoch's steps."""
    check_config(config, manifest)
    check_own_backbone(config.model, num_scenarios=len(config.scenarios))
    with training_reader(config, manifest, world_size=max(1, config.ray.num_workers)) as reader:
        return reader.shuffle_quality(), reader.num_steps


def _seen_before(config: Config, record: Mapping[str, Any], folder: Path, manifest: Manifest) -> frozenset[str]:
    """ISO dates that the weights had seen where the run began.

    A run with weights of its own goes on from them: what train.warm_start names may be gone by now, or another run.

    Raises:
        CheckpointError: the run is yet to begin with a checkpoint that it must not begin with.
    """
    if "trained_dates" in record and CheckpointStore(folder / CHECKPOINTS).newest_state() is not None:
        return dates_in(record["trained_dates"])
    if config.train.warm_start:
        check_warm_start(config, manifest)
    return warm_start_dates(config.train.warm_start)


def _refuse_nothing_to_evaluate(config: Config, manifest: Manifest) -> None:
    """UserError where no held-out row may count: labels that are not final, or no row of data.only_scenario."""
    usable_row_groups(manifest, WhichRows())
    only = config.data.only_scenario
    if only and not any(
        pc.any(pc.equal(rows["scenario"], only)).as_py() for _, rows in read_rows(manifest, ["scenario"])
    ):
        raise UserError(
            f"data.eval_dates {config.data.eval_dates}: no row is of data.only_scenario {only!r}; name dates that have "
            "some, or leave data.eval_dates empty"
        )


def _build_all(config: Config, lake: Path | str) -> dict[str, Manifest | None]:
    """The rows of each split, all of one version: the table may advance while they are looked up."""
    manifests: dict[str, Manifest | None] = {}
    version = config.data.table_version if config.data.table_version >= 0 else None
    for split in SPLITS:
        text = getattr(config.data, f"{split}_dates")
        manifests[split] = built = split_manifest(lake, config, split, version=version) if text else None
        version = built.version if built else version
    return manifests


def split_manifest(lake: Path | str, config: Config, split: str, *, version: int | None) -> Manifest:
    """The rows of data.train_dates ('train') or data.eval_dates ('eval') in a lake; raises as build_manifest."""
    where, allow_missing = f"data.{split}_dates", config.data.allow_missing_dates
    dates = parse_dates(getattr(config.data, f"{split}_dates"), where=where)
    warmup_days = config.counters.warmup_days if split == "train" else 0
    return build_manifest(
        lake, dates=dates, version=version, where=where, allow_missing=allow_missing, warmup_days=warmup_days
    )


def _read_record(folder: Path) -> dict[str, Any] | None:
    if not (folder / CONFIG_FILE).exists():
        return None
    record = read_record(folder, "config", "table", "manifests", "attempts", "status")
    return record if record["status"] != FINISHED else read_record(folder, "outcome", "step")


def _refuse_other_run(config: Config, record: Mapping[str, Any], folder: Path) -> None:
    found = first_difference(Config.completed(record["config"]), config.to_dict(), _FIXED, but=_NOT_MEANT)
    if found:
        key, saved, here = found
        raise UserError(
            f"--run-dir {folder}: holds a run with {key} = {saved!r}, this command has {here!r}; "
            "set it back to go on with that run, or use another --run-dir"
        )


def _refuse_settings_without_steps(config: Config, record: Mapping[str, Any], folder: Path, num_steps: int) -> None:
    """Refuse settings that no step would be trained with, since those that they ask for are done.

    Args:
        num_steps: of an epoch.
    """
    state = CheckpointStore(folder / CHECKPOINTS).newest_state()
    if state is None:
        return
    begun = state["cursor"]["epoch"] + 1
    if config.train.num_epochs < begun:
        raise UserError(
            f"--run-dir {folder}: holds a run that has begun its epoch {begun}, this command has train.num_epochs = "
            f"{config.train.num_epochs}; name at least {begun}, or use another --run-dir"
        )
    found = first_difference(
        Config.completed(record["config"]), config.to_dict(), ("train",), but=("train.num_epochs", _CACHE_KEY)
    )
    early = record.get("outcome") == "early_stopped"
    if found and (early or (config.train.num_epochs == begun and state["cursor"]["step"] >= num_steps)):
        key, saved, here = found
        more = "" if early else "raise train.num_epochs to train on, "
        raise UserError(
            f"--run-dir {folder}: holds a run that was trained to its end with {key} = {saved!r}, this command has "
            f"{here!r}; set it back, {more}or use another --run-dir"
        )


def _refuse_other_version(config: Config, record: Mapping[str, Any], folder: Path) -> None:
    """A run stays on the version it was started on, whichever is the newest now."""
    pinned, asked = record["table"]["version"], config.data.table_version
    if asked not in (-1, pinned):
        raise UserError(
            f"--run-dir {folder}: holds a run on version {pinned} of the table, this command has {_VERSION_KEY} = "
            f"{asked}; leave it out to go on with that run, or use another --run-dir"
        )


def _saved_manifest(lake: Path | str, folder: Path, record: Mapping[str, Any], *, split: str) -> Manifest | None:
    """The rows the run was started on, wherever the lake is now."""
    if split not in record["manifests"]:
        return None
    saved = Manifest.load(manifest_path(folder, split))
    here = str(lake).rstrip("/") if "://" in str(lake) else str(Path(lake).resolve())
    if saved.table_uri.rpartition("/")[0] == here:
        return saved
    was = Config.from_dict(Config.completed(record["config"]))
    moved = split_manifest(lake, was, split, version=saved.version)
    if (moved.sha256, moved.spec, moved.built_with) != (saved.sha256, saved.spec, saved.built_with):
        raise UserError(
            f"--lake {lake}: holds other rows than {saved.table_uri} version {saved.version}, on which the run in "
            f"{folder} was started; name that lake, or use another --run-dir"
        )
    return moved


def _installed(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _about(manifest: Manifest) -> dict[str, Any]:
    dates = manifest.dates
    return {
        "sha256": manifest.sha256,
        "num_rows": manifest.num_rows,
        "first_date": dates[0],
        "last_date": dates[-1],
        "dates": date_ranges(dates),
    }


def _write_record(run_dir: Path, record: Mapping[str, Any]) -> None:
    write_whole(run_dir / CONFIG_FILE, json.dumps(record, indent=2) + "\n")


def write_result(run_dir: Path, result: TrainResult, held_out: Manifest) -> None:
    """metrics.json and predictions.parquet of the trained weights on the held-out rows; nothing when stopped.

    Called by rank 0; the metrics come last, so where they are the predictions are too.
    """
    evaluation = result.evaluation
    if evaluation is None or evaluation.metrics is None or evaluation.predictions is None:
        return
    dates = dates_of(held_out, evaluation.predictions.row_number_N)
    about = about_rows(held_out, dates, step=result.state.step)
    write_predictions(run_dir / PREDICTIONS_FILE, evaluation.predictions, held_out.spec.scenarios, about=about)
    write_metrics(run_dir / METRICS_FILE, {SPLIT: evaluation.metrics})


def result_text(run_dir: Path) -> str:
    """The metrics of a finished run as a table, under the dates that they are of."""
    found = evaluations(run_dir, read_record(run_dir))
    heading = [f"{dates_heading(one.dates, one.seen)}:" for one in found if one.file == METRICS_FILE]
    splits = read_metrics(run_dir / METRICS_FILE, SPLIT)
    return "\n".join([*heading, metrics_text(splits), *(f"warning: {line}" for line in far_off(splits[SPLIT]))])
