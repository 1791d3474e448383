"""A search on the tests' own Ray: three trials, one of them failing, going on, and trials on two workers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.ray.conftest import OVERRIDES
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.config import load_config
from usr_ray.experiments.record import Base

pytestmark = pytest.mark.ray

SETS = (
    *OVERRIDES,
    "train.num_epochs=2",
    "tune.num_trials=3",
    "tune.final_seeds=[0]",
    'tune.space={"train.learning_rate" = {kind = "choice", values = [0.001, 1000.0]}, '
    '"model.embedding_dim" = {kind = "int", low = 4, high = 8}}',
    "tune.seed=3",
    "train.gradient_clip=0.0",
    "train.weight_decay=1.0",  # at the larger rate each step multiplies the weights by -999: a trial that fails
)


@pytest.fixture
def own_lake(tmp_path: Path) -> Path:
    write_samples(tmp_path / "lake", samples_spec(), num_rows=1500, num_days=6)
    return tmp_path / "lake"


def test_a_search_keeps_failures_chooses_on_its_own_dates_and_writes_a_configuration(
    cluster: None, own_lake: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from usr_ray.experiments.search import run_search

    run_dir = tmp_path / "Suche für 北京 #1"
    result = run_search(Base(None, (*SETS, "ray.num_workers=1")), str(own_lake), run_dir)
    assert [point.status for point in result.points].count("failed") >= 1
    assert any("diverged" in point.error for point in result.points)
    printed = "".join(capfd.readouterr())
    assert re.search(r"\] \w+ FAILED: step \d+: the loss is .* so the run has diverged", printed), "in one line"
    assert "Traceback" not in printed
    assert result.points[0].values == {"train.learning_rate": 0.001, "model.embedding_dim": 8}, "as given, first"
    trained = json.loads((run_dir / "trials" / result.choice.point.trial_id / "config.json").read_text())
    assert trained["config"]["data"]["train_dates"] == "2026-01-01:2026-01-02"
    assert trained["config"]["data"]["eval_dates"] == "2026-01-03:2026-01-03"
    best = load_config(result.best_config)
    assert best.data.eval_dates == "2026-01-04:2026-01-04"
    assert best.train.learning_rate == 0.001
    assert best.model.embedding_dim == result.choice.point.values["model.embedding_dim"]
    assert (result.final.num_finished, result.final.failures) == (2, {})
    # Once more: nothing is trained again, the same is chosen.
    files = {p: p.stat().st_mtime_ns for p in run_dir.glob("trials/*/metrics.json")}
    again = run_search(Base(None, (*SETS, "ray.num_workers=1")), str(own_lake), run_dir)
    assert again.choice == result.choice
    assert files == {p: p.stat().st_mtime_ns for p in run_dir.glob("trials/*/metrics.json")}


@pytest.mark.slow  # tests/ray/test_study.py has a trial of two workers
def test_trials_of_two_workers_each_take_turns_on_two_cpus(cluster: None, own_lake: Path, tmp_path: Path) -> None:
    """One of a search and then two of a study: trials that wait for each other's CPUs would wait for ever."""
    from usr_ray.experiments.search import run_search

    sets = (
        *OVERRIDES,
        "train.num_epochs=1",
        "tune.num_trials=1",
        "tune.final_seeds=[0]",
        'tune.space={"model.embedding_dim" = {kind = "int", low = 4, high = 8}}',
    )
    result = run_search(Base(None, (*sets, "ray.num_workers=2")), str(own_lake), tmp_path / "search")
    assert [point.status for point in result.points] == ["finished"]
    assert (result.final.num_finished, result.final.failures) == (2, {})
    trials = tmp_path / "search" / "final" / "trials"
    records = [json.loads(path.read_text()) for path in trials.glob("*/config.json")]
    assert [record["config"]["ray"]["num_workers"] for record in records] == [2, 2]
    assert not list(trials.glob("*/checkpoints")), "a finished trial's checkpoints take room for nothing"


def test_optuna_tries_the_given_configuration_first_and_then_draws_inside_the_space() -> None:
    pytest.importorskip("optuna", reason="Optuna is an extra: pip install '.[optuna]'")
    from usr_ray.config.training import METRICS
    from usr_ray.experiments.search import _search_algorithm, draw

    config = load_config(None, [*SETS, "tune.search='optuna'"])
    search = _search_algorithm(config, slots=2)
    space = {path: draw(of) for path, of in config.tune.space.items()}
    assert search.set_search_properties(config.tune.metric, METRICS[config.tune.metric], space)
    first = search.suggest("a")
    assert first == {"train.learning_rate": 0.001, "model.embedding_dim": 8}
    assert search.suggest("b")["model.embedding_dim"] in range(4, 9)
    assert search.suggest("c") is None, "two trials at once"
    search.on_trial_complete("a", {"log_loss": 0.5})
    assert search.suggest("c")["train.learning_rate"] in (0.001, 1000.0)
