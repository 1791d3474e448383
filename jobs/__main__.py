"""`usr-ray JOB ...`: every job of this folder as one command; `python -m jobs JOB ...` is the same without installing.

The jobs that need Spark are handed to spark-submit, with the file that `spark-submit jobs/...` runs.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import shlex
import sys
from pathlib import Path

from usr_ray import __version__
from usr_ray.cli import EXIT_OK, EXIT_USER_ERROR, print_error, run_job
from usr_ray.config import UserError
from usr_ray.launch.environment import DASHBOARD_PORT, LOOPBACK, ensure_token
from usr_ray.launch.spark import spark_environment, spark_submit

FOLDER = Path(__file__).resolve().parent
ON_SPARK = {"build_samples", "build_worlds", "maintain_tables", "online_report"}
"""Jobs that start a JVM."""
RAY = "ray"
USAGE = """usage: usr-ray JOB [arguments of the job]
       usr-ray JOB --help
       usr-ray [--help | --version]

Unified search and recommendation ranking: Spark joins the logs, Delta holds the samples, Ray trains USR.

jobs:
"""
AFTER = """
A job of Spark takes --spark "OPTIONS" first, options of spark-submit in one word:
    usr-ray build-samples --spark "--master spark://10.0.0.5:7077" --config FILE --logs DIR --lake DIR --dates A:B
`usr-ray ray` is Ray's own command with the token, and for `ray job` the address, of the cluster on this machine:
    usr-ray ray job submit --working-dir . -- python jobs/train.py --config FILE --lake DIR --run-dir DIR
    usr-ray ray job logs -f ID
"""


def job_files() -> dict[str, Path]:
    """Name of each subcommand and its file."""
    files = sorted(path for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem.replace("_", "-"): path for path in files}


def summary(path: Path) -> str:
    """First sentence of a job's docstring, read without importing it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].partition(": spark-submit")[0].rstrip(".")


def usage() -> str:
    """The list of all jobs, a line each."""
    lines = [f"  {name:<16} {summary(path)}" for name, path in job_files().items()]
    lines.append(f"  {RAY:<16} Ray's own command (job submit, job logs, status ...) on the cluster of this machine")
    return USAGE + "\n".join(lines) + "\n" + AFTER


def run_on_spark(path: Path, arguments: list[str]) -> None:
    """Become spark-submit with a job. UserError where it is not installed."""
    options: list[str] = []
    if arguments and arguments[0] == "--spark":
        if len(arguments) < 2:
            raise UserError('usr-ray: --spark needs options of spark-submit in one word: --spark "--master local[4]"')
        options, arguments = shlex.split(arguments[1]), arguments[2:]
    # What is wrong with the command line is said before a JVM starts.
    importlib.import_module(f"jobs.{path.stem}").parse(arguments)
    submit, environment = spark_submit(), spark_environment()
    sys.stdout.flush()
    os.execve(submit, [submit, *options, str(path), *arguments], environment)


def run_ray(arguments: list[str]) -> None:
    """Become Ray's command, which finds token and address in the environment. UserError where it is not installed."""
    ray = Path(sys.executable).parent / "ray"
    if not ray.exists():
        raise UserError(f"usr-ray ray: Ray is not installed for {sys.executable}; pip install 'usr-ray[train]'")
    ensure_token()
    environment = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{DASHBOARD_PORT}"}
    os.execve(ray, [str(ray), *arguments], {**environment, **os.environ})


def dispatch(argv: list[str]) -> None:
    """Run the job that argv names. UserError: there is no such job."""
    name, *arguments = argv
    if name == RAY:
        run_ray(arguments)
    files = job_files()
    if name not in files:
        near = difflib.get_close_matches(name.replace("_", "-"), files, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join([*files, RAY])}"
        raise UserError(f"usr-ray: there is no job {name!r}{hint}")
    path = files[name]
    sys.argv[0] = f"usr-ray {name}"  # what argparse calls the program
    if path.stem in ON_SPARK and not {"-h", "--help"} & set(arguments):
        run_on_spark(path, arguments)
    importlib.import_module(f"jobs.{path.stem}").main(arguments)


def main() -> int:
    """The command's exit code: 0 success, 1 failure, 2 a user's error."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return EXIT_OK if argv else EXIT_USER_ERROR
    if argv[0] == "--version":
        print(__version__)
        return EXIT_OK
    return run_job(dispatch, argv, report=print_error)


if __name__ == "__main__":
    sys.exit(main())
