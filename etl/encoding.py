"""The event rows of the one shuffle: impressions with their encoded columns, slim clicks and orders, user profiles.

Items, queries and context values are joined by value before the shuffle (Spark broadcasts what is small). A user's
values ride in the shuffle as a row of their own, because the pass sees all rows of a user together.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from etl.events import KIND_IMPRESSION, KIND_PROFILE
from etl.user_pass import SORT_COLUMNS, PassPlan
from etl.vocabulary import Vocabularies, encode, hash_index, scale
from usr_ray.config import DAY_US, Config
from usr_ray.schema import PADDING_ID, UNKNOWN_ID, index_column, scaled_column

_SLIM = (*SORT_COLUMNS, "known_time", "impression_id")
"""What every event row has."""
_RAW = ("request_id", "query", "position")
_NO_TIME = dt.datetime(1, 1, 1)
"""Puts a user's profile before all events of the user."""


def profile_columns(config: Config, names: Sequence[str]) -> tuple[str, ...]:
    """Sample columns that come from the user's profile row."""
    features = config.features
    columns = [index_column(name) for name in features.user_categories]
    columns += [scaled_column(name) for name in features.user_numbers]
    if config.vocabulary.kind == "fit":
        columns.append(index_column("user_id"))
    return tuple(name for name in names if name in columns)


def own_columns(config: Config, names: Sequence[str]) -> tuple[str, ...]:
    """Sample columns that the impression's own event row carries."""
    others = set(profile_columns(config, names))
    carried = {"user_id", "item_id", "event_time", *_RAW}
    encoded = {n for n in names if n.endswith(("_index", "_scaled")) and n != index_column("scenario")}
    return tuple(name for name in names if name in (carried | encoded) - others)


def encoded_events(
    unique: DataFrame,
    users: DataFrame | None,
    items: DataFrame | None,
    known: Vocabularies,
    config: Config,
    plan: PassPlan,
) -> DataFrame:
    """Impressions, clicks, orders and profiles in one frame; columns that a kind lacks are null."""
    shown = F.col("kind") == KIND_IMPRESSION
    relevant = unique.filter(F.col("event_time") < F.timestamp_micros(F.lit(_last_relevant(plan))))
    frames = [
        _impressions(relevant.filter(shown), items, known, config, plan),
        relevant.filter(~shown).select(*_SLIM),
    ]
    profiles = _profiles(users, known, config)
    if profiles is not None:
        frames.append(profiles)
    result = frames[0]
    for frame in frames[1:]:
        result = result.unionByName(frame, allowMissingColumns=True)
    return result


def _last_relevant(plan: PassPlan) -> int:
    """Events from here on cannot touch a sample: later than every window of the last impression."""
    rules = plan.rules
    end = (max(plan.days) + 1) * DAY_US
    return end + max(rules.global_window, rules.click_window) + rules.order_window + rules.clock_skew + 1


def _impressions(
    shown: DataFrame, items: DataFrame | None, known: Vocabularies, config: Config, plan: PassPlan
) -> DataFrame:
    features = config.features
    is_sample = F.unix_date(F.to_date("event_time")).isin(list(plan.days))
    frame = encode(shown, ["query", *features.context_categories], known, config.vocabulary)
    for name in features.context_numbers:
        frame = frame.withColumn(scaled_column(name), scale(F.col(name)))
    profile = _keyed("item_id", items, features.item_categories, features.item_numbers, known, config)
    if profile is not None:
        frame = frame.join(profile, on="item_id", how="left")
    columns = {index_column("query"): F.col(index_column("query"))}
    columns |= _filled("item_id", features.item_categories, features.item_numbers)
    if config.vocabulary.kind == "hash":
        columns[index_column("item_id")] = hash_index(F.col("item_id"), config.vocabulary)
        columns[index_column("user_id")] = hash_index(F.col("user_id"), config.vocabulary)
    for name in features.context_categories:
        columns[index_column(name)] = F.col(index_column(name))
    for name in features.context_numbers:
        columns[scaled_column(name)] = F.col(scaled_column(name))
    return frame.select(
        *_SLIM,
        # Impressions that are context only need not carry their text through the shuffle.
        *(F.when(is_sample, F.col(name)).alias(name) for name in _RAW),
        *(column.alias(name) for name, column in columns.items()),
    )


def _filled(key: str, categories: Sequence[str], numbers: Sequence[str]) -> dict[str, Column]:
    columns = {index_column(key): F.coalesce(index_column(key), F.lit(UNKNOWN_ID).cast("bigint"))}
    columns |= {index_column(n): F.coalesce(index_column(n), F.lit(PADDING_ID).cast("bigint")) for n in categories}
    return columns | {scaled_column(n): F.coalesce(scaled_column(n), F.lit(0.0).cast("float")) for n in numbers}


def _profiles(users: DataFrame | None, known: Vocabularies, config: Config) -> DataFrame | None:
    features = config.features
    profile = _keyed("user_id", users, features.user_categories, features.user_numbers, known, config)
    if profile is None:
        return None
    columns = _filled("user_id", features.user_categories, features.user_numbers)
    if config.vocabulary.kind == "hash":
        del columns[index_column("user_id")]
    return profile.select(
        "user_id",
        F.lit(_NO_TIME).alias("event_time"),
        F.lit(_NO_TIME).alias("known_time"),
        F.lit(KIND_PROFILE).alias("kind"),
        F.lit("").alias("id"),
        F.lit("").alias("item_id"),
        F.lit(-1).alias("scenario"),
        *(column.alias(name) for name, column in columns.items()),
    )


def _keyed(
    key: str,
    table: DataFrame | None,
    categories: Sequence[str],
    numbers: Sequence[str],
    known: Vocabularies,
    config: Config,
) -> DataFrame | None:
    """One row per user or item: its id and its encoded features; None where there is neither."""
    profile = None
    if table is not None:
        encoded = encode(table, categories, known, config.vocabulary)
        profile = encoded.select(
            key,
            *(index_column(name) for name in categories),
            *(scale(F.col(name)).alias(scaled_column(name)) for name in numbers),
        )
    if config.vocabulary.kind == "hash":
        return profile
    ids = known.entries.filter(F.col("feature") == key).select(
        F.col("value").alias(key), F.col("id").alias(index_column(key))
    )
    return ids if profile is None else ids.join(profile, on=key, how="full_outer")
