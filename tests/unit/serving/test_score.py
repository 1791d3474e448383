"""Scoring: every row once, equal to the evaluation; done dates are known from the table; refusals."""

from __future__ import annotations

import dataclasses
import datetime as dt
import shutil

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from deltalake import DeltaTable, write_deltalake

from jobs import score as job
from tests.unit.export_runs import make_run
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.cli import run_job
from usr_ray.config import UserError
from usr_ray.data.manifest import build_manifest
from usr_ray.schema import SAMPLES
from usr_ray.serving.export import export_run
from usr_ray.serving.library import load_run as library_run
from usr_ray.serving.library import open_samples
from usr_ray.serving.score import SCORES_SCHEMA, ScoreError, ScoreTable, score_dates, score_rows
from usr_ray.training import evaluate as evaluate_module
from usr_ray.training.evaluate import evaluate, load_run
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration

torch.set_num_threads(1)
DATES = (FIRST_DATE, FIRST_DATE + dt.timedelta(days=2))
NUM_ROWS = 200


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lake")
    write_samples(folder, samples_spec(), num_rows=NUM_ROWS, num_days=3, row_group_rows=24)
    return folder


@pytest.fixture(scope="module")
def run_dir(lake, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), lake)


def score(run_dir, lake, output, dates=DATES, **more):
    lines = []
    scored = score_dates(run_dir, lake, dates, output, LocalWorker("cpu"), report=lines.append, **more)
    return scored, lines


def rows_of(output):
    return DeltaTable(output).to_pyarrow_table().sort_by("impression_id")


def test_every_row_is_scored_once_as_the_evaluation_scores_it(lake, run_dir, tmp_path):
    scored, lines = score(run_dir, lake, tmp_path / "scores")
    samples = DeltaTable(lake / SAMPLES).to_pyarrow_table().sort_by("impression_id")
    assert not pc.all(samples["is_mature"]).as_py()  # rows that evaluation leaves out are among them
    found = rows_of(tmp_path / "scores")
    assert scored.num_rows == found.num_rows == NUM_ROWS
    assert scored.dates == tuple(FIRST_DATE + dt.timedelta(days=n) for n in range(3))
    for name in ("impression_id", "scenario", "event_time", "impression_date"):
        assert found[name].to_pylist() == samples[name].to_pylist()
    assert set(found["model_step"].to_pylist()) == {5}
    assert set(found["table_version"].to_pylist()) == {DeltaTable(lake / SAMPLES).version()}
    assert found.column_names == SCORES_SCHEMA.names
    assert "(3 of 3): written; 200 of 200 rows, 100%" in lines[-1]

    run = load_run(run_dir)
    manifest = build_manifest(lake, dates=DATES)
    predictions = evaluate(run.module, run.tables, manifest, LocalWorker("cpu"), run.config).predictions
    mature = found.filter(samples["is_mature"])
    by_time = mature.sort_by("event_time")  # the order of the rows in the files
    for name, probs in (("", predictions.probs_NT), ("_global", predictions.global_probs_NT)):
        for place, task in enumerate(("ctr", "ctcvr")):
            assert by_time[f"p_{task}{name}"].to_pylist() == pytest.approx(probs[:, place].tolist(), rel=1e-5)


def test_where_nobody_logs_orders_their_probabilities_are_null(tmp_path):
    spec = dataclasses.replace(samples_spec(), no_order_scenarios=("recommendation",))
    write_samples(tmp_path / "lake", spec, num_rows=60, num_days=1)
    run_dir = make_run(tmp_path / "run", tmp_path / "lake")
    score(run_dir, tmp_path / "lake", tmp_path / "scores", (FIRST_DATE, FIRST_DATE))
    found = rows_of(tmp_path / "scores")
    without = [name == "recommendation" for name in found["scenario"].to_pylist()]
    assert {True, False} == set(without)
    for name in ("p_ctcvr", "p_ctcvr_global"):
        assert [value is None for value in found[name].to_pylist()] == without
    assert found["p_ctr"].null_count == found["p_ctr_global"].null_count == 0
    run = library_run(run_dir)
    rows = open_samples(tmp_path / "lake", dates=str(FIRST_DATE)).head(60)
    nulls = [value is None for value in run.score(rows)["p_ctcvr"].to_pylist()]
    assert nulls == [n == run.spec.scenarios.index("recommendation") for n in rows["scenario_index"].to_pylist()]
    # A table of before this rule takes no null.
    strict = [field.with_nullable(field.nullable and field.name != "p_ctcvr") for field in SCORES_SCHEMA]
    DeltaTable.create(str(tmp_path / "old"), pa.schema(strict), partition_by=["impression_date"])
    with pytest.raises(ScoreError, match=r"old: is of an earlier version, .* and takes no null; name another --output"):
        score(run_dir, tmp_path / "lake", tmp_path / "old", (FIRST_DATE, FIRST_DATE))


def test_a_model_without_global_heads_leaves_global_columns_null(lake, tmp_path):
    run_dir = make_run(tmp_path / "run", lake, multitask={"enabled": False})
    score(run_dir, lake, tmp_path / "scores", (FIRST_DATE, FIRST_DATE))
    found = rows_of(tmp_path / "scores")
    assert found["p_ctr_global"].null_count == found["p_ctcvr_global"].null_count == found.num_rows > 0
    assert found["p_ctr"].null_count == 0


def test_done_dates_are_skipped_and_others_are_not(lake, run_dir, tmp_path):
    output = tmp_path / "scores"
    score(run_dir, lake, output, (FIRST_DATE, FIRST_DATE))
    scored, lines = score(run_dir, lake, output)
    assert scored.skipped == (FIRST_DATE,)
    assert len(scored.dates) == 2
    assert lines[0] == "1 of 3 dates are done already"
    version = DeltaTable(output).version()
    assert score(run_dir, lake, output)[0].num_rows == 0
    assert DeltaTable(output).version() == version
    # Somebody deletes a row: its date is scored again as a whole.
    first = pc.min(rows_of(output)["impression_id"]).as_py()
    DeltaTable(output).delete(f"impression_id = '{first}'")
    assert score(run_dir, lake, output)[0].dates == (FIRST_DATE,)
    assert len(set(rows_of(output)["impression_id"].to_pylist())) == rows_of(output).num_rows == NUM_ROWS


def test_a_newer_version_of_the_samples_is_scored_again_and_lost_dates_go(lake, run_dir, tmp_path):
    own = shutil.copytree(lake, tmp_path / "lake")
    score(run_dir, own, tmp_path / "scores")
    DeltaTable(own / SAMPLES).delete("impression_date = '2026-01-02'")
    refusal = "1 of these 3 dates have no rows: 2026-01-02; .* with --allow-missing-dates"
    with pytest.raises(UserError, match=refusal):
        score(run_dir, own, tmp_path / "scores")
    scored, lines = score(run_dir, own, tmp_path / "scores", allow_missing=True)
    assert lines[0] == "2026-01-02: no longer in the samples table; its scores are deleted"
    assert scored.skipped == ()
    expected = DeltaTable(own / SAMPLES).to_pyarrow_table().sort_by("impression_id")["impression_id"]
    found = rows_of(tmp_path / "scores")
    assert found["impression_id"].to_pylist() == expected.to_pylist()
    assert set(found["table_version"].to_pylist()) == {DeltaTable(own / SAMPLES).version()}


def test_a_lake_that_was_built_anew_is_scored_again(run_dir, tmp_path):
    """Its rows are as many and its version is the same number; only the files tell that they are others."""
    lake, day = tmp_path / "lake", (FIRST_DATE, FIRST_DATE)
    for seed in (0, 1):
        write_samples(tmp_path / f"built-{seed}", samples_spec(), num_rows=80, num_days=1, seed=seed)
    shutil.copytree(tmp_path / "built-0", lake)
    score(run_dir, lake, tmp_path / "scores", day)
    before = rows_of(tmp_path / "scores")
    shutil.rmtree(lake)
    shutil.copytree(tmp_path / "built-1", lake)
    scored, _ = score(run_dir, lake, tmp_path / "scores", day)
    assert (scored.dates, scored.num_rows) == ((FIRST_DATE,), 80)
    after = rows_of(tmp_path / "scores")
    score(run_dir, lake, tmp_path / "afresh", day)
    assert after.equals(rows_of(tmp_path / "afresh"))
    assert after["table_version"].equals(before["table_version"])
    assert not after["p_ctr"].equals(before["p_ctr"])


def test_scores_of_a_version_that_did_not_name_its_files_are_made_once_more(lake, run_dir, tmp_path):
    day = (FIRST_DATE, FIRST_DATE)
    score(run_dir, lake, tmp_path / "now", day)
    now = rows_of(tmp_path / "now")
    write_deltalake(tmp_path / "old", now.drop_columns(["rows_id"]), partition_by=["impression_date"])
    assert score(run_dir, lake, tmp_path / "old", day)[0].dates == (FIRST_DATE,)
    assert rows_of(tmp_path / "old").select(now.column_names).equals(now)
    assert score(run_dir, lake, tmp_path / "old", day)[0].skipped == (FIRST_DATE,)


def test_a_failure_on_the_way_commits_nothing_and_keeps_its_type(lake, run_dir, tmp_path):
    run = load_run(run_dir)
    output = tmp_path / "scores"
    score(run_dir, lake, output, (FIRST_DATE, FIRST_DATE))
    before = rows_of(output)
    table = ScoreTable(output, model_id=before["model_id"][0].as_py(), model_step=5)
    manifest = build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE))
    parameter = next(p for name, p in run.module.named_parameters() if name.startswith("backbone"))
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(ScoreError, match=r"p_ctr is not a number on a row of 2026-01-01.*train.learning_rate"):
        table.write_date(FIRST_DATE, score_rows(run, manifest, LocalWorker("cpu"), lambda _: None))
    assert rows_of(output) == before
    one_row = next(score_rows(load_run(run_dir), manifest, LocalWorker("cpu"), lambda _: None))
    with pytest.raises(ZeroDivisionError):
        table.write_date(FIRST_DATE, (1 // 0 if n else one_row for n in range(2)))
    assert rows_of(output) == before


def test_a_run_of_one_scenario_alone_scores_nothing_and_is_not_exported(lake, run_dir, tmp_path, monkeypatch):
    run = load_run(run_dir)
    data = dataclasses.replace(run.config.data, only_scenario="search")
    alone = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    monkeypatch.setattr(evaluate_module, "load_run", lambda *_: alone)
    message = (
        r"--run-dir .*: was trained on scenario 'search' alone \(data.only_scenario\), so that it knows no other row"
    )
    with pytest.raises(UserError, match=message):
        score(run_dir, lake, tmp_path / "scores")
    with pytest.raises(UserError, match=message):
        export_run(run_dir, tmp_path / "out", lake=lake)
    assert not list(tmp_path.iterdir())


def refused(capsys, *words):
    assert run_job(job.main, [str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_user_errors_are_one_line(lake, run_dir, tmp_path, capsys):
    def command(run=run_dir, lake_dir=lake, dates="2026-01-01", output=tmp_path / "out"):
        return ("--run-dir", run, "--lake", lake_dir, "--dates", dates, "--output", output)

    assert "no such directory; name the --run-dir of jobs/train.py" in refused(capsys, *command(run=tmp_path / "no"))
    assert "holds no valid checkpoint; train with jobs/train.py first" in refused(capsys, *command(run=tmp_path))
    assert "no rows in 2031-01-01:2031-01-01" in refused(capsys, *command(dates="2031-01-01"))
    assert "no Delta table at" in refused(capsys, *command(lake_dir=tmp_path))
    assert "--dates: 'soon' is not a date" in refused(capsys, *command(dates="soon"))
    assert not (tmp_path / "out").exists()
    assert "is a Delta table, but not of scores; name another" in refused(capsys, *command(output=lake / SAMPLES))
    assert "is not empty and no Delta table; name another" in refused(capsys, *command(output=lake))


def test_the_table_of_another_model_is_refused_with_the_way_out(lake, run_dir, tmp_path, capsys):
    output = tmp_path / "scores"
    words = ("--lake", lake, "--dates", "2026-01-01", "--output", output)
    assert run_job(job.main, ["--run-dir", str(run_dir), *map(str, words)]) == 0
    assert "rows of 1 dates scored by the checkpoint of step 5; 0 dates were done" in capsys.readouterr().out
    other = make_run(tmp_path / "other", lake, step=7, seed=1)
    line = refused(capsys, "--run-dir", other, *words)
    assert "holds scores of another model (checkpoint of step 5, id " in line
    assert "this one is of step 7" in line
    assert "name another --output, or delete that table first" in line


def test_rows_whose_model_is_not_known_count_as_another_models(lake, run_dir, tmp_path):
    score(run_dir, lake, tmp_path / "scores", (FIRST_DATE, FIRST_DATE))
    rows = rows_of(tmp_path / "scores")
    without = {"delta.dataSkippingStatsColumns": "impression_id"}
    write_deltalake(tmp_path / "bare", rows, partition_by=["impression_date"], configuration=without)
    with pytest.raises(ScoreError, match="another model"):
        ScoreTable(tmp_path / "bare", model_id=rows["model_id"][0].as_py(), model_step=5)


def test_one_process_only(lake, run_dir, tmp_path):
    worker = LocalWorker("cpu")
    worker.world_size = 2
    with pytest.raises(ScoreError, match="runs in one process"):
        score_dates(run_dir, lake, DATES, tmp_path, worker)
