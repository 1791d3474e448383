"""Scenario and global labels, both spans, and maturity, by hand."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest
from hypothesis import given

from etl.kernel.attribution import mature
from tests.etl_oracle import DAY, Windows, World
from tests.unit.etl_worlds import NOON, SECOND, rules_of, run_kernel, windows_of, worlds
from tests.unit.examples import depth
from usr_ray.schema import LABEL_ORDER

pytestmark = pytest.mark.unit

HOUR = 3600 * SECOND
MIDNIGHT = int(dt.datetime(2026, 1, 5, tzinfo=dt.UTC).timestamp()) * SECOND
T = MIDNIGHT + 10 * HOUR


def global_click(click_time: int, windows: Windows) -> float:
    """is_click_global of a recommendation impression at T whose item was clicked in search at `click_time`."""
    world = World().impression("r", "u", "x", 1, T).impression("s", "u", "x", 0, click_time)
    world.click("c", "u", "x", 0, click_time, "s")
    return run_kernel(world, windows, num_scenarios=2, length=1, watermark=0).samples["r"]["is_click_global"]


@pytest.mark.parametrize(("delay", "label"), [(-1, 0.0), (0, 1.0), (2 * HOUR, 1.0), (2 * HOUR + 1, 0.0)])
def test_a_click_elsewhere_counts_inside_the_global_window(delay: int, label: float) -> None:
    assert global_click(T + delay, Windows(click=HOUR, order=HOUR, whole=2 * HOUR)) == label


@pytest.mark.parametrize(
    ("moment", "label"), [(MIDNIGHT - 1, 0.0), (MIDNIGHT, 1.0), (MIDNIGHT + DAY - 1, 1.0), (MIDNIGHT + DAY, 0.0)]
)
def test_the_day_span_is_the_utc_day_of_the_impression(moment: int, label: float) -> None:
    assert global_click(moment, Windows(click=HOUR, order=HOUR, whole=HOUR, day_span=True)) == label


def test_an_order_elsewhere_counts_by_the_time_of_its_click() -> None:
    windows = Windows(click=HOUR, order=24 * HOUR, whole=HOUR)
    world = World().impression("r", "u", "x", 1, T).impression("s", "u", "x", 0, T + HOUR)
    world.click("c", "u", "x", 0, T + HOUR, "s").order("o", "u", "x", T + 20 * HOUR)
    row = run_kernel(world, windows, num_scenarios=2, length=1, watermark=0).samples["r"]
    assert (row["is_click"], row["is_order"], row["is_click_global"], row["is_order_global"]) == (0.0, 0.0, 1.0, 1.0)
    assert row["order_time"] is None


def test_the_first_click_and_the_first_order_give_the_times() -> None:
    windows = Windows(click=HOUR, order=24 * HOUR, whole=HOUR)
    world = World().impression("i", "u", "x", 0, T)
    for number, delay in enumerate((30, 10, 20)):
        world.click(f"c{number}", "u", "x", 0, T + delay, "i").order(f"o{number}", "u", "x", T + 100 - delay)
    row = run_kernel(world, windows, num_scenarios=1, length=1, watermark=0).samples["i"]
    assert (row["click_time"], row["order_time"]) == (T + 10, T + 70)


@pytest.mark.integration
@depth(50)
@given(world=worlds(), windows=windows_of())
def test_the_order_of_the_labels_holds_on_every_row(world: World, windows: Windows) -> None:
    for row in run_kernel(world, windows, num_scenarios=2, length=1, watermark=NOON).samples.values():
        assert all(row[low] <= row[high] for low, high in LABEL_ORDER)


@pytest.mark.parametrize(("day_span", "ready"), [(False, T + 3 * HOUR), (True, MIDNIGHT + DAY + 3 * HOUR)])
def test_a_row_is_mature_once_its_windows_have_closed(day_span: bool, ready: int) -> None:
    rules = rules_of(Windows(click=HOUR, order=2 * HOUR, whole=HOUR, day_span=day_span))
    assert mature(np.array([T]), ready, rules).tolist() == [True]
    assert mature(np.array([T]), ready - 1, rules).tolist() == [False]
