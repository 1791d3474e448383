"""A day of operation: which dates to build, train and judge on, what has been done, which model is in use. No torch.

    <work>/lock                       held while a day runs, and while a step that outlived its driver runs
    <work>/current.json               the model in use and those before it
    <work>/days/<date>/status.json    the day's plan and steps;  <step>.log  what a step printed
    <work>/runs/<date>/               run directory;  exports/<date>/  programs;  scores/<date>/  table of that model

For day D, with labels that are final `lag` days after an impression (1 hour + 24 hours: 2 days): the held-out day is
E = D - lag, the newest whose labels are final; training ends at T = E - 1 - lag, so that the labels of T closed before
E began and no label has seen the held-out day. Every date is trained on once, each model going on from the one in use.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from usr_ray.config import DAY_US, Config, UserError, parse_dates
from usr_ray.config.stored import DATE, DATES, NUMBER, Shape, read_json
from usr_ray.files import now, write_whole

STEPS = ("build", "restate", "train", "judge", "export", "publish", "score")
DONE, SKIPPED, RUNNING, FAILED = "done", "skipped", "running", "failed"
PROMOTED, HELD = "promoted", "held"
"""A day's verdict: its model is in use from now on, or the one before stays."""
_ONE_DAY = dt.timedelta(days=1)
_STATUS: Shape = {
    "date": DATE,
    "plan": (
        dict.fromkeys(("day", "build_first", "fit_first", "train_last", "held_out"), DATE)
        | {"train_first": DATES, "warm_start": str},
        None,
    ),
    "steps": {"*": {"status": str, "seconds?": NUMBER}},
    "verdict": ({"verdict": str, "why": str}, None),
}
_CURRENT: Shape = {"run": str, "export": str, "trained_to": DATE, "since": str, "why": str, "before?": [dict]}


@dataclass(frozen=True, slots=True)
class DayPlan:
    """What one day does; ISO dates. Kept in status.json (DayState.plan)."""

    day: str
    build_first: str
    """First date to build; the day itself unless dates before it are missing."""
    fit_first: str
    """First date of the vocabularies and of the first model."""
    train_first: str
    """First date to train on; '' when there is nothing new."""
    train_last: str
    held_out: str
    warm_start: str
    """Run directory below <work> of the model that training continues; '': a first model."""


def label_lag(config: Config) -> int:
    """Whole days after which the logs tell that the labels of a date are final (docs/tables.md, labels 6).

    Of windows of 48 hours 3: the last event of the second day after a date is still a moment before they close.
    """
    return (config.labels.global_window_us + config.labels.order_window_us) // DAY_US + 1


def plan_day(config: Config, day: dt.date, built: Collection[dt.date], current: Mapping[str, Any] | None) -> DayPlan:
    """What there is to do for `day`.

    Args:
        config: its labels and data.train_dates are used, whose first date is where everything begins.
        day: the newest complete day of the logs.
        current: what current.json holds; None: there is none.

    Raises:
        UserError: nothing is built yet and data.train_dates does not say where to begin.
    """
    if not config.data.train_dates:
        raise UserError(
            "data.train_dates is empty; its first date says where the vocabularies and the first model begin"
        )
    begin = parse_dates(config.data.train_dates, where="data.train_dates")[0]
    if day < begin:
        raise UserError(f"--date {day}: lies before {begin}, the first date of data.train_dates; name a later one")
    next_date = max(built) + _ONE_DAY if built else begin
    lag = label_lag(config)
    held_out = day - lag * _ONE_DAY
    last = held_out - (1 + lag) * _ONE_DAY
    first = dt.date.fromisoformat(current["trained_to"]) + _ONE_DAY if current else begin
    return DayPlan(
        day=day.isoformat(),
        build_first=min(day, next_date).isoformat(),
        fit_first=begin.isoformat(),
        train_first=first.isoformat() if first <= last else "",
        train_last=last.isoformat(),
        held_out=held_out.isoformat(),
        warm_start=current["run"] if current else "",
    )


def check_labels(reports: Sequence[Mapping[str, Any]], plan: DayPlan, *, allow_missing: bool = False) -> None:
    """Refuse to train or judge on labels that may still change.

    Args:
        reports: the lake's, from runs.read.read_etl_reports.
        allow_missing: leave out dates to train on that are not built; the held-out day must be.

    Raises:
        UserError: a date that is trained on or held out is not built, or some of its labels are not final.
    """
    by_date = {str(report["date"]): report for report in reports}
    first = dt.date.fromisoformat(plan.train_first)
    trained = [first + n * _ONE_DAY for n in range((dt.date.fromisoformat(plan.train_last) - first).days + 1)]
    for date in [*map(str, trained), plan.held_out]:
        if date not in by_date:
            if allow_missing and date != plan.held_out:
                continue
            raise UserError(
                f"day {plan.day}: {date} is not in the lake; build it: jobs/build_samples.py --dates {date}"
            )
        cells = by_date[date]["scenarios"].values()
        rows, final = (sum(cell[key] for cell in cells) for key in ("impressions", "mature"))
        if final < rows:
            raise UserError(
                f"day {plan.day}: labels of {date} are final for {final:,} of {rows:,} rows only (the logs reach to "
                f"{by_date[date].get('watermark') or 'an unknown time'}); wait for the logs, or name how far they are "
                "complete with --watermark; with --restate-days, name so many days that it is among them"
            )


def nothing_to_learn(reports: Sequence[Mapping[str, Any]], plan: DayPlan, config: Config, counted: str | None) -> str:
    """Why a day has nothing to train on, or nothing to judge by; '' where it has. It goes on with the model in use.

    Args:
        reports: as for `check_labels`.
        config: counters.warmup_days, and whether dates may be missing: one without impressions never gets a report.
        counted: the first date that the lake's counters know; None: the lake has none.
    """
    if not plan.train_first:
        return f"no date up to {plan.train_last} is new to the model in use"
    there = {str(report["date"]) for report in reports}
    first = plan.train_first
    if days := config.counters.warmup_days:
        begin = dt.date.fromisoformat(counted or min(there, default=first)) + days * _ONE_DAY
        if plan.train_last < begin.isoformat():
            return f"counters.warmup_days = {days} leaves out all dates before {begin}"
        first = max(first, begin.isoformat())
    if not config.data.allow_missing_dates:
        return ""
    if plan.held_out not in there:
        return f"{plan.held_out}, which would judge, has no impressions"
    if not any(first <= date <= plan.train_last for date in there):
        return f"no date of {first}:{plan.train_last} has impressions"
    return ""


def judge(candidate: Mapping[str, Any], current: Mapping[str, Any] | None, tolerance: float) -> tuple[bool, str]:
    """Whether a new model replaces the one in use, and why: their log losses on the held-out day.

    Args:
        candidate: the splits of its evaluation file; both models on the same rows.
        current: those of the model in use; None for a first model, which needs an AUC above 0.5.
        tolerance: relative increase of the log loss that is let pass, for each task over all scenarios.

    Raises:
        UserError: one of them was trained on the day.
    """
    for who, splits in (("the new model", candidate), ("the model in use", current or candidate)):
        if "eval" not in splits:
            seen = splits.get("about", {}).get("trained_on", "that day")
            raise UserError(
                f"judge: {who} was trained on {seen}, so that day cannot judge it; name a "
                "later --date, or put an earlier model into use (--use)"
            )
    new = candidate["eval"]["all"]
    if current is None:
        auc = new["ctr"]["auc"]
        return (
            auc is not None and auc > 0.5,
            f"first model, AUC of clicks {'undefined' if auc is None else f'{auc:.4f}'}",
        )
    words, is_good = [], True
    for task, old in current["eval"]["all"].items():
        before, now = old["log_loss"], new[task]["log_loss"]
        if before is None:
            continue
        words.append(f"{task} log loss {'undefined' if now is None else f'{now:.5f}'}, in use {before:.5f}")
        is_good = is_good and now is not None and now <= before * (1 + tolerance)
    return is_good and bool(words), "; ".join(words) or "no task has a log loss"


class DayState:
    """status.json of one day: its plan, and how far each step is."""

    def __init__(self, work: Path, day: str) -> None:
        self.folder = work / "days" / day
        self.path = self.folder / "status.json"
        self.record: dict[str, Any] = {"date": day, "plan": None, "steps": {}, "verdict": None}
        if self.path.exists():
            self.record = _read_status(self.path)

    def plan(self, fresh: DayPlan) -> DayPlan:
        """The plan that the day began with; `fresh` on its first attempt.

        Where another model was put into use before the day's training was over, the training is planned anew, on from
        that model, and what it had begun goes.
        """
        begun = self.record["plan"]
        if begun is None:
            self.record["plan"] = asdict(fresh)
            self._write()
        elif begun["warm_start"] != fresh.warm_start and not self.is_over("train"):
            shutil.rmtree(self.folder.parents[1] / "runs" / fresh.day, ignore_errors=True)
            self.record["plan"] = asdict(replace(fresh, build_first=begun["build_first"]))
            self._write()
        return DayPlan(**self.record["plan"])

    def is_over(self, step: str) -> bool:
        """Done or skipped by an earlier attempt."""
        return self.record["steps"].get(step, {}).get("status") in (DONE, SKIPPED)

    def note(self, step: str, status: str, **more: Any) -> None:
        """Write down how a step stands, with the time."""
        entry = self.record["steps"].setdefault(step, {})
        entry.update(status=status, **{"started" if status == RUNNING else "ended": now()}, **more)
        self._write()

    def repeat(self, step: str, why: str) -> None:
        """A step that is over has to be run once more, even where it was skipped."""
        self.note(step, FAILED, why=why, again=True)

    def decide(self, verdict: str, why: str) -> None:
        """Write down PROMOTED or HELD."""
        self.record["verdict"] = {"verdict": verdict, "why": why}
        self._write()

    @property
    def verdict(self) -> str:
        """PROMOTED, HELD, or '' when no model was judged."""
        return str((self.record["verdict"] or {}).get("verdict", ""))

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.record, indent=2) + "\n")


def read_current(work: Path) -> dict[str, Any] | None:
    """current.json: run and export below <work>, trained_to, since, why, and `before`; None before the first model."""
    path = work / "current.json"
    way_out = "remove it, and put a day's model into use again (--use)"
    return read_json(path, _CURRENT, way_out=way_out) if path.exists() else None


def newer_in_use(plan: DayPlan, current: Mapping[str, Any] | None) -> str:
    """Why the day's model does not come into use, whatever its verdict; '' where the one in use has seen less."""
    if not current or current["run"] == f"runs/{plan.day}" or current["trained_to"] < plan.train_last:
        return ""
    in_use = f"{current['run']}, the model in use, was trained up to {current['trained_to']}"
    return f"{in_use}, this one to {plan.train_last}"


def write_current(work: Path, *, name: str, trained_to: str, why: str) -> None:
    """Put the model of the day `name` into use; readers find the old pointer or the new one."""
    before = read_current(work)
    if before and before["run"] == f"runs/{name}":
        return
    earlier = [*(before.pop("before", [])), before] if before else []
    record = {
        "run": f"runs/{name}",
        "export": f"exports/{name}",
        "trained_to": trained_to,
        "since": now(),
        "why": why,
        "before": earlier,
    }
    write_whole(work / "current.json", json.dumps(record, indent=2) + "\n")


def check_usable(work: Path, name: str) -> DayState:
    """The state of a day whose model was exported, and whose run and status are still there.

    Raises:
        UserError: that day has none.
    """
    there = sorted(path.parent.name for path in work.glob("exports/*/manifest.json"))
    whole = [day for day in there if (work / "runs" / day).is_dir() and (work / "days" / day / "status.json").exists()]
    if name not in whole:
        raise UserError(
            f"--use {name}: {work} has no exported model of that day, with its run and its days/{name}; there are: "
            f"{', '.join(whole) or 'none'}"
        )
    return DayState(work, name)


def use_model(work: Path, name: str) -> None:
    """Go back (or forth) to the model of a day. Raises UserError."""
    plan = check_usable(work, name).record["plan"]
    write_current(work, name=name, trained_to=plan["train_last"], why="put into use by hand")


def status_table(work: Path) -> str:
    """A line a day: each step's state with its seconds, and the verdict; below it the model in use."""
    lines = [f"{'date':<12}" + "".join(f"{step:>14}" for step in STEPS) + "  verdict"]
    for path in sorted(work.glob("days/*/status.json")):
        record = _read_status(path)
        cells = []
        for step in STEPS:
            entry = record["steps"].get(step, {})
            seconds = f" {entry['seconds']:.0f} s" if entry.get("seconds") is not None else ""
            cells.append(f"{entry.get('status', '-') + seconds:>14}")
        verdict = record["verdict"] or {"verdict": "-", "why": ""}
        lines.append(f"{record['date']:<12}" + "".join(cells) + f"  {verdict['verdict']}  {verdict['why']}")
    current = read_current(work)
    lines.append(
        f"in use: {current['run']}, since {current['since']} ({current['why']})" if current else "in use: none"
    )
    return "\n".join(lines)


@contextlib.contextmanager
def locked(work: Path) -> Iterator[int]:
    """Hold <work>/lock; the descriptor is for the steps, so that one that outlives its driver keeps the lock.

    Raises:
        UserError: another daily run holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise UserError(f"--work {work}: a daily run is under way ({owner}); wait for it, or end it") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {now()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _read_status(path: Path) -> dict[str, Any]:
    return read_json(path, _STATUS, way_out="remove it, the steps find out what is there")
