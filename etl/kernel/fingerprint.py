"""Three fingerprints of the rows of a date: they find the dates that late events have changed.

Each impression has a 64-bit hash of its own content; its labels and each of its histories are mixed with it. The rows
of a date are combined by exclusive or, so that neither their order nor the chunks matter. A date's rows differ exactly
if one of its fingerprints does (or two hashes of 64 bits agree by chance): a late event that changes no row of a date
touches no fingerprint of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.kernel.attribution import LabelRules, Labels
from etl.kernel.events import Ints
from usr_ray.config import DAY_US

Hashes = NDArray[np.uint64]
FINGERPRINTS = ("impressions", "labels", "histories")
_WHITE = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_BASE = 0xD6E8FEB86659FD93
_INVERSE = pow(_BASE, -1, 1 << 64)


def label_hashes(row_hash: Hashes, labels: Labels) -> Hashes:
    """Hash of each impression's labels and of the times of its first click and order."""
    bits = labels.is_click + 2 * labels.is_order + 4 * labels.is_click_global + 8 * labels.is_order_global
    mixed = mix(row_hash, bits.astype(np.uint64))
    return mix(mix(mixed, labels.click_time.view(np.uint64)), labels.order_time.view(np.uint64))


def event_hashes(value_hash: Hashes, action: Ints, time: Ints) -> Hashes:
    """Hash of an event as a history shows it: its item and query (`value_hash`), action and time."""
    return mix(value_hash, (time * 4 + action).view(np.uint64))


def span_hashes(events: Hashes, first: Ints, count: Ints) -> Hashes:
    """Hash of each run events[first:first + count]: a polynomial in its events, so that their order counts."""
    # Prefix sums of events[j] * BASE^j, shifted back by BASE^-first: uint64 wraps around, and BASE is odd.
    powers = _powers(_BASE, len(events) + 1)
    back = _powers(_INVERSE, len(events) + 1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(events * powers[:-1], dtype=np.uint64)])
    return mix((sums[first + count] - sums[first]) * back[first], count.view(np.uint64))


def combined(days: Ints, hashes: Hashes) -> dict[int, int]:
    """Day -> exclusive or of the hashes of its rows, as a signed 64-bit number."""
    if not len(days):
        return {}
    order = np.argsort(days, kind="stable")
    found, starts = np.unique(days[order], return_index=True)
    return dict(
        zip(found.tolist(), np.bitwise_xor.reduceat(hashes[order], starts).view(np.int64).tolist(), strict=True)
    )


def date_fingerprint(
    day: int, cells: Mapping[tuple[str, int], int], rules: LabelRules, watermark: int
) -> dict[str, Any]:
    """The fingerprints of a day: unequal ones mean that its rows differ.

    Args:
        day: since 1970.
        cells: (fingerprint, day) -> exclusive or over all its rows.
        rules: determine until when the labels of a day can change.
        watermark: microseconds.

    Returns:
        `impressions`, `labels`, `histories`: as hexadecimal; `final_until`: microseconds, the watermark as far as it
        decides about the maturity of this day's rows.
    """
    final = (day + 1) * DAY_US + rules.global_window + rules.order_window
    hashes = {name: f"{cells.get((name, day), 0) % (1 << 64):016x}" for name in FINGERPRINTS}
    return hashes | {"final_until": min(watermark, final)}


def mix(first: Hashes, second: Hashes) -> Hashes:
    """A hash of an ordered pair (splitmix64's finaliser); numpy's integers wrap around."""
    mixed = first * _WHITE + second
    for shift, factor in _MIXERS:
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed ^ (mixed >> np.uint64(31))


def _powers(base: int, size: int) -> Hashes:
    factors = np.full(size, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)
