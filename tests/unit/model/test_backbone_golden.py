"""The seeded training of each backbone gives the committed losses (`python -m tests.golden.backbones` writes them)."""

from __future__ import annotations

import json

import pytest

from tests.golden.backbones import GOLDEN, NUM_STEPS, losses
from tests.unit.backbone_batches import ALL

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ALL)
def test_losses_equal_the_golden_ones(name: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert len(golden) == NUM_STEPS + 1
    assert losses(name) == pytest.approx(golden, rel=1e-9)
