"""Clicks to impressions and orders to clicks: by hand, and against the oracle on thousands of small worlds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.etl_oracle import Expected, Windows, World, expected
from tests.unit.etl_worlds import NOON, SECOND, run_kernel, windows_of, worlds
from tests.unit.examples import depth

pytestmark = pytest.mark.unit

HOUR = 3600 * SECOND
RULES = Windows(click=HOUR, order=24 * HOUR, whole=HOUR)
T = NOON - 12 * HOUR


def kernel(world: World, windows: Windows = RULES) -> Expected:
    return run_kernel(world, windows, num_scenarios=2, length=50, watermark=T + 100 * HOUR)


@pytest.mark.integration
@depth(150)
@given(world=worlds(), windows=windows_of(), length=st.integers(1, 4), wait=st.integers(0, 40))
def test_the_kernel_says_what_the_contract_says(world: World, windows: Windows, length: int, wait: int) -> None:
    watermark = NOON + wait * SECOND
    found = run_kernel(world, windows, num_scenarios=2, length=length, watermark=watermark)
    wanted = expected(world, windows, num_scenarios=2, length=length, watermark=watermark)
    assert found.rejects == wanted.rejects
    assert found.samples == wanted.samples


@pytest.mark.integration
@pytest.mark.parametrize("num_scenarios", [1, 4])
def test_any_number_of_scenarios(num_scenarios: int) -> None:
    @depth(40)
    @given(world=worlds(num_scenarios=num_scenarios), windows=windows_of())
    def check(world: World, windows: Windows) -> None:
        found = run_kernel(world, windows, num_scenarios=num_scenarios, length=3, watermark=NOON)
        wanted = expected(world, windows, num_scenarios=num_scenarios, length=3, watermark=NOON)
        assert (found.samples, found.rejects) == (wanted.samples, wanted.rejects)

    check()


@pytest.mark.parametrize(
    ("delay", "reason"), [(0, None), (HOUR, None), (HOUR + 1, "after_window"), (-1, "before_impression")]
)
def test_the_click_window_is_closed_at_both_ends(delay: int, reason: str | None) -> None:
    found = kernel(World().impression("i", "u", "x", 0, T).click("c", "u", "x", 0, T + delay, "i"))
    assert found.rejects.get(("click", "c", "x")) == reason
    assert found.samples["i"]["is_click"] == float(reason is None)
    assert found.samples["i"]["click_time"] == (T + delay if reason is None else None)


@pytest.mark.parametrize("delay", [0, 24 * HOUR, 24 * HOUR + 1, -1])
def test_the_order_window_is_closed_at_both_ends(delay: int) -> None:
    world = (
        World().impression("i", "u", "x", 0, T).click("c", "u", "x", 0, T + 5, "i").order("o", "u", "x", T + 5 + delay)
    )
    found = kernel(world)
    inside = 0 <= delay <= 24 * HOUR
    assert found.samples["i"]["is_order"] == float(inside)
    reason = None if inside else ("after_window" if delay > 0 else "before_click")
    assert found.rejects.get(("order", "o", "x")) == reason


@pytest.mark.parametrize(
    ("user", "item", "scenario", "names", "reason"),
    [
        ("v", "x", 0, "i", "unknown_impression"),
        ("u", "x", 0, "j", "unknown_impression"),
        ("u", "x", 1, "i", "impression_of_other_scenario"),
        ("u", "y", 0, "i", "impression_of_other_item"),
        ("u", "y", 0, None, "no_impression"),
        ("u", "x", 1, None, "no_impression"),
    ],
)
def test_a_click_of_no_impression_is_rejected_and_leaves_no_trace(
    user: str, item: str, scenario: int, names: str | None, reason: str
) -> None:
    world = World().impression("i", "u", "x", 0, T).impression("later", "u", item, 0, T + HOUR)
    found = kernel(world.click("c", user, item, scenario, T + 1, names).order("o", user, item, T + 2))
    assert found.rejects == {("click", "c", item): reason, ("order", "o", item): "no_click"}
    assert not any(s["is_click_global"] or any(s["histories"]) for s in found.samples.values())


def test_an_unnamed_click_takes_the_last_impression_and_the_largest_id_of_equal_times() -> None:
    world = (
        World()
        .impression("i3", "u", "x", 0, T)
        .impression("i1", "u", "x", 0, T + 9)
        .impression("i2", "u", "x", 0, T + 9)
    )
    found = kernel(world.click("c", "u", "x", 0, T + 9))
    assert [i for i, s in found.samples.items() if s["is_click"]] == ["i2"]


def test_an_order_credits_the_last_click_of_any_scenario_and_only_one_impression() -> None:
    world = World().impression("i", "u", "x", 0, T).impression("j", "u", "x", 1, T)
    world.click("c1", "u", "x", 0, T + 7, "i").click("c2", "u", "x", 1, T + 7, "j").order("o", "u", "x", T + 8)
    found = kernel(world)
    assert [i for i, s in found.samples.items() if s["is_order"]] == ["j"]
    assert [s["is_order_global"] for s in found.samples.values()] == [1.0, 1.0]


def test_an_order_of_a_scenario_credits_its_own_clicks_only() -> None:
    world = World().impression("i", "u", "x", 0, T).impression("j", "u", "x", 1, T)
    world.click("c1", "u", "x", 0, T + 1, "i").click("c2", "u", "x", 1, T + 7, "j").order(
        "o", "u", "x", T + 8, scenario=0
    )
    assert [i for i, s in kernel(world).samples.items() if s["is_order"]] == ["i"]


def test_two_lines_of_one_order_are_two_orders() -> None:
    world = World().impression("i", "u", "x", 0, T).impression("j", "u", "y", 0, T)
    world.click("c1", "u", "x", 0, T + 1, "i").click("c2", "u", "y", 0, T + 1, "j")
    found = kernel(world.order("o", "u", "x", T + 5).order("o", "u", "y", T + 3))
    assert {i: s["order_time"] for i, s in found.samples.items()} == {"i": T + 5, "j": T + 3}


@pytest.mark.parametrize(("credit", "labels"), [(True, (1.0, 1.0, 1.0, 1.0)), (False, (0.0, 0.0, 0.0, 0.0))])
def test_an_order_without_a_click(credit: bool, labels: tuple[float, ...]) -> None:
    windows = Windows(click=HOUR, order=24 * HOUR, whole=HOUR, credit_impression=credit)
    world = World().impression("i", "u", "x", 0, T).impression("j", "u", "x", 1, T + 1).order("o", "u", "x", T + 2)
    found = kernel(world, windows)
    row = found.samples["j"]
    assert (row["is_click"], row["is_order"], row["is_click_global"], row["is_order_global"]) == labels
    assert row["click_time"] is None
    assert found.samples["i"]["is_click_global"] == 0.0  # nobody knows when it was clicked
    assert ("order", "o", "x") in found.rejects or credit


def test_a_click_within_the_clock_skew_is_moved_to_its_impression() -> None:
    windows = Windows(click=HOUR, order=HOUR, whole=HOUR, skew=5)
    world = World().impression("i", "u", "x", 0, T).impression("j", "u", "y", 0, T).impression("k", "u", "y", 0, T + 1)
    found = kernel(world.click("c", "u", "x", 0, T - 5, "i").click("d", "u", "x", 0, T - 6, "i"), windows)
    assert found.rejects == {("click", "d", "x"): "before_impression"}
    assert found.samples["i"]["click_time"] == T
    assert found.samples["j"]["histories"] == [[], []]
    assert found.samples["k"]["histories"] == [[("x", None, 1, 1)], []]


def test_clicks_moved_to_one_instant_are_ordered_by_id() -> None:
    windows = Windows(click=HOUR, order=HOUR, whole=HOUR, skew=9)
    world = World().impression("i", "u", "x", 0, T).impression("j", "u", "y", 0, T).impression("t", "u", "z", 0, T + 1)
    world.click("c1", "u", "x", 0, T - 3, "i").click("c0", "u", "y", 0, T - 2, "j")
    assert [item for item, *_ in kernel(world, windows).samples["t"]["histories"][0]] == ["y", "x"]
