"""What a user had done strictly before each impression and known by then, in numpy.

The events of a scenario are one flat array; an impression's history is a range of it, so that no list is ever built.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etl.kernel.attribution import Attribution
from etl.kernel.events import KIND_ORDER, Bools, Events, GroupedTimes, Ints
from usr_ray.schema import ACTION_CLICK, ACTION_ORDER

_MAX_GATHER = 1 << 22
"""Events looked at in one step of `last_events`: bounds its memory."""


@dataclass(frozen=True, slots=True)
class HistoryEvents:
    """Attributed clicks and credited order lines of one scenario, sorted by (user, time, action, id)."""

    user: Ints
    time: Ints
    known: Ints
    action: Ints
    impression: Ints
    """Row that has the event's item and query: the impression it belongs to, or a past event's own."""
    row: Ints
    """The event's own row."""
    index: GroupedTimes
    latest_known: Ints
    """Latest `known` of the user's events up to and including this one."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Jagged positions into HistoryEvents: row m owns positions[offsets[m]:offsets[m + 1]], newest last."""

    positions: Ints
    offsets: Ints


def history_events(
    events: Events, attribution: Attribution, scenario: int, since: int = np.iinfo(np.int64).min
) -> HistoryEvents:
    """The events attributed to one scenario: every click at its time, every credited order line at its own.

    Args:
        events: one chunk, to which `attribution` belongs.
        scenario: its position in the configuration's scenarios.
        since: microseconds; earlier events come from the chunk's past events, not from its clicks and orders.
    """
    of_clicks = (events.scenario[attribution.click_impressions] == scenario) & (attribution.click_times >= since)
    of_orders = (events.scenario[attribution.order_impressions] == scenario) & (attribution.order_times >= since)
    past = np.flatnonzero((events.kind > KIND_ORDER) & (events.scenario == scenario) & (events.time < since))
    rows = np.concatenate([past, attribution.click_rows[of_clicks], attribution.order_rows[of_orders]])
    time = np.concatenate([events.time[past], attribution.click_times[of_clicks], attribution.order_times[of_orders]])
    action = np.repeat([ACTION_CLICK, ACTION_ORDER], [of_clicks.sum(), of_orders.sum()])
    action = np.concatenate([events.kind[past] - KIND_ORDER, action])
    impression = np.concatenate(
        [past, attribution.click_impressions[of_clicks], attribution.order_impressions[of_orders]]
    )
    user = events.user[rows]
    # Clicks and orders come sorted by (time, id) each, clicks first, and lexsort is stable: ties stay by (action, id).
    order = np.lexsort((time, user))
    user, known = user[order], np.maximum(events.known[rows], time)[order]
    return HistoryEvents(
        user=user,
        time=time[order],
        known=known,
        action=action[order],
        impression=impression[order],
        row=rows[order],
        index=GroupedTimes(user, time[order]),
        latest_known=_running_max(user, known),
    )


def last_spans(history: HistoryEvents, users: Ints, times: Ints, length: int) -> tuple[Ints, Ints, Bools]:
    """The last `length` events strictly before each time as (first, count), and where some were not known by then.

    Arguments as for `last_events`. The events of a row marked late are not the ones of its span.
    """
    start = history.index.start(users)
    stop = history.index.before(users, times)
    counts = np.minimum(stop - start, length)
    late = np.zeros(len(users), dtype=np.bool_)
    if len(history.user):
        late = (stop > start) & (history.latest_known[stop - 1] > times)
    return stop - counts, counts, late


def num_visible(history: HistoryEvents, users: Ints, times: Ints) -> Ints:
    """How many of a user's events lie strictly before each time and were known by it.

    What is visible only grows, so that two times of a user with equal numbers see the same events.
    """
    visible = GroupedTimes(history.user, np.maximum(history.known, history.time + 1))
    return visible.until(users, times) - visible.start(users)


def last_events(history: HistoryEvents, users: Ints, times: Ints, length: int) -> Ranges:
    """The last `length` events of each user before a time and known by it: for rows that `last_spans` marks."""
    start = history.index.start(users)
    stop = history.index.before(users, times)
    counts = np.zeros(len(users), dtype=np.int64)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    # Looks back over 2, 4, 8 ... times `length` events, until enough known ones are found or the first is reached.
    todo, reach = np.arange(len(users)), 2 * length
    while len(todo):
        rest = []
        for rows in np.array_split(todo, len(todo) * reach // _MAX_GATHER + 1):
            sizes = np.minimum(stop[rows] - start[rows], reach)
            positions = _spans(stop[rows] - sizes, sizes)
            owner = np.repeat(np.arange(len(rows)), sizes)
            is_known = history.known[positions] <= times[rows][owner]
            num_known = np.bincount(owner[is_known], minlength=len(rows))
            done = (num_known >= length) | (sizes == stop[rows] - start[rows])
            # Rank from the newest: a known event stays when fewer than `length` known ones are newer.
            newer = np.cumsum(num_known)[owner] - np.cumsum(is_known)
            keep = is_known & done[owner] & (newer < length)
            found.append((rows[owner[keep]], positions[keep]))
            counts[rows[done]] = np.minimum(num_known[done], length)
            rest.append(rows[~done])
        todo, reach = np.concatenate(rest), 2 * reach
    rows, positions = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Ranges(positions[np.lexsort((positions, rows))], _offsets(counts))


def _spans(first: Ints, counts: Ints) -> Ints:
    """first[m], first[m] + 1, ... (counts[m] of them) for every m, one after the other."""
    offsets = _offsets(counts)
    return np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], counts)


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64, copy=False)


def _running_max(user: Ints, values: Ints) -> Ints:
    """Running maximum of `values` inside each user."""
    if not len(values):
        return values
    # Ranks make room for the user in one number: a later user's numbers are all larger, so that nothing leaks over.
    distinct, ranks = np.unique(values, return_inverse=True)
    stride = len(distinct)
    return distinct[np.maximum.accumulate(user * stride + ranks) - user * stride]
