"""Fingerprints of a date: they differ exactly where a row of the date does."""

from __future__ import annotations

import collections
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.kernel.fingerprint import date_fingerprint
from etl.kernel.user_pass import PassPlan, first_pass
from tests.etl_oracle import DAY, Windows, World, expected
from tests.unit.etl_worlds import NOON, SECOND, event_rows, lags, rules_of, seconds, windows_of, worlds
from tests.unit.examples import depth

pytestmark = pytest.mark.unit

HOUR = 3600 * SECOND
RULES = Windows(click=HOUR, order=24 * HOUR, whole=HOUR)
MONDAY = NOON // DAY
T = MONDAY * DAY + 10 * HOUR


WEEK = tuple(range(MONDAY - 3, MONDAY + 6))


def all_cells(world: World, windows: Windows) -> dict[tuple[str, int], int]:
    plan = PassPlan(rules=rules_of(windows), num_scenarios=2, history_length=2, days=WEEK)
    found: dict[tuple[str, int], int] = collections.defaultdict(int)
    for batch in first_pass(event_rows(world).to_batches(), plan):
        for row in batch.to_pylist():
            if row["part"] == "cell":
                found[row["what"], row["day"]] ^= row["hash"]
    return found


def touched(before: World, after: World, windows: Windows, marks: tuple[int, int]) -> dict[int, list[str]]:
    """Days, of a week around MONDAY, whose fingerprints differ -> which ones."""
    old, new = (
        {d: date_fingerprint(d, cells, rules_of(windows), m) for d in WEEK}
        for w, m in zip((before, after), marks, strict=True)
        for cells in [all_cells(w, windows)]
    )
    found = {day: [name for name in new[day] if old[day][name] != new[day][name]] for day in WEEK}
    return {day: names for day, names in found.items() if names}


def changed(before: World, after: World, windows: Windows, marks: tuple[int, int]) -> set[int]:
    """Days on which the oracle's samples differ."""
    old, new = (
        {
            i["id"]: (i["time"] // DAY, i["query"], i["item"], sample)
            for w in (world,)
            for i in w.impressions
            for sample in [expected(w, windows, num_scenarios=2, length=2, watermark=m).samples[i["id"]]]
        }
        for world, m in zip((before, after), marks, strict=True)
    )
    return {(new.get(k) or old[k])[0] for k in old.keys() | new.keys() if old.get(k) != new.get(k)}


@pytest.mark.integration
@depth(30)
@given(world=worlds(max_rows=8), windows=windows_of(), later=st.integers(0, 2), data=st.data())
def test_no_change_of_a_row_goes_unseen(world: World, windows: Windows, later: int, data: st.DataObject) -> None:
    after = copy.deepcopy(world)
    spread = st.integers(-1, 2).map(lambda n: n * DAY)
    for row in (*after.impressions, *after.clicks, *after.orders):  # days on end, as well as equal instants
        shift = data.draw(spread)
        row["time"] += shift
        row["known"] += shift
    before = copy.deepcopy(after)
    for number, kind in enumerate(
        data.draw(st.lists(st.sampled_from(["click", "order", "impression", "gone", "query", "known"]), max_size=3))
    ):
        shown = data.draw(st.sampled_from(after.impressions))
        time = data.draw(
            st.sampled_from([shown["time"], shown["time"] + 2 * SECOND, shown["time"] + DAY, data.draw(seconds)])
        )
        if kind == "click":
            after.click(
                f"z{number}", shown["user"], shown["item"], shown["scenario"], time, known=time + data.draw(lags)
            )
        elif kind == "order":
            after.order(f"z{number}", shown["user"], shown["item"], time, known=time + data.draw(lags))
        elif kind == "impression":
            after.impression(f"z{number}", shown["user"], shown["item"], shown["scenario"], time, query=None)
        elif kind == "gone" and after.clicks:
            after.clicks.pop()
        elif kind == "query":
            shown["query"] = "another"
        elif kind == "known" and after.orders:
            after.orders[-1]["known"] += data.draw(lags)
    marks = (NOON, NOON + later * DAY)
    seen = touched(before, after, windows, marks)
    assert changed(before, after, windows, marks) <= seen.keys()
    # Nor a day too many, but for the watermark and for content of an impression that no label or history shows.
    rows = {day for day, names in seen.items() if set(names) & {"labels", "histories"}}
    assert rows <= changed(before, after, windows, marks)


def test_equal_worlds_have_equal_fingerprints_in_any_order() -> None:
    world = World()
    for n, user in enumerate("abcd"):
        world.impression(f"i{n}", user, "x", 0, T).click(f"c{n}", user, "x", 0, T + n, f"i{n}").order(
            f"o{n}", user, "x", T + 9
        )
    turned = World(world.impressions[::-1], world.clicks[::-1], world.orders[::-1])
    assert touched(world, turned, RULES, (NOON, NOON)) == {}
    fingerprint = date_fingerprint(MONDAY, all_cells(world, RULES), rules_of(RULES), NOON)
    assert len({fingerprint["impressions"], fingerprint["labels"], fingerprint["histories"], "0" * 16}) == 4


def test_a_late_click_touches_only_the_days_on_which_its_user_s_histories_show_it() -> None:
    world = World().impression("i", "u", "x", 0, T).impression("j", "u", "y", 1, T + 2 * DAY)
    for day in range(5):  # another user is shown something every day
        world.impression(f"k{day}", "v", "x", 0, T + day * DAY)
    late = copy.deepcopy(world).click("c", "u", "x", 0, T + 1, "i", known=T + DAY)
    assert touched(world, late, RULES, (NOON, NOON)) == {MONDAY: ["labels"], MONDAY + 2: ["histories"]}


def test_a_late_click_that_newer_events_hide_touches_no_history() -> None:
    world = World().impression("i", "u", "x", 0, T).impression("j", "u", "y", 0, T + DAY)
    for n in range(2):  # histories hold two events here
        world.impression(f"k{n}", "u", "z", 0, T + HOUR + n).click(f"c{n}", "u", "z", 0, T + HOUR + n, f"k{n}")
    late = copy.deepcopy(world).click("c", "u", "x", 0, T + 1, "i", known=T + 4 * HOUR)
    assert touched(world, late, RULES, (NOON, NOON)) == {MONDAY: ["labels"]}


def test_two_events_that_change_places_change_the_fingerprint() -> None:
    world = World().impression("i", "u", "x", 0, T).impression("j", "u", "y", 0, T).impression("k", "u", "z", 0, T + 5)
    first = copy.deepcopy(world).click("c1", "u", "x", 0, T + 1, "i").click("c2", "u", "y", 0, T + 1, "j")
    second = copy.deepcopy(world).click("c2", "u", "x", 0, T + 1, "i").click("c1", "u", "y", 0, T + 1, "j")
    assert touched(first, second, RULES, (NOON, NOON)) == {MONDAY: ["histories"]}


def test_a_late_order_touches_its_impression_s_day_and_the_days_that_show_it() -> None:
    world = World().impression("i", "u", "x", 0, T).click("c", "u", "x", 0, T + 1, "i")
    for day in (1, 3, 4):
        world.impression(f"k{day}", "u", "y", 1, T + day * DAY)
    late = copy.deepcopy(world).order("o", "u", "x", T + 2 * HOUR, known=T + 3 * DAY)
    days = touched(world, late, RULES, (NOON, NOON))
    assert days == {MONDAY: ["labels"], MONDAY + 3: ["histories"], MONDAY + 4: ["histories"]}


def test_a_late_rejected_click_touches_nothing() -> None:
    world = World().impression("i", "u", "x", 0, T)
    assert touched(world, copy.deepcopy(world).click("c", "u", "y", 0, T + 1), RULES, (NOON, NOON)) == {}


def test_the_watermark_touches_the_days_it_had_not_closed() -> None:
    world = World().impression("i", "u", "x", 0, T)
    marks = ((MONDAY + 1) * DAY, (MONDAY + 2) * DAY)
    # Rows of a day are final 25 hours after its end: Saturday's were so at the first mark, Wednesday's at neither.
    assert touched(world, world, RULES, marks) == {day: ["final_until"] for day in range(MONDAY - 1, MONDAY + 6)}
