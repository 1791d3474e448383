"""What `import usr_ray` names: quick to import, the same probabilities as jobs/score.py, one line for a mistake."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import usr_ray
from tests.unit.export_runs import make_run
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.data.manifest import build_manifest
from usr_ray.serving.score import score_rows
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration
DAY = "2026-01-02"


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lake = tmp_path_factory.mktemp("lake")
    write_samples(lake, samples_spec(), num_rows=120, num_days=3)
    return lake


@pytest.fixture(scope="module")
def run(lake: Path, tmp_path_factory: pytest.TempPathFactory) -> usr_ray.Run:
    return usr_ray.load_run(make_run(tmp_path_factory.mktemp("run"), lake, backbone="mmoe"))


def test_scores_are_those_of_the_job(run: usr_ray.Run, lake: Path) -> None:
    samples = usr_ray.open_samples(lake, dates=DAY)
    found = run.score(samples.head(len(samples)))
    day = dt.date.fromisoformat(DAY)
    manifest = build_manifest(lake, dates=(day, day))
    expected = pa.Table.from_batches(score_rows(run.trained, manifest, LocalWorker("cpu"), lambda _: None))
    assert found.num_rows == expected.num_rows == len(samples) > 20
    assert found.column_names == ["p_ctr", "p_ctcvr", "p_ctr_global", "p_ctcvr_global"]
    for name in found.column_names:
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-6)


def test_a_pandas_frame_scores_alike_and_a_row_alone_too(run: usr_ray.Run, lake: Path) -> None:
    rows = usr_ray.open_samples(lake, dates=DAY).head(7)
    expected = run.score(rows)["p_ctcvr"].to_numpy()
    np.testing.assert_array_equal(run.score(rows.to_pandas())["p_ctcvr"].to_numpy(), expected)
    np.testing.assert_allclose(run.score(rows.slice(3, 1))["p_ctcvr"].to_numpy(), expected[3:4], rtol=1e-6)
    assert run.score(rows.slice(0, 0)).num_rows == 0


def test_labels_keys_and_what_else_is_in_a_frame_are_not_needed(run: usr_ray.Run, lake: Path) -> None:
    rows = usr_ray.open_samples(lake, dates=dt.date.fromisoformat(DAY)).head(9)
    expected = run.score(rows)
    bare = rows.drop_columns([n for n in rows.column_names if n.startswith("is_") or n.endswith("_key")])
    frame = bare.to_pandas().assign(note=[1, "a", None] * 3, **{"0": 1.0})
    for given in (bare, frame, frame.set_index("note"), bare.to_reader(), *bare.to_batches(max_chunksize=9)):
        assert run.score(given).equals(expected)
    others = rows.set_column(0, "is_click", pa.array([7.0] * 9, pa.float32()))
    assert run.score(others).equals(expected), "and are not looked at"


def test_a_forked_process_scores_too(run: usr_ray.Run, lake: Path) -> None:
    """torch would wait there for threads that are gone. Python's multiprocessing forks on Linux."""
    code = f"""
import multiprocessing, numpy, pyarrow, torch, usr_ray
torch.set_num_threads(2)
run, samples = usr_ray.load_run({str(run.path)!r}), usr_ray.open_samples({str(lake)!r}, dates={DAY!r})
rows = pyarrow.concat_tables([samples.head(30)] * 20)
before = run.score(rows)
def child(_):
    try:
        usr_ray.open_samples({str(lake)!r}, dates={DAY!r})
    except usr_ray.UserError as error:
        refused = str(error).partition(":")[2][:54]
    found = run.score(rows)["p_ctr"]
    return refused, samples.head(5).equals(rows.slice(0, 5)), numpy.allclose(found, before["p_ctr"], rtol=1e-5)
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(before.num_rows, pool.map_async(child, [0]).get(timeout=20))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=90)
    refused = " cannot be opened in a process that was forked after a"
    assert done.stdout.strip() == f"600 [({refused!r}, True, True)]", done.stderr


def test_an_id_that_came_after_the_training_is_unknown(run: usr_ray.Run, lake: Path) -> None:
    rows = usr_ray.open_samples(lake, dates=DAY).head(3)
    place = rows.schema.get_field_index("user_id_index")
    new, unknown = (rows.set_column(place, "user_id_index", pa.array([n] * 3, pa.int64())) for n in (10**6, 1))
    assert run.score(new).equals(run.score(unknown))
    assert not run.score(new).equals(run.score(rows))


def test_head_gives_the_first_rows(lake: Path) -> None:
    samples = usr_ray.open_samples(lake, dates="2026-01-01:2026-01-03")
    assert len(samples) == 120
    assert samples.head(100).num_rows == 100
    assert samples.head(3).equals(samples.head(100).slice(0, 3))
    assert samples.head(500).num_rows == 120


def test_the_specs_columns_are_features_and_what_else_there_is_are_labels_keys_and_times(lake: Path) -> None:
    """As docs/library.md says to whoever trains a model of another kind."""
    samples = usr_ray.open_samples(lake, dates=DAY)
    spec, rows = samples.spec, samples.head(1)
    columns = [f.column for f in (*spec.sparse, *spec.dense)]
    lists = [name for name in rows.column_names if "_history_" in name]
    labels = ["is_click", "is_order", "is_click_global", "is_order_global", "is_mature"]
    others = [*labels, "event_time", "scenario_index", "user_key", "request_key"]
    assert sorted([*columns, *lists, *others]) == sorted(rows.column_names)


def test_metrics_are_the_runs_own(run: usr_ray.Run) -> None:
    assert run.metrics == {}
    task = {"auc": 0.7, "gauc": None, "log_loss": 0.5, "pcoc": 1.0, "num_samples": 8, "num_positives": 2}
    whole = {"eval": {"all": {"ctr": task, "ctcvr": task}}}
    (run.path / "metrics.json").write_text(json.dumps(whole))
    assert run.metrics == whole
    assert run.config.model.backbone == "mmoe"
    assert not run.model.training


def test_a_frame_that_lacks_a_column_is_refused_by_name(run: usr_ray.Run, lake: Path) -> None:
    rows = usr_ray.open_samples(lake, dates=DAY).head(3)
    with pytest.raises(usr_ray.UserError, match=r"run.score: column 'brand_index' is missing; it has: "):
        run.score(rows.drop_columns("brand_index"))
    texts = rows.set_column(rows.schema.get_field_index("brand_index"), "brand_index", pa.array(["a", "b", "c"]))
    with pytest.raises(usr_ray.UserError, match=r"run.score: wrong columns: "):
        run.score(texts)
    with pytest.raises(
        usr_ray.UserError, match=r"run.score: column 'brand_index' is there 2 times; give each column once"
    ):
        run.score(rows.append_column("brand_index", rows["brand_index"]))
    with pytest.raises(usr_ray.UserError, match=r"run.score: wrong columns: Duplicate column names found: "):
        run.score(pd.concat([rows.to_pandas()] * 2, axis=1))
    with pytest.raises(usr_ray.UserError, match=r"run.score: a table of Arrow, pandas or polars is needed, got list"):
        run.score(rows.to_pylist())
    with pytest.raises(usr_ray.UserError, match=r"no such directory"):
        usr_ray.load_run("nowhere")


def test_rows_of_a_lake_of_other_ids_are_refused_by_what_they_say(run: usr_ray.Run, tmp_path: Path) -> None:
    """jobs/score.py refuses them too. Rows without Arrow's metadata cannot say it."""
    # Vocabularies of the same sizes whose ids stand for other values.
    trained = run.trained.spec
    ours = replace(trained, sparse=tuple(replace(f, fingerprints=((f.num_embeddings, "a"),)) for f in trained.sparse))
    theirs = replace(ours, sparse=tuple(replace(f, fingerprints=((f.num_embeddings, "b"),)) for f in ours.sparse))
    write_samples(tmp_path / "other", theirs, num_rows=120, num_days=3)
    fingerprinted = usr_ray.Run(run.path, replace(run.trained, spec=ours))
    rows = usr_ray.open_samples(tmp_path / "other", dates=DAY).head(3)
    message = r"run.score: the ids of user_id in the samples table stand for other values .*; give rows of the lake"
    for given in (rows, rows.slice(1), rows.to_batches()[0], rows.drop_columns("is_mature")):
        with pytest.raises(usr_ray.UserError, match=message):
            fingerprinted.score(given)
    assert fingerprinted.score(rows.to_pandas()).num_rows == 3
    write_samples(tmp_path / "own", ours, num_rows=120, num_days=3)
    assert fingerprinted.score(usr_ray.open_samples(tmp_path / "own", dates=DAY).head(3)).num_rows == 3


def test_a_run_of_one_scenario_scores_nothing(run: usr_ray.Run, lake: Path) -> None:
    config = replace(run.config, data=replace(run.config.data, only_scenario="search"))
    alone = usr_ray.Run(run.path, replace(run.trained, config=config))
    with pytest.raises(
        usr_ray.UserError, match=r"run.score: .*: was trained on scenario 'search' alone \(data.only_sc"
    ):
        alone.score(usr_ray.open_samples(lake, dates=DAY).head(3))


def test_importing_the_library_loads_only_the_standard_library() -> None:
    heavy = "{'torch', 'numpy', 'pyarrow', 'ray', 'pyspark'}"
    code = f"import usr_ray, sys; print(usr_ray.__version__); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [usr_ray.__version__, "set()"]
    assert {*usr_ray.__all__} <= {*dir(usr_ray)}, "a notebook completes them"
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = usr_ray.no_such_name
