"""docs/messages.md against the code: what it quotes is there, and each one-line error of the code is of a family."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "messages.md").read_text(encoding="utf-8")
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("etl", "usr_ray", "jobs", "cluster")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
GAP = "\0"
"""Stands for what a message is told when it is made."""


def families(page: str) -> list[str]:
    """What the first cells of the tables quote."""
    cells = re.findall(r"^\| (`.+?) \| ", page, re.M)
    return [quoted for cell in cells for quoted in re.findall(r"`(.+?)`", cell)]


def pattern(family: str) -> re.Pattern[str]:
    return re.compile(r"[^\n]*?".join(re.escape(part) for part in family.split("...")))


def text(node: ast.AST) -> str:
    """A text of the code, with a gap for each value; only a gap for what is no text."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(value.value) if isinstance(value, ast.Constant) else GAP for value in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else GAP


def texts() -> str:
    """All texts of the code, and the Makefile, which has its own."""
    found = [text(n) for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.JoinedStr | ast.Constant)]
    return "\n".join([(ROOT / "Makefile").read_text(encoding="utf-8"), *found])


def user_errors() -> set[str]:
    """UserError and whatever is derived from it."""
    bases = {
        node.name: {getattr(base, "id", "") for base in node.bases}
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"UserError"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def raised() -> list[tuple[str, str]]:
    """(where, message) of each user error that the code raises with words of its own."""
    errors = user_errors()
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                message = "".join(map(text, node.exc.args))
                if getattr(node.exc.func, "id", "") in errors and len(message.replace(GAP, "")) > 12:
                    found.append((f"{path}:{node.lineno}", message))
    return found


@pytest.mark.integration
def test_each_family_of_the_page_is_one_of_the_codes() -> None:
    code = texts()
    for family in families(PAGE):
        assert pattern(family).search(code), f"no text of the code is {family!r}"
    assert not [family for family, times in Counter(families(PAGE)).items() if times > 1], "twice on the page"


@pytest.mark.integration
def test_each_message_of_the_code_is_of_a_family() -> None:
    messages = raised()
    assert len(messages) > 200
    known = [pattern(family) for family in families(PAGE)]
    strange = [f"{where} {message}" for where, message in messages if not any(p.search(message) for p in known)]
    assert strange == [], "each of these needs a row in docs/messages.md, or the words of a row that is there"


def test_a_message_of_no_family_would_be_found() -> None:
    known = [pattern(family) for family in families("| `--lake ...: no table at` | |\n| `is odd`, `is even` | |\n")]
    assert [p.pattern for p in known][1:] == ["is\\ odd", "is\\ even"]
    assert known[0].search(f"--lake {GAP}: no table at {GAP}; build it")
    assert not known[0].search(f"--lake {GAP}: no row at {GAP}")
