"""`make demo` on the simulated source: what comes out is whole, adds up, and lies between popularity and the truth."""

from __future__ import annotations

import datetime as dt
import json
import os
from pathlib import Path

import deltalake
import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from jobs import export, train
from usr_ray.cli import run_job
from usr_ray.config import load_config, parse_dates
from usr_ray.data.manifest import build_manifest
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.evaluation.files import read_predictions
from usr_ray.schema import ALL_LABELS, LABEL_ORDER, FeatureSpec, index_column
from usr_ray.serving.model import padded_inputs
from usr_ray.serving.runtime import ExportedModel

pytestmark = pytest.mark.e2e

SMOKE = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "smoke.toml"
KEYS = {"auc", "gauc", "log_loss", "pcoc", "num_samples", "num_positives"}


def test_the_demo_prints_auc_per_scenario_and_task_and_the_report(smoke: Path) -> None:
    printed = (smoke / "stdout.txt").read_text()
    for word in ("search", "recommendation", "ctr", "ctcvr", "AUC", "report.html"):
        assert word.lower() in printed.lower(), word
    assert len([line for line in printed.splitlines() if line.split()[:2] == ["scenario", "task"]]) == 1


def test_the_demo_ends_with_one_request_answered(smoke: Path) -> None:
    printed = (smoke / "stdout.txt").read_text().partition("== serve")[2]
    case = next(
        c
        for c in json.loads(next(smoke.glob("registry/versions/*/golden.json")).read_text())
        if "query" in c["request"]
    )
    best = sorted(case["items"], key=lambda item: -item["p_ctr"])[:5]
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:3] for row in rows] == [[str(n), i["id"], f"{i['p_ctr']:.4f}"] for n, i in enumerate(best, 1)]
    assert "p50 of 50 requests" in printed


def test_metrics_have_the_contract_shape(smoke: Path) -> None:
    metrics = json.loads((smoke / "run" / "metrics.json").read_text())
    (split,) = metrics.values()
    assert set(split) == {"search", "recommendation", "global", "all"}
    for cells in split.values():
        assert set(cells) == {"ctr", "ctcvr"}
        for cell in cells.values():
            assert set(cell) >= KEYS
    for task in ("ctr", "ctcvr"):
        total = sum(split[s][task]["num_samples"] for s in ("search", "recommendation"))
        assert total == split["all"][task]["num_samples"] > 0


def test_every_log_row_is_a_sample_a_reject_or_a_duplicate(smoke: Path) -> None:
    reports = [json.loads(p.read_text()) for p in sorted((smoke / "lake" / "reports").glob("*.json"))]
    samples = deltalake.DeltaTable(smoke / "lake" / "samples").to_pyarrow_table(columns=["scenario", "is_click"])
    assert len(reports) == 4
    assert samples.num_rows == sum(report["samples"] for report in reports)
    for report in reports:
        for counts in report["rows"].values():
            assert counts["rows_in"] == counts["duplicates"] + counts["rejects"] + counts["used"]
    logs = ds.dataset([ds.dataset(smoke / "logs" / f"{s}_impressions") for s in ("search", "recommendation")])
    # The source's last row, of the day after, only says that the logs go so far.
    shown = logs.to_table(["impression_id"], filter=pc.field("event_time") < dt.datetime(2026, 1, 5, tzinfo=dt.UTC))
    assert samples.num_rows == len(pc.unique(shown["impression_id"])) == 5000


def test_labels_keep_their_order_in_the_table(smoke: Path) -> None:
    table = deltalake.DeltaTable(smoke / "lake" / "samples").to_pyarrow_table(columns=list(ALL_LABELS))
    for low, high in LABEL_ORDER:
        assert pc.all(pc.less_equal(table[low], table[high])).as_py(), (low, high)


def test_what_spark_wrote_the_reader_reads_equal(smoke: Path) -> None:
    config = load_config(SMOKE)
    dates = parse_dates(config.data.eval_dates, where="data.eval_dates")
    manifest = build_manifest(smoke / "lake", dates=dates)
    spec = manifest.spec
    # Plain pyarrow, file by file in the manifest's order, is the reference.
    root = smoke / "lake" / "samples"
    expected = [
        row for file in manifest.files for row in pq.read_table(root / file.path, partitioning=None).to_pylist()
    ]
    reader = SampleReader(
        manifest,
        Reading(global_batch_size=512, group_size=128, rank=0, world_size=1, seed=0, order="file", mature_only=False),
    )
    seen = 0
    for batch in reader.batches(0):
        for b, number in enumerate(batch.row_number_B.tolist()):
            if number < 0:
                continue
            row = expected[number]
            seen += 1
            assert batch.scenario_B[b].item() == row["scenario_index"]
            assert batch.labels_BT[b].tolist() == [row[label] for label in ALL_LABELS]
            assert batch.sparse_BF[b].tolist() == [row[f.column] for f in spec.sparse]
            assert batch.dense_BF[b].tolist() == pytest.approx([row[f.column] for f in spec.dense])
            assert batch.user_key_B[b].item() == row["user_key"]
            for history, names in zip(batch.histories, spec.histories, strict=True):
                start, end = history.offsets[b].item(), history.offsets[b + 1].item()
                assert history.item_ids_V[start:end].tolist() == row[names.item_ids]
                assert history.actions_V[start:end].tolist() == row[names.actions]
                assert history.ages_s_V[start:end].tolist() == pytest.approx(row[names.ages_s])
                if names.query_ids is not None:
                    assert history.query_ids_V is not None
                    assert history.query_ids_V[start:end].tolist() == row[names.query_ids]
    assert seen == manifest.num_rows == len(expected)
    assert spec.sparse[1].column == index_column("item_id")


def test_the_report_is_one_file_without_network(smoke: Path) -> None:
    page = (smoke / "run" / "report.html").read_text()
    assert "<html" in page
    for load in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        assert load not in page


def test_a_finished_run_says_so_and_keeps_its_result(
    smoke: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list((smoke / "lake" / "pins").iterdir()), "it has taken back its pin"
    before = (smoke / "run" / "metrics.json").read_text()
    monkeypatch.setattr(os, "environ", {**os.environ})  # the job prepares it for Ray
    words = ["--config", SMOKE, "--lake", smoke / "lake", "--run-dir", smoke / "run"]
    assert run_job(train.main, [str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "this run is finished" in printed
    assert [line for line in printed.splitlines() if line.split()[:2] == ["scenario", "task"]], (
        "the table, without --brief"
    )
    assert (smoke / "run" / "metrics.json").read_text() == before


def test_auc_lies_below_the_truth(smoke: Path) -> None:
    """The truth ranks best: a model that beats it has seen the labels."""
    metrics = json.loads((smoke / "run" / "metrics.json").read_text())
    (split,) = metrics.values()
    config = load_config(SMOKE)
    first, last = parse_dates(config.data.eval_dates, where="data.eval_dates")
    table = deltalake.DeltaTable(smoke / "lake" / "samples").to_pyarrow_table(
        columns=["impression_id", "impression_date", "is_click", "is_mature"]
    )
    date = table["impression_date"]
    table = table.filter(pc.and_(pc.and_(pc.greater_equal(date, first), pc.less_equal(date, last)), table["is_mature"]))
    truth = ds.dataset(smoke / "logs" / "truth").to_table(columns=["impression_id", "p_click"])
    joined = table.join(truth, "impression_id").to_pandas()
    oracle = roc_auc_score(joined["is_click"], joined["p_click"])
    assert len(joined) == split["all"]["ctr"]["num_samples"]
    assert 0.5 < split["all"]["ctr"]["auc"] < oracle + 0.01


@pytest.mark.slow  # tests/e2e/test_serving.py replays every impression, test_export.py has the program for rows
def test_the_demo_served_equals_the_demo_evaluated(smoke: Path, tmp_path: Path) -> None:
    words = ["--run-dir", smoke / "run", "--lake", smoke / "lake", "--output", tmp_path / "out"]
    assert run_job(export.main, [str(word) for word in words]) == 0
    spec = FeatureSpec.from_json((tmp_path / "out" / "feature_spec.json").read_text())
    predictions, _, about = read_predictions(smoke / "run" / "predictions.parquet", spec.scenarios)
    dates = parse_dates(about["dates"], where="dates")
    model = ExportedModel(tmp_path / "out")
    with SampleReader(
        build_manifest(smoke / "lake", dates=dates),
        Reading(global_batch_size=64, group_size=16, order="file", mature_only=False),
    ) as reader:
        found = np.concatenate(
            [
                model.predict({n: v.numpy() for n, v in padded_inputs(batch, spec).items()})["p_ctr"][
                    batch.row_number_B >= 0
                ]
                for batch in reader.batches(0)
            ]
        )
    expected = predictions.probs_NT[:, 0]
    np.testing.assert_allclose(found[predictions.row_number_N], expected, rtol=0, atol=1e-5)
    entries = pq.read_table(tmp_path / "out" / "vocabularies.parquet")
    assert set(entries["feature"].to_pylist()) == {f.name for f in spec.sparse} - {"event_hour"}
