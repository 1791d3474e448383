"""Scenario labels, global labels and maturity of a chunk's impressions (contract 2.3 to 2.6), in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from etl.kernel.attribution import Attribution, LabelRules
from etl.kernel.events import Bools, Events, GroupedTimes, Ints, user_items
from usr_ray.config import DAY_US

NO_TIME = np.iinfo(np.int64).min
"""Stands for a null click_time or order_time."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of M impressions, in the order requested."""

    is_click: NDArray[np.float32]
    is_order: NDArray[np.float32]
    is_click_global: NDArray[np.float32]
    is_order_global: NDArray[np.float32]
    click_time: Ints
    """Microseconds of the first click; NO_TIME where none."""
    order_time: Ints
    """Microseconds of the first credited order line; NO_TIME where none."""


def label(events: Events, attribution: Attribution, impressions: Ints, rules: LabelRules) -> Labels:
    """Label the impressions at the given rows of the chunk.

    Only attributed clicks and credited orders count, for the global labels too. is_order <= is_click <= is_click_global
    and is_order <= is_order_global <= is_click_global hold on every row.
    """
    click_time = _first_times(len(events.user), attribution.click_impressions, attribution.click_times)[impressions]
    order_time = _first_times(len(events.user), attribution.order_impressions, attribution.order_times)[impressions]
    is_order = order_time != NO_TIME
    # An order credited without a click (contract 2.7) makes its impression clicked at an unknown time.
    is_click = (click_time != NO_TIME) | is_order

    pairs = user_items(events)
    first, last = global_span(events.time[impressions], rules)
    clicks, clicked_pairs = attribution.click_times, pairs[attribution.click_rows]
    ordered = np.unique(attribution.order_clicks[attribution.order_clicks >= 0])
    groups = pairs[impressions]
    is_click_global = GroupedTimes(clicked_pairs, clicks).any_within(groups, first, last) | is_click
    is_order_global = GroupedTimes(clicked_pairs[ordered], clicks[ordered]).any_within(groups, first, last) | is_order
    return Labels(
        is_click=is_click.astype(np.float32),
        is_order=is_order.astype(np.float32),
        is_click_global=is_click_global.astype(np.float32),
        is_order_global=is_order_global.astype(np.float32),
        click_time=click_time,
        order_time=order_time,
    )


def global_span(times: Ints, rules: LabelRules) -> tuple[Ints, Ints]:
    """First and last microsecond in which a click counts for the global label of an impression shown at `times`."""
    if rules.day_span:
        start = times - times % DAY_US
        return start, start + (DAY_US - 1)
    return times, times + rules.global_window


def mature(times: Ints, watermark: int, rules: LabelRules) -> Bools:
    """True where no later event can change the labels: t + W_g + W_o <= watermark.

    With the day span the windows count from the end of the impression's UTC day, as FeatureSpec.label_day_span says.
    """
    start = times - times % DAY_US + DAY_US if rules.day_span else times
    return start + (rules.global_window + rules.order_window) <= watermark


def _first_times(size: int, rows: Ints, times: Ints) -> Ints:
    """Earliest time per row of the chunk, NO_TIME where none. The times of a row must ascend."""
    first = np.full(size, NO_TIME, dtype=np.int64)
    first[rows[::-1]] = times[::-1]  # numpy keeps the last value written to a place: the earliest
    return first
