"""Train USR on the samples table, on Ray; resume a run that was interrupted.

Alone, with a Ray of its own on this machine:
    python jobs/train.py --config FILE --lake DIR --run-dir DIR [--set a.b=c]
In this process, without Ray: --set ray.num_workers=0.
On a cluster:
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/train.py --config FILE ...
The same command on the same --run-dir resumes an interrupted run, and prints the result of a finished one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import EXIT_FAILURE, check_lake, check_output, job_config, job_parser, run_job
from usr_ray.config import Config
from usr_ray.launch.environment import prepare_environment

if TYPE_CHECKING:
    from usr_ray.launch.alone import RunSummary


def main(argv: list[str]) -> None:
    parser = job_parser(__doc__ or "", takes_dates=True)
    parser.add_place("--lake", check_lake, required=True, help="the lake of jobs/build_samples.py")
    parser.add_place("--run-dir", check_output, required=True, help="checkpoints, metrics and events go here")
    parser.add_argument("--brief", action="store_true", help="without the table of metrics, which metrics.json has")
    arguments = parser.parse_args(argv)
    config = job_config(arguments)
    from usr_ray.data.order import rank_share  # loads numpy alone: torch and Ray take seconds

    group, num_workers = config.model.contrastive.group_size, max(1, config.ray.num_workers)
    rank_share(global_batch_size=config.train.global_batch_size, group_size=group, rank=0, world_size=num_workers)
    cluster = prepare_environment(dashboard=config.ray.dashboard)
    try:
        summary = _run(config, arguments.lake, arguments.run_dir, cluster, ["jobs/train.py", *argv])
    except KeyboardInterrupt:
        print(f"{arguments.run_dir}: the same command goes on from the newest checkpoint", file=sys.stderr)
        raise
    if summary.metrics is not None and not arguments.brief:
        from usr_ray.runs.plan import result_text

        print(result_text(summary.run_dir))
    if summary.outcome == "stopped":  # whoever waits for this job must not believe it finished
        sys.exit(EXIT_FAILURE)


def _run(config: Config, lake: str, run_dir: str, cluster: str, command: list[str]) -> RunSummary:
    if config.ray.num_workers == 0:
        # Torch's threads spin while they wait, which is very slow where another process has one of the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from usr_ray.launch.alone import run_alone

        return run_alone(config, lake, run_dir, cluster=cluster, command=command)
    from usr_ray.launch.trainer import run  # imports ray, which reads the environment

    return run(config, lake, run_dir, cluster=cluster, command=command)


if __name__ == "__main__":
    sys.exit(run_job(main))
