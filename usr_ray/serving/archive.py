"""What may stand in a model.pt2: tensors, JSON and nothing pickled that could run code.

torch.export.load unpickles without its safe mode where an archive says so (a weight with use_pickle, a custom object,
an input that the safe mode refuses). An export of ours has none of that, so an archive that has is not loaded.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

_PLAIN = (
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_CONFIG = re.compile(r"data/(weights/model_weights|constants/model_constants)_config\.json")
_INPUTS = "data/sample_inputs/model.pt"
"""A pickle, but one that torch's safe mode reads; it is read so here first."""


class ArchiveError(Exception):
    """An archive that would be unpickled, or that is none."""


def refuse_pickles(path: Path) -> None:
    """Raise ArchiveError unless the archive can be loaded without unpickling objects."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                # All entries stand in one folder named after the archive.
                name = entry.partition("/")[2]
                if name == _INPUTS:
                    _refuse_unsafe(archive.read(entry))
                elif not re.fullmatch(_PLAIN, name):
                    raise ArchiveError(f"holds {name!r}, which an export of ours does not")
                elif _CONFIG.fullmatch(name):
                    _refuse_pickled_tensors(json.loads(archive.read(entry)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"is no archive of torch.export ({error})") from error


def _refuse_pickled_tensors(config: dict[str, Any]) -> None:
    for name, entry in config["config"].items():
        if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
            raise ArchiveError(f"would unpickle {name!r}")


def _refuse_unsafe(content: bytes) -> None:
    import torch

    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # whatever the safe mode does not take
        raise ArchiveError("would unpickle objects among its sample inputs") from error
