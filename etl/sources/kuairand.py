"""KuaiRand (short videos, Kuaishou; Pure and 1K releases): recommendation impressions of 15 tabs -> logs.

Scenarios are groups of tabs. A click is is_click; a post-click action (`kuairand.order_column`) stands in for an order.

- An impression is one (user, video, time_ms, tab). Its id is made of them, so exact duplicates stay duplicates, and so
  do rows logged twice with another `hourmin`; the ETL drops and counts both.
- Impressions of one user and time_ms are one page: one request. Positions are not known.
- A click happens at time_ms, the only time a row has. The action is known when the video has been played, at time_ms +
  play_time_ms, but before the same user opens the video again in the scenario, so that it is that click's order. (In
  99.9 % of rows the user's next impression comes later still: no history sees an action that was not yet over.)
- An action without a click (autoplay tabs) stays an order row: no click earns it, the ETL rejects and counts it.
- Not read: the statistics tables and every column derived from outcomes, which would leak labels.

`user_sequences_until_*.parquet`, where it is there, keeps per user the last 50 impressions (`watch_seq`) and the last
50 long views (`long_watch_seq`), oldest first, and the time of the last one. All of it is earlier than the log, so it
is history for every impression of it.

- Long views become impressions with a click, and an order where a long view stands in for one: the events that
  histories are made of. Their order is the file's. Their times are not published: the newest stands at `last_time_ms`
  (or on the evening before the log), each earlier one an hour before the next. Nor is their tab: they go to the first
  scenario.
- Impressions without a long view are in no history. They count in `earlier_impressions` and in
  `earlier_long_view_log_odds` of the user and of the item: number columns of the users and items logs. With
  `kuairand.all_earlier_impressions` they are impressions as well, without a click, so that counters see them.

A video's `tags` are all of them, its `tag` the first.

Shape letters: U users, N sequence entries.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from etl.sources.writer import (
    LogWriter,
    input_files,
    require_columns,
    require_scenarios,
    source_file,
    text_blocks,
    text_column,
)
from usr_ray.config import DAY_US, Config, UserError

DEFAULT_TAB_GROUPS = {"main": (1,), "tab_0": (0,), "tab_4": (4,), "rest": ()}
"""Tab 1 holds three quarters of the rows; tabs 0 and 4 are the next in size and the far ends in click rate (8 % and
61 %); the others (2, 6 and nine small ones) are too small alone. What the tabs are is not published."""

LOG_COLUMNS = ("user_id", "video_id", "time_ms", "is_click", "play_time_ms", "tab")
USER_CATEGORIES = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{n}" for n in range(18)),
)
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
ITEM_CATEGORIES = ("author_id", "video_type", "upload_type", "music_id", "music_type", "tag")

SEQUENCE_COLUMNS = ("user_id", "history_len", "last_time_ms", "watch_seq", "long_watch_seq")
_LIST = pa.list_(pa.int64())
_SEQUENCES = pa.schema(
    [*((name, pa.int64()) for name in SEQUENCE_COLUMNS[:3]), *((name, _LIST) for name in SEQUENCE_COLUMNS[3:])]
)
STEP_US = 3_600_000_000
PRIOR_IMPRESSIONS = 10.0
"""Impressions at the mean rate that every user and item starts with: an unseen one has the mean's log-odds."""


def write_kuairand(input_dir: Path, writer: LogWriter, config: Config) -> None:
    """Append impressions, clicks and orders of each tab group, users and items.

    Reads rec_*.parquet or log_*.csv, user_features_*.csv, video_features_basic_*.csv, user_sequences_until_*.parquet.
    """
    groups = config.kuairand.tab_groups or DEFAULT_TAB_GROUPS
    require_scenarios(config, list(groups), source="kuairand")
    logs = input_files(input_dir, ("rec_*.parquet", "log_*.csv"), what="impression log")
    users = input_files(input_dir, ("user_features*.csv",), what="user table")
    videos = input_files(input_dir, ("video_features_basic*.csv",), what="video table")
    earlier = EarlierSequences.read(sorted(input_dir.glob("user_sequences_until_*.parquet")))
    for path in users:
        table = _user_rows(path)
        writer.append("users", with_columns(table, earlier.user_numbers(table["user_id"])))
    for path in videos:
        table = _item_rows(path)
        writer.append("items", with_columns(table, earlier.item_numbers(table["item_id"])))
    action = config.kuairand.order_column
    table = pa.concat_tables([_read_log(path, (*LOG_COLUMNS, action)) for path in logs])
    print(f"{table.num_rows:,} impressions read from {len(logs)} file(s)", file=sys.stderr, flush=True)
    rows = {name: table[name].to_numpy() for name in table.column_names}
    if table.num_rows:
        first_us = int(rows["time_ms"].min()) * 1000
        num_earlier = earlier.write_events(
            writer, config.scenarios[0], before_us=first_us, is_order=action == "long_view"
        )
        print(f"{num_earlier:,} long views read from before the log", file=sys.stderr, flush=True)
        if config.kuairand.all_earlier_impressions:
            num_others = earlier.write_other_impressions(writer, config.scenarios[0], before_us=first_us)
            print(f"{num_others:,} other impressions read from before the log", file=sys.stderr, flush=True)
    scenario = np.full(table.num_rows, len(config.scenarios) - 1)
    for k, name in enumerate(config.scenarios):
        scenario[np.isin(rows["tab"], groups[name])] = k
    order_us = _action_times_us(rows, scenario)
    for k, name in enumerate(config.scenarios):
        _write_scenario(writer, name, {c: v[scenario == k] for c, v in rows.items()}, action, order_us[scenario == k])


def _read_log(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """The named columns as int64; UserError when one is missing or has nulls, or the file cannot be read."""
    with source_file(path):
        table = pacsv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)
    require_columns(path, table.column_names, columns)
    table = table.select(list(dict.fromkeys(columns)))
    for name in table.column_names:
        if table[name].null_count:
            raise UserError(f"{path}: column {name} has {table[name].null_count} empty values; every row needs one")
    with source_file(path):
        return table.cast(pa.schema([(name, pa.int64()) for name in table.column_names]))


def _action_times_us(rows: dict[str, np.ndarray], scenario: np.ndarray) -> np.ndarray:
    """When the post-click action is known: after the playing time, but before the pair's next click in the scenario."""
    time_us = rows["time_ms"] * 1000
    known_us = time_us + np.maximum(rows["play_time_ms"], 0) * 1000
    clicked = np.flatnonzero(rows["is_click"] > 0)
    keys = [time_us[clicked], scenario[clicked], rows["video_id"][clicked], rows["user_id"][clicked]]
    order = np.lexsort(keys)
    pair_changes = np.any([np.diff(key[order]) != 0 for key in keys[1:]], axis=0)
    # Rows logged twice share a time: the limit is the next later click, found from the right.
    limit_us = np.full(len(order), np.iinfo(np.int64).max)
    sorted_us = time_us[clicked][order]
    is_later = ~pair_changes & (np.diff(sorted_us) > 0)
    is_twin = ~pair_changes & (np.diff(sorted_us) == 0)
    limit_us[:-1][is_later] = sorted_us[1:][is_later] - 1
    for place in np.flatnonzero(is_twin)[::-1]:
        limit_us[place] = limit_us[place + 1]
    known_us[clicked[order]] = np.minimum(known_us[clicked[order]], limit_us)
    return known_us


def _write_scenario(
    writer: LogWriter, scenario: str, rows: dict[str, np.ndarray], action: str, order_us: np.ndarray
) -> None:
    user, video, time_ms = rows["user_id"], rows["video_id"], rows["time_ms"]
    impression_id = text_column(user, "-", video, "-", time_ms, "-", rows["tab"])
    event = {"user_id": text_column(user), "item_id": text_column(video), "event_time": pa.array(time_ms * 1000)}
    writer.append_events(
        scenario,
        event,
        impression_id=impression_id,
        request_id=text_column(user, "-", time_ms),
        clicked=pa.array(rows["is_click"] > 0),
        tab=text_column(rows["tab"]),
    )
    orders = pa.table({"order_id": impression_id, **event, "event_time": pa.array(order_us)})
    writer.append(f"{scenario}_orders", orders.filter(pa.array(rows[action] > 0)))


def _read_features(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """The named columns as text, empty fields null."""
    return pa.concat_tables(text_blocks(path, columns))


def _user_rows(path: Path) -> pa.Table:
    table = _read_features(path, ("user_id", *USER_CATEGORIES, *USER_NUMBERS))
    for name in USER_NUMBERS:
        with source_file(path):
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.float64()))
    return table


def _item_rows(path: Path) -> pa.Table:
    table = _read_features(path, ("video_id", *ITEM_CATEGORIES, "video_duration"))
    tags = pc.split_pattern(pc.fill_null(table["tag"], ""), ",")
    first_tag = pc.list_element(tags, 0)
    columns = {"item_id": table["video_id"], **{name: table[name] for name in ITEM_CATEGORIES}}
    columns["tag"] = pc.if_else(pc.equal(first_tag, ""), None, first_tag)
    columns["tags"] = pc.if_else(pc.equal(first_tag, ""), None, tags)
    with source_file(path):
        columns["video_duration_s"] = pc.divide(table["video_duration"].cast(pa.float64()), 1000.0)
    return pa.table(columns)


class EarlierSequences:
    """The sequences of all users; a release without the file has none."""

    @classmethod
    def read(cls, paths: Sequence[Path]) -> EarlierSequences:
        """Read the files, each with other users; UserError when a column is missing."""
        tables = []
        for path in paths:
            with source_file(path):
                table = pq.read_table(path)
            require_columns(path, table.column_names, SEQUENCE_COLUMNS)
            tables.append(table.select(SEQUENCE_COLUMNS))
        return cls(pa.concat_tables(tables) if tables else _SEQUENCES.empty_table())

    def __init__(self, table: pa.Table) -> None:
        self.user_U = table["user_id"].cast(pa.int64()).to_numpy()
        self.num_impressions_U = table["history_len"].cast(pa.int64()).to_numpy()
        self.last_us_U = table["last_time_ms"].cast(pa.int64()).to_numpy() * 1000
        self._shown = _Lists(table["watch_seq"])
        self._watched = _Lists(table["long_watch_seq"])
        self._is_long_N = _long_views(self._shown, self._watched)

    def write_events(self, writer: LogWriter, scenario: str, *, before_us: int, is_order: bool) -> int:
        """Append an impression, a click and, with `is_order`, an order per long view; returns their number.

        All stand before the UTC day of `before_us`, the log's first event: their rows are no samples, only history,
        and must not fall on a date that is built.
        """
        owner_N, from_end_N = self._watched.owner_N, self._watched.from_end_N
        user_N, video_N = self.user_U[owner_N], self._watched.values_N
        newest_us = before_us // DAY_US * DAY_US - STEP_US
        time_us_N = np.minimum(self.last_us_U, newest_us)[owner_N] - from_end_N * STEP_US
        ids = text_column(user_N, "-", video_N, "-earlier-", from_end_N)
        event = {"user_id": text_column(user_N), "item_id": text_column(video_N), "event_time": pa.array(time_us_N)}
        no_tab = pa.nulls(len(ids), pa.string())
        writer.append_events(scenario, event, impression_id=ids, request_id=ids, tab=no_tab)
        if is_order:
            writer.append(f"{scenario}_orders", {"order_id": ids, **event})
        return len(ids)

    def write_other_impressions(self, writer: LogWriter, scenario: str, *, before_us: int) -> int:
        """Append the earlier impressions without a long view, at times as `write_events` has them; their number."""
        others = np.flatnonzero(~self._is_long_N)
        owner_N, from_end_N = self._shown.owner_N[others], self._shown.from_end_N[others]
        user_N, video_N = self.user_U[owner_N], self._shown.values_N[others]
        newest_us = before_us // DAY_US * DAY_US - STEP_US
        time_us_N = np.minimum(self.last_us_U, newest_us)[owner_N] - from_end_N * STEP_US
        ids = text_column(user_N, "-", video_N, "-shown-", from_end_N)
        event = {"user_id": text_column(user_N), "item_id": text_column(video_N), "event_time": pa.array(time_us_N)}
        unclicked, no_tab = pa.array(np.zeros(len(ids), dtype=bool)), pa.nulls(len(ids), pa.string())
        writer.append_events(scenario, event, impression_id=ids, request_id=ids, clicked=unclicked, tab=no_tab)
        return len(ids)

    def user_numbers(self, user_ids: pa.ChunkedArray) -> dict[str, pa.Array]:
        """Number columns for these users (text ids), in their order."""
        owner_N = self._shown.owner_N
        log_odds_U = self._log_odds(owner_N, len(self.user_U))
        return _look_up(
            "user", user_ids, self.user_U, self.num_impressions_U, log_odds_U, self._log_odds(owner_N[:0], 1)[0]
        )

    def item_numbers(self, item_ids: pa.ChunkedArray) -> dict[str, pa.Array]:
        """Number columns for these items (text ids), in their order; counted over the last 50 impressions of users."""
        items, place_N = np.unique(self._shown.values_N, return_inverse=True)
        counts = np.bincount(place_N, minlength=len(items))
        log_odds = self._log_odds(place_N, len(items))
        return _look_up("item", item_ids, items, counts, log_odds, self._log_odds(place_N[:0], 1)[0])

    def _log_odds(self, place_N: NDArray[np.int64], size: int) -> NDArray[np.float64]:
        # One long view and one other are added to the mean, which is then never 0 or 1.
        mean = (float(self._is_long_N.sum()) + 1) / (len(self._is_long_N) + 2)
        shown = np.bincount(place_N, minlength=size) + PRIOR_IMPRESSIONS
        is_long_N = self._is_long_N[: len(place_N)]
        watched = np.bincount(place_N, weights=is_long_N, minlength=size) + PRIOR_IMPRESSIONS * mean
        return np.asarray(np.log(watched / (shown - watched)))


class _Lists:
    """A column of lists of item ids, flattened."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        self.values_N = lists.flatten().cast(pa.int64()).to_numpy()
        self.sizes_U = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        self.ends_U = np.cumsum(self.sizes_U)
        self.owner_N = np.repeat(np.arange(len(self.sizes_U)), self.sizes_U)
        self.from_end_N = self.ends_U[self.owner_N] - 1 - np.arange(len(self.values_N))


def _long_views(shown: _Lists, watched: _Lists) -> NDArray[np.bool_]:
    """Whether each impression is the long view: both lists are read together from their newest ends."""
    is_long_N = np.zeros(len(shown.values_N), dtype=bool)
    for user, size in enumerate(shown.sizes_U):
        place = watched.ends_U[user] - 1
        first = watched.ends_U[user] - watched.sizes_U[user]
        for row in range(shown.ends_U[user] - 1, shown.ends_U[user] - 1 - size, -1):
            if place >= first and shown.values_N[row] == watched.values_N[place]:
                is_long_N[row] = True
                place -= 1
    return is_long_N


def _look_up(
    owner: str, ids: pa.ChunkedArray, known: NDArray, counts: NDArray, log_odds: NDArray, default: float
) -> dict[str, pa.Array]:
    place = pc.index_in(ids, pa.array(known).cast(pa.string()))
    found_log_odds = pa.array(log_odds).take(place.combine_chunks())
    found_counts = pa.array(counts.astype(np.float64)).take(place.combine_chunks())
    return {
        f"{owner}_earlier_impressions": pc.fill_null(found_counts, 0.0),
        f"{owner}_earlier_long_view_log_odds": pc.fill_null(found_log_odds, float(default)),
    }


def with_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """The table with these columns behind its own."""
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table
