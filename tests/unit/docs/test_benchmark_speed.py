"""The plumbing of the benchmarks of speed: turns, intervals, drawn batches, tables. Speed itself is never asserted."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import interleaved, launchers, peers, step_cases, usr_cost
from tests.unit.counting_way import counting

pytestmark = pytest.mark.unit

SMALL_MODEL = {"hidden": (8,), "tower_hidden": (4,), "embedding_dim": 4}


@pytest.mark.integration
def test_a_way_in_a_process_of_its_own_is_called_closed_and_missed_when_it_dies(tmp_path: Path) -> None:
    with interleaved.own_process(counting, 5.0, tmp_path / "closed") as way:
        assert [way(), way()] == [5.0, 6.0]
    assert (tmp_path / "closed").exists()
    with (
        pytest.raises(SystemExit, match=r"the process of counting\(7\.0, .*\) has ended"),
        interleaved.own_process(counting, 7.0, tmp_path / "other") as way,
    ):
        assert [way(), way(), way()] == []


def test_ways_take_turns_and_every_other_round_goes_backwards() -> None:
    calls: list[str] = []

    def way(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]

    found = interleaved.take_turns({"a": way("a"), "b": way("b")}, 2, warm=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_an_interval_covers_the_median_with_95_percent_where_order_statistics_can() -> None:
    # Of 9 values the 2nd and the 8th: the median is outside with 2 (1 + 9) / 512 = 3.9 %; the 3rd and 7th leave 18 %.
    found = interleaved.interval([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (found["median"], found["low"], found["high"], found["coverage"]) == (5, 2, 8, 0.961)
    # Of 3 none does: the ends, and what they cover: 1 - 2 / 8.
    assert interleaved.interval([3, 1, 2]) == {"median": 2, "low": 1, "high": 3, "coverage": 0.75}


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    # A slow second round met both: by medians alone it would be 20 / 10.
    assert interleaved.ratio([10, 40, 30], [10, 20, 10])["median"] == 2
    assert interleaved.ratio([10, 40, 30], [10, 20, 10])["high"] == 3


def test_a_verdict_names_the_aim() -> None:
    assert interleaved.verdict(2.4, at_most=2.5) == "<= 2.5: met"
    assert interleaved.verdict(2.4, at_least=3) == ">= 3: missed"


def test_short_histories_keep_the_newest_events_of_their_rows() -> None:
    case = dataclasses.replace(step_cases.CASES["demo"], batch_rows=400)
    short, whole = case.draw(3), dataclasses.replace(case, mean_events=None).draw(3)
    for cut, full in zip(short.histories, whole.histories, strict=True):
        lengths = cut.offsets.diff()
        assert lengths.max() == full.offsets.diff().max()
        assert 8 < lengths.float().mean() < 14
        for row in range(400):
            kept = cut.slice_rows(row, row + 1).item_ids_V
            assert kept.equal(full.slice_rows(row, row + 1).item_ids_V[full_length(full, row) - len(kept) :])


def full_length(history: Any, row: int) -> int:
    return int(history.offsets[row + 1] - history.offsets[row])


def test_a_timed_step_trains() -> None:
    case = dataclasses.replace(step_cases.CASES["demo"], batch_rows=128)
    step = step_cases.Step(case.spec, SMALL_MODEL)
    batch = case.draw(0)
    before = {name: p.clone() for name, p in step.state.module.named_parameters()}
    clock_s, _ = step.timed(batch)
    assert clock_s > 0
    assert step.state.step == 1
    assert any(not p.equal(before[name]) for name, p in step.state.module.named_parameters())


def test_a_profile_keeps_the_largest_operators_and_adds_the_others_up() -> None:
    found = usr_cost.shares([(f"aten::op{n}", float(n), 2 * n) for n in range(14)], repeats=2)  # 0 + .. + 13 = 91
    assert [entry["operator"] for entry in found] == [*(f"op{n}" for n in range(13, 1, -1)), "all others"]
    assert found[0] == {"operator": "op13", "share": round(13 / 91, 4), "calls_a_step": 13}
    assert found[-1] == {"operator": "all others", "share": round(1 / 91, 4), "calls_a_step": 1}


def test_every_part_of_usr_is_a_model_of_its_own() -> None:
    parameters = {
        name: sum(
            p.numel()
            for p in step_cases.Step(step_cases.CASES["demo"].spec, {**SMALL_MODEL, **part}).state.module.parameters()
        )
        for name, part in usr_cost.PARTS.items()
    }
    assert parameters["plain"] < min(parameters[name] for name in ("GLMT alone", "FG alone", "IE alone"))
    assert parameters["USR"] == max(parameters.values())


def test_tables_that_do_not_fit_are_counted() -> None:
    # A million rows of 16 weights take 16 bytes each with gradient and two moments: 0.256 GB a table.
    assert peers.tables_that_fit(1_000_000, 2.6) == 10
    assert peers.tables_that_fit(10_000_000, 0.1) == 1
    assert peers.tables_that_fit(100_000, 0.1) == peers.NUM_FEATURES
    assert peers.table_rows(7, 2) == [7, 7] + [peers.SMALL] * 13


def test_the_row_of_a_scenario_is_picked_by_masks() -> None:
    class Towers(torch.nn.Module):
        def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(2, 1)

    found = peers.ByScenario(Towers())({"scenario": torch.tensor([1, 0])})
    assert found.tolist() == [[3.0, 4.0], [1.0, 2.0]]


def test_a_steady_rate_leaves_the_first_window_out(tmp_path: Path) -> None:
    lines = [{"kind": "train", "samples_per_s": rate} for rate in (1.0, 10.0, 30.0, 20.0)] + [{"kind": "eval"}]
    (tmp_path / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert launchers.steady_rate(tmp_path) == statistics.median([10, 20, 30])
