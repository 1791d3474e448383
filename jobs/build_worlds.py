"""Build simulated lakes one after the other in one JVM, for jobs/study.py.

spark-submit jobs/build_worlds.py --plan FILE

Each world is the two ETL jobs with their own command lines; the JVM is started, and its code compiled, once, in a
process of its own, so that neither the study's process nor Ray's need one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from etl.jvm import print_error
from jobs import build_samples, ingest_logs
from usr_ray.cli import check_file, job_parser, run_job
from usr_ray.config import UserError
from usr_ray.experiments.grid import StudyError
from usr_ray.files import write_whole
from usr_ray.launch.environment import ROOT
from usr_ray.launch.spark import spark_environment, spark_submit

if TYPE_CHECKING:  # its imports take seconds, and Spark's process needs none of them
    from usr_ray.experiments.worlds import WorldPlan

JOBS: dict[str, Callable[[list[str]], None]] = {
    "jobs/ingest_logs.py": ingest_logs.main,
    "jobs/build_samples.py": build_samples.main,
}


def in_spark(worlds: Sequence[WorldPlan], folder: Path) -> None:
    """Build worlds in one Spark process; its plan and its log go into `folder`.

    Raises:
        StudyError: no spark-submit, or an ETL job failed.
    """
    plan, log = folder / "plan.json", folder / "spark.log"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(plan, json.dumps([asdict(world) for world in worlds], indent=2) + "\n")
    command = [spark_submit(), str(Path(__file__).resolve()), "--plan", str(plan)]
    error = ""
    with (
        log.open("w", encoding="utf-8", buffering=1) as output,
        subprocess.Popen(
            command, cwd=ROOT, env=spark_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            output.write(line)
            if line.startswith("world "):
                print(f"  {line}", end="", flush=True)
            error = line.strip().removeprefix("error: ") if line.startswith("error: ") else error
    if process.returncode:
        raise StudyError(f"{error or f'jobs/build_worlds.py failed with exit code {process.returncode}'}; see {log}")


def build_world(world: dict) -> None:
    """Run a world's jobs with their output in its build.log; a world that is whole ends up with its mark.

    Raises:
        UserError: a job refused its arguments or its data; names the world.
    """
    folder = Path(world["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "build.log").open("w", encoding="utf-8", buffering=1) as log:
        for name, *arguments in world["commands"]:
            print(f"$ {name} {' '.join(arguments)}", file=log)
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    JOBS[name](arguments)
            except UserError as error:
                raise UserError(f"world {folder.name}: {name}: {error}") from error
    shutil.rmtree(folder / "logs", ignore_errors=True)
    write_whole(folder / world["mark"], "")


def parse(argv: list[str]) -> list[dict]:
    """The worlds of a plan. UserError: it is none."""
    parser = job_parser(__doc__ or "")
    parser.add_place(
        "--plan", check_file, type=Path, required=True, metavar="FILE", help="JSON that jobs/study.py wrote"
    )
    plan: Path = parser.parse_args(argv).plan
    try:
        worlds = json.loads(plan.read_bytes())
        if all({"folder", "commands", "mark"} <= set(world) for world in worlds):
            return worlds
    except (ValueError, TypeError):
        pass
    raise UserError(f"--plan {plan}: is no plan that jobs/study.py wrote; run jobs/study.py, which calls this job")


def main(argv: list[str]) -> None:
    worlds = parse(argv)
    for place, world in enumerate(worlds, start=1):
        print(f"world {place} of {len(worlds)}: {Path(world['folder']).name}", flush=True)
        build_world(world)


if __name__ == "__main__":
    sys.exit(run_job(main, report=print_error))
