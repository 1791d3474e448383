"""The frame of every job: shared arguments, one line per user error, exit codes. Standard library only."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from usr_ray.config import Config, UserError, load_config

EXIT_OK, EXIT_FAILURE, EXIT_USER_ERROR = 0, 1, 2


class JobParser(argparse.ArgumentParser):
    """argparse that reports a wrong command line as a UserError, so that it too is one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise UserError instead of printing the usage and leaving."""
        raise UserError(f"{self.prog}: {message}; see --help")


def job_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--config FILE` and repeatable `--set a.b=c`."""
    parser = JobParser(description=description)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file, see jobs/configs")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides",
                        help="override one key by its dotted path; repeatable")  # fmt: skip
    return parser


def job_config(arguments: argparse.Namespace) -> Config:
    """The checked configuration of parsed arguments."""
    return load_config(arguments.config, arguments.overrides)


def run_job(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` and return the process's exit code: 0 success, 1 failure, 2 a user's error (one line)."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_FAILURE
    except Exception:
        traceback.print_exc()
        return EXIT_FAILURE
    return EXIT_OK
