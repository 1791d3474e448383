"""docs/architecture.md and README.md against the tree: every function of the walks and every path named is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.unit.test_imports import ROOMS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WALKS = ("One log row, from CSV to label", "One batch, from Delta to loss")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def steps(title: str) -> list[str]:
    """Dotted names of a walk, in order."""
    found = re.findall(r"^(\d+)\. `([\w.]+)` ", section(title), re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [name for _, name in found]


def is_defined(name: str) -> bool:
    """Whether `package.module.Class.function` is defined in the module's text."""
    parts = name.split(".")
    for size in range(len(parts) - 1, 0, -1):
        path = ROOT.joinpath(*parts[:size]).with_suffix(".py")
        if path.is_file():
            body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
            for part in parts[size:]:
                named = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
                if not named:
                    return False
                body = named[-1].body
            return True
    return False


@pytest.mark.parametrize("title", WALKS)
def test_every_function_of_a_walk_is_there(title: str) -> None:
    names = steps(title)
    assert len(names) > 12
    assert [name for name in names if not is_defined(name)] == []


def test_a_function_that_is_gone_is_found() -> None:
    assert is_defined("usr_ray.training.loop.train")
    assert is_defined("usr_ray.data.reader.SampleReader.batches")
    assert not is_defined("usr_ray.training.loop.trained")
    assert not is_defined("usr_ray.data.reader.SampleReader.rows")
    assert not is_defined("usr_ray.nowhere.train")


def test_the_rooms_are_those_of_the_import_test() -> None:
    rooms = re.findall(r"^\| `(\w+)/` \|", section("Packages").split("| package of `etl` |")[0], re.MULTILINE)
    assert set(rooms) == set(ROOMS)
    below = {room: set(rooms[:number]) for number, room in enumerate(rooms)}
    assert all(ROOMS[room] <= below[room] for room in rooms), "a package stands above one that it imports"


def test_every_room_and_file_named_is_there() -> None:
    usr_ray, etl = section("Packages").split("| package of `etl` |")
    for package, table in (("usr_ray", usr_ray), ("etl", etl)):
        named = {
            n for cell in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for n in re.findall(r"`([\w./]+)`", cell)
        }
        there = {p.name + "/" * p.is_dir() for p in (ROOT / package).iterdir() if not p.name.startswith("__")}
        assert {f"{name}" for name in there if name.endswith("/")} == {n for n in named if n.endswith("/")}, package
        assert {n for n in named if n.endswith(".py")} <= there


def test_the_tree_of_the_readme_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("\n## What is where\n")[1].split("\n\n")[0].strip("\n")
    parent, named = "", []
    for line in tree.splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        parent = name if depth == 4 else parent
        named.append(name if depth == 4 else parent + name)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
