"""Spark's Python workers have no installation of ours: what the session sends them is enough for the kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from etl.session import _ship_code

_IMPORTS = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import etl.kernel
for found in pkgutil.iter_modules(etl.kernel.__path__):
    importlib.import_module(f"etl.kernel.{found.name}")
ours = {name: m.__file__ for name, m in sys.modules.items() if name.split(".")[0] in ("etl", "usr_ray")}
print(len(ours), *sorted(name for name, path in ours.items() if not path.startswith(sys.argv[1])))
"""


@pytest.mark.integration
def test_the_kernel_is_imported_from_what_is_sent_alone(tmp_path: Path) -> None:
    sent: list[str] = []
    spark: Any = SimpleNamespace(sparkContext=SimpleNamespace(addPyFile=sent.append))
    _ship_code(spark)
    command = [sys.executable, "-c", _IMPORTS, *sent]
    found = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    number, *elsewhere = found.stdout.split()
    assert int(number) > 10
    assert elsewhere == []
