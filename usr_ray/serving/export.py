"""A run as a directory that serves it: the model in two formats, its weights, vocabularies, feature spec, a manifest.

    model.pt2            torch.export program          inputs by name, any number of rows
    model.onnx           the same for ONNX runtimes     (model.onnx.data beside it where the tables are large)
    request.onnx         the same for one user and any number of candidates, the user's part computed once
    weights.safetensors  folded weights and tables by name, for any other runtime
    vocabularies.parquet (feature, value, id) of every value that the model has an embedding for
    feature_spec.json    the inputs' meaning
    manifest.json        files with their SHA-256, inputs and outputs with their shapes, run and table it comes from

The directory appears whole or not at all, and only after all programs have given the training model's probabilities.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import nn

from usr_ray import __version__
from usr_ray.data.lineage import fingerprint
from usr_ray.data.manifest import open_samples, read_vocabularies
from usr_ray.files import file_sha256, sync
from usr_ray.schema import FIRST_ID, FeatureSpec
from usr_ray.serving.check import largest_differences
from usr_ray.serving.model import RequestModel, ServingModel, input_shapes, request_shapes
from usr_ray.serving.runtime import (
    FEATURE_SPEC,
    FORMAT,
    MANIFEST,
    ONNX,
    PT2,
    REQUEST,
    VOCABULARIES,
    WEIGHTS,
    ExportError,
    require_packages,
)
from usr_ray.training.evaluate import TrainedRun, check_table, load_whole_run

TOLERANCE = 1e-5
"""Largest difference of a probability from the training model's."""
_EXTERNAL_BYTES = 1_500_000_000
"""Weights from which on ONNX keeps them in a file of their own; its messages end at 2 GB."""
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "numpy")


def export_run(
    run_dir: Path, output_dir: Path, lake: Path | str | None = None, *, requests_only: bool = False
) -> dict[str, Any]:
    """Export the model of a run's best checkpoint (its newest one where none was marked best).

    Args:
        output_dir: absent or empty.
        lake: whose vocabularies go with the model (vocabulary.kind = "hash" has none); None: none do.
        requests_only: write no program but request.onnx and no weights, in a third of the time.

    Returns:
        The content of manifest.json.

    Raises:
        ExportError: `output_dir` is in use, a package is missing, or the lake is not the run's.
        UserError: no run, no checkpoint, no vocabularies.
    """
    require_packages("onnx", "onnxscript", "onnxruntime")
    output_dir = output_dir.resolve()  # "." has no name
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ExportError(f"--output {output_dir}: is not empty; name another directory, or delete this one")
    run = load_whole_run(run_dir)
    vocabularies = None
    if lake is not None:
        check_table(run, open_samples(lake))
    if lake is not None and run.config.vocabulary.kind != "hash":
        vocabularies = known_values(read_vocabularies(lake), run.spec, lake)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_dir.with_name(f".{output_dir.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        manifest = _write(temporary, run, vocabularies, requests_only)
        os.replace(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def known_values(entries: pa.Table, spec: FeatureSpec, lake: Path | str) -> pa.Table:
    """The entries that the model has an embedding for: vocabularies grow after a training, and never renumber.

    Raises:
        ExportError: a feature's ids are not exactly those of its table: the lake is another one.
    """
    parts = []
    for name, feature in spec.vocabularies.items():
        mask = pc.and_(pc.equal(entries["feature"], name), pc.less(entries["id"], feature.num_embeddings))
        part = entries.filter(mask)
        if feature.fingerprints and fingerprint(part, name, feature.num_embeddings) != feature.fingerprints[-1]:
            raise ExportError(
                f"--lake {lake}: its vocabulary of {name} holds other values than those the model was trained "
                "with; name the lake that the run was trained on"
            )
        num_values = feature.num_embeddings - FIRST_ID
        if part.num_rows == 0 and not pc.any(pc.equal(entries["feature"], name)).as_py():
            continue  # event_hour, and features without a value, have no entries
        if part.num_rows != num_values:
            raise ExportError(
                f"--lake {lake}: has {part.num_rows} values of {name} where the model has {num_values} "
                "embeddings; name the lake that the run was trained on"
            )
        parts.append(part.sort_by("id"))
    return pa.concat_tables(parts) if parts else entries.slice(0, 0)


def _write(folder: Path, run: TrainedRun, vocabularies: pa.Table | None, requests_only: bool) -> dict[str, Any]:
    model = ServingModel(run.module, run.tables, run.spec)
    if not requests_only:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / WEIGHTS)
    write_programs(model, run.spec, folder, requests_only=requests_only)
    (folder / FEATURE_SPEC).write_text(run.spec.to_json() + "\n", encoding="utf-8")
    if vocabularies is not None:
        pq.write_table(vocabularies, folder / VOCABULARIES, compression="zstd")
    manifest = _describe(folder, run, model)
    _write_manifest(folder, manifest)
    # The files themselves are opened as a user would, so that what was checked is what is served.
    differences = largest_differences(folder, run, requests_only=requests_only)
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        raise RuntimeError(f"the exported model differs from the training model: {wrong}, allowed {TOLERANCE}")
    manifest["largest_difference_from_training_model"] = differences
    _write_manifest(folder, manifest)
    for path in [*folder.iterdir(), folder]:
        sync(path)
    return manifest


def write_programs(model: ServingModel, spec: FeatureSpec, folder: Path, *, requests_only: bool) -> None:
    """request.onnx for any number of candidates and, unless `requests_only`, model.pt2 and model.onnx for rows."""
    num_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    rows, items = torch.export.Dim("rows"), torch.export.Dim("items")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, which nothing here uses
    of_rows = {name: (dtype, (None, *shape)) for name, (dtype, shape) in input_shapes(spec).items()}
    programs: tuple[tuple[str, nn.Module, Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]], Any], ...] = (
        (ONNX, model, of_rows, rows),
        (REQUEST, RequestModel(model).eval(), request_shapes(spec), items),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, module, shapes, size in programs[requests_only:]:
            # Two rows: torch.export takes a size of 1 for a constant.
            example = {n: torch.zeros([s or 2 for s in shape], dtype=dtype) for n, (dtype, shape) in shapes.items()}
            dynamic = {n: {0: size} if shape[0] is None else {} for n, (_, shape) in shapes.items()}
            program = torch.export.export(module, (example,), dynamic_shapes=(dynamic,))
            if name == ONNX:
                torch.export.save(program, folder / PT2)
            onnx_program = torch.onnx.export(
                program, dynamo=True, input_names=list(example), output_names=list(model.output_names), verbose=False
            )
            assert onnx_program is not None
            onnx_program.save(str(folder / name), external_data=num_bytes > _EXTERNAL_BYTES)


def _describe(folder: Path, run: TrainedRun, model: ServingModel) -> dict[str, Any]:
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    vocabulary = run.config.vocabulary
    inputs = [
        {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": ["rows", *shape]}
        for name, (dtype, shape) in input_shapes(run.spec).items()
    ]
    request_inputs = [
        {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": [s or "items" for s in shape]}
        for name, (dtype, shape) in request_shapes(run.spec).items()
    ]
    return {
        "format": FORMAT,
        "files": {path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in files},
        "inputs": inputs,
        "request_inputs": request_inputs,
        "outputs": [{"name": name, "dtype": "float32", "shape": ["rows"]} for name in model.output_names],
        "sparse": [{"name": f.name, "num_embeddings": f.num_embeddings} for f in run.spec.sparse],
        "dense": [f.name for f in run.spec.dense],
        **({"lists": [{"name": f.name, "input": f.column} for f in run.spec.lists]} if run.spec.lists else {}),
        "scenarios": list(run.spec.scenarios),
        "vocabulary": {"kind": vocabulary.kind}
        | ({"num_buckets": vocabulary.num_buckets} if vocabulary.kind == "hash" else {}),
        "checkpoint": {"name": run.checkpoint.path.name, "step": run.checkpoint.step, "id": run.checkpoint.model_id},
        "table": run.checkpoint.state.get("table"),
        "model": run.config.to_dict()["model"],
        "labels": run.config.to_dict()["labels"],
        "exported_at": f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "versions": {"usr_ray": __version__} | {package: metadata.version(package) for package in _PACKAGES},
    }


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
