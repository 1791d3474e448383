"""Fingerprints of a date: whatever changes a row of the date changes one of them; what does not, mostly does not."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.attribution import attribute
from etl.events import Events
from etl.fingerprint import Cell, cells, date_fingerprint
from tests.etl_oracle import DAY, Windows, World, expected
from tests.unit.etl_worlds import NOON, SECOND, lags, rules_of, seconds, table, windows_of, worlds

pytestmark = pytest.mark.unit

HOUR = 3600 * SECOND
RULES = Windows(click=HOUR, order=24 * HOUR, whole=HOUR)
MONDAY = NOON // DAY
T = MONDAY * DAY + 10 * HOUR


def all_cells(world: World, windows: Windows) -> list[Cell]:
    rows = table(world)
    queries = {i["id"]: i["query"] for i in world.impressions}
    events = Events.from_arrow(rows, ranked=windows.skew > 0)
    hashes = []
    for row in rows.to_pylist():
        if row["kind"] == 1:
            del row["known_time"]
        content = f"{sorted(row.items())} {queries.get(row['id']) if row['kind'] == 1 else ''}"
        hashes.append(int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little", signed=True))
    rules = rules_of(windows)
    attribution = attribute(events, rules, num_scenarios=2)
    days, combined = cells(events, attribution, np.array(hashes, dtype=np.int64), rules)
    return [
        Cell(shown, first, last, None if visible < 0 else visible, number % 2**64)
        for (shown, first, last, visible), number in zip(days.T.tolist(), combined.tolist(), strict=True)
    ]


def touched(before: World, after: World, windows: Windows, marks: tuple[int, int]) -> set[int]:
    """Days, of a week around MONDAY, whose fingerprints differ."""
    days = range(MONDAY - 3, MONDAY + 6)
    old, new = (
        [date_fingerprint(d, all_cells(w, windows), rules_of(windows), m) for d in days]
        for w, m in zip((before, after), marks, strict=True)
    )
    return {day for day, a, b in zip(days, old, new, strict=True) if a != b}


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


@settings(max_examples=120, deadline=None)
@given(world=worlds(max_rows=8), windows=windows_of(), later=st.integers(0, 2), data=st.data())
def test_no_change_of_a_row_goes_unseen(world: World, windows: Windows, later: int, data: st.DataObject) -> None:
    after = copy.deepcopy(world)
    spread = st.integers(-1, 2).map(lambda n: n * DAY)
    for row in (*after.impressions, *after.clicks, *after.orders):  # days on end, as well as equal instants
        shift = data.draw(spread)
        row["time"] += shift
        row["known"] += shift
    before = copy.deepcopy(after)
    for kind in data.draw(
        st.lists(st.sampled_from(["click", "order", "impression", "gone", "query", "known"]), max_size=3)
    ):
        shown = data.draw(st.sampled_from(after.impressions))
        time = data.draw(
            st.sampled_from([shown["time"], shown["time"] + 2 * SECOND, shown["time"] + DAY, data.draw(seconds)])
        )
        number = len(after.clicks) + len(after.orders) + len(after.impressions)
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
    assert changed(before, after, windows, marks) <= touched(before, after, windows, marks)


def test_equal_worlds_have_equal_fingerprints_however_they_are_cut() -> None:
    world = World()
    for n, user in enumerate("abcd"):
        world.impression(f"i{n}", user, "x", 0, T).click(f"c{n}", user, "x", 0, T + n, f"i{n}").order(
            f"o{n}", user, "x", T + 9
        )
    parts = [World([i], [c], [o]) for i, c, o in zip(world.impressions, world.clicks, world.orders, strict=True)]
    rules = rules_of(RULES)
    whole = date_fingerprint(MONDAY, all_cells(world, RULES), rules, NOON)
    cut = date_fingerprint(MONDAY, [cell for part in parts for cell in all_cells(part, RULES)], rules, NOON)
    assert whole == cut
    assert len({whole["impressions"], whole["labels"], "0" * 16}) == 3


def test_a_late_order_touches_its_impression_s_day_and_the_days_that_could_know_it() -> None:
    world = World().impression("i", "u", "x", 0, T).click("c", "u", "x", 0, T + 1, "i")
    late = copy.deepcopy(world).order("o", "u", "x", T + 2 * HOUR, known=T + 3 * DAY)
    days = touched(world, late, RULES, (NOON, NOON))
    assert days == {MONDAY, MONDAY + 3, MONDAY + 4, MONDAY + 5}


def test_a_late_rejected_click_touches_nothing() -> None:
    world = World().impression("i", "u", "x", 0, T)
    assert touched(world, copy.deepcopy(world).click("c", "u", "y", 0, T + 1), RULES, (NOON, NOON)) == set()


def test_the_watermark_touches_the_days_it_had_not_closed() -> None:
    world = World().impression("i", "u", "x", 0, T)
    marks = ((MONDAY + 1) * DAY, (MONDAY + 2) * DAY)
    # Rows of a day are final 25 hours after its end: Saturday's were so at the first mark, Wednesday's at neither.
    assert touched(world, world, RULES, marks) == set(range(MONDAY - 1, MONDAY + 6))
