"""How the unit tests are shared out to the processes of `make unit` (pytest-xdist); tests/lanes.py has the rest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

_FILES = Path(__file__).parent.rglob("test_*.py")
WITH_RANKS = frozenset(file for file in _FILES if b"import run_ranks" in file.read_bytes())
"""The files that use two_ranks."""


def _no_sync(file: Any) -> None:
    """No test takes the power away: none need wait for the disk, a thousand times in all."""
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = _no_sync


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest piece first, or one process is left with it at the end."""
    items.sort(key=lambda item: item.path not in WITH_RANKS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, whose fixtures are then made once; those that use two_ranks together, since they share the ranks."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "two ranks" if config.rootpath / file in WITH_RANKS else file

    return ByFile(config, log)
