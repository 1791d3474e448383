"""What the report of a search says before its tables; the trials that judge the choice are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.study_runs import SETS, rows, write_study
from usr_ray.config import load_config
from usr_ray.evaluation.metrics import log_loss
from usr_ray.experiments.space import Choice, TriedPoint, final_study
from usr_ray.reporting.search import write_search_report

pytestmark = pytest.mark.integration

SPACE = 'tune.space={"model.embedding_dim" = {kind = "choice", values = [8, 16]}}'


def page_of(run_dir: Path, metric: str, num_epochs: int, *, dim: int) -> str:
    given = load_config(None, [*SETS, SPACE, f"tune.metric={metric}", "tune.final_seeds=[0, 1]"])
    point = TriedPoint("t_0", {"model.embedding_dim": dim}, (0.5,) * num_epochs, num_epochs)
    choice = Choice(point, 0.5, num_epochs)
    study = final_study(given, choice)
    write_study(run_dir / "final", study, {"given": 0.5, "tuned": 2.5}, "configuration")
    result = SimpleNamespace(points=[point], choice=choice, study=study)
    return write_search_report(run_dir, given, result).read_text(encoding="utf-8")  # type: ignore[arg-type]


def test_a_choice_by_log_loss_is_judged_by_log_loss_too(tmp_path: Path) -> None:
    page = page_of(tmp_path / "loss", "log_loss", 1, dim=8)
    means = []
    for noise in (2.5, 0.5):
        found = [rows(noise, seed) for seed in (0, 1)]
        own = found[0].scenario_N == 0
        means.append(sum(log_loss(p.labels_NT[own, 0], p.probs_NT[own, 0]) or 0.0 for p in found) / 2)
    assert f"means over the seeds: {means[0]:.4f} against {means[1]:.4f} in search CTR, " in page
    assert "Log loss on those dates" not in page_of(tmp_path / "auc", "ctr_auc", 1, dim=8)


def test_a_choice_of_what_was_given_says_so(tmp_path: Path) -> None:
    given = load_config(None, SETS)
    own, epochs = given.model.embedding_dim, given.train.num_epochs
    says = "That is the configuration as given: the search found nothing better"
    assert says in page_of(tmp_path / "same", "ctr_auc", epochs, dim=own)
    assert says not in page_of(tmp_path / "other", "ctr_auc", epochs + 1, dim=own)
