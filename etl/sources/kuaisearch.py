"""KuaiSearch (e-commerce search, Kuaishou): sessions with their full slates -> logs of one scenario, "search".

- A session is a request: every impressed item is an impression (position from 0, in display order), its id is
  "<session>-<position>". `kuaisearch.base_time` + time_index * `kuaisearch.step` is its time: the unit of time_index is
  not documented, only its order is, so ages and hours are only as good as `step`.
- Clicks have no time of their own: a quarter of a step after the session; purchases half a step after. So both fall
  before a user's next session, and a purchase is earned by the click of its own session when there is one.
- A purchase without a click stays an order row; a clicked item that is not in the slate stays a click without
  impression: the ETL rejects and counts both.
- An item that a slate shows twice is clicked where it stands first.
- users.jsonl and items.jsonl keep original ids while sessions are re-numbered (0 of 200 join in the demo), and a number
  that happens to be in both means two things. So they are written only with `kuaisearch.write_features = true`, for a
  copy whose ids are one numbering.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from etl.sources.writer import LogWriter, input_files, require_scenarios, text_column, text_lines
from usr_ray.config import Config, UserError

SCENARIO = "search"
IMPRESSIONS_PER_CHUNK = 200_000
PROGRESS_EVERY = 100_000
NEEDED = {
    "user_id": int,
    "session_id": int,
    "impressed_item_ids": list,
    "clicked_item_ids": list,
    "purchased_item_ids": list,
    "time_index": int,
    "query": str,
}
_NAMES = {int: "a whole number", list: "a list", str: "a string"}
USER_COLUMNS = ("gender", "age_bucket", "fre_province", "fre_city")
ITEM_COLUMNS = (
    "brand_id",
    "seller_id",
    "category_level1_id",
    "category_level2_id",
    "category_level3_id",
    "item_title",
    "brand_name",
)


def write_kuaisearch(input_dir: Path, writer: LogWriter, config: Config) -> None:
    """Append the search log, clicks and orders, in chunks of sessions so that memory is bounded.

    Reads recall*.jsonl: one session a line.
    """
    require_scenarios(config, (SCENARIO,), source="kuaisearch")
    settings = config.kuaisearch
    for log in (f"{SCENARIO}_impressions", f"{SCENARIO}_clicks", "orders"):
        writer.declare(log)
    sessions: list[dict[str, Any]] = []
    num_open = 0
    for path in input_files(input_dir, ("recall*.jsonl",), what="session log"):
        for number, session in enumerate(_lines(path), start=1):
            _check(session, where=f"{path}: line {number}")
            sessions.append(session)
            num_open += len(session["impressed_item_ids"])
            if num_open >= IMPRESSIONS_PER_CHUNK:
                _append_chunk(writer, sessions, settings.base_time_us, settings.step_us)
                sessions, num_open = [], 0
            if number % PROGRESS_EVERY == 0:
                print(f"{path.name}: {number:,} sessions", file=sys.stderr, flush=True)
    if sessions:
        _append_chunk(writer, sessions, settings.base_time_us, settings.step_us)
    if settings.write_features:
        _append_features(writer, input_dir, "users", "user_id", USER_COLUMNS)
        _append_features(writer, input_dir, "items", "item_id", ITEM_COLUMNS)
    else:
        print(
            "users and items are not written: their ids are not the sessions' (kuaisearch.write_features)",
            file=sys.stderr,
            flush=True,
        )


def _lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error}); write one object a line") from error


def _check(session: Any, *, where: str) -> None:
    for name, kind in NEEDED.items():
        if not isinstance(session, dict) or not isinstance(session.get(name), kind):
            found = session.get(name) if isinstance(session, dict) else session
            raise UserError(
                f"{where}: {name} must be {_NAMES[kind]}, got {str(found)[:60]!r}; see KuaiSearch's recall.jsonl"
            )


def _append_chunk(writer: LogWriter, sessions: list[dict[str, Any]], base_us: int, step_us: int) -> None:
    sizes = np.array([len(s["impressed_item_ids"]) for s in sessions])
    session = np.repeat(np.array([s["session_id"] for s in sessions]), sizes)
    position = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    start_us = np.array([base_us + s["time_index"] * step_us for s in sessions])
    writer.append(
        f"{SCENARIO}_impressions",
        {
            "impression_id": text_column(session, "-", position),
            "request_id": text_column(session),
            "user_id": text_column(np.repeat(np.array([s["user_id"] for s in sessions]), sizes)),
            "item_id": text_column(np.concatenate([np.array(s["impressed_item_ids"], np.int64) for s in sessions])),
            "event_time": np.repeat(start_us, sizes),
            "position": position,
            "query": pa.array([s["query"] for s in sessions], pa.string()).take(
                pa.array(np.repeat(np.arange(len(sessions)), sizes))
            ),
        },
    )
    clicks, orders = [], []
    for s, time_us in zip(sessions, start_us.tolist(), strict=True):
        number, user, slate = str(s["session_id"]), str(s["user_id"]), s["impressed_item_ids"]
        for item in dict.fromkeys(s["clicked_item_ids"]):
            impression = f"{number}-{slate.index(item)}" if item in slate else None
            clicks.append((f"{number}-{item}", impression, user, str(item), time_us + step_us // 4))
        for item in dict.fromkeys(s["purchased_item_ids"]):
            orders.append((number, user, str(item), time_us + step_us // 2))
    writer.append(f"{SCENARIO}_clicks", _columns(clicks, ("click_id", "impression_id", "user_id", "item_id")))
    writer.append("orders", _columns(orders, ("order_id", "user_id", "item_id")))


def _columns(rows: list[tuple[Any, ...]], names: tuple[str, ...]) -> dict[str, pa.Array]:
    """Text columns of the rows; the last place of a row is its event_time."""
    columns = {name: pa.array([row[n] for row in rows], pa.string()) for n, name in enumerate(names)}
    return {**columns, "event_time": pa.array([row[-1] for row in rows], pa.int64())}


def _append_features(writer: LogWriter, input_dir: Path, log: str, key: str, columns: tuple[str, ...]) -> None:
    for path in input_files(input_dir, (f"{log}*.jsonl",), what=f"{log} table"):
        rows = list(_lines(path))
        missing = [name for name in (key, *columns) if rows and name not in rows[0]]
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)}; it has: {', '.join(rows[0])}")
        arrays = {
            name: pa.array([None if r.get(name) is None else str(r[name]) for r in rows], pa.string())
            for name in (key, *columns)
        }
        writer.append(log, arrays)
