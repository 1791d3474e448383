"""Replay impressions as requests and compare with training: encoded inputs bit for bit, probabilities within 1e-6.

python jobs/replay.py --run-dir DIR --lake DIR --registry DIR --dates A:B

Prints a table of all inputs and probabilities; exit code 1 when one differs. docs/serving.md says what may.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import JobParser, add_allow_missing_dates, check_input, check_lake, check_run_dir, run_job
from usr_ray.config import parse_dates


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_place("--run-dir", check_run_dir, type=Path, required=True, help="the run that was published")
    parser.add_place("--lake", check_lake, required=True, help="the lake that it was trained on")
    parser.add_place("--registry", check_input, type=Path, required=True, help="of jobs/publish.py")
    parser.add_argument("--dates", required=True, metavar="A:B", help="first and last date, both included")
    add_allow_missing_dates(parser)
    arguments = parser.parse_args(argv)
    dates = parse_dates(arguments.dates, where="--dates")
    from usr_ray.serving.replay import replay  # loads torch

    found = replay(
        arguments.run_dir,
        arguments.lake,
        arguments.registry,
        dates,
        allow_missing=arguments.allow_missing_dates,
        report=lambda line: print(line, flush=True),
    )
    for line in found.lines():
        print(line)
    if not found.is_equal:
        sys.exit("the service would not see what training saw: see the table")
    print(f"{found.num_impressions:,} impressions: every input equal, probabilities within 1e-6")


if __name__ == "__main__":
    sys.exit(run_job(main))
