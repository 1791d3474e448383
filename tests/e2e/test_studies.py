"""A study and a search from the first file to the last, trial by trial in this process (tests/ray has Ray's part)."""

from __future__ import annotations

import contextlib
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from jobs import build_worlds
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.config import Config, UserError, load_config
from usr_ray.experiments import search as tune_module
from usr_ray.experiments import study as study_module
from usr_ray.experiments.grid import (
    SIMULATED,
    Study,
    StudyError,
    Trial,
    compared_labels,
    expand,
    load_study,
    parse_study,
)
from usr_ray.experiments.record import Base
from usr_ray.experiments.search_record import read_points
from usr_ray.experiments.worlds import prepare_worlds
from usr_ray.reporting.search import write_search_report
from usr_ray.reporting.study import write_study_report
from usr_ray.reporting.study_vectors import view_vectors

pytestmark = pytest.mark.e2e

SETS = (
    "data.train_dates='2026-01-01:2026-01-02'",
    "data.eval_dates='2026-01-03'",
    "train.global_batch_size=128",
    "train.checkpoint_every_steps=100",
    "train.log_every_steps=2",
    "train.reader_threads=1",
    "model.hidden=[8]",
    "model.tower_hidden=[4]",
    "model.embedding_dim=4",
    "model.contrastive.group_size=32",
    "ray.dashboard=false",
    "ray.num_workers=0",
)


STUDIES = Path(__file__).resolve().parents[2] / "jobs" / "studies"
TINY_WORLD = {
    "simulated.num_impressions": 3000,
    "simulated.num_days": 4,
    "simulated.num_users": 80,
    "simulated.num_items": 60,
    "simulated.num_queries": 24,
    "simulated.cross_exposure": 0.45,
}


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    write_samples(tmp_path / "lake", samples_spec(label_delay_us=3_600_000_000), num_rows=900, num_days=4)
    return tmp_path / "lake"


def world_lakes(folder: Path, real: bool) -> Callable[..., dict[str, str]]:
    """In place of prepare_worlds: a table with the scenarios of each world, or, if `real`, worlds of Spark's."""

    def prepare(
        study: Study, base: Base, trials: Sequence[Trial], run_dir: Path, input_dir: Path | None, **more: Any
    ) -> Any:
        if real:
            return prepare_worlds(study, base, trials, run_dir, input_dir, build=build_worlds.in_spark)
        worlds = {}
        for trial in trials:
            config, lake = base.config(study.resources, trial), folder / trial.world
            if trial.world not in worlds:
                spec = samples_spec(
                    scenarios=config.scenarios, query_scenarios=config.query_scenarios, label_delay_us=3_600_000_000
                )
                write_samples(lake, spec, num_rows=900, num_days=4)
            worlds[trial.world] = str(lake)
        return worlds

    return prepare


# Spark makes the worlds of one study (tests/unit/etl_sources/test_simulated.py has lost links and what is left of a
# global label, tests/unit/experiments/test_study_run.py the commands); all others' are tables with their scenarios.
DECLARED = [
    *((path.stem, False) for path in sorted(STUDIES.glob("*.toml"))),
    pytest.param("label_quality", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "is_real"), DECLARED)
def test_every_declared_study_runs_and_reports_at_small_scale(
    name: str, is_real: bool, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(name, scale="small", folder=STUDIES, seeds=[0])
    if is_real:
        kept = {"similarity": ("1.0",), "labels": ("clean", "lost 1.0")}
        axes = [replace(a, values={k: a.values[k] for k in kept.get(a.name, a.values)}) for a in study.axes]
        study = replace(study, axes=tuple(axes), world=TINY_WORLD)
    sets = (*SETS, "query_scenarios=[]") if study.source != SIMULATED else SETS
    monkeypatch.setattr(study_module, "prepare_worlds", world_lakes(tmp_path / "lakes", real=is_real))
    result = study_module.run_study(
        study,
        Base(None, sets),
        None if study.has_worlds else str(lake),
        tmp_path / "run",
        input_dir=tmp_path if study.source != SIMULATED else None,
    )
    trials = expand(study)
    assert (result.num_finished, result.failures) == (len(trials), {})
    assert set(pq.read_table(result.results)["trial_id"].to_pylist()) == {trial.trial_id for trial in trials}
    page = write_study_report(tmp_path / "run", study).read_text(encoding="utf-8")
    assert study.title in html.unescape(page)
    assert "At a glance" in page
    assert page.count("<svg") >= 4, "a picture for each scenario and task"
    for comparison in study.comparisons:
        for label, against in compared_labels(study, comparison):
            assert f"{label} against {against}" in page
    if is_real:
        clean, lost = (click_share(tmp_path / "run" / "worlds" / world) for world in sorted({t.world for t in trials}))
        assert clean + 0.05 < lost, "without links the global label is the row's own"


def click_share(world: Path) -> float:
    """P(is_click | is_click_global) of a world, over its dates and scenarios."""
    reports = [json.loads(path.read_text())["scenarios"] for path in (world / "lake" / "reports").glob("*.json")]
    clicks, wider = (sum(s[key] for r in reports for s in r.values()) for key in ("clicks", "clicks_global"))
    return clicks / wider


def pins(lake: Path) -> list[Path]:
    return [p for p in lake.rglob("*.json") if "pin" in p.parent.name]


def test_a_study_trains_compares_draws_and_gives_back_its_pins(lake: Path, tmp_path: Path) -> None:
    # Each step multiplies the weights by -999,999: a loss that is not a number, and a trial that fails on purpose.
    wild = {"train.learning_rate": 1000.0, "train.weight_decay": 1000.0, "train.gradient_clip": 0.0}
    axis = {"name": "cl", "values": {"with": {}, "rate": wild}}
    raw = {
        "seeds": [0],
        "slices": True,
        "representations": True,
        "axes": [axis],
        "comparisons": [{"axis": "cl", "against": "with"}],
    }
    study, run_dir = parse_study(raw, name="small", scale="full"), tmp_path / "run"
    first = study_module.run_study(study, Base(None, SETS), str(lake), run_dir)
    ((failed, why),) = first.failures.items()
    assert (first.num_finished, failed.startswith("rate-s0-")) == (1, True)
    assert "diverged" in why
    assert len(pins(lake)) > 0, "the failed trial may be tried again, on the same files"
    page = write_study_report(run_dir, study).read_text(encoding="utf-8")
    assert "i by PCA: with" in page
    assert failed in page

    off = {"model.contrastive.interest_weight": 0.0, "model.contrastive.feature_weight": 0.0}
    calm = {**raw, "axes": [{"name": "cl", "values": {"with": {}, "rate": off}}]}
    study = parse_study(calm, name="small", scale="full")
    second = study_module.run_study(study, Base(None, SETS), str(lake), run_dir)
    assert (second.num_finished, second.failures) == (2, {})
    assert not [p for p in pins(lake) if p.name.startswith("run-")]
    page = write_study_report(run_dir, study).read_text(encoding="utf-8")
    assert "user seen in training" in page
    (with_loss,) = (run_dir / "trials").glob("with-s0-*")
    vectors = view_vectors(with_loss, num_rows=50)
    assert {name: v.shape[:2] for name, v in vectors.items()} == {"i": (50, 2), "f": (50, 2)}


def test_a_study_needs_a_lake_or_makes_its_own(lake: Path, tmp_path: Path) -> None:
    plain = parse_study({"seeds": [0], "axes": [{"name": "x", "values": {"only": {}}}]}, name="p", scale="full")
    with pytest.raises(StudyError, match=r"--lake is missing: study p trains on a table of jobs/build_samples.py"):
        study_module.run_study(plain, Base(None, SETS), None, tmp_path / "run")
    axis = {"name": "s", "path": "simulated.similarity", "values": [0.0], "world": True}
    worlds = parse_study({"seeds": [0], "axes": [axis]}, name="w", scale="full")
    with pytest.raises(StudyError, match=r"study w makes worlds of its own; leave --lake out"):
        study_module.run_study(worlds, Base(None, SETS), str(lake), tmp_path / "run")
    with pytest.raises(UserError, match=r"--lake: no Delta table at .*pond/samples"):
        study_module.run_study(plain, Base(None, SETS), str(tmp_path / "pond"), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "or the next command would be told that it names another lake"


def test_a_search_chooses_judges_and_reports(lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[dict[str, float]] = []
    drawn: list[dict[str, Any]] = [{"model.embedding_dim": 4}, {"model.embedding_dim": 8}]

    def search_here(config: Config, lake: str, run_dir: Path, version: int) -> list[Any]:
        for n, values in enumerate(drawn):
            context = SimpleNamespace(get_trial_id=lambda n=n: f"t_{n:05d}")
            monkeypatch.setattr(tune_module.tune, "get_context", lambda context=context: context)
            tune_module.run_drawn(
                values, config=config.to_dict(), lake=lake, folder=str(run_dir / "trials"), version=version
            )
        return read_points(run_dir / "trials", config)

    monkeypatch.setattr(tune_module.tune, "report", reports.append)
    monkeypatch.setattr(tune_module, "_search", search_here)
    sets = (*SETS, "tune.final_seeds=[0]", 'tune.space={"model.embedding_dim" = {kind = "int", low = 4, high = 8}}')
    monkeypatch.setattr(tune_module, "ray_session", lambda *_, **__: contextlib.nullcontext())
    result = tune_module.run_search(Base(None, sets), str(lake), tmp_path / "run")
    assert [report["epoch"] for report in reports] == [1, 1], "what ASHA counts by"
    assert [report["log_loss"] for report in reports] == pytest.approx([point.curve[0] for point in result.points])
    best = load_config(result.best_config)
    assert best.model.embedding_dim == result.choice.point.values["model.embedding_dim"]
    assert (best.data.train_dates, best.data.eval_dates) == ("2026-01-01:2026-01-02", "2026-01-03")
    trained = json.loads((tmp_path / "run" / "trials" / "t_00000" / "config.json").read_text())["config"]["data"]
    assert (trained["train_dates"], trained["eval_dates"]) == ("2026-01-01:2026-01-01", "2026-01-02:2026-01-02")
    assert result.final.failures == {}
    assert not pins(lake)
    page = write_search_report(tmp_path / "run", load_config(None, sets), result).read_text(encoding="utf-8")
    assert "Trials by parallel coordinates" in page
    assert "2026-01-03, which no trial has seen" in page
