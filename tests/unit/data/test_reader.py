"""The reader against the raw table read by pyarrow: each row once, the same batches for any number of workers."""

from __future__ import annotations

import dataclasses
import datetime as dt
import gc
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.unit.samples_table import FIRST_DATE, HOUR_US, samples_spec, write_samples
from usr_ray.config import DAY_US, UserError
from usr_ray.data.batch import UsrBatch
from usr_ray.data.manifest import DataError, Manifest, build_manifest
from usr_ray.data.reader import Reading, SampleReader, _Stream
from usr_ray.schema import ALL_LABELS, OPEN_LABEL

pytestmark = pytest.mark.unit

NUM_ROWS = 613
SPEC = samples_spec()
DATES = (FIRST_DATE, FIRST_DATE + dt.timedelta(days=3))
START_US = (FIRST_DATE - dt.date(1970, 1, 1)).days * DAY_US
SIZES: dict[str, Any] = {"global_batch_size": 40, "group_size": 8, "block_rows": 150, "mature_only": False}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    write_samples(folder, SPEC, num_rows=NUM_ROWS, row_group_rows=37)
    return folder


@pytest.fixture(scope="module")
def manifest(lake: Path) -> Manifest:
    return build_manifest(lake, dates=DATES)


@pytest.fixture(scope="module")
def raw_rows(manifest: Manifest) -> list[dict[str, Any]]:
    return raw_table_rows(manifest)


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("usr-ray-reader")]
    assert not left


def raw_table_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """The table as plain Python, in row_number order."""
    root = Path(manifest.table_uri)
    return [row for file in manifest.files for row in pq.ParquetFile(root / file.path).read().to_pylist()]


def expected_row(row: dict[str, Any]) -> dict[str, Any]:
    """A raw row as the batch should hold it."""
    values = {
        "labels_BT": [row[name] for name in ALL_LABELS],
        "scenario_B": row["scenario_index"],
        "sparse_BF": [row[feature.column] for feature in SPEC.sparse],
        "dense_BF": [row[feature.column] for feature in SPEC.dense],
        "user_key_B": row["user_key"],
        "request_key_B": row["request_key"],
    }
    for n, names in enumerate(SPEC.histories):
        values[f"items_{n}"], values[f"actions_{n}"] = row[names.item_ids], row[names.actions]
        values[f"ages_{n}"] = row[names.ages_s]
        values[f"queries_{n}"] = row[names.query_ids] if names.query_ids else None
    return values


def batch_row(batch: UsrBatch, b: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in ("labels_BT", "scenario_B", "sparse_BF", "dense_BF", "user_key_B", "request_key_B"):
        values[name] = getattr(batch, name)[b].tolist()
    for n, history in enumerate(batch.histories):
        first, last = int(history.offsets[b]), int(history.offsets[b + 1])
        values[f"items_{n}"] = history.item_ids_V[first:last].tolist()
        values[f"actions_{n}"] = history.actions_V[first:last].tolist()
        values[f"ages_{n}"] = history.ages_s_V[first:last].tolist()
        values[f"queries_{n}"] = None if history.query_ids_V is None else history.query_ids_V[first:last].tolist()
    return values


def read(manifest: Manifest, *, epoch: int = 0, start_step: int = 0, **options: Any) -> list[UsrBatch]:
    with SampleReader(manifest, Reading(**{**SIZES, **options})) as reader:
        return list(reader.batches(epoch, start_step))


def row_numbers(batches: list[UsrBatch]) -> list[int]:
    return [n for batch in batches for n in batch.row_number_B.tolist() if n >= 0]


def tensors(batch: UsrBatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found


def same(a: UsrBatch, b: UsrBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def joined(parts: list[UsrBatch]) -> UsrBatch:
    """The ranks' batches end to end, by torch.cat."""
    flat = [tensors(part) for part in parts]
    offsets = {id(history.offsets) for history in parts[0].histories}
    whole: list[torch.Tensor] = []
    for n, first in enumerate(flat[0]):
        if id(first) in offsets:
            lengths = torch.cat([rank[n].diff() for rank in flat])
            whole.append(torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
        else:
            whole.append(torch.cat([rank[n] for rank in flat]))
    remaining = iter(whole)
    return parts[0].map(lambda _: next(remaining))


@pytest.mark.parametrize(("order", "num_shards"), [("shuffled", 1), ("shuffled", 4), ("by_date", 1), ("file", 1)])
def test_every_row_comes_once_with_the_values_of_the_table(
    manifest: Manifest, raw_rows: list[dict[str, Any]], order: str, num_shards: int
) -> None:
    batches = read(manifest, order=order, num_shards=num_shards)
    assert sorted(row_numbers(batches)) == list(range(NUM_ROWS))
    assert len(batches) == 16  # 613 rows in steps of 40
    for batch in batches:
        assert len(batch) == 40
        for b, number in enumerate(batch.row_number_B.tolist()):
            if number >= 0:
                assert batch_row(batch, b) == expected_row(raw_rows[number])


@pytest.mark.integration
@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("order", ["shuffled", "by_date", "file"])
def test_any_number_of_workers_sees_the_same_global_batches(manifest: Manifest, order: str, num_shards: int) -> None:
    options = {"order": order, "num_shards": num_shards, "seed": 11, "epoch": 2}
    alone = read(manifest, **options)
    for world_size in (2, 3, 4) if order == "shuffled" else (3,):  # a batch is shared out whatever its order
        ranks = [read(manifest, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {len(alone)}
        for step, batch in enumerate(alone):
            assert same(joined([ranks[rank][step] for rank in range(world_size)]), batch)


@pytest.mark.integration
@pytest.mark.parametrize("num_shards", [1, 2])
def test_starting_at_any_step_gives_exactly_the_rest(manifest: Manifest, num_shards: int) -> None:
    options = {"rank": 1, "world_size": 2, "num_shards": num_shards, "epoch": 3}
    whole = read(manifest, **options)
    for start in (0, 1, 4, 7, 8, 9, 15, 16):
        rest = read(manifest, start_step=start, **options)
        assert len(rest) == len(whole) - start
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_starting_late_decodes_no_earlier_block(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    with SampleReader(manifest, Reading(**SIZES)) as reader:
        decoded: list[int] = []
        decode = reader.decoder.decode
        monkeypatch.setattr(
            reader.decoder, "decode", lambda ref, **options: decoded.append(ref.first_row) or decode(ref, **options)
        )
        order = reader.epoch_order(0)
        assert order.num_blocks > 2
        assert order.block_starts[-2] <= 480
        list(reader.batches(0, start_step=12))  # row 480 of 613
        last = [reader.refs[group].first_row for group in order.groups_G[order.block_groups[-2] :]]
        assert sorted(decoded) == sorted(last)


@pytest.mark.integration
def test_epochs_and_seeds_differ_and_repeat(manifest: Manifest) -> None:
    def numbers(**options: Any) -> list[int]:
        return row_numbers(read(manifest, **options))

    assert numbers(seed=1, epoch=1) == numbers(seed=1, epoch=1)
    found = [numbers(seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(rows) for rows in found}) == 4
    assert numbers(order="file") == list(range(NUM_ROWS))


def test_by_date_reads_days_in_order(manifest: Manifest, raw_rows: list[dict[str, Any]]) -> None:
    # Blocks never span two days, so with days of about 153 rows there are more blocks than days.
    numbers = row_numbers(read(manifest, order="by_date", block_rows=60))
    days = [raw_rows[n]["event_time"].date() for n in numbers]
    assert days == sorted(days)
    assert numbers != sorted(numbers)


def test_the_tail_is_padded_with_rows_that_count_nothing(manifest: Manifest) -> None:
    *full, tail = read(manifest)
    assert all((batch.row_number_B >= 0).all() for batch in full)
    padding = tail.row_number_B < 0
    assert padding.sum() == 16 * 40 - NUM_ROWS
    assert not tail.weights_B[padding].any()
    assert not tail.sparse_BF[padding].any()
    assert not tail.labels_BT[padding].any()
    assert all(not history.offsets.diff()[padding].any() for history in tail.histories)


def test_a_rank_whose_last_step_is_all_padding_still_gets_a_batch(manifest: Manifest) -> None:
    # 13 rows are left for the last step of 40: groups of 8 rows, so ranks 1 to 3 of 4 have 5 rows or none.
    last = [read(manifest, rank=rank, world_size=4)[-1] for rank in range(4)]
    assert [int((batch.row_number_B >= 0).sum()) for batch in last] == [8, 5, 0, 0]
    assert [len(batch) for batch in last] == [8, 8, 8, 16]
    assert last[3].histories[0].item_ids_V.dtype == last[0].histories[0].item_ids_V.dtype == torch.int32


@pytest.mark.parametrize("label_day_span", [False, True])
def test_weights_follow_maturity_and_the_cut_off(
    manifest: Manifest, raw_rows: list[dict[str, Any]], label_day_span: bool
) -> None:
    spec = dataclasses.replace(SPEC, label_day_span=label_day_span)
    manifest = dataclasses.replace(manifest, spec=spec)
    cut_off = START_US + 3 * DAY_US + 7 * HOUR_US
    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    weights = []
    for row in raw_rows:
        start = row["event_time"]
        if label_day_span:
            start = start.replace(hour=0, minute=0, second=0, microsecond=0) + dt.timedelta(days=1)
        closes = (start - epoch) // dt.timedelta(microseconds=1) + SPEC.label_delay_us
        weights.append((float(row["is_mature"]), float(closes <= cut_off)))
    for mature_only in (False, True):
        for ready_before_us in (None, cut_off):
            batches = read(manifest, mature_only=mature_only, ready_before_us=ready_before_us)
            found = {
                n: w
                for batch in batches
                for n, w in zip(batch.row_number_B.tolist(), batch.weights_B.tolist(), strict=True)
            }
            found.pop(-1, None)
            for n, (mature, ready) in enumerate(weights):
                expected = (mature if mature_only else 1) * (ready if ready_before_us else 1)
                # A row of a row group without any row that counts is not read at all.
                assert found.get(n, 0) == expected
            assert len(found) == NUM_ROWS or mature_only or ready_before_us


@pytest.mark.parametrize("label_day_span", [False, True])
def test_rows_count_once_their_clicks_are_final_and_later_orders_stay_open(
    manifest: Manifest, raw_rows: list[dict[str, Any]], label_day_span: bool
) -> None:
    """Clicks close 1 hour after the impression (or its day), orders 25."""
    manifest = dataclasses.replace(manifest, spec=dataclasses.replace(SPEC, label_day_span=label_day_span))
    cut_off = FIRST_DATE + dt.timedelta(days=3)
    batches = read(manifest, ready_before_us=START_US + 3 * DAY_US, order_wait_us=24 * HOUR_US)
    found = {
        n: (w, labels)
        for batch in batches
        for n, w, labels in zip(
            batch.row_number_B.tolist(), batch.weights_B.tolist(), batch.labels_BT.tolist(), strict=True
        )
        if n >= 0
    }
    counted = {"final": 0, "open": 0}
    for n, row in enumerate(raw_rows):
        start = row["event_time"].replace(tzinfo=None)
        if label_day_span:
            start = dt.datetime.combine(start.date(), dt.time()) + dt.timedelta(days=1)
        left = (dt.datetime.combine(cut_off, dt.time()) - start) / dt.timedelta(hours=1)
        weight, labels = found.get(n, (0, None))
        assert weight == float(left >= 1)
        if labels is not None:
            kind = "final" if left >= 25 else "open"
            orders = [OPEN_LABEL] * 2 if kind == "open" else [row["is_order"], row["is_order_global"]]
            assert labels == [row["is_click"], orders[0], row["is_click_global"], orders[1]]
            counted[kind] += int(weight)
    assert min(counted.values()) > 50


def test_when_orders_are_final_is_part_of_the_order(manifest: Manifest) -> None:
    cut_off = START_US + 3 * DAY_US
    readings = [Reading(**SIZES, ready_before_us=cut_off, order_wait_us=wait) for wait in (0, HOUR_US)]
    readers = [SampleReader(manifest, reading) for reading in readings]
    assert readers[0].fingerprint != readers[1].fingerprint


def test_row_groups_without_a_row_that_counts_are_left_out(manifest: Manifest) -> None:
    cut_off = START_US + 2 * DAY_US
    with SampleReader(manifest, Reading(**SIZES, ready_before_us=cut_off)) as reader:
        # Labels close 25 hours after the impression: rows of the first 23 hours, and their row groups' others.
        assert 100 < reader.num_rows < 200
        assert reader.num_rows == len(row_numbers(list(reader.batches(0))))
        assert reader.num_steps == -(-reader.num_rows // 40)


def test_a_batch_larger_than_many_blocks_is_put_together(manifest: Manifest) -> None:
    options: dict[str, Any] = {"global_batch_size": 400, "group_size": 100, "block_rows": 1}
    alone = read(manifest, order="by_date", **options)
    assert sorted(row_numbers(alone)) == list(range(NUM_ROWS))
    halves = [read(manifest, order="by_date", rank=rank, world_size=2, **options) for rank in range(2)]
    assert all(same(joined(list(parts)), batch) for *parts, batch in zip(*halves, alone, strict=True))


def test_threads_and_bytes_in_flight_change_nothing(manifest: Manifest) -> None:
    reference = read(manifest)
    for options in ({"num_threads": 1}, {"num_threads": 7}, {"max_bytes_in_flight": 1}):
        assert all(same(a, b) for a, b in zip(read(manifest, **options), reference, strict=True))


def test_two_passes_may_be_read_at_the_same_time(manifest: Manifest) -> None:
    with SampleReader(manifest, Reading(**SIZES)) as reader:
        pairs = list(zip(reader.batches(0), reader.batches(0, 0), strict=True))
    assert len(pairs) == 16
    assert all(same(a, b) for a, b in pairs)


def test_no_more_than_two_blocks_are_built_ahead_of_use(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = _Stream._build
    monkeypatch.setattr(_Stream, "_build", lambda blocks, plan: built.append(plan.block) or build(blocks, plan))
    with SampleReader(manifest, Reading(**{**SIZES, "block_rows": 40})) as reader:
        batches = reader.batches(0)
        next(batches)
        deadline = time.monotonic() + 5
        while len(built) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert built == [0, 1]
        assert len(list(batches)) == 15
        assert built == list(range(reader.epoch_order(0).num_blocks))


@pytest.mark.integration
def test_an_epoch_that_was_read_gives_its_memory_back_without_the_garbage_collector(manifest: Manifest) -> None:
    """A cycle of references would keep every block until Python looks for cycles: gigabytes on a large table."""
    gc.collect()
    gc.disable()
    try:
        before = pa.total_allocated_bytes()
        with SampleReader(manifest, Reading(**{**SIZES, "block_rows": 40})) as reader:
            kept = list(reader.batches(0))
            assert pa.total_allocated_bytes() > before
            del kept
        assert pa.total_allocated_bytes() == before
    finally:
        gc.enable()


def test_leaving_early_and_closing_end_the_threads(manifest: Manifest) -> None:
    reader = SampleReader(manifest, Reading(**SIZES))
    left = reader.batches(0)
    next(left)
    left.close()
    stopped = reader.batches(0)
    next(stopped)
    reader.close()
    with pytest.raises(RuntimeError, match="the reader was closed while its batches were in use"):
        list(stopped)
    assert len(list(reader.batches(0))) == 16, "a closed reader can be used again"
    reader.close()


def test_a_start_outside_of_the_epoch_is_refused(manifest: Manifest) -> None:
    with SampleReader(manifest, Reading(**SIZES)) as reader:
        assert list(reader.batches(0, start_step=16)) == []
        with pytest.raises(ValueError, match=r"start_step 17 is not in 0..16"):
            reader.batches(0, start_step=17)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 6}, "6 workers cannot share a global batch of 5 groups"),
        ({"order": "random"}, "order 'random' is not known"),
        ({"num_shards": 3}, r"train.reader_shards \(3\) must be positive and divide"),
        ({"ready_before_us": START_US}, "no row's labels are final by"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused_at_once(
    manifest: Manifest, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SampleReader(manifest, Reading(**{**SIZES, **options}))


def test_fingerprint_is_of_the_batches_and_not_of_the_workers(manifest: Manifest) -> None:
    def fingerprint(**options: Any) -> str:
        return SampleReader(options.pop("manifest", manifest), Reading(**{**SIZES, **options})).fingerprint

    base = fingerprint()
    assert base == fingerprint(
        rank=1, world_size=2, num_threads=5, manifest=dataclasses.replace(manifest, table_uri="x")
    )
    longer = dataclasses.replace(SPEC, label_delay_us=SPEC.label_delay_us + 1)
    others = [
        fingerprint(**options)
        for options in (
            {"seed": 1},
            {"order": "file"},
            {"global_batch_size": 80},
            {"group_size": 4},
            {"block_rows": 151},
            {"num_shards": 2},
            {"mature_only": True},
            {"only_scenario": "search"},
            {"ready_before_us": START_US + 9 * DAY_US},
            {"manifest": dataclasses.replace(manifest, spec=longer)},
        )
    ]
    assert len({base, *others}) == 11


@pytest.fixture
def damaged(lake: Path, tmp_path: Path) -> tuple[Manifest, Path]:
    """A manifest of a copy of the lake, and one of its files, to be damaged after the manifest was built."""
    copy = Path(shutil.copytree(lake, tmp_path / "lake"))
    manifest = build_manifest(copy, dates=DATES)
    return manifest, copy / "samples" / manifest.files[2].path


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.ParquetFile(path).read()), path, row_group_size=37)


def set_value(name: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        values[row] = value
        place = table.column_names.index(name)
        return table.set_column(place, name, pa.array(values, table.schema.field(name).type))

    return change


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"row group \d: cannot be read .*No such file"),
        (lambda path: path.write_bytes(b""), r"row group \d: cannot be read .*rebuild its date"),
        (cut_in_half, r"row group \d: cannot be read"),
        (lambda path: rewrite(path, lambda t: t.slice(0, 50)), r"row group \d: .*was replaced"),
        (lambda path: rewrite(path, lambda t: t.drop_columns(["user_key"])), r"column user_key is missing in the file"),
        (lambda path: rewrite(path, set_value("user_key", 40, None)), r"row group 1: column user_key has 1 nulls"),
        (lambda path: rewrite(path, set_value("is_order", 75, 0.5)), "row group 2: column is_order holds 0.5 in row 1"),
    ],
    ids=["missing", "empty", "cut", "replaced", "column", "null", "label"],
)
def test_a_damaged_file_stops_the_step_that_needs_it_with_its_name(
    damaged: tuple[Manifest, Path], damage: Callable[[Path], object], message: str
) -> None:
    manifest, path = damaged
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        read(manifest, order="file")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
def test_batches_before_the_damage_are_still_read(damaged: tuple[Manifest, Path]) -> None:
    manifest, path = damaged
    path.unlink()
    with SampleReader(manifest, Reading(**SIZES, order="file")) as reader:
        batches = reader.batches(0)
        assert row_numbers([next(batches) for _ in range(3)]) == list(range(120))
        with pytest.raises(DataError, match="cannot be read"):
            list(batches)


@pytest.mark.timeout(60)
def test_any_failure_in_the_background_is_raised(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    with SampleReader(manifest, Reading(**SIZES)) as reader:

        def fail(ref: object, **options: object) -> None:
            raise MemoryError("no memory for a block")

        monkeypatch.setattr(reader.decoder, "decode", fail)
        with pytest.raises(MemoryError, match="no memory for a block"):
            next(reader.batches(0))


def test_int96_times_are_read_as_microseconds(damaged: tuple[Manifest, Path], raw_rows: list[dict[str, Any]]) -> None:
    manifest, path = damaged
    table = pq.ParquetFile(path).read()
    pq.write_table(table, path, row_group_size=37, use_deprecated_int96_timestamps=True)
    cut_off = START_US + 3 * DAY_US + 12 * HOUR_US
    kept = {
        n
        for batch in read(manifest, ready_before_us=cut_off)
        for n, w in zip(batch.row_number_B.tolist(), batch.weights_B.tolist(), strict=True)
        if w
    }
    limit = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=cut_off - SPEC.label_delay_us)
    assert kept == {n for n, row in enumerate(raw_rows) if row["event_time"] <= limit}


def test_rows_move_across_the_whole_table(manifest: Manifest) -> None:
    numbers = np.array(row_numbers(read(manifest, block_rows=300)))
    assert np.abs(numbers - np.arange(NUM_ROWS)).mean() > 0.8 * NUM_ROWS / 3
