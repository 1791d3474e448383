"""Report an experiment from its logs: UCTR, UCVR, CTR and CTCVR per bucket and scenario, with intervals.

spark-submit jobs/online_report.py --config FILE --logs DIR --lake DIR --dates A:B --output DIR [--bucket-column NAME] \
[--control NAME]

It reports an experiment that was run elsewhere; it does not run one. Writes <output>/online.json and
<output>/online.html, and prints the same. docs/online.md says how each number is made.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from etl.jvm import print_error, take_installed_pyspark
from usr_ray.cli import check_lake, check_logs, check_output, job_config, job_dates, job_parser, run_job
from usr_ray.config import Config


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config, tuple[dt.date, dt.date]]:
    """(arguments, configuration, dates); UserError for what can be seen without Spark."""
    parser = job_parser(__doc__ or "", takes_dates=True)
    parser.add_place("--logs", check_logs, required=True, help="the logs that the lake was built from")
    parser.add_place("--lake", check_lake, required=True, help="the lake of jobs/build_samples.py")
    parser.add_argument("--dates", required=True, metavar="A:B", help="UTC dates of the experiment, both included")
    parser.add_place("--output", check_output, type=Path, required=True, help="folder for online.json and online.html")
    parser.add_argument("--bucket-column", metavar="NAME", help="of the impressions logs; online.bucket_column")
    parser.add_argument("--control", metavar="NAME", help="bucket to compare with; online.control")
    arguments = parser.parse_args(argv)
    for key, value in (("bucket_column", arguments.bucket_column), ("control", arguments.control)):
        if value is not None:
            arguments.overrides.append(f"online.{key}={json.dumps(value)}")
    config = job_config(arguments)
    return arguments, config, job_dates(arguments.dates, where="--dates")


def main(argv: list[str]) -> None:
    arguments, config, (first, last) = parse(argv)
    output: Path = arguments.output

    # Spark takes seconds to load: a wrong command line or configuration is reported without it.
    take_installed_pyspark()
    from etl.build.experiment import experiment_counts
    from etl.lake.tables import Lake
    from etl.session import build_spark
    from usr_ray.evaluation.experiment import counts_of, experiment_report
    from usr_ray.reporting.experiment import report_lines, write_experiment_page

    spark = build_spark("usr-ray online report")
    try:
        rows, without_column, used = experiment_counts(
            spark, config, logs=arguments.logs, lake=Lake(arguments.lake), dates=(first, last)
        )
    finally:
        spark.stop()
    counts = counts_of(rows, without_column, config.labels.no_order_scenarios)
    report = experiment_report(counts, config.online, dates=used)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (output / "online.json").write_text(text + "\n", encoding="utf-8")
    write_experiment_page(output / "online.html", report)
    print("\n".join(report_lines(report)))
    print(f"\nwritten to {output / 'online.json'} and {output / 'online.html'}")


if __name__ == "__main__":
    sys.exit(run_job(main, report=print_error))
