"""One day of the simulated world: who visits when, what is shown, and what is clicked and ordered when.

Every (seed, day) is a pure function, with needs also of those that the day before left; memory holds two days at most.
The times are such that attribution gives back exactly the drawn labels.
Shape letters: U users, R requests, N impressions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etl.sources.simulated_needs import (
    FEED_FOLLOWS_RATE,
    OFF_TOPIC_LOGIT,
    OFF_TOPIC_RATE,
    ORDER_SHARE,
    SEARCH_RATES,
    Needs,
    visits,
)
from etl.sources.simulated_world import OLD_MODEL_NOISE, PAIR_INTEREST_STD, Stream, World, random_stream, sigmoid
from usr_ray.config import DAY_US, SimulatedConfig

SLATE_SIZES = (3, 8)
"""Impressions of a request, both included."""
MAX_REQUESTS = 6
SWITCH_RATE = 0.6
"""Chance that the next request of a visit is in another scenario."""
THEME_RATE = 0.55
"""Share of items drawn from the visit's category; the others by popularity."""
REQUEST_GAP_US = 20_000_000
LAST_REQUEST_US = DAY_US - 10_000_000
HOUR_WEIGHTS = np.array([2, 1, 1, 1, 1, 2, 3, 5, 6, 6, 6, 7, 8, 7, 6, 6, 6, 7, 8, 10, 11, 10, 7, 4], dtype=np.float64)
MAX_LOOKBACK = 3
"""A cross exposure repeats one of the user's last three requests."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Requests of one day, sorted by (user, time); times of one user are strictly increasing."""

    user_R: np.ndarray
    time_us_R: np.ndarray
    """Microseconds since the day's start, inside the day."""
    scenario_R: np.ndarray
    theme_R: np.ndarray
    query_R: np.ndarray
    """-1 outside query scenarios."""
    size_R: np.ndarray
    """Impressions of the request."""
    need_R: np.ndarray
    """The need that is searched for, as its place in the day's Needs; -1: none, or no search."""
    is_off_topic_R: np.ndarray
    """Searches whose query has nothing to do with what is shown."""


@dataclass(frozen=True, slots=True)
class Exposures:
    """Impressions of one day, in the order of the schedule's requests, then position."""

    request_N: np.ndarray
    position_N: np.ndarray
    item_N: np.ndarray
    interest_N: np.ndarray
    is_copy_N: np.ndarray
    """True for a cross exposure: the item was shown to the user in another scenario minutes before."""
    listing_N: np.ndarray
    """What the logs call the item: its number or, behind all numbers, its scenario's (simulated.link_loss)."""


def day_size(config: SimulatedConfig, day: int) -> int:
    """Impressions of a day: the same every day, the remainder on the first days."""
    size, rest = divmod(config.num_impressions, config.num_days)
    return size + (day < rest)


def visits_of(num_impressions: int) -> int:
    """About how many visits show this many impressions; a few less are made."""
    return int(num_impressions / (sum(SLATE_SIZES) / 2) / 3 * 1.1) + 20


def draw_schedule(
    world: World, config: SimulatedConfig, day: int, num_impressions: int, needs: Needs | None = None
) -> Schedule:
    """Visits of a day: users by activity, a theme each, one to six requests that wander between scenarios.

    `needs` are those that live on the day, in a world that has them: some of the visits are made for them.
    """
    rng = random_stream(config.seed, Stream.SCHEDULE, day)
    S = len(world.click_bias_S)
    num_visits = visits_of(num_impressions)
    length_V = 1 + rng.binomial(MAX_REQUESTS - 1, 0.4, num_visits)
    visit_user_V = rng.choice(len(world.user_weight_U), num_visits, p=world.user_weight_U)
    theme_VC = world.user_theme_UC[visit_user_V]
    theme_V = np.argmax(theme_VC + rng.gumbel(size=theme_VC.shape), axis=1)
    hour_V = rng.choice(24, num_visits, p=HOUR_WEIGHTS / HOUR_WEIGHTS.sum())
    start_V = (hour_V * 3600 + rng.random(num_visits) * 3600) * 1e6
    # The requests of a visit: a matrix of the longest visit, then the places in use.
    shape = (num_visits, MAX_REQUESTS)
    in_use = np.arange(MAX_REQUESTS) < length_V[:, None]
    step = np.where(rng.random(shape) < SWITCH_RATE, rng.integers(1, max(S, 2), shape), 0)
    scenario = np.cumsum(np.concatenate([rng.integers(0, S, (num_visits, 1)), step[:, 1:]], axis=1), axis=1) % S
    gap = 40e6 + rng.exponential(80e6, shape)
    gap[:, 0] = 0
    need_V = np.full(num_visits, -1)
    if needs is not None:
        # They take the place of the first visits: the last ones are cut where the day is full.
        need, start = visits(config, needs, day)
        count = min(len(need), int(0.9 * num_visits))
        need_V[:count], start_V[:count], visit_user_V[:count] = need[:count], start[:count], needs.user_K[need[:count]]
        scenario = _search_or_feed(world, config, day, needs, need_V, visit_user_V, scenario)
    time = (start_V[:, None] + np.cumsum(gap, axis=1))[in_use].astype(np.int64)
    visit_R = np.repeat(np.arange(num_visits), length_V)
    size_R = rng.integers(SLATE_SIZES[0], SLATE_SIZES[1] + 1, len(visit_R))
    popular_R = rng.random(len(visit_R))
    end_R = np.cumsum(size_R)
    num_requests = int(np.searchsorted(end_R, num_impressions)) + 1  # the last request is cut to the day's size
    size_R = size_R[:num_requests].copy()
    size_R[-1] -= end_R[num_requests - 1] - num_impressions
    visit_R = visit_R[:num_requests]
    scenario_R, theme_R, need_R = scenario[in_use][:num_requests], theme_V[visit_R], need_V[visit_R]
    asked_R, is_off_topic_R = theme_R, np.zeros(num_requests, dtype=bool)
    if needs is not None:
        user_R = visit_user_V[visit_R]
        theme_R, asked_R, need_R = _themes(world, config, day, needs, visit_R, need_R, scenario_R, user_R)
        is_off_topic_R = asked_R != theme_R
    is_search_R = world.is_query_scenario_S[scenario_R]
    query_R = np.where(is_search_R, _draw_queries(world, asked_R, popular_R[:num_requests]), -1)
    user_R = visit_user_V[visit_R]
    order = np.lexsort((time[:num_requests], user_R))
    time_R = _space_out(user_R[order], time[:num_requests][order])
    columns = (scenario_R, theme_R, query_R, size_R, need_R, is_off_topic_R)
    return Schedule(user_R[order], time_R, *(column[order] for column in columns))


def _search_or_feed(
    world: World,
    config: SimulatedConfig,
    day: int,
    needs: Needs,
    need_V: np.ndarray,
    user_V: np.ndarray,
    scenario_VX: np.ndarray,
) -> np.ndarray:
    """The requests' scenarios: users who search do so in most requests, more of them for a need; others never do."""
    with_query, without = (np.flatnonzero(world.is_query_scenario_S == has) for has in (True, False))
    if not len(with_query) or not len(without):
        return scenario_VX
    is_born_there_V = np.append(world.is_query_scenario_S[needs.scenario_K], False)[need_V]
    shows_V = (need_V >= 0) & (is_born_there_V | _carries(config, day, np.arange(len(need_V))))
    rate_V = np.where(world.shop.is_searcher_U[user_V], np.where(shows_V, *SEARCH_RATES), 0.0)
    is_search_VX = random_stream(config.seed, Stream.SEARCHES, day).random(scenario_VX.shape) < rate_V[:, None]
    return np.where(is_search_VX, with_query[scenario_VX % len(with_query)], without[scenario_VX % len(without)])


def _carries(config: SimulatedConfig, day: int, visit: np.ndarray) -> np.ndarray:
    """Whether the need of a visit (its number) shows outside the scenario of its birth."""
    draws = random_stream(config.seed, Stream.CARRIES, day).random(visit.max(initial=0) + 1)
    return draws[visit] < config.need_carry


def _themes(
    world: World,
    config: SimulatedConfig,
    day: int,
    needs: Needs,
    visit_R: np.ndarray,
    need_R: np.ndarray,
    scenario_R: np.ndarray,
    user_R: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R,) what is shown, what is searched for, and the need where it is searched for.

    A need that shows in the request's scenario is what is searched for, and what a feed shows in some of the visits;
    every other request has a theme of its own of the user's habits, so that nothing else ties scenarios together.
    """
    rng, R = random_stream(config.seed, Stream.THEMES, day), len(need_R)
    habit_RC = world.user_theme_UC[user_R]
    theme_R = np.argmax(habit_RC + rng.gumbel(size=habit_RC.shape), axis=1)
    follows_R = (rng.random(visit_R.max(initial=0) + 1) < FEED_FOLLOWS_RATE)[visit_R]
    off_topic_R, other_R = rng.random(R) < OFF_TOPIC_RATE, rng.integers(0, habit_RC.shape[1], R)
    is_search_R = world.is_query_scenario_S[scenario_R]
    shows_R = (need_R >= 0) & ((np.append(needs.scenario_K, -1)[need_R] == scenario_R) | _carries(config, day, visit_R))
    theme_R = np.where(shows_R & (is_search_R | follows_R), np.append(needs.category_K, -1)[need_R], theme_R)
    asked_R = np.where(is_search_R & off_topic_R, other_R, theme_R)
    return theme_R, asked_R, np.where(shows_R & is_search_R & (asked_R == theme_R), need_R, -1)


def _draw_queries(world: World, theme_R: np.ndarray, popular_R: np.ndarray) -> np.ndarray:
    """A query of the theme's category (query q belongs to category q mod C), small numbers more often."""
    Q, C = len(world.query_latent_QD), world.user_theme_UC.shape[1]
    num_R = (Q - theme_R + C - 1) // C
    return theme_R + C * (num_R * popular_R**2).astype(np.int64)


def _space_out(user_R: np.ndarray, time_R: np.ndarray) -> np.ndarray:
    """Times with a gap between the requests of one user, none after the day's end.

    A click falls before the user's next request, so every click belongs to one impression whatever the slates repeat.
    """
    is_first_R = np.diff(user_R, prepend=-1) != 0
    start_R = np.flatnonzero(is_first_R)
    group_R = np.cumsum(is_first_R) - 1
    number_R = np.arange(len(user_R)) - start_R[group_R]
    # A running maximum inside each user: one over all, each user's numbers above those of the user before.
    level = 100 * DAY_US
    slack_R = np.maximum.accumulate(time_R - number_R * REQUEST_GAP_US + group_R * level) - group_R * level
    time_R = slack_R + number_R * REQUEST_GAP_US
    last_R = np.maximum.reduceat(time_R, start_R)[group_R]
    return (time_R * (LAST_REQUEST_US / np.maximum(last_R, LAST_REQUEST_US))).astype(np.int64)


def draw_exposures(world: World, config: SimulatedConfig, day: int, plan: Schedule, global_window_us: int) -> Exposures:
    """Items of every slate: distinct inside a request, `cross_exposure` of them copied from another scenario's."""
    num_requests, N = len(plan.user_R), int(plan.size_R.sum())
    request_N = np.repeat(np.arange(num_requests), plan.size_R)
    start_R = np.cumsum(plan.size_R) - plan.size_R
    position_N = np.arange(N) - start_R[request_N]
    source_R = _source_requests(plan, global_window_us)
    source_N = start_R[source_R[request_N]] + position_N
    may_copy_N = (source_R[request_N] >= 0) & (position_N < plan.size_R[source_R[request_N]])
    rng = random_stream(config.seed, Stream.COPIES, day)
    # Not every row has something to copy: those that do copy more often, so that the share of all rows is right.
    rate = min(1.0, config.cross_exposure / max(may_copy_N.mean(), 1e-9))
    is_copy_N = may_copy_N & (rng.random(N) < rate)
    pointer_N = np.where(is_copy_N, source_N, np.arange(N))
    item_N = _draw_slates(world, config, day, plan, request_N=request_N, is_copy_N=is_copy_N, pointer_N=pointer_N)
    is_noise_N = rng.random(N) < config.global_noise
    interest_N = PAIR_INTEREST_STD * rng.standard_normal(N)
    interest_N = interest_N[_roots(np.where(is_noise_N, np.arange(N), pointer_N))]
    is_unlinked_N = is_copy_N & (rng.random(N) < config.link_loss)
    if config.world == "needs":
        score_N = old_score(world, plan, request_N, item_N, random_stream(config.seed, Stream.POSITIONS, day))
        order = np.lexsort((-score_N, request_N))
        position_N = position_N[np.argsort(order)]  # rows are by request, so the n-th in order is at the n-th position
    listing_N = item_N + np.where(is_unlinked_N, world.num_items * (1 + plan.scenario_R[request_N]), 0)
    return Exposures(request_N, position_N, item_N, interest_N, is_copy_N, listing_N)


def _source_requests(plan: Schedule, global_window_us: int) -> np.ndarray:
    """The user's newest earlier request in another scenario, well inside the global window; -1 where there is none."""
    source_R = np.full(len(plan.user_R), -1)
    for lag in range(MAX_LOOKBACK, 0, -1):
        now, before = slice(lag, None), slice(None, -lag)
        fits = (
            (plan.user_R[now] == plan.user_R[before])
            & (plan.scenario_R[now] != plan.scenario_R[before])
            & (plan.time_us_R[now] - plan.time_us_R[before] <= 0.8 * global_window_us)
        )
        source_R[now][fits] = np.flatnonzero(fits)
    return source_R


def _roots(pointer_N: np.ndarray) -> np.ndarray:
    """Where chains of copies end."""
    while True:
        further_N = pointer_N[pointer_N]
        if np.array_equal(further_N, pointer_N):
            return pointer_N
        pointer_N = further_N


def _draw_slates(
    world: World,
    config: SimulatedConfig,
    day: int,
    plan: Schedule,
    *,
    request_N: np.ndarray,
    is_copy_N: np.ndarray,
    pointer_N: np.ndarray,
) -> np.ndarray:
    """(N,) items: fresh ones by theme or popularity, redrawn until no request shows an item twice."""
    rng = random_stream(config.seed, Stream.ITEMS, day)
    is_out = world.item_launch_day_I[world.items_by_category_I] <= day
    weight_I = world.item_weight_I if config.world == "static" else world.item_weight_I * world.shop.popularity(day)
    weight_I = np.where(is_out, weight_I[world.items_by_category_I], 0.0)
    cumulative = np.concatenate([[0.0], np.cumsum(weight_I)])
    low_C, high_C = cumulative[world.category_start_C[:-1]], cumulative[world.category_start_C[1:]]
    root_N = _roots(pointer_N)

    def pick(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        place = np.searchsorted(cumulative, low + rng.random(len(low)) * (high - low), side="right") - 1
        return world.items_by_category_I[np.clip(place, 0, world.num_items - 1)]

    def draw(rows: np.ndarray, theme_rate: float) -> np.ndarray:
        theme = plan.theme_R[request_N[rows]]
        by_theme = (rng.random(len(rows)) < theme_rate) & (high_C[theme] > low_C[theme])
        low, high = np.where(by_theme, low_C[theme], 0.0), np.where(by_theme, high_C[theme], cumulative[-1])
        item = pick(low, high)
        if config.world == "static":
            return item
        other, request = pick(low, high), request_N[rows]  # of two candidates the one that the older model prefers
        first, second = (old_score(world, plan, request, i, rng) for i in (item, other))
        return np.where(second > first, other, item)

    item_N = draw(np.arange(len(request_N)), THEME_RATE)
    theme_rate = THEME_RATE
    for _ in range(1000):
        item_N = item_N[root_N]
        key_N = request_N * world.num_items + item_N
        order = np.lexsort((~is_copy_N, key_N))  # copies first: they stay, the fresh ones are redrawn
        again = order[1:][key_N[order[1:]] == key_N[order[:-1]]]
        again = again[~is_copy_N[again]]
        if not len(again):
            return item_N
        theme_rate *= 0.8  # a small category cannot fill a slate
        item_N[again] = draw(again, theme_rate)
    raise RuntimeError(f"simulated day {day}: no distinct slates after 1000 rounds; raise simulated.num_items")


def old_score(
    world: World, plan: Schedule, request_N: np.ndarray, item_N: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(N,) what the model that was in use gives items: the user's taste, known with noise; it knows of no need."""
    taste_N = world.taste(plan.scenario_R[request_N], plan.user_R[request_N], item_N)
    return taste_N + OLD_MODEL_NOISE * rng.standard_normal(len(item_N))


@dataclass(frozen=True, slots=True)
class Windows:
    """Attribution windows in microseconds."""

    click_us: int
    order_us: int
    global_us: int


def logits(
    world: World, plan: Schedule, shown: Exposures, bonus_N: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) log odds of a click, and of an order given a click; `bonus_N` is what needs add to both."""
    scenario_N, user_N = plan.scenario_R[shown.request_N], plan.user_R[shown.request_N]
    click_N = world.click_logit(
        scenario_N,
        user_N,
        shown.item_N,
        query_N=plan.query_R[shown.request_N],
        hour_N=plan.time_us_R[shown.request_N] // 3_600_000_000,
        position_N=shown.position_N,
        interest_N=shown.interest_N,
    )
    click_N = click_N + bonus_N + OFF_TOPIC_LOGIT * plan.is_off_topic_R[shown.request_N]
    return click_N, world.order_logit(scenario_N, user_N, shown.item_N) + ORDER_SHARE * bonus_N


@dataclass(frozen=True, slots=True)
class Labels:
    """What the day's impressions lead to, without times."""

    p_click_N: np.ndarray
    """P(is_click): late clicks do not count."""
    p_order_N: np.ndarray
    """P(is_order), unconditional."""
    is_click_N: np.ndarray
    """Clicks in time, and is_order_N orders in time; the late ones count for nothing."""
    is_order_N: np.ndarray
    is_late_click_N: np.ndarray
    is_late_order_N: np.ndarray
    """Late orders after a click in time."""
    bonus_N: np.ndarray
    """Log odds that needs added."""


def draw_labels(
    world: World, config: SimulatedConfig, day: int, plan: Schedule, shown: Exposures, needs: Needs | None = None
) -> tuple[Labels, Needs | None]:
    """Clicks and orders of a day, and its needs as the orders left them."""
    rng, on_time = random_stream(config.seed, Stream.LABELS, day), 1.0 - config.late_rate
    click_draw_N, late_click_draw_N, order_draw_N, late_order_draw_N = rng.random((4, len(shown.item_N)))
    is_late_click_N, is_late_order_N = late_click_draw_N < config.late_rate, late_order_draw_N < config.late_rate

    def decide(bonus_N: np.ndarray) -> Labels:
        p_click_N, p_order_N = (sigmoid(logit_N) for logit_N in logits(world, plan, shown, bonus_N))
        is_clicked_N = click_draw_N < p_click_N
        is_ordered_N = is_clicked_N & ~is_late_click_N & (order_draw_N < p_order_N)
        return Labels(
            p_click_N=p_click_N * on_time,
            p_order_N=p_click_N * on_time * p_order_N * on_time,
            is_click_N=is_clicked_N & ~is_late_click_N,
            is_order_N=is_ordered_N & ~is_late_order_N,
            is_late_click_N=is_clicked_N & is_late_click_N,
            is_late_order_N=is_ordered_N & is_late_order_N,
            bonus_N=bonus_N,
        )

    bonus_N = np.zeros(len(shown.item_N))
    if needs is None:
        return decide(bonus_N), None
    user_N, scenario_N = plan.user_R[shown.request_N], plan.scenario_R[shown.request_N]
    time_us_N = day * DAY_US + plan.time_us_R[shown.request_N]
    # A row fits one need at most, and what it leads to hangs on no other: the first order of a need, drawn as if no
    # order had ended it, is the one that ends it. What comes after is decided again without it.
    need_N = needs.of_rows(world, user_N, shown.item_N, time_us_N)
    bonus_N = needs.bonus(world, config, need_N, shown.item_N, scenario_N)
    first = decide(bonus_N)
    ends = np.flatnonzero((first.is_order_N | first.is_late_order_N) & (bonus_N > 0))
    needs = needs.ended(need_N[ends], time_us_N[ends])
    need_N = needs.of_rows(world, user_N, shown.item_N, time_us_N)
    return decide(needs.bonus(world, config, need_N, shown.item_N, scenario_N)), needs


def draw_times(
    config: SimulatedConfig,
    day: int,
    plan: Schedule,
    shown: Exposures,
    labels: Labels,
    *,
    windows: Windows,
    next_request_us_U: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) times of clicks and of orders, such that attribution gives back the drawn labels.

    A click falls before the user's next request; an order before the user is shown the item again, and before the
    next day's first request. `late_rate` of the clicks and of the orders fall after their window and count for none.
    `next_request_us_U` (U,): the user's first request of the next day, or that day's end, in microseconds of this day.
    """
    user_N, time_N = plan.user_R[shown.request_N], plan.time_us_R[shown.request_N]
    N = len(shown.item_N)
    rng = random_stream(config.seed, Stream.TIMES, day)
    same_user_R = np.append(plan.user_R[1:] == plan.user_R[:-1], False)
    next_R = np.where(same_user_R, np.append(plan.time_us_R[1:], 0), next_request_us_U[plan.user_R])
    room_N = np.minimum((next_R - plan.time_us_R)[shown.request_N], min(windows.click_us, windows.order_us))
    delay_N = np.minimum(2e6 + rng.exponential(20e6, N), 0.9 * room_N)
    late_N = windows.click_us + 1_000_000 + rng.exponential(600e6, N)
    click_N = time_N + np.where(labels.is_late_click_N, late_N, delay_N).astype(np.int64)

    limit_N = np.minimum(_next_exposure(user_N, shown.item_N, time_N, next_request_us_U), click_N + windows.order_us)
    # A basket: the lines of one request are ordered at one time, after the last click and before the first limit.
    first_R, last_R = np.full(len(plan.user_R), np.iinfo(np.int64).max), np.zeros(len(plan.user_R), np.int64)
    request_N = shown.request_N[labels.is_order_N]
    np.minimum.at(first_R, request_N, limit_N[labels.is_order_N])
    np.maximum.at(last_R, request_N, click_N[labels.is_order_N])
    think_R = 60e6 * np.exp(rng.normal(2.5, 1.2, len(plan.user_R)))  # median 12 minutes, some hours
    wait_R = np.minimum(think_R, 0.9 * np.maximum(first_R - last_R, 0)).astype(np.int64)
    late_N = click_N + (windows.order_us + 1_000_000 + rng.exponential(7200e6, N)).astype(np.int64)
    return click_N, np.where(labels.is_late_order_N, late_N, (last_R + wait_R)[shown.request_N])


def _next_exposure(user_N: np.ndarray, item_N: np.ndarray, time_N: np.ndarray, next_day_us_U: np.ndarray) -> np.ndarray:
    """(N,) when the user may next be shown the same item: later this day, or at the next day's first request."""
    order = np.lexsort((time_N, item_N, user_N))
    same = (user_N[order][1:] == user_N[order][:-1]) & (item_N[order][1:] == item_N[order][:-1])
    limit_N = next_day_us_U[user_N].copy()
    limit_N[order[:-1][same]] = time_N[order[1:][same]]
    return limit_N
