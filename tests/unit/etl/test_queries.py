"""Queries of a scenario that query_scenarios does not name."""

from __future__ import annotations

import pytest

pytest.importorskip("pyspark")

from etl.checks import DataCheckError
from etl.kernel.events import KIND_IMPRESSION
from etl.logs.events import EventLog, unread_query
from usr_ray.config import load_config

pytestmark = pytest.mark.unit

LOG = EventLog(name="web_impressions", kind=KIND_IMPRESSION, scenario=0, key="impression_id", required=())


def told(*overrides: str) -> str:
    return unread_query(load_config(None, ['scenarios=["web","feed"]', *overrides]), LOG, "Query")


def test_queries_that_are_mapped_and_would_not_be_read_are_refused() -> None:
    for mapping in ("columns.query='query text'", "constants.query='shoes'"):
        with pytest.raises(
            DataCheckError,
            match=r"log web_impressions: logs.web_impressions gives it queries, but query_scenarios \(search\) does "
            "not name web, so none would be read; name it there, or take the query out",
        ):
            told(f"logs.web_impressions.{mapping}")
    with pytest.raises(DataCheckError, match=r"query_scenarios \(feed\) does not name web"):
        told("logs.web_impressions.columns.query='q'", 'query_scenarios=["feed"]')


def test_a_column_of_that_name_with_values_is_warned_of() -> None:
    assert told("query_scenarios=[]", "logs.web_impressions.columns.item_id='sku'") == (
        "log web_impressions: column 'Query' holds queries, which are not read: query_scenarios (empty) does not name "
        "web; name it there if its impressions answer a query"
    )
