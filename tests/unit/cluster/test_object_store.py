"""A lake in an object store, read on Ray's side (no JVM): found through the environment, never through the address."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.folder_s3 import s3_bucket
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.config import UserError
from usr_ray.data.manifest import Manifest, build_manifest, open_filesystem, read_vocabularies, table_address
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.runs.read import read_etl_reports

pytestmark = pytest.mark.integration

DATES = (dt.date(2026, 1, 1), dt.date(2026, 1, 2))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bucket")
    write_samples(root / "lake", samples_spec(), num_rows=300)
    (root / "lake" / "reports").mkdir()
    nothing = {"rows": {}, "rejects": {}, "undated": {"rows": {}, "rejects": {}}, "scenarios": {}}
    for day in ("2026-01-02", "2026-01-01"):
        (root / "lake" / "reports" / f"{day}.json").write_text(json.dumps({"date": day, **nothing}))
    return root


@pytest.fixture
def bucket(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys that were asked for."""
    with s3_bucket(root) as (environment, requests):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield requests


def rows_read(manifest: Manifest) -> list[int]:
    with SampleReader(manifest, Reading(global_batch_size=64, group_size=32)) as reader:
        return [int(n) for batch in reader.batches(0) for n in batch.row_number_B if n >= 0]


@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_a_lake_in_a_bucket_gives_the_rows_and_the_order_of_its_copy_on_disk(
    root: Path, bucket: list[str], scheme: str
) -> None:
    in_bucket = build_manifest(f"{scheme}://shop/lake", dates=DATES)
    on_disk = build_manifest(root / "lake", dates=DATES)
    assert in_bucket.table_uri == f"{scheme}://shop/lake/samples", "one name for the table, as Spark wrote it"
    assert in_bucket.sha256 == on_disk.sha256
    assert rows_read(in_bucket) == rows_read(on_disk)
    assert any(key.endswith(".parquet") for key in bucket), "the rows came through the bucket"


@pytest.mark.usefixtures("bucket")
def test_the_reports_of_a_lake_in_a_bucket_are_read_by_date() -> None:
    assert [report["date"] for report in read_etl_reports("s3://shop/lake")] == ["2026-01-01", "2026-01-02"]
    with pytest.raises(UserError, match="--lake s3://shop/nothing: no such directory"):
        read_etl_reports("s3://shop/nothing")


@pytest.mark.usefixtures("bucket")
def test_a_bucket_without_the_table_is_one_line_that_names_it() -> None:
    with pytest.raises(UserError, match=r"--lake: no Delta table at s3://shop/other/vocabularies; run jobs/build"):
        read_vocabularies("s3://shop/other")


@pytest.mark.usefixtures("bucket")
def test_a_store_that_refuses_says_why_and_where_its_settings_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")  # delta-rs speaks plain HTTP only when told so
    with pytest.raises(UserError) as caught:
        build_manifest("s3://shop/lake", dates=DATES)
    line = str(caught.value)
    assert "cannot be opened" in line
    assert "URL scheme is not allowed" in line, "the cause, which delta-rs puts last"
    assert "keys and endpoint in the environment (docs/cluster.md" in line
    assert "\n" not in line
    assert "\x1b" not in line


@pytest.mark.parametrize(
    "address",
    [
        "s3://test-key:hush-hush@shop/lake",
        "s3a://test-key:hush-hush@shop/lake",
        "s3://shop/lake?secret_key=hush-hush",
        "abfss://box:hush-hush@shop.dfs.core.windows.net/lake",
        "abfss://box@shop.dfs.core.windows.net/lake?sig=hush-hush",
    ],
)
def test_an_address_that_holds_a_key_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(UserError, match="an address must hold no key and no option") as caught:
        build_manifest(address, dates=DATES)
    assert "hush" not in str(caught.value)
    assert "test-key" not in str(caught.value)


def test_addresses_of_other_clouds_are_kept_as_written() -> None:
    assert table_address("gs://shop/lake/", "samples") == "gs://shop/lake/samples"
    azure = "abfss://box@shop.dfs.core.windows.net/lake"
    assert table_address(azure, "samples") == f"{azure}/samples"
    assert open_filesystem("gs://shop/lake")[1] == "shop/lake"
    assert open_filesystem(azure)[1] == "box/lake"


def test_an_address_of_no_known_kind_is_one_line() -> None:
    with pytest.raises(UserError, match=r"ftp://shop/lake: cannot be reached \(Unrecognized filesystem type"):
        open_filesystem("ftp://shop/lake")
