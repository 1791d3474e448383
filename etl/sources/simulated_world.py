"""The simulated world: users, items and queries with tastes, and the click and order logits they give.

Shape letters: U users, I items, C categories, Q queries, S scenarios, D latent dimensions, N impressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Self

import numpy as np

from usr_ray.config import SimulatedConfig

LATENT_DIM = 4
NUM_SEGMENTS = 8
NUM_AGE_BANDS = 6
NUM_CITIES = 16
BRANDS_PER_CATEGORY = 5

CLICK_RATES = (0.22, 0.16)
"""Targets of the first and the last scenario, the others evenly between: search is clicked more than a feed."""
ORDER_RATES = (0.18, 0.12)
"""Targets of orders given a click."""

TASTE_WEIGHT = 1.05
QUERY_WEIGHT = 0.18
USER_BIAS_STD = 0.4
QUALITY_STD = 0.4
PAIR_INTEREST_STD = 0.4
"""Interest of one user in one item on one occasion, beyond taste: shared by the exposures of a cross exposure."""
POSITION_SLOPE = 0.03
HOUR_AMPLITUDE = 0.20

# Of a world with needs.
DRIFT = 0.5
"""Standard deviation of an item's log popularity over the days."""
DRIFT_DAYS = (6.0, 20.0)
SEARCHER_ACTIVITY = 20.0
"""Visits of a user who searches, of those of one who does not: the scenario without queries is the sparse one."""
OLD_MODEL_NOISE = 1.0
"""Noise of the older model that chooses and ranks what is shown; the deviation of the user's taste is 1."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Base of a dataclass of arrays of one length: a table."""

    def where(self, chosen: np.ndarray) -> Self:
        """The chosen rows."""
        return type(self)(*(getattr(self, key.name)[chosen] for key in fields(self)))

    def __add__(self, other: Self) -> Self:
        return self.joined([self, other])

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several."""
        return cls(*(np.concatenate([getattr(part, key.name) for part in parts]) for key in fields(cls)))


class Stream(IntEnum):
    """Independent random streams of one seed: turning one dial leaves the draws of the other streams as they are."""

    WORLD = 0
    SCHEDULE = 1
    ITEMS = 2
    COPIES = 3
    LABELS = 4
    TIMES = 5
    ROWS = 6
    NEEDS = 7
    FEED_NEEDS = 8
    NEED_VISITS = 9
    QUERIES = 10
    SEARCHES = 11
    CARRIES = 12
    THEMES = 13
    POSITIONS = 14
    SHOP = 15
    VECTORS = 16
    TAGS = 17


def random_stream(seed: int, stream: Stream, day: int = 0) -> np.random.Generator:
    """The Philox generator of (seed, stream, day)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, (int(stream) << 32) + day], dtype=np.uint64)))


@dataclass(frozen=True, slots=True)
class Shop:
    """What a world with needs has beside users with tastes and items with appeal."""

    is_searcher_U: np.ndarray
    """Whether the user ever opens a scenario with queries."""
    is_cheap_I: np.ndarray
    """Its price is not above the median of its category."""
    drift_days_I: np.ndarray
    drift_phase_I: np.ndarray

    def popularity(self, day: int) -> np.ndarray:
        """(I,) factor of an item's weight on a day: a wave of its own period."""
        return np.exp(np.sqrt(2) * DRIFT * np.sin(2 * np.pi * day / self.drift_days_I + self.drift_phase_I))


@dataclass(frozen=True, slots=True)
class World:
    """Everything about users, items and queries that does not change from day to day."""

    user_weight_U: np.ndarray
    """Share of visits; a few users make many."""
    user_bias_U: np.ndarray
    user_spend_U: np.ndarray
    user_taste_SUD: np.ndarray
    user_theme_UC: np.ndarray
    """Log odds of a visit's theme category."""
    age_band_U: np.ndarray
    city_U: np.ndarray
    account_age_days_U: np.ndarray
    item_category_I: np.ndarray
    item_brand_I: np.ndarray
    item_price_I: np.ndarray
    item_quality_I: np.ndarray
    item_appeal_SID: np.ndarray
    item_latent_ID: np.ndarray
    """What the item is, whatever the scenario: queries look for it."""
    item_weight_I: np.ndarray
    item_launch_day_I: np.ndarray
    items_by_category_I: np.ndarray
    """Item numbers sorted by category: one cumulative sum of weights serves every category."""
    category_start_C: np.ndarray
    """C + 1 bounds of each category in items_by_category_I."""
    query_latent_QD: np.ndarray
    is_query_scenario_S: np.ndarray
    click_bias_S: np.ndarray
    order_bias_S: np.ndarray
    shop: Shop
    """Used only in a world with needs."""

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_category_I)

    def taste(self, scenario_N: np.ndarray, user_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
        """(N,) what the user likes of the item in the scenario; about standard normal."""
        taste_ND = self.user_taste_SUD[scenario_N, user_N]
        return np.einsum("nd,nd->n", taste_ND, self.item_appeal_SID[scenario_N, item_N]) / np.sqrt(LATENT_DIM)

    def click_logit(
        self,
        scenario_N: np.ndarray,
        user_N: np.ndarray,
        item_N: np.ndarray,
        *,
        query_N: np.ndarray,
        hour_N: np.ndarray,
        position_N: np.ndarray,
        interest_N: np.ndarray,
    ) -> np.ndarray:
        """(N,) log odds of a click. query_N is -1 without a query; interest_N is the pair's own interest."""
        logit_N = (
            self.click_bias_S[scenario_N]
            + TASTE_WEIGHT * self.taste(scenario_N, user_N, item_N)
            + self.user_bias_U[user_N]
            + self.item_quality_I[item_N]
            + HOUR_AMPLITUDE * np.sin((hour_N - 15 + 3 * scenario_N) * np.pi / 12)
            - POSITION_SLOPE * position_N
            + interest_N
        )
        asked_N = query_N >= 0
        relevance_N = np.einsum(
            "nd,nd->n", self.query_latent_QD[query_N[asked_N]], self.item_latent_ID[item_N[asked_N]]
        )
        logit_N[asked_N] += QUERY_WEIGHT * relevance_N / np.sqrt(LATENT_DIM)
        return logit_N

    def order_logit(self, scenario_N: np.ndarray, user_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
        """(N,) log odds of an order given a click."""
        log_price_N = np.log(self.item_price_I[item_N])
        return (
            self.order_bias_S[scenario_N]
            + 0.6 * self.taste(scenario_N, user_N, item_N)
            + self.user_spend_U[user_N]
            + 0.8 * self.item_quality_I[item_N]
            - 0.5 * (log_price_N - 3.5)
        )


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * logit))


def build_world(config: SimulatedConfig, num_scenarios: int, is_query_scenario_S: np.ndarray) -> World:
    """The world of a seed, with biases that are 0: `simulated.make_world` sets them.

    A vector of scenario k is a common part and a part of its own, mixed so that the taste (user . item) of two
    scenarios correlates by `similarity` over users and items.
    """
    rng = random_stream(config.seed, Stream.WORLD)
    num_users, num_items, num_categories = config.num_users, config.num_items, config.num_categories
    segment_U = rng.integers(0, NUM_SEGMENTS, num_users)
    category_I = rng.permutation(np.arange(num_items) % num_categories)
    by_category_I = np.argsort(category_I, kind="stable")
    # Tastes hang on segments and categories, so that a model can learn them from few rows a user and an item.
    weight_U = _activity(rng, num_users)
    user_common_UD = _grouped(rng, segment_U, NUM_SEGMENTS, 1)[0]
    category_CD = rng.standard_normal((num_categories, LATENT_DIM))
    item_common_ID = _mix(category_CD[category_I], rng.standard_normal((num_items, LATENT_DIM)), 0.9)
    common = config.similarity**0.25  # the product of two vectors correlates by common^4
    user_taste_SUD = _mix(user_common_UD, _grouped(rng, segment_U, NUM_SEGMENTS, num_scenarios), common**2)
    item_appeal_SID = _mix(item_common_ID, _grouped(rng, category_I, num_categories, num_scenarios), common**2)
    brand_I = category_I * BRANDS_PER_CATEGORY + rng.integers(0, BRANDS_PER_CATEGORY, num_items)
    brand_quality = rng.standard_normal(num_categories * BRANDS_PER_CATEGORY)[brand_I]
    weight_I = 1.0 / (rng.permutation(num_items) + 10.0) ** 0.9
    is_new_I = rng.random(num_items) < config.new_item_share
    category_price_C = rng.normal(3.5, 0.7, num_categories)
    return World(
        user_weight_U=weight_U,
        user_bias_U=USER_BIAS_STD * rng.standard_normal(num_users),
        user_spend_U=0.5 * rng.standard_normal(num_users),
        user_taste_SUD=_spread(user_taste_SUD, weight_U).astype(np.float32),
        user_theme_UC=(1.2 * user_common_UD @ category_CD.T / np.sqrt(LATENT_DIM)).astype(np.float32),
        age_band_U=_hint(rng, segment_U, NUM_AGE_BANDS),
        city_U=_hint(rng, segment_U, NUM_CITIES),
        account_age_days_U=rng.integers(1, 2000, num_users),
        item_category_I=category_I,
        item_brand_I=brand_I,
        item_price_I=(
            price_I := np.round(np.exp(category_price_C[category_I] + 0.5 * rng.standard_normal(num_items)), 2)
        ),
        item_quality_I=QUALITY_STD * _mix(brand_quality, rng.standard_normal(num_items), 0.5),
        item_appeal_SID=_spread(item_appeal_SID, weight_I).astype(np.float32),
        item_latent_ID=_spread(item_common_ID, weight_I).astype(np.float32),
        item_weight_I=weight_I,
        item_launch_day_I=np.where(is_new_I, rng.integers(0, config.num_days, num_items), 0),
        items_by_category_I=by_category_I,
        category_start_C=np.searchsorted(category_I[by_category_I], np.arange(num_categories + 1)),
        query_latent_QD=_mix(
            category_CD[np.arange(config.num_queries) % num_categories],
            rng.standard_normal((config.num_queries, LATENT_DIM)),
            0.85,
        ).astype(np.float32),
        is_query_scenario_S=is_query_scenario_S,
        click_bias_S=np.zeros(num_scenarios),
        order_bias_S=np.zeros(num_scenarios),
        shop=_build_shop(config, category_I, price_I),
    )


def _build_shop(config: SimulatedConfig, category_I: np.ndarray, price_I: np.ndarray) -> Shop:
    rng = random_stream(config.seed, Stream.SHOP)
    median_C = np.array([np.median(price_I[category_I == c]) for c in range(config.num_categories)])
    return Shop(
        is_searcher_U=rng.random(config.num_users) < config.searcher_share,
        is_cheap_I=price_I <= median_C[category_I],
        drift_days_I=rng.uniform(*DRIFT_DAYS, config.num_items),
        drift_phase_I=rng.uniform(0, 2 * np.pi, config.num_items),
    )


def bias_for_rate(logit: np.ndarray, weight: np.ndarray, rate: float) -> float:
    """The b with sum(weight * sigmoid(logit + b)) / sum(weight) = rate, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if np.average(sigmoid(logit + middle), weights=weight) < rate:
            low = middle
        else:
            high = middle
    return low


def _mix(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Unit-variance mixture: `share` of the variance from `first`, the rest from `second`."""
    return np.sqrt(share) * first + np.sqrt(1.0 - share) * second


def _spread(vectors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Centred and of equal length: no item pleases everybody, so that popularity alone cannot tell tastes."""
    centred = vectors - np.average(vectors, axis=-2, weights=weight)[..., None, :]
    return centred * np.sqrt(LATENT_DIM) / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-9)


def _grouped(rng: np.random.Generator, group: np.ndarray, num_groups: int, num_draws: int) -> np.ndarray:
    """(num_draws, len(group), D) vectors that share 70 % of their variance inside a group."""
    group_SGD = rng.standard_normal((num_draws, num_groups, LATENT_DIM))
    return _mix(group_SGD[:, group], rng.standard_normal((num_draws, len(group), LATENT_DIM)), 0.9)


def _activity(rng: np.random.Generator, num_users: int) -> np.ndarray:
    """Visit shares: log-normal, so that the busiest tenth of the users makes about 40 % of the visits."""
    weight_U = np.exp(rng.standard_normal(num_users))
    return weight_U / weight_U.sum()


def _hint(rng: np.random.Generator, segment_U: np.ndarray, num_values: int) -> np.ndarray:
    """A user column that tells the segment in half of the cases: weakly informative, as profiles are."""
    home = rng.integers(0, num_values, NUM_SEGMENTS)
    return np.where(rng.random(len(segment_U)) < 0.7, home[segment_U], rng.integers(0, num_values, len(segment_U)))
