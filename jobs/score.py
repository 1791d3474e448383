"""Score every row of some dates with a trained run, into a Delta table of probabilities.

python jobs/score.py --run-dir DIR --lake DIR --dates A:B --output DIR

One commit per date. After a crash the same command continues at the first missing date; docs/serving.md has the
columns.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import JobParser, add_allow_missing_dates, check_lake, check_output_table, check_run_dir, run_job
from usr_ray.config import parse_dates


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_place("--run-dir", check_run_dir, type=Path, required=True, help="the --run-dir of jobs/train.py")
    parser.add_place("--lake", check_lake, required=True, help="the lake of jobs/build_samples.py")
    parser.add_argument("--dates", required=True, metavar="A:B", help="first and last date, both included")
    parser.add_place("--output", check_output_table, type=Path, required=True, help="the Delta table of scores")
    add_allow_missing_dates(parser)
    arguments = parser.parse_args(argv)
    dates = parse_dates(arguments.dates, where="--dates")

    # Torch takes seconds to load: a wrong command line is reported without it.
    from usr_ray.serving.score import score_dates
    from usr_ray.training.worker import LocalWorker

    worker = LocalWorker()
    scored = score_dates(
        arguments.run_dir,
        arguments.lake,
        dates,
        arguments.output,
        worker,
        allow_missing=arguments.allow_missing_dates,
        report=lambda line: print(line, flush=True),
    )
    print(
        f"{scored.num_rows:,} rows of {len(scored.dates)} dates scored by the checkpoint of step {scored.step}; "
        f"{len(scored.skipped)} dates were done before; table at {arguments.output}"
    )
    worker.close()


if __name__ == "__main__":
    sys.exit(run_job(main))
