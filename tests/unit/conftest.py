"""How the unit tests are shared out to the processes of `make unit` (pytest-xdist); tests/lanes.py has the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, whose fixtures are then made once; those that use two_ranks together, since they share the ranks."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "two ranks" if file in with_ranks else file

    files = Path(__file__).parent.rglob("test_*.py")
    with_ranks = {f.relative_to(config.rootpath).as_posix() for f in files if "import run_ranks" in f.read_text()}
    return ByFile(config, log)
