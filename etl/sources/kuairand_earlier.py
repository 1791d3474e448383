"""KuaiRand's `user_sequences_until_*.parquet`: what each user was shown and watched before the log begins.

The file keeps, per user, the last 50 impressions (`watch_seq`) and the last 50 long views (`long_watch_seq`), oldest
first, and the time of the last one. All of it is earlier than the log, so it is history for every impression of it.

- Long views become impressions with a click, and an order where a long view stands in for one: the events that
  histories are made of. Their order is the file's. Their times are not published: the newest stands at `last_time_ms`
  (or on the evening before the log), each earlier one an hour before the next. Nor is their tab: they go to the first
  scenario.
- Impressions without a long view are in no history. They count in `earlier_impressions` and in
  `earlier_long_view_log_odds` of the user and of the item: number columns of the users and items logs.

Shape letters: U users, N sequence entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from etl.sources.writer import LogWriter, constant_column, require_columns, text_column
from usr_ray.config import DAY_US

COLUMNS = ("user_id", "history_len", "last_time_ms", "watch_seq", "long_watch_seq")
_LIST = pa.list_(pa.int64())
_SCHEMA = pa.schema([*((name, pa.int64()) for name in COLUMNS[:3]), *((name, _LIST) for name in COLUMNS[3:])])
STEP_US = 3_600_000_000
PRIOR_IMPRESSIONS = 10.0
"""Impressions at the mean rate that every user and item starts with: an unseen one has the mean's log-odds."""


class EarlierSequences:
    """The sequences of all users; a release without the file has none."""

    @classmethod
    def read(cls, paths: Sequence[Path]) -> EarlierSequences:
        """Read the files, each with other users; UserError when a column is missing."""
        tables = []
        for path in paths:
            table = pq.read_table(path)
            require_columns(path, table.column_names, COLUMNS)
            tables.append(table.select(COLUMNS))
        return cls(pa.concat_tables(tables) if tables else _SCHEMA.empty_table())

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
        num_rows = len(user_N)
        shown = {
            "impression_id": ids,
            "request_id": ids,
            **event,
            "position": pa.nulls(num_rows, pa.int32()),
            "query": constant_column(None, num_rows),
            "tab": constant_column(None, num_rows),
        }
        writer.append(f"{scenario}_impressions", pa.table(shown))
        writer.append(f"{scenario}_clicks", pa.table({"click_id": ids, "impression_id": ids, **event}))
        if is_order:
            writer.append(f"{scenario}_orders", pa.table({"order_id": ids, **event}))
        return num_rows

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
    """For each impression whether it is the long view: both lists are read together from their newest ends."""
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
