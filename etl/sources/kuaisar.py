"""KuaiSAR (short videos, Kuaishou): one user base in search and recommendation -> logs of two scenarios.

- rec_inter.csv: one row is one shown video; the user's rows of one timestamp (ms) are a request. A click is click = 1;
  a later action (`kuaisar.order_column`: like, follow or forward) stands in for an order, at the row's own time.
- src_inter.csv: one row is one shown item of a search session, a request; a click is click_cnt > 0. The rows of a
  session are not contiguous, which does not matter here. keyword "[20, 34, 3]" becomes the query "20 34 3", whose words
  are its terms; an item's caption is a list of word ids of the same kind, and its elements are the item's terms.
- Search rows know no later action, so there is no `search_orders` log, and `labels.no_order_scenarios = ["search"]`
  takes the CTCVR of search out of the loss and of the metrics; the job says so where the configuration does not.
- Ids are made of the row's content, so exact duplicates stay duplicates. Rows without user, item or time stay rows
  with nulls: the ETL rejects and counts them.
- Positions are not known. social_network.csv is not read.

Files are read by header name and streamed, so memory does not grow with their size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from etl.sources.writer import LogWriter, header_of, input_files, require_scenarios, text_blocks, text_column
from usr_ray.config import Config

SEARCH, RECOMMENDATION = "search", "recommendation"
REC_COLUMNS = ("user_id", "item_id", "timestamp", "click")
SRC_COLUMNS = ("user_id", "item_id", "keyword", "click_cnt", "search_session_id", "search_session_timestamp")
USER_CATEGORIES = ("onehot_feat1", "onehot_feat2", "search_active_level")
REC_ACTIVE = ("rec_active_level", "reco_active_level")
"""One column under the names of two releases."""
ITEM_CATEGORIES = (
    "author_id",
    "item_type",
    "upload_type",
    "first_level_category_id",
    "second_level_category_id",
    "third_level_category_id",
    "fourth_level_category_id",
)
CAPTION = "caption"
FILES = {
    "rec_inter": "recommendation log",
    "src_inter": "search log",
    "user_features": "user table",
    "item_features": "item table",
}
NULLS = ("", "NA", "nan", "NaN", "null")


def write_kuaisar(input_dir: Path, writer: LogWriter, config: Config) -> None:
    """Append both scenarios' impressions and clicks, recommendation_orders, users and items.

    Reads rec_inter.csv, src_inter.csv, user_features.csv, item_features.csv.
    """
    require_scenarios(config, (SEARCH, RECOMMENDATION), source="kuaisar")
    action = config.kuaisar.order_column
    files = {name: input_files(input_dir, (f"{name}*.csv",), what=what) for name, what in FILES.items()}
    for scenario in (SEARCH, RECOMMENDATION):
        writer.declare(f"{scenario}_impressions")
        writer.declare(f"{scenario}_clicks")
    writer.declare(f"{RECOMMENDATION}_orders")
    for path in files["rec_inter"]:
        for rows in _blocks(path, (*REC_COLUMNS, action)):
            _append_recommendation(writer, rows, action)
    for path in files["src_inter"]:
        for rows in _blocks(path, SRC_COLUMNS):
            _append_search(writer, rows)
    for path in files["user_features"]:
        active = next((name for name in REC_ACTIVE if name in header_of(path)), REC_ACTIVE[0])
        for rows in _blocks(path, ("user_id", *USER_CATEGORIES, active)):
            writer.append("users", rows.rename_columns(["user_id", *USER_CATEGORIES, REC_ACTIVE[0]]))
    for path in files["item_features"]:
        for rows in _blocks(path, ("item_id", *ITEM_CATEGORIES, CAPTION)):
            writer.append("items", _without_padding(rows))
    if SEARCH not in config.labels.no_order_scenarios:
        print(
            "search has no later action in KuaiSAR, so there is no log search_orders: set "
            'labels.no_order_scenarios = ["search"], else its is_order is 0 on every row',
            file=sys.stderr,
        )


def _number(text: pa.ChunkedArray) -> pa.Array:
    """Whole numbers of text such as "3", "3.0" or "1.684742e+12"; null for any other: the ETL rejects the row."""
    is_number = pc.match_substring_regex(text, r"^-?[0-9]{1,15}(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?$")
    numbers = pc.round(pc.cast(pc.if_else(is_number, text, None), pa.float64()))
    is_exact = pc.less(pc.abs(numbers), 2.0**53)
    return pc.cast(pc.if_else(is_exact, numbers, None), pa.int64()).combine_chunks()


def _is_positive(text: pa.ChunkedArray) -> pa.Array:
    return pc.fill_null(pc.greater(_number(text), 0), False)


def _text(rows: pa.Table, name: str) -> pa.Array:
    return rows[name].combine_chunks()


def _blocks(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    return text_blocks(path, columns, nulls=NULLS, newlines_in_values=True)


def _append_recommendation(writer: LogWriter, rows: pa.Table, action: str) -> None:
    user, item, time_ms = _text(rows, "user_id"), _text(rows, "item_id"), _number(rows["timestamp"])
    impression_id = text_column("r-", user, "-", item, "-", time_ms)
    event = {"user_id": user, "item_id": item, "event_time": pc.multiply(time_ms, 1000)}
    writer.append_events(
        RECOMMENDATION,
        event,
        impression_id=impression_id,
        request_id=text_column(user, "-", time_ms),
        clicked=_is_positive(rows["click"]),
    )
    orders = pa.table({"order_id": impression_id, **event})
    writer.append(f"{RECOMMENDATION}_orders", orders.filter(_is_positive(rows[action])))


def _append_search(writer: LogWriter, rows: pa.Table) -> None:
    user, item, session = _text(rows, "user_id"), _text(rows, "item_id"), _text(rows, "search_session_id")
    words = pc.replace_substring_regex(_text(rows, "keyword"), r"[\[\],\s]+", " ")
    time_ms = _number(rows["search_session_timestamp"])
    writer.append_events(
        SEARCH,
        {"user_id": user, "item_id": item, "event_time": pc.multiply(time_ms, 1000)},
        impression_id=text_column("s-", user, "-", session, "-", item),
        request_id=text_column(user, "-", session),
        query=pc.utf8_trim_whitespace(words),
        clicked=_is_positive(rows["click_cnt"]),
    )


def _without_padding(rows: pa.Table) -> pa.Table:
    """Null instead of the author 0, which stands for no author."""
    author = rows["author_id"]
    known = pc.if_else(pc.equal(author, "0"), None, author)
    return rows.set_column(rows.schema.get_field_index("author_id"), "author_id", known)
