"""Real rows from their files to a trained model: rows, duplicates, rejects and labels add up to independent counts.

As `make demo` has them (tests/e2e/test_real_logs.py), without its processes, its report and most users of KuaiRand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from tests.real_logs import check_kuairand, check_kuaisearch, some_of_kuairand
from tests.spark.test_joint_sources import build, ingest, run_steps
from usr_ray.config import Config, load_config

pytestmark = pytest.mark.spark

ROOT = Path(__file__).resolve().parents[2]
REAL_LOGS = ROOT.parent / "shared" / "data"
needs_real_logs = pytest.mark.skipif(
    not REAL_LOGS.is_dir(), reason="the real logs are not beside the project (shared/data)"
)


def trained(spark: SparkSession, source: str, folder: Path, work: Path, *sets: str) -> dict[str, Any]:
    """Logs, lake (<work>/lake) and model of the source's own configuration; the held-out metrics."""
    config: Config = load_config(ROOT / "jobs" / "configs" / f"{source}.toml", (*sets, "train.reader_threads=1"))
    ingest(source, folder, work / "logs", config)
    first, last = config.data.train_dates.partition(":")[0], config.data.eval_dates.rpartition(":")[2]
    build(spark, config, work / "logs", work / "lake", f"{first}:{last}")
    result, _ = run_steps(config, work / "lake", work / "run")
    assert result.status == "finished"
    assert result.evaluation is not None
    return dict(result.evaluation.metrics or {})


@needs_real_logs
def test_a_twentieth_of_kuairand_s_users_add_up_and_are_learned_from(spark: SparkSession, tmp_path: Path) -> None:
    """That with the one impression whose two rows differ in is_click."""
    source = some_of_kuairand(REAL_LOGS / "kuairand-pure", tmp_path / "users", one_of=20, rest=13)
    # Smaller batches: so few rows make as many steps as a model needs that is better than chance.
    smaller = ("train.global_batch_size=64", "model.contrastive.group_size=64")
    # Eight of the 138 long views on the rarest tabs have no click: 5.8 %, where all users together are below the 5 %.
    metrics = trained(spark, "kuairand", source, tmp_path, *smaller, "limits.max_reject_share=0.1")
    check_kuairand(tmp_path / "lake", source, num_rows=4_674)
    assert metrics["all"]["ctr"]["auc"] > 0.6


@needs_real_logs
def test_kuaisearch_adds_up_and_is_learned_from(spark: SparkSession, tmp_path: Path) -> None:
    source = REAL_LOGS / "kuaisearch-demo"
    metrics = trained(spark, "kuaisearch", source, tmp_path)
    check_kuaisearch(tmp_path / "lake", source)
    assert metrics["search"]["ctr"]["num_samples"] > 0
