"""The examples do what their pages say: the commands of each README, one after the other, as a newcomer pastes them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import deltalake
import onnxruntime
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import ROOT, Run
from usr_ray.schema import FeatureSpec

pytestmark = pytest.mark.e2e

EXAMPLES = ROOT / "examples"


def follow(run: Run, example: str, work: Path) -> str:
    """Run the ```sh block of an example's page in a shell that stops at the first failure; what it printed."""
    (block,) = re.findall(r"^```sh\n(.*?)^```", (EXAMPLES / example / "README.md").read_text(), re.M | re.S)
    done = run("bash", "-euo", "pipefail", "-c", f"export WORK={work}\n{block}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return str(done.stdout)


def test_every_example_has_a_page_and_the_readme_names_it() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    assert names == set(re.findall(r"\]\(examples/(\w+)\)", (ROOT / "README.md").read_text()))
    assert [name for name in sorted(names) if not (EXAMPLES / name / "README.md").exists()] == []


# tests/ray/test_study.py trains this backbone on two workers, tests/unit/model/test_own_backbone.py has its values.
@pytest.mark.slow
def test_a_backbone_from_one_file_is_trained_and_evaluated(smoke: Path, run: Run) -> None:
    printed = follow(run, "add_a_backbone", smoke)
    assert "finished at step" in printed
    record = json.loads((smoke / "cross" / "config.json").read_text())
    assert record["config"]["model"]["backbone"] == "cross_network:CrossNetwork"
    metrics = json.loads((smoke / "cross" / "evaluation-2026-01-04_2026-01-04.json").read_text())
    assert metrics["eval"]["all"]["ctr"]["num_samples"] > 500
    assert metrics["eval"]["all"]["ctr"]["log_loss"] < 0.69


@pytest.mark.slow  # tests/spark/test_own_logs.py builds the same lake, trains on it and scores
def test_a_shop_s_own_files_end_in_scores(run: Run, tmp_path: Path) -> None:
    """With a title, tags, a scaled number and a counter."""
    printed = follow(run, "own_logs", tmp_path)
    assert "warning: data." not in printed
    assert "warning: counters" not in printed
    spec = FeatureSpec.from_json(
        deltalake.DeltaTable(tmp_path / "lake" / "samples").metadata().configuration["usr_ray.feature_spec"]
    )
    assert [f.name for f in spec.lists] == ["tags", "query_terms", "item_terms"]
    assert {f.name: f.scale for f in spec.dense}["price"] == "standard"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    scores = deltalake.DeltaTable(tmp_path / "scores").to_pyarrow_table(columns=["impression_id", "p_ctr", "p_ctcvr"])
    assert metrics["eval"]["all"]["ctr"]["num_samples"] == scores.num_rows > 30
    assert len(set(scores["p_ctr"].to_pylist())) > 10


# tests/spark/test_many_scenarios.py builds five, tests/unit/serving/test_export_model.py serves three; that the page's
# commands can be given is in tests/unit/cluster/test_commands.py.
@pytest.mark.slow
def test_a_third_scenario_has_its_columns_views_and_metrics(run: Run, tmp_path: Path) -> None:
    follow(run, "third_scenario", tmp_path)
    table = deltalake.DeltaTable(tmp_path / "lake" / "samples").to_pyarrow_table(
        columns=["scenario", "is_click", "is_click_global", "basket_history_item_ids"]
    )
    assert set(table["scenario"].to_pylist()) == {"search", "recommendation", "basket"}
    basket = table.filter(pc.equal(table["scenario"], "basket"))
    assert pc.sum(basket["is_click_global"]).as_py() > pc.sum(basket["is_click"]).as_py() > 0
    assert max(map(len, table["basket_history_item_ids"].to_pylist())) > 0
    (split,) = json.loads((tmp_path / "run" / "metrics.json").read_text()).values()
    assert set(split) == {"search", "recommendation", "basket", "global", "all"}
    assert all(split[s]["ctr"]["num_samples"] > 100 for s in ("search", "recommendation", "basket"))


# tests/ray/test_tune.py has the search and what it writes, test_export.py the export, test_score.py the scores.
@pytest.mark.slow
def test_a_search_ends_in_scores_and_an_export(smoke: Path, run: Run) -> None:
    printed = follow(run, "tune_export_score", smoke)
    best = tomllib.loads((smoke / "search" / "best.toml").read_text())
    trained = json.loads((smoke / "tuned" / "config.json").read_text())["config"]
    assert trained["train"]["learning_rate"] == best["train"]["learning_rate"]
    scores = deltalake.DeltaTable(smoke / "scores").to_pyarrow_table(columns=["impression_id", "p_ctr"])
    rows = scores.num_rows
    assert f"{rows:,} scored rows" in printed
    assert rows == len(set(scores["impression_id"].to_pylist())) > 500
    onnxruntime.InferenceSession(smoke / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    spec = FeatureSpec.from_json((smoke / "export" / "feature_spec.json").read_text())
    entries = pq.read_table(smoke / "export" / "vocabularies.parquet", columns=["feature"])
    assert set(entries["feature"].to_pylist()) == {f.name for f in spec.sparse} - {"event_hour"}
