"""The feature spec a configuration and its vocabularies make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from etl.features.numbers import bucket_edges, fits_of, standard_fit
from etl.features.vocabulary import Vocabularies, feature_spec
from etl.kernel.features import bucket_ids, number_counts, standardised
from etl.kernel.packs import stream_of
from usr_ray.config import DAY_US, ConfigError, first_difference, load_config
from usr_ray.schema import DenseFeature, FeatureSpec
from usr_ray.serving.encode import bucket_id, scaled

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
    with pytest.raises(
        ConfigError, match=r"^features.scale.price must be 'log1p' or 'none' or 'standard' or 'buckets', got 'log'$"
    ):
        load_config(None, (*FEATURES, "features.scale.price=log"))
    buckets = load_config(None, (*FEATURES, "features.scale.price=buckets")).row_meaning()
    fewer = load_config(None, (*FEATURES, "features.scale.price=buckets", "features.scale_buckets=4")).row_meaning()
    assert first_difference(buckets, fewer) == ("features.scale_buckets", 16, 4)
    assert load_config(None, (*FEATURES, "features.scale_buckets=4")).row_meaning() == default.row_meaning()


def test_a_number_in_buckets_is_a_category_and_a_fit_is_part_of_the_spec() -> None:
    config = load_config(
        None,
        (
            *FEATURES,
            'features.user_numbers=["age"]',
            'features.context_numbers=["wait", "load"]',
            'features.scale={price = "buckets", wait = "buckets", load = "standard"}',
        ),
    )
    fits = {"price": (1.5, 4.0), "wait": (), "load": (2.0, 0.5)}
    spec = feature_spec(config, replace(known({}), fits=fits))
    assert [(f.name, f.column, f.owner, f.num_embeddings, f.edges, f.nothing) for f in spec.sparse[3:]] == [
        ("event_hour", "event_hour_index", "context", 26, None, 0),
        ("city", "city_index", "user", 2, None, 0),
        ("app", "app_index", "context", 2, None, 0),
        ("price", "price_index", "item", 5, (1.5, 4.0), 1),
        ("wait", "wait_index", "context", 3, (), 1),
    ]
    assert [(f.name, f.scale, f.mean, f.deviation) for f in spec.dense] == [
        ("age", "log1p", 0.0, 1.0),
        ("load", "standard", 2.0, 0.5),
    ]
    assert FeatureSpec.from_json(spec.to_json()) == spec
    assert fits_of(spec) == fits


def test_buckets_are_those_of_a_slow_count_in_the_etl_and_in_a_service() -> None:
    values = np.random.default_rng(0).normal(size=1000).round(1)
    edges = bucket_edges(np.quantile(values, [0, 0.25, 0.5, 0.75]).tolist())
    assert len(edges) == 3
    slow = [2 + sum(edge <= np.float32(value) for edge in edges) for value in values]
    assert bucket_ids(values, edges).tolist() == [bucket_id(value, edges) for value in values.tolist()] == slow
    shares = np.bincount(slow)[2:] / 1000
    assert shares.min() > 0.2  # quarters, but for equal values
    odd = np.array([np.nan, np.inf, -np.inf, edges[0], 1e300])
    assert bucket_ids(odd, edges).tolist() == [1, 1, 1, 3, 5] == [bucket_id(value, edges) for value in odd.tolist()]
    assert bucket_id(None, edges) == 1
    # Mostly one value: its quantiles are one edge, and an edge at the least value would leave a bucket empty.
    assert bucket_edges([0.0, 0.0, 0.0, 5.0, 5.0, 9.0]) == (5.0, 9.0)
    tenth = float(np.float32(0.1))  # a little above 0.1: what a log of 32 bits holds where a request says 0.1
    assert bucket_edges([0.0, 0.1, 0.1 + 1e-12, 0.3]) == (tenth, float(np.float32(0.3)))
    near = np.array([0.1, tenth, 0.0999999, 1e300, -1e300])
    assert bucket_ids(near, (tenth, 5.0)).tolist() == [3, 3, 2, 4, 2]
    assert [bucket_id(value, (tenth, 5.0)) for value in near.tolist()] == [3, 3, 2, 4, 2]
    assert bucket_edges([3.0, 3.0]) == ()


def test_standard_numbers_have_mean_0_and_deviation_1_in_the_etl_and_in_a_service() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0, np.nan, np.inf])
    mean, deviation = 3.0, 3.5**0.5  # of the first four, by hand: (4 + 1 + 0 + 9) / 4
    found = standardised(values, mean, deviation)
    assert found.tolist() == [float(np.float32((v - 3) / 3.5**0.5)) for v in (1, 2, 3, 6)] + [0.0, 0.0]
    feature = DenseFeature(name="n", column="n_scaled", owner="item", scale="standard", mean=mean, deviation=deviation)
    assert scaled([*values.tolist(), None], [feature] * 7).tolist() == [*found.tolist(), 0.0]


def test_a_fit_has_nine_digits_and_a_constant_has_a_deviation_of_1() -> None:
    assert standard_fit(1 / 3, 4 / 9) == (0.333333333, 0.666666667)
    assert standard_fit(0.1 + 0.2, 1e-33) == (0.3, 1.0)
    assert standard_fit(0.0, 0.0) == (0.0, 1.0)
    assert standard_fit(0.0, 1e-20) == (0.0, 1e-10)


def test_numbers_of_the_context_are_counted_on_the_dates_that_are_fitted_on() -> None:
    targets = {
        "event_time": np.array([0, 1, DAY_US, 5 * DAY_US]),
        "context:wait": pa.array([2.5, None, 2.5, 7.0]),
        "context:load": pa.array([1.0, float("inf"), 3.0, 4.0]),
    }
    batch = pa.record_batch({"targets": stream_of(targets)})
    found = [row for part in number_counts([batch], ["wait", "load"], [0, 1]) for row in part.to_pylist()]
    assert found == [
        {"feature": "wait", "number": 2.5, "count": 2},
        {"feature": "load", "number": 1.0, "count": 1},
        {"feature": "load", "number": 3.0, "count": 1},
    ]
