"""The yardstick of the chaos runs: it must see a lost row, a doubled one, another order, a changed bit."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.chaos import harm, report
from tests.chaos.bench import Bench, Ended, Fault
from tests.chaos.observe import Seen, global_batches, note_batches, note_rows, note_weights
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.config import UserError
from usr_ray.data.manifest import DataError, build_manifest
from usr_ray.runs.evaluations import manifest_path
from usr_ray.training.checkpoint import CheckpointStore

pytestmark = pytest.mark.integration

Drawn = dict[int, list[int]]


def note(case: Path, group: int, ranks: list[Drawn]) -> None:
    """What the ranks of a group draw: step to rows."""
    (case / "batches").mkdir(parents=True, exist_ok=True)
    for rank, drawn in enumerate(ranks):
        lines = [json.dumps({"step": step, "rows": rows}) + "\n" for step, rows in drawn.items()]
        (case / "batches" / f"{group}-{rank}-of-{len(ranks)}.jsonl").write_text("".join(lines))


@pytest.fixture
def unbroken(tmp_path: Path) -> Path:
    note(tmp_path / "unbroken", 1, [{0: [0, 1], 1: [4, -1]}, {0: [2, 3], 1: [-1, -1]}])
    return tmp_path / "unbroken"


def verdict(case: Path, unbroken: Path) -> tuple[bool, str]:
    seen = Seen()
    note_batches(seen, case, unbroken)
    return seen.is_right, seen.words[0]


def test_the_ranks_batches_are_put_together_in_rank_order(unbroken: Path) -> None:
    assert global_batches(unbroken) == {0: [(0, 1, 2, 3)], 1: [(4, -1, -1, -1)]}


def test_a_step_drawn_again_by_other_numbers_of_ranks_is_the_same_batch(tmp_path: Path, unbroken: Path) -> None:
    case = tmp_path / "case"
    note(case, 1, [{0: [0, 1], 1: [4, -1]}, {0: [2, 3]}])  # rank 1 was killed before step 1
    note(case, 2, [{0: [0, 1, 2, 3], 1: [4, -1, -1, -1]}])
    assert verdict(case, unbroken) == (True, "2 global batches the same (1 of them drawn again)")


@pytest.mark.parametrize(
    ("step_1", "words"),
    [
        ({1: [3, -1, -1, -1]}, r"WRONG: other rows in steps [1], no batch for steps []"),
        ({1: [-1, 4, -1, -1]}, r"WRONG: other rows in steps [1], no batch for steps []"),
        ({}, r"WRONG: other rows in steps [], no batch for steps [1]"),
    ],
)
def test_another_batch_and_a_lost_one_are_seen(tmp_path: Path, unbroken: Path, step_1: Drawn, words: str) -> None:
    note(tmp_path / "case", 1, [{0: [0, 1, 2, 3], **step_1}])
    assert verdict(tmp_path / "case", unbroken) == (False, words)


@pytest.mark.parametrize(
    ("epoch_2", "is_right"), [([0, 1, 2, 3, 4], True), ([0, 1, 2, 3, 3], False), ([0, 1, 2, 3, -1], False)]
)
def test_a_row_lost_or_doubled_in_an_epoch_is_seen(tmp_path: Path, epoch_2: list[int], is_right: bool) -> None:
    write_samples(tmp_path / "lake", samples_spec(), num_rows=5, num_days=1)
    (tmp_path / "run").mkdir()
    day = build_manifest(tmp_path / "lake", dates=(FIRST_DATE, FIRST_DATE))
    day.save(manifest_path(tmp_path / "run", "train"))
    note(tmp_path, 1, [{0: [4, 2, 0, 1, 3], 1: epoch_2}])
    seen = Seen()
    note_rows(seen, tmp_path, tmp_path / "run", num_epochs=2)
    assert seen.is_right == is_right


def test_one_changed_bit_of_the_weights_is_seen_and_a_tolerance_is_stated(tmp_path: Path) -> None:
    weights = {"model/w": torch.tensor([1.0, 2.0]), "adamw/step": torch.tensor(7)}
    for name, value in (("a", 2.0), ("b", 2.0), ("c", 2.0000002), ("d", 2.5)):
        weights["model/w"] = torch.tensor([1.0, value])
        CheckpointStore(tmp_path / name / "checkpoints").save(7, weights, {})
    found = {}
    for name, tolerance in (("b", 0.0), ("c", 0.0), ("c", 1e-3), ("d", 1e-3)):
        seen = Seen()
        note_weights(seen, tmp_path / name, tmp_path / "a", tolerance=tolerance)
        found[name, tolerance] = seen.is_right
    assert found == {("b", 0.0): True, ("c", 0.0): False, ("c", 1e-3): True, ("d", 1e-3): False}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"the file has \d+ bytes, the table's log says \d+"),
        ("zero-byte", r"the file has 0 bytes, the table's log says \d+"),
        ("missing", r"the file is missing"),
        ("changed-table-schema", r"wrong columns: user_key is string, needed long"),
        ("column-mapping", r"delta.columnMapping.mode is 'name'"),
        ("deletion-vectors", r"deletion vectors are in use, for example on impression_date=2026-01-01"),
    ],
)
def test_each_harm_to_a_table_is_what_it_is_called(tmp_path: Path, kind: str, message: str) -> None:
    write_samples(tmp_path / "lake", samples_spec(), num_rows=40, num_days=2)
    lake = harm.copy_lake(tmp_path / "lake", tmp_path / "copy")
    harm.HARMS[kind](lake / "samples", harm.first_file(lake))
    with pytest.raises(DataError, match=message):
        build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE))


def test_an_advanced_table_has_one_version_more_and_fewer_rows(tmp_path: Path) -> None:
    write_samples(tmp_path, samples_spec(), num_rows=40, num_days=2)
    dates = (FIRST_DATE, dt.date(2026, 1, 2))
    before = build_manifest(tmp_path, dates=dates)
    harm.advance_table(tmp_path / "samples")
    after = build_manifest(tmp_path, dates=dates, allow_missing=True)  # a whole date is gone
    assert after.version == before.version + 1
    assert after.num_rows < before.num_rows
    assert build_manifest(tmp_path, dates=dates, version=before.version) == before


def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, tmp_path / "lake", (), {})


def test_the_table_tells_good_bad_skipped_and_what_could_not_be_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(_: Bench) -> Seen:
        seen = Seen()
        seen.note("weights", True, "weights equal | bit for bit")
        return seen

    def bad(bench: Bench) -> Seen:
        seen = good(bench)
        bench.expect_end(seen, Ended(124, 240.0, ""), 0)
        return seen

    def broken(_: Bench) -> Seen:
        raise RuntimeError("no cluster")

    observers = {"good": good, "bad": bad, "broken": broken, "skipped": lambda _: Seen(skipped="needs root")}
    faults = [Fault(name, "what", "expected", observe) for name, observe in observers.items()]
    healed: list[int] = []
    rows = report.run_all(faults, bench(tmp_path), heal=lambda: healed.append(1))
    assert [row["verdict"] for row in rows] == ["good", "bad", "bad", "skipped"]
    assert rows[1]["seen"] == "weights equal | bit for bit; WRONG: hung: ended after 240 s"
    assert rows[2]["seen"] == "WRONG: RuntimeError: no cluster"
    assert len(healed) == 4
    report.write(rows, tmp_path)
    lines = (tmp_path / "chaos.md").read_text().splitlines()
    assert lines[2] == r"| good | what | expected | weights equal \| bit for bit | 0 | good |"
    assert json.loads((tmp_path / "chaos.json").read_text())["about"]["bad"] == 2
    assert "1 good, 2 bad, 1 skipped" in capsys.readouterr().out


def test_a_fault_that_struck_nobody_proves_nothing(tmp_path: Path) -> None:
    assert not Seen().is_right


def test_an_unknown_fault_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"--fault worker: there is no such fault; there are: unbroken, worker-k"):
        report.choose(["worker"])
    assert [fault.name for fault in report.choose(["slow-rank", "unbroken"])] == ["unbroken", "slow-rank"]
    assert len({fault.name for fault in report.FAULTS}) == len(report.FAULTS)


def test_torn_checkpoints_are_torn_in_three_ways(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=4)
    for step in (5, 10, 15, 20):
        store.save(step, {"w": torch.ones(9)}, {"note": "abc"})
    assert harm.tear_checkpoints(store.directory) == ["step-00000020", "step-00000015", "step-00000010"]
    newest = store.newest_valid()
    assert newest is not None
    assert newest.step == 5
    shutil.rmtree(store.directory)
