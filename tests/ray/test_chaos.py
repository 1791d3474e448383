"""A few faults of `make chaos` on the tests' own Ray; all of them take ten minutes and belong to the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.bench import Bench
from tests.ray.conftest import OVERRIDES

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def bench(cluster: None, lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    import ray

    arguments = tuple(word for override in OVERRIDES for word in ("--set", override))
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return Bench(tmp_path_factory.mktemp("chaos"), lake, arguments, address)


# A killed worker and half a checkpoint are in tests/ray/test_trainer.py and tests/unit/training/test_checkpoint.py.
NAMES = (
    # tests/ray/test_trainer.py has what a worker refuses, as the driver raises it.
    pytest.param("changed-schema-during", marks=pytest.mark.slow),
    pytest.param("killed-in-checkpoint", marks=pytest.mark.slow),
    # tests/unit/launch/test_rollcall.py has the rank that hangs, tests/ray/test_trainer.py the group that starts again.
    pytest.param("hanging-rank", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_of_a_fault_is_what_is_expected(bench: Bench, name: str) -> None:
    (fault,) = report.choose([name])
    seen = fault.observe(bench)
    assert seen.is_right, "; ".join(seen.words)
