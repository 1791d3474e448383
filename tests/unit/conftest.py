"""How the unit tests are shared out to the processes of `make unit` (pytest-xdist); nothing else runs in several."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, whose fixtures are then made once; but the tests of two ranks together, which share those ranks."""
    from xdist.scheduler import LoadGroupScheduling

    class ByFileOrGroup(LoadGroupScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            return scope.split("::", 1)[0]

    return ByFileOrGroup(config, log)
