"""The daily run, as cron calls it: build, restate, train on, judge, export, publish, score. Resumable; one at a time.

    python jobs/daily.py --config FILE --logs DIR --lake DIR --work DIR [--date today-1] [--watermark ISO]
        [--registry DIR [--users redis://HOST:PORT/DB] [--for-gpu] [--prune]] [--set a.b=c]
    python jobs/daily.py --work DIR --status             # the days and the model in use
    python jobs/daily.py --work DIR --use 2026-01-05 [--registry DIR --lake DIR]     # back to that day's model

The same command again continues at the first step that is not done. --step NAME runs one step alone (for a scheduler
that has its own steps; examples/airflow). Exit codes: 0 done; 2 a mistake or a day that cannot be judged yet, one line;
1 a step failed; 3 done, but the new model was not better and the one before stays in use. docs/operations.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from usr_ray.cli import (
    EXIT_OK,
    EXIT_USER_ERROR,
    check_input,
    check_logs,
    check_new_lake,
    check_output,
    check_output_table,
    flags,
    job_config,
    job_dates,
    job_parser,
    number_in,
    run_job,
)
from usr_ray.config import Config, UserError
from usr_ray.launch.spark import spark_environment, spark_submit
from usr_ray.operations import daily
from usr_ray.operations.daily import DayPlan, DayState
from usr_ray.schema import SAMPLES

EXIT_HELD = 3


class StepFailed(SystemExit):
    """A job ended with an exit code other than 0; it has already said why."""


class Day:
    """One day's steps; each may be run again, and does nothing twice."""

    def __init__(self, arguments: argparse.Namespace, config: Config, lock: int) -> None:
        self.arguments, self.config, self.lock = arguments, config, lock
        self.work: Path = arguments.work.resolve()
        day = job_dates(arguments.date, where="--date")[1]
        self.state = DayState(self.work, day.isoformat())
        self.plan: DayPlan = self.state.plan(
            daily.plan_day(config, day, built_dates(arguments.lake), daily.read_current(self.work))
        )
        self.run_dir = self.work / "runs" / self.plan.day
        self.export_dir = self.work / "exports" / self.plan.day

    def run(self, steps: tuple[str, ...]) -> int:
        """Run what is not over yet, in order; the exit code. UserError where a step before is not done."""
        for step in steps:
            late = [s for s in daily.STEPS[: daily.STEPS.index(step)] if not self.state.is_over(s)]
            if late:
                raise UserError(f"--step {step}: {late[0]} of {self.plan.day} is not done; run it first")
            if self.state.is_over(step):
                print(f"{self.plan.day} {step}: {self.state.record['steps'][step]['status']} before", flush=True)
                continue
            started = time.monotonic()
            self.state.note(step, daily.RUNNING)
            action: Callable[[], str | None] = getattr(self, step)
            try:
                why = action()
            except BaseException as error:
                self.state.note(step, daily.FAILED, why=" ".join((str(error) or type(error).__name__).split())[:300])
                raise
            seconds = round(time.monotonic() - started, 1)
            self.state.note(step, daily.SKIPPED if why else daily.DONE, why=why or "", seconds=seconds)
            print(f"{self.plan.day} {step}: {f'skipped, {why}' if why else f'done in {seconds:.0f} s'}", flush=True)
        return EXIT_HELD if self.state.verdict == daily.HELD else EXIT_OK

    def build(self) -> None:
        """The day, and dates before it that are missing."""
        self._build("--dates", f"{self.plan.build_first}:{self.plan.day}")

    def restate(self) -> str | None:
        """Earlier dates that late events, or the passing of time, have changed."""
        dates = built_dates(self.arguments.lake)
        is_new = all(self.plan.build_first <= date.isoformat() <= self.plan.day for date in dates)
        if is_new and not self.state.record["steps"]["restate"].get("again"):
            return "all dates are of this day's build"
        days = self.arguments.restate_days
        first = max(min(dates), dt.date.fromisoformat(self.plan.day) - dt.timedelta(days=days - 1))
        self._build("--restate", *(["--dates", f"{first}:{self.plan.day}"] if days else []))
        return None

    def train(self) -> str | None:
        """Continue the model in use over the dates whose labels have since become final."""
        from usr_ray.data.manifest import first_counted_date, table_address
        from usr_ray.data.pins import remove_pin
        from usr_ray.runs.read import read_etl_reports

        plan, lake = self.plan, self.arguments.lake
        reports = read_etl_reports(lake)
        counted = first_counted_date(lake) if self.config.counters.warmup_days else None
        if why := daily.nothing_to_learn(reports, plan, self.config, counted):
            if not self.run_dir.exists():  # planned anew, and what an earlier attempt had begun is gone
                remove_pin(table_address(lake, SAMPLES), self.run_dir)
            return why
        try:
            daily.check_labels(reports, plan, allow_missing=self.config.data.allow_missing_dates)
        except UserError:
            self.state.repeat("restate", "labels are not final")  # or more of the logs would change nothing
            raise
        overrides = {
            "data.train_dates": f"{plan.train_first}:{plan.train_last}",
            "data.eval_dates": plan.held_out,
            # The plan keeps training and held-out labels apart; the cut-off inside a run would drop the last days.
            "data.mature_only": "false",
            "train.early_stopping": "false",  # the held-out day judges the model, so it must not choose its epoch
            "train.warm_start": str(self.work / plan.warm_start) if plan.warm_start else "",
        }
        self._python("train", self.run_dir, *self._settings(overrides))
        return None

    def judge(self) -> str | None:
        """Both models on the held-out day; the verdict."""
        if self.state.record["steps"]["train"]["status"] == daily.SKIPPED:
            return "no new model"
        from usr_ray.evaluation.files import read_metrics

        current = daily.read_current(self.work)
        if newer := daily.newer_in_use(self.plan, current):
            return newer
        evaluations = [self._evaluate("candidate", self.run_dir)]
        if current is not None:
            evaluations.append(self._evaluate("in-use", self.work / current["run"]))
        results = [read_metrics(path) for path in evaluations]
        is_good, why = daily.judge(results[0], results[1] if current else None, self.arguments.tolerance)
        self.state.decide(daily.PROMOTED if is_good else daily.HELD, why)
        print(f"{self.plan.day} verdict: {self.state.verdict} ({why})", flush=True)
        return None

    def export(self) -> str | None:
        """The programs of the new model."""
        if not self._is_promoted():
            return "no new model"
        if not (self.export_dir / "manifest.json").exists():  # it appears whole or not at all
            self._python("export", self.run_dir, output=self.export_dir)
        return None

    def publish(self) -> str | None:
        """Put the new model into use, in the registry of the service too where there is one.

        Without a new model the one in use is published again: histories and counters that are served stay fresh.
        """
        if not self._is_promoted():
            current, registry = daily.read_current(self.work), self.arguments.registry
            if current is None or registry is None:
                return "no new model"
            if not serves(registry, self.work / current["export"]):
                return f"{registry} serves another model than {current['run']}, the one in use; it stays"
            self._publish(self.work / current["run"])
            return None
        self._publish(self.run_dir)
        daily.write_current(
            self.work, name=self.plan.day, trained_to=self.plan.train_last, why=self.state.record["verdict"]["why"]
        )
        return None

    def score(self) -> str | None:
        """The day's rows by the model in use; a table for each model."""
        current = daily.read_current(self.work)
        if current is None:
            return "no model is in use yet"
        output = self.work / "scores" / Path(current["run"]).name
        self._python("score", self.work / current["run"], dates=self.plan.day, output=output)
        return None

    def _is_promoted(self) -> bool:
        """By its verdict, and no later day's model has come into use since."""
        newer = daily.newer_in_use(self.plan, daily.read_current(self.work))
        return self.state.verdict == daily.PROMOTED and not newer

    def _publish(self, run_dir: Path) -> None:
        if self.arguments.registry is not None:
            call_job(self.state, "publish", publish_command(self.arguments, run_dir), self.lock)

    def _build(self, *words: str) -> None:
        watermark = ["--watermark", self.arguments.watermark] if self.arguments.watermark else []
        fitted = {"data.train_dates": f"{self.plan.fit_first}:{self.plan.day}", "data.eval_dates": ""}
        self._call(
            "restate" if "--restate" in words else "build",
            shlex.split(self.arguments.spark_submit) or [spark_submit()],
            "jobs/build_samples.py",
            *flags(logs=self.arguments.logs, lake=self.arguments.lake),
            *words,
            *watermark,
            *self._settings(fitted),
        )

    def _evaluate(self, name: str, run_dir: Path) -> Path:
        output = self.state.folder / f"{name}.json"
        self._python("judge", run_dir, job="evaluate", dates=self.plan.held_out, output=output)
        return output

    def _settings(self, overrides: dict[str, str]) -> list[str]:
        own = [*self.arguments.overrides, *(f"{key}={value}" for key, value in overrides.items())]
        return ["--config", str(self.arguments.config), *(word for line in own for word in ("--set", line))]

    def _python(self, step: str, run_dir: Path, *words: str, job: str = "", **places: object) -> None:
        given = flags(run_dir=run_dir, lake=self.arguments.lake, **places)
        self._call(step, [sys.executable], f"jobs/{job or step}.py", *given, *words)

    def _call(self, step: str, program: list[str], *words: str) -> None:
        call_job(self.state, step, [*program, *words], self.lock)


def call_job(state: DayState, step: str, command: list[str], lock: int) -> None:
    """Run a job of a day, its output here and in <step>.log; it holds the lock too, should this driver die before it.

    Raises:
        StepFailed: it ended with another code than 0.
    """
    log = state.folder / f"{step}.log"
    print(f"$ {shlex.join(command)}", flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=spark_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[lock],
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                print(line, end="", flush=True)
            code = process.wait()
        except BaseException:  # an interruption, or a full disk that takes no more of the log
            process.terminate()  # a training saves the step in progress
            process.wait()
            raise
    if code != 0:
        print(
            f"{state.folder.name}: stopped, step {step} ended with exit code {code} ({log}); the same command goes "
            "on there",
            file=sys.stderr,
            flush=True,
        )
        raise StepFailed(EXIT_USER_ERROR if code == EXIT_USER_ERROR else 1)


def publish_command(arguments: argparse.Namespace, run_dir: Path) -> list[str]:
    """jobs/publish.py for a run of the day's registry."""
    users = {} if arguments.users is None else {"users": arguments.users}
    places = flags(run_dir=run_dir, lake=arguments.lake, registry=arguments.registry, **users)
    words = [f"--{word}" for word in ("for-gpu", "prune") if getattr(arguments, word.replace("-", "_"))]
    return [sys.executable, "jobs/publish.py", *places, *words]


def use(arguments: argparse.Namespace) -> None:
    """Put the model of a day into use; with --registry it is published first, so that the service has it too.

    Raises:
        UserError: --registry without --lake.
    """
    work, day, registry = arguments.work, arguments.use, arguments.registry
    if registry is not None and arguments.lake is None:
        raise UserError(f"--use {day}: --registry {registry} gets a version of that model; name its --lake too")
    with daily.locked(work) as lock:
        daily.check_usable(work, day)
        if registry is not None:
            call_job(DayState(work, day), "publish", publish_command(arguments, work / "runs" / day), lock)
        daily.use_model(work, day)
    print(daily.status_table(work))
    if registry is None and any(work.glob("days/*/publish.log")):
        print(
            "the registry serves on what it did; to publish this model there: the same command with --registry and "
            "--lake"
        )


def serves(registry: Path, export: Path) -> bool:
    """Does the stable version of a registry have the model of an export? An operator may have gone back to another."""
    from usr_ray.serving.runtime import read_manifest
    from usr_ray.serving.versions import POINTER, read_version, stable_folder

    if not (registry / POINTER).exists():
        return False
    served = read_version(stable_folder(registry), "model_id")["model_id"]
    return bool(served == read_manifest(export, "checkpoint")["checkpoint"]["id"])


def built_dates(lake: str) -> set[dt.date]:
    """Dates that the lake holds a report of; none where there is no lake yet."""
    from usr_ray.runs.read import read_etl_reports

    try:
        return {dt.date.fromisoformat(str(report["date"])) for report in read_etl_reports(lake)}
    except UserError as error:
        if "no such directory" in str(error):
            return set()
        raise


def main(argv: list[str]) -> None:
    parser = job_parser(__doc__ or "", takes_dates=True)
    parser.add_place("--work", None, type=Path, required=True, help="state, runs, exports and scores go here")
    parser.add_place("--logs", check_logs, help="folder with one entry per log")
    parser.add_place("--lake", check_new_lake, help="where the tables are")
    parser.add_place("--registry", check_output, type=Path, help="also publish here, for jobs/serve.py")
    parser.add_argument("--users", metavar="URL", help="with --registry: Redis that takes the users (jobs/publish.py)")
    parser.add_argument("--for-gpu", action="store_true", help="with --registry: for jobs/serve.py --device cuda too")
    parser.add_argument("--prune", action="store_true", help="with --registry: delete its versions that are out of use")
    parser.add_argument("--date", default="today-1", help="newest complete UTC day of the logs (today-1)")
    parser.add_argument("--watermark", metavar="ISO", help="the logs are complete up to here (default: newest event)")
    parser.add_argument(
        "--restate-days",
        type=number_in("[0, 36600]", int),
        default=0,
        metavar="N",
        help="late events are looked for in the last N dates only (all dates)",
    )
    parser.add_argument(
        "--tolerance",
        type=number_in("[0, 10]"),
        default=0.005,
        metavar="X",
        help="relative increase of the log loss that a new model may have (0.005)",
    )
    parser.add_argument(
        "--spark-submit",
        default="",
        metavar="WORDS",
        help="how Spark is called, with options, in one word (the spark-submit beside this Python)",
    )
    parser.add_argument("--step", choices=daily.STEPS, help="this step alone")
    parser.add_argument("--status", action="store_true", help="show the days and the model in use")
    parser.add_argument("--use", metavar="DATE", help="put the model of that day into use")
    arguments = parser.parse_args(argv)
    if arguments.status or arguments.use:
        check_input(arguments.work, flag="--work")
    if arguments.status:
        print(daily.status_table(arguments.work))
        return
    for word in ("users", "for-gpu", "prune"):
        if getattr(arguments, word.replace("-", "_")) not in (None, False) and arguments.registry is None:
            raise UserError(f"--{word}: is of what --registry publishes; name the registry too, or leave --{word} out")
    for name in ("logs", "lake"):
        address = getattr(arguments, name)
        setattr(arguments, name, address if address is None or "://" in address else str(Path(address).resolve()))
    arguments.registry = arguments.registry and arguments.registry.resolve()
    if arguments.use:
        check_output(arguments.work, flag="--work")
        arguments.work = arguments.work.resolve()
        use(arguments)
        return
    for name in ("config", "logs", "lake"):
        if getattr(arguments, name) is None:
            raise UserError(f"daily.py: --{name} is missing; see --help")
    check_output_table(arguments.work, flag="--work")  # tables of scores are below it
    arguments.config = arguments.config.resolve()
    config = job_config(arguments)
    lag = daily.label_lag(config)
    if 0 < arguments.restate_days <= lag:
        raise UserError(
            f"--restate-days {arguments.restate_days}: labels are final after {lag} days, and the day that judges is "
            f"so old; name {lag + 1} or more, or leave it out"
        )
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # a scheduler's stop is an interruption
    with daily.locked(arguments.work) as lock:
        code = Day(arguments, config, lock).run((arguments.step,) if arguments.step else daily.STEPS)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(run_job(main))
