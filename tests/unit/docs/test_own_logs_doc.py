"""docs/own-logs.md says what the ETL asks of each log, and docs/tables.md the windows that labels have by default."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from etl.kernel.events import KIND_CLICK, KIND_IMPRESSION
from etl.logs.events import event_logs
from etl.logs.files import LogFolder
from usr_ray.config import load_config
from usr_ray.config.etl import LabelsConfig

pytestmark = pytest.mark.unit

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_columns_that_a_log_needs_are_documented() -> None:
    page = (DOCS / "own-logs.md").read_text(encoding="utf-8")
    table = page.split("\n| log | columns |\n")[1].split("\n\n")[0].splitlines()[1:]
    cells = dict(line.strip("| ").split(" | ") for line in table)
    config = load_config(None, ('scenarios=["search", "feed"]',))
    names = {KIND_IMPRESSION: "`<s>_impressions`", KIND_CLICK: "`<s>_clicks`"}
    for log in event_logs(config, cast(LogFolder, SimpleNamespace(has=lambda log: True))):
        always, _, of_queries = cells[names.get(log.kind, "`orders`, `<s>_orders`")].partition(
            "; `query` in a scenario"
        )
        found = re.findall(r"`(\w+)`", always)
        assert bool(of_queries) == (log.kind == KIND_IMPRESSION)
        assert [*found, *(["query"] if log.name == "search_impressions" else [])] == list(log.required), log.name
        assert found[0] == log.key
    assert "`ingest_time`" in cells["every event log"]


def test_the_default_windows_are_documented() -> None:
    labels, page = LabelsConfig(), (DOCS / "tables.md").read_text(encoding="utf-8")
    assert (
        f"`labels.click_window` ({labels.click_window} by default), `labels.order_window` ({labels.order_window})"
        in page
    )
    assert labels.global_window == ""
    assert "`labels.global_window` (W_c unless set, and never shorter)" in page
    assert f"`labels.clock_skew` ({labels.clock_skew} by default)" in page
