"""Publish a trained run for serving: its program with the lake's items and users, as a version of a registry.

python jobs/publish.py --run-dir DIR --lake DIR --registry DIR [--canary SHARE | --shadow | --not-stable]
    [--users redis://HOST:PORT/DB] [--for-gpu] [--prune]
python jobs/publish.py --registry DIR --canary SHARE | --stable | --rollback | --prune

The new version becomes the one that is served: to everybody, with --canary to a share of the users, with --shadow to
nobody (its scores are logged). Without a run, --canary changes the share (0 ends it), --stable gives the canary to
everybody, --rollback serves the newest version of the previous model again. --prune deletes versions older than a
day that nothing serves and no rollback would.
docs/serving.md has the files of a version.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import JobParser, check_lake, check_output, check_run_dir, number_in, run_job
from usr_ray.config import UserError

_OF_NEW = ("--run-dir", "--lake", "--users", "--for-gpu")


def say_age(version: Mapping[str, Any]) -> None:
    """Print up to when a version (version.json) knows its users, and whether posted events can fill the time since."""
    from usr_ray.serving.encode import micros_of
    from usr_ray.serving.events import kept_from

    as_of, first = version["as_of"], kept_from().isoformat()
    print(f"it knows its users up to {as_of}; what came later is in their histories as far as it was posted")
    if micros_of(as_of) < micros_of(first):
        print(
            f"warning: the log of posted events goes back to {first} at most, so histories lack what happened from "
            f"{as_of} to then, and answers do not say so; publish that model anew: jobs/daily.py --use DATE "
            "--registry, or this job with its --run-dir and --lake"
        )


def move_only(registry: Path, arguments: argparse.Namespace) -> None:
    """Move the pointer to a version that is there. Raises UserError."""
    from usr_ray.serving.versions import (  # loads Arrow
        model_of,
        move_pointer,
        read_pointer,
        read_version,
        roll_back,
        rollback_place,
        version_folder,
        with_canary,
    )

    if arguments.rollback:
        left = read_pointer(registry)
        place = rollback_place(registry, left)
        version = {} if place is None else read_version(version_folder(registry, left.before[place]), "as_of")
        name = roll_back(registry)
        models = model_of(name), model_of(left.stable)
        of = (
            "no other model was stable before" if len({*models}) == 1 else "model {} in the place of {}".format(*models)
        )
        print(f"{registry}: {name} is stable again, without canary and shadow ({of})")
        say_age(version)
        return
    canary = read_pointer(registry).canary
    if canary is None:
        raise UserError(f"--registry {registry}: has no canary; publish one with --run-dir, --lake and --canary")
    if arguments.stable or arguments.canary > 0:
        version_folder(registry, canary)
    if arguments.stable:
        move_pointer(registry, canary)
    else:
        with_canary(registry, canary, arguments.canary)
    print(f"{registry}: {canary} answers to {1 if arguments.stable else arguments.canary:g} of the users")


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_place("--run-dir", check_run_dir, type=Path, help="the --run-dir of jobs/train.py")
    parser.add_place("--lake", check_lake, help="the lake that the run was trained on")
    parser.add_place("--registry", check_output, type=Path, required=True, help="folder of versions; created")
    parser.add_argument("--users", metavar="URL", help="Redis that takes the users: redis://HOST:PORT/DB; else an LMDB")
    parser.add_argument("--for-gpu", action="store_true", help="with what jobs/serve.py --device cuda needs")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--canary", type=number_in("[0, 1]"), metavar="SHARE", help="of the users get the new version")
    how.add_argument("--shadow", action="store_true", help="the new version scores too; its scores are logged only")
    how.add_argument("--stable", action="store_true", help="the canary becomes the stable version")
    how.add_argument("--not-stable", action="store_true", help="write the version only; no command serves it later")
    how.add_argument("--rollback", action="store_true", help="serve the newest version of the model before again")
    parser.add_argument(
        "--prune", action="store_true", help="delete versions that nothing serves and no rollback would"
    )
    arguments = parser.parse_args(argv)
    registry: Path = arguments.registry
    of_new = {flag: getattr(arguments, flag[2:].replace("-", "_")) for flag in _OF_NEW}
    given = [flag for flag, value in of_new.items() if value not in (None, False)]
    goes_back = "--rollback" if arguments.rollback else "--stable" if arguments.stable else None
    if goes_back and given:
        raise UserError(f"{given[0]}: is for a new version, and {goes_back} serves one that is there; leave it out")
    is_named = arguments.run_dir is not None or arguments.lake is not None
    moves = goes_back is not None or (arguments.canary is not None and not is_named)
    if moves or (arguments.prune and not is_named):
        if given:
            raise UserError(f"{given[0]}: is for a new version; name its --run-dir and --lake, or leave it out")
        if moves:
            move_only(registry, arguments)
    else:
        add(registry, arguments)
    if arguments.prune:
        from usr_ray.serving.versions import prune

        print(f"{registry}: deleted {', '.join(prune(registry)) or 'nothing: no version is out of use for a day'}")


def add(registry: Path, arguments: argparse.Namespace) -> None:
    """Publish a run, and point to the new version as the words say. Raises UserError."""
    if arguments.run_dir is None or arguments.lake is None:
        missing = "run-dir" if arguments.run_dir is None else "lake"
        raise UserError(f"--{missing} is missing; name the run and its lake, or give --rollback or --prune")
    if arguments.users is not None:
        from usr_ray.serving.redis_users import check_server

        check_server(arguments.users)
    from usr_ray.serving.publish import publish  # loads torch
    from usr_ray.serving.versions import move_pointer, read_pointer, with_canary, with_shadow

    if arguments.shadow or arguments.canary is not None:
        read_pointer(registry)  # there must be a stable version beside it: said before the export
    report = functools.partial(print, flush=True)
    name = publish(
        arguments.run_dir,
        arguments.lake,
        registry,
        users_at=arguments.users,
        for_gpu=arguments.for_gpu,
        report=report,
    )
    served = "and stable"
    if arguments.shadow:
        with_shadow(registry, name)
        served = "and scores as shadow"
    elif arguments.canary is not None:
        with_canary(registry, name, arguments.canary)
        served = f"and serves a share of {arguments.canary:g} of the users"
    elif arguments.not_stable:
        served = "but not served"
    else:
        move_pointer(registry, name)
    print(f"{registry}: version {name} published, {served}")


if __name__ == "__main__":
    sys.exit(run_job(main))
