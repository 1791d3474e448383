"""Train USR on the samples table, on Ray; resume a run that was interrupted.

Alone, with a Ray of its own on this machine:
    python jobs/train.py --config FILE --lake DIR --run-dir DIR [--set a.b=c]
On a cluster:
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/train.py --config FILE ...
The same command on the same --run-dir resumes an interrupted run, and prints the result of a finished one.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import EXIT_FAILURE, check_lake, check_output, job_config, job_parser, run_job
from usr_ray.launch.environment import prepare_environment


def main(argv: list[str]) -> None:
    parser = job_parser(__doc__ or "", takes_dates=True)
    parser.add_place("--lake", check_lake, required=True, help="the lake of jobs/build_samples.py")
    parser.add_place("--run-dir", check_output, required=True, help="checkpoints, metrics and events go here")
    arguments = parser.parse_args(argv)
    config = job_config(arguments)
    cluster = prepare_environment(dashboard=config.ray.dashboard)
    from usr_ray.launch.trainer import run  # imports ray, which reads the environment

    try:
        summary = run(config, arguments.lake, arguments.run_dir, cluster=cluster, command=["jobs/train.py", *argv])
    except KeyboardInterrupt:
        print(f"{arguments.run_dir}: the same command goes on from the newest checkpoint", file=sys.stderr)
        raise
    if summary.outcome == "stopped":  # whoever waits for this job must not believe it finished
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    sys.exit(run_job(main))
