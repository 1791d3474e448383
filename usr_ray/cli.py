"""The frame of every job: shared arguments, one line per user error, exit codes. Standard library only."""

from __future__ import annotations

import argparse
import datetime as dt
import math
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from usr_ray.config import Config, UserError, load_config, parse_dates
from usr_ray.config.fields import Range

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
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        dest="overrides",
        help="override one key by its dotted path; repeatable",
    )
    return parser


def number_in(within: str, kind: type[int] | type[float] = float) -> Callable[[str], float]:
    """What add_argument takes as `type` for a number in a range such as "[0, 1)"."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if number not in Range.of(within):
            raise argparse.ArgumentTypeError(f"must be in {within}, got {text!r}")
        return number

    return read


def job_config(arguments: argparse.Namespace) -> Config:
    """The checked configuration of parsed arguments."""
    return load_config(arguments.config, arguments.overrides)


def job_dates(text: str, *, where: str, today: dt.date | None = None) -> tuple[dt.date, dt.date]:
    """First and last UTC date of "A:B" or "A"; a scheduled job writes today or today-N for a date.

    Args:
        text: of the command line.
        where: the flag, for messages.
        today: None: now, in UTC.

    Raises:
        ConfigError: no date, or the range is empty.
    """
    start = today or dt.datetime.now(dt.UTC).date()

    def date(match: re.Match[str]) -> str:
        return (start - dt.timedelta(days=int(match[1] or 0))).isoformat()

    return parse_dates(re.sub(r"\btoday(?:-(\d{1,4}))?(?=:|$)", date, text), where=where)


def print_error(line: str) -> None:
    """One line on standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def run_job(
    main: Callable[[list[str]], None], argv: list[str] | None = None, *, report: Callable[[str], None] = print_error
) -> int:
    """Run `main(argv)` and return the process's exit code: 0 success, 1 failure, 2 a user's error (one line).

    Args:
        main: the job.
        argv: its arguments; None: those of the process.
        report: writes the line of a user's error (under spark-submit, stderr is not where it seems).
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        report(f"error: {' '.join(str(error).split())}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_FAILURE
    except Exception:
        traceback.print_exc()
        return EXIT_FAILURE
    return EXIT_OK
