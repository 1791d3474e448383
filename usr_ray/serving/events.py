"""What users have done since a version was published: a durable log of events, and the histories that follow from it.

Rows are those of the logs (docs/own-logs.md): a post is checked whole, appended to a file of its UTC day, flushed to
the disk, and only then answered. All replicas of a node share the folder: each reads on where it stopped before it
answers a request, and from the beginning when it starts. Attribution is that of the ETL (docs/tables.md, labels 1, 2
and 7), applied to a user's rows when they are asked for, so that rows may come in any order.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from usr_ray.config import DAY_US, LabelsConfig, UserError
from usr_ray.schema import ACTION_CLICK, ACTION_ORDER
from usr_ray.serving.encode import EncodeError, Encoder, UserEvents, category_text, event_keys, micros_of, without_nulls

IMPRESSION, CLICK, ORDER = "impressions", "clicks", "orders"
_IDS = {IMPRESSION: "impression_id", CLICK: "click_id", ORDER: "order_id"}
_OPTIONAL = {IMPRESSION: ("query",), CLICK: ("impression_id",), ORDER: ()}
KEPT_DAYS = 8
"""Days of arrival that the log holds. Daily publications need two; a version that a rollback goes back to may be older,
and lacks then what is neither in it nor in the log."""


def kept_from() -> dt.datetime:
    """The beginning of the first UTC day of arrival that a log still holds."""
    now = dt.datetime.now(dt.UTC)
    return dt.datetime(now.year, now.month, now.day, tzinfo=dt.UTC) - dt.timedelta(days=KEPT_DAYS)


class EventError(UserError):
    """Events that cannot be taken: one line with the row, what was found and what is needed."""


class Row(NamedTuple):
    """A row of a log. Times are microseconds since 1970."""

    kind: str
    id: str
    user: str
    item: str
    scenario: str | None
    """None for an order of the shop's common log."""
    time: int
    known: int
    of: str | None
    """An impression's query, or the impression_id that a click names."""

    @property
    def key(self) -> tuple[str | None, ...]:
        """What makes a row another one; of two with one key the earliest (time, known) stays."""
        return {IMPRESSION: (), CLICK: (self.scenario,), ORDER: (self.item,)}[self.kind] + (self.kind, self.id)

    @property
    def rank(self) -> tuple[int, int, bool]:
        """The least of one key stays: the earliest, and a scenario's order before the shop's."""
        return self.time, self.known, self.scenario is None


@dataclass(frozen=True, slots=True)
class Rules:
    """How events are attributed: `labels.*` in microseconds, and the limit of the lake that a version came from."""

    click_window: int
    order_window: int
    clock_skew: int = 0
    credit_impression: bool = False
    max_user_day_rows: int = 0
    """`limits.max_user_events_per_day`; 0: no limit."""

    @classmethod
    def of(cls, labels: LabelsConfig, max_user_day_rows: int) -> Rules:
        """The rules of a configuration."""
        credit = labels.order_without_click == "credit_impression"
        return cls(labels.click_window_us, labels.order_window_us, labels.clock_skew_us, credit, max_user_day_rows)


class Event(NamedTuple):
    """An attributed click or credited order line, at its corrected time."""

    time: int
    action: int
    row: Row
    impression: Row


def attributed(rows: Iterable[Row], rules: Rules, scenarios: Sequence[str]) -> list[Event]:
    """Clicks and orders of one user that belong to an impression, sorted by (time, action, id).

    A UTC day with more rows than the rules allow is left out whole, before anything else. Rows of the day that were
    published before, and never posted here, are not counted.
    """
    rows = [row for row in rows if row.scenario is None or row.scenario in scenarios]
    if rules.max_user_day_rows:
        of_day = Counter(row.time // DAY_US for row in rows)
        rows = [row for row in rows if of_day[row.time // DAY_US] <= rules.max_user_day_rows]
    shown: dict[str, Row] = {}
    by_item: dict[str, list[Row]] = {}
    clicks: list[Row] = []
    orders: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.time, row.id)):
        if row.kind == IMPRESSION:
            shown[row.id] = row
            by_item.setdefault(row.item, []).append(row)
        else:
            (clicks if row.kind == CLICK else orders).append(row)

    def last_shown(row: Row, window: int) -> Row | None:
        for impression in reversed(by_item.get(row.item, [])):
            if row.scenario in (None, impression.scenario) and impression.time - rules.clock_skew <= row.time:
                return impression if row.time <= impression.time + window else None
        return None

    events: list[Event] = []
    for click in clicks:
        target = shown.get(click.of) if click.of is not None else last_shown(click, rules.click_window)
        if target is None or (target.item, target.scenario) != (click.item, click.scenario):
            continue
        if target.time - rules.clock_skew <= click.time <= target.time + rules.click_window:
            events.append(Event(max(click.time, target.time), ACTION_CLICK, click, target))
    clicked: dict[str, list[Event]] = {}
    for event in sorted(events, key=lambda e: (e.time, e.row.id, scenarios.index(str(e.row.scenario)))):
        clicked.setdefault(event.row.item, []).append(event)
    for order in orders:
        same = [e for e in clicked.get(order.item, []) if order.scenario in (None, e.row.scenario)]
        near = [e for e in same if e.time - rules.clock_skew <= order.time <= e.time + rules.order_window]
        if near:
            events.append(Event(max(order.time, near[-1].time), ACTION_ORDER, order, near[-1].impression))
        elif rules.credit_impression and (found := last_shown(order, rules.order_window)) is not None:
            events.append(Event(max(order.time, found.time), ACTION_ORDER, order, found))
    return sorted(events, key=lambda e: (e.time, e.action, e.row.id, e.row.item))


class EventLog:
    """The events of a folder, shared by the processes of a node. Any number of threads may call it.

    Args:
        folder: need not exist; the first post creates it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets: dict[str, int] = {}
        self._inodes: dict[str, int] = {}
        """Of the files that were read."""
        self._rows: dict[tuple[str | None, ...], tuple[Row, str]] = {}
        self._of_user: dict[str, dict[tuple[str | None, ...], Row]] = {}
        self._texts: dict[str, str] = {}
        """Users and items are in many rows: one string for all of them takes a quarter less memory. Not sys.intern,
        which keeps its strings for ever in some versions of Python."""
        self._lock = threading.Lock()
        """Round what is read; never held while the disk is waited for, since requests take it."""
        self._writing = threading.Lock()

    def append(self, rows: Sequence[Row]) -> int:
        """Keep rows for good, but for those that are there; how many are new.

        Raises:
            OSError: the disk does not take them. What was written of them then may count or not; post them again.
        """
        with self._writing:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{dt.datetime.now(dt.UTC):%Y-%m-%d}.jsonl"
            with path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file; other replicas append too
                new = {row.key: row for row in sorted(rows, key=lambda row: row.rank, reverse=True)}
                with self._lock:
                    self._read_on()
                    new = {key: row for key, row in new.items() if self._is_news(row)}
                lines = [json.dumps(row, ensure_ascii=True) for row in new.values()]
                if lines:
                    size = file.seek(0, os.SEEK_END)
                    if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                        lines.insert(0, "")  # a line that a crash cut off stays alone
                    file.write(("\n".join(lines) + "\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
            self.catch_up()
            return len(new)

    def catch_up(self) -> None:
        """Read what was appended since; from the beginning, a service's log of a week takes longer than an answer may.

        Raises:
            OSError: the folder cannot be read.
        """
        with self._lock:
            self._read_on()

    def of_user(self, user_id: str) -> list[Row]:
        """All rows of a user, those that others have just appended included.

        Raises:
            OSError: the folder cannot be read.
        """
        with self._lock:
            self._read_on()
            return list(self._of_user.get(user_id, {}).values())

    def _is_news(self, row: Row) -> bool:
        before = self._rows.get(row.key)
        return before is None or row.rank < before[0].rank

    def _read_on(self) -> None:
        if not self.folder.is_dir():
            return
        found: dict[str, os.stat_result] = {}
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".jsonl"):
                with contextlib.suppress(FileNotFoundError):  # another replica has just dropped it
                    found[entry.name] = entry.stat()
        for name, now in found.items():
            if now.st_size < self._offsets.get(name, 0) or now.st_ino != self._inodes.get(name, now.st_ino):
                for of_files in (self._offsets, self._inodes, self._rows, self._of_user, self._texts):
                    of_files.clear()  # somebody cut or replaced a file: what was read where is no longer known
                break
        for name in sorted(found):
            if found[name].st_size > self._offsets.get(name, 0):
                with contextlib.suppress(FileNotFoundError):
                    self._read(name)
        self._forget(found.keys())

    def _read(self, name: str) -> None:
        with (self.folder / name).open("rb") as file:
            self._inodes[name] = os.fstat(file.fileno()).st_ino
            file.seek(self._offsets.get(name, 0))
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]  # a line in the making is read when it is whole
        self._offsets[name] = self._offsets.get(name, 0) + len(content)
        for line in content.splitlines():
            try:
                kind, id_, user, item, scenario, happened, known, of = json.loads(line)
                kind, user, item, scenario = (self._texts.setdefault(one, one) for one in (kind, user, item, scenario))
                row = Row(kind, id_, user, item, scenario, happened, known, of)
            except (ValueError, TypeError):
                continue  # cut off by a crash, before its post was answered
            if self._is_news(row):
                before = self._rows.get(row.key)
                if before is not None:
                    del self._of_user[before[0].user][row.key]
                self._rows[row.key] = row, name
                self._of_user.setdefault(row.user, {})[row.key] = row

    def _forget(self, found: Set[str]) -> None:
        """Days of arrival that are over for long, on the disk and here, and those whose file another has dropped."""
        first = f"{kept_from():%Y-%m-%d}.jsonl"
        over = {name for name in found if name < first} if len(found) > 1 else set()
        for name in over:
            (self.folder / name).unlink(missing_ok=True)
        gone = over | (self._offsets.keys() - found)
        if not gone:
            return
        self._texts.clear()  # of rows that stay too: later ones share others
        for name in gone:
            self._offsets.pop(name, None)
            self._inodes.pop(name, None)
        for key, (row, name) in list(self._rows.items()):
            if name in gone:
                del self._rows[key], self._of_user[row.user][key]
                if not self._of_user[row.user]:
                    del self._of_user[row.user]


def with_live(stored: UserEvents, rows: Sequence[Row], rules: Rules, encoder: Encoder, time_us: int) -> UserEvents:
    """The stored events of a user and those of the log, each once, sorted as a history is.

    Args:
        time_us: of the request; what is not visible at it may be left out.
    """
    scenarios = encoder.spec.scenarios
    events = [e for e in attributed(rows, rules, scenarios) if e.time < time_us and e.row.known <= time_us]
    if not events:
        return stored
    keys = event_keys((e.action, e.row.id, e.row.item) for e in events)
    names = [str(e.impression.scenario) for e in events]
    queries = [
        (e.impression.of or None) if name in encoder.spec.query_scenarios else None
        for e, name in zip(events, names, strict=True)
    ]
    live = UserEvents(
        time=np.array([e.time for e in events], np.int64),
        known=np.array([max(e.row.known, e.time) for e in events], np.int64),
        scenario=np.array([scenarios.index(name) for name in names], np.uint8),
        action=np.array([e.action for e in events], np.uint8),
        item=encoder.ids("item_id", [e.row.item for e in events]).astype(np.int32),
        query=encoder.ids("query", queries).astype(np.int32),
        key=keys,
    )
    # What is in both is taken from here, where its id puts it in its place among events of the same time.
    return stored.rows(np.flatnonzero(~np.isin(stored.key, keys))).and_then(live)


# ---- from a request


def checked_rows(
    raw: Any, scenarios: Sequence[str], null_values: Mapping[str, Collection[str]] | None = None
) -> list[Row]:
    """The rows of a post: an object of logs, such as {"search_clicks": [{"click_id": ...}, ..], "orders": [..]}.

    Args:
        null_values: log -> texts that stand for no value in it.

    Raises:
        EventError: a log, a field or a value is none.
    """
    logs = {f"{s}_{kind}": (s, kind) for s in scenarios for kind in (IMPRESSION, CLICK, ORDER)} | {ORDER: (None, ORDER)}
    if not isinstance(raw, Mapping) or not raw:
        raise EventError(f"events: {type(raw).__name__}; an object of logs is needed: {', '.join(logs)}")
    rows: list[Row] = []
    for log, entries in raw.items():
        if log not in logs:
            raise EventError(f"unknown log {log!r:.60}; there are: {', '.join(logs)}")
        if not isinstance(entries, list):
            raise EventError(f"{log}: is {type(entries).__name__}; a list of rows is needed")
        scenario, kind = logs[log]
        nulls = (null_values or {}).get(log, ())
        rows += [_row(entry, scenario, kind, nulls, f"{log}[{n}]") for n, entry in enumerate(entries)]
    return rows


def _row(raw: Any, scenario: str | None, kind: str, nulls: Collection[str], where: str) -> Row:
    if not isinstance(raw, Mapping):
        raise EventError(f"{where}: is {type(raw).__name__}; an object is needed")
    names = (_IDS[kind], "user_id", "item_id", "event_time", "ingest_time", *_OPTIONAL[kind])
    strange = sorted(set(raw) - set(names))
    if strange and kind != IMPRESSION:  # further columns of impressions are features of the context
        raise EventError(f"{where}: unknown field {strange[0]!r:.60}; a row has: {', '.join(names)}")

    def text(name: str) -> str | None:
        if isinstance(raw.get(name), bool):
            raise EventError(f"{where}.{name}: is bool; a string or an integer is needed")
        try:
            return category_text(without_nulls(raw.get(name), nulls))
        except EncodeError as error:
            raise EventError(f"{where}.{name}: {error}") from error

    def needed(name: str) -> str:
        value = text(name)
        if value is None:
            raise EventError(f"{where}.{name}: is {raw.get(name)!r:.40}; a string that is not empty is needed")
        return value

    id_, user, item = (needed(name) for name in (_IDS[kind], "user_id", "item_id"))
    time_us = _micros(raw.get("event_time"), f"{where}.event_time")
    ingest = without_nulls(raw.get("ingest_time"), nulls)
    known_us = time_us if ingest is None else _micros(ingest, f"{where}.ingest_time")
    of = [text(name) for name in _OPTIONAL[kind]]
    return Row(kind, id_, user, item, scenario, time_us, known_us, of[0] if of else None)


def _micros(raw: Any, where: str) -> int:
    try:
        return micros_of(raw)
    except (TypeError, ValueError) as error:
        raise EventError(
            f"{where}: {raw!r:.60} cannot be read; ISO 8601 with a zone is needed, such as 2026-01-08T12:00:00Z"
        ) from error
