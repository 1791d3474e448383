"""Run a study: a declared grid of trainings on one table, then a table of results and a report.

python jobs/study.py --study NAME|FILE.toml --config FILE --lake DIR --run-dir DIR [--scale small|full]
    [--seeds 0 1 2] [--input DIR] [--set a.b=c]

NAME is one of jobs/studies. The same command resumes where it was interrupted; finished trials are read back, failed
ones are tried again. Studies of worlds (similarity, label_quality, joint, scenarios, scenarios_kuairand) take no
--lake, the last one takes --input with KuaiRand's files. See docs/studies.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from usr_ray.cli import (
    EXIT_FAILURE,
    check_input,
    check_lake,
    check_output,
    check_output_table,
    job_config,
    job_parser,
    run_job,
)
from usr_ray.experiments.grid import SCALES, load_study
from usr_ray.launch.environment import prepare_environment


def main(argv: list[str]) -> None:
    parser = job_parser(__doc__ or "", takes_dates=True)
    parser.add_argument("--study", required=True, metavar="NAME", help="of jobs/studies, or a TOML file")
    parser.add_place("--lake", check_lake, help="the lake of jobs/build_samples.py")
    parser.add_place("--input", check_input, type=Path, help="files of the data set that a study makes its worlds from")
    parser.add_place("--run-dir", check_output, type=Path, required=True, help="trials, results and report go here")
    parser.add_argument("--scale", choices=SCALES, default="full", help="small: minutes on two cores")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="instead of the study's; more may follow")
    arguments = parser.parse_args(argv)
    study = load_study(
        arguments.study,
        scale=arguments.scale,
        folder=ROOT / "jobs" / "studies",
        seeds=arguments.seeds,
        sets=arguments.overrides,
    )
    if study.has_worlds:
        check_output_table(arguments.run_dir, flag="--run-dir")  # their lakes are below it
    cluster = prepare_environment(dashboard=job_config(arguments).ray.dashboard)
    from jobs import build_worlds
    from usr_ray.experiments.record import Base
    from usr_ray.experiments.study import run_study  # imports ray, which reads the environment
    from usr_ray.reporting.study import write_study_report

    base = Base(arguments.config, tuple(arguments.overrides))
    try:
        result = run_study(
            study,
            base,
            arguments.lake,
            arguments.run_dir,
            input_dir=arguments.input,
            build_worlds=build_worlds.in_spark,
            cluster=cluster,
            command=["jobs/study.py", *argv],
        )
    except KeyboardInterrupt:
        print(f"{arguments.run_dir}: the same command goes on with the trials that have no result", file=sys.stderr)
        raise
    print(f"results: {result.results}")
    if result.num_finished:
        print(f"report: {write_study_report(arguments.run_dir, study)}")
    for name, why in result.failures.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if result.failures:
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    sys.exit(run_job(main))
