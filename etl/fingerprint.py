"""What the rows of a date were made from, in a few numbers: finds the dates that late events have changed.

Every used row has a 64-bit hash of its content. The outcome of a click is its hash mixed with its impression's, that
of an order with its click's. Hashes are combined by exclusive or, so that the order of rows and the chunks do not
matter. A date's rows can differ only if one of its fingerprints does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.attribution import Attribution, LabelRules
from etl.events import KIND_IMPRESSION, Events, Ints
from usr_ray.config import DAY_US

_WHITE = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


@dataclass(frozen=True, slots=True)
class Cell:
    """Rows with the same days (since 1970) and the exclusive or of their hashes."""

    impression_day: int
    """Day of the impression that the row is or belongs to: its own labels."""
    first_label_day: int
    """From this day on an impression may have the click inside its global window ..."""
    last_label_day: int
    """... up to the day of the click."""
    visible_day: int | None
    """First day on which an impression can have the event in its history; None for an impression."""
    hash: int


def cells(events: Events, attribution: Attribution, row_hash: Ints, rules: LabelRules) -> tuple[Ints, Ints]:
    """The days (4, cells) of a chunk, in the order of `Cell` and -1 for no visible_day, and the hash of each cell.

    Args:
        events: one chunk.
        attribution: of the same chunk.
        row_hash: hash of each row's content.
        rules: their global window says how far back a click reaches.
    """
    content = row_hash.view(np.uint64)
    shown, clicks, orders = events.rows(KIND_IMPRESSION), attribution.click_rows, attribution.order_rows
    click_hash = _mix(content[clicks], content[attribution.click_impressions])
    # The parent of an order line is its click; where it was credited without one, its impression.
    parent_hash = content[attribution.order_impressions]
    parent_time = events.time[attribution.order_impressions]
    if len(clicks):
        has_click = attribution.order_clicks >= 0
        parent_hash = np.where(has_click, click_hash[attribution.order_clicks], parent_hash)
        parent_time = np.where(has_click, attribution.click_times[attribution.order_clicks], parent_time)
    hashes = np.concatenate([content[shown], click_hash, _mix(content[orders], parent_hash)])

    impression_time = events.time[np.concatenate([shown, attribution.click_impressions, attribution.order_impressions])]
    label_time = np.concatenate([events.time[shown], attribution.click_times, parent_time])
    visible_time = np.concatenate([
        np.full(len(shown), -1),
        np.maximum(events.known[clicks], attribution.click_times),
        np.maximum(events.known[orders], attribution.order_times),
    ])  # fmt: skip
    first_label_time = label_time if rules.day_span else label_time - rules.global_window
    days = np.stack([impression_time, first_label_time, label_time, visible_time]) // DAY_US
    return _combine(days, hashes)


def date_fingerprint(day: int, all_cells: Iterable[Cell], rules: LabelRules, watermark: int) -> dict[str, Any]:
    """What the samples of a day were made from: unequal fingerprints mean that the rows may differ.

    Returns:
        `impressions`, `labels`, `histories`: exclusive or of hashes, as hexadecimal; `final_until`: microseconds, the
        watermark as far as it decides about the maturity of this day's rows.
    """
    impressions = labels = histories = 0
    for cell in all_cells:
        if cell.visible_day is None:
            impressions ^= cell.hash if cell.impression_day == day else 0
            continue
        if cell.impression_day == day or cell.first_label_day <= day <= cell.last_label_day:
            labels ^= cell.hash
        if cell.visible_day <= day:
            histories ^= cell.hash
    final = (day + 1) * DAY_US + rules.global_window + rules.order_window
    return {
        "impressions": f"{impressions:016x}",
        "labels": f"{labels:016x}",
        "histories": f"{histories:016x}",
        "final_until": min(watermark, final),
    }


def _mix(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of an ordered pair (splitmix64's finaliser); numpy's integers wrap round."""
    mixed = first * _WHITE + second
    for shift, factor in _MIXERS:
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed ^ (mixed >> np.uint64(31))


def _combine(days: Ints, hashes: NDArray[np.uint64]) -> tuple[Ints, Ints]:
    if not len(hashes):
        return days, hashes.view(np.int64)
    places, owner = np.unique(days, axis=1, return_inverse=True)
    order = np.argsort(owner.ravel(), kind="stable")
    starts = np.searchsorted(owner.ravel()[order], np.arange(places.shape[1]))
    return places, np.bitwise_xor.reduceat(hashes[order], starts).view(np.int64)
