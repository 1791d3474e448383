"""A search without Ray: dates kept apart, spaces checked, the best trial, a TOML file that reads back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from usr_ray.config import Config, ConfigError, load_config
from usr_ray.config.training import SpaceConfig
from usr_ray.experiments.grid import expand
from usr_ray.experiments.space import (
    Choice,
    TriedPoint,
    TuneError,
    choose,
    choosing_dates,
    config_toml,
    default_point,
    final_study,
    importance,
    load_search,
    search_resources,
    trial_config,
)

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
DATES = ("data.train_dates='2026-01-01:2026-01-06'", "data.eval_dates='2026-01-07:2026-01-08'")
RATE = 'tune.space={"train.learning_rate" = {kind = "log_uniform", low = 1e-4, high = 1e-2}}'


def config(*overrides: str) -> Config:
    return load_config(None, [*DATES, *overrides])


def test_days_that_choose_are_neither_trained_on_nor_reported_on() -> None:
    given = config("tune.choose_days=2")
    dates = choosing_dates(given)
    assert (dates.train, dates.choose) == ("2026-01-01:2026-01-04", "2026-01-05:2026-01-06")
    own = trial_config(given, {"train.learning_rate": 0.01}, table_version=7)
    assert (own.data.train_dates, own.data.eval_dates) == (dates.train, dates.choose)
    assert (own.data.table_version, own.train.learning_rate, own.train.evaluate_every_epochs) == (7, 0.01, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tune.choose_days=6", RATE], r"tune.choose_days \(6\) leaves none of the days of data.train_dates .*; lower"),
        (["data.eval_dates=''", RATE], r"data.eval_dates is empty; a search needs days to train on"),
        ([], r"tune.space is empty; name keys to try"),
        (['tune.space={"train.learning_rat" = {kind = "int", low = 1, high = 2}}'], r"train.learning_rat: no such key"),
        (['tune.space={"train.seed" = {kind = "int", low = 1, high = 2}}'], r"train.seed: cannot be tuned"),
        (['tune.space={"data.eval_dates" = {kind = "choice", values = ["x"]}}'], r"data.eval_dates: cannot be tuned"),
        *(
            (
                [f'tune.space={{"{key}" = {{kind = "uniform", low = 1, high = 2}}}}'],
                f"{key}: cannot be tuned; tune model",
            )
            for key in ("simulated.similarity", "counters.prior", "limits.max_reject_share", "train.reader_threads")
        ),
        (['tune.space={"train.early_stopping" = {kind = "choice", values = [true]}}'], r"early_stopping: cannot be"),
        ([RATE, "tune.final_seeds=[1, 2, 1]"], r"^tune.final_seeds has doubles: \[1, 2, 1\]"),
        (
            [RATE, "train.early_stopping=true"],
            r"^train.early_stopping would choose the epoch on data.eval_dates, which",
        ),
        (['tune.space={"model.backbone" = {kind = "choice", values = ["ple", "moe"]}}'], r"model.backbone 'moe'"),
        (
            ['tune.space={"model.embedding_dim" = {kind = "uniform", low = 4, high = 8.5}}'],
            r"model.embedding_dim must be a whole number",
        ),
    ],
)
def test_a_mistake_in_a_search_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises((TuneError, ConfigError), match=message):
        load_search(None, [*DATES, *overrides])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{kind = 'log', low = 1, high = 2}", r"kind must be one of log_uniform, uniform, int, choice, got 'log'"),
        ("{kind = 'choice'}", r"values is empty; name the values to choose from"),
        ("{kind = 'uniform', low = 2, high = 1}", r"low \(2\) must be below high \(1\)"),
        ("{kind = 'log_uniform', low = 0, high = 1}", r"low must be positive for log_uniform, got 0"),
        ("{kind = 'int', low = 1.5, high = 3}", r"low and high must be whole numbers for int, got 1.5 and 3"),
        ("{kind = 'int', low = 1, high = 3, values = [1]}", r"values is for kind 'choice'; give low and high"),
    ],
)
def test_a_space_that_cannot_be_drawn_from_is_refused(space: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"tune.space.train.learning_rate.*{message}"):
        config(f'tune.space={{"train.learning_rate" = {space}}}')


def test_a_search_by_a_package_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TuneError, match=r"tune.search is 'optuna' and that package is not installed; set tune.search="):
        load_search(None, [*DATES, RATE, "tune.search='optuna'"])
    assert load_search(None, [*DATES, RATE]).tune.search == "random"
    with pytest.raises(ConfigError, match=r"tune.search must be 'random' or 'optuna', got 'grid'"):
        config("tune.search='grid'")


def test_the_given_configuration_is_tried_first_where_the_space_holds_it() -> None:
    assert default_point(config(RATE)) == {"train.learning_rate": 0.001}
    outside = 'tune.space={"train.learning_rate" = {kind = "uniform", low = 0.1, high = 0.2}}'
    assert default_point(config(outside)) is None


def point(name: str, *curve: float, epochs: int = 3, error: str = "", **values: object) -> TriedPoint:
    return TriedPoint(name, values, curve, epochs, error)


def test_any_epoch_may_be_chosen_when_the_rates_stay() -> None:
    given = config("train.num_epochs=3")
    points = [point("a", 0.5, 0.4, 0.6), point("b", 0.39), point("c", math.nan, error="diverged")]
    best = choose(points, given)
    assert (best.point.trial_id, best.value, best.num_epochs) == ("b", 0.39, 1)
    assert [p.status for p in points] == ["finished", "stopped", "failed"]
    best_auc = choose(points, config("train.num_epochs=3", "tune.metric=ctr_auc"))
    assert (best_auc.point.trial_id, best_auc.value, best_auc.num_epochs) == ("a", 0.6, 3)


def test_with_a_schedule_only_a_whole_run_stands_for_itself() -> None:
    given = config("train.num_epochs=3", "train.schedule=cosine")
    best = choose([point("a", 0.5, 0.4, 0.6), point("b", 0.39)], given)
    assert (best.point.trial_id, best.value, best.num_epochs) == ("a", 0.6, 3)
    assert choose([point("a", 0.5, 0.4, 0.6, **{"train.schedule": "none"})], given).num_epochs == 2


def test_a_search_of_failures_says_what_they_failed_of() -> None:
    with pytest.raises(TuneError, match=r"no trial has a log_loss on the choosing dates \(diverged\)"):
        choose([point("a", error="diverged"), point("b", error="diverged")], config())
    with pytest.raises(TuneError, match=r"choosing dates \(diverged; undefined there: a label is missing\)"):
        choose([point("a", error="diverged"), point("b", math.nan, math.nan)], config())


def test_importance_by_hand() -> None:
    space = {"x": SpaceConfig(kind="uniform", low=0, high=9), "c": SpaceConfig(kind="choice", values=("u", "v"))}
    # x orders the trials exactly; c splits the ranks 1..6 into {1, 2, 3} and {4, 5, 6}: eta^2 = 13.5 / 17.5. Adjusted
    # for two means of six trials: 1 - 4 / 17.5 x 5 / 4.
    points = [point(str(n), 0.1 * n, x=float(n**2), c="u" if n <= 3 else "v") for n in range(1, 7)]
    scored = [Choice(p, p.curve[0], 1) for p in points]
    found = importance(scored, space)
    assert found == pytest.approx({"x": 1.0, "c": math.sqrt(1 - 5 / 17.5)})
    assert list(found) == ["x", "c"]
    assert importance(scored[:4], space) == {}


def test_a_choice_of_many_values_is_not_important_by_its_number_of_values() -> None:
    """Of 200 searches in which nothing matters, the choice of six comes first in hardly more than the half."""
    space = {"x": SpaceConfig(kind="uniform", high=1), "c": SpaceConfig(kind="choice", values=(1, 2, 3, 4, 5, 6))}
    rng = np.random.default_rng(0)
    is_first = []
    for _ in range(200):
        points = [point(str(n), rng.random(), x=rng.random(), c=int(rng.integers(1, 7))) for n in range(16)]
        found = importance([Choice(p, p.curve[0], 1) for p in points], space)
        is_first.append(0.5 if found["x"] == found["c"] else float(found["c"] > found["x"]))
    assert np.mean(is_first) < 0.7  # 0.92 without the adjustment
    alone = [Choice(point(str(n), 0.1 * n, x=0.5, c=n), 0.1 * n, 1) for n in range(1, 7)]
    assert importance(alone, space) == {"x": 0, "c": 0}, "one value, and a value a trial, tell nothing"


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_a_written_configuration_reads_back_equal(path: Path, tmp_path: Path) -> None:
    given = load_config(path, [RATE, "data.eval_dates=''", 'logs.orders.columns={"user_id"=\'Kunde "A"\'}'])
    written = tmp_path / "best.toml"
    written.write_text(config_toml(given, comment="Chosen.\nTwice."), encoding="utf-8")
    assert written.read_text(encoding="utf-8").startswith("# Chosen.\n# Twice.\n")
    assert load_config(written) == given


def test_the_choice_is_judged_against_the_given_configuration_on_the_reporting_dates() -> None:
    given = config(RATE, "tune.final_seeds=[4, 5]", "train.num_epochs=3")
    choice = choose([point("a", 0.5, 0.4, 0.6, **{"train.learning_rate": 0.002})], given)
    study = final_study(given, choice)
    assert [(t.point["configuration"], t.seed) for t in expand(study)] == [
        ("given", 4),
        ("tuned", 4),
        ("given", 5),
        ("tuned", 5),
    ]
    tuned = expand(study)[1].overrides
    assert tuned == {"train.learning_rate": 0.002, "train.num_epochs": 2, "train.seed": 4}
    assert not any(key.startswith("data.") for key in tuned), "trained on all of the dates, reported on eval_dates"


@pytest.mark.parametrize(("num_workers", "of_a_trial"), [(0, 1), (1, 1), (2, 2)])
def test_a_trial_of_a_run_without_ray_takes_one_worker(num_workers: int, of_a_trial: int) -> None:
    assert search_resources(config(f"ray.num_workers={num_workers}")).num_workers == of_a_trial
