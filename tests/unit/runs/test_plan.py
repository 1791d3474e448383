"""What is checked and pinned before Ray starts: messages, the same rows on resume, the files of a run directory."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pytest

from tests.unit.samples_table import samples_arrow, samples_spec, write_samples
from usr_ray.cli import run_job
from usr_ray.config import Config, UserError, load_config
from usr_ray.data.lineage import doubts
from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.launch.environment import ADDRESS, OWN, SUBMITTED, prepare_environment
from usr_ray.runs import plan as trainer_plan
from usr_ray.runs.evaluations import evaluations, manifest_path, trained_dates, trained_on, warm_start_dates
from usr_ray.runs.plan import RunPlan, load_manifest, mark_finished, plan_run, write_plan
from usr_ray.schema import FITTED_PROPERTY, DenseFeature

pytestmark = pytest.mark.unit

BASE = (
    "data.train_dates='2026-01-01:2026-01-02'",
    "data.eval_dates='2026-01-03:2026-01-03'",
    "train.global_batch_size=64",
    "model.contrastive.group_size=16",
)


def config(*overrides: str) -> Config:
    return load_config(None, [*BASE, *overrides])


@pytest.fixture(scope="module")
def shared_lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lake = tmp_path_factory.mktemp("lake")
    write_samples(lake, samples_spec(), num_rows=400, num_days=5)
    return lake


@pytest.fixture
def lake(shared_lake: Path, tmp_path: Path) -> Path:
    """A table of the test's own, so that it may change it."""
    return Path(shutil.copytree(shared_lake, tmp_path / "lake"))


def started(lake: Path, run_dir: Path, *overrides: str) -> RunPlan:
    plan = plan_run(config(*overrides), lake, run_dir, command=["train"])
    write_plan(plan)
    return plan


def finish(plan: RunPlan, *, outcome: str, step: int) -> None:
    """As a training does at its end."""
    (plan.run_dir / "metrics.json").touch()
    mark_finished(plan, outcome=outcome, step=step)


def test_the_record_says_how_well_the_rows_are_mixed(shared_lake: Path, tmp_path: Path) -> None:
    dates = ("data.train_dates='2026-01-01:2026-01-04'", "data.eval_dates=''")
    shuffled, by_date = (
        plan_run(config(*dates, f"train.order={order}"), shared_lake, tmp_path / order).record["shuffle"]
        for order in ("shuffled", "by_date")
    )
    assert (shuffled["order"], by_date["order"]) == ("shuffled", "by_date")
    # Three dates of about 80 rows whose labels are final: one block, mixed as a whole, or by date each in its third.
    assert abs(shuffled["correlation"]) < 0.3 < 0.8 < by_date["correlation"]
    assert shuffled["neighbour_distance"] > 0.8 > by_date["neighbour_distance"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train_dates=''"], r"data.train_dates is empty; .*--set data.train_dates="),
        (["train.early_stopping=true", "data.eval_dates=''"], r"train.early_stopping watches data.eval_dates"),
        (["data.train_dates='2025-01-01:2025-01-02'"], r"no rows in 2025-01-01:2025-01-02.*2026-01-01:2026-01-05"),
        (["data.eval_dates='2027-01-01:2027-01-02'"], r"no rows in 2027-01-01:2027-01-02"),
        (["scenarios=['search', 'live']"], r"scenarios: the configuration has \['search', 'live'\], the table"),
        (["train.warm_start='nowhere'"], r"train.warm_start /\S+/nowhere: is no run directory with a whole checkpoint"),
        (
            ["train.warm_start='s3://shop/run'"],
            r"train.warm_start s3://shop/run: must be a place in a file system, not",
        ),
        (
            ["train.reader_cache='s3://shop/x'"],
            r"train.reader_cache s3://shop/x: must be a place in a file system, not",
        ),
        (["train.reader_cache='~/x'"], r"train.reader_cache ~/x: no shell has replaced the ~, and a folder would get"),
        (["ray.num_workers=5"], r"5 workers cannot share a global batch of 4 groups.*lower ray.num_workers"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    shared_lake: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run_job(lambda argv: plan_run(config(*overrides), shared_lake, run_dir) and None, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not run_dir.exists()


def test_dates_without_rows_are_refused_or_recorded_as_left_out(shared_lake: Path, tmp_path: Path) -> None:
    asked = "data.train_dates='2025-12-30:2026-01-02'"
    refusal = r"^data.train_dates 2025-12-30:2026-01-02: 2 of these 4 dates have no rows: 2025-12-30:2025-12-31; the "
    with pytest.raises(UserError, match=refusal):
        plan_run(config(asked), shared_lake, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    allowed = config(asked, "data.allow_missing_dates=true")
    plan = plan_run(allowed, shared_lake, tmp_path / "run")
    assert plan.record["manifests"]["train"]["dates"] == plan.record["trained_dates"] == "2026-01-01:2026-01-02"
    write_plan(plan)
    again = plan_run(config(asked), shared_lake, tmp_path / "run")  # a run keeps its rows: nothing to allow any more
    assert again.record["manifests"] == plan.record["manifests"]


@pytest.mark.parametrize(
    ("fitted", "overrides", "words"),
    [
        ("2026-01-01:2026-01-02", [], []),
        ("", [], []),  # a table of before there was the property
        ("2026-01-01", [], [r"data.train_dates: values that only 2026-01-02 has are unknown ids, .*2026-01-01\);"]),
        ("2026-01-01:2026-01-05", [], [r"data.eval_dates: .* fitted on 2026-01-03 too, which is held out"]),
        (
            "2026-01-01:2026-01-02",
            ["vocabulary.min_count=7"],
            [r"vocabulary.min_count: the configuration has 7, the table was last built with 2, which holds"],
        ),
        (
            "2026-01-01:2026-01-02",
            ["data.final_labels='all'"],
            [r"no row of 2026-01-02 is trained on, .* end of 2026-01-02 .*25 hours.*; .*data.final_labels='clicks'"],
        ),
    ],
)
def test_what_would_be_a_wrong_number_without_a_word_is_a_warning(
    lake: Path, tmp_path: Path, fitted: str, overrides: list[str], words: list[str]
) -> None:
    if fitted:
        properties = {FITTED_PROPERTY: json.dumps({"dates": fitted, "min_count": 2})}
        deltalake.DeltaTable(lake / "samples").alter.set_table_properties(properties, raise_if_not_exists=False)
    plan = started(lake, tmp_path / "run", "data.final_labels='clicks'", *overrides)
    assert len(plan.doubts) == len(words)
    assert all(re.search(word, doubt) for word, doubt in zip(words, plan.doubts, strict=True)), plan.doubts
    again = plan_run(config("data.final_labels='clicks'", *overrides), lake, tmp_path / "run")
    assert again.doubts == plan.doubts, "the saved manifest knows it too"
    warm = replace(plan.config, train=replace(plan.config.train, warm_start="yesterday"))
    told = doubts(warm, plan.train_manifest, plan.eval_manifest, first_counted=None)
    assert told == [doubt for doubt in plan.doubts if "held out" not in doubt], "its table has grown"


@pytest.mark.parametrize(("first_counted", "warmup_days"), [("2025-12-25", 0), ("2026-01-01", 0), ("2026-01-01", 1)])
def test_counters_with_nothing_behind_them_are_a_warning(tmp_path: Path, first_counted: str, warmup_days: int) -> None:
    spec = samples_spec()
    counter = DenseFeature(name="counter_item_1d_clicks", column="counter_item_1d_clicks", owner="item", scale="none")
    settings = config("data.final_labels='clicks'", 'counters.item={keys=["item_id"]}')
    write_samples(tmp_path / "lake", replace(spec, dense=(*spec.dense, counter)), num_rows=400, num_days=5)
    dates = [dt.date.fromisoformat(first_counted), dt.date(2026, 1, 3)]
    table = pa.table({"name": ["*", "*"], "event_date": dates})
    deltalake.write_deltalake(tmp_path / "lake" / "counters", table, partition_by=["event_date"])
    plan = plan_run(
        replace(settings, counters=replace(settings.counters, warmup_days=warmup_days)),
        tmp_path / "lake",
        tmp_path / "run",
    )
    found = [doubt for doubt in plan.doubts if doubt.startswith("counters: nothing lies behind 2026-01-01")]
    assert len(found) == (first_counted == "2026-01-01" and not warmup_days)
    shutil.rmtree(tmp_path / "lake" / "counters")  # a copy of the samples alone can be trained on
    assert not [
        doubt for doubt in plan_run(settings, tmp_path / "lake", tmp_path / "run").doubts if "counters" in doubt
    ]


def test_dates_that_a_warm_start_has_seen_are_no_held_out_dates(tmp_path: Path) -> None:
    """Through two runs, by their records; and not where the configuration has been edited since."""
    for name, dates, warm_start in (("a", "2026-01-01:2026-01-02", ""), ("b", "2026-01-03", "a")):
        (tmp_path / name).mkdir()
        parts = {
            "data": {"train_dates": dates},
            "train": {"warm_start": str(tmp_path / warm_start) if warm_start else ""},
        }
        (tmp_path / name / "config.json").write_text(json.dumps({"config": parts}))
    every = {"2026-01-01", "2026-01-02", "2026-01-03"}
    assert trained_dates(tmp_path / "b") == every
    checkpoint = tmp_path / "b" / "checkpoints" / "best-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"config": parts}))
    assert warm_start_dates(str(checkpoint)) == every
    record = {"config": {"data": {"train_dates": "2030-01-01"}}, "trained_dates": "2026-01-01, 2026-01-04"}
    (tmp_path / "b" / "config.json").write_text(json.dumps(record))
    assert trained_dates(tmp_path / "b") == {"2026-01-01", "2026-01-04"}
    assert warm_start_dates("") == warm_start_dates(str(tmp_path / "gone")) == frozenset()


@pytest.mark.parametrize("copied", ["checkpoints/best-00000003", "."])
@pytest.mark.parametrize("is_older", [False, True])
def test_a_copied_checkpoint_still_knows_its_dates(tmp_path: Path, copied: str, is_older: bool) -> None:
    """`is_older`: a state of before 30 November 2026 has the configuration alone, its warm start the other dates."""
    copy, before = tmp_path / "models", tmp_path / "before"
    before.mkdir()
    (before / "config.json").write_text(json.dumps({"trained_dates": "2026-01-01"}))
    parts = {"data": {"train_dates": "2026-01-02"}, "train": {"warm_start": str(before)}}
    state = {"config": parts} if is_older else {"config": parts, "trained_dates": "2026-01-01:2026-01-02"}
    checkpoint = tmp_path / "run" / "checkpoints" / "best-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    torn = checkpoint.with_name("best-00000002")
    torn.mkdir()
    (torn / "state.json").write_text("{")
    shutil.copytree(tmp_path / "run" / copied, copy)
    shutil.rmtree(tmp_path / "run")
    assert warm_start_dates(str(copy)) == {"2026-01-01", "2026-01-02"}


@pytest.mark.parametrize(
    ("dates", "why"),
    [
        (["2026-01-06", "2026-01-07"], ""),
        (["2026-01-05", "2026-01-06"], "2026-01-05"),
        (["2026-01-02"], "2026-01-02"),
        (["2026-01-01"], "dates after these (to 2026-01-05)"),
        (["2026-01-03", "2026-01-06"], "dates after these (to 2026-01-05)"),  # one between two that were trained on
        ([], ""),
    ],
)
def test_held_out_dates_come_after_all_that_is_trained_on(dates: list[str], why: str) -> None:
    """Histories of a row hold the clicks of the dates before it."""
    assert trained_on(dates, {"2026-01-02", "2026-01-04", "2026-01-05"}) == why
    assert trained_on(dates, ()) == ""


def test_the_newest_evaluation_of_a_copied_run_is_the_one_that_was_made_last(tmp_path: Path) -> None:
    """A copy's files are as old as the copy, in any order; one of an older version says no time and goes by its own."""
    names = ("auc", "gauc", "log_loss", "pcoc")
    task = dict.fromkeys(names, None) | {"num_samples": 0, "num_positives": 0}
    cells = {"all": {"ctr": task, "ctcvr": task}}
    for day, hour, copied_s in ((4, "09", 30), (5, "11", 10), (6, "10", 20)):
        about = {"dates": f"2026-01-0{day}", "evaluated_at": f"2026-01-09T{hour}:00:00Z"}
        path = tmp_path / f"evaluation-2026-01-0{day}_2026-01-0{day}.json"
        path.write_text(json.dumps({"about": about, "eval": cells}))
        os.utime(path, (copied_s, copied_s))
    (old := tmp_path / "evaluation-2026-01-03_2026-01-03.json").write_text(json.dumps({"eval": cells}))
    between_s = dt.datetime(2026, 1, 9, 10, 30, tzinfo=dt.UTC).timestamp()
    os.utime(old, (between_s, between_s))
    assert [one.file[19:21] for one in evaluations(tmp_path, {})] == ["05", "03", "06", "04"]


def test_no_table_names_the_job_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Delta table at .*; run jobs/build_samples.py"):
        plan_run(config(), tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_that_never_matured_are_refused(tmp_path: Path) -> None:
    write_samples(tmp_path / "lake", samples_spec(label_delay_us=10**15), num_rows=200, num_days=3)
    with pytest.raises(UserError, match=r"none of the .* rows is mature"):
        plan_run(config(), tmp_path / "lake", tmp_path / "run")


def test_held_out_dates_without_a_final_label_are_refused_before_anything_is_trained(
    lake: Path, tmp_path: Path
) -> None:
    deltalake.DeltaTable(lake / "samples").update({"is_mature": "false"}, predicate="impression_date = '2026-01-03'")
    with pytest.raises(UserError, match=r"2026-01-03 to 2026-01-03: none of the .* rows is mature; .* earlier dates"):
        plan_run(config("data.mature_only=false"), lake, tmp_path / "run")


def test_held_out_dates_without_a_row_of_the_only_scenario_are_refused(lake: Path, tmp_path: Path) -> None:
    gone = "impression_date = '2026-01-03' AND scenario = 'search'"
    deltalake.DeltaTable(lake / "samples").delete(gone)
    alone = ("model.multitask.enabled=false",)
    with pytest.raises(
        UserError, match=r"data.eval_dates 2026-01-03:2026-01-03: no row is of data.only_scenario 'search'; name"
    ):
        plan_run(config("data.only_scenario=search", *alone), lake, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    plan_run(config("data.only_scenario=recommendation", *alone), lake, tmp_path / "run")


def test_a_run_dir_must_be_a_folder_that_can_be_written(shared_lake: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder that can be written"):
        plan_run(config(), shared_lake, tmp_path / "file" / "run")
    with pytest.raises(UserError, match="must be a folder that every machine of the cluster sees"):
        plan_run(config(), shared_lake, "s3://bucket/run")


def test_a_run_dir_of_something_else_is_refused(shared_lake: Path, tmp_path: Path) -> None:
    for text, message in (("{", "is not readable JSON"), ("{}", r"is damaged \(config is missing\)")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"{message}.*use another --run-dir"):
            plan_run(config(), shared_lake, tmp_path)


def test_the_plan_is_written_whole(lake: Path, tmp_path: Path) -> None:
    plan = started(lake, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"] == plan.config.to_dict()
    assert record["table"] == {"uri": str(lake / "samples"), "version": plan.train_manifest.version}
    assert record["manifests"]["train"]["sha256"] == plan.train_manifest.sha256
    assert record["manifests"]["eval"]["first_date"] == "2026-01-03"
    assert {"torch", "ray", "deltalake", "pyarrow", "python", "usr_ray"} <= set(record["packages"])
    assert [attempt["command"] for attempt in record["attempts"]] == [["train"]]
    assert load_manifest(tmp_path / "run", "train") == plan.train_manifest
    left = sorted(os.listdir(tmp_path / "run"))
    assert left == ["config.json", "manifest-eval.json", "manifest-train.json"]


def test_without_held_out_dates_there_is_no_held_out_manifest(lake: Path, tmp_path: Path) -> None:
    assert started(lake, tmp_path / "run", "data.eval_dates=''").eval_manifest is None
    assert not manifest_path(tmp_path / "run", "eval").exists()


def test_the_same_command_reads_the_same_rows_after_the_table_moved_on(lake: Path, tmp_path: Path) -> None:
    first = started(lake, tmp_path / "run")
    more = samples_arrow(samples_spec(), num_rows=90, num_days=5, seed=7)
    deltalake.write_deltalake(str(lake / "samples"), more, mode="append")
    again = started(lake, tmp_path / "run")
    assert again.train_manifest == first.train_manifest
    assert again.eval_manifest == first.eval_manifest
    assert len(again.record["attempts"]) == 2
    fresh = plan_run(config(), lake, tmp_path / "other")
    assert fresh.train_manifest.sha256 != first.train_manifest.sha256


def append_rows(lake: Path, *, seed: int = 7) -> None:
    more = samples_arrow(samples_spec(), num_rows=90, num_days=5, seed=seed)
    deltalake.write_deltalake(str(lake / "samples"), more, mode="append")


def test_a_run_reads_the_version_that_is_asked_for(lake: Path, tmp_path: Path) -> None:
    old = started(lake, tmp_path / "run")
    append_rows(lake)
    version = old.train_manifest.version
    pinned = started(lake, tmp_path / "pinned", f"data.table_version={version}")
    assert pinned.train_manifest.sha256 == old.train_manifest.sha256
    assert pinned.eval_manifest is not None
    assert pinned.eval_manifest.version == version
    assert started(lake, tmp_path / "newest").train_manifest.version == version + 1
    with pytest.raises(UserError, match=r"samples: the Delta table cannot be opened at version 99"):
        plan_run(config("data.table_version=99"), lake, tmp_path / "none")


def test_a_run_stays_on_its_version_and_another_one_is_refused(lake: Path, tmp_path: Path) -> None:
    plan = started(lake, tmp_path / "run")
    version = plan.train_manifest.version
    append_rows(lake)
    finish(plan, outcome="finished", step=7)
    assert plan_run(config(f"data.table_version={version}"), lake, tmp_path / "run").is_finished, (
        "asked for what it has"
    )
    with pytest.raises(
        UserError,
        match=rf"holds a run on version {version} of the table, this command has data.table_version = {version + 1}; "
        "leave it out to go on with that run, or use another --run-dir",
    ):
        plan_run(config(f"data.table_version={version + 1}"), lake, tmp_path / "run")


def test_a_table_that_advances_while_a_run_is_planned_gives_both_splits_one_version(
    lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_then_advance(*arguments: Any, **options: Any) -> Manifest:
        built = build_manifest(*arguments, **options)
        append_rows(lake, seed=built.version)
        return built

    monkeypatch.setattr(trainer_plan, "build_manifest", build_then_advance)
    plan = plan_run(config(), lake, tmp_path / "run")
    assert plan.eval_manifest is not None
    assert plan.eval_manifest.version == plan.train_manifest.version


def test_a_lake_that_was_moved_is_recognised_and_another_one_refused(lake: Path, tmp_path: Path) -> None:
    first = started(lake, tmp_path / "run")
    moved = Path(shutil.move(lake, tmp_path / "moved"))
    again = plan_run(config(), moved, tmp_path / "run")
    assert again.train_manifest.sha256 == first.train_manifest.sha256
    assert again.train_manifest.table_uri == str(moved / "samples")
    write_samples(tmp_path / "foreign", samples_spec(), num_rows=300, num_days=5, seed=3)
    with pytest.raises(UserError, match=r"holds other rows than .*; name that lake, or use another --run-dir"):
        plan_run(config(), tmp_path / "foreign", tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("data.train_dates='2026-01-01:2026-01-01'", "data.train_dates"),
        ("data.eval_dates=''", "data.eval_dates"),
        ("model.embedding_dim=8", "model.embedding_dim"),
        ("train.seed=5", "train.seed"),
        ("train.early_stopping=true", "train.early_stopping"),  # its best checkpoint is the run's result
    ],
)
def test_another_run_is_refused_in_the_same_directory(lake: Path, tmp_path: Path, override: str, found: str) -> None:
    started(lake, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match=rf"holds a run with {found} = .*; set it back .*or use another --run-dir"):
        plan_run(config(override), lake, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_keys_that_came_with_a_newer_version_do_not_end_an_older_run(lake: Path, tmp_path: Path) -> None:
    """What an older version did not know, it did as the default does."""
    finish(started(lake, tmp_path / "run"), outcome="finished", step=7)
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    del (
        record["config"]["data"]["mature_only"],
        record["config"]["model"]["interest"],
        record["config"]["train"]["order"],
    )
    record["config"]["counters"]["windows"] = ["1d", "7d", "all"]  # the default then, without effect
    path.write_text(json.dumps(record))
    assert plan_run(config(), lake, tmp_path / "run").is_finished
    with pytest.raises(UserError, match=r"holds a run with train.order = 'shuffled', this command has 'by_date'"):
        plan_run(config("train.order=by_date"), lake, tmp_path / "run")


def test_a_finished_run_stays_finished_unless_it_is_to_train_more(lake: Path, tmp_path: Path) -> None:
    plan = started(lake, tmp_path / "run")
    assert not plan_run(config(), lake, tmp_path / "run").is_finished
    finish(plan, outcome="finished", step=7)
    again = plan_run(config("ray.num_workers=1"), lake, tmp_path / "run")
    assert again.is_finished
    assert again.record["step"] == 7
    assert not plan_run(config("train.num_epochs=3"), lake, tmp_path / "run").is_finished


def test_a_run_that_trains_on_has_no_result_meanwhile_and_notes_what_it_changed(lake: Path, tmp_path: Path) -> None:
    """Metrics of the weights that it had would stand beside those that it has then."""
    run_dir = tmp_path / "run"
    finish(started(lake, run_dir), outcome="finished", step=7)
    for name in ("metrics.json", "predictions.parquet"):
        (run_dir / name).touch()
    longer = plan_run(config("train.num_epochs=3", "train.learning_rate=0.5"), lake, run_dir, command=["longer"])
    assert (run_dir / "metrics.json").exists(), "nothing is written yet"
    write_plan(longer)
    assert not list(run_dir.glob("metrics.json")) + list(run_dir.glob("predictions.parquet"))
    record = json.loads((run_dir / "config.json").read_text())
    assert record["status"] == "running"
    assert not {"outcome", "step", "ended"} & set(record)
    first, second = record["attempts"]
    assert first.keys() == {"started", "command"}
    assert second["command"] == ["longer"]
    assert second["changed"] == {"train.num_epochs": [1, 3], "train.learning_rate": [0.001, 0.5]}


def test_a_run_with_weights_goes_on_whatever_became_of_what_it_began_with(
    lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, before = tmp_path / "run", tmp_path / "before"
    asked: list[str] = []
    monkeypatch.setattr(trainer_plan, "check_warm_start", lambda config, _: asked.append(config.train.warm_start))
    override = f"train.warm_start={before}"

    def seen(trained_dates: str) -> str:
        before.mkdir(exist_ok=True)
        (before / "config.json").write_text(json.dumps({"trained_dates": trained_dates}))
        return str(started(lake, run_dir, override).record["trained_dates"])

    assert seen("2025-12-30:2025-12-31") == "2025-12-30:2026-01-02"
    assert seen("2025-12-31") == "2025-12-31:2026-01-02", "it has yet to begin, from what is there now"
    assert asked == [str(before)] * 2
    checkpoint(run_dir, 3, epoch=0, epoch_step=3)
    assert seen("2026-01-03") == "2025-12-31:2026-01-02", "its weights have not seen that, the held-out date"
    shutil.rmtree(before)
    assert plan_run(config(override), lake, run_dir).record["trained_dates"] == "2025-12-31:2026-01-02"
    assert asked == [str(before)] * 2


def test_workers_find_the_cache_where_the_command_named_it_and_it_may_move(
    lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = started(lake, tmp_path / "run", "train.reader_cache=cache")
    assert plan.config.train.reader_cache == str(tmp_path / "cache")
    finish(plan, outcome="finished", step=7)
    checkpoint(tmp_path / "run", 7, epoch=0, epoch_step=7)
    assert plan_run(config("train.reader_cache=elsewhere"), lake, tmp_path / "run").is_finished


def checkpoint(run_dir: Path, step: int, *, epoch: int, epoch_step: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"cursor": {"epoch": epoch, "step": epoch_step}}))


@pytest.mark.parametrize("outcome", ["finished", "early_stopped", None])
def test_settings_that_no_step_would_be_trained_with_are_refused(
    lake: Path, tmp_path: Path, outcome: str | None
) -> None:
    """config.json would say them of weights that were trained otherwise. None: killed between last step and result."""
    run_dir = tmp_path / "run"
    plan = started(lake, run_dir, "train.num_epochs=2")
    step = -(-plan.train_manifest.num_rows // 64)
    checkpoint(run_dir, 2 * step, epoch=1, epoch_step=step)
    (torn := run_dir / "checkpoints" / "step-00000099").mkdir()
    (torn / "state.json").write_text("{")
    if outcome:
        finish(plan, outcome=outcome, step=2 * step)
    before = (run_dir / "config.json").read_bytes()
    for override, saved, here in (
        ("train.learning_rate=0.5", "0.001", "0.5"),
        ("train.precision=bf16", "'float32'", "'bf16'"),
    ):
        key = override.partition("=")[0]
        more = "" if outcome == "early_stopped" else "raise train.num_epochs to train on, "
        refusal = (
            f"holds a run that was trained to its end with {key} = {saved}, this command has {here}; set it back, "
        )
        with pytest.raises(UserError, match=re.escape(f"{refusal}{more}or use another --run-dir")):
            plan_run(config("train.num_epochs=2", override), lake, run_dir)
    with pytest.raises(
        UserError, match=r"has begun its epoch 2, this command has train.num_epochs = 1; name at least 2"
    ):
        plan_run(config("train.num_epochs=1"), lake, run_dir)
    assert (run_dir / "config.json").read_bytes() == before
    assert plan_run(config("train.num_epochs=2"), lake, run_dir).is_finished == bool(outcome)
    if outcome != "early_stopped":
        assert not plan_run(config("train.num_epochs=3", "train.learning_rate=0.5"), lake, run_dir).is_finished


def test_a_run_under_way_may_have_other_settings_but_not_fewer_epochs_than_it_has_begun(
    lake: Path, tmp_path: Path
) -> None:
    started(lake, tmp_path / "run", "train.num_epochs=5")
    checkpoint(tmp_path / "run", 7, epoch=2, epoch_step=1)
    assert plan_run(config("train.num_epochs=3", "train.learning_rate=0.5"), lake, tmp_path / "run")
    with pytest.raises(
        UserError, match=r"has begun its epoch 3, this command has train.num_epochs = 2; name at least 3"
    ):
        plan_run(config("train.num_epochs=2"), lake, tmp_path / "run")


def test_alone_everything_stays_on_the_loopback_with_a_token_of_the_owners(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    environment = {"RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": "mine"}
    assert prepare_environment(environment) == OWN
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "mine"
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    first = token.read_text()
    token.chmod(0o644)
    prepare_environment(environment)
    assert token.read_text() == first
    assert token.stat().st_mode & 0o077 == 0


def test_inside_a_cluster_its_network_and_token_are_left_alone() -> None:
    environment = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert prepare_environment(environment) == ADDRESS
    assert "RAY_AUTH_MODE" not in environment
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in environment
    assert "PYTHONPATH" not in environment
    job = {"RAY_ADDRESS": "x", "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"working_dir": "gcs://a"}})}
    assert prepare_environment(job) == SUBMITTED
