"""JDsearch (product search, JD.com): one row is one user's search with candidates and history -> logs of two scenarios.

- The user is the row: `user_id` is its number, from 0 (over all files). There is no absolute time: the row's search
  happens at base_time's hour of one of `jdsearch.num_days` days from `jdsearch.base_time`, chosen by a hash, so that
  dates can split training from held-out rows.
- Candidates become search impressions, shuffled by a hash: positives come first in the file, so their order leaks the
  label. Position is null. Label >= 1 is a click, 3 an order, both at the search's time.
- A history event becomes an impression that was clicked (and ordered, for ORD) at its own time: history is made of
  attributed clicks. With a query it is a search event, with "-1" a recommendation event. The gaps between events are
  kept, and the newest event stands its gap before base_time, not before the row's day: so these impressions, all
  clicked, lie on dates of their own, before any that is trained on or held out; ages are up to num_days - 1 days long.
- Terms of a query, joined by byte 0x18 in the file, are joined by a space; those of a product's name and brand_name
  stay as they are (features.item_terms). A product that is not in the product table has no features.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from etl.sources.writer import (
    LogWriter,
    input_files,
    log_schema,
    require_columns,
    require_scenarios,
    text_blocks,
    text_lines,
)
from usr_ray.config import DAY_US, Config, JdSearchConfig, UserError

SEARCH, RECOMMENDATION = "search", "recommendation"
COLUMNS = (
    "query",
    "candidate_wid_list",
    "candidate_label_list",
    "history_qry_list",
    "history_wid_list",
    "history_type_list",
    "history_time_list",
)
PRODUCT_COLUMNS = ("brand_id", "cate_id_1", "cate_id_2", "cate_id_3", "cate_id_4", "shop_id", "name", "brand_name")
TERM_SEPARATOR = "\x18"
NO_QUERY = "-1"
ORDER_TYPE = "ORD"
ORDER_LABEL = 3
ROWS_PER_CHUNK = 2_000
PROGRESS_EVERY = 20_000
SECOND_US = 1_000_000


def write_jdsearch(input_dir: Path, writer: LogWriter, config: Config) -> None:
    """Append both scenarios' impressions, clicks and orders, and items; there is no user table.

    Reads user_behavior_data*.txt, product_meta_data*.txt.
    """
    require_scenarios(config, (SEARCH, RECOMMENDATION), source="jdsearch")
    behaviour = input_files(input_dir, ("user_behavior_data*.txt",), what="behaviour log")
    products = input_files(input_dir, ("product_meta_data*.txt",), what="product table")
    chunk = _Chunk(writer)
    number = 0
    for path in behaviour:
        lines = text_lines(path)
        header = next(lines, "").rstrip("\r\n").split("\t")
        require_columns(path, header, COLUMNS)
        for line_number, line in enumerate(lines, start=2):
            if not line.strip():
                continue
            fields = dict(zip(header, line.rstrip("\r\n").split("\t"), strict=False))
            _append_row(chunk, fields, number, config.jdsearch, where=f"{path}: line {line_number}")
            number += 1
            if number % ROWS_PER_CHUNK == 0:
                chunk.flush()
            if number % PROGRESS_EVERY == 0:
                print(f"{number:,} users", file=sys.stderr, flush=True)
    chunk.flush()
    for path in products:
        _append_products(writer, path)


class _Chunk:
    """Rows of the logs, collected and written some thousand users at a time."""

    def __init__(self, writer: LogWriter) -> None:
        self.writer = writer
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for scenario in (SEARCH, RECOMMENDATION):
            for kind in ("impressions", "clicks", "orders"):
                writer.declare(f"{scenario}_{kind}")

    def add(self, scenario: str, event: dict[str, Any], *, is_click: bool, is_order: bool) -> None:
        """One impression, and its click and order at the same time."""
        self.rows[f"{scenario}_impressions"].append(event)
        if is_click:
            self.rows[f"{scenario}_clicks"].append(event | {"click_id": event["impression_id"]})
        if is_order:
            self.rows[f"{scenario}_orders"].append(event | {"order_id": event["impression_id"]})

    def flush(self) -> None:
        """Append what there is."""
        for log, rows in self.rows.items():
            names = log_schema(log).names
            self.writer.append(log, {name: pa.array([row[name] for row in rows]) for name in names})
        self.rows.clear()


def _append_row(chunk: _Chunk, fields: dict[str, str], number: int, settings: JdSearchConfig, *, where: str) -> None:
    items, labels = _list(fields, "candidate_wid_list"), _list(fields, "candidate_label_list")
    queries, seen = _list(fields, "history_qry_list"), _list(fields, "history_wid_list")
    kinds, gaps = _list(fields, "history_type_list"), _list(fields, "history_time_list")
    if (
        len(items) != len(labels)
        or not len(queries) == len(seen) == len(kinds)
        or (seen and len(gaps) != len(seen) + 1)
    ):
        raise UserError(
            f"{where}: lists of different lengths (candidates {len(items)}, labels {len(labels)}, history queries "
            f"{len(queries)}, items {len(seen)}, types {len(kinds)}, gaps {len(gaps)}); a candidate needs a label, an "
            "event a query, an item, a type and a gap, and the list of gaps one more"
        )
    try:
        label_numbers, gap_seconds = [float(label) for label in labels], [float(gap) for gap in gaps]
    except ValueError as error:
        raise UserError(f"{where}: labels and gaps must be numbers ({error})") from error
    day = _hash(settings.seed, number) % settings.num_days
    search = {
        "user_id": str(number),
        "request_id": str(number),
        "event_time": settings.base_time_us + day * DAY_US,
        "position": None,
        "query": fields["query"].replace(TERM_SEPARATOR, " "),
    }
    shuffled = sorted(zip(items, label_numbers, strict=True), key=lambda c: _hash(settings.seed, number, c[0]))
    for item, label in shuffled:
        event = search | {"impression_id": f"{number}-{item}", "item_id": item}
        chunk.add(SEARCH, event, is_click=label >= 1, is_order=label == ORDER_LABEL)
    time_us = settings.base_time_us - max(round(gap_seconds[-1] * SECOND_US), SECOND_US) if seen else 0
    for place in reversed(range(len(seen))):
        has_query = queries[place] != NO_QUERY
        event = {
            "impression_id": f"{number}-h{place}",
            "request_id": f"{number}-h{place}",
            "user_id": str(number),
            "item_id": seen[place],
            "event_time": time_us,
            "position": None,
            "query": queries[place].replace(TERM_SEPARATOR, " ") if has_query else None,
        }
        scenario = SEARCH if has_query else RECOMMENDATION
        chunk.add(scenario, event, is_click=True, is_order=kinds[place] == ORDER_TYPE)
        time_us -= round(gap_seconds[place] * SECOND_US)


def _list(fields: dict[str, str], name: str) -> list[str]:
    text = fields.get(name, "")
    return text.split("_") if text else []


def _hash(*parts: int | str) -> int:
    """64 bits that are the same on every machine and in every run."""
    text = "-".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _append_products(writer: LogWriter, path: Path) -> None:
    for block in text_blocks(path, ["wid", *PRODUCT_COLUMNS], delimiter="\t", quote_char=False):
        writer.append("items", block.rename_columns(["item_id", *PRODUCT_COLUMNS]))
