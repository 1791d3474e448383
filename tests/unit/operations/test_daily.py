"""The daily driver with jobs faked at the process boundary: order, resumption, the gate, the lock, what is refused."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import daily as job
from tests.unit.changed_json import refusals
from usr_ray.cli import run_job
from usr_ray.config import UserError, load_config
from usr_ray.data.pins import pin_name
from usr_ray.operations.daily import (
    STEPS,
    DayPlan,
    DayState,
    check_labels,
    judge,
    label_lag,
    newer_in_use,
    plan_day,
    read_current,
    status_table,
)

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
BEGIN = ("data.train_dates=2026-01-01",)
FAKE = """
import json, pathlib, sys, time, datetime as dt
here = pathlib.Path(__file__).resolve().parent.parent
name, words = pathlib.Path(sys.argv[0]).stem, sys.argv[1:]
told = json.loads((here / "told.json").read_text())
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps([name, *words]) + "\\n")
flag = lambda f: words[words.index(f) + 1]
if name == "build_samples":
    reports = pathlib.Path(flag("--lake")) / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    if "--dates" in words:
        first, _, last = flag("--dates").partition(":")
        day = dt.date.fromisoformat(first)
        while day.isoformat() <= last:
            if day.isoformat() in told.get("without", []):
                day += dt.timedelta(days=1)
                continue
            final = 10 if day.isoformat() not in told.get("open", []) else 7
            none = {"rows": {}, "rejects": {}}
            (reports / f"{day}.json").write_text(json.dumps({"date": str(day), "watermark": "W", **none,
                "undated": none, "scenarios": {"search": {"impressions": 10, "mature": final}}}))
            day += dt.timedelta(days=1)
    for name in told.get("final", []) if "--restate" in words else []:
        path = reports / f"{name}.json"
        path.write_text(path.read_text().replace('"mature": 7', '"mature": 10'))
elif name == "evaluate":
    loss = told["loss"][pathlib.Path(flag("--run-dir")).name]
    cell = {"log_loss": loss, "auc": 0.7, "gauc": None, "pcoc": None, "num_samples": 9, "num_positives": 3}
    pathlib.Path(flag("--output")).write_text(json.dumps({"eval": {"all": {"ctr": cell, "ctcvr": cell}}}))
elif name == "train":
    pathlib.Path(flag("--run-dir")).mkdir(parents=True, exist_ok=True)
elif name == "export":
    output = pathlib.Path(flag("--output"))
    output.mkdir(parents=True)
    (output / "manifest.json").write_text(json.dumps(
        {"format": 1, "checkpoint": {"id": pathlib.Path(flag("--run-dir")).name}}))
elif name == "publish" and "publish" not in told.get("exit", {}):
    registry, model = pathlib.Path(flag("--registry")), pathlib.Path(flag("--run-dir")).name
    (registry / "versions" / model).mkdir(parents=True, exist_ok=True)
    (registry / "versions" / model / "version.json").write_text(json.dumps({"format": 3, "model_id": model}))
    pointer = {"stable": model, "before": [], "canary": None, "share": 0.0, "shadow": None}
    (registry / "current.json").write_text(json.dumps(pointer))
print(name, "says something" + "!" * told.get("much", {}).get(name, 0), flush=True)
(here / "up").touch()
time.sleep(told.get("sleep", {}).get(name, 0))
sys.exit(told.get("exit", {}).get(name, 0))
"""


class Shop:
    """A folder with jobs that note how they were called and leave what the real ones leave."""

    def __init__(self, folder: Path) -> None:
        self.root, self.work = folder / "root", folder / "work"
        (self.root / "jobs").mkdir(parents=True)
        for name in ("build_samples", "train", "evaluate", "export", "publish", "score"):
            (self.root / "jobs" / f"{name}.py").write_text(FAKE)
        (folder / "shop.toml").write_text('[data]\ntrain_dates = "2026-01-01"\n')
        self.argv = [
            "--config",
            str(folder / "shop.toml"),
            "--logs",
            str(folder),
            "--lake",
            str(folder / "lake"),
            "--work",
            str(self.work),
            "--spark-submit",
            sys.executable,
        ]
        self.tell(loss={})

    def tell(self, **told: Any) -> None:
        (self.root / "told.json").write_text(json.dumps({"loss": {}, **told}))

    def day(self, date: str, *more: str) -> int:
        try:
            return run_job(job.main, [*self.argv, "--date", date, *more])
        except SystemExit as left:  # a step's code, or that the model was held back
            return int(left.code or 0)

    def calls(self) -> list[list[str]]:
        path = self.root / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def status(self, date: str) -> dict[str, Any]:
        return json.loads((self.work / "days" / date / "status.json").read_text())


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = Shop(tmp_path)
    monkeypatch.setattr(job, "ROOT", shop.root)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    return shop


def names(calls: list[list[str]]) -> list[str]:
    return [call[0] for call in calls]


def setting(call: list[str], key: str) -> str:
    return [word.partition("=")[2] for word in call if word.startswith(f"{key}=")][-1]


def test_dates_are_trained_on_once_and_never_with_labels_that_saw_the_held_out_day() -> None:
    config = load_config(None, BEGIN)
    assert label_lag(config) == 2  # 1 hour + 24 hours
    hours = {"22 hours": 1, "23 hours": 2, "46 hours": 2, "47 hours": 3}  # and the global window of 1
    for window, lag in hours.items():
        assert label_lag(load_config(None, [*BEGIN, f"labels.order_window={window}"])) == lag
    built = {dt.date(2026, 1, n) for n in range(1, 10)}
    plan = plan_day(config, dt.date(2026, 1, 12), built, {"trained_to": "2026-01-05", "run": "runs/2026-01-10"})
    # Day 12: labels of the 10th are final; those of the 7th closed on the 9th, before the 10th began.
    assert (plan.build_first, plan.train_first, plan.train_last, plan.held_out) == (
        "2026-01-10",
        "2026-01-06",
        "2026-01-07",
        "2026-01-10",
    )
    assert plan.warm_start == "runs/2026-01-10"
    again = plan_day(config, dt.date(2026, 1, 12), built, {"trained_to": "2026-01-07", "run": "runs/2026-01-12"})
    assert again.train_first == ""
    first = plan_day(config, dt.date(2026, 1, 6), set(), None)
    assert (first.build_first, first.train_first, first.train_last, first.warm_start) == (
        "2026-01-01",
        "2026-01-01",
        "2026-01-01",
        "",
    )


def test_what_cannot_be_planned_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^data.train_dates is empty; its first date says where "):
        plan_day(load_config(None), dt.date(2026, 1, 6), set(), None)
    with pytest.raises(UserError, match=r"^--date 2025-12-31: lies before 2026-01-01, the first date of data.train_da"):
        plan_day(load_config(None, BEGIN), dt.date(2025, 12, 31), set(), None)
    plan = plan_day(load_config(None, BEGIN), dt.date(2026, 1, 6), set(), None)
    with pytest.raises(
        UserError, match=r"^day 2026-01-06: 2026-01-01 is not in the lake; build it: jobs/build_samples"
    ):
        check_labels([], plan)


def evaluation(ctr: float | None, ctcvr: float | None, auc: float | None = 0.7) -> dict[str, Any]:
    cells = {"ctr": {"log_loss": ctr, "auc": auc}, "ctcvr": {"log_loss": ctcvr, "auc": auc}}
    return {"eval": {"all": cells}}


@pytest.mark.parametrize(
    ("new", "old", "is_good"),
    [
        (evaluation(0.40, 0.10), evaluation(0.40, 0.10), True),
        (evaluation(0.4019, 0.10), evaluation(0.40, 0.10), True),  # within half a percent
        (evaluation(0.4021, 0.10), evaluation(0.40, 0.10), False),
        (evaluation(0.30, 0.11), evaluation(0.40, 0.10), False),  # one task bought with the other
        (evaluation(0.30, None), evaluation(0.40, None), True),  # no orders on the day
        (evaluation(0.30, None), evaluation(0.40, 0.10), False),
        (evaluation(None, None), evaluation(None, None), False),
        (evaluation(0.6, 0.1, auc=0.51), None, True),
        (evaluation(0.6, 0.1, auc=0.5), None, False),
        (evaluation(0.6, 0.1, auc=None), None, False),
    ],
)
def test_the_gate_lets_no_task_get_worse(new: dict[str, Any], old: dict[str, Any] | None, is_good: bool) -> None:
    assert judge(new, old, 0.005)[0] is is_good


def test_a_model_that_was_trained_on_the_day_is_not_judged_on_it() -> None:
    seen = {"about": {"trained_on": "2026-01-05"}, "train": evaluation(0.1, 0.1)["eval"]}
    with pytest.raises(UserError, match=r"^judge: the model in use was trained on 2026-01-05, so that day cannot"):
        judge(evaluation(0.4, 0.1), seen, 0.005)
    with pytest.raises(UserError, match=r"^judge: the new model was trained on 2026-01-05"):
        judge(seen, None, 0.005)


def test_dates_that_are_not_there_are_left_out_of_the_labels_to_check_where_that_is_allowed() -> None:
    plan = plan_day(load_config(None, BEGIN), dt.date(2026, 1, 8), set(), None)
    final = {"watermark": "W", "scenarios": {"search": {"impressions": 10, "mature": 10}}}
    reports = [{"date": date, **final} for date in ("2026-01-01", "2026-01-03", plan.held_out)]
    assert (plan.train_first, plan.train_last) == ("2026-01-01", "2026-01-03")
    with pytest.raises(UserError, match="2026-01-02 is not in the lake"):
        check_labels(reports, plan)
    check_labels(reports, plan, allow_missing=True)
    with pytest.raises(UserError, match=f"{plan.held_out} is not in the lake"):
        check_labels(reports[:2], plan, allow_missing=True)


def test_a_registry_gets_the_model_that_passes_the_gate_or_the_one_in_use_with_the_day_s_events(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = str(tmp_path / "registry")
    shop.tell(loss={"2026-01-06": 0.4}, exit={"publish": 1})
    assert shop.day("2026-01-06", "--registry", registry) == 1
    assert names(shop.calls())[-1] == "publish"
    assert read_current(shop.work) is None  # what failed is not in use anywhere
    shop.tell(loss={"2026-01-06": 0.4, "2026-01-07": 0.9})
    assert shop.day("2026-01-06", "--registry", registry) == 0
    publish, score = shop.calls()
    assert publish == ["publish", "--run-dir", str(shop.work / "runs" / "2026-01-06"), *publish[3:]]
    assert publish[publish.index("--registry") + 1] == registry
    assert "--for-gpu" not in publish
    assert score[0] == "score"
    # Held by the gate: histories and counters of the service must not age for it.
    users = ("--users", "redis://localhost:6379/0")
    assert shop.day("2026-01-07", "--registry", registry, *users, "--for-gpu", "--prune") == 3
    (publish,) = [call for call in shop.calls() if call[0] == "publish"]
    assert publish[publish.index("--run-dir") + 1] == str(shop.work / "runs" / "2026-01-06")
    assert publish[publish.index("--users") + 1] == "redis://localhost:6379/0"
    assert "--for-gpu" in publish
    assert "--prune" in publish
    # Somebody went back to an earlier model by hand: that is theirs to end.
    pointer = tmp_path / "registry" / "current.json"
    (tmp_path / "registry" / "versions" / "old").mkdir()
    (tmp_path / "registry" / "versions" / "old" / "version.json").write_text('{"format": 3, "model_id": "old"}')
    pointer.write_text(pointer.read_text().replace("2026-01-06", "old"))
    shop.tell(loss={"2026-01-06": 0.4, "2026-01-08": 0.9})
    assert shop.day("2026-01-08", "--registry", registry) == 3
    assert "publish" not in names(shop.calls())
    assert "serves another model than runs/2026-01-06, the one in use; it stays" in capsys.readouterr().out


def test_what_a_registry_takes_is_refused_without_one(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.day("2026-01-06", "--users", "redis://localhost:6379/0") == 2
    assert capsys.readouterr().err == (
        "error: --users: is of what --registry publishes; name the registry too, or leave --users out\n"
    )
    for word in ("--for-gpu", "--prune"):
        assert shop.day("2026-01-06", word) == 2
        assert capsys.readouterr().err == (
            f"error: {word}: is of what --registry publishes; name the registry too, or leave {word} out\n"
        )


def test_a_first_day_builds_from_the_beginning_and_publishes(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.tell(loss={"2026-01-06": 0.4})
    assert shop.day("2026-01-06") == 0
    calls = shop.calls()
    assert names(calls) == ["build_samples", "train", "evaluate", "export", "score"]
    build, train, evaluate, _, score = calls
    assert build[build.index("--dates") + 1] == "2026-01-01:2026-01-06"
    assert setting(build, "data.train_dates") == "2026-01-01:2026-01-06"
    assert "--restate" not in build
    assert "restate: skipped, all dates are of this day's build" in (printed := capsys.readouterr().out)
    assert setting(train, "data.train_dates") == "2026-01-01:2026-01-01"
    assert setting(train, "data.eval_dates") == "2026-01-04"
    assert setting(train, "train.warm_start") == ""
    assert evaluate[evaluate.index("--dates") + 1] == "2026-01-04"
    assert score[score.index("--output") + 1] == str(shop.work / "scores" / "2026-01-06")
    current = read_current(shop.work)
    assert current is not None
    assert (current["run"], current["trained_to"], current["before"]) == ("runs/2026-01-06", "2026-01-01", [])
    assert "train says something" in printed
    assert "train says something" in (shop.work / "days" / "2026-01-06" / "train.log").read_text()
    assert shop.day("2026-01-06") == 0  # once more: nothing is left to do
    assert shop.calls() == []


def test_late_events_can_be_looked_for_in_the_last_days_only(shop: Shop) -> None:
    shop.tell(loss={"2026-01-06": 0.4, "2026-01-07": 0.4})
    assert shop.day("2026-01-06") == 0
    shop.calls()
    assert shop.day("2026-01-07", "--restate-days", "3") == 0
    restate = shop.calls()[1]
    assert "--restate" in restate
    assert restate[restate.index("--dates") + 1] == "2026-01-05:2026-01-07"


def test_dates_that_are_there_before_a_first_day_are_looked_at_again(shop: Shop) -> None:
    shop.tell(loss={"2026-01-06": 0.4})
    reports = shop.root.parent / "lake" / "reports"
    reports.mkdir(parents=True)
    (reports / "2026-01-01.json").write_text(
        json.dumps(
            {"date": "2026-01-01", "watermark": "W", "scenarios": {"search": {"impressions": 10, "mature": 10}}}
            | {"rows": {}, "rejects": {}, "undated": {"rows": {}, "rejects": {}}}
        )
    )
    assert shop.day("2026-01-06") == 0
    build, restate = shop.calls()[:2]
    assert build[build.index("--dates") + 1] == "2026-01-02:2026-01-06"
    assert "--restate" in restate
    assert "--dates" not in restate


def test_the_next_day_goes_on_from_the_model_in_use_and_a_worse_one_is_held_back(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.tell(loss={"2026-01-06": 0.4, "2026-01-07": 0.5, "2026-01-08": 0.3})
    assert shop.day("2026-01-06") == 0
    shop.calls()
    assert shop.day("2026-01-07") == 3
    calls = shop.calls()
    assert names(calls) == ["build_samples", "build_samples", "train", "evaluate", "evaluate", "score"]
    assert "--restate" in calls[1]
    assert calls[0][calls[0].index("--dates") + 1] == "2026-01-07:2026-01-07"
    assert setting(calls[2], "train.warm_start") == str(shop.work / "runs" / "2026-01-06")
    assert calls[-1][calls[-1].index("--run-dir") + 1] == str(shop.work / "runs" / "2026-01-06")
    assert shop.status("2026-01-07")["verdict"]["why"].startswith("ctr log loss 0.50000, in use 0.40000")
    assert shop.day("2026-01-08") == 0
    train = shop.calls()[2]
    assert setting(train, "data.train_dates") == "2026-01-02:2026-01-03"  # also what the held model had learned from
    capsys.readouterr()
    assert run_job(job.main, ["--work", str(shop.work), "--status"]) == 0
    table = capsys.readouterr().out
    assert "2026-01-07" in table
    assert "held" in table
    assert "in use: runs/2026-01-08" in table


def test_a_failed_step_ends_with_its_code_and_the_same_command_goes_on_there(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, expected in ((2, 2), (1, 1), (137, 1)):
        shop.tell(loss={"2026-01-06": 0.4}, exit={"train": code})
        assert shop.day("2026-01-06") == expected
        assert f"stopped, step train ended with exit code {code}" in capsys.readouterr().err
    assert names(shop.calls()) == ["build_samples", "train", "train", "train"]
    assert shop.status("2026-01-06")["steps"]["train"]["status"] == "failed"
    shop.tell(loss={"2026-01-06": 0.4})
    assert shop.day("2026-01-06") == 0
    assert names(shop.calls()) == ["train", "evaluate", "export", "score"]


def test_open_labels_are_not_trained_on(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.tell(open=["2026-01-04"])
    assert shop.day("2026-01-06") == 2
    assert capsys.readouterr().err == (
        "error: day 2026-01-06: labels of 2026-01-04 are final for 7 of 10 rows only (the logs reach to W); wait "
        "for the logs, or name how far they are complete with --watermark; with --restate-days, name so many days that "
        "it is among them\n"
    )
    assert "train" not in names(shop.calls())
    # The ways out of that line lead out: the first day's dates are restated too, and --watermark is of it.
    shop.tell(final=["2026-01-04"], loss={"2026-01-06": 0.4})
    assert shop.day("2026-01-06", "--watermark", "2026-01-07T00:00:00Z") == 0
    calls = shop.calls()
    assert names(calls) == ["build_samples", "train", "evaluate", "export", "score"]
    assert "--restate" in calls[0]
    assert calls[0][calls[0].index("--watermark") + 1] == "2026-01-07T00:00:00Z"


def test_a_day_without_impressions_costs_no_other_day_its_publication(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing happened on the 8th. It would judge on the 10th, and be trained on alone on the 13th."""
    losses = {f"2026-01-{day:02}": 0.4 for day in range(6, 15)}
    registry = ("--registry", str(shop.work.parent / "registry"))
    shop.tell(loss=losses)
    assert [shop.day(f"2026-01-0{day}", *registry) for day in (6, 7)] == [0, 0]
    shop.tell(loss=losses, without=["2026-01-08"])
    assert [shop.day(f"2026-01-{day:02}", *registry, "--allow-missing-dates") for day in (9, 10)] == [0, 0]
    assert "2026-01-10 train: skipped, 2026-01-08, which would judge, has no impressions" in capsys.readouterr().out
    calls = shop.calls()
    assert names(calls)[-4:] == ["build_samples", "build_samples", "publish", "score"]
    assert calls[-2][calls[-2].index("--run-dir") + 1] == str(shop.work / "runs" / "2026-01-09")
    assert [shop.day(f"2026-01-{day}", *registry, "--allow-missing-dates") for day in (11, 12, 13, 14)] == [0] * 4
    assert "2026-01-13 train: skipped, no date of 2026-01-08:2026-01-08 has imp" in capsys.readouterr().out
    train = [call for call in shop.calls() if call[0] == "train"]
    assert [setting(call, "data.train_dates") for call in train] == [
        "2026-01-05:2026-01-06",  # on the 11th: what the 10th could not judge
        "2026-01-07:2026-01-07",
        "2026-01-08:2026-01-09",
    ]
    # Where no date may be missing, the day says so.
    shop.tell(loss=losses)
    (shop.root.parent / "lake" / "reports" / "2026-01-13.json").unlink()
    assert shop.day("2026-01-15", *registry) == 2
    assert "2026-01-13 is not in the lake; build it" in capsys.readouterr().err


def test_dates_that_warm_counters_up_are_waited_for(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.tell(loss={"2026-01-08": 0.4})
    warm = ("--set", "counters.warmup_days=2")
    assert [shop.day(f"2026-01-0{day}", *warm) for day in (6, 7, 8)] == [0, 0, 0]
    assert "2026-01-07 train: skipped, counters.warmup_days = 2 leaves out all dates before 2026-01-03" in (
        capsys.readouterr().out
    )
    assert [call[0] for call in shop.calls() if call[0] in ("train", "evaluate")] == ["train", "evaluate"]


def test_open_labels_of_a_later_day_are_restated_again(shop: Shop) -> None:
    shop.tell(loss={"2026-01-06": 0.4})
    assert shop.day("2026-01-06") == 0
    shop.tell(open=["2026-01-05"], loss={"2026-01-07": 0.4})
    report = shop.root.parent / "lake" / "reports" / "2026-01-05.json"
    whole = report.read_text()
    report.write_text(whole.replace('"mature": 10', '"mature": 7'))
    shop.calls()
    assert [shop.day("2026-01-07"), shop.day("2026-01-07")] == [2, 2]
    assert names(shop.calls()) == ["build_samples", "build_samples", "build_samples"]
    shop.tell(final=["2026-01-05"], loss={"2026-01-07": 0.4, "2026-01-06": 0.4})
    assert shop.day("2026-01-07") == 0
    assert names(shop.calls()) == ["build_samples", "train", "evaluate", "evaluate", "export", "score"]


def test_steps_can_be_run_one_by_one_in_order(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.tell(loss={"2026-01-06": 0.4})
    assert shop.day("2026-01-06", "--step", "train") == 2
    assert capsys.readouterr().err == "error: --step train: build of 2026-01-06 is not done; run it first\n"
    assert [shop.day("2026-01-06", "--step", step) for step in STEPS] == [0] * len(STEPS)
    assert names(shop.calls()) == ["build_samples", "train", "evaluate", "export", "score"]


def test_an_older_model_can_be_put_into_use_again(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.tell(loss={"2026-01-06": 0.4, "2026-01-07": 0.3})
    assert [shop.day(date) for date in ("2026-01-06", "2026-01-07")] == [0, 0]
    shop.calls()
    assert run_job(job.main, ["--work", str(shop.work), "--use", "2026-01-06"]) == 0
    current = read_current(shop.work)
    assert current is not None
    assert current["run"] == "runs/2026-01-06"
    assert [before["run"] for before in current["before"]] == ["runs/2026-01-06", "runs/2026-01-07"]
    capsys.readouterr()
    assert run_job(job.main, ["--work", str(shop.work), "--use", "2026-01-05"]) == 2
    assert capsys.readouterr().err == (
        f"error: --use 2026-01-05: {shop.work} has no exported model of that day, with its run and its "
        "days/2026-01-05; there are: 2026-01-06, 2026-01-07\n"
    )
    # What has been cleared away in part cannot be gone back to, and is not offered.
    shutil.rmtree(shop.work / "runs" / "2026-01-07")
    assert run_job(job.main, ["--work", str(shop.work), "--use", "2026-01-07"]) == 2
    assert capsys.readouterr().err.endswith("there are: 2026-01-06\n")
    shutil.rmtree(shop.work / "days")
    assert run_job(job.main, ["--work", str(shop.work), "--use", "2026-01-06"]) == 2
    assert capsys.readouterr().err.endswith("there are: none\n")


def test_an_older_model_is_put_into_use_in_the_registry_too(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, lake = ("--registry", str(tmp_path / "registry")), ("--lake", str(tmp_path / "lake"))
    pointer = tmp_path / "registry" / "current.json"
    shop.tell(loss={"2026-01-06": 0.4, "2026-01-07": 0.3})
    assert [shop.day(date, *registry) for date in ("2026-01-06", "2026-01-07")] == [0, 0]
    assert json.loads(pointer.read_text())["stable"] == "2026-01-07"
    shop.calls()
    back = ("--work", str(shop.work), "--use", "2026-01-06")
    # Without --lake nothing is changed anywhere; nor where the publication fails.
    assert run_job(job.main, [*back, *registry]) == 2
    assert capsys.readouterr().err == (
        f"error: --use 2026-01-06: --registry {registry[1]} gets a version of that model; name its --lake too\n"
    )
    shop.tell(exit={"publish": 1})
    with pytest.raises(SystemExit, match="1"):
        run_job(job.main, [*back, *registry, *lake])
    current = read_current(shop.work)
    assert current is not None
    assert current["run"] == "runs/2026-01-07"
    shop.calls()
    shop.tell()
    assert run_job(job.main, [*back, *registry, *lake, "--users", "redis://localhost:6379/0", "--for-gpu"]) == 0
    (publish,) = shop.calls()
    run_dir = str(shop.work / "runs" / "2026-01-06")
    users = ("--users", "redis://localhost:6379/0")
    assert publish == ["publish", "--run-dir", run_dir, *lake, *registry, *users, "--for-gpu"]
    assert json.loads(pointer.read_text())["stable"] == "2026-01-06"
    current = read_current(shop.work)
    assert current is not None
    assert current["run"] == "runs/2026-01-06"
    # The registry is another matter without --registry, and that is said.
    capsys.readouterr()
    assert run_job(job.main, ["--work", str(shop.work), "--use", "2026-01-07"]) == 0
    assert capsys.readouterr().out.endswith(
        "the registry serves on what it did; to publish this model there: the same command with --registry and --lake\n"
    )
    assert json.loads(pointer.read_text())["stable"] == "2026-01-06"


def test_an_older_day_that_is_repeated_does_not_replace_a_newer_model(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of its steps had failed when the later day ran."""
    losses = {f"2026-01-{day:02}": 0.4 for day in range(9, 20)}
    for late, failed in ((11, "build_samples"), (13, "evaluate"), (15, "export")):
        shop.tell(loss=losses)
        assert shop.day(f"2026-01-{late - 1}") == 0
        shop.tell(loss=losses, exit={failed: 1})
        assert shop.day(f"2026-01-{late}") == 1
        begun = shop.work / "runs" / f"2026-01-{late}"
        pin = shop.root.parent / "lake" / "pins" / f"{pin_name(begun)}.json"  # as a training that was killed leaves one
        pin.parent.mkdir(exist_ok=True)
        pin.touch()
        shop.tell(loss=losses)
        assert shop.day(f"2026-01-{late + 1}") == 0
        shop.calls()
        assert shop.day(f"2026-01-{late}") == 0
        calls = names(shop.calls())
        assert calls[-1] == "score"
        assert not {"train", "evaluate", "export"} & set(calls)
        assert pin.exists() == begun.exists(), "a run that is gone holds no files"
        current = read_current(shop.work)
        assert current is not None
        assert current["run"] == f"runs/2026-01-{late + 1}"
        assert current["trained_to"] == f"2026-01-{late + 1 - 5:02}"
    assert (
        "judge: skipped, runs/2026-01-14, the model in use, was trained up to 2026-01-09, this one to 2026-01-08"
        in (capsys.readouterr().out)
    )


def test_a_day_that_was_begun_goes_on_from_the_model_that_was_put_into_use_since(shop: Shop) -> None:
    losses = {"2026-01-10": 0.4, "2026-01-11": 0.4, "2026-01-12": 0.4}
    shop.tell(loss=losses)
    assert [shop.day(date) for date in ("2026-01-10", "2026-01-11")] == [0, 0]
    shop.tell(loss=losses, exit={"train": 1})
    assert shop.day("2026-01-12") == 1
    begun = shop.work / "runs" / "2026-01-12" / "config.json"
    begun.write_text("{}")
    train = shop.calls()[-1]
    assert setting(train, "train.warm_start") == str(shop.work / "runs" / "2026-01-11")
    assert run_job(job.main, ["--work", str(shop.work), "--use", "2026-01-10"]) == 0
    shop.tell(loss=losses)
    assert shop.day("2026-01-12") == 0
    train = shop.calls()[0]
    assert train[0] == "train"
    assert setting(train, "train.warm_start") == str(shop.work / "runs" / "2026-01-10")
    assert setting(train, "data.train_dates") == "2026-01-06:2026-01-07"  # that model knows the dates up to the 5th
    assert not begun.exists()  # jobs/train.py would refuse to go on with a run from another model
    assert shop.status("2026-01-12")["plan"]["build_first"] == "2026-01-12"


def test_the_held_out_day_judges_and_does_not_choose_the_epoch(shop: Shop) -> None:
    shop.tell(loss={"2026-01-06": 0.4})
    assert shop.day("2026-01-06", "--set", "train.early_stopping=true") == 0
    assert setting(shop.calls()[1], "train.early_stopping") == "false"


def test_restated_days_must_reach_the_day_that_judges(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.day("2026-01-06", "--restate-days", "2") == 2
    assert capsys.readouterr().err == (
        "error: --restate-days 2: labels are final after 2 days, and the day that judges is so old; name 3 or more, or "
        "leave it out\n"
    )
    assert shop.calls() == []


def test_two_cannot_run_and_a_step_that_outlives_its_driver_keeps_the_lock(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.tell(sleep={"build_samples": 8})
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from pathlib import Path; from jobs import daily; "
        "from usr_ray.cli import run_job; daily.ROOT = Path(sys.argv.pop(1)); sys.exit(run_job(daily.main))"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT), str(shop.root), *shop.argv, "--date", "2026-01-06"],
        stdout=subprocess.DEVNULL,
    )
    end = time.monotonic() + 60
    while not (shop.root / "up").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert shop.day("2026-01-06") == 2
    assert f"a daily run is under way (pid {driver.pid} on " in capsys.readouterr().err


def test_a_full_disk_ends_the_step_too(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody would read what it says, and it would keep the lock."""
    shop.tell(loss={"2026-01-06": 0.4}, much={"build_samples": 1 << 20}, sleep={"build_samples": 60})
    log = shop.work / "days" / "2026-01-06" / "build.log"
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    started = time.monotonic()
    assert shop.day("2026-01-06") == 2
    assert time.monotonic() - started < 30
    assert "error: storage: cannot be read or written ([Errno 28] No space left on device)" in capsys.readouterr().err
    log.unlink()
    shop.tell(loss={"2026-01-06": 0.4})
    assert shop.day("2026-01-06") == 0, "the lock is free"


def test_what_is_missing_or_damaged_is_one_line(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(job.main, ["--work", str(shop.work)]) == 2
    assert capsys.readouterr().err == "error: daily.py: --config is missing; see --help\n"
    shop.work.mkdir()
    (shop.work / "current.json").write_text("{")
    assert shop.day("2026-01-06") == 2
    line = capsys.readouterr().err
    assert "current.json: is not readable JSON (Expecting property name enclosed in double quotes: line 1 " in line
    assert "; remove it, and put a day's model into use again (--use)" in line


def test_a_status_or_a_pointer_that_was_changed_is_one_line(shop: Shop) -> None:
    shop.tell(loss={"2026-01-06": 0.5})
    assert shop.day("2026-01-06") == 0
    current, status = shop.work / "current.json", shop.work / "days" / "2026-01-06" / "status.json"
    plan = DayPlan(**json.loads(status.read_text())["plan"])

    def read() -> None:
        status_table(shop.work)
        newer_in_use(plan, read_current(shop.work))
        plan_day(load_config(None, BEGIN), dt.date(2026, 1, 7), [], read_current(shop.work))
        state = DayState(shop.work, "2026-01-06")
        assert state.record["plan"] is None or state.plan(plan)
        assert state.verdict in ("promoted", "x", "")
        assert [state.is_over(step) for step in STEPS]

    for path, least in ((current, 30), (status, 60)):
        lines = refusals(path, read)
        assert len(lines) >= least
        assert all(line.startswith(f"{path}: is ") and "; remove it, " in line for line in lines)
