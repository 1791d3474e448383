"""The feature spec a configuration and its vocabularies make."""

from __future__ import annotations

import pytest

from etl.features.vocabulary import Vocabularies, feature_spec
from usr_ray.config import ConfigError, first_difference, load_config
from usr_ray.schema import FeatureSpec

pytestmark = pytest.mark.unit

FEATURES = (
    'features.user_categories=["city"]',
    'features.item_numbers=["price"]',
    'features.context_categories=["app"]',
)


def known(max_ids: dict[str, int], **recorded: tuple[tuple[int, str], ...]) -> Vocabularies:
    return Vocabularies(None, max_ids, {"user_id": (1, 2)}, recorded)  # type: ignore[arg-type]


def test_tables_are_as_large_as_the_largest_id_plus_one() -> None:
    spec = feature_spec(load_config(None, FEATURES), known({"user_id": 9, "city": 4}))
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
    assert '"scale"' not in spec.to_json()  # as before there were scales: checkpoints of then fit their tables
    plain = feature_spec(load_config(None, (*FEATURES, "features.scale.price=none")), known({}))
    assert plain.dense[0].scale == "none"
    assert FeatureSpec.from_json(plain.to_json()) == plain


def test_hashed_tables_all_have_the_number_of_buckets() -> None:
    spec = feature_spec(load_config(None, (*FEATURES, "vocabulary.kind=hash", "vocabulary.num_buckets=77")))
    assert {f.name: f.num_embeddings for f in spec.sparse if f.name != "event_hour"} == dict.fromkeys(
        ("user_id", "item_id", "query", "city", "app"), 77
    )


@pytest.mark.parametrize(("span", "day"), [("window", False), ("day", True)])
def test_labels_are_final_after_both_windows(span: str, day: bool) -> None:
    settings = ("labels.global_window=2 hours", "labels.order_window=30 minutes", f"labels.global_span={span}")
    spec = feature_spec(load_config(None, settings))
    assert (spec.label_delay_us, spec.label_day_span) == (9_000_000_000, day)


NOW = (10, "000000000000001000000000000002")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), (NOW,)),
        (((5, "a"),), ((5, "a"), NOW)),
        (((5, "a"), NOW), ((5, "a"), NOW)),  # nothing was added
        (tuple((n, "a") for n in range(-90, 10)), (*((n, "a") for n in range(-53, 10)), NOW)),
    ],
    ids=["first", "grown", "unchanged", "the newest 64"],
)
def test_each_build_that_adds_values_leaves_a_fingerprint(
    before: tuple[tuple[int, str], ...], after: tuple[tuple[int, str], ...]
) -> None:
    spec = feature_spec(load_config(None, FEATURES), known({"user_id": 9}, user_id=before))
    assert spec.sparse_feature("user_id").fingerprints == after
    assert spec.sparse_feature("event_hour").fingerprints == ()
    assert spec.sparse_feature("query").fingerprints == ((2, "0" * 30),), "no values yet"
    assert FeatureSpec.from_json(spec.to_json()) == spec


def test_hashed_ids_are_known_by_their_parameters() -> None:
    spec = feature_spec(load_config(None, ("vocabulary.kind=hash", "vocabulary.num_buckets=77")))
    assert spec.sparse_feature("item_id").fingerprints == ((77, "xxhash64"),)


def test_scales_are_part_of_a_rows_meaning_and_wrong_ones_are_refused() -> None:
    default, named = load_config(None, FEATURES), load_config(None, (*FEATURES, "features.scale.price=log1p"))
    assert default.row_meaning() == named.row_meaning()
    assert "scale" not in default.row_meaning()["features"]  # as before there were scales: lakes of then go on
    other = load_config(None, (*FEATURES, "features.scale.price=none"))
    assert first_difference(default.row_meaning(), other.row_meaning()) == ("features.scale.price", None, "none")
    with pytest.raises(ConfigError, match=r"^features.scale.cost: is no number; there are: price$"):
        load_config(None, (*FEATURES, "features.scale.cost=none"))
    with pytest.raises(ConfigError, match=r"^features.scale.price must be 'log1p' or 'none', got 'buckets'$"):
        load_config(None, (*FEATURES, "features.scale.price=buckets"))
