"""One day of the simulated world: what is clicked and ordered, and when.

The times are such that attribution (contract, section 2) gives back exactly the drawn labels. Shape letters: U users,
R requests, N impressions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etl.sources.simulated_days import Exposures, Schedule
from etl.sources.simulated_world import Stream, World, random_stream, sigmoid
from usr_ray.config import SimulatedConfig


@dataclass(frozen=True, slots=True)
class Windows:
    """Attribution windows in microseconds."""

    click_us: int
    order_us: int
    global_us: int


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What the day's impressions led to. Times are microseconds since the day's start; orders may come days later."""

    p_click_N: np.ndarray
    """P(is_click): late clicks do not count."""
    p_order_N: np.ndarray
    """P(is_order), unconditional."""
    is_click_N: np.ndarray
    is_order_N: np.ndarray
    is_late_click_N: np.ndarray
    is_late_order_N: np.ndarray
    click_time_us_N: np.ndarray
    order_time_us_N: np.ndarray


def logits(world: World, plan: Schedule, shown: Exposures) -> tuple[np.ndarray, np.ndarray]:
    """(N,) log odds of a click, and of an order given a click."""
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
    return click_N, world.order_logit(scenario_N, user_N, shown.item_N)


def draw_outcomes(
    world: World,
    config: SimulatedConfig,
    day: int,
    plan: Schedule,
    shown: Exposures,
    *,
    windows: Windows,
    next_request_us_U: np.ndarray,
) -> Outcomes:
    """Clicks and orders with their times, such that attribution (contract, section 2) gives back the drawn labels.

    A click falls before the user's next request; an order before the user is shown the item again, and before the
    next day's first request. `late_rate` of the clicks and of the orders fall after their window and count for none.
    `next_request_us_U` (U,): the user's first request of the next day, or that day's end, in microseconds of this day.
    """
    user_N, time_N = plan.user_R[shown.request_N], plan.time_us_R[shown.request_N]
    N, on_time = len(shown.item_N), 1.0 - config.late_rate
    p_click_N, p_order_N = (sigmoid(logit_N) for logit_N in logits(world, plan, shown))
    rng = random_stream(config.seed, Stream.LABELS, day)
    clicked_N, late_click_N = rng.random(N) < p_click_N, rng.random(N) < config.late_rate
    is_click_N = clicked_N & ~late_click_N
    ordered_N, late_order_N = is_click_N & (rng.random(N) < p_order_N), rng.random(N) < config.late_rate

    rng = random_stream(config.seed, Stream.TIMES, day)
    same_user_R = np.append(plan.user_R[1:] == plan.user_R[:-1], False)
    next_R = np.where(same_user_R, np.append(plan.time_us_R[1:], 0), next_request_us_U[plan.user_R])
    room_N = np.minimum((next_R - plan.time_us_R)[shown.request_N], min(windows.click_us, windows.order_us))
    delay_N = np.minimum(2e6 + rng.exponential(20e6, N), 0.9 * room_N)
    late_N = windows.click_us + 1_000_000 + rng.exponential(600e6, N)
    click_N = time_N + np.where(late_click_N, late_N, delay_N).astype(np.int64)

    limit_N = np.minimum(_next_exposure(user_N, shown.item_N, time_N, next_request_us_U), click_N + windows.order_us)
    # A basket: the lines of one request are ordered at one time, after the last click and before the first limit.
    first_R, last_R = np.full(len(plan.user_R), np.iinfo(np.int64).max), np.zeros(len(plan.user_R), np.int64)
    basket_N = ordered_N & ~late_order_N
    np.minimum.at(first_R, shown.request_N[basket_N], limit_N[basket_N])
    np.maximum.at(last_R, shown.request_N[basket_N], click_N[basket_N])
    think_R = 60e6 * np.exp(rng.normal(2.5, 1.2, len(plan.user_R)))  # median 12 minutes, some hours
    wait_R = np.minimum(think_R, 0.9 * np.maximum(first_R - last_R, 0)).astype(np.int64)
    overdue_N = windows.order_us + 1_000_000 + rng.exponential(7200e6, N)
    order_N = np.where(late_order_N, click_N + overdue_N.astype(np.int64), (last_R + wait_R)[shown.request_N])
    return Outcomes(
        p_click_N=p_click_N * on_time,
        p_order_N=p_click_N * on_time * p_order_N * on_time,
        is_click_N=is_click_N,
        is_order_N=basket_N,
        is_late_click_N=clicked_N & late_click_N,
        is_late_order_N=ordered_N & late_order_N,
        click_time_us_N=click_N,
        order_time_us_N=order_N,
    )


def _next_exposure(user_N: np.ndarray, item_N: np.ndarray, time_N: np.ndarray, next_day_us_U: np.ndarray) -> np.ndarray:
    """(N,) when the user may next be shown the same item: later this day, or at the next day's first request."""
    order = np.lexsort((time_N, item_N, user_N))
    same = (user_N[order][1:] == user_N[order][:-1]) & (item_N[order][1:] == item_N[order][:-1])
    limit_N = next_day_us_U[user_N].copy()
    limit_N[order[:-1][same]] = time_N[order[1:][same]]
    return limit_N
