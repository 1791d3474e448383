"""usr_ray: unified search and recommendation ranking on Ray Train.

    run = usr_ray.load_run("runs/demo/run")                       config, metrics, model, vocabularies, score(rows)
    rows = usr_ray.open_samples("lake", dates="2026-01-07").head(5)
    config = usr_ray.load_config("jobs/configs/simulated.toml")

These names are loaded when they are first used: `import usr_ray` itself loads nothing else. docs/library.md.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["Config", "Ranker", "Run", "Samples", "UserError", "load_config", "load_run", "open_samples"]

if sys.version_info < (3, 11):  # noqa: UP036 - a checkout run by another Python than its environment's; pip refuses by itself
    print(
        f"error: usr_ray needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; activate the "
        "environment (`make setup`, then `source .venv/bin/activate`)",
        file=sys.stderr,
    )
    sys.exit(2)

_HOMES = {
    "Config": "usr_ray.config",
    "UserError": "usr_ray.config",
    "load_config": "usr_ray.config",
    "Ranker": "usr_ray.serving.ranker",
    "Run": "usr_ray.serving.library",
    "Samples": "usr_ray.serving.library",
    "load_run": "usr_ray.serving.library",
    "open_samples": "usr_ray.serving.library",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'usr_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # a notebook completes what is not loaded yet
