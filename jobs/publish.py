"""Publish a trained run for serving: its program with the lake's items and users, as a version of a registry.

python jobs/publish.py --run-dir DIR --lake DIR --registry DIR [--not-stable]
python jobs/publish.py --registry DIR --rollback

The new version becomes the one that is served, unless --not-stable is given; --rollback serves the one before again.
docs/serving.md has the files of a version.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import JobParser, check_lake, check_output, check_run_dir, run_job
from usr_ray.config import UserError


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_place("--run-dir", check_run_dir, type=Path, help="the --run-dir of jobs/train.py")
    parser.add_place("--lake", check_lake, help="the lake that the run was trained on")
    parser.add_place("--registry", check_output, type=Path, required=True, help="folder of versions; created")
    parser.add_argument("--not-stable", action="store_true", help="do not serve the new version yet")
    parser.add_argument("--rollback", action="store_true", help="serve the version before the stable one again")
    arguments = parser.parse_args(argv)
    if arguments.rollback:
        from usr_ray.serving.versions import roll_back  # loads Arrow

        print(f"{arguments.registry}: {roll_back(arguments.registry)} is stable again")
        return
    if arguments.run_dir is None or arguments.lake is None:
        missing = "run-dir" if arguments.run_dir is None else "lake"
        raise UserError(f"--{missing} is missing; name the run and its lake, or give --rollback")
    from usr_ray.serving.publish import publish  # loads torch

    name = publish(
        arguments.run_dir,
        arguments.lake,
        arguments.registry,
        stable=not arguments.not_stable,
        report=lambda line: print(line, flush=True),
    )
    print(f"{arguments.registry}: version {name} published" + ("" if arguments.not_stable else ", and stable"))


if __name__ == "__main__":
    sys.exit(run_job(main))
