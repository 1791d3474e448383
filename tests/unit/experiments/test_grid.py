"""Grids of studies: what they expand into, which ids trials have, what is refused."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest

from usr_ray.cli import EXIT_USER_ERROR, run_job
from usr_ray.config import ConfigError, load_config
from usr_ray.experiments.grid import (
    SCALES,
    StudyError,
    as_sets,
    compared_labels,
    expand,
    load_study,
    parse_study,
    toml_value,
)

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
STUDIES = ROOT / "jobs" / "studies"
RAW: dict[str, Any] = {
    "title": "Two by two",
    "seeds": [3, 5],
    "base": {"train.num_epochs": 4, "model": {"dropout": 0.1}},
    "axes": [
        {"name": "backbone", "path": "model.backbone", "values": ["mmoe", "ple"]},
        {"name": "glmt", "values": {"off": {"model.multitask.enabled": False}, "on": {}}},
    ],
    "comparisons": [{"axis": "glmt", "against": "off"}],
    "small": {"seeds": [7], "base": {"train.num_epochs": 1}, "axes": {"backbone": ["ple"]}},
}


def test_every_point_comes_with_every_seed_and_the_first_seed_first() -> None:
    trials = expand(parse_study(RAW, name="two", scale="full"))
    assert [(t.point["backbone"], t.point["glmt"], t.seed) for t in trials] == [
        ("mmoe", "off", 3),
        ("mmoe", "on", 3),
        ("ple", "off", 3),
        ("ple", "on", 3),
        ("mmoe", "off", 5),
        ("mmoe", "on", 5),
        ("ple", "off", 5),
        ("ple", "on", 5),
    ]
    assert trials[2].overrides == {
        "train.num_epochs": 4,
        "model.dropout": 0.1,
        "model.backbone": "ple",
        "model.multitask.enabled": False,
        "train.seed": 3,
    }
    config = load_config(None, as_sets(trials[2].overrides))
    assert (config.model.backbone, config.model.dropout, config.train.seed) == ("ple", 0.1, 3)
    assert not config.model.multitask.enabled


def test_the_small_scale_keeps_named_values_and_its_own_seeds() -> None:
    (off, on) = expand(parse_study(RAW, name="two", scale="small"))
    assert (off.point, on.point) == ({"backbone": "ple", "glmt": "off"}, {"backbone": "ple", "glmt": "on"})
    assert off.overrides["train.num_epochs"] == 1
    assert off.overrides["model.dropout"] == 0.1
    assert off.seed == 7


def test_an_id_stays_when_the_grid_grows_and_changes_with_what_is_trained() -> None:
    ids = {t.trial_id for t in expand(parse_study(RAW, name="two", scale="full"))}
    assert len(ids) == 8
    grown = {**RAW, "seeds": [3, 5, 8], "title": "Another", "comparisons": []}
    assert ids < {t.trial_id for t in expand(parse_study(grown, name="other", scale="full"))}
    longer = {**RAW, "base": {"train.num_epochs": 5}}
    assert not ids & {t.trial_id for t in expand(parse_study(longer, name="two", scale="full"))}


def test_worlds_are_shared_by_the_trials_that_differ_in_the_model_alone() -> None:
    raw = {
        "seeds": [0, 1],
        "world": {"simulated.num_impressions": 5000},
        "axes": [
            {"name": "similarity", "path": "simulated.similarity", "values": [0.0, 1.0], "world": True},
            {"name": "backbone", "path": "model.backbone", "values": ["mmoe", "ple"]},
        ],
    }
    trials = expand(parse_study(raw, name="w", scale="full"))
    assert len(trials) == 8
    worlds = {t.world: t.world_overrides for t in trials}
    assert len(worlds) == 2
    assert sorted(w["simulated.similarity"] for w in worlds.values()) == [0.0, 1.0]
    assert all(w["simulated.num_impressions"] == 5000 for w in worlds.values())
    assert all(set(w) == {"simulated.num_impressions", "simulated.similarity"} for w in worlds.values())


def test_a_star_compares_every_other_value() -> None:
    raw = {
        "seeds": [0],
        "axes": [{"name": "d", "path": "model.embedding_dim", "values": [8, 16, 32]}],
        "comparisons": [{"axis": "d", "against": "16"}, {"axis": "d", "of": ["8"], "against": "32"}],
    }
    study = parse_study(raw, name="d", scale="full")
    assert compared_labels(study, study.comparisons[0]) == [("8", "16"), ("32", "16")]
    assert compared_labels(study, study.comparisons[1]) == [("8", "32")]
    assert study.axes[0].numbers == [8.0, 16.0, 32.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": 3}, r"axes must be a list, each begun with \[\[axes\]\], got 3"),
        ({"comparisons": 3}, r"comparisons must be a list, each begun with \[\[comparisons\]\], got 3"),
        ({"comparisons": [3]}, r"comparisons\[0\] must be a section, got 3"),
        ({"small": {"axes": [1]}}, r"small.axes must be a table of axis -> labels, got \[1\]"),
        ({"slices": "yes"}, r"slices must be true or false, got 'yes'"),
        ({"representations": 1}, r"representations must be true or false, got 1"),
        (
            {"axes": [{"name": "x", "path": "a.b", "values": [1], "world": "true"}]},
            r"axes.x.world must be true or false, got 'true'",
        ),
        (
            {"axes": [{"name": "s", "path": "simulated.similarity", "values": [0.0, 1.0]}], "comparisons": []},
            r"^axes.s: simulated.similarity makes no difference between trainings on one table: these are model.\*, "
            r"train.\*, data.train_dates, data.mature_only, data.final_labels, data.only_scenario, features.crosses, "
            r"counters.warmup_days; for a key of the table set world = true$",
        ),
        (
            {"axes": [{"name": "v", "values": {"a": {"vocabulary": {"min_count": 9}}, "b": {}}}], "comparisons": []},
            r"axes.v: vocabulary.min_count makes no difference",
        ),
        *(
            (
                {"axes": [{"name": "x", "path": key, "values": [0, 1], "world": is_world}]},
                f"axes.x: {key} is set by {by}",
            )
            for key, by in (
                ("train.seed", "seeds"),
                ("ray.num_workers", "resources.num_workers"),
                ("ray.cpus_per_worker", "resources.cpus_per_worker"),
                ("data.table_version", "--set, for all trials alike"),
            )
            for is_world in (False, True)
        ),
        (
            {"base": {"ray": {"cpus_per_worker": 2.0}}},
            r"base: ray.cpus_per_worker is set by resources.cpus_per_worker; leave it out",
        ),
        (
            {
                "base": {"data.allow_missing_dates": True, "ray.max_failures": 0, "simulated.num_users": 50},
                "axes": [{"name": "s", "path": "simulated.similarity", "values": [0.0], "world": True}],
                "comparisons": [],
            },
            r"base: simulated.num_users does not reach the worlds, which are built with \[world\]; move it there",
        ),
        (
            {
                "axes": [
                    {"name": "a", "path": "model.dropout", "values": [0.0, 0.3]},
                    {"name": "b", "values": {"x": {"model": {"dropout": 0.1}}, "y": {}}},
                ]
            },
            r"axes: a and b both set model.dropout; leave it to one of them",
        ),
        (
            {"axes": [{"name": "a", "values": {"x": {"model.dropout": 0.1}, "y": {"model": {"dropout": 0.1}}}}]},
            r"axes.a.values: x and y are the same",
        ),
        ({"axes": []}, r"axes is empty; give at least one \[\[axes\]\]"),
        ({"seeds": []}, r"seeds must be a list of whole numbers, for example \[0, 1, 2, 3, 4\], got \[\]"),
        ({"seeds": [1, 1]}, r"seeds has doubles"),
        ({"epochs": 3}, r"unknown key 'epochs' in the study; it has: title, question, seeds"),
        ({"base": {"train.seed": 1}}, r"base: train.seed is set by seeds; leave it out"),
        ({"axes": [{"name": "x"}]}, r"axes.x: give a path and a list of values, or a table of values"),
        ({"axes": [{"name": "x", "path": "a.b", "values": [1, 1]}]}, r"axes.x.values has doubles"),
        (
            {"comparisons": [{"axis": "glmt", "of": ["on", "on"], "against": "off"}]},
            r"comparisons\[0\]: on and off are compared already; leave it out",
        ),
        (
            {"comparisons": [{"axis": "glmt", "against": "on"}, {"axis": "glmt", "against": "off"}]},
            r"comparisons\[1\]: on and off are compared already; leave it out",
        ),
        (
            {"comparisons": [{"axis": "glmt", "of": ["on"], "against": "on"}]},
            r"comparisons\[0\] compares nothing: name in `of` another value than 'on'",
        ),
        (
            {"comparisons": [{"axis": "z", "against": "off"}]},
            r"comparisons\[0\].axis 'z' is no axis; the study has: back",
        ),
        ({"comparisons": [{"axis": "glmt", "against": "of"}]}, r"'of' is not among the values of glmt: off, on"),
        ({"small": {"axes": {"backbone": ["star"]}}}, r"small.axes.backbone: star is not among mmoe, ple"),
        ({"small": {"axes": {"x": ["star"]}}}, r"small.axes.x: no such axis; the study has: backbone, glmt"),
        ({"resources": {"num_workers": 0}}, r"resources.num_workers must be positive, got 0"),
        ({"world": {"simulated.seed": 1}}, r"world or source is set, but no axis has world = true"),
    ],
)
def test_a_mistake_in_a_study_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_study({**RAW, **change}, name="two", scale="small" if "small" in change else "full")


def test_worlds_cannot_be_compared_with_each_other() -> None:
    axis = {"name": "s", "path": "simulated.similarity", "values": [0.0, 1.0], "world": True}
    with pytest.raises(ConfigError, match=r"comparisons\[0\].axis 's' changes the rows: compare at equal worlds"):
        parse_study(
            {"seeds": [0], "axes": [axis], "comparisons": [{"axis": "s", "against": "0.0"}]}, name="w", scale="full"
        )


def test_seeds_of_the_command_line_take_the_place_of_the_files(tmp_path: Path) -> None:
    study = load_study("main", scale="full", folder=STUDIES, seeds=[7, 9])
    assert (study.seeds, len(expand(study))) == ((7, 9), 24)
    with pytest.raises(StudyError, match=r"main\.toml: --seeds has doubles: \[7, 7\]"):
        load_study("main", scale="full", folder=STUDIES, seeds=[7, 7])


def test_the_command_line_sets_what_the_base_of_a_study_says_too(tmp_path: Path) -> None:
    (epochs,) = {t.overrides.get("train.num_epochs") for t in expand(load_study("main", scale="small", folder=STUDIES))}
    assert epochs == 1
    sets = ["train.num_epochs=9"]
    trials = expand(load_study("main", scale="small", folder=STUDIES, sets=sets))
    # Base has --set before the trial's own overrides, which no longer name the key.
    assert {load_config(None, [*sets, *as_sets(t.overrides)]).train.num_epochs for t in trials} == {9}
    world = load_study("joint", scale="full", folder=STUDIES, sets=["simulated.num_users=70"]).world
    assert "simulated.num_users" not in world
    assert "simulated.num_impressions" in world
    assert load_study("main", scale="full", folder=STUDIES, sets=["ray.num_workers=0", "model.dropout=0.1"]) == (
        load_study("main", scale="full", folder=STUDIES)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.backbone=ple", r"main\.toml: --set model.backbone: axis backbone sets it for each trial; leave it out"),
        ("model={backbone = 'ple'}", r"--set model.backbone: axis backbone sets it"),
        ("train.seed=4", r"--set train.seed: is set by seeds; leave it out"),
        ("ray.num_workers=2", r"--set ray.num_workers=2: trials take resources.num_workers, 1; leave it out"),
        ("ray.cpus_per_worker=2.0", r"--set ray.cpus_per_worker=2.0: trials take resources.cpus_per_worker, 1.0"),
    ],
)
def test_what_a_study_sets_itself_is_not_taken_from_the_command_line(given: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load_study("main", scale="full", folder=STUDIES, sets=[given])


def test_an_unknown_study_is_told_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"--study mian: no such study; choose from: ablation, .*main"):
        load_study("mian", scale="full", folder=STUDIES)
    (tmp_path / "bad.toml").write_text("seeds = [")
    with pytest.raises(StudyError, match=r"bad\.toml: not TOML"):
        load_study(str(tmp_path / "bad.toml"), scale="full", folder=STUDIES)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda p: p.stem)
def test_the_declared_studies_make_configurations(path: Path, scale: str) -> None:
    study = load_study(path.stem, scale=scale, folder=STUDIES)
    points = len(list(itertools.product(*(axis.values for axis in study.axes))))
    trials = expand(study)
    for trial in (*trials[:points], *trials[points::points]):  # all points with the first seed, and one with each other
        load_config(ROOT / "jobs" / "configs" / f"{study.source}.toml", as_sets(trial.overrides))
    assert len(study.seeds) >= 5 or scale == "small"
    assert study.comparisons


def test_values_are_written_as_toml_reads_them() -> None:
    assert [toml_value(v) for v in (True, 3, 1e30, 0.05, "a b", [1, 2], ("x",))] == [
        "true",
        "3",
        "1e+30",
        "0.05",
        '"a b"',
        "[1, 2]",
        '["x"]',
    ]
    assert as_sets({"a.b": False}) == ["a.b=false"]


@pytest.mark.parametrize(
    ("job", "arguments", "line"),
    [
        ("study", ["--study", "mian", "--run-dir", "x"], "error: --study mian: no such study; choose from: ablation,"),
        ("study", ["--study", "main"], "error: study.py: the following arguments are required: --run-dir; see --help"),
        (
            "tune",
            ["--lake", ".", "--run-dir", "y"],
            "error: data.train_dates is empty; a search needs days to train on",
        ),
    ],
)
def test_a_wrong_command_is_one_line_and_starts_nothing(
    job: str, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [f"{job}.py"])
    main = importlib.import_module(f"jobs.{job}").main
    assert run_job(main, arguments) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(line)
