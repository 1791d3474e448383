"""Who may import whom (docs/architecture.md): held by reading every file's import statements."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
STDLIB_ONLY = ("usr_ray/schema.py", "usr_ray/config.py", "usr_ray/cli.py", "usr_ray/files.py")
FORBIDDEN = {
    "etl": {"ray", "torch", "jobs", "deltalake"},
    "usr_ray": {"pyspark", "delta", "etl", "jobs"},
}
ONLY_IN = {
    "ray": {
        "usr_ray/trainer.py",
        "usr_ray/trainer_session.py",
        "usr_ray/trainer_stop.py",
        "usr_ray/tune.py",
        "usr_ray/study.py",
        "usr_ray/monitoring.py",
    },
    "deltalake": {"usr_ray/manifest.py", "usr_ray/score_table.py"},
}
# Lower layers first; a module imports its own layer's package mates never, lower layers always.
LAYERS = [
    {"schema"},
    {"config", "config_fields", "config_etl", "config_model", "config_tune"},
    {"batch", "cli", "files", "daily", "process"},
    {"manifest", "order", "reader", "cache", "model", "loss", "metrics", "optim", "checkpoint", "baseline", "feed"},
    {"worker", "evaluate", "embeddings", "pins"},
    {"train", "export", "score"},
    {"trainer", "study", "tune", "monitoring", "report", "mlflow"},
]


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Every dotted module name that a file imports, wherever in the file the statement stands."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            modules.add(node.module or "")
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def imported_packages(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imported_modules(path)}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(module: str) -> int | None:
    for level, names in enumerate(LAYERS):
        if module in names or module.split("_", maxsplit=1)[0] in names:
            return level
    return None


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_stay_apart(package: str) -> None:
    for path in sources(package):
        crossed = imported_packages(path) & FORBIDDEN[package]
        assert not crossed, f"{name(path)} imports {sorted(crossed)}"


def test_etl_uses_only_the_contract_of_usr_ray() -> None:
    for path in sources("etl"):
        used = {m for m in imported_modules(path) if m.startswith("usr_ray")}
        allowed = {m for m in used if m == "usr_ray" or m.startswith(("usr_ray.schema", "usr_ray.config"))}
        assert used == allowed, f"{name(path)} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_ray_and_deltalake_stay_at_the_edge(package: str) -> None:
    for path in sources("usr_ray"):
        if name(path) not in ONLY_IN[package]:
            assert package not in imported_packages(path), f"{name(path)} imports {package}"


@pytest.mark.parametrize("path", STDLIB_ONLY)
def test_the_contract_needs_the_standard_library_alone(path: str) -> None:
    import sys

    outside = imported_packages(ROOT / path) - set(sys.stdlib_module_names) - {"usr_ray"}
    assert not outside, f"{path} imports {sorted(outside)}"


def test_usr_ray_has_no_ring() -> None:
    for path in sources("usr_ray"):
        module = path.relative_to(ROOT / "usr_ray").with_suffix("").parts[0]
        if module == "__init__":
            continue
        own = layer_of(module)
        assert own is not None, f"{name(path)} has no layer; add it to LAYERS and docs/architecture.md"
        for used in imported_modules(path):
            parts = used.split(".")
            if parts[0] == "usr_ray" and len(parts) > 1 and (other := layer_of(parts[1])) is not None:
                assert other <= own, f"{name(path)} imports {used} from a higher layer"
