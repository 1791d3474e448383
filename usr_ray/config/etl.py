"""Configuration of the Spark side: labels, histories, vocabularies, features and the sources. Standard library only."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from usr_ray.config.fields import (
    COUNT,
    DAY_US,
    SEED,
    choice,
    duration,
    number,
    parse_date,
    parse_duration_us,
    parse_instant_us,
    require,
)
from usr_ray.schema import (
    BUCKETS,
    FIRST_ID,
    ITEM_TERMS,
    LOG1P,
    QUERY_TERMS,
    SCALES,
    TERM,
    VECTOR_TABLES,
    ListFeature,
    VectorFeature,
    cold_column,
    index_column,
    list_column,
)

_WINDOW = ("0 s", "366 days")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsConfig:
    """Attribution windows and the meaning of the global labels (docs/tables.md, labels)."""

    click_window: str = duration("1 hour", *_WINDOW)
    """W_c: a click counts this long after its impression, both ends included."""
    order_window: str = duration("24 hours", *_WINDOW)
    """W_o: an order counts this long after its click."""
    global_window: str = duration("", *_WINDOW)
    """W_g >= W_c; empty: the click window."""
    global_span: str = choice("window", "day")
    """'window': [t, t + W_g]; 'day': the impression's UTC day."""
    clock_skew: str = duration("0 s", *_WINDOW)
    """How far before its impression a click (or before its click an order) may be stamped."""
    order_without_click: str = choice("reject", "credit_impression")
    """'reject', or 'credit_impression'."""
    no_order_scenarios: tuple[str, ...] = ()
    """Scenarios whose orders no log records: unknown, which is not the same as none. They have no CTCVR task."""

    def __post_init__(self) -> None:
        require(
            self.global_window_us >= self.click_window_us,
            f"labels.global_window ({self.global_window}) must not be shorter than "
            f"labels.click_window ({self.click_window})",
        )

    @property
    def click_window_us(self) -> int:
        """W_c in microseconds."""
        return parse_duration_us(self.click_window, where="labels.click_window")

    @property
    def order_window_us(self) -> int:
        """W_o in microseconds."""
        return parse_duration_us(self.order_window, where="labels.order_window")

    @property
    def global_window_us(self) -> int:
        """W_g in microseconds."""
        return parse_duration_us(self.global_window or self.click_window, where="labels.global_window")

    @property
    def clock_skew_us(self) -> int:
        """Tolerated clock skew in microseconds."""
        return parse_duration_us(self.clock_skew, where="labels.clock_skew")


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoriesConfig:
    """What the user had done before each impression (docs/tables.md, samples)."""

    length: int = number(50, "[1, 10000]")
    """Newest events kept per scenario."""


REJECT_REASONS = (
    "null_impression_id",
    "null_click_id",
    "null_order_id",
    "null_user_id",
    "null_item_id",
    "null_event_time",
    "unparsable_event_time",
    "unparsable_ingest_time",
    "unparsable_position",
    "unparsable_number",
    "unknown_impression",
    "impression_of_other_scenario",
    "impression_of_other_item",
    "before_impression",
    "no_impression",
    "after_window",
    "no_click",
    "before_click",
    "malformed_line",
    "undecodable_text",
    "imprecise_value",
)
"""What a build may stop for (docs/tables.md, rejects)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsConfig:
    """Days of bots to leave out, and how many rows may be rejected (docs/tables.md, rejects)."""

    max_user_events_per_day: int = number(0, "[0, 1000000000]")
    """Log rows (impressions, clicks, order lines) of a user on a UTC day; a day with more is taken out. 0: off."""
    max_reject_share: float = number(0.05, "[0, 1]")
    """Share of a log's rows that may be rejected for one reason; with more the build stops."""
    max_reject_shares: Mapping[str, Mapping[str, float]] = number({}, "[0, 1]")
    """Log -> reason -> the share, where one reason of one log is known to be more common."""

    def reject_share(self, log: str, reason: str) -> float:
        """Share of a log's rows that may be rejected for this reason."""
        return self.max_reject_shares.get(log, {}).get(reason, self.max_reject_share)


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyConfig:
    """How raw ids become rows of an embedding table."""

    kind: str = choice("fit", "hash")
    """'fit': the vocabularies table; 'hash': a hash of the value into num_buckets, no table."""
    min_count: int = number(2, COUNT)
    """Impressions of a value in the training dates before it gets an id of its own."""
    admit_vectors: bool = True
    """Users and items that have a vector get an id, shown or not; False: by min_count alone, as all other values."""
    num_buckets: int = number(1_048_576, "[3, 2147483647]")
    """Rows of every table under kind = 'hash', padding and unknown included."""


_OWN_FEATURES = ("user_id", "item_id", "query", "scenario", "event_hour")
"""Features that every table has: their columns are called <name>_index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """Feature columns beyond user_id, item_id and query. Categories get a vocabulary, numbers are scaled."""

    user_categories: tuple[str, ...] = ()
    user_numbers: tuple[str, ...] = ()
    item_categories: tuple[str, ...] = ()
    item_numbers: tuple[str, ...] = ()
    context_categories: tuple[str, ...] = ()
    context_numbers: tuple[str, ...] = ()
    scale: Mapping[str, str] = field(default_factory=dict)
    """Number -> how its values become a column, of schema.SCALES; of one that is not named "log1p"."""
    scale_buckets: int = number(16, "[2, 1024]")
    """Quantile buckets of a number whose scale is "buckets"; equal ones are one."""
    user_tags: tuple[str, ...] = ()
    item_tags: tuple[str, ...] = ()
    query_tags: tuple[str, ...] = ()
    context_tags: tuple[str, ...] = ()
    """Columns with several values a row; those of the query and of the context are in the impressions logs."""
    max_tags: int = number(16, "[1, 1000]")
    """Tags of one column that a row keeps, the first ones."""
    query_terms: bool = False
    """The query as a bag of terms too (usr_ray/config/terms.py)."""
    item_terms: tuple[str, ...] = ()
    """Columns of items whose texts are one bag of terms, such as the title."""
    max_terms: int = number(32, "[1, 1000]")
    """Terms of a query, and of an item, that a row keeps, the first ones."""
    user_vectors: Mapping[str, int] = number({}, "[1, 8192]")
    """Column of users with a vector from elsewhere, such as a model of images -> how many numbers it has."""
    item_vectors: Mapping[str, int] = number({}, "[1, 8192]")
    """The same for items; events of histories carry their vectors too."""
    history_item_features: tuple[str, ...] = ("*",)
    """Item categories that each event of a history carries beside its item's id; "*": all of them."""
    crosses: tuple[tuple[str, ...], ...] = ()
    """Categories made of several, for model.wide: each names two or more of the ids, categories, `event_hour` and
    `scenario`. No column holds them; the model makes them of the encoded ids (usr_ray/model/wide.py)."""

    def __post_init__(self) -> None:
        kinds = (f.name for f in dataclasses.fields(self) if f.name.endswith(("_categories", "_numbers", "_tags")))
        columns = [kind for kind in kinds if kind != "max_tags"]
        names = [name for column in (*columns, "user_vectors", "item_vectors") for name in getattr(self, column)]
        if self.query_terms or self.item_terms:
            ours = [name for name in names if name.lower() in (TERM, QUERY_TERMS, ITEM_TERMS)]
            require(
                not ours, f"features: '{''.join(ours[:1])}' is taken by terms; map the column to another name in [logs]"
            )
        # Delta has no such columns, and the names are part of a table property that is set by a statement of SQL.
        # A dot would name a field of a structure; a colon marks the ETL's own columns beside the features.
        strange = [name for name in names if not name or re.search(r"[\s,;{}()=`'\"\\$.:\x00-\x1f\x7f]", name)]
        require(
            not strange, f"features: {strange[:1]!r} cannot name a column; map it to a plain name in [logs] columns"
        )
        ours = [name for name in names if name.lower() in _OWN_FEATURES]
        require(
            not ours,
            f"features: '{''.join(ours[:1])}' is a feature of every table already ({', '.join(_OWN_FEATURES)}); take "
            "it out, or map the column to another name in [logs] columns",
        )
        taken = [name(f"{owner}_id") for owner in VECTOR_TABLES for name in (index_column, cold_column)]
        ours = [name for name in (*self.user_vectors, *self.item_vectors) if name.lower() in taken]
        require(
            not ours,
            f"features: '{''.join(ours[:1])}' is a column of every table of vectors ({', '.join(taken)}); map it to "
            "another name in [logs] columns",
        )
        doubled = sorted({name for name in names if names.count(name) > 1})
        require(not doubled, f"features: {', '.join(doubled)} named more than once; rename the column in one log")
        alike = sorted(name for name in names if [other.lower() for other in names].count(name.lower()) > 1)
        require(
            not alike,
            f"features: {' and '.join(map(repr, alike[:2]))} differ in case only, and tables ignore case; map one to "
            "another name in [logs] columns",
        )
        strange = sorted(set(self.history_item_features) - {"*", *self.item_categories})
        require(
            not strange,
            f"features.history_item_features: {', '.join(strange)} is not in features.item_categories "
            f"({', '.join(self.item_categories) or 'none'}); name categories of items, or leave it out for all of them",
        )
        self._check_crosses()
        self._check_scale()

    def _check_scale(self) -> None:
        numbers = (*self.user_numbers, *self.item_numbers, *self.context_numbers)
        strays = sorted(set(self.scale) - set(numbers))
        require(
            not strays, f"features.scale.{''.join(strays[:1])}: is no number; there are: {', '.join(numbers) or 'none'}"
        )
        for name, kind in self.scale.items():
            require(
                kind in SCALES,
                f"features.scale.{name} must be {' or '.join(map(repr, SCALES))}, got {kind!r}",
            )

    def scale_of(self, name: str) -> str:
        """How the values of a number become its column."""
        return self.scale.get(name, LOG1P)

    def categories_of(self, owner: str) -> tuple[str, ...]:
        """Categories of 'user', 'item' or 'context'."""
        found: tuple[str, ...] = getattr(self, f"{owner}_categories")
        return found

    def numbers_of(self, owner: str, *scales: str) -> tuple[str, ...]:
        """Numbers of 'user', 'item' or 'context' whose scale is one of `scales`."""
        return tuple(name for name in getattr(self, f"{owner}_numbers") if self.scale_of(name) in scales)

    @property
    def bucketed(self) -> tuple[str, ...]:
        """Numbers in buckets, which are categories of the model."""
        return tuple(name for owner in ("user", "item", "context") for name in self.numbers_of(owner, BUCKETS))

    def _check_crosses(self) -> None:
        known = (*_OWN_FEATURES, *self.user_categories, *self.item_categories, *self.context_categories)
        known = (*known, *self.bucketed)
        for place, cross in enumerate(self.crosses):
            where = f"features.crosses[{place}]"
            strays = sorted(set(cross) - set(known))
            require(not strays, f"{where}: {', '.join(strays)} is no id or category; there can be: {', '.join(known)}")
            require(
                len(set(cross)) == len(cross) > 1, f"{where}: {list(cross)} must name two or more, each of them once"
            )
        alike = [sorted(cross) for cross in self.crosses if [set(c) for c in self.crosses].count(set(cross)) > 1]
        require(not alike, f"features.crosses: {alike[:1]} is named more than once; take one of them out")

    @property
    def lists(self) -> tuple[ListFeature, ...]:
        """Tags and terms as FeatureSpec has them, without a vocabulary yet."""

        def feature(name: str, owner: str, length: int, sources: tuple[str, ...], table: str) -> ListFeature:
            return ListFeature(
                name=name,
                column=list_column(name),
                table=table,
                num_embeddings=FIRST_ID,
                owner=owner,
                length=length,
                sources=sources,
            )

        found = [
            feature(name, owner, self.max_tags, (name,), name)
            for owner in ("user", "item", "query", "context")
            for name in getattr(self, f"{owner}_tags")
        ]
        if self.query_terms:
            found.append(feature(QUERY_TERMS, "query", self.max_terms, ("query",), TERM))
        if self.item_terms:
            found.append(feature(ITEM_TERMS, "item", self.max_terms, self.item_terms, TERM))
        return tuple(found)

    @property
    def vectors(self) -> tuple[VectorFeature, ...]:
        """Vectors as FeatureSpec has them, without a fitted scale yet."""
        return tuple(
            VectorFeature(name=name, owner=owner, length=length)
            for owner in VECTOR_TABLES
            for name, length in getattr(self, f"{owner}_vectors").items()
        )

    def row_meaning(self) -> dict[str, object]:
        """The keys that decide what a row means; those of tags and terms only where they are in use."""
        raw = dataclasses.asdict(self)
        del raw["history_item_features"]  # a table of its own (etl/features/by_id.py)
        del raw["crosses"]  # made of columns that are there
        scale = {name: kind for name, kind in raw.pop("scale").items() if kind != LOG1P}
        raw |= {"scale": scale} if scale else {}
        if not self.bucketed:
            del raw["scale_buckets"]
        for key in ("user_vectors", "item_vectors"):
            if not raw[key]:
                del raw[key]
        for kind in ("tags", "terms"):
            keys = [key for key in raw if key.endswith(f"_{kind}") and key != f"max_{kind}"]
            unused = [key for key in keys if not raw[key]]
            for key in (*unused, *([f"max_{kind}"] if unused == keys else [])):
                del raw[key]
        return raw

    @property
    def sides(self) -> tuple[str, ...]:
        """Names that `history_item_features` stands for, in the order of `item_categories`."""
        wanted = self.history_item_features
        return tuple(name for name in self.item_categories if "*" in wanted or name in wanted)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedConfig:
    """The simulated source: a world whose click and order probabilities are known (etl/sources/simulated.py)."""

    seed: int = number(2026, SEED)
    num_impressions: int = number(200_000, COUNT)
    num_days: int = number(8, "[1, 3660]")
    first_date: str = "2026-01-01"
    num_users: int = number(2_000, COUNT)
    num_items: int = number(1_000, "[32, 1000000000]")  # four slates
    num_queries: int = number(300, COUNT)
    num_categories: int = number(24, COUNT)
    similarity: float = number(0.5, "[0, 1]")
    """0: tastes in the scenarios are unrelated; 1: they are the same."""
    cross_exposure: float = number(0.3, "[0, 1]")
    """Share of impressions that show an item the user was shown minutes before in another scenario (at most about
    0.5: the others have no earlier request to repeat). Both share the pair's own interest, beyond taste."""
    global_noise: float = number(0.0, "[0, 1]")
    """Share of cross exposures with an interest of their own, so that a global label tells less of the row's click."""
    link_loss: float = number(0.0, "[0, 1]")
    """Share of cross exposures that are logged under their scenario's own id of the item, as where scenarios keep
    catalogues apart. Nothing then links the pair: the first row's global label loses the click."""
    duplicate_rate: float = number(0.01, "[0, 1]")
    """Share of log rows written twice, as real collectors do."""
    late_rate: float = number(0.01, "[0, 1]")
    """Share of clicks and orders outside their windows, so that they are rejected."""
    unnamed_click_rate: float = number(0.05, "[0, 1]")
    """Share of clicks that do not name their impression."""
    new_item_share: float = number(0.1, "[0, 1]")
    """Share of items that are launched on a random day, so that some are new on the held-out days (cold start)."""
    item_vector: int = number(0, "[0, 1024]")
    """Numbers of the column `item_vector` of items, as a model of pictures might give them: they tell the category in
    part (features.item_vectors). 0: there is no such column."""
    world: str = choice("static", "needs")
    """'static': no label depends on what the user did before, so that histories of another scenario tell nothing new.
    'needs': users also have needs that come and go (etl/sources/simulated_needs.py); the keys below are its own."""
    need_strength: float = number(3.0, "[0, 10]")
    """Log odds that a living need adds to the click of an item that fits it in every way; to the order a quarter."""
    need_carry: float = number(1.0, "[0, 1]")
    """Share of a need that shows outside the scenario of its birth; 0: there joining can tell nothing of it."""
    need_share: float = number(0.7, "[0, 0.8]")
    """Share of visits that are made for a need."""
    searcher_share: float = number(0.4, "[0, 1]")
    """Share of users who ever search; they are the busy ones. The others are in the scenarios without queries only."""

    def __post_init__(self) -> None:
        for key, least in (
            ("num_impressions", "num_days"),
            ("num_items", "num_categories"),
            ("num_queries", "num_categories"),
        ):
            require(
                getattr(self, key) >= getattr(self, least),
                f"simulated.{key} ({getattr(self, key)}) must not be below simulated.{least} ({getattr(self, least)})",
            )
        parse_date(self.first_date, where="simulated.first_date")


@dataclass(frozen=True, kw_only=True, slots=True)
class KuaiRandConfig:
    """KuaiRand's mapping onto our logs (etl/sources/kuairand.py)."""

    order_column: str = "long_view"
    """Post-click action that stands in for an order."""
    tab_groups: Mapping[str, tuple[int, ...]] = number({}, "[0, 1000000000]")
    """Scenario name -> tabs; every tab not named goes to the last scenario. Empty: the documented default groups."""
    all_earlier_impressions: bool = False
    """Impressions before the log that were no long view become rows of the logs too; only counters use them."""

    def __post_init__(self) -> None:
        tabs = [tab for group in self.tab_groups.values() for tab in group]
        doubled = sorted({tab for tab in tabs if tabs.count(tab) > 1})
        require(not doubled, f"kuairand.tab_groups: tab {', '.join(map(str, doubled))} is in more than one group")


@dataclass(frozen=True, kw_only=True, slots=True)
class KuaiSarConfig:
    """KuaiSAR's mapping onto our logs (etl/sources/kuaisar.py)."""

    order_column: str = choice("like", "follow", "forward")
    """Later action of a recommendation row that stands in for an order; search rows have none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JdSearchConfig:
    """JDsearch's mapping onto our logs (etl/sources/jdsearch.py)."""

    base_time: str = "2022-11-01T00:00:00Z"
    """First search; the histories end before it. The data has no absolute time."""
    num_days: int = number(8, "[1, 3660]")
    """Days the searches are spread over, by a hash of the row, so that dates can split them."""
    seed: int = number(0, SEED)
    """Seed of the days and of the shuffled candidates."""

    def __post_init__(self) -> None:
        parse_instant_us(self.base_time, where="jdsearch.base_time")
        require(
            self.base_time_us % DAY_US == 0,
            f"jdsearch.base_time must be midnight UTC, got {self.base_time!r}: no history may share its date",
        )

    @property
    def base_time_us(self) -> int:
        """Microseconds since 1970 of the first search."""
        return parse_instant_us(self.base_time, where="jdsearch.base_time")


@dataclass(frozen=True, kw_only=True, slots=True)
class KuaiSearchConfig:
    """KuaiSearch's mapping onto our logs (etl/sources/kuaisearch.py)."""

    base_time: str = "2025-01-01T00:00:00Z"
    """time_index 0 becomes this instant; one step becomes `step`. The unit of time_index is not documented."""
    step: str = duration("60 s", "1 us", "366 days")
    write_features: bool = False
    """Write users and items: for a copy whose ids are those of the sessions (in the published demo they are not)."""

    def __post_init__(self) -> None:
        parse_instant_us(self.base_time, where="kuaisearch.base_time")

    @property
    def base_time_us(self) -> int:
        """Microseconds since 1970 of time_index 0."""
        return parse_instant_us(self.base_time, where="kuaisearch.base_time")

    @property
    def step_us(self) -> int:
        """Microseconds of one step of time_index."""
        return parse_duration_us(self.step, where="kuaisearch.step")
