"""Publish a run: its program, and what the lake knows of items and users, as one version of a registry.

The version's folder appears whole or not at all, after its golden requests were answered from its own files.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usr_ray.config import LabelsConfig
from usr_ray.data.events import read_events
from usr_ray.data.manifest import Manifest, build_manifest, null_values
from usr_ray.data.rows import read_rows
from usr_ray.files import sync
from usr_ray.serving.counters import lake_counters, planned_counters
from usr_ray.serving.encode import ValueIndex
from usr_ray.serving.events import Rules
from usr_ray.serving.export import export_run
from usr_ray.serving.ranker import Ranker, iso_time
from usr_ray.serving.redis_users import forget_users, move_users
from usr_ray.serving.runtime import VOCABULARIES
from usr_ray.serving.stores import instant_after, write_items, write_users
from usr_ray.serving.versions import (
    FORMAT,
    GOLDEN,
    MODEL,
    VERSION,
    VERSIONS,
    VOCABULARY_FOLDER,
    in_use,
    model_spec,
    open_counters,
    open_encoder,
    version_files,
    vocabulary_paths,
)

_NUM_GOLDEN = 16
_GOLDEN_CANDIDATES = 20


def publish(
    run_dir: Path,
    lake: Path | str,
    registry: Path,
    *,
    users_at: str | None = None,
    for_gpu: bool = False,
    report: Callable[[str], None] = print,
) -> str:
    """Publish a run's best checkpoint with the lake's items and users; the version's name. The pointer stays as it is.

    Args:
        lake: the run's; the newest versions of its tables are read, and named in version.json.
        registry: created when it is absent.
        users_at: address of a Redis that takes the users (redis_users.py); None: an LMDB in the version does.
        for_gpu: publish the programs for rows too; a service on a GPU takes model.onnx.
        report: called with a line for each stage.

    Raises:
        UserError: no run, no checkpoint, another lake, or a table that cannot be read. Nothing is left behind then.
    """
    manifest = build_manifest(lake, dates=None)
    planned_counters(manifest.spec, manifest.built_with)  # said before the export, which takes a minute
    events, state_version = read_events(lake)
    temporary = registry / VERSIONS / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        exported = export_run(run_dir, temporary / MODEL, lake, requests_only=not for_gpu)
        report(f"model {exported['checkpoint']['id']} exported")
        name = f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}-{exported['checkpoint']['id']}"
        write_vocabularies(temporary)
        spec, as_of = model_spec(temporary), instant_after(events, time.time_ns() // 1000)
        counted, sums_version = lake_counters(temporary, lake, spec, manifest.built_with, as_of_us=as_of)
        encoder = open_encoder(temporary, open_counters(temporary))
        num_items = write_items(temporary, manifest, encoder, counted)
        num_users = write_users(temporary, manifest, events, encoder, as_of_us=as_of, counted=counted)
        report(f"{num_items:,} items and {num_users:,} users of samples version {manifest.version}")
        for category, number in () if counted is None else (+counted.silent).items():
            report(f"{number:,} have a {category} that no counter tells of: served as if it was never counted")
        version: dict[str, Any] = {
            "format": FORMAT,
            "version": name,
            "model_id": exported["checkpoint"]["id"],
            "scenarios": exported["scenarios"],
            "as_of": iso_time(as_of),
            "rules": asdict(Rules.of(LabelsConfig(**exported["labels"]), most_rows_a_day(manifest))),
            "null_values": null_values(manifest),
            "lake": {"uri": manifest.table_uri, "samples": manifest.version, "state": state_version}
            | ({} if counted is None else {"counters": sums_version}),
            "items": num_items,
            "users": num_users,
            "counters_until": None if counted is None else counted.until,
            "published_at": f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}",
        }
        if users_at is not None:
            version["users_at"] = users_at
            version["users_place"] = move_users(temporary, users_at, name, registry)
        ranker = Ranker.of_files(temporary, version)
        golden = [{"request": r, "items": ranker.golden_items(r)} for r in golden_requests(manifest, iso_time(as_of))]
        _finish(temporary, version, golden)
        Ranker.open(temporary)  # opened as a service would: files verified, golden requests answered
        os.replace(temporary, registry / VERSIONS / name)
        sync(registry / VERSIONS)
        if users_at is not None and (gone := forget_users(users_at, registry, {name, *in_use(registry)})):
            report(f"users of {', '.join(gone)} removed from {users_at}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return name


def most_rows_a_day(manifest: Manifest) -> int:
    """limits.max_user_events_per_day that the samples were built with; 0: no limit."""
    limits = json.loads(manifest.built_with or "{}").get("limits", {})
    return int(limits.get("max_user_events_per_day", 0))


def write_vocabularies(folder: Path) -> None:
    """The exported vocabularies of a version, feature by feature, as memory-mapped indexes."""
    source = folder / MODEL / VOCABULARIES
    if not source.exists():
        return
    (folder / VOCABULARY_FOLDER).mkdir()
    entries = pq.read_table(source)
    for feature, path in vocabulary_paths(folder, model_spec(folder)).items():
        part = entries.filter(pc.equal(entries["feature"], feature))
        if part.num_rows:
            ValueIndex.write(path, part["value"].to_pylist(), part["id"].to_numpy())


def golden_requests(manifest: Manifest, time: str) -> list[dict[str, Any]]:
    """Requests of users, queries and items of the newest date, all scenarios, at the instant `time`."""
    last = replace(manifest, files=manifest.files[-1:])
    rows = pa.concat_tables(rows for _, rows in read_rows(last, ["user_id", "item_id", "query", "scenario"]))
    items = pc.unique(rows["item_id"]).to_pylist()[:_GOLDEN_CANDIDATES]
    requests: list[dict[str, Any]] = []
    for scenario in manifest.spec.scenarios:
        part = rows.filter(pc.equal(rows["scenario"], scenario))
        step = max(part.num_rows // _NUM_GOLDEN, 1)
        for row in part.take(pa.array(np.arange(0, part.num_rows, step)[:_NUM_GOLDEN])).to_pylist():
            query = {} if row["query"] is None else {"query": row["query"]}
            candidates = [row["item_id"], *(item for item in items if item != row["item_id"])]
            request = {"scenario": scenario, "user_id": row["user_id"], "time": time, "candidates": candidates}
            requests.append(request | query)
    return requests


def _finish(folder: Path, version: dict[str, Any], golden: list[dict[str, Any]]) -> None:
    (folder / GOLDEN).write_text(json.dumps(golden) + "\n", encoding="utf-8")
    whole = version | {"files": version_files(folder)}
    (folder / VERSION).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        sync(path)
