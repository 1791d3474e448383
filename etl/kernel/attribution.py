"""Attribution of clicks and order lines, labels and maturity, for whole users at a time, in numpy.

The rules are those of docs/tables.md (labels). The rows of one chunk are impressions, clicks and order lines of whole
users, sorted by (user_id, event_time, kind, id, item_id). Everything is a sort and a binary search on (group, time); no
step loops over rows or users.

Clock skew: with a skew of s every window [x, x + W] also takes events in [x - s, x). Such an event is moved to x, so
that a click is never earlier than its impression nor an order than its click, and neither can enter the history of its
own impression.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from etl.kernel.events import (
    KIND_CLICK,
    KIND_IMPRESSION,
    KIND_ORDER,
    NO_SCENARIO,
    Bools,
    Events,
    GroupedTimes,
    Ints,
    user_items,
)
from usr_ray.config import DAY_US, LabelsConfig

REASONS = (
    "unknown_impression",  # click: the user has no impression of that id
    "impression_of_other_scenario",
    "impression_of_other_item",
    "before_impression",  # click: earlier than the impression it names, beyond the clock skew
    "after_window",  # click or order: later than its window allows
    "no_impression",  # click without impression_id: no impression of (user, item, scenario) whose window holds it
    "no_click",  # order line: the user never clicked the item (in the order's scenario)
    "before_click",  # order line: every click on the item is later
)
"""Why a click or an order line was rejected; the position is the code in `Attribution.reject_codes`."""


@dataclass(frozen=True, slots=True)
class LabelRules:
    """Windows of `labels.*` in microseconds."""

    click_window: int
    order_window: int
    global_window: int
    clock_skew: int = 0
    day_span: bool = False
    credit_impression: bool = False

    @property
    def reach(self) -> int:
        """How far before an instant the rows lie that decide the clicks and orders at or after it.

        An order reaches back to its click, a click to its impression, and the skew may correct each of the three.
        """
        return self.click_window + self.order_window + 3 * self.clock_skew

    @classmethod
    def from_config(cls, labels: LabelsConfig) -> LabelRules:
        """The rules of a checked configuration."""
        return cls(
            click_window=labels.click_window_us,
            order_window=labels.order_window_us,
            global_window=labels.global_window_us,
            clock_skew=labels.clock_skew_us,
            day_span=labels.global_span == "day",
            credit_impression=labels.order_without_click == "credit_impression",
        )


@dataclass(frozen=True, slots=True)
class Attribution:
    """Which impression each click and order line of a chunk belongs to. Positions are rows of the chunk."""

    click_rows: Ints
    """Attributed clicks, sorted by (user, time, click_id)."""
    click_times: Ints
    click_impressions: Ints
    order_rows: Ints
    """Credited order lines, sorted by (user, time, order_id, item_id)."""
    order_times: Ints
    order_impressions: Ints
    order_clicks: Ints
    """Position in `click_rows` of the credited click; -1 where an impression was credited without a click."""
    reject_rows: Ints
    reject_codes: Ints
    """Position in REASONS."""


def attribute(events: Events, rules: LabelRules, *, num_scenarios: int) -> Attribution:
    """Attribute every click and order line of the chunk, or reject it with a reason.

    Returns:
        Attribution: each click and order line is in exactly one of `click_rows`, `order_rows` and `reject_rows`.
    """
    pairs = user_items(events)
    clicks, targets, click_codes = _attribute_clicks(events, rules, pairs, num_scenarios)
    taken = targets >= 0
    rows, impressions = clicks[taken], targets[taken]
    times = np.maximum(events.time[rows], events.time[impressions])
    order = _by_time(events, rows, times)
    rows, impressions, times = rows[order], impressions[order], times[order]

    orders, credited, order_codes = _credit_orders(events, rules, pairs, rows, times, num_scenarios)
    has_click = credited >= 0
    if len(rows):
        order_targets = np.where(has_click, impressions[credited], -1)
        order_times = np.where(has_click, np.maximum(events.time[orders], times[credited]), events.time[orders])
    else:
        order_targets, order_times = np.full(len(orders), -1, dtype=np.int64), events.time[orders]
    if rules.credit_impression:
        without = np.flatnonzero(~has_click)
        found = _last_shown(events, rules, pairs, orders[without], num_scenarios)
        order_targets[without] = found
        shown = events.time[found]
        order_times[without] = np.where(found >= 0, np.maximum(order_times[without], shown), order_times[without])
    kept = order_targets >= 0
    order_rows = orders[kept]
    sort = _by_time(events, order_rows, order_times[kept])
    return Attribution(
        click_rows=rows,
        click_times=times,
        click_impressions=impressions,
        order_rows=order_rows[sort],
        order_times=order_times[kept][sort],
        order_impressions=order_targets[kept][sort],
        order_clicks=credited[kept][sort],
        reject_rows=np.concatenate([clicks[~taken], orders[~kept]]),
        reject_codes=np.concatenate([click_codes[~taken], order_codes[~kept]]),
    )


def _attribute_clicks(events: Events, rules: LabelRules, pairs: Ints, num_scenarios: int) -> tuple[Ints, Ints, Ints]:
    """Rows of all clicks, the impression row of each (-1: rejected), and the reason's code."""
    clicks = events.rows(KIND_CLICK)
    impressions = events.rows(KIND_IMPRESSION)
    targets = np.where(events.has_name[clicks], events.named[clicks], -1)
    codes = np.where(events.has_name[clicks], REASONS.index("unknown_impression"), REASONS.index("no_impression"))
    shown = GroupedTimes(pairs[impressions] * num_scenarios + events.scenario[impressions], events.time[impressions])
    unnamed = np.flatnonzero(~events.has_name[clicks])
    rows = clicks[unnamed]
    last = shown.last(pairs[rows] * num_scenarios + events.scenario[rows], events.time[rows] + rules.clock_skew)
    if len(impressions):
        found = np.where(last >= 0, impressions[last], -1)
        in_window = events.time[rows] <= events.time[found] + rules.click_window
        targets[unnamed] = np.where(in_window, found, -1)

    # A later check overwrites nothing: a click that has lost its impression keeps its first reason.
    for reason, wrong in (
        ("unknown_impression", events.user[clicks] != events.user[targets]),
        ("impression_of_other_scenario", events.scenario[clicks] != events.scenario[targets]),
        ("impression_of_other_item", events.item[clicks] != events.item[targets]),
        ("before_impression", events.time[clicks] < events.time[targets] - rules.clock_skew),
        ("after_window", events.time[clicks] > events.time[targets] + rules.click_window),
    ):
        lost = wrong & (targets >= 0)
        codes[lost] = REASONS.index(reason)
        targets[lost] = -1
    return clicks, targets, codes


def _credit_orders(
    events: Events, rules: LabelRules, pairs: Ints, click_rows: Ints, click_times: Ints, num_scenarios: int
) -> tuple[Ints, Ints, Ints]:
    """Rows of all order lines, the credited click of each (position in click_rows, -1: none), and the reason's code."""
    orders = events.rows(KIND_ORDER)
    credited = np.full(len(orders), -1, dtype=np.int64)
    codes = np.full(len(orders), REASONS.index("no_click"), dtype=np.int64)
    shop_wide = events.scenario[orders] == NO_SCENARIO
    own = pairs * num_scenarios + events.scenario
    for some, groups in ((np.flatnonzero(shop_wide), pairs), (np.flatnonzero(~shop_wide), own)):
        if not len(some) or not len(click_rows):
            continue
        clicked = GroupedTimes(groups[click_rows], click_times)
        rows = orders[some]
        last = clicked.last(groups[rows], events.time[rows] + rules.clock_skew)
        too_late = events.time[rows] > click_times[last] + rules.order_window
        credited[some] = np.where((last >= 0) & ~too_late, last, -1)
        known = np.isin(groups[rows], groups[click_rows])
        codes[some[known & (last < 0)]] = REASONS.index("before_click")
        codes[some[(last >= 0) & too_late]] = REASONS.index("after_window")
    return orders, credited, codes


def _by_time(events: Events, rows: Ints, times: Ints) -> Ints | slice:
    """Indices that sort the rows by (user, corrected time, id); nothing to do where no clock was corrected."""
    if events.id_rank is None:
        return slice(None)
    return np.lexsort((events.id_rank[rows], times, events.user[rows]))


def _last_shown(events: Events, rules: LabelRules, pairs: Ints, orders: Ints, num_scenarios: int) -> Ints:
    """Row of the last impression of (user, item) whose order window holds the order line; -1: none (rule 7)."""
    impressions = events.rows(KIND_IMPRESSION)
    result = np.full(len(orders), -1, dtype=np.int64)
    shop_wide = events.scenario[orders] == NO_SCENARIO
    own = pairs * num_scenarios + events.scenario
    for some, groups in ((np.flatnonzero(shop_wide), pairs), (np.flatnonzero(~shop_wide), own)):
        if not len(some) or not len(impressions):
            continue
        rows = orders[some]
        last = GroupedTimes(groups[impressions], events.time[impressions]).last(
            groups[rows], events.time[rows] + rules.clock_skew
        )
        found = np.where(last >= 0, impressions[last], -1)
        in_window = events.time[rows] <= events.time[found] + rules.order_window
        result[some] = np.where((found >= 0) & in_window, found, -1)
    return result


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
    # An order credited without a click (rule 7) makes its impression clicked at an unknown time.
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
