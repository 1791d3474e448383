"""The rows of a samples table as the files hold them, and what is said of a file that is gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.data.manifest import DataError, Manifest, build_manifest
from usr_ray.data.rows import micros, read_rows
from usr_ray.serving.publish import golden_requests
from usr_ray.serving.stores import newest_features

pytestmark = pytest.mark.unit


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    write_samples(tmp_path, samples_spec(), num_rows=60, num_days=3)
    return build_manifest(tmp_path, dates=None)


def test_rows_come_in_the_order_of_the_manifest_with_the_columns_asked_for(manifest: Manifest) -> None:
    found = [(file.path, rows) for file, rows in read_rows(manifest, ["item_id", "event_time"])]
    groups = [(file.path, group.num_rows) for file in manifest.files for group in file.row_groups]
    assert [(path, rows.num_rows) for path, rows in found] == groups
    assert all(rows.column_names == ["item_id", "event_time"] for _, rows in found)
    assert all("is_click" in rows.column_names for _, rows in read_rows(manifest))


@pytest.mark.parametrize(
    "read",
    [
        lambda manifest: list(read_rows(manifest)),
        lambda manifest: golden_requests(manifest, "2026-01-04T00:00:00Z"),
        lambda manifest: newest_features(manifest, "item_id", "item"),
    ],
)
def test_a_file_that_is_gone_is_one_line(manifest: Manifest, read: Callable[[Manifest], Any]) -> None:
    gone = Path(manifest.table_uri) / manifest.files[-1].path
    gone.unlink()
    with pytest.raises(DataError, match="cannot be read") as raised:
        read(manifest)
    assert str(raised.value).startswith(f"{gone}: cannot be read (")
    assert str(raised.value).endswith("; rebuild its date with jobs/build_samples.py")
    assert "\n" not in str(raised.value)


def test_a_column_that_is_missing_is_one_line(manifest: Manifest) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(.*sku.*\); rebuild its date"):
        list(read_rows(manifest, ["sku"]))


def test_times_are_microseconds_of_any_unit_and_zone() -> None:
    assert micros(pa.array([7_000], pa.timestamp("ns"))).tolist() == [7]
    assert micros(pa.chunked_array([[2], [3]], pa.timestamp("s", tz="Asia/Tokyo"))).tolist() == [2_000_000, 3_000_000]
