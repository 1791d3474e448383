"""Put a run directory into MLflow: parameters, the numbers of every step, files. Again: only what is new.

python jobs/log_mlflow.py --run-dir DIR [--tracking-uri URI] [--experiment NAME]

Without --tracking-uri into a folder `mlruns` beside the run directory. A server's user and password: the environment's
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. Needs usr-ray[mlflow].
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import JobParser, check_output, check_run_dir, run_job


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_place("--run-dir", check_run_dir, type=Path, required=True, help="the --run-dir of jobs/train.py")
    parser.add_place("--tracking-uri", None, metavar="URI", help="default: the folder mlruns beside the run directory")
    parser.add_argument("--experiment", default="usr-ray", metavar="NAME", help="made when it is not there")
    arguments = parser.parse_args(argv)
    # MLflow asks for a database where it finds a folder, and sends telemetry.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    run_dir: Path = arguments.run_dir.resolve()
    uri: str = (run_dir.parent / "mlruns").as_uri() if arguments.tracking_uri is None else arguments.tracking_uri
    scheme, is_address, place = uri.rpartition("://")
    if not is_address or scheme == "file":
        check_output(unquote(place) if is_address else uri, flag="--tracking-uri")
    from usr_ray.operations.mlflow import client, log_run

    run_id, num_added = log_run(run_dir, client(uri), experiment=arguments.experiment)
    print(f"{run_dir}: {num_added:,} numbers added to run {run_id} of experiment {arguments.experiment} in {uri}")


if __name__ == "__main__":
    sys.exit(run_job(main))
