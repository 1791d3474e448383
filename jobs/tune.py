"""Search for hyper-parameters on Ray Tune, then judge the choice on dates that it was not chosen on.

python jobs/tune.py --config FILE --lake DIR --run-dir DIR [--set a.b=c]

Section [tune] of the configuration declares the search (docs/studies.md). The same command resumes a search that
was cut off. Leaves best.toml, which jobs/train.py takes, and report.html.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import EXIT_FAILURE, check_lake, check_output, job_parser, run_job
from usr_ray.experiments.space import load_search
from usr_ray.launch.environment import prepare_environment

TUNE_ENVIRONMENT = {
    # An AUC is undefined where a class is missing, and is not reported then; Tune would end the search for it.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # We report the search; Ray's table of trials repeats itself every few seconds.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A relative path in the configuration means the same in a trial as in jobs/train.py.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def main(argv: list[str]) -> None:
    parser = job_parser(__doc__ or "", takes_dates=True)
    parser.add_place("--lake", check_lake, required=True, help="the lake of jobs/build_samples.py")
    parser.add_place("--run-dir", check_output, type=Path, required=True, help="trials, best.toml and report go here")
    arguments = parser.parse_args(argv)
    config = load_search(arguments.config, arguments.overrides)
    cluster = prepare_environment(dashboard=config.ray.dashboard)
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from usr_ray.experiments.record import Base
    from usr_ray.experiments.search import run_search  # imports ray, which reads the environment
    from usr_ray.reporting.search import write_search_report

    base = Base(arguments.config, tuple(arguments.overrides))
    result = run_search(base, arguments.lake, arguments.run_dir, cluster=cluster, command=["jobs/tune.py", *argv])
    failed = [point for point in result.points if point.error]
    for point in failed:
        print(f"failed: {point.trial_id}: {point.error}", file=sys.stderr)
    if result.final.num_finished:
        print(f"report: {write_search_report(arguments.run_dir, config, result)}")
    for name, why in result.final.failures.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if result.final.failures:
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    sys.exit(run_job(main))
