"""The ingest job under spark-submit, as the contract prints it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.spark

ROOT = Path(__file__).resolve().parents[2]


def submit(*words: str | Path, program: str = "spark-submit") -> subprocess.CompletedProcess[str]:
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [program, "jobs/ingest_logs.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)


def test_spark_submit_writes_logs_then_refuses_to_overwrite_them_then_does(tmp_path: Path) -> None:
    words = ("--source", "simulated", "--config", "jobs/configs/smoke.toml", "--logs", tmp_path / "logs")
    done = submit(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pq.read_table(tmp_path / "logs" / "truth").num_rows == 5_000

    refused = submit(*words)
    assert refused.returncode == 2
    # spark-submit joins the Python driver's stderr to its own stdout, so the line may come on either.
    lines = (refused.stdout + refused.stderr).splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == [f"error: --logs {tmp_path / 'logs'}: is not empty; name a new folder or add --overwrite"]
    assert not any("Traceback" in line for line in lines)

    # As make demo calls it: the job needs no JVM.
    again = submit(*words, "--overwrite", "--set", "simulated.num_impressions=4000", program=sys.executable)
    assert again.returncode == 0, again.stderr[-2000:]
    assert pq.read_table(tmp_path / "logs" / "truth").num_rows == 4_000
    marker = json.loads((tmp_path / "logs" / "_ingest.json").read_text())
    assert marker["source"] == "simulated"
    assert marker["num_rows"]["truth"] == 4_000
    assert marker["config"]["simulated"]["num_impressions"] == 4_000
