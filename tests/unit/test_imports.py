"""Who may import whom (docs/architecture.md): held on the real import statements of every module."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]

GROUND = ("schema", "files", "cli", "daily_sums")
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "data": {"config"},
    "evaluation": {"config"},
    "model": {"config", "data"},
    "training": {"config", "data", "evaluation", "model"},
    "runs": {"config", "data", "evaluation", "model", "training"},
    "serving": {"config", "data", "evaluation", "model", "training", "runs"},
    "launch": {"config", "data", "evaluation", "model", "training", "runs"},
    "operations": {"config", "data", "evaluation", "model", "training", "runs"},
    "experiments": {"config", "data", "evaluation", "model", "training", "runs", "launch", "serving", "operations"},
    "reporting": {
        "config",
        "data",
        "evaluation",
        "model",
        "training",
        "runs",
        "launch",
        "serving",
        "operations",
        "experiments",
    },
}
"""Room of usr_ray -> the rooms below it, whose modules it may import; the ground is open to all."""

OUTSIDE = {
    "ray": {"usr_ray/launch/", "usr_ray/experiments/", "usr_ray/serving/app.py"},
    "deltalake": {"usr_ray/data/manifest.py", "usr_ray/serving/score.py"},
    "torch": {
        "usr_ray/data/",
        "usr_ray/model/",
        "usr_ray/training/",
        "usr_ray/runs/",
        "usr_ray/launch/",
        "usr_ray/serving/",
        "usr_ray/experiments/",
        "usr_ray/reporting/study_vectors.py",
    },
    "pyspark": {"etl/"},
    "delta": {"etl/"},
}
"""Package -> the folders and files of the product that may import it."""
NEVER = {"etl": {"jobs"}, "usr_ray": {"etl", "jobs"}}
PLAIN = "etl/kernel/"
"""Runs in Spark's Python workers, which have numpy and pyarrow only."""
STANDARD_LIBRARY_ONLY = ("usr_ray/schema.py", "usr_ray/files.py", "usr_ray/cli.py", "usr_ray/config/")


@functools.cache
def imported_modules(text: str) -> set[str]:
    """Every dotted name that a file imports, wherever in the file the statement stands."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            modules.add(node.module or "")
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@functools.cache
def product() -> dict[str, str]:
    """Path from the root -> text of every module of etl and usr_ray."""
    paths = (p for package in ("etl", "usr_ray") for p in sorted((ROOT / package).rglob("*.py")))
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def imports(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """File -> the files of `sources` that it imports."""
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    return {path: {names[m] for m in imported_modules(text) if m in names} - {path} for path, text in sources.items()}


def rings(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of files that import each other in a circle: strongly connected parts (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def room_of(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def rooms_crossed(sources: Mapping[str, str]) -> list[str]:
    """Imports inside usr_ray that go up or sideways."""
    found = []
    for path, used in imports(sources).items():
        room = room_of(path)
        if not path.startswith("usr_ray/") or room == "__init__":
            continue
        allowed = {*GROUND, "__init__", room, *ROOMS.get(room, {"config"} if room in ("cli", "daily_sums") else ())}
        found += [f"{path} imports {other}" for other in used if room_of(other) not in allowed]
    return found


def strangers(sources: Mapping[str, str]) -> list[str]:
    """Imports of a package in a file that may not have it."""
    found = []
    for path, text in sources.items():
        packages = {module.split(".")[0] for module in imported_modules(text)}
        for package, places in OUTSIDE.items():
            if package in packages and not path.startswith(tuple(places)):
                found.append(f"{path} imports {package}")
        found += [f"{path} imports {name}" for name in sorted(packages & NEVER[path.split("/")[0]])]
        if path.startswith(PLAIN):
            found += [f"{path} imports {name}" for name in sorted(packages & {"pyspark", "delta", "py4j"})]
        if path.startswith(STANDARD_LIBRARY_ONLY):
            found += [f"{path} imports {n}" for n in sorted(packages - set(sys.stdlib_module_names) - {"usr_ray"})]
    return found


def test_no_module_imports_itself_in_a_ring() -> None:
    # A package's __init__ that gathers names is imported before its modules, by Python's own rule: no ring of ours.
    modules = {path: text for path, text in product().items() if not path.endswith("__init__.py")}
    assert rings(imports(modules)) == []


def test_rooms_of_usr_ray_import_downwards() -> None:
    assert {room_of(p) for p in product() if p.startswith("usr_ray/") and p.count("/") > 1} <= set(ROOMS)
    assert rooms_crossed(product()) == []


def test_packages_stay_in_their_rooms() -> None:
    assert strangers(product()) == []


def test_etl_uses_only_the_contract_of_usr_ray() -> None:
    for path, text in product().items():
        if path.startswith("etl/"):
            used = {m for m in imported_modules(text) if m.startswith("usr_ray.")}
            allowed = tuple(f"usr_ray.{name}" for name in ("schema", "config", "daily_sums", "__version__"))
            assert all(m.startswith(allowed) for m in used), f"{path} imports {sorted(used)}"


def test_the_top_of_usr_ray_stays_small() -> None:
    assert len(list((ROOT / "usr_ray").glob("*.py"))) <= 6


@pytest.mark.parametrize(
    ("path", "line", "rule"),
    [
        ("usr_ray/data/order.py", "import ray", strangers),
        ("usr_ray/evaluation/metrics.py", "import torch", strangers),
        ("etl/kernel/attribution.py", "from pyspark.sql import functions", strangers),
        ("etl/checks.py", "from jobs.train import main", strangers),
        ("usr_ray/config/model.py", "import numpy", strangers),
        ("usr_ray/training/loss.py", "from usr_ray.launch.trainer import run", rooms_crossed),
        ("usr_ray/model/usr.py", "from usr_ray.training import loss", rooms_crossed),
    ],
)
def test_a_planted_import_is_found(path: str, line: str, rule: object) -> None:
    planted = dict(product()) | {path: f"{product()[path]}\n{line}\n"}
    assert callable(rule)
    assert [found for found in rule(planted) if found.startswith(path)]


def test_a_planted_ring_is_found() -> None:
    files = {"etl/a.py": "import etl.b", "etl/b.py": "from etl import c", "etl/c.py": "def f():\n    import etl.a"}
    assert rings(imports(files)) == [["etl/a.py", "etl/b.py", "etl/c.py"]]
    assert rings(imports(files | {"etl/c.py": ""})) == []
