"""Histories: strictly before, known by then, newest last; and the slow path for events known late."""

from __future__ import annotations

import numpy as np
import pytest

import etl.kernel.histories
from etl.kernel.attribution import attribute
from etl.kernel.events import KIND_IMPRESSION, Events
from etl.kernel.histories import history_events, last_events
from tests.etl_oracle import Windows, World
from tests.unit.etl_worlds import NOON, SECOND, rules_of, run_kernel, table

pytestmark = pytest.mark.unit

WINDOWS = Windows(click=100, order=1000, whole=100)
T = NOON


def histories(world: World, of: str, length: int = 50) -> list[list[tuple]]:
    found = run_kernel(world, WINDOWS, num_scenarios=2, length=length, watermark=0)
    return found.samples[of]["histories"]


def test_an_event_at_the_time_of_the_impression_is_not_history() -> None:
    world = World().impression("a", "u", "x", 0, T, query="q").click("c", "u", "x", 0, T + 5, "a")
    world.impression("same", "u", "y", 1, T + 5).impression("later", "u", "y", 1, T + 6)
    assert histories(world, "same") == [[], []]
    assert histories(world, "later") == [[("x", "q", 1, 1)], []]


def test_events_of_equal_times_come_by_action_then_id() -> None:
    world = World().impression("a", "u", "x", 0, T).impression("b", "u", "y", 0, T).impression("t", "u", "z", 0, T + 50)
    world.click("c2", "u", "x", 0, T + 5, "a").click("c1", "u", "y", 0, T + 5, "b")
    world.order("o1", "u", "y", T + 5).order("o1", "u", "x", T + 5).order("o0", "u", "y", T + 5)
    found = [(item, action) for item, _, action, _ in histories(world, "t")[0]]
    assert found == [("y", 1), ("x", 1), ("y", 2), ("x", 2), ("y", 2)]


def test_an_order_belongs_to_the_scenario_of_its_click() -> None:
    world = World().impression("r", "u", "x", 1, T).click("c", "u", "x", 1, T + 1, "r").order("o", "u", "x", T + 9)
    world.impression("t", "u", "z", 0, T + 10)
    assert histories(world, "t") == [[], [("x", None, 1, 9), ("x", None, 2, 1)]]


def test_only_the_newest_events_are_kept_newest_last() -> None:
    world = World().impression("t", "u", "z", 0, T + 90)
    for n in range(5):
        world.impression(f"i{n}", "u", f"x{n}", 0, T + n).click(f"c{n}", "u", f"x{n}", 0, T + 10 * n, f"i{n}")
    assert [age for *_, age in histories(world, "t", length=2)[0]] == [60, 50]


def test_an_event_that_became_known_later_is_left_out_and_an_older_one_moves_up() -> None:
    world = World().impression("t", "u", "z", 0, T + 90).impression("s", "u", "z", 0, T + 95)
    for n in range(3):
        world.impression(f"i{n}", "u", f"x{n}", 0, T + n)
        world.click(f"c{n}", "u", f"x{n}", 0, T + 10 * n, f"i{n}", known=T + 91 if n == 2 else T + 90)
    assert [item for item, *_ in histories(world, "t", length=2)[0]] == ["x0", "x1"]
    assert [item for item, *_ in histories(world, "s", length=2)[0]] == ["x1", "x2"]


@pytest.mark.parametrize("max_gather", [1 << 22, 16])
def test_many_late_events_are_skipped_however_far_back_the_known_ones_are(
    max_gather: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etl.kernel.histories, "_MAX_GATHER", max_gather)
    rng = np.random.default_rng(3)
    world = World()
    for n in range(400):
        user, time = f"u{rng.integers(3)}", T + int(rng.integers(300)) * SECOND
        lag = int(rng.choice([0, 1, 400], p=[0.2, 0.3, 0.5])) * SECOND
        world.impression(f"i{n:03}", user, f"x{n}", 0, time).click(
            f"c{n:03}", user, f"x{n}", 0, time, f"i{n:03}", known=time + lag
        )
    events = Events.from_arrow(table(world), ranked=False)
    attribution = attribute(events, rules_of(WINDOWS), num_scenarios=1)
    flat = history_events(events, attribution, 0)
    shown = events.rows(KIND_IMPRESSION)
    ranges = last_events(flat, events.user[shown], events.time[shown], 4)
    for n, row in enumerate(shown):
        fits = (flat.user == events.user[row]) & (flat.time < events.time[row]) & (flat.known <= events.time[row])
        wanted = np.flatnonzero(fits)[-4:]
        assert ranges.positions[ranges.offsets[n] : ranges.offsets[n + 1]].tolist() == wanted.tolist()
