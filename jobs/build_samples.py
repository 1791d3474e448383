"""Build the labelled samples table from logs.

spark-submit jobs/build_samples.py --config FILE --logs DIR --lake DIR --dates A:B
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from etl.jvm import print_error, take_installed_pyspark
from etl.logs.names import check_logs_there
from usr_ray.cli import check_logs, check_new_lake, job_config, job_dates, job_parser, run_job
from usr_ray.config import Config, UserError


def parse_watermark(text: str) -> dt.datetime:
    """An instant in ISO 8601; UTC where it names no zone. UserError otherwise."""
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"--watermark {text!r}: not a time; write it as 2026-01-08T00:00:00Z") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config, dict[str, Any]]:
    """(arguments, configuration, dates and watermark of the build); UserError for what can be seen without Spark."""
    parser = job_parser(__doc__ or "", takes_dates=True)
    parser.add_place("--logs", check_logs, required=True, help="folder with one entry per log")
    parser.add_place("--lake", check_new_lake, required=True, help="where the tables are; made if it is not there")
    parser.add_argument("--dates", metavar="A:B", help="UTC dates to build, both included; today-N counts back")
    parser.add_argument(
        "--restate", action="store_true", help="rebuild the dates that late events changed: of all built, or of --dates"
    )
    parser.add_argument(
        "--restate-built",
        action="store_true",
        help="of --dates, build those after the lake's last, and rebuild the others where late events changed them",
    )
    parser.add_argument(
        "--watermark", metavar="ISO", help="labels are final up to here (default: newest event that is used)"
    )
    arguments = parser.parse_args(argv)
    config = job_config(arguments)
    if not arguments.dates and not arguments.restate:
        raise UserError("build_samples.py: --dates is missing; name the UTC dates to build as A:B, or give --restate")
    if arguments.restate_built and arguments.restate:
        raise UserError("--restate-built: restates and builds, --restate restates alone; leave one of the two out")
    first, last = job_dates(arguments.dates, where="--dates") if arguments.dates else (None, None)
    watermark = parse_watermark(arguments.watermark) if arguments.watermark else None
    check_logs_there(config, str(arguments.logs))
    return arguments, config, {"first": first, "last": last, "watermark": watermark}


def main(argv: list[str]) -> None:
    arguments, config, span = parse(argv)

    # Spark takes seconds to load: a wrong command line or configuration is reported without it.
    take_installed_pyspark()
    from etl.session import build_spark

    started = time.monotonic()
    with ThreadPoolExecutor(1) as beside:  # the JVM brings Spark up while Python loads the rest
        loaded = beside.submit(importlib.import_module, "etl.build.restate")
        spark = build_spark("usr-ray build samples")
        loaded.result()
    from etl.build.restate import RestateRequest, add_samples, restate_samples
    from etl.build.samples import BuildRequest, Progress, build_samples
    from etl.lake.tables import Lake

    progress = Progress(write=lambda line: print(line, flush=True), started=started)
    progress("Spark is up")
    where = {"logs": arguments.logs, "lake": Lake(arguments.lake), **span}
    try:
        if arguments.restate:
            restate_samples(spark, config, RestateRequest(**where), progress)
        elif arguments.restate_built:
            add_samples(spark, config, BuildRequest(**where), progress)
        else:
            build_samples(spark, config, BuildRequest(**where), progress)
    finally:
        spark.stop()


if __name__ == "__main__":
    sys.exit(run_job(main, report=print_error))
