"""What a lake of the real logs must add up to: counted on the files themselves, without the build."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

KEYS = ["user_id", "video_id", "time_ms", "tab"]
"""An impression of KuaiRand."""


def some_of_kuairand(source: Path, target: Path, *, one_of: int, rest: int) -> Path:
    """The files with one of `one_of` users (user_id % one_of = rest), all of what each did; the items whole."""
    target.mkdir()
    for path in source.iterdir():
        if path.name.startswith("video"):
            shutil.copy(path, target)
        elif path.name.startswith("user_features"):
            users = pd.read_csv(path, dtype=str)
            users[users.user_id.astype(int) % one_of == rest].to_csv(target / path.name, index=False)
        elif path.suffix == ".parquet":
            rows = pq.read_table(path)
            rows = rows.filter(pa.array(rows["user_id"].to_numpy() % one_of == rest))
            pq.write_table(rows, target / path.name)
    return target


def reports_of(lake: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((lake / "reports").glob("*.json"))]


def totals(reports: list[dict[str, Any]], kind: str) -> Counter[str]:
    """rows_in, duplicates, rejects and used over all dates and all logs of a kind, dated rows only."""
    total: Counter[str] = Counter()
    for report in reports:
        for log, counts in report["rows"].items():
            if log.endswith(kind):
                total.update(counts)
    return total


def _check_sums(total: Counter[str]) -> None:
    assert total["rows_in"] == total["duplicates"] + total["rejects"] + total["used"]


def check_kuairand(lake: Path, source: Path, *, num_rows: int) -> None:
    """Rows, duplicates, samples and labels; `num_rows`: impressions of the files."""
    reports = reports_of(lake)
    raw = pd.read_parquet(source / "rec_20220425_20220430.parquet")
    unique = raw.drop_duplicates(KEYS)
    shown, clicks, orders = (totals(reports, kind) for kind in ("_impressions", "_clicks", "_orders"))
    for total in (shown, clicks, orders):
        _check_sums(total)
    assert shown["rows_in"] == len(raw) == num_rows
    assert shown["used"] == len(unique) < num_rows
    assert sum(report["samples"] for report in reports) == len(unique)
    labels: Counter[str] = Counter()
    for report in reports:
        for cell in report["scenarios"].values():
            labels.update({key: cell[key] for key in ("impressions", "clicks", "orders")})
    # Two rows of one impression may differ in is_click; a click in either is a click.
    assert (raw.groupby(KEYS).is_click.nunique() > 1).sum() == 1
    clicked = raw[raw.is_click == 1].drop_duplicates(KEYS)
    assert labels["impressions"] == len(unique)
    assert labels["clicks"] == len(clicked)


def check_kuaisearch(lake: Path, source: Path) -> None:
    """Rows, clicks, purchases and samples of the published demo."""
    reports = reports_of(lake)
    sessions = [json.loads(line) for line in (source / "recall.jsonl").read_text().splitlines()]
    shown, clicks, orders = (totals(reports, kind) for kind in ("_impressions", "_clicks", "orders"))
    for total in (shown, clicks, orders):
        _check_sums(total)
    assert shown["rows_in"] == sum(len(s["impressed_item_ids"]) for s in sessions) == 11_069
    assert clicks["rows_in"] == sum(len(s["clicked_item_ids"]) for s in sessions) == 278
    assert orders["rows_in"] == sum(len(s["purchased_item_ids"]) for s in sessions) == 7
    # One purchase of the demo has no click in its session: it is rejected and counted, never a label.
    unclicked = sum(len(set(s["purchased_item_ids"]) - set(s["clicked_item_ids"])) for s in sessions)
    assert orders["rejects"] == unclicked == 1
    assert sum(report["samples"] for report in reports) == shown["used"]
