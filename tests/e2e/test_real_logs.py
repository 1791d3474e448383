"""`make demo` on real rows: runs through, and rows in, duplicates, rejects and labels add up to independent counts.

tests/spark/test_real_logs.py has the same account in `make test`, of fewer users and in one process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Run
from tests.real_logs import check_kuairand, check_kuaisearch

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def demo(run: Run, work: Path, source: str, input_dir: Path) -> None:
    done = run(
        sys.executable,
        "jobs/demo.py",
        "--no-serve",
        "--source",
        source,
        "--input",
        input_dir,
        "--config",
        f"jobs/configs/{source}.toml",
        "--work",
        work,
        "--set",
        "ray.num_workers=0",
        timeout_s=560,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (work / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.timeout(600)
def test_kuairand_runs_through_and_adds_up(run: Run, real_logs: Path, tmp_path: Path) -> None:
    demo(run, tmp_path / "work", "kuairand", real_logs / "kuairand-pure")
    check_kuairand(tmp_path / "work" / "lake", real_logs / "kuairand-pure", num_rows=94_784)
    (split,) = json.loads((tmp_path / "work" / "run" / "metrics.json").read_text()).values()
    assert split["all"]["ctr"]["auc"] > 0.6


@pytest.mark.timeout(600)
def test_kuaisearch_runs_through_and_adds_up(run: Run, real_logs: Path, tmp_path: Path) -> None:
    demo(run, tmp_path / "work", "kuaisearch", real_logs / "kuaisearch-demo")
    check_kuaisearch(tmp_path / "work" / "lake", real_logs / "kuaisearch-demo")
