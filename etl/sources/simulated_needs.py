"""Needs: what makes the simulated world's scenarios worth joining (`simulated.world = "needs"`).

A need is a category with a brand and a price leaning. It arises by itself or from what a feed shows, lives half a day
to two days and ends with its age or with the order of an item that fits. While it lives it brings the user back, sets
what is searched for and raises the click and order odds of fitting items: in full in the scenario of its birth, by
`simulated.need_carry` of it in the others. The visits of a day are planned at its start: those for a need that an order
ends are still made that day, without its odds.

Public joint logs are why: KuaiSAR (arXiv 2306.07705) has the searches and the recommendations of the same users, SESRec
(arXiv 2305.10822) finds that some searches share their interest with the recommendations and others do not, UniSAR
(arXiv 2404.09520) that users go from one to the other and on. The numbers below are ours, taken from none of them.

Shape letters: K needs, U users, I items, C categories, R requests, N impressions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from etl.sources.simulated_world import BRANDS_PER_CATEGORY, Columns, Stream, World, random_stream
from usr_ray.config import DAY_US, SimulatedConfig

LIFE_DAYS = (0.5, 2.0)
VISITS_PER_DAY = 4.0
"""Visits of a user for one living need."""
FEED_BORN_RATE = 0.3
"""Share of needs that an item shown outside search gives birth to."""
FEED_FOLLOWS_RATE = 0.8
"""Share of a need's visits in which the feed shows its category more; in the others it follows the user's habits."""
SEARCH_RATES = (0.85, 0.75)
"""Share of the requests of a user who searches that are searches, with a need that shows there and without one."""
NOVEL_RATE = 0.6
"""Share of needs that arise in any category; the others in one that the user likes to look at."""
ORDER_SHARE = 0.25
"""What a need adds to the log odds of an order given a click, of what it adds to those of the click."""
FIT = (0.6, 0.25, 0.15)
"""How well an item of the category fits; more if it is of the brand, more if it is on the right side of the price."""
OFF_TOPIC_RATE = 0.15
"""Share of searches that lead nowhere: the query names a category, the page shows others."""
OFF_TOPIC_LOGIT = -0.7
BRAND_RATE, PRICE_RATE, MISSPELT_RATE = 0.5, 0.3, 0.08
"""Shares of a need's queries that name the brand and the price, and of all queries with a misspelt word."""
NUM_SYNONYMS = 2
_SETTLING_DAYS = 2
"""Days before the first one whose needs may be alive on it."""
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True, slots=True)
class Needs(Columns):
    """Needs of which each lives for a part of one day at least; at most one of a user in a category."""

    user_K: np.ndarray
    category_K: np.ndarray
    brand_K: np.ndarray
    """Brands as World.item_brand_I numbers them."""
    is_cheap_K: np.ndarray
    scenario_K: np.ndarray
    """The scenario in which the need was born."""
    born_us_K: np.ndarray
    """Microseconds since the first day's start; negative: before it."""
    dies_us_K: np.ndarray
    """Last moment of its life."""
    is_ordered_K: np.ndarray
    """Whether an order ended it."""

    def __len__(self) -> int:
        return len(self.user_K)

    @classmethod
    def none(cls) -> Needs:
        """No needs."""
        ints, flags = np.array([], dtype=np.int64), np.array([], dtype=bool)
        return cls(ints, ints, ints, flags, ints, ints, ints, flags)

    def and_new(self, other: Needs, num_categories: int) -> Needs:
        """These needs, and the earliest of `other` for each user and category that have none here."""
        other = other.where(np.argsort(other.born_us_K, kind="stable"))
        _, first = np.unique(other.user_K * num_categories + other.category_K, return_index=True)
        other = other.where(np.sort(first))
        taken = self.user_K * num_categories + self.category_K
        return self + other.where(~np.isin(other.user_K * num_categories + other.category_K, taken))

    def of_rows(self, world: World, user_N: np.ndarray, item_N: np.ndarray, time_us_N: np.ndarray) -> np.ndarray:
        """(N,) the living need whose category the item has; -1 for none. `time_us_N` since the first day's start."""
        if not len(self):
            return np.full(len(user_N), -1)
        num_categories = world.user_theme_UC.shape[1]
        key_K = self.user_K * num_categories + self.category_K
        order = np.argsort(key_K)
        key_N = user_N * num_categories + world.item_category_I[item_N]
        need_N = order[np.minimum(np.searchsorted(key_K[order], key_N), len(order) - 1)]
        is_alive_N = (self.born_us_K[need_N] < time_us_N) & (time_us_N <= self.dies_us_K[need_N])
        return np.where((key_K[need_N] == key_N) & is_alive_N, need_N, -1)

    def bonus(
        self, world: World, config: SimulatedConfig, need_N: np.ndarray, item_N: np.ndarray, scenario_N: np.ndarray
    ) -> np.ndarray:
        """(N,) log odds that the need of each row (`of_rows`) adds to a click, and to an order given a click."""
        bonus_N = np.zeros(len(need_N))
        rows = np.flatnonzero(need_N >= 0)
        need, item = need_N[rows], item_N[rows]
        fit = FIT[0] + FIT[1] * (world.item_brand_I[item] == self.brand_K[need])
        fit += FIT[2] * (world.shop.is_cheap_I[item] == self.is_cheap_K[need])
        shows = np.where(scenario_N[rows] == self.scenario_K[need], 1.0, config.need_carry)
        bonus_N[rows] = config.need_strength * fit * shows
        return bonus_N

    def ended(self, need_N: np.ndarray, time_us_N: np.ndarray) -> Needs:
        """These needs with the ends that orders bring; of several orders for one need the earliest counts."""
        end_K = np.full(len(self), np.iinfo(np.int64).max)
        np.minimum.at(end_K, need_N, time_us_N)
        is_first_K = end_K < np.iinfo(np.int64).max
        return replace(self, dies_us_K=np.minimum(self.dies_us_K, end_K), is_ordered_K=self.is_ordered_K | is_first_K)


def _needs(
    rng: np.random.Generator,
    user: np.ndarray,
    category: np.ndarray,
    brand: np.ndarray,
    scenario: np.ndarray,
    born_us: np.ndarray,
) -> Needs:
    life_us = (rng.uniform(*LIFE_DAYS, len(user)) * DAY_US).astype(np.int64)
    is_cheap = rng.random(len(user)) < 0.5
    none = np.zeros(len(user), dtype=bool)
    return Needs(user, category, brand, is_cheap, scenario, born_us, born_us + life_us, none)


def num_born(config: SimulatedConfig, num_visits: int) -> float:
    """Needs of a day, on average, such that `need_share` of its visits are made for one."""
    visits_per_need = VISITS_PER_DAY * sum(LIFE_DAYS) / 2
    return config.need_share * num_visits / visits_per_need


def born_by_themselves(world: World, config: SimulatedConfig, day: int, num_visits: int) -> Needs:
    """Needs that arise on a day (negative: before the first): of active users more, in part of them habitual ones."""
    rng = random_stream(config.seed, Stream.NEEDS, day + _SETTLING_DAYS)
    count = rng.poisson((1 - FEED_BORN_RATE) * num_born(config, num_visits))
    user = rng.choice(len(world.user_weight_U), count, p=world.user_weight_U)
    theme = world.user_theme_UC[user]
    category = np.argmax(theme + rng.gumbel(size=theme.shape), axis=1)
    category = np.where(rng.random(count) < NOVEL_RATE, rng.integers(0, theme.shape[1], count), category)
    brand = category * BRANDS_PER_CATEGORY + rng.integers(0, BRANDS_PER_CATEGORY, count)
    scenario = rng.integers(0, len(world.click_bias_S), count)
    without = np.flatnonzero(~world.is_query_scenario_S)
    if len(without):  # who never searches has no need that is born there
        scenario = np.where(world.shop.is_searcher_U[user], scenario, without[scenario % len(without)])
    born_us = day * DAY_US + (rng.random(count) * DAY_US).astype(np.int64)
    return _needs(rng, user, category, brand, scenario, born_us)


def born_of_the_feed(
    world: World,
    config: SimulatedConfig,
    day: int,
    num_visits: int,
    *,
    user_N: np.ndarray,
    item_N: np.ndarray,
    scenario_N: np.ndarray,
    time_us_N: np.ndarray,
) -> Needs:
    """Needs that items shown outside search give birth to: of the category and the brand of the item.

    The arrays are the day's impressions; `time_us_N` since the first day's start.
    """
    rng = random_stream(config.seed, Stream.FEED_NEEDS, day)
    rows = np.flatnonzero(~world.is_query_scenario_S[scenario_N])
    count = min(int(rng.poisson(FEED_BORN_RATE * num_born(config, num_visits))), len(rows))
    rows = rng.choice(rows, count, replace=False) if count else rows[:0]
    item = item_N[rows]
    brand, category = world.item_brand_I[item], world.item_category_I[item]
    return _needs(rng, user_N[rows], category, brand, scenario_N[rows], time_us_N[rows])


def needs_of_day(world: World, config: SimulatedConfig, day: int, num_visits: int, before: Needs | None) -> Needs:
    """Needs that live on a day: those of the day before that go on, and new ones; `before` None: on a first day."""
    num_categories = world.user_theme_UC.shape[1]
    if before is None:
        before = Needs.none()
        for earlier in range(day - _SETTLING_DAYS, day):
            before = before.and_new(born_by_themselves(world, config, earlier, num_visits), num_categories)
    living = before.where(before.dies_us_K > day * DAY_US)
    return living.and_new(born_by_themselves(world, config, day, num_visits), num_categories)


def visits(config: SimulatedConfig, needs: Needs, day: int) -> tuple[np.ndarray, np.ndarray]:
    """(need, microseconds since the day's start) of the visits that needs bring."""
    rng = random_stream(config.seed, Stream.NEED_VISITS, day)
    start_K = np.maximum(needs.born_us_K - day * DAY_US, 0)
    end_K = np.minimum(needs.dies_us_K - day * DAY_US, DAY_US)
    count_K = rng.poisson(VISITS_PER_DAY * np.maximum(end_K - start_K, 0) / DAY_US)
    need_V = rng.permutation(np.repeat(np.arange(len(needs)), count_K))
    return need_V, start_K[need_V] + rng.random(len(need_V)) * (end_K - start_K)[need_V]


def word(number: int) -> str:
    """A word of syllables, another for each number."""
    syllables = []
    number += len(_CONSONANTS) * len(_VOWELS)  # two syllables at least
    while number:
        number, rest = divmod(number, len(_CONSONANTS) * len(_VOWELS))
        syllables.append(_CONSONANTS[rest // len(_VOWELS)] + _VOWELS[rest % len(_VOWELS)])
    return "".join(syllables)


def category_word(category: int, synonym: int = 0) -> str:
    """One of the names of a category."""
    return word(category * NUM_SYNONYMS + synonym)


def brand_word(brand: int) -> str:
    """The name of a brand; no category has it."""
    return word(1_000_000 + brand)


def price_word(is_cheap: bool) -> str:
    """How a text says which side of the price is meant."""
    return "cheap" if is_cheap else "premium"


@dataclass(frozen=True, slots=True)
class QueryWords:
    """Which words the query of each request of a day has; the entries of a request without one mean nothing."""

    synonym_R: np.ndarray
    is_misspelt_R: np.ndarray
    brand_R: np.ndarray
    """The brand that is named; -1: none."""
    has_price_R: np.ndarray


def query_words(config: SimulatedConfig, day: int, needs: Needs, need_R: np.ndarray) -> QueryWords:
    """The words of a day's queries; `need_R` as of the Schedule."""
    rng, count = random_stream(config.seed, Stream.QUERIES, day), len(need_R)
    draw_RX = rng.random((count, 3)) < (MISSPELT_RATE, BRAND_RATE, PRICE_RATE)
    brand_R = np.append(needs.brand_K, -1)[need_R]
    return QueryWords(
        synonym_R=rng.integers(0, NUM_SYNONYMS, count),
        is_misspelt_R=draw_RX[:, 0],
        brand_R=np.where(draw_RX[:, 1], brand_R, -1),
        has_price_R=draw_RX[:, 2] & (need_R >= 0),
    )


def query_texts(
    words: QueryWords, needs: Needs, query_R: np.ndarray, need_R: np.ndarray, num_categories: int
) -> pa.Array:
    """The text of each request's query; null where it has none.

    It names the category by one of its synonyms, sometimes misspelt. A need's query then may name brand and price; any
    other has a word of its own.
    """
    texts: list[str | None] = []
    for r, (query, need) in enumerate(zip(query_R.tolist(), need_R.tolist(), strict=True)):
        if query < 0:
            texts.append(None)
            continue
        name = category_word(query % num_categories, int(words.synonym_R[r]))
        parts = [name[0] + name[2] + name[1] + name[3:] if words.is_misspelt_R[r] else name]
        if need < 0:
            parts.append(str(query // num_categories))
        if words.brand_R[r] >= 0:
            parts.append(brand_word(int(words.brand_R[r])))
        if words.has_price_R[r]:
            parts.append(price_word(bool(needs.is_cheap_K[need])))
        texts.append(" ".join(parts))
    return pa.array(texts, pa.string())
