"""An export directory as its users open it: checked files, and a model that takes and gives numpy arrays.

Needs torch for model.pt2, or onnxruntime (and no torch) for model.onnx.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from usr_ray.config import UserError
from usr_ray.config.stored import Shape, misfit, read_json, requiring
from usr_ray.files import file_sha256
from usr_ray.serving.archive import ArchiveError, refuse_pickles

FORMAT = 1
"""Format of manifest.json; another number is refused."""
MANIFEST, PT2, ONNX, REQUEST = "manifest.json", "model.pt2", "model.onnx", "request.onnx"
WEIGHTS, FEATURE_SPEC, VOCABULARIES = "weights.safetensors", "feature_spec.json", "vocabularies.parquet"
RUNTIMES = {"torch": PT2, "onnx": ONNX}
_INPUT: Shape = {"name": str, "dtype": str, "shape": [object]}
FILES: Shape = {"*": {"bytes": int, "sha256": str}}
_SHAPE: Shape = {
    "files?": FILES,
    "inputs?": [_INPUT],
    "request_inputs?": [_INPUT],
    "outputs?": [{"name": str}],
    "scenarios?": [str],
    "checkpoint?": {"id": str},
}
_EXPORT_AGAIN = "export the run again with jobs/export.py"


class ExportError(UserError):
    """A model that cannot be exported, or an export directory that cannot be used."""


def require_packages(*packages: str) -> None:
    """Raise ExportError, naming the extra that brings them, when one of `packages` is not installed here."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"not installed here: {', '.join(missing)}; install usr-ray[serve]")


def described(path: Path, number: int, shape: Shape, *, error: type[UserError], way_out: str) -> dict[str, Any]:
    """The JSON that describes the files of its folder: `format`, and `files` with their checksums.

    Args:
        number: the format that is read here; another is refused.
        shape: of its other entries.
        error: raised where there is none, or of another format.
        way_out: ends the message of that error.
    """
    try:
        content: dict[str, Any] = read_json(path, {})
    except UserError as cause:
        raise error(f"{path.parent}: holds no readable {path.name}; {way_out}") from cause
    if content.get("format") != number:
        raise error(f"{path.parent}: format {content.get('format')}, this version reads {number}; {way_out}")
    if problem := misfit(content, shape):
        raise error(f"{path}: is damaged ({problem}); {way_out}")
    return content


def changed_file(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """The first of `files` (name in the folder -> its bytes and sha256) that is missing or another one."""
    for name, file in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["bytes"] or file_sha256(path) != file["sha256"]:
            return path
    return None


def read_manifest(directory: Path, *needed: str) -> dict[str, Any]:
    """manifest.json of an export directory with these entries; its files are not looked at. Raises ExportError."""
    return described(directory / MANIFEST, FORMAT, requiring(_SHAPE, needed), error=ExportError, way_out=_EXPORT_AGAIN)


def verified_manifest(directory: Path, *needed: str) -> dict[str, Any]:
    """manifest.json of an export directory with these entries, after the checksums of all files were verified.

    Raises:
        ExportError: no export there, of another format, or a file that is missing or was changed.
    """
    manifest = read_manifest(directory, "files", *needed)
    if changed := changed_file(directory, manifest["files"]):
        raise ExportError(f"{changed}: missing or changed since the export; {_EXPORT_AGAIN}")
    return manifest


def require_program(directory: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Raise ExportError where a published version lacks the program for rows, which a GPU takes."""
    if name not in manifest["files"]:
        raise ExportError(f"{directory}: holds no {name}; publish the run with jobs/publish.py --for-gpu")


def _no_gpu() -> ExportError:
    return ExportError(
        "--device cuda: ONNX Runtime finds no GPU here; install onnxruntime-gpu in place of onnxruntime, on a machine "
        "with one, or leave --device out"
    )


def _provider(device: str) -> tuple[str, dict[str, str]]:
    import onnxruntime

    if device == "cpu":
        return "CPUExecutionProvider", {}
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise _no_gpu()
    return "CUDAExecutionProvider", {"use_tf32": "0"}


class ExportedModel:
    """A verified export, ready to score.

    Args:
        runtime: 'torch' (model.pt2) or 'onnx' (model.onnx).
        num_threads: threads of one call with 'onnx'; torch's own setting holds for 'torch'.
        device: 'cpu', or 'cuda' with 'onnx': ONNX Runtime's CUDA provider, in float32 without TF32.
        per_request: open request.onnx, which takes one user and any number of candidates (`request_inputs` of
            manifest.json), in place of the program that takes rows; for 'onnx' only.

    Raises:
        ExportError: see `verified_manifest`; an unknown runtime; its package is not installed.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        runtime: str = "onnx",
        num_threads: int = 1,
        per_request: bool = False,
        device: str = "cpu",
    ) -> None:
        if runtime not in RUNTIMES or (per_request and runtime != "onnx"):
            of_all = "onnx" if per_request else ", ".join(RUNTIMES)
            raise ExportError(f"runtime {runtime!r} is not known; choose from: {of_all}")
        require_packages("onnxruntime" if runtime == "onnx" else "torch")
        path = Path(directory)
        inputs = "request_inputs" if per_request else "inputs"
        self.manifest = verified_manifest(path, inputs, "outputs", "scenarios")
        if per_request and REQUEST not in self.manifest["files"]:
            raise ExportError(f"{path}: holds no {REQUEST}; export the run again with jobs/export.py")
        if device != "cpu":
            require_program(path, self.manifest, ONNX)
        self._inputs = {i["name"]: i for i in self.manifest[inputs]}
        self._outputs = [output["name"] for output in self.manifest["outputs"]]
        self._module: Any = None
        self._session: Any = None
        if runtime == "onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = num_threads
            program = path / (REQUEST if per_request else ONNX)
            provider = _provider(device)
            self._session = onnxruntime.InferenceSession(str(program), options, providers=[provider])
            if self._session.get_providers()[0] != provider[0]:  # it falls back to the CPU, with a warning of its own
                raise _no_gpu()
        else:
            import torch

            try:
                refuse_pickles(path / PT2)
            except ArchiveError as error:
                raise ExportError(f"{path / PT2}: {error}; export the run again (jobs/export.py)") from error
            self._module = torch.export.load(path / PT2).module()

    def predict(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Output name -> float32 (rows or candidates) of inputs by name (manifest.json lists names, types, shapes).

        Raises:
            ExportError: an input is missing, unknown, or of another type or shape; a scenario that the model lacks.
        """
        self._check(inputs)
        if self._session is not None:
            values = self._session.run(self._outputs, dict(inputs))
            return dict(zip(self._outputs, values, strict=True))
        import torch

        tensors = {name: torch.from_numpy(inputs[name]) for name in self._inputs}
        with torch.inference_mode():
            outputs = self._module(tensors)
        return {name: outputs[name].numpy() for name in self._outputs}

    def _check(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        wanted = self._inputs
        if set(inputs) != set(wanted):
            missing, unknown = sorted(set(wanted) - set(inputs)), sorted(set(inputs) - set(wanted))
            raise ExportError(
                f"inputs: missing {', '.join(missing) or 'none'}, unknown {', '.join(unknown) or 'none'}; the model "
                f"takes: {', '.join(wanted)}"
            )
        num_rows = next(inputs[name].shape[0] for name, i in wanted.items() if isinstance(i["shape"][0], str))
        for name, value in inputs.items():
            first, *rest = wanted[name]["shape"]
            dtype, shape = wanted[name]["dtype"], (num_rows if isinstance(first, str) else first, *rest)
            if value.shape != shape or value.dtype != dtype:
                raise ExportError(f"input {name}: is {value.dtype} {value.shape}; the model takes {dtype} {shape}")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                row = int(np.argwhere(~np.isfinite(value))[0][0])
                raise ExportError(f"input {name}: holds NaN or infinity in row {row}; the model takes finite numbers")
        scenarios = inputs["scenario"]
        if num_rows and not 0 <= scenarios.min() <= scenarios.max() < len(self.manifest["scenarios"]):
            raise ExportError(
                f"input scenario: holds {scenarios.min()} to {scenarios.max()}; the model has scenarios 0 to "
                f"{len(self.manifest['scenarios']) - 1}"
            )
