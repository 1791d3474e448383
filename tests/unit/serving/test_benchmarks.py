"""The service's benchmarks, what they count and what they allow others; and the demo's registry on the pages."""

from __future__ import annotations

import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("onnxruntime")

from fastapi.testclient import TestClient

from benchmarks import serving_rivals
from benchmarks.serving_load import Asked, Cells

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[3]


def test_a_round_without_refusals_counts_in_the_share_of_refusals() -> None:
    cells = Cells()
    good, refused = Asked(200, 0.01, 0.01), Asked(429, 0.002, 0.002)
    for asked in ([good, refused], [good, good], [good, good]):
        cells.add("x", asked, 2.0)
    assert cells.rounds["x"]["refused_share"] == [0.5, 0.0, 0.0]
    assert cells.median("x", "refused_share") == 0.0
    assert cells.rounds["x"]["refused_quick_share"] == [1.0]  # there are no times where nothing was refused


def test_fastapi_computes_as_many_requests_at_once_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, running, most = threading.Lock(), [0], [0]

    class Scorer:
        def __init__(self, folder: Path) -> None:
            pass

        def score(self, request: dict[str, str]) -> dict[str, str]:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.1)
            with lock:
                running[0] -= 1
            return request

    apps = []
    monkeypatch.setattr(serving_rivals, "Scorer", Scorer)
    monkeypatch.setenv(serving_rivals.PREPARED, "none")
    monkeypatch.setitem(sys.modules, "uvicorn", SimpleNamespace(run=lambda app, **_: apps.append(app)))
    serving_rivals.serve_fastapi(0)
    with TestClient(apps[0]) as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: client.post("/v1/score", json={"n": str(n)}).json(), range(6)))
    assert answers == [{"n": str(n)} for n in range(6)]
    assert most == [serving_rivals.AT_ONCE]


def test_the_page_names_the_registry_of_the_makefile_s_demo() -> None:
    work = re.search(r"^WORK +\?= ([\w/]+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert work is not None
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = [where for page in pages for where in re.findall(r"(\S+)/registry\b", page.read_text(encoding="utf-8"))]
    assert work[1] in named
    assert [where for where in named if where.startswith("runs/demo") and where != work[1]] == []
