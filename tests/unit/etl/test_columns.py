"""A column that a log lacks: one line that says what there is, and what was probably meant."""

from __future__ import annotations

import pytest

from etl.checks import DataCheckError, check_columns

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("log", "found", "column", "rest"),
    [
        ("orders", ["no", "uid"], "order_id", "name your own column for it under [logs.orders] (docs/own-logs.md)"),
        ("orders", ["order_id;user_id"], "order_id", 'that is one column: set logs.orders.separator = ";"'),
        ("orders", ["order_id\tuser_id"], "order_id", r'that is one column: set logs.orders.separator = "\t"'),
        ("orders", [], "order_id", "a file of one list over many lines is none"),
        ("feed_impressions", ["a"], "request_id", 'set logs.feed_impressions.constants = { request_id = "" }'),
        ("feed_clicks", ["a"], "impression_id", 'set logs.feed_clicks.constants = { impression_id = "" }'),
        ("feed_impressions", ["a"], "impression_id", "(docs/own-logs.md)"),
    ],
)  # fmt: skip
def test_a_column_that_is_missing_is_told_with_its_way_out(log: str, found: list[str], column: str, rest: str) -> None:
    with pytest.raises(DataCheckError) as error:
        check_columns(log, found, [column])
    told = str(error.value)
    assert told.startswith(f"log {log}: column '{column}' is missing; it has: {', '.join(found) or 'none'}; add it")
    assert told.endswith(rest)
    assert "\n" not in told
    check_columns(log, [column, *found], [column])
