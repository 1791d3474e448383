"""Scoring as a user runs it: killed at any moment and started again, no row is missing and none is there twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from jobs import score as job
from tests.e2e.conftest import ROOT, Usr
from tests.unit.export_runs import make_run
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.cli import run_job
from usr_ray.config import parse_dates
from usr_ray.data.manifest import build_manifest
from usr_ray.evaluation.files import read_predictions

pytestmark = pytest.mark.e2e

NUM_ROWS = 400
MOMENTS = {"half-way": 2, "before the commit": 2, "after the commit": 1}
"""When the job is killed -> dates that are left."""
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from jobs import score as job
from usr_ray.serving import score
from usr_ray.cli import run_job

output = sys.argv[-1]
plain, num_dates = score.score_rows, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def score_rows(*arguments):
    global num_dates
    num_dates += 1
    for number, batch in enumerate(plain(*arguments)):
        if num_dates == 2 and number == 1 and moment == "half-way":
            die()
        yield batch
    if num_dates == 2 and moment == "before the commit":
        die()

def write_date(table, date, batches, plain=score.ScoreTable.write_date):
    plain(table, date, batches)
    if num_dates == 2 and moment == "after the commit":
        die()

score.score_rows = score_rows
score.ScoreTable.write_date = write_date
# A process each, forked off one that has imported everything and started no thread.
for moment in {moments!r}:
    child = os.fork()
    if child == 0:
        os._exit(run_job(job.main, [*sys.argv[1:-1], os.path.join(output, moment)]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lake")
    write_samples(folder, samples_spec(), num_rows=NUM_ROWS, num_days=3)
    return folder


@pytest.fixture(scope="module")
def run_dir(lake, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), lake)


def command(run_dir: Path, lake: Path, output: Path) -> list[str]:
    dates = ["--dates", "2026-01-01:2026-01-03"]
    return ["--run-dir", str(run_dir), "--lake", str(lake), *dates, "--output", str(output)]


@pytest.fixture(scope="module")
def killed(lake, run_dir, tmp_path_factory) -> Path:
    """A folder with the scores that the job had written at each moment at which it was killed."""
    output = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(root=str(ROOT), moments=[*MOMENTS]), *command(run_dir, lake, output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    codes = [line for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert codes == [str(-signal.SIGKILL)] * len(MOMENTS), done.stdout[-2000:] + done.stderr[-2000:]
    return output


@pytest.mark.parametrize(("moment", "num_left"), MOMENTS.items())
def test_a_killed_job_goes_on_without_doubled_or_missing_rows(lake, run_dir, killed, capsys, moment, num_left):
    output = killed / moment
    left = DeltaTable(output).to_pyarrow_table()
    assert 0 < left.num_rows < NUM_ROWS
    assert len(set(left["impression_date"].to_pylist())) == 3 - num_left
    assert run_job(job.main, command(run_dir, lake, output)) == 0
    printed = capsys.readouterr().out
    assert f"{3 - num_left} of 3 dates are done already" in printed
    assert f"({num_left} of {num_left}): written" in printed
    ids = DeltaTable(output).to_pyarrow_table()["impression_id"].to_pylist()
    assert sorted(ids) == sorted(f"i{n}" for n in range(NUM_ROWS))


def test_scores_of_the_demo_equal_its_evaluation(smoke: Path, usr: Usr, tmp_path: Path) -> None:
    """By the installed wheel."""
    words = ["--run-dir", smoke / "run", "--lake", smoke / "lake", "--dates", "2026-01-01:2026-01-04"]
    done = usr("score", *words, "--output", tmp_path / "scores")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    samples = DeltaTable(smoke / "lake" / "samples").to_pyarrow_table(columns=["impression_id", "scenario"])
    scores = DeltaTable(tmp_path / "scores").to_pyarrow_table()
    key = [("impression_id", "ascending")]
    assert scores.select(["impression_id", "scenario"]).sort_by(key) == samples.sort_by(key)
    scenarios = ("search", "recommendation")
    predictions, _, about = read_predictions(smoke / "run" / "predictions.parquet", scenarios)
    manifest = build_manifest(smoke / "lake", dates=parse_dates(about["dates"], where="dates"))
    files = [smoke / "lake" / "samples" / file.path for file in manifest.files]
    ids = [i for f in files for i in pq.read_table(f, columns=["impression_id"], partitioning=None)[0].to_pylist()]
    of_id = dict(zip(scores["impression_id"].to_pylist(), scores["p_ctr"].to_pylist(), strict=True))
    found = [of_id[ids[number]] for number in predictions.row_number_N]
    assert found == pytest.approx(predictions.probs_NT[:, 0].tolist(), rel=1e-5)
