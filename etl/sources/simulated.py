"""The simulated source: logs of a world whose click and order probabilities are known.

It writes the logs and `truth` (impression_id, p_click, p_order, is_cross_exposure): the probabilities
the labels were drawn from. Attribution with the configured windows gives back exactly the drawn labels: a click falls
before its user's next request, an order before the user meets the item again, a late click or order after its window
and where no other click could earn it. Events run on past the last day until all its labels are final. One day is in
memory at a time. A world with needs has two side tables more, `needs` and `ceilings` (simulated_ceilings.py); for the
second a few columns of all days' impressions are kept.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from etl.sources.simulated_ceilings import Rows, ceilings, lines
from etl.sources.simulated_days import (
    Exposures,
    Labels,
    Schedule,
    Windows,
    day_size,
    draw_exposures,
    draw_labels,
    draw_schedule,
    draw_times,
    logits,
    visits_of,
)
from etl.sources.simulated_needs import (
    Needs,
    born_of_the_feed,
    brand_word,
    category_word,
    needs_of_day,
    price_word,
    query_texts,
    query_words,
)
from etl.sources.simulated_world import (
    CLICK_RATES,
    ORDER_RATES,
    SEARCHER_ACTIVITY,
    Columns,
    Stream,
    World,
    bias_for_rate,
    build_world,
    random_stream,
    sigmoid,
)
from etl.sources.writer import LogWriter, text_column
from usr_ray.config import DAY_US, Config, SimulatedConfig, day_number, parse_date, parse_dates

PILOT_DAY = 1 << 20
PILOT_IMPRESSIONS = 40_000
NO_REQUEST_US = 1000 * DAY_US


@dataclass(frozen=True, slots=True)
class SimulatedDay:
    """One day's requests, impressions and labels."""

    number: int
    start_us: int
    """Midnight UTC in microseconds since 1970."""
    plan: Schedule
    shown: Exposures
    labels: Labels
    click_time_us_N: np.ndarray
    """Microseconds since the day's start, as those of orders, which may come days later."""
    order_time_us_N: np.ndarray
    needs: Needs | None = None
    """All that lived for a part of the day, as it left them; None in a world without."""

    @property
    def end_us(self) -> int:
        """The next midnight."""
        return self.start_us + DAY_US

    @property
    def user_N(self) -> np.ndarray:
        """(N,) user of each impression."""
        return self.plan.user_R[self.shown.request_N]

    @property
    def scenario_N(self) -> np.ndarray:
        """(N,) scenario of each impression."""
        return self.plan.scenario_R[self.shown.request_N]


def label_windows(config: Config) -> Windows:
    """The attribution windows the labels are drawn for."""
    labels = config.labels
    return Windows(labels.click_window_us, labels.order_window_us, labels.global_window_us)


def make_world(config: Config) -> World:
    """The world of a configuration, its biases set on a pilot day so that click and order rates meet their targets."""
    is_query_S = np.array([name in config.query_scenarios for name in config.scenarios])
    world = build_world(config.simulated, len(config.scenarios), is_query_S)
    if config.simulated.world == "needs":
        weight_U = world.user_weight_U * np.where(world.shop.is_searcher_U, SEARCHER_ACTIVITY, 1.0)
        world = replace(world, user_weight_U=weight_U / weight_U.sum())
    needs = living_needs(world, config.simulated, PILOT_DAY, PILOT_IMPRESSIONS)
    plan = draw_schedule(world, config.simulated, PILOT_DAY, PILOT_IMPRESSIONS, needs)
    shown = draw_exposures(world, config.simulated, PILOT_DAY, plan, label_windows(config).global_us)
    scenario_N = plan.scenario_R[shown.request_N]
    bonus_N = draw_labels(world, config.simulated, PILOT_DAY, plan, shown, needs)[0].bonus_N
    click_N, order_N = logits(world, plan, shown, bonus_N)
    S = len(config.scenarios)
    click_bias_S, order_bias_S = np.zeros(S), np.zeros(S)
    for k, click_rate, order_rate in zip(
        range(S), np.linspace(*CLICK_RATES, S), np.linspace(*ORDER_RATES, S), strict=True
    ):
        rows = scenario_N == k
        if not rows.any():  # nobody searches
            continue
        click_bias_S[k] = bias_for_rate(click_N[rows], np.ones(rows.sum()), click_rate)
        order_bias_S[k] = bias_for_rate(order_N[rows], sigmoid(click_N[rows] + click_bias_S[k]), order_rate)
    return replace(world, click_bias_S=click_bias_S, order_bias_S=order_bias_S)


def living_needs(
    world: World, settings: SimulatedConfig, day: int, num_impressions: int, before: Needs | None = None
) -> Needs | None:
    """The needs that live on a day, `before` those of the day before; None in a world without."""
    if settings.world == "static":
        return None
    return needs_of_day(world, settings, day, visits_of(num_impressions), before)


def simulate_days(world: World, config: Config) -> Iterator[SimulatedDay]:
    """Iterate over the SimulatedDays in order: functions of seed and number and, with needs, of the days before."""
    settings, windows = config.simulated, label_windows(config)
    first = parse_date(settings.first_date, where="simulated.first_date")
    epoch_us = day_number(first) * DAY_US
    needs = living_needs(world, settings, 0, day_size(settings, 0))
    plan = draw_schedule(world, settings, 0, day_size(settings, 0), needs)
    for number in range(settings.num_days):
        shown = draw_exposures(world, settings, number, plan, windows.global_us)
        if needs is not None:
            needs = needs.and_new(feed_needs(world, settings, number, plan, shown), settings.num_categories)
        labels, needs = draw_labels(world, settings, number, plan, shown, needs)
        next_us_U = np.full(len(world.user_weight_U), NO_REQUEST_US)
        next_plan, next_needs = None, None
        if number + 1 < settings.num_days:
            size = day_size(settings, number + 1)
            next_needs = living_needs(world, settings, number + 1, size, needs)
            next_plan = draw_schedule(world, settings, number + 1, size, next_needs)
            next_us_U[:] = 2 * DAY_US  # no request tomorrow: maybe one the day after
            np.minimum.at(next_us_U, next_plan.user_R, DAY_US + next_plan.time_us_R)
        times = draw_times(settings, number, plan, shown, labels, windows=windows, next_request_us_U=next_us_U)
        yield SimulatedDay(number, epoch_us + number * DAY_US, plan, shown, labels, *times, needs)
        if next_plan is not None:
            plan, needs = next_plan, next_needs


def feed_needs(world: World, settings: SimulatedConfig, day: int, plan: Schedule, shown: Exposures) -> Needs:
    """Needs that arise from what a day shows."""
    return born_of_the_feed(
        world,
        settings,
        day,
        visits_of(len(shown.item_N)),
        user_N=plan.user_R[shown.request_N],
        item_N=shown.item_N,
        scenario_N=plan.scenario_R[shown.request_N],
        time_us_N=day * DAY_US + plan.time_us_R[shown.request_N],
    )


@dataclass(frozen=True, slots=True)
class LateOrders(Columns):
    """Orders after their window, held back until it is known that no later click of the pair earns them."""

    number: np.ndarray
    """Unique over the run, for the order id."""
    user: np.ndarray
    item: np.ndarray
    time_us: np.ndarray

    def without_credit(self, day: SimulatedDay, num_listings: int, order_window_us: int) -> LateOrders:
        """The orders that no click of the day could earn. The others are never logged: their label is 0 either way."""
        pair = self.user * num_listings + self.item
        clicked_N = day.labels.is_click_N
        click_pair = day.user_N[clicked_N] * num_listings + day.shown.listing_N[clicked_N]
        click_us = day.start_us + day.click_time_us_N[clicked_N]
        met = np.isin(click_pair, pair)  # a handful: late orders are few
        clicks: dict[int, list[int]] = defaultdict(list)
        for key, time_us in zip(click_pair[met].tolist(), click_us[met].tolist(), strict=True):
            clicks[key].append(time_us)
        free = [
            not any(0 <= time_us - click <= order_window_us for click in clicks[key])
            for key, time_us in zip(pair.tolist(), self.time_us.tolist(), strict=True)
        ]
        return self.where(np.array(free, dtype=bool))


def write_simulated(input_dir: Path, writer: LogWriter, config: Config) -> None:  # noqa: ARG001 - as every source
    """Write users, items, and day by day impressions, clicks, orders and truth. `input_dir` is not read."""
    settings = config.simulated
    world = make_world(config)
    num_catalogues = 1 + len(config.scenarios) if settings.link_loss else 1
    write_profiles(world, writer, num_catalogues, settings)
    for log in [f"{name}_{kind}" for name in config.scenarios for kind in ("impressions", "clicks")]:
        writer.declare(log)
    late = LateOrders(*(np.array([], dtype=np.int64) for _ in range(4)))
    num_before = 0
    past: list[Rows] = []
    for day in simulate_days(world, config):
        rows = DayRows(day, settings, config.scenarios, num_before)
        if day.needs is not None:
            past.append(rows_of_day(world, settings, day))
            write_needs(writer, day, day.needs, config)
        rows.write_events(writer)
        late = late + rows.late_orders()
        late = late.without_credit(day, num_catalogues * world.num_items, config.labels.order_window_us)
        is_last = day.number == settings.num_days - 1
        is_due = (late.time_us < day.end_us) | is_last
        rows.write_orders(writer, late.where(is_due))
        late = late.where(~is_due)
        num_before += len(day.shown.item_N)
        if is_last:
            writer.append(f"{config.scenarios[0]}_impressions", closing_impression(day, config))
        print(f"day {day.number + 1} of {settings.num_days}: {num_before:,} impressions", file=sys.stderr, flush=True)
    if past:
        write_ceilings(writer, Rows.joined(past), config)


def rows_of_day(world: World, config: SimulatedConfig, day: SimulatedDay) -> Rows:
    """A day's impressions, as what can be told of them is estimated."""
    plan, shown, labels = day.plan, day.shown, day.labels
    num_categories = world.user_theme_UC.shape[1]
    query_N = plan.query_R[shown.request_N]
    brand_R = query_words(config, day.number, day.needs or Needs.none(), plan.need_R).brand_R
    known_click_N, known_order_N = logits(world, plan, shown)
    return Rows(
        user_N=day.user_N,
        category_N=world.item_category_I[shown.item_N],
        brand_N=world.item_brand_I[shown.item_N],
        scenario_N=day.scenario_N,
        time_s_N=(day.number * DAY_US + plan.time_us_R[shown.request_N]) // 1_000_000,
        asked_N=np.where(query_N < 0, -1, query_N % num_categories),
        asked_brand_N=brand_R[shown.request_N],
        is_cheap_N=world.shop.is_cheap_I[shown.item_N],
        day_N=np.full(len(query_N), day.number),
        is_click_N=labels.is_click_N,
        is_order_N=labels.is_order_N,
        click_time_s_N=(day.number * DAY_US + day.click_time_us_N) // 1_000_000,
        p_click_N=labels.p_click_N,
        p_order_N=labels.p_order_N,
        known_click_N=known_click_N - shown.interest_N,
        known_order_N=known_order_N,
    )


def write_needs(writer: LogWriter, day: SimulatedDay, needs: Needs, config: Config) -> None:
    """The needs that ended on the day, and on the last day those that go on: who, what, born where and when."""
    last_us = (day.number + 1) * DAY_US
    ended = needs.dies_us_K < last_us
    needs = needs if day.number == config.simulated.num_days - 1 else needs.where(ended)
    first_us = day.start_us - day.number * DAY_US
    writer.append(
        "needs",
        {
            "user_id": text_column("u", needs.user_K),
            "category_id": text_column("c", needs.category_K),
            "brand_id": text_column("b", needs.brand_K),
            "is_cheap": needs.is_cheap_K,
            "scenario": np.array(config.scenarios)[needs.scenario_K],
            "born_time": first_us + needs.born_us_K,
            "end_time": first_us + needs.dies_us_K,
            "is_ordered": needs.is_ordered_K,
        },
    )


def write_ceilings(writer: LogWriter, rows: Rows, config: Config) -> None:
    """Print and write what can be told of the days held out: from data.eval_dates on, else the last fifth."""
    settings = config.simulated
    first_held_out = settings.num_days - max(1, settings.num_days // 5)
    if config.data.eval_dates:
        start = day_number(parse_date(settings.first_date, where="simulated.first_date"))
        named = day_number(parse_dates(config.data.eval_dates, where="data.eval_dates")[0]) - start
        first_held_out = named if 0 < named < settings.num_days else first_held_out
    found = ceilings(rows, len(config.scenarios), settings.num_categories, first_held_out)
    found = [{**row, "scenario": config.scenarios[int(str(row["scenario"]))]} for row in found]
    print("\n".join(lines(found)), flush=True)
    writer.append("ceilings", {name: [row[name] for row in found] for name in found[0]})


def closing_impression(last: SimulatedDay, config: Config) -> dict[str, list[str] | pa.Array | np.ndarray]:
    """One impression as the last label of all days becomes final: the newest event that is used, so all are mature."""
    final_us = last.end_us + config.labels.global_window_us + config.labels.order_window_us
    return {
        "impression_id": ["end"],
        "request_id": ["end"],
        "user_id": ["u0"],
        "item_id": ["i0"],
        "event_time": np.array([final_us]),
        "position": np.array([0]),
        "query": ["query 0"] if config.scenarios[0] in config.query_scenarios else pa.nulls(1, pa.string()),
    }


def write_profiles(world: World, writer: LogWriter, num_catalogues: int, settings: SimulatedConfig) -> None:
    """The users and items logs: what a shop knows of them, weakly informative of their tastes."""
    item = np.tile(np.arange(world.num_items), num_catalogues)
    writer.append(
        "users",
        {
            "user_id": text_column("u", np.arange(len(world.user_weight_U))),
            "age_band": text_column("age_", world.age_band_U),
            "city": text_column("city_", world.city_U),
            "account_age_days": world.account_age_days_U.astype(np.float64),
        },
    )
    columns: dict[str, Any] = {
        "item_id": text_column("i", np.arange(len(item))),
        "category_id": text_column("c", world.item_category_I[item]),
        "brand_id": text_column("b", world.item_brand_I[item]),
        "price": world.item_price_I[item],
        "tags": pa.array([[f"style_{tag}" for tag in row] for row in item_tags(world, settings)[item].tolist()]),
    }
    if settings.item_vector:
        vectors = item_vectors(world, settings)[item]
        edges = np.arange(len(item) + 1, dtype=np.int32) * settings.item_vector
        columns["item_vector"] = pa.ListArray.from_arrays(edges, vectors.ravel())
    if settings.world == "needs":  # in the words of the queries: a new item can be told by them before its first click
        category, brand = world.item_category_I[item].tolist(), world.item_brand_I[item].tolist()
        rows = zip(brand, category, world.shop.is_cheap_I[item].tolist(), strict=True)
        columns["title"] = [f"{brand_word(b)} {category_word(c)} {price_word(is_cheap)}" for b, c, is_cheap in rows]
    writer.append("items", columns)


def item_tags(world: World, settings: SimulatedConfig) -> np.ndarray:
    """int64 (I, 2): where the item goes furthest and next in what it is, each another's in three cases of ten."""
    rng = random_stream(settings.seed, Stream.TAGS)
    latent_ID = world.item_latent_ID
    furthest_I2 = np.argsort(-np.abs(latent_ID), axis=1, kind="stable")[:, :2]
    told_I2 = 2 * furthest_I2 + (np.take_along_axis(latent_ID, furthest_I2, axis=1) > 0)
    other_I2 = rng.integers(0, 2 * latent_ID.shape[1], told_I2.shape)
    return np.asarray(np.where(rng.random(told_I2.shape) < 0.7, told_I2, other_I2))


def item_vectors(world: World, settings: SimulatedConfig) -> np.ndarray:
    """float32 (I, P): a direction of the item's category, and as much again that tells nothing."""
    rng = random_stream(settings.seed, Stream.VECTORS)
    centres_CP = rng.normal(size=(settings.num_categories, settings.item_vector))
    noise_IP = rng.normal(size=(world.num_items, settings.item_vector))
    vectors_IP: np.ndarray = (centres_CP[world.item_category_I] + noise_IP).astype(np.float32)
    return vectors_IP


@dataclass(frozen=True, slots=True)
class DayRows:
    """The log rows of one day. The run's n-th impression has impression_id "n<n>" and, if clicked, click_id "c<n>"."""

    day: SimulatedDay
    settings: SimulatedConfig
    scenarios: tuple[str, ...]
    num_before: int

    def _event(self, rows: np.ndarray, time_us: np.ndarray) -> dict[str, pa.Array | np.ndarray]:
        return {
            "user_id": text_column("u", self.day.user_N[rows]),
            "item_id": text_column("i", self.day.shown.listing_N[rows]),
            "event_time": self.day.start_us + time_us,
        }

    def _logged(self, rows: np.ndarray, time_us: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows in the order of their times, `duplicate_rate` of them twice."""
        rows = np.concatenate([rows, rows[rng.random(len(rows)) < self.settings.duplicate_rate]])
        return rows[np.argsort(time_us[rows], kind="stable")]

    def _queries(self) -> pa.Array:
        """(R,) the text of each request's query; null where it has none."""
        plan, needs = self.day.plan, self.day.needs
        if needs is None:
            return text_column("query ", pa.array(plan.query_R, mask=plan.query_R < 0))
        words = query_words(self.settings, self.day.number, needs, plan.need_R)
        return query_texts(words, needs, plan.query_R, plan.need_R, self.settings.num_categories)

    def write_events(self, writer: LogWriter) -> None:
        """Append the day's impressions, clicks and truth."""
        plan, shown, labels = self.day.plan, self.day.shown, self.day.labels
        rng = random_stream(self.settings.seed, Stream.ROWS, self.day.number)
        number_N = self.num_before + np.arange(len(shown.item_N))
        shown_us_N, click_us_N = plan.time_us_R[shown.request_N], self.day.click_time_us_N
        # A late click names its impression: without the name it would be nobody's for another reason.
        is_named_N = (rng.random(len(number_N)) >= self.settings.unnamed_click_rate) | labels.is_late_click_N
        query_R = self._queries()
        for k, scenario in enumerate(self.scenarios):
            rows = self._logged(np.flatnonzero(self.day.scenario_N == k), shown_us_N, rng)
            query = query_R.take(pa.array(shown.request_N[rows]))
            writer.append(
                f"{scenario}_impressions",
                {
                    "impression_id": text_column("n", number_N[rows]),
                    "request_id": text_column(f"r{self.day.number}-", shown.request_N[rows]),
                    **self._event(rows, shown_us_N[rows]),
                    "position": shown.position_N[rows],
                    "query": query,
                },
            )
            clicked_N = (labels.is_click_N | labels.is_late_click_N) & (self.day.scenario_N == k)
            rows = self._logged(np.flatnonzero(clicked_N), click_us_N, rng)
            writer.append(
                f"{scenario}_clicks",
                {
                    "click_id": text_column("c", number_N[rows]),
                    "impression_id": text_column("n", pa.array(number_N[rows], mask=~is_named_N[rows])),
                    **self._event(rows, click_us_N[rows]),
                },
            )
        truth = {
            "impression_id": text_column("n", number_N),
            "p_click": labels.p_click_N,
            "p_order": labels.p_order_N,
            "is_cross_exposure": shown.is_copy_N,
        }
        if self.day.needs is not None:
            truth["need_log_odds"] = labels.bonus_N
        writer.append("truth", truth)

    def late_orders(self) -> LateOrders:
        """The day's orders that come after their window."""
        rows = np.flatnonzero(self.day.labels.is_late_order_N)
        time_us = self.day.start_us + self.day.order_time_us_N[rows]
        return LateOrders(self.num_before + rows, self.day.user_N[rows], self.day.shown.listing_N[rows], time_us)

    def write_orders(self, writer: LogWriter, late: LateOrders) -> None:
        """Append the day's orders (one order_id a request's basket) and the late ones that are due."""
        rng = random_stream(self.settings.seed, Stream.ROWS, PILOT_DAY + self.day.number)
        order_us_N = self.day.order_time_us_N
        rows = self._logged(np.flatnonzero(self.day.labels.is_order_N), order_us_N, rng)
        request = self.day.shown.request_N[rows]
        writer.append(
            "orders", {"order_id": text_column(f"o{self.day.number}-", request), **self._event(rows, order_us_N[rows])}
        )
        writer.append(
            "orders",
            {
                "order_id": text_column("late-", late.number),
                "user_id": text_column("u", late.user),
                "item_id": text_column("i", late.item),
                "event_time": late.time_us,
            },
        )
