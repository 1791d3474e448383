"""Manifest of a samples table, and every table that must be refused instead of being read wrong."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.changed_json import refusals
from tests.unit.samples_table import FIRST_DATE, HOUR_US, samples_arrow, samples_spec, write_samples
from usr_ray.config import DAY_US, UserError
from usr_ray.data.manifest import (
    DataError,
    Manifest,
    build_manifest,
    make_manifest,
    open_filesystem,
    read_footer,
)
from usr_ray.data.mature import WhichRows, labels_close_us, usable_row_groups
from usr_ray.data.parts import DataFile, RowGroup
from usr_ray.runs.evaluations import dates_of
from usr_ray.schema import FEATURE_SPEC_PROPERTY

pytestmark = pytest.mark.unit

SPEC = samples_spec()
DATES = (FIRST_DATE, FIRST_DATE + dt.timedelta(days=3))
START_US = (FIRST_DATE - dt.date(1970, 1, 1)).days * DAY_US


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lake = tmp_path_factory.mktemp("manifest")
    write_samples(lake, SPEC)
    return lake


@pytest.fixture
def lake(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "lake"))


def edit_log(lake: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply `change` to every action of the table's log."""
    for path in sorted((lake / "samples" / "_delta_log").glob("*.json")):
        actions = [json.loads(line) for line in path.read_text().splitlines()]
        for action in actions:
            change(action)
        path.write_text("".join(json.dumps(action) + "\n" for action in actions))


def data_files(lake: Path) -> list[Path]:
    return sorted((lake / "samples").glob("impression_date=*/*.parquet"))


def test_manifest_holds_files_row_groups_and_spec_of_the_pinned_version(built: Path) -> None:
    manifest = build_manifest(built, dates=DATES)
    assert manifest.spec == SPEC
    assert manifest.version == 1  # 0 wrote the rows, 1 set the property
    assert manifest.num_rows == 600
    assert manifest.dates == ("2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04")
    root = built / "samples"
    assert [file.path for file in manifest.files] == [str(path.relative_to(root)) for path in data_files(built)]
    first_row = 0
    refs = manifest.row_groups()
    for file in manifest.files:
        parquet = pq.ParquetFile(root / file.path)
        assert file.size_bytes == (root / file.path).stat().st_size
        assert len(file.row_groups) == parquet.metadata.num_row_groups > 1
        for index, group in enumerate(file.row_groups):
            rows = parquet.read_row_group(index, columns=["event_time", "is_mature"]).to_pylist()
            times = [row["event_time"] for row in rows]
            assert group.num_rows == len(rows)
            epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
            micro = dt.timedelta(microseconds=1)
            assert group.min_event_time_us == (min(times) - epoch) // micro
            assert group.max_event_time_us == (max(times) - epoch) // micro
            assert group.has_mature == any(row["is_mature"] for row in rows)
            ref = next(refs)
            assert (ref.first_row, ref.index, ref.row_group) == (first_row, index, group)
            assert manifest.files[ref.file] == file
            first_row += len(rows)
    assert next(refs, None) is None


def test_manifest_takes_only_the_asked_dates(built: Path) -> None:
    second = FIRST_DATE + dt.timedelta(days=1)
    manifest = build_manifest(built, dates=(second, second))
    assert manifest.dates == ("2026-01-02",)
    whole = build_manifest(built, dates=DATES)
    assert manifest.num_rows == sum(g.num_rows for f in whole.files if f.date == "2026-01-02" for g in f.row_groups)
    assert manifest.sha256 != whole.sha256


def test_the_table_s_first_days_are_left_out_of_training(built: Path) -> None:
    every = build_manifest(built, dates=DATES).dates
    assert build_manifest(built, dates=DATES, warmup_days=2).dates == every[2:]
    assert build_manifest(built, dates=(DATES[1], DATES[1]), warmup_days=2).dates == every[-1:]
    with pytest.raises(UserError, match=r"no rows in .*, and counters.warmup_days leaves out those before 2026-01-03"):
        build_manifest(built, dates=(DATES[0], DATES[0]), warmup_days=2)


def test_the_first_days_are_those_of_the_counters_and_stay_so_when_the_table_loses_its_own(
    lake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Old partitions may be deleted (docs/operations.md); the counters still know those days."""
    counted = pa.table({"name": ["*", "*"], "event_date": [DATES[0], DATES[1]]})
    deltalake.write_deltalake(lake / "counters", counted, partition_by=["event_date"])
    assert build_manifest(lake, dates=DATES, warmup_days=1).dates == ("2026-01-02", "2026-01-03", "2026-01-04")
    assert capsys.readouterr().out == "--dates: counters.warmup_days = 1 leaves out 2026-01-01\n"
    deltalake.DeltaTable(lake / "samples").delete("impression_date < '2026-01-03'")
    left = (DATES[0] + dt.timedelta(days=2), DATES[1])
    assert build_manifest(lake, dates=left, warmup_days=1).dates == ("2026-01-03", "2026-01-04")
    assert capsys.readouterr().out == ""


def test_an_older_version_is_read_as_it_was(lake: Path) -> None:
    before = build_manifest(lake, dates=DATES)
    table = samples_arrow(SPEC, num_rows=50, num_days=1, seed=5)
    deltalake.write_deltalake(lake / "samples", table, mode="append", partition_by=["impression_date"])
    assert build_manifest(lake, dates=DATES).num_rows == 650
    assert build_manifest(lake, dates=DATES, version=1) == before


def test_manifest_survives_saving_and_loading(built: Path, tmp_path: Path) -> None:
    manifest = build_manifest(built, dates=DATES)
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_hash_is_of_the_rows_order_not_of_the_place(built: Path, lake: Path) -> None:
    here, copy = build_manifest(built, dates=DATES), build_manifest(lake, dates=DATES)
    assert here.table_uri != copy.table_uri
    assert here.sha256 == copy.sha256
    files = list(here.files)
    again = make_manifest(table_uri="x", version=7, spec=SPEC, files=files[::-1])
    assert again.sha256 == here.sha256
    fewer = make_manifest(table_uri="x", version=7, spec=SPEC, files=files[1:])
    group = files[0].row_groups[0]
    grown = dataclasses.replace(group, num_rows=group.num_rows + 1)
    changed = dataclasses.replace(files[0], row_groups=(grown, *files[0].row_groups[1:]))
    other = make_manifest(table_uri="x", version=7, spec=SPEC, files=[changed, *files[1:]])
    assert len({here.sha256, fewer.sha256, other.sha256}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        ("{", "is not readable JSON"),
        ("{}", r"not a manifest \('format'\)"),
        ('{"format": 99}', "not a manifest .format 99, this version reads 1"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Manifest.load(tmp_path / "m.json")


def test_a_manifest_changed_by_hand_is_refused(built: Path, tmp_path: Path) -> None:
    build_manifest(built, dates=DATES).save(tmp_path / "m.json")
    raw = json.loads((tmp_path / "m.json").read_text())
    whole = json.dumps(raw)
    raw["files"][0]["row_groups"][0]["num_rows"] += 1
    (tmp_path / "m.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="its hash does not match its files"):
        Manifest.load(tmp_path / "m.json")
    for key, text, problem in (
        ("built_with", "{", r"Expecting property name"),
        ("built_with", "[]", "built_with is a list, needed an object"),
        ("fitted", '{"dates": "2026-01-01"}', "fitted.min_count is missing"),
    ):
        (tmp_path / "m.json").write_text(json.dumps(json.loads(whole) | {key: text}))
        with pytest.raises(UserError, match=rf"m.json: not a manifest \({problem}.*\); build it again from the lake"):
            Manifest.load(tmp_path / "m.json")


def test_a_manifest_changed_anywhere_is_refused_or_read(built: Path, tmp_path: Path) -> None:
    build_manifest(built, dates=DATES).save(tmp_path / "m.json")
    lines = refusals(tmp_path / "m.json", lambda: list(Manifest.load(tmp_path / "m.json").row_groups()))
    assert len(lines) > 150
    assert all(line.removeprefix("manifest ").startswith(f"{tmp_path}/m.json: ") for line in lines)
    assert all(line.endswith("; build it again from the lake") for line in lines)


def test_a_lake_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--lake: no Delta table at .*/samples; run jobs/build_samples.py"):
        build_manifest(tmp_path, dates=DATES)


def test_an_unknown_version_is_refused(built: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened at version 99"):
        build_manifest(built, dates=DATES, version=99)


def test_dates_without_rows_are_refused_with_those_that_have(built: Path) -> None:
    late = dt.date(2027, 5, 1)
    with pytest.raises(UserError, match="no rows in 2027-05-01:2027-05-01; the table holds 2026-01-01:2026-01-04"):
        build_manifest(built, dates=(late, late))


def test_dates_of_which_some_have_no_rows_are_refused_unless_that_is_allowed(
    lake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deltalake.DeltaTable(lake / "samples").delete("impression_date = '2026-01-02'")
    asked = (FIRST_DATE, FIRST_DATE + dt.timedelta(days=5))
    with pytest.raises(UserError) as error:
        build_manifest(lake, dates=asked, where="data.train_dates")
    assert str(error.value) == (
        "data.train_dates 2026-01-01:2026-01-06: 3 of these 6 dates have no rows: 2026-01-02, 2026-01-05:2026-01-06; "
        f"the table {lake}/samples holds 2026-01-01, 2026-01-03:2026-01-04; name dates of those, or take the ones "
        "that are there with --allow-missing-dates"
    )
    assert not capsys.readouterr().out
    assert build_manifest(lake, dates=None).dates == ("2026-01-01", "2026-01-03", "2026-01-04")
    manifest = build_manifest(lake, dates=asked, allow_missing=True)
    assert manifest.dates == ("2026-01-01", "2026-01-03", "2026-01-04")
    assert dates_of(manifest, np.array([manifest.num_rows - 1, 0])) == ("2026-01-01", "2026-01-04")
    gone = "2026-01-02, 2026-01-05:2026-01-06"
    assert capsys.readouterr().out == (
        f"warning: --dates 2026-01-01:2026-01-06: without {gone}, of which there are no rows\n"
    )


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    schema = samples_arrow(SPEC, num_rows=1, num_days=1).schema
    deltalake.DeltaTable.create(
        tmp_path / "samples",
        schema=schema,
        partition_by=["impression_date"],
        configuration={FEATURE_SPEC_PROPERTY: SPEC.to_json()},
        raise_if_key_not_exists=False,
    )
    with pytest.raises(UserError, match=r"no rows in .*; the table is empty"):
        build_manifest(tmp_path, dates=DATES)


@pytest.mark.parametrize("mode", ["name", "id"])
def test_column_mapping_is_refused(lake: Path, mode: str) -> None:
    # A legacy-protocol table with mapped columns opens without an error, and every column reads back null.
    def mapped(action: dict[str, Any]) -> None:
        if "protocol" in action:
            action["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
        if "metaData" in action:
            action["metaData"]["configuration"]["delta.columnMapping.mode"] = mode
            schema = json.loads(action["metaData"]["schemaString"])
            for number, field in enumerate(schema["fields"], 1):
                physical = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": field["name"]}
                field["metadata"] = physical
            action["metaData"]["schemaString"] = json.dumps(schema)

    edit_log(lake, mapped)
    with pytest.raises(DataError, match=f"delta.columnMapping.mode is '{mode}', which is not read here"):
        build_manifest(lake, dates=DATES)


def deletion_vector(rows: list[int]) -> dict[str, Any]:
    """An inline deletion vector, from the Delta protocol: Z85 of a portable roaring bitmap array."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    raw = struct.pack("<iqi", 1681511377, 1, 0) + struct.pack("<iiHHi", 12346, 1, 0, len(rows) - 1, 16)
    raw += b"".join(struct.pack("<H", row) for row in rows)
    text = ""
    for start in range(0, len(raw), 4):
        number = int.from_bytes(raw[start : start + 4], "big")
        text += "".join(digits[number // 85**power % 85] for power in (4, 3, 2, 1, 0))
    return {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": len(raw), "cardinality": len(rows)}


@pytest.mark.parametrize("is_readable", [True, False])
def test_deletion_vectors_are_refused_where_they_touch_the_dates(lake: Path, is_readable: bool) -> None:
    vector = deletion_vector([3, 5]) | ({} if is_readable else {"pathOrInlineDv": "0" * 45})

    def deleted(action: dict[str, Any]) -> None:
        if "protocol" in action:
            features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
            action["protocol"] = {"minReaderVersion": 3, "minWriterVersion": 7, **features}
        if "add" in action and action["add"]["partitionValues"]["impression_date"] == "2026-01-02":
            action["add"]["deletionVector"] = vector

    edit_log(lake, deleted)
    with pytest.raises(
        DataError, match=r"deletion vectors are in use, for example on impression_date=2026-01-0.*PURGE"
    ):
        build_manifest(lake, dates=DATES)
    if is_readable:
        assert build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE)).dates == ("2026-01-01",)


def test_a_table_without_feature_spec_is_refused(lake: Path) -> None:
    edit_log(lake, lambda action: action.get("metaData", {}).get("configuration", {}).clear())
    with pytest.raises(DataError, match=r"the table property usr_ray.feature_spec is missing"):
        build_manifest(lake, dates=DATES)


@pytest.mark.parametrize("text", ["{", "{}", '{"scenarios": 1}'])
def test_a_feature_spec_that_cannot_be_read_is_refused(lake: Path, text: str) -> None:
    def spoil(action: dict[str, Any]) -> None:
        if "metaData" in action and action["metaData"]["configuration"]:
            action["metaData"]["configuration"][FEATURE_SPEC_PROPERTY] = text

    edit_log(lake, spoil)
    with pytest.raises(DataError, match=r"the table property usr_ray.feature_spec cannot be read"):
        build_manifest(lake, dates=DATES)


def test_missing_columns_and_wrong_types_are_refused_by_name(tmp_path: Path) -> None:
    table = samples_arrow(SPEC, num_rows=20, num_days=1).drop_columns(["price_scaled"])
    position = table.column_names.index("user_key")
    table = table.set_column(position, "user_key", table.column("user_key").cast(pa.int32()))
    deltalake.write_deltalake(tmp_path / "samples", table, partition_by=["impression_date"])
    deltalake.DeltaTable(tmp_path / "samples").alter.set_table_properties(
        {FEATURE_SPEC_PROPERTY: SPEC.to_json()}, raise_if_not_exists=False
    )
    message = "wrong columns: price_scaled is missing, needed float; user_key is integer, needed long; rebuild"
    with pytest.raises(DataError, match=message):
        build_manifest(tmp_path, dates=DATES)


def test_another_partitioning_is_refused(tmp_path: Path) -> None:
    deltalake.write_deltalake(tmp_path / "samples", samples_arrow(SPEC, num_rows=20, num_days=1))
    with pytest.raises(DataError, match="not partitioned by impression_date"):
        build_manifest(tmp_path, dates=DATES)


def test_a_missing_file_is_named(lake: Path) -> None:
    data_files(lake)[2].unlink()
    with pytest.raises(DataError, match=f"{data_files(lake)[0].parent.parent}.*-01-03.*the file is missing"):
        build_manifest(lake, dates=DATES)


@pytest.mark.parametrize("kept", [0, 5000])
def test_an_empty_or_cut_file_is_named(lake: Path, kept: int) -> None:
    path = data_files(lake)[1]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=f"{path}: the file has {kept} bytes, the table's log says {size}"):
        build_manifest(lake, dates=DATES)


def test_a_file_of_the_right_size_that_is_no_parquet_is_named(lake: Path) -> None:
    path = data_files(lake)[1]
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=f"{path}: not a readable Parquet file"):
        build_manifest(lake, dates=DATES)


def test_a_file_with_other_rows_than_the_log_says_is_named(lake: Path) -> None:
    path = data_files(lake)[0]
    filesystem, root = open_filesystem(str(lake / "samples"))
    inside = str(path.relative_to(lake / "samples"))
    with pytest.raises(DataError, match=r"the footer counts \d+ rows, the table's log 5"):
        read_footer(filesystem, root, inside, date=FIRST_DATE, size_bytes=path.stat().st_size, num_rows=5)


def test_without_statistics_the_date_bounds_the_time_and_maturity_is_read(tmp_path: Path) -> None:
    # Spark's default INT96 timestamps have no statistics at all.
    table = samples_arrow(SPEC, num_rows=40, num_days=1)
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, use_deprecated_int96_timestamps=True, write_statistics=False, row_group_size=25)
    filesystem, root = open_filesystem(str(tmp_path))
    size = path.stat().st_size
    file = read_footer(filesystem, root, "a.parquet", date=FIRST_DATE, size_bytes=size, num_rows=None)
    assert [group.num_rows for group in file.row_groups] == [25, 15]
    mature = table.column("is_mature").to_pylist()
    assert [group.has_mature for group in file.row_groups] == [any(mature[:25]), any(mature[25:])]
    for group in file.row_groups:
        assert (group.min_event_time_us, group.max_event_time_us) == (START_US, START_US + DAY_US - 1)


def test_labels_close_after_the_delay_or_after_the_day_and_the_delay() -> None:
    time_us = np.array([START_US, START_US + 5 * HOUR_US, START_US + DAY_US - 1, START_US + DAY_US])
    spec = samples_spec(label_delay_us=25 * HOUR_US)
    assert (labels_close_us(time_us, spec) == time_us + 25 * HOUR_US).all()
    by_day = dataclasses.replace(spec, label_day_span=True)
    ends = [START_US + DAY_US] * 3 + [START_US + 2 * DAY_US]
    assert labels_close_us(time_us, by_day).tolist() == [end + 25 * HOUR_US for end in ends]


def plain_manifest(*, mature: list[bool], hours: list[int]) -> Manifest:
    groups = tuple(
        RowGroup(
            num_rows=10,
            num_bytes=1,
            min_event_time_us=START_US + h * HOUR_US,
            max_event_time_us=START_US + (h + 1) * HOUR_US,
            has_mature=m,
        )
        for m, h in zip(mature, hours, strict=True)
    )
    file = DataFile(path="a", date="2026-01-01", size_bytes=1, row_groups=groups)
    return make_manifest(table_uri="/lake/samples", version=0, spec=SPEC, files=[file])


def test_row_groups_that_cannot_count_are_not_read_and_rows_keep_their_numbers() -> None:
    manifest = plain_manifest(mature=[True, False, True, True], hours=[0, 1, 2, 3])
    # Labels close 25 hours after: the last row group's first row at hour 28.
    cut_off = START_US + 27 * HOUR_US

    def first_rows(**options: Any) -> list[int]:
        return [ref.first_row for ref in usable_row_groups(manifest, WhichRows(**options))]

    assert first_rows(ready_before_us=None, mature_only=True) == [0, 20, 30]
    assert first_rows(ready_before_us=cut_off, mature_only=True) == [0, 20]
    assert first_rows(ready_before_us=cut_off, mature_only=False) == [0, 10, 20]
    assert first_rows(ready_before_us=cut_off - 1, mature_only=False) == [0, 10]
    # Clicks close 24 hours before orders.
    clicks = cut_off - 24 * HOUR_US
    assert first_rows(ready_before_us=clicks, mature_only=True, order_wait_us=24 * HOUR_US) == [0, 20]
    with pytest.raises(DataError, match=r"no row's labels are final by .* \(they close 1 hours after"):
        first_rows(ready_before_us=START_US, mature_only=True, order_wait_us=24 * HOUR_US)


def test_a_table_without_a_mature_row_is_refused() -> None:
    manifest = plain_manifest(mature=[False, False], hours=[0, 1])
    with pytest.raises(
        DataError, match=r"none of the 20 rows is mature; rebuild .*--watermark.*data.mature_only=false"
    ):
        usable_row_groups(manifest, WhichRows(ready_before_us=START_US + 99 * HOUR_US))
    with pytest.raises(DataError, match=r"none of the 20 rows is mature; rebuild .*--watermark, or name earlier dates"):
        usable_row_groups(manifest, WhichRows())  # an evaluation, which never reads them


def test_a_cut_off_before_all_labels_is_refused() -> None:
    manifest = plain_manifest(mature=[True, True], hours=[0, 1])
    message = r"no row's labels are final by 2026-01-01T00:00:00Z \(they close 25 hours after the impression\)"
    with pytest.raises(DataError, match=message):
        usable_row_groups(manifest, WhichRows(ready_before_us=START_US))
