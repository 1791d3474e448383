"""Write the report of a run: one HTML file that needs no network.

python jobs/report.py --run-dir DIR [--lake DIR] [--output FILE]

Reads what jobs/train.py and jobs/evaluate.py left in the run directory and, with --lake, the ETL's reports.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import JobParser, check_lake, check_output_file, check_run_dir, run_job


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_place("--run-dir", check_run_dir, type=Path, required=True, help="the --run-dir of jobs/train.py")
    parser.add_place("--lake", check_lake, help="the lake of jobs/build_samples.py, for the funnel")
    parser.add_place("--output", None, type=Path, metavar="FILE", help="default: <run-dir>/report.html")
    arguments = parser.parse_args(argv)
    check_output_file(arguments.output or arguments.run_dir / "report.html", flag="--output")
    from usr_ray.reporting.run import write_report

    print(f"report: {write_report(arguments.run_dir, arguments.lake, arguments.output)}")


if __name__ == "__main__":
    sys.exit(run_job(main))
