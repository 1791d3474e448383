"""The house rules that a machine can hold: file and function sizes, no catch-all modules, no version drift."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for d in ("etl", "usr_ray", "jobs", "cluster") for p in (ROOT / d).rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_LOOP = 500, 70, 250


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    limit = MAX_LOOP if path.name == "loop.py" else MAX_FILE
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION, f"{node.name} has {lines} lines"


def test_formatting_is_switched_off_only_where_a_reason_stands() -> None:
    marks = [
        f"{p.relative_to(ROOT)}: {line.strip()}"
        for d in ("etl", "usr_ray", "jobs", "cluster", "tests", "benchmarks", "docs")
        for p in sorted((ROOT / d).rglob("*.py"))
        for line in p.read_text(encoding="utf-8").splitlines()
        if line.endswith("# fmt: " + "skip") or line.strip() == "# fmt: " + "off"
    ]
    assert len(marks) <= 20, "\n".join(marks)


def test_no_time_is_read_in_the_zone_of_the_machine() -> None:
    """pyspark collects a timestamp as local time without a zone: instants come as micros, as Arrow or as text."""
    named = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text(encoding="utf-8").splitlines()
        if "replace(tzinfo=" in line and " if " not in line  # what has no zone is UTC, what has one keeps it
    ]
    assert not named, "\n".join(named)


def test_no_module_is_a_drawer_for_anything() -> None:
    assert not [p for p in SOURCES if p.stem in ("utils", "common", "helpers", "misc")]


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pins = {re.split("==", line)[0].lower().replace("_", "-") for line in lines if "==" in line}
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    extras = setup.split("[options.extras_require]")[1]
    wanted = {
        re.split(r"[\[=<>]", w)[0].lower() for line in extras.splitlines() if (w := line.strip()) and w[-1] != "="
    }
    wanted = {w for w in wanted if w and not w.endswith(" ")}
    assert wanted <= pins, f"not in constraints.txt: {sorted(wanted - pins)}"


def test_setup_and_constraints_name_the_same_spark_and_delta() -> None:
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for package in ("pyspark", "delta-spark"):
        pinned = re.search(rf"^{package}==(\S+)$", constraints, re.MULTILINE)
        assert pinned is not None
        assert f"{package}=={pinned[1]}" in setup
