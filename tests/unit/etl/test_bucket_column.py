"""The bucket column of an experiment is read whatever features the lake was built with. No JVM is started."""

from __future__ import annotations

import pytest

from etl.build.experiment import of_bucket_alone
from usr_ray.config import load_config

pytestmark = pytest.mark.unit

DEVICE = "features.context_categories=['device']"


@pytest.mark.parametrize(
    "features",
    [
        ("features.user_categories=['bucket']",),
        ("features.context_categories=['bucket']",),
        (DEVICE, "features.crosses=[['device', 'scenario']]", "model.wide=true"),
        (DEVICE, "counters.dev.keys=['device']"),
        (
            "features.context_numbers=['depth']",
            "features.scale={depth='buckets'}",
            "features.crosses=[['depth', 'scenario']]",
            "model.wide=true",
        ),
    ],
)
def test_every_configuration_of_a_lake_can_be_reported_on(features: tuple[str, ...]) -> None:
    config = load_config(None, ["scenarios=['search', 'feed']", "labels.no_order_scenarios=['feed']", *features])
    own = of_bucket_alone(config)
    assert own.features.context_categories == ("bucket",)
    assert (own.scenarios, own.labels) == (config.scenarios, config.labels)
    assert not own.every_counter
    assert not own.features.user_categories
