"""The documentation: every public name is described, the pages' links hold, and both become HTML without a warning."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from usr_ray.config import UserError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(p for d in ("etl", "usr_ray", "jobs", "cluster", "examples") for p in (ROOT / d).rglob("*.py"))
Definition = ast.ClassDef | ast.FunctionDef


def public(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


def raised(node: ast.AST) -> set[str]:
    """Names of the errors that a function raises itself."""
    found = {getattr(getattr(r.exc, "func", r.exc), "id", "") for r in ast.walk(node) if isinstance(r, ast.Raise)}
    return {name for name in found if name.endswith("Error") and name != "NotImplementedError"}


def is_described_elsewhere(node: Definition) -> bool:
    """A method of a Protocol, whose class says what it is, or one that overrides another."""
    if any(getattr(decorator, "id", "") == "override" for decorator in node.decorator_list):
        return True
    return isinstance(node.body[-1], ast.Expr) and getattr(node.body[-1].value, "value", None) is ...


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_public_name_is_described_with_the_errors_it_raises(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    for name, node in public(tree):
        text = ast.get_docstring(node)
        if name == "main" and path.relative_to(ROOT).parts[0] in ("jobs", "cluster"):
            continue  # the module's docstring is that of the command
        assert text or is_described_elsewhere(node), f"{name} has no docstring"
        if isinstance(node, ast.FunctionDef) and text and "Raises" not in text:
            assert not raised(node) or any(e in text for e in raised(node)), f"{name} raises {raised(node)} unsaid"


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_job_says_how_it_is_called(path: Path) -> None:
    usage = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"jobs/{path.name}" in usage or f"make {path.stem}" in usage


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "site" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.integration
def test_pages_and_reference_become_html_whose_links_hold(build: ModuleType, tmp_path: Path) -> None:
    """The reference of three modules only: all of them take a quarter of a minute (`make docs`)."""
    build.build_guides(tmp_path)
    build.build_api(tmp_path, ("usr_ray.schema", "usr_ray.config.training", "jobs.train"))
    html = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "operations.html", "examples/own_logs.html", "api/usr_ray/schema.html"} <= set(html)
    assert '<span class="name">FeatureSpec</span>' in html["api/usr_ray/schema.html"]
    assert "ray job submit" in html["api/jobs/train.html"]
    assert '<a href="../../../studies.html">studies.md</a>' in html["api/usr_ray/config/training.html"]
    for name, text in html.items():
        assert not re.search(r'(src|href)="https?://[^"]+\.(js|css|png|svg|woff2?)"', text), f"{name} needs the network"
        if name.startswith("api/"):
            continue
        for link in re.findall(r'href="([^"#]+)', text):
            if "://" not in link and "/api/" not in f"/{link}":
                assert (tmp_path / Path(name).parent / link).exists(), f"{name} leads to {link}"


def test_a_link_to_nothing_is_one_line(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("# A\n\n[gone](docs/gone.md)\n")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "pages", lambda: {"README.md": "index.html"})
    with pytest.raises(UserError, match=r"^README.md: links to docs/gone.md, which is not there; mend the link$"):
        build.build_guides(tmp_path / "out")
