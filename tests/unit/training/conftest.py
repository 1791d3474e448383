"""The lake of four days that trainings of several files read, and its manifests: three days to train, one held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.samples_table import read_manifests, samples_spec, write_samples
from usr_ray.data.manifest import Manifest


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    write_samples(folder, samples_spec(), num_rows=950, num_days=4)
    return folder


@pytest.fixture(scope="module")
def manifests(lake: Path) -> tuple[Manifest, Manifest]:
    return read_manifests(lake)
