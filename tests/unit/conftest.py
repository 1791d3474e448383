"""How tests without JVM and Ray are shared out to processes (pytest-xdist), and which of them `make unit` leaves out.

tests/lanes.py has the rest of `make test`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
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


_STARTS = (subprocess.Popen, subprocess.Popen.__init__), (BaseProcess, BaseProcess.start)


def _no_process(*_: Any, **__: Any) -> None:
    pytest.fail("starts a process, so it is no unit test: mark it `integration` (pyproject.toml)")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Who starts a process says so."""
    for kind, start in _STARTS:
        setattr(kind, start.__name__, start if "integration" in item.keywords else _no_process)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Tests of other folders may follow in this process."""
    for kind, start in _STARTS:
        setattr(kind, start.__name__, start)


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


_LEFT_OUT = "not integration"
"""In `make unit`'s words for -m."""
_OF_FILE = b"\npytestmark = pytest.mark.integration\n"
_LEFT = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT] = {"files": 0, "tests": 0}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that are left out are not imported either: some load Ray, others what draws."""
    if _LEFT_OUT not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    if _OF_FILE not in collection_path.read_bytes():
        return None
    config.stash[_LEFT]["files"] += 1
    return True


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        item.config.stash[_LEFT]["tests"] += "integration" in item.keywords and "slow" not in item.keywords


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = session.config.stash[_LEFT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each process collects the same."""
    node.config.stash[_LEFT] = getattr(node, "workeroutput", {}).get("left") or node.config.stash[_LEFT]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    files, tests = config.stash[_LEFT].values()
    if files or tests:
        terminalreporter.write_line(
            f"left to `make test`: {files} files and {tests} further tests of parts together (marked integration)"
        )
