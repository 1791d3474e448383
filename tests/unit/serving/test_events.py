"""Events since a publication: histories against the ETL's slow oracle; a log that is kept, shared and read again."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.etl_oracle import Windows, World, expected, unique, without_giants
from tests.unit.etl_worlds import NOON, SECOND, duplicated, windows_of, worlds
from tests.unit.examples import depth
from tests.unit.samples_table import samples_spec
from usr_ray.config import Config
from usr_ray.config.etl import LimitsConfig
from usr_ray.serving.encode import Encoder, UserEvents
from usr_ray.serving.events import KEPT_DAYS, EventError, EventLog, Row, Rules, attributed, checked_rows, with_live
from usr_ray.serving.publish import most_rows_a_day

pytestmark = pytest.mark.unit

LENGTH = 3
SCENARIOS = ("search", "recommendation")


class Indexed:
    """A vocabulary of a few values."""

    def __init__(self, *values: str) -> None:
        self.numbers = {value: 2 + n for n, value in enumerate(values)}

    def find(self, values: list[str]) -> Any:
        return np.array([self.numbers.get(value, -1) for value in values], dtype=np.int64)


IDS = {"item_id": Indexed("x", "y"), "query": Indexed("q", "r")}
ENCODER = Encoder(samples_spec(history_length=LENGTH), IDS, None)  # type: ignore[arg-type]


def rows_of(world: World) -> list[Row]:
    """As the service gets them, all logs of the world."""

    def iso(micros: int) -> str:
        return (dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=micros)).isoformat()

    raw: dict[str, list[dict[str, Any]]] = {}
    for kind, rows in (("impression", world.impressions), ("click", world.clicks), ("order", world.orders)):
        for r in rows:
            row = {f"{kind}_id": r["id"], "user_id": r["user"], "item_id": r["item"], "event_time": iso(r["time"])}
            if r["known"] != r["time"]:
                row["ingest_time"] = iso(r["known"])
            if kind == "impression" and r["query"] is not None:
                row["query"] = r["query"]
            if r.get("names") is not None:
                row["impression_id"] = r["names"]
            log = "orders" if r["scenario"] is None else f"{SCENARIOS[r['scenario']]}_{kind}s"
            raw.setdefault(log, []).append(row)
    return checked_rows(raw, SCENARIOS)


def number(feature: str, value: str | None) -> int:
    return 0 if value is None else IDS[feature].numbers[value]


@pytest.mark.integration
@depth(100)
@given(data=st.data(), world=worlds(), windows=windows_of(max_user_day_rows=0))
def test_a_request_sees_what_the_etl_would_have_shown_it(
    data: Any, world: World, windows: Windows, tmp_path_factory: Any
) -> None:
    world = duplicated(data.draw, world)
    rows = data.draw(st.permutations(rows_of(world)))
    cut = data.draw(st.integers(0, len(rows)))
    log = EventLog(tmp_path_factory.mktemp("log"))
    log.append(rows[:cut])
    log.append(rows[cut:])
    most = data.draw(st.sampled_from([0, 0, 2, 4]))
    rules = Rules(windows.click, windows.order, windows.skew, windows.credit_impression, most)
    counted = (unique(world.impressions, ("id",)), unique(world.clicks, ("scenario", "id")))
    whole = World(*without_giants(*counted, unique(world.orders, ("id", "item")), most)[:3])
    as_of = NOON + data.draw(st.integers(0, 30)) * SECOND
    for shown in world.impressions:
        of_user = log.of_user(shown["user"])
        # What a lake up to `as_of` has put into the store comes to the same; the log holds it too.
        stored = with_live(UserEvents.none(), of_user, rules, ENCODER, min(as_of, shown["time"]))
        for before in (UserEvents.none(), stored):
            events = with_live(before, of_user, rules, ENCODER, shown["time"])
            assert len(np.unique(events.key)) == len(events.key)
            found = ENCODER.histories(events, shown["time"])
            one = expected_at(whole, shown, windows)
            for scenario, history in zip(SCENARIOS, one, strict=True):
                padding = [0] * (LENGTH - len(history))
                items = [number("item_id", item) for item, *_ in history]
                assert found[f"{scenario}_history_item_ids"][0].tolist() == padding + items
                assert found[f"{scenario}_history_actions"][0].tolist() == padding + [a for _, _, a, _ in history]
                ages = [np.float32(age / 1e6) for *_, age in history]
                assert found[f"{scenario}_history_ages_s"][0].tolist() == padding + ages
            queries = [number("query", query) for _, query, *_ in one[0]]
            assert found["search_history_query_ids"][0].tolist() == [0] * (LENGTH - len(queries)) + queries


def expected_at(world: World, shown: dict[str, Any], windows: Windows) -> list[list[tuple]]:
    """The histories of a new impression of the user of `shown`, of no known item, at its time."""
    asked = World([*world.impressions], world.clicks, world.orders)
    asked.impression("asked", shown["user"], "none", 0, shown["time"])
    return expected(asked, windows, num_scenarios=2, length=LENGTH, watermark=0).samples["asked"]["histories"]


CLICK = Row("clicks", "c", "u", "x", "search", 5, 5, None)


def ids(log: EventLog, user: str = "u") -> list[tuple[str, int]]:
    return sorted((row.id, row.time) for row in log.of_user(user))


def test_the_log_is_read_again_at_a_start_and_shared_between_replicas(tmp_path: Any) -> None:
    one, two = EventLog(tmp_path / "log"), EventLog(tmp_path / "log")
    assert ids(one) == []
    assert one.append([CLICK, CLICK]) == 1
    assert ids(two) == [("c", 5)]
    assert two.append([CLICK._replace(id="d"), CLICK]) == 1
    assert ids(one) == ids(EventLog(tmp_path / "log")) == [("c", 5), ("d", 5)]


def test_a_request_does_not_wait_for_the_disk_that_takes_a_post(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path)
    log.append([CLICK])
    reached, may_end = threading.Event(), threading.Event()

    def slow(_: int) -> None:
        reached.set()
        assert may_end.wait(30)

    monkeypatch.setattr("usr_ray.serving.events.os.fsync", slow)
    with ThreadPoolExecutor(2) as pool:
        post = pool.submit(log.append, [CLICK._replace(id="e", user="v")])
        assert reached.wait(30)
        try:
            assert [row.id for row in pool.submit(log.of_user, CLICK.user).result(10)] == [CLICK.id]
            assert not post.done()
        finally:
            may_end.set()
        assert post.result(30) == 1
    assert [row.id for row in log.of_user("v")] == ["e"]


def test_of_two_rows_with_one_key_the_earliest_stays(tmp_path: Any) -> None:
    log = EventLog(tmp_path)
    assert log.append([CLICK]) == 1
    assert log.append([CLICK._replace(time=6), CLICK._replace(known=9)]) == 0
    assert log.append([CLICK._replace(time=3, user="v")]) == 1
    assert (ids(log), ids(log, "v")) == ([], [("c", 3)])
    assert (ids(EventLog(tmp_path)), ids(EventLog(tmp_path), "v")) == ([], [("c", 3)])
    # Another scenario's click and another line of an order are others.
    order = CLICK._replace(kind="orders")
    assert log.append([CLICK._replace(scenario="recommendation"), order, order._replace(item="y")]) == 3


def test_a_line_that_a_crash_cut_off_loses_itself_only(tmp_path: Any) -> None:
    log = EventLog(tmp_path)
    log.append([CLICK])
    (file,) = tmp_path.iterdir()
    with file.open("a") as opened:
        opened.write(json.dumps(CLICK._replace(id="torn"))[:-9])
    assert ids(log) == ids(EventLog(tmp_path)) == [("c", 5)]
    log.append([CLICK._replace(id="d")])
    assert ids(log) == ids(EventLog(tmp_path)) == [("c", 5), ("d", 5)]


def test_rows_of_a_user_hold_one_string_for_all(tmp_path: Any) -> None:
    EventLog(tmp_path).append([CLICK, CLICK._replace(id="d")])
    first, second = EventLog(tmp_path).of_user(CLICK.user)
    assert first.user is second.user
    assert first.item is second.item


def test_days_that_are_over_for_long_are_forgotten(tmp_path: Any) -> None:
    log = EventLog(tmp_path)
    log.append([CLICK])
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "2020-01-01.jsonl")
    old = EventLog(tmp_path)
    assert ids(old) == [("c", 5)]  # the only file: nothing newer says that its time is over
    assert old.append([CLICK._replace(id="d")]) == 1
    assert ids(old) == [("d", 5)]
    assert [path.name for path in tmp_path.iterdir()] != ["2020-01-01.jsonl"]
    assert len(list(tmp_path.iterdir())) == 1


class Clock(dt.datetime):
    """A clock that a test moves on."""

    day = 0

    @classmethod
    def now(cls, tz: Any = None) -> dt.datetime:
        return dt.datetime(2026, 1, 1, 12, tzinfo=tz) + dt.timedelta(days=cls.day)


def test_replicas_forget_a_day_whichever_of_them_dropped_its_file(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(datetime=Clock, UTC=dt.UTC, timedelta=dt.timedelta)
    monkeypatch.setattr("usr_ray.serving.events.dt", clock)
    one, two = EventLog(tmp_path), EventLog(tmp_path)
    for day in range(25):
        monkeypatch.setattr(Clock, "day", day)
        one.append([CLICK._replace(id=f"{day:02}")])  # it drops the files, before `two` looks
        kept = [(f"{n:02}", 5) for n in range(max(day - KEPT_DAYS, 0), day + 1)]
        assert ids(one) == ids(two) == ids(EventLog(tmp_path)) == kept
    assert one._offsets == two._offsets
    assert len(two._rows) == len(two._offsets) == len(list(tmp_path.iterdir())) == KEPT_DAYS + 1
    for file in tmp_path.iterdir():
        file.unlink()  # whoever removes a user's rows by hand need not restart the service
    assert ids(one) == ids(two) == []
    assert two.append([CLICK]) == 1
    assert ids(one) == [("c", 5)]


@pytest.mark.parametrize("how", ["in place", "replaced", "removed"])
def test_a_file_that_somebody_has_edited_is_read_anew(tmp_path: Any, how: str) -> None:
    """As whoever has to delete a user's rows does; what is posted then must be seen, too."""
    one, two = EventLog(tmp_path), EventLog(tmp_path)
    rows = [CLICK._replace(id=f"{n}", user=f"u{n % 2}") for n in range(40)]
    one.append(rows)
    assert len(one.of_user("u0")) == len(two.of_user("u1")) == 20
    (file,) = tmp_path.iterdir()
    kept = [line for line in file.read_text().splitlines(keepends=True) if '"u1"' not in line]
    if how == "in place":
        file.write_text("".join(kept))
    elif how == "replaced":  # by one that is longer, as one that was put back may be
        (tmp_path / "new").write_text("".join(kept + [line.replace('"u0"', '"u2"') for line in kept] * 2))
        (tmp_path / "new").rename(file)
    else:
        file.unlink()
    assert two.append([CLICK._replace(id="later", user="u1")]) == 1
    for log in (one, two, EventLog(tmp_path)):
        assert [row.id for row in log.of_user("u1")] == ["later"]
        assert len(log.of_user("u0")) == (0 if how == "removed" else 20)


def test_a_file_that_vanishes_while_the_folder_is_read_is_passed_over(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path)
    log.append([CLICK])
    (tmp_path / "2026-01-01.jsonl").symlink_to("gone")  # listed, and no file when its size is asked for
    assert ids(log) == [("c", 5)]
    (tmp_path / "2026-01-01.jsonl").unlink()
    (tmp_path / "2026-01-02.jsonl").write_text(json.dumps(CLICK._replace(id="old")) + "\n")
    read = EventLog._read

    def dropped(self: EventLog, name: str) -> None:
        if name == "2026-01-02.jsonl":
            (tmp_path / name).unlink()
        read(self, name)

    monkeypatch.setattr(EventLog, "_read", dropped)
    assert ids(EventLog(tmp_path)) == [("c", 5)]


GOOD = {"click_id": "c", "user_id": 7, "item_id": "x", "event_time": "2026-01-01T00:00:00Z"}
BAD: list[tuple[Any, str]] = [
    ([], r"^events: list; an object of logs is needed: search_impressions, search_clicks"),
    ({}, r"^events: dict"),
    ({"cart_clicks": []}, r"^unknown log 'cart_clicks'; there are: search_impressions"),
    ({"orders": {}}, r"^orders: is dict; a list of rows"),
    ({"orders": [3]}, r"^orders\[0\]: is int; an object"),
    (
        {"search_clicks": [GOOD, GOOD | {"x": 1}]},
        r"^search_clicks\[1\]: unknown field 'x'; a row has: click_id, user_id",
    ),
    ({"search_clicks": [GOOD | {"user_id": ""}]}, r"^search_clicks\[0\].user_id: is ''"),
    ({"search_clicks": [GOOD | {"user_id": True}]}, r"^search_clicks\[0\].user_id: is bool"),
    ({"search_clicks": [GOOD | {"event_time": "2026-01-01"}]}, r"^search_clicks\[0\].event_time: .* cannot be read"),
    ({"search_clicks": [GOOD | {"ingest_time": 3}]}, r"^search_clicks\[0\].ingest_time: 3 cannot be read"),
]


@pytest.mark.parametrize(("raw", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_events_are_refused_in_one_line(raw: Any, message: str) -> None:
    with pytest.raises(EventError, match=message):
        checked_rows(raw, SCENARIOS)


def test_rows_are_those_of_the_logs() -> None:
    at = 1_767_225_600_000_000
    shown = {
        "impression_id": 1,
        "user_id": 7,
        "item_id": "x",
        "event_time": "2026-01-01T00:00:00Z",
        "query": "q",
        "page": 3,
    }
    assert checked_rows({"search_impressions": [shown], "search_clicks": [GOOD | {"impression_id": 1}]}, SCENARIOS) == [
        Row("impressions", "1", "7", "x", "search", at, at, "q"),
        Row("clicks", "c", "7", "x", "search", at, at, "1"),
    ]


def test_what_a_log_has_for_no_value_is_none_in_a_posted_row() -> None:
    shown = {"impression_id": "i", "user_id": 7, "item_id": "x", "event_time": "2026-01-01T00:00:00Z", "query": "-"}
    raw = {"search_impressions": [shown], "search_clicks": [GOOD | {"impression_id": "-", "ingest_time": "NULL"}]}
    nulls = {"search_impressions": ["-"], "search_clicks": ["NULL", "-"], "orders": ["x"]}
    assert [row.of for row in checked_rows(raw, SCENARIOS, nulls)] == [None, None]
    kept = checked_rows({"search_impressions": [shown]}, SCENARIOS, {"recommendation_impressions": ["-"]})
    assert [row.of for row in kept] == ["-"]
    order = {"order_id": "o", "user_id": "u", "item_id": "x", "event_time": "2026-01-01T00:00:00Z"}
    with pytest.raises(EventError, match=r"^orders\[0\].item_id: is 'x'; a string that is not empty is needed"):
        checked_rows({"orders": [order]}, SCENARIOS, nulls)


def test_a_day_with_more_rows_than_the_limit_is_left_out_whole() -> None:
    day = 86_400_000_000
    rows = [
        Row("impressions", "i", "u", "x", "search", 5, 5, None),
        Row("clicks", "c", "u", "x", "search", 9, 9, "i"),
        Row("clicks", "elsewhere", "u", "x", "gone", 9, 9, None),  # of a scenario that is none: not counted
        Row("impressions", "j", "u", "x", "search", day + 5, day + 5, None),
        Row("clicks", "d", "u", "x", "search", day + 9, day + 9, "j"),
        Row("orders", "o", "u", "x", "search", day + 11, day + 11, None),
    ]
    for most, kept in ((0, ["c", "d", "o"]), (3, ["c", "d", "o"]), (2, ["c"]), (1, [])):
        found = attributed(rows, Rules(day, day, max_user_day_rows=most), SCENARIOS)
        assert [event.row.id for event in found] == kept


@pytest.mark.parametrize("named", [True, False])
def test_windows_end_with_their_last_microsecond(named: bool) -> None:
    """Impression at 1,000; click window 500, order window 700, both with their ends; the skew is 30."""
    rules = Rules(click_window=500, order_window=700, clock_skew=30)
    shown = Row("impressions", "i", "u", "x", "search", 1_000, 1_000, None)
    for click_at, is_click in ((969, False), (970, True), (1_500, True), (1_501, False)):
        click = Row("clicks", "c", "u", "x", "search", click_at, click_at, "i" if named else None)
        found = [event.row.id for event in attributed([shown, click], rules, SCENARIOS)]
        assert found == (["c"] if is_click else [])
    click = Row("clicks", "c", "u", "x", "search", 1_200, 1_200, "i" if named else None)
    for order_at, is_order in ((1_169, False), (1_170, True), (1_900, True), (1_901, False)):
        order = Row("orders", "o", "u", "x", None, order_at, order_at, None)
        found = [event.row.id for event in attributed([shown, click, order], rules, SCENARIOS)]
        assert found == (["c", "o"] if is_order else ["c"])


def test_the_limit_is_the_one_that_the_samples_were_built_with() -> None:
    built = [
        dataclasses.replace(Config(), limits=LimitsConfig(max_user_events_per_day=n)).row_meaning() for n in (0, 9)
    ]
    for text, most in (("", 0), (json.dumps(built[0]), 0), (json.dumps(built[1]), 9)):
        manifest: Any = SimpleNamespace(built_with=text)
        assert most_rows_a_day(manifest) == most
    rules = Rules.of(Config().labels, 9)
    assert (rules.max_user_day_rows, rules.click_window) == (9, Config().labels.click_window_us)
