"""The feature spec a configuration and its vocabularies make."""

from __future__ import annotations

import pytest

from etl.features.vocabulary import feature_spec
from usr_ray.config import load_config

pytestmark = pytest.mark.unit

FEATURES = (
    'features.user_categories=["city"]',
    'features.item_numbers=["price"]',
    'features.context_categories=["app"]',
)


def test_tables_are_as_large_as_the_largest_id_plus_one() -> None:
    spec = feature_spec(load_config(None, FEATURES), {"user_id": 9, "city": 4})
    sizes = {f.name: (f.num_embeddings, f.owner) for f in spec.sparse}
    assert sizes == {
        "user_id": (10, "user"),
        "item_id": (2, "item"),
        "query": (2, "query"),
        "event_hour": (26, "context"),
        "city": (5, "user"),
        "app": (2, "context"),
    }
    assert [(f.column, f.owner) for f in spec.dense] == [("price_scaled", "item")]


def test_hashed_tables_all_have_the_number_of_buckets() -> None:
    spec = feature_spec(load_config(None, (*FEATURES, "vocabulary.kind=hash", "vocabulary.num_buckets=77")), {})
    assert {f.name: f.num_embeddings for f in spec.sparse if f.name != "event_hour"} == dict.fromkeys(
        ("user_id", "item_id", "query", "city", "app"), 77
    )


@pytest.mark.parametrize(("span", "day"), [("window", False), ("day", True)])
def test_labels_are_final_after_both_windows(span: str, day: bool) -> None:
    settings = ("labels.global_window=2 hours", "labels.order_window=30 minutes", f"labels.global_span={span}")
    spec = feature_spec(load_config(None, settings), {})
    assert (spec.label_delay_us, spec.label_day_span) == (9_000_000_000, day)
