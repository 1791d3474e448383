"""How many examples the tests with random input draw."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

DEEP = 50


def depth(examples: int) -> Any:
    """Settings of a hypothesis test: `examples` worlds by default, DEEP times as many with HYPOTHESIS_PROFILE=deep."""
    factor = DEEP if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 1
    return settings(max_examples=examples * factor, deadline=None, suppress_health_check=[HealthCheck.too_slow])
