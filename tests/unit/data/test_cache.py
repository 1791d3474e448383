"""The cache of decoded row groups: the same batches with and without it, and no harm when the disk gives up."""

from __future__ import annotations

import dataclasses
import datetime as dt
import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.config import ConfigError, load_config
from usr_ray.data.batch import UsrBatch
from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.data.reader import Reading, SampleReader

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    lake = tmp_path_factory.mktemp("cache")
    write_samples(lake, samples_spec(), num_rows=200, num_days=2, row_group_rows=30)
    return build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE + dt.timedelta(days=1)))


def read(manifest: Manifest, **options: Any) -> list[UsrBatch]:
    sizes = {"global_batch_size": 32, "group_size": 8, "block_rows": 64, "mature_only": False}
    with SampleReader(manifest, Reading(**sizes, **options)) as reader:
        return list(reader.batches(0))


def flat(batches: list[UsrBatch]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for batch in batches:
        batch.map(lambda tensor: found.append(tensor) or tensor)
    return found


def equal(a: list[UsrBatch], b: list[UsrBatch]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.arrow"))


@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_batches_are_the_same_when_written_when_read_back_and_without(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    plain = read(manifest, order=order)
    assert equal(read(manifest, order=order, cache_dir=tmp_path), plain)
    assert len(cached_files(tmp_path)) == sum(len(file.row_groups) for file in manifest.files)
    assert not list(tmp_path.glob("*/.*")), "no half-written file is left"

    def no_parquet(*values: object, **options: object) -> None:
        raise AssertionError("Parquet was read although the cache is full")

    monkeypatch.setattr(RowGroupDecoder, "read", no_parquet)
    assert equal(read(manifest, order=order, cache_dir=tmp_path), plain)


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:999]), Path.unlink]
)
def test_a_damaged_file_is_decoded_again_and_replaced(manifest: Manifest, tmp_path: Path, damage: Any) -> None:
    plain = read(manifest, cache_dir=tmp_path)
    victim = cached_files(tmp_path)[1]
    before = victim.read_bytes()
    damage(victim)
    assert equal(read(manifest, cache_dir=tmp_path), plain)
    assert victim.read_bytes() == before


def test_tables_and_columns_have_folders_of_their_own(manifest: Manifest, tmp_path: Path) -> None:
    read(manifest, cache_dir=tmp_path)
    fewer = dataclasses.replace(manifest, sha256="0" * 64)
    read(fewer, cache_dir=tmp_path)
    read(manifest, cache_dir=tmp_path, ready_before_us=1 << 60)  # event_time is read as well
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_warns_once_and_the_reading_goes_on(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = read(manifest)
    calls = []

    def full(source: object, target: object) -> None:
        calls.append(target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("usr_ray.data.decode.os.replace", full)
    with pytest.warns(
        UserWarning,
        match=r"train.reader_cache: .*No space left on device; [\d.]+ MB needed .*from Parquet .*free space there",
    ) as caught:
        assert equal(read(manifest, cache_dir=tmp_path, num_threads=1), plain)
    assert len(caught) == 1
    assert len(calls) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made_warns_too(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        read(manifest, cache_dir=tmp_path / "file")


def test_without_a_cache_nothing_is_written_and_nothing_warns(manifest: Manifest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(manifest)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", r"train.reader_shards must be in \[1, 65536\], got 0"),
        ("3", r"train.reader_shards \(3\) must divide .* \(1024\)"),
    ],
)
def test_shards_that_do_not_divide_the_batch_are_refused(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"train.reader_shards={value}"])
