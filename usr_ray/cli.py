"""What all jobs share: arguments, the places they name, one line per user error, exit codes.

Standard library only.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import datetime as dt
import difflib
import errno
import gc
import math
import os
import pwd
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from usr_ray.config import Config, UserError, check_address, check_table_address, load_config, parse_dates
from usr_ray.config.fields import Range

EXIT_OK, EXIT_FAILURE, EXIT_USER_ERROR = 0, 1, 2
MAX_NAME_BYTES = 200
"""Longest name of a folder or file that a job makes: temporary files beside it have longer names, and end at 255."""
MAX_PATH_BYTES = 3000
"""Longest whole path of it, for there are folders below it, and paths end at 4096."""
_WRITTEN = {"_delta_log", "checkpoints", "tensorboard", "history.jsonl", ".lock"}
"""Folders and files that a job writes into when it finds them in its output."""
_OF_RUNS = re.compile(
    r"(config|metrics|manifest-train|manifest-eval|evaluation-.*)\.json|history\.jsonl|predictions(-.*)?\.parquet"
)
"""Files of a run directory that no other output may replace."""
_STORAGE_LIBRARIES = ("pyarrow", "_internal", "deltalake", "py4j", "pyspark")
"""Packages whose exceptions are searched for the words below; the second is how deltalake's own call theirs."""
_STORAGE_WORDS = re.compile(
    r"Permission ?denied|Read-only file system|No space left on device|[Qq]uota exceeded|File name too long|"
    r"Mkdirs failed"
)
_OWN_PACKAGES = ("usr_ray", "etl", "jobs", "cluster", "tests")
_STORAGE_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
}


class JobParser(argparse.ArgumentParser):
    """argparse that reports a wrong command line as a UserError, so that it too is one line.

    Arguments that name places are added with `add_place`, and held to its check before the job begins.
    """

    def __init__(self, description: str | None = None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.places: dict[str, tuple[Callable[..., None], type]] = {}
        """Flag of each place, its check, and what the job gets: str or Path."""

    def add_place(
        self, flag: str, check: Callable[..., None] | None, *, type: type[str] | type[Path] = str, **options: Any
    ) -> None:
        """Add an argument that names a folder or a file.

        Args:
            flag: such as "--lake".
            check: called with each place that is given, and `flag`; one of the checks below. None: the job knows only
                later what is needed, and checks it then.
            type: what the job gets; the check gets the text, for Path("") is the current folder. A Path is in a file
                system: an object store's address is refused.
            options: passed on to add_argument.
        """
        self.add_argument(flag, **{"metavar": "DIR", **options})
        self.places[flag] = check or check_address, type

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise UserError instead of printing the usage and leaving."""
        raise UserError(f"{self.prog}: {message}; see --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does; what is left over is named with the flag that was probably meant."""
        found, strange = self.parse_known_args(args, namespace)
        if not strange:
            for flag, (check, kind) in self.places.items():
                name = flag.removeprefix("--").replace("-", "_")
                given = getattr(found, name)
                if given is None:
                    continue
                for place in given if isinstance(given, list) else [given]:
                    if kind is Path:
                        check_no_store(place, flag=flag)
                    check(place, flag=flag)
                setattr(found, name, [*map(kind, given)] if isinstance(given, list) else kind(given))
            return found
        first, flags = strange[0], re.findall(r"--[\w-]+", self.format_usage())
        if first.startswith("--"):
            near = difflib.get_close_matches(first.partition("=")[0], flags, n=1)
            self.error(f"unrecognized arguments: {' '.join(strange)}" + (f"; did you mean {near[0]}?" if near else ""))
        if re.fullmatch(r"[a-z][\w.]*=.*", first, re.DOTALL) and "--set" in flags:
            self.error(f"unrecognized arguments: {first}; --set takes one key, so repeat it: --set {first}")
        self.error(f"unrecognized arguments: {' '.join(strange)}; quote a value that holds blanks")
        return found


def add_allow_missing_dates(parser: argparse.ArgumentParser, **action: Any) -> None:
    """Add --allow-missing-dates; `action`: as in add_argument, if not to store whether it was given."""
    words = "where some of the dates have no rows, take the others"
    parser.add_argument("--allow-missing-dates", help=words, **(action or {"action": "store_true"}))


def job_parser(description: str, *, takes_dates: bool = False) -> JobParser:
    """A parser with `--config FILE` and repeatable `--set a.b=c`.

    With `takes_dates`, --allow-missing-dates is a short way to set data.allow_missing_dates.
    """
    parser = JobParser(description)
    parser.add_place("--config", check_file, type=Path, metavar="FILE", help="TOML file, see jobs/configs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        dest="overrides",
        help="override one key by its dotted path; repeatable",
    )
    if takes_dates:
        key = "data.allow_missing_dates=true"
        add_allow_missing_dates(parser, action="append_const", dest="overrides", const=key)
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


def flags(**values: object) -> list[str]:
    """Words of a command line, in the order given: of run_dir="r" the two words --run-dir and r."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def job_config(arguments: argparse.Namespace) -> Config:
    """The checked configuration of parsed arguments."""
    return load_config(arguments.config, arguments.overrides)


def job_dates(text: str, *, where: str, today: dt.date | None = None) -> tuple[dt.date, dt.date]:
    """First and last UTC date of "A:B" or "A"; a scheduled job writes today or today-N for a date.

    Raises:
        ConfigError: no date, or the range is empty.
    """
    start = today or dt.datetime.now(dt.UTC).date()

    def date(match: re.Match[str]) -> str:
        return (start - dt.timedelta(days=int(match[1] or 0))).isoformat()

    return parse_dates(re.sub(r"\btoday(?:-(\d{1,4}))?(?=:|$)", date, text), where=where)


# ---- places: checked before any work begins. An object store's address is checked where it is opened.


def check_no_store(place: Path | str, *, flag: str) -> None:
    """UserError where `place` is an address: as a path s3://x is a folder called s3: in the current one."""
    check_address(str(place), flag=flag)
    if "://" in str(place):
        raise UserError(
            f"{flag} {place}: must be a place in a file system, not an address; mount the store, or copy from there "
            "and to it yourself (docs/cluster.md, object stores)"
        )


def check_input(place: Path | str, *, flag: str) -> None:
    """UserError unless `place` is a folder that can be read, or an address."""
    text = str(place)
    check_address(text, flag=flag)
    if "://" in text:
        return
    try:
        os.listdir(text)
    except NotADirectoryError as error:
        raise UserError(f"{flag} {text}: is a file; name a folder") from error
    except FileNotFoundError as error:
        raise UserError(f"{flag} {text}: there is no such folder{_nearest(text)}") from error
    except OSError as error:
        raise UserError(f"{flag} {text}: cannot be read ({error.strerror}); name a folder that you may read") from error


def check_logs(logs: Path | str, *, flag: str) -> None:
    """UserError unless `logs` is a folder that Spark can read, or an address."""
    check_input(logs, flag=flag)
    _check_spark_path(str(logs), flag=flag)


def _check_spark_path(place: str, *, flag: str) -> None:
    where = os.path.abspath(place)
    signs = re.search(r"[*?\[\]{}]", where)
    if "://" not in place and ":" in where and signs:
        raise UserError(
            f"{flag} {place}: the whole path must not hold both a colon and {signs[0]!r}, a sign of a glob, which "
            "Hadoop cannot read together; rename one"
        )


def check_file(place: Path | str, *, flag: str) -> None:
    """UserError unless `place` is a file on this machine that can be read."""
    text = str(place)
    check_address(text, flag=flag)
    try:
        with open(text, "rb"):
            pass
    except IsADirectoryError as error:
        raise UserError(f"{flag} {text}: is a folder; name a file") from error
    except FileNotFoundError as error:
        raise UserError(f"{flag} {text}: there is no such file{_nearest(text)}") from error
    except OSError as error:
        raise UserError(f"{flag} {text}: cannot be read ({error.strerror}); name a file that you may read") from error


def check_lake(lake: Path | str, *, flag: str) -> None:
    """UserError unless `lake` is a folder that is there, or an address.

    The folder of one of its tables is refused: `<lake>/samples` is an easy slip.
    """
    text = str(lake)
    _check_lake_path(text, flag=flag)
    check_input(text, flag=flag)


def check_new_lake(lake: Path | str, *, flag: str) -> None:
    """UserError unless `lake` is a folder that can be written, or made."""
    _check_lake_path(str(lake), flag=flag)
    _check_spark_path(str(lake), flag=flag)
    check_output(lake, flag=flag)


def _check_lake_path(lake: str, *, flag: str) -> None:
    check_table_address(lake, flag=flag)
    if "://" not in lake and os.path.isdir(os.path.join(lake, "_delta_log")):
        above = os.path.dirname(lake.rstrip("/")) or "."
        raise UserError(f"{flag} {lake}: is a table of a lake; name the folder above it: {flag} {above}")


def check_output_table(place: Path | str, *, flag: str) -> None:
    """UserError unless a Delta table can be written to `place`."""
    check_table_address(str(place), flag=flag)
    check_output(place, flag=flag, table=True)


def check_output_file(place: Path | str, *, flag: str, own: Path | None = None) -> None:
    """UserError unless a file can be written as `place`; its folder is made with it. `own`: as in `check_output`."""
    check_output(place, flag=flag, file=True, own=own)


def check_output(
    place: Path | str, *, flag: str, file: bool = False, table: bool = False, own: Path | None = None
) -> None:
    """UserError unless a folder (or with `file` a file) of this name can be written; nothing is left behind.

    It must not lie in a table (with `table` it may be one), nor be one of the files that make a run what it is, but for
    `own`, which the job writes.
    It is tried with a file without a name in the nearest folder that is there: permissions alone do not reveal
    read-only file systems, and mean nothing to root. What an earlier job left in the folder, perhaps as another user,
    is asked for its permissions.
    """
    text = str(place)
    check_address(text, flag=flag)
    if "://" in text:
        return
    kind, other = ("file", "folder") if file else ("folder", "file")
    path = Path(text).absolute()
    for name, most in [*((part, MAX_NAME_BYTES) for part in path.parts), (str(path), MAX_PATH_BYTES)]:
        if len(os.fsencode(name)) > most:
            raise UserError(
                f"{flag} {text[:40]}...: the name {name[:20]}... has {len(os.fsencode(name))} bytes; {most} are the "
                "most"
            )
    if os.path.isdir(path) if file else os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{flag} {text}: is a {other}; name a {kind}")
    folder = path.parent if file else path
    real = Path(os.path.realpath(path))
    for above in real.parents if table or file else (real, *real.parents):
        if os.path.isdir(above / "_delta_log"):
            raise UserError(
                f"{flag} {text}: lies in the table {above}, where VACUUM deletes what is not the table's; name a "
                f"{kind} outside of it"
            )
    is_own = own is not None and own.absolute() == path
    if file and not is_own and _OF_RUNS.fullmatch(path.name) and os.path.exists(folder / "config.json"):
        raise UserError(f"{flag} {text}: is a file that the run of {folder} needs; name another {kind}")
    existing = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        entries = [*os.scandir(folder)] if existing == path else []
    except OSError as error:
        raise UserError(
            f"{flag} {text}: cannot be written ({existing}: {error.strerror}); name a {kind} that you may write"
        ) from error
    tables = [entry.path for entry in entries if os.path.isdir(f"{entry.path}/_delta_log")]
    ours = [*tables, *(f"{table}/_delta_log" for table in tables), *(e.path for e in entries if e.name in _WRITTEN)]
    for name in ours:
        if not os.access(name, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise UserError(
                f"{flag} {text}: cannot be written (it holds {name}, which you may not write); change its owner or "
                f"permissions, or name a {kind} that you may write"
            )


def check_process_places() -> None:
    """UserError unless this process has a current folder and one for temporary files, which all libraries expect."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError("the current folder is gone, or may not be read; cd to one that is there") from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError("TMPDIR: no folder for temporary files can be written; free space, or set TMPDIR") from error


def check_user_name() -> None:
    """UserError unless this process's user has a name: Spark's Java ends in a stack trace for a mere number."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError as error:
        raise UserError(
            f"spark: the user of number {os.geteuid()} has no name here, and Java needs one; run as a user of "
            "/etc/passwd, or add a line for this one (a container's --user)"
        ) from error


def check_run_dir(run_dir: Path | str, *, flag: str) -> None:
    """UserError unless `run_dir` is the folder of a run that was started."""
    check_address(str(run_dir), flag=flag)
    if not os.path.lexists(run_dir):
        raise UserError(
            f"{flag} {run_dir}: no such directory; name the --run-dir of jobs/train.py{_nearest(str(run_dir))}"
        )
    check_input(run_dir, flag=flag)


def _nearest(text: str) -> str:
    """A hint at the entry beside a missing path that is most like it."""
    path = Path(text).absolute()
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        existing = next((p for p in path.parents if p.is_dir()), path.parent)
        return f"; of its path {existing} is there"
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


# ---- processors


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors that this process may keep busy: those of its affinity, and no more than its container's quota.

    A container with a limit of 4 CPUs on a machine of 64 sees all 64; threads or trials for all of them would stand
    still for most of each period of the quota.

    Args:
        cgroup: of the container, version 2 or 1; a machine's own has no quota.
    """
    cores = _all_cores()
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(float, " ".join((cgroup / name).read_text(encoding="utf-8") for name in names).split())
            return max(1, min(cores, math.ceil(quota / period))) if quota > 0 else cores
    return cores


def _all_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_LIMITS = ("OMP_NUM_THREADS", "USR_RAY_THREADS")
"""Set to a container's quota; the second says that it was not the user who set the first."""


def limit_threads(environment: MutableMapping[str, str], cgroup: Path = Path("/sys/fs/cgroup")) -> None:
    """Let torch, numpy and Arrow, where they are loaded after this, begin with the threads of a container's quota.

    They look at the affinity alone, which knows no quota. OMP_NUM_THREADS that is set stays. Jobs that the process
    starts inherit it, but for Ray (`own_threads_apart`).
    """
    cores = usable_cores(cgroup)
    if cores < _all_cores() and "OMP_NUM_THREADS" not in environment:
        environment.update(dict.fromkeys(_LIMITS, str(cores)))


@contextlib.contextmanager
def own_threads_apart(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Without what `limit_threads` has set: a Ray that starts here gives each actor the threads of its own cores."""
    taken = {name: environment.pop(name) for name in _LIMITS if _LIMITS[-1] in environment}
    try:
        yield
    finally:
        environment.update(taken)


# ---- running


def print_error(line: str) -> None:
    """One line on standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def run_job(
    main: Callable[[list[str]], None], argv: list[str] | None = None, *, report: Callable[[str], None] = print_error
) -> int:
    """Run `main(argv)` and return the process's exit code: 0 success, 1 failure, 2 a user's error (one line).

    Args:
        argv: None: those of the process.
        report: writes the line of a user's error (under spark-submit, stderr is not where it seems).
    """
    # With torch and Ray loaded the interpreter's last collections take a second, and free what the process's end frees.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    try:
        check_process_places()
        limit_threads(os.environ)
        main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_FAILURE
    except Exception as error:
        line = _users_line(error)
        if line is None:
            traceback.print_exc()
            return EXIT_FAILURE
        report(f"error: {' '.join(line.split())}")
        return EXIT_USER_ERROR
    return EXIT_OK


def _users_line(error: Exception) -> str | None:
    """An error that the user can fix, as one line; None for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in _OWN_PACKAGES:
        return (
            f"the package {error.name} is not installed for {sys.executable}; activate the environment that has it "
            "(`make setup`, then `source .venv/bin/activate`), or install usr-ray's extras (README.md)"
        )
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: cannot be read or written ({error.strerror}); mend it or name another"
    # Arrow, Delta's Rust and Java's exceptions name the place, if at all, in their text.
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _STORAGE_LIBRARIES:
        lines = str(error).splitlines()
        said = next((n for n, line in enumerate(lines) if _STORAGE_WORDS.search(line)), None)
        if said is not None:
            text = " ".join(lines[max(0, said - 1) : said + 1])[:500]
            return f"storage: cannot be read or written ({text}); mend it, free space or name another folder"
    return None
