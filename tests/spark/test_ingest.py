"""The ingest job: what it writes, and what it does where logs are."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import ingest_logs
from tests.e2e.conftest import ROOT, run_command
from usr_ray.cli import run_job

pytestmark = pytest.mark.spark


CONFIG = str(ROOT / "jobs" / "configs" / "smoke.toml")
WORDS = ["--source", "simulated", "--config", CONFIG, "--logs"]


def test_ingest_writes_logs_then_refuses_to_overwrite_them_then_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, str(tmp_path / "logs")]
    assert run_job(ingest_logs.main, words) == 0
    assert pq.read_table(tmp_path / "logs" / "truth").num_rows == 5_000
    assert run_job(ingest_logs.main, words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: --logs {tmp_path / 'logs'}: is not empty; name a new folder or add --overwrite"]
    assert run_job(ingest_logs.main, [*words, "--overwrite", "--set", "simulated.num_impressions=4000"]) == 0
    assert pq.read_table(tmp_path / "logs" / "truth").num_rows == 4_000
    marker = json.loads((tmp_path / "logs" / "_ingest.json").read_text())
    assert marker["source"] == "simulated"
    assert marker["num_rows"]["truth"] == 4_000
    assert marker["config"]["simulated"]["num_impressions"] == 4_000


# The job needs no JVM: the same above, and tests/e2e/test_bad_input.py has a mistake under spark-submit.
@pytest.mark.slow
def test_under_spark_submit_it_does_the_same(tmp_path: Path) -> None:
    command = ("spark-submit", "jobs/ingest_logs.py", *WORDS, tmp_path / "logs")
    done = run_command(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pq.read_table(tmp_path / "logs" / "truth").num_rows == 5_000
    refused = run_command(*command)
    assert refused.returncode == 2
    # spark-submit joins the Python driver's stderr to its own stdout, so the line may come on either.
    lines = (refused.stdout + refused.stderr).splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == [f"error: --logs {tmp_path / 'logs'}: is not empty; name a new folder or add --overwrite"]
    assert not any("Traceback" in line for line in lines)
