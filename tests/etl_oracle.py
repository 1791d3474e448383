"""The contract's sections 1 to 3 in plain, slow Python: what the ETL's tests compare with. It loops on purpose.

Times are whole microseconds. A row is a dict; `scenario` is its position in the scenarios (None: shop-wide order).
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

DAY = 86_400_000_000
UNSEEN = "\u00ad\u200c\u200d\u2060\ufeff" + "".join(chr(0xFE00 + n) for n in range(16))
"""Soft hyphen, joiners, byte order mark and the selectors of how a sign looks."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Windows:
    click: int
    order: int
    whole: int
    skew: int = 0
    day_span: bool = False
    credit_impression: bool = False
    max_user_day_rows: int = 0


@dataclass
class World:
    impressions: list[Row] = field(default_factory=list)
    clicks: list[Row] = field(default_factory=list)
    orders: list[Row] = field(default_factory=list)

    def impression(self, id: str, user: str, item: str, scenario: int, time: int, **more: Any) -> World:
        self.impressions.append(_row(id, user, item, scenario, time, query=None) | more)
        return self

    def click(
        self, id: str, user: str, item: str, scenario: int, time: int, names: str | None = None, **more: Any
    ) -> World:
        self.clicks.append(_row(id, user, item, scenario, time, names=names) | more)
        return self

    def order(self, id: str, user: str, item: str, time: int, scenario: int | None = None, **more: Any) -> World:
        self.orders.append(_row(id, user, item, scenario, time) | more)
        return self


def _row(id: str, user: str, item: str, scenario: int | None, time: int, **more: Any) -> Row:
    return {"id": id, "user": user, "item": item, "scenario": scenario, "time": time, "known": time, **more}


@dataclass
class Expected:
    samples: dict[str, Row]
    """impression_id -> labels, click_time, order_time (None where none), is_mature, histories per scenario."""
    rejects: dict[tuple[str, str, str], str]
    """("click" or "order", id, item) -> reason."""
    duplicates: dict[str, int]
    capped: int = 0
    """Rows of users' days beyond the limit."""


def unique(rows: list[Row], key: tuple[str, ...]) -> list[Row]:
    """Key duplicates: the earliest (event_time, ingest_time) stays; a scenario's log wins over the shop's."""
    kept: dict[tuple, Row] = {}
    for row in rows:
        name = tuple(row[k] for k in key)
        rank = (row["time"], row["known"], 99 if row["scenario"] is None else row["scenario"])
        if name not in kept or rank < kept[name]["rank"]:
            kept[name] = row | {"rank": rank}
    return list(kept.values())


@dataclass
class Attributed:
    impressions: list[Row]
    clicks: list[Row]
    """`target`: the impression; `at`: its time, not before the impression's."""
    orders: list[Row]
    """`target`, `at` and `click`, None where an impression is credited."""
    rejects: dict[tuple[str, str, str], str]
    duplicates: dict[str, int]
    capped: int


def expected(world: World, windows: Windows, *, num_scenarios: int, length: int, watermark: int) -> Expected:
    found = attributed(world, windows)
    # A row's labels come of events of its own user and item: the others need not be walked through for each row.
    clicks, orders = by_shelf(found.clicks), by_shelf(found.orders)
    samples = {
        i["id"]: {
            **labels(i, clicks[i["user"], i["item"]], orders[i["user"], i["item"]], windows, watermark),
            "histories": [history(i, found.clicks, found.orders, k, length) for k in range(num_scenarios)],
        }
        for i in found.impressions
    }
    return Expected(samples, found.rejects, found.duplicates, found.capped)


def counted(world: World, windows: Windows) -> list[Row]:
    """Every impression, attributed click and credited order line: what, by what, event day and the day it was known."""
    found = attributed(world, windows)
    rows = [(0, i, i, i["time"]) for i in found.impressions]
    rows += [(1, c["target"], c, c["at"]) for c in found.clicks]
    rows += [(2, o["target"], o, o["at"]) for o in found.orders]
    return [
        {
            "what": what,
            "id": target["id"],
            "user_id": target["user"],
            "item_id": target["item"],
            "query": target["query"],
            "scenario": target["scenario"],
            "event_day": at // DAY,
            "day": max(at, event["known"]) // DAY,
        }
        for what, target, event, at in rows
    ]


def counters(
    past: list[Row], own: dict[str, Any], scenario: int | None, day: int, window: int | None, prior: float
) -> dict[str, float]:
    """The counters of a row (docs/tables.md, counters).

    Args:
        past: of `counted`.
        own: key -> value of the row.
        scenario: None: over all of them.
        day: of the row.
        window: days; None: all before.
        prior: as in the configuration.
    """
    near = [
        event
        for event in past
        if event["day"] < day
        and (window is None or event["day"] >= day - window)
        and scenario in (None, event["scenario"])
    ]
    is_known = None not in own.values()
    mine = [event for event in near if is_known and all(event[key] == value for key, value in own.items())]
    counts = Counter(event["what"] for event in mine)
    every = Counter(event["what"] for event in near)
    values = {name: math.log(1 + counts[n]) for n, name in enumerate(("impressions", "clicks", "orders"))}
    for name, (of, hit) in {"ctr": (0, 1), "cvr": (1, 2)}.items():
        trials, all_trials = max(counts[of], counts[hit]), max(every[of], every[hit])
        values[name] = 0.0
        if trials and 0 < every[hit] < all_trials:
            rate = every[hit] / all_trials
            smooth = (counts[hit] + prior * rate) / (trials + prior)
            values[name] = math.log(smooth / (1 - smooth)) - math.log(rate / (1 - rate))
    return values


def tags(text: str | None, separator: str) -> list[str]:
    """The tags of a text: each once, without blanks around them."""
    found: list[str] = []
    for part in (text or "").split(separator):
        if part.strip() and part.strip() not in found:
            found.append(part.strip())
    return found


def terms(text: str | None) -> list[str]:
    """The terms of a text, character by character."""
    text = text or ""
    inside = text.strip()[1:-1].split(",")
    if text.strip()[:1] + text.strip()[-1:] == "[]" and all(part.strip().isdigit() for part in inside):
        return list(dict.fromkeys(part.strip() for part in inside))
    if "\x18" in text:
        return list(dict.fromkeys(part.strip() for part in text.split("\x18") if part.strip()))
    parts, kind = [""], ""
    for character in unicodedata.normalize("NFKC", text).lower():
        if character in UNSEEN:
            continue
        is_mark = unicodedata.category(character).startswith("M")
        if not (character.isalnum() or is_mark):
            kind = ""
            continue
        is_run = unicodedata.name(character, "").split()[0] in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
        now = kind if is_mark and kind else "run" if is_run else "word"
        parts = [*parts[:-1], parts[-1] + character] if now == kind else [*parts, character]
        kind = now
    found: list[str] = []
    for part in parts:
        is_run = bool(part) and unicodedata.name(part[0], "").split()[0] in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
        pieces = [part[n : n + size] for n in range(len(part)) for size in (1, 2)] if is_run else [part]
        found += [piece for piece in pieces if any(c.isalnum() for c in piece) and piece not in found]
    return list(dict.fromkeys(found))


def attributed(world: World, windows: Windows) -> Attributed:
    impressions = unique(world.impressions, ("id",))
    clicks = unique(world.clicks, ("scenario", "id"))
    orders = unique(world.orders, ("id", "item"))
    duplicates = {
        "impressions": len(world.impressions) - len(impressions),
        "clicks": len(world.clicks) - len(clicks),
        "orders": len(world.orders) - len(orders),
    }
    impressions, clicks, orders, capped = without_giants(impressions, clicks, orders, windows.max_user_day_rows)
    rejects: dict[tuple[str, str, str], str] = {}
    good_clicks, good_orders = [], []
    for click in clicks:
        target, reason = find_impression(click, impressions, windows)
        if target is None:
            rejects["click", click["id"], click["item"]] = reason
        else:
            good_clicks.append(click | {"target": target, "at": max(click["time"], target["time"])})
    for order in orders:
        credited, reason = find_click(order, good_clicks, windows)
        if credited is not None:
            at = max(order["time"], credited["at"])
            good_orders.append(order | {"target": credited["target"], "click": credited, "at": at})
            continue
        shown = last_shown(order, impressions, windows) if windows.credit_impression else None
        if shown is None:
            rejects["order", order["id"], order["item"]] = reason
        else:
            good_orders.append(order | {"target": shown, "click": None, "at": max(order["time"], shown["time"])})
    return Attributed(impressions, good_clicks, good_orders, rejects, duplicates, capped)


def without_giants(impressions: list[Row], clicks: list[Row], orders: list[Row], most: int) -> tuple:
    """limits.max_user_events_per_day: a day on which a user has more rows is taken out whole, before anything else."""
    every = [*impressions, *clicks, *orders]
    rows = Counter((row["user"], row["time"] // DAY) for row in every)
    over = {place for place, count in rows.items() if most and count > most}
    kept = [[r for r in part if (r["user"], r["time"] // DAY) not in over] for part in (impressions, clicks, orders)]
    return *kept, len(every) - sum(map(len, kept))


def find_impression(click: Row, impressions: list[Row], w: Windows) -> tuple[Row | None, str]:
    """Rule 1."""
    if click["names"] is not None:
        named = [i for i in impressions if i["id"] == click["names"] and i["user"] == click["user"]]
        if not named:
            return None, "unknown_impression"
        shown = named[0]
        if shown["scenario"] != click["scenario"]:
            return None, "impression_of_other_scenario"
        if shown["item"] != click["item"]:
            return None, "impression_of_other_item"
        if click["time"] < shown["time"] - w.skew:
            return None, "before_impression"
        if click["time"] > shown["time"] + w.click:
            return None, "after_window"
        return shown, ""
    fitting = [
        i
        for i in impressions
        if (i["user"], i["item"], i["scenario"]) == (click["user"], click["item"], click["scenario"])
        and i["time"] - w.skew <= click["time"] <= i["time"] + w.click
    ]
    return (max(fitting, key=lambda i: (i["time"], i["id"])), "") if fitting else (None, "no_impression")


def same_shelf(order: Row, other: Row) -> bool:
    """The same (user, item), in the order's own scenario where it has one."""
    same = (order["user"], order["item"]) == (other["user"], other["item"])
    return same and order["scenario"] in (None, other["scenario"])


def find_click(order: Row, clicks: list[Row], w: Windows) -> tuple[Row | None, str]:
    """Rule 2."""
    near = [c for c in clicks if same_shelf(order, c)]
    before = [c for c in near if c["at"] - w.skew <= order["time"]]
    fitting = [c for c in before if order["time"] <= c["at"] + w.order]
    if fitting:
        return max(fitting, key=lambda c: (c["at"], c["id"], c["scenario"])), ""
    return None, "after_window" if before else ("before_click" if near else "no_click")


def last_shown(order: Row, impressions: list[Row], w: Windows) -> Row | None:
    """Rule 7."""
    fitting = [
        i for i in impressions if same_shelf(order, i) and i["time"] - w.skew <= order["time"] <= i["time"] + w.order
    ]
    return max(fitting, key=lambda i: (i["time"], i["id"]), default=None)


def by_shelf(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """(user, item) -> rows."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["user"], row["item"]].append(row)
    return found


def labels(i: Row, clicks: list[Row], orders: list[Row], w: Windows, watermark: int) -> Row:
    """Rules 3, 4 and 6, of the clicks and orders of the row's user and item."""
    mine = [c["at"] for c in clicks if c["target"] is i]
    bought = [o["at"] for o in orders if o["target"] is i]
    is_order = bool(bought)
    is_click = bool(mine) or is_order
    t = i["time"]
    midnight = t - t % DAY
    first, last = (midnight, midnight + DAY - 1) if w.day_span else (t, t + w.whole)
    near = [c for c in clicks if first <= c["at"] <= last]
    near_orders = [o for o in orders if any(o["click"] is c for c in near)]
    closes = (midnight + DAY if w.day_span else t) + w.whole + w.order
    return {
        "is_click": float(is_click),
        "is_order": float(is_order),
        "is_click_global": float(bool(near) or is_click),
        "is_order_global": float(bool(near_orders) or is_order),
        "click_time": min(mine, default=None),
        "order_time": min(bought, default=None),
        "is_mature": closes <= watermark,
    }


def history(i: Row, clicks: list[Row], orders: list[Row], scenario: int, length: int) -> list[tuple]:
    """(item, query, action, age in microseconds), newest last."""
    events = [(c["at"], 1, (c["id"],), c) for c in clicks] + [(o["at"], 2, (o["id"], o["item"]), o) for o in orders]
    seen = [
        e
        for e in events
        if e[3]["user"] == i["user"]
        and e[3]["target"]["scenario"] == scenario
        and e[0] < i["time"]
        and e[3]["known"] <= i["time"]
    ]
    seen.sort(key=lambda e: e[:3])
    return [(e[3]["item"], e[3]["target"]["query"], e[1], i["time"] - e[0]) for e in seen][-length:]


def xxh64(data: bytes, seed: int) -> int:
    """xxHash64 as its specification says, as a signed number; slow. Known: xxh64(b"", 0) = 0xEF46DB3751D8E999."""
    mask, p1, p2, p3, p4, p5 = (
        (1 << 64) - 1,
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )

    def rotated(x: int, bits: int) -> int:
        return ((x << bits) | ((x & mask) >> (64 - bits))) & mask

    def mixed(lane: int, word: int) -> int:
        return rotated((lane + word * p2) & mask, 31) * p1 & mask

    place, hashed = 0, (seed + p5) & mask
    if len(data) >= 32:
        lanes = [(seed + p1 + p2) & mask, (seed + p2) & mask, seed, (seed - p1) & mask]
        while place + 32 <= len(data):
            lanes = [
                mixed(lane, int.from_bytes(data[place + 8 * n : place + 8 * n + 8], "little"))
                for n, lane in enumerate(lanes)
            ]
            place += 32
        hashed = sum(rotated(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & mask
        for lane in lanes:
            hashed = ((hashed ^ mixed(0, lane)) * p1 + p4) & mask
    hashed = (hashed + len(data)) & mask
    while place + 8 <= len(data):
        hashed = (rotated(hashed ^ mixed(0, int.from_bytes(data[place : place + 8], "little")), 27) * p1 + p4) & mask
        place += 8
    if place + 4 <= len(data):
        word = int.from_bytes(data[place : place + 4], "little")
        hashed, place = (rotated(hashed ^ (word * p1 & mask), 23) * p2 + p3) & mask, place + 4
    for byte in data[place:]:
        hashed = rotated(hashed ^ (byte * p5 & mask), 11) * p1 & mask
    hashed = (hashed ^ (hashed >> 33)) * p2 & mask
    hashed = (hashed ^ (hashed >> 29)) * p3 & mask
    hashed ^= hashed >> 32
    return hashed - (1 << 64) if hashed >> 63 else hashed
