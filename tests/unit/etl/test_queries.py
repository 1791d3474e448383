"""Queries that a configuration maps and nobody would read."""

from __future__ import annotations

from typing import cast

import pytest

pytest.importorskip("pyspark")

from etl.checks import DataCheckError
from etl.logs.events import event_logs
from etl.logs.files import LogFolder
from usr_ray.config import load_config

pytestmark = pytest.mark.unit


class Folder:
    """A folder with every log."""

    def has(self, log: str) -> bool:
        return True


def required(*overrides: str) -> dict[str, bool]:
    """Impressions log -> whether it needs the column query."""
    config = load_config(None, ['scenarios=["web_search","feed"]', *overrides])
    logs = event_logs(config, cast(LogFolder, Folder()))
    return {log.name: "query" in log.required for log in logs if log.name.endswith("_impressions")}


@pytest.mark.parametrize("mapping", ["columns.query='query text'", "constants.query='shoes'"])
def test_a_query_that_is_mapped_for_a_scenario_without_queries_is_refused(mapping: str) -> None:
    key = mapping.partition(".")[0]
    with pytest.raises(
        DataCheckError,
        match=rf"log web_search_impressions: logs.web_search_impressions.{key} gives it queries, but query_scenarios "
        r"\(search\) does not name web_search, so none would be read; name it there, or take the query out",
    ):
        required(f"logs.web_search_impressions.{mapping}")
    with pytest.raises(DataCheckError, match=r"query_scenarios \(empty\) does not name web_search"):
        required(f"logs.web_search_impressions.{mapping}", "query_scenarios=[]")


def test_a_query_is_mapped_for_the_scenarios_that_have_one() -> None:
    named = 'query_scenarios=["web_search"]'
    wanted = {"web_search_impressions": True, "feed_impressions": False}
    assert required(named, "logs.web_search_impressions.columns.query='query text'") == wanted
    assert required(named, "logs.feed_impressions.constants.query=''") == wanted, "a constant '' is null"
