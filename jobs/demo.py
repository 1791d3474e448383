"""The whole way once: logs -> Delta -> 2-worker training of USR -> evaluation -> report, as `make demo` runs it.

Every step is one of the jobs, run by the command that is printed before it, so that a newcomer can run them alone.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from usr_ray.cli import check_input, check_logs, check_output_table, job_config, job_parser, run_job
from usr_ray.config import Config, UserError, parse_dates
from usr_ray.launch.spark import spark_environment, spark_submit

MARKER = ".usr-ray-demo"
SIMULATED = "simulated"


class StepFailed(SystemExit):
    """A job of the demo ended with an exit code other than 0; the job has already said why."""


def fresh_folder(work: Path) -> None:
    """Empty the demo's own folder. A folder that the demo did not make is never touched (UserError)."""
    if work.exists() and any(work.iterdir()):
        if not (work / MARKER).exists():
            raise UserError(f"--work {work}: is not empty and no earlier demo's; name an empty or a new folder")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    (work / MARKER).touch()


def step(title: str, *command: str) -> None:
    """Print and run one job; stop the demo with its exit code when it fails."""
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=spark_environment(), check=False)
    if done.returncode != 0:
        print(f"demo: stopped, '{title}' ended with exit code {done.returncode}", file=sys.stderr)
        raise StepFailed(done.returncode)
    print(f"   {title}: {time.monotonic() - started:.0f} s", flush=True)


def build_dates(config: Config) -> str:
    """First training date to last held-out date."""
    first = parse_dates(config.data.train_dates, where="data.train_dates")[0]
    last = parse_dates(config.data.eval_dates, where="data.eval_dates")[1]
    return f"{first}:{last}"


def main(argv: list[str]) -> None:
    parser = job_parser(__doc__ or "")
    parser.add_argument("--source", default=SIMULATED, help="data set to ingest (ignored with --logs)")
    parser.add_place("--input", check_input, type=Path, help="folder of the data set's files")
    parser.add_place("--logs", check_logs, type=Path, help="logs of the contract that are already there")
    parser.add_place("--work", check_output_table, type=Path, required=True, help="for logs, lake and run; emptied")
    arguments = parser.parse_args(argv)
    config = job_config(arguments)
    if not (config.data.train_dates and config.data.eval_dates):
        raise UserError(f"{arguments.config}: the demo needs data.train_dates and data.eval_dates; set both")
    if arguments.logs is None and arguments.source != SIMULATED and arguments.input is None:
        raise UserError(f"--source {arguments.source}: --input is missing; name the folder with the data set's files")
    started = time.monotonic()
    # The jobs run where the program is, the paths are those of whoever called.
    work: Path = arguments.work.absolute()
    for flag in ("input", "logs", "config"):
        place = getattr(arguments, flag)
        setattr(arguments, flag, place and place.absolute())
    fresh_folder(work)
    logs, lake, run = arguments.logs or work / "logs", work / "lake", work / "run"
    settings = ["--config", str(arguments.config)] if arguments.config else []
    settings += [word for override in arguments.overrides for word in ("--set", override)]
    if arguments.logs is None:
        where = ["--input", str(arguments.input)] if arguments.input else []
        step(
            "ingest",
            sys.executable,
            "jobs/ingest_logs.py",
            "--source",
            arguments.source,
            *where,
            "--logs",
            str(logs),
            *settings,
        )
    step(
        "build samples",
        spark_submit(),
        "jobs/build_samples.py",
        "--logs",
        str(logs),
        "--lake",
        str(lake),
        "--dates",
        build_dates(config),
        *settings,
    )
    step("train", sys.executable, "jobs/train.py", "--lake", str(lake), "--run-dir", str(run), *settings)
    step(
        "evaluate",
        sys.executable,
        "jobs/evaluate.py",
        "--run-dir",
        str(run),
        "--lake",
        str(lake),
        "--dates",
        config.data.eval_dates,
        *(["--allow-missing-dates"] if config.data.allow_missing_dates else []),
    )
    step("report", sys.executable, "jobs/report.py", "--run-dir", str(run), "--lake", str(lake))
    print(f"\ndemo: done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(run_job(main))
