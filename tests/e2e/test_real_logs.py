"""`make demo` on real rows: runs through, and rows in, duplicates, rejects and labels add up to independent counts."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.e2e.conftest import Run

pytestmark = pytest.mark.e2e


def demo(run: Run, work: Path, source: str, input_dir: Path) -> list[dict[str, Any]]:
    done = run(
        sys.executable,
        "jobs/demo.py",
        "--no-serve",
        "--source",
        source,
        "--input",
        input_dir,
        "--config",
        f"jobs/configs/{source}.toml",
        "--work",
        work,
        "--set",
        "ray.num_workers=0",
        timeout_s=560,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (work / "run" / "report.html").stat().st_size > 10_000
    return [json.loads(p.read_text()) for p in sorted((work / "lake" / "reports").glob("*.json"))]


def totals(reports: list[dict[str, Any]], kind: str) -> Counter[str]:
    """rows_in, duplicates, rejects and used over all dates and all logs of a kind, dated rows only."""
    total: Counter[str] = Counter()
    for report in reports:
        for log, counts in report["rows"].items():
            if log.endswith(kind):
                total.update(counts)
    return total


def check_sums(total: Counter[str]) -> None:
    assert total["rows_in"] == total["duplicates"] + total["rejects"] + total["used"]


@pytest.mark.timeout(600)
def test_kuairand_runs_through_and_adds_up(run: Run, real_logs: Path, tmp_path: Path) -> None:
    source = real_logs / "kuairand-pure"
    reports = demo(run, tmp_path / "work", "kuairand", source)
    raw = pd.read_parquet(source / "rec_20220425_20220430.parquet")
    unique = raw.drop_duplicates(["user_id", "video_id", "time_ms", "tab"])
    shown, clicks, orders = (totals(reports, kind) for kind in ("_impressions", "_clicks", "_orders"))
    for total in (shown, clicks, orders):
        check_sums(total)
    assert shown["rows_in"] == len(raw) == 94_784
    assert shown["used"] == len(unique)
    assert sum(report["samples"] for report in reports) == len(unique)
    labels: Counter[str] = Counter()
    for report in reports:
        for cell in report["scenarios"].values():
            labels.update({key: cell[key] for key in ("impressions", "clicks", "orders")})
    # Two rows of one impression may differ in is_click; a click in either is a click.
    clicked = raw[raw.is_click == 1].drop_duplicates(["user_id", "video_id", "time_ms", "tab"])
    assert labels["impressions"] == len(unique)
    assert labels["clicks"] == len(clicked)
    metrics = json.loads((tmp_path / "work" / "run" / "metrics.json").read_text())
    (split,) = metrics.values()
    assert split["all"]["ctr"]["auc"] > 0.6


@pytest.mark.timeout(600)
def test_kuaisearch_runs_through_and_adds_up(run: Run, real_logs: Path, tmp_path: Path) -> None:
    source = real_logs / "kuaisearch-demo"
    reports = demo(run, tmp_path / "work", "kuaisearch", source)
    sessions = [json.loads(line) for line in (source / "recall.jsonl").read_text().splitlines()]
    shown, clicks, orders = (totals(reports, kind) for kind in ("_impressions", "_clicks", "orders"))
    for total in (shown, clicks, orders):
        check_sums(total)
    assert shown["rows_in"] == sum(len(s["impressed_item_ids"]) for s in sessions) == 11_069
    assert clicks["rows_in"] == sum(len(s["clicked_item_ids"]) for s in sessions) == 278
    assert orders["rows_in"] == sum(len(s["purchased_item_ids"]) for s in sessions) == 7
    # One purchase of the demo has no click in its session: it is rejected and counted, never a label.
    unclicked = sum(len(set(s["purchased_item_ids"]) - set(s["clicked_item_ids"])) for s in sessions)
    assert orders["rejects"] == unclicked == 1
    assert sum(report["samples"] for report in reports) == shown["used"]
