"""Care of the tables: show them, merge small files, delete files that nobody needs any more.

spark-submit jobs/maintain_tables.py --lake DIR [--runs DIR ...] [--optimize] [--vacuum] [--keep "7 days"] [--dry-run]

Without --optimize and --vacuum the tables are only shown. VACUUM is refused where it would delete a file that a run
below --runs, or a pin in the lake, still needs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from etl.jvm import print_error, take_installed_pyspark
from usr_ray.cli import JobParser, check_input, check_lake, check_new_lake, run_job
from usr_ray.config import DAY_US, UserError, parse_duration_us


def parse(argv: list[str]) -> tuple[argparse.Namespace, int]:
    """(arguments, --keep in microseconds); UserError for what can be seen without Spark."""
    parser = JobParser(__doc__)
    parser.add_place("--lake", check_lake, required=True, help="the lake of jobs/build_samples.py")
    parser.add_place(
        "--runs",
        check_input,
        action="append",
        default=[],
        help="folder with run directories of jobs/train.py, at any depth; repeatable",
    )
    parser.add_argument("--optimize", action="store_true", help="merge small files of a date; a new table version")
    parser.add_argument("--vacuum", action="store_true", help="delete files that left the tables before --keep")
    parser.add_argument("--keep", default="7 days", metavar="TIME", help="VACUUM keeps what is younger (7 days)")
    parser.add_argument(
        "--keep-pinned",
        action="store_true",
        help="delete around the files that runs are pinned to, instead of refusing",
    )
    parser.add_argument(
        "--unpin",
        action="append",
        default=[],
        metavar="NAME",
        help="remove a pin that a run left in the lake; repeatable",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    arguments = parser.parse_args(argv)
    keep_us = parse_duration_us(arguments.keep, where="--keep")
    if arguments.keep_pinned and not arguments.vacuum:
        raise UserError("maintain_tables.py: --keep-pinned says how to --vacuum; give both, or neither")
    if (arguments.optimize or arguments.vacuum or arguments.unpin) and not arguments.dry_run:
        check_new_lake(arguments.lake, flag="--lake")
    return arguments, keep_us


def main(argv: list[str]) -> None:
    arguments, keep_us = parse(argv)

    # Spark takes seconds to load: a wrong command line is reported without it.
    take_installed_pyspark()
    from etl.lake.maintain import MaintainRequest, maintain
    from etl.lake.tables import Lake
    from etl.session import build_spark

    request = MaintainRequest(
        lake=Lake(arguments.lake),
        runs=arguments.runs,
        optimize=arguments.optimize,
        vacuum=arguments.vacuum,
        keep_us=keep_us,
        keep_pinned=arguments.keep_pinned,
        unpin=arguments.unpin,
        dry_run=arguments.dry_run,
    )
    if arguments.vacuum and keep_us < DAY_US:
        print(
            f"warning: --keep {arguments.keep} also deletes what a build under way has written so far: make sure "
            "that none is, and that every run is below --runs or has its pin"
        )
    spark = build_spark("usr-ray maintain tables")
    try:
        maintain(spark, request, lambda line: print(line, flush=True))
    finally:
        spark.stop()


if __name__ == "__main__":
    sys.exit(run_job(main, report=print_error))
