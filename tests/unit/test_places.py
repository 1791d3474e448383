"""Every job with every path argument absent, of the wrong kind, without rights or with odd signs: one line before work.

The arguments are those that the jobs' own parsers declare, so a new one is tested by being there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from jobs.__main__ import ON_SPARK, job_files
from usr_ray.cli import (
    JobParser,
    check_file,
    check_input,
    check_lake,
    check_logs,
    check_new_lake,
    check_output,
    check_output_table,
    check_run_dir,
    run_job,
)
from usr_ray.config import UserError
from usr_ray.launch.spark import spark_submit

pytestmark = pytest.mark.unit

NOBODY = 65_534
DATES = ["--dates", "2026-01-01:2026-01-02"]
WORDS: dict[str, list[str]] = {
    "build-samples": DATES,
    "build-worlds": [],
    "daily": [],
    "demo": ["--set=data.train_dates=2026-01-01", "--set=data.eval_dates=2026-01-02"],
    "evaluate": DATES,
    "export": [],
    "ingest-logs": ["--source", "kuairand"],
    "log-mlflow": [],
    "maintain-tables": ["--optimize"],
    "online-report": DATES,
    "publish": [],
    "replay": DATES,
    "report": [],
    "score": DATES,
    "serve": [],
    "study": ["--study", "ablations"],
    "train": [],
    "tune": [],
}
"""What each job needs beside places."""
# fmt: off - a list of words
NO_PLACES = {
    "--stable",
    "--canary",
    "--shadow",
    "--users",
    "--grpc-port",
    "--set",
    "--dates",
    "--allow-missing-dates",
    "--brief",
    "--importance",
    "--compare",
    "--date",
    "--watermark",
    "--restate",
    "--restate-built",
    "--source",
    "--overwrite",
    "--experiment",
    "--optimize",
    "--vacuum",
    "--keep",
    "--keep-pinned",
    "--unpin",
    "--dry-run",
    "--bucket-column",
    "--control",
    "--study",
    "--scale",
    "--seeds",
    "--restate-days",
    "--tolerance",
    "--spark-submit",
    "--step",
    "--status",
    "--not-stable",
    "--device",
    "--for-gpu",
    "--rollback",
    "--prune",
    "--host",
    "--port",
    "--replicas",
    "--workers",
    "--max-queued",
    "--alone",
    "--no-serve",
    "--page",
    "--use",
    "--help",
}
# fmt: on
READ = (check_file, check_input, check_lake, check_logs, check_run_dir)
ODD = ("a b", "50%", "#1", "it's", '"x"', "für-dich", "北京", "🙂", "{a,b}", "?", "a:b", "=", "&", "العربية", "-", "*")
"""Names that every place may have."""


class ParsedError(Exception):
    """A job has got past its command line; what comes now is its work."""


def parser_of(job: str) -> JobParser:
    """The parser that a job makes."""
    found: list[JobParser] = []

    def parse_args(self: JobParser, *_: object) -> None:
        found.append(self)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ParsedError):
        patch.setattr(JobParser, "parse_args", parse_args)
        entry(job)([])
    return found[0]


def entry(job: str) -> Callable[[list[str]], object]:
    """What runs before Spark starts: `parse` of its jobs, all of the others."""
    module = importlib.import_module(f"jobs.{job.replace('-', '_')}")
    return module.parse if module.__name__.removeprefix("jobs.") in ON_SPARK else module.main


JOBS = tuple(job_files())
PLACES = [(job, flag) for job in JOBS for flag in parser_of(job).places]


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    """Places as they should be, in a folder that anybody may enter (pytest's own may not)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for name in ("logs", "lake", "lake/samples", "run", "input", "out"):
        (folder / name).mkdir()
        (folder / name).chmod(0o777)
    (folder / "run" / "config.json").write_text("{}")
    (folder / "file").write_text("[]")
    (folder / "c.toml").write_text("")
    yield folder
    shutil.rmtree(folder)


def words_of(job: str, world: Path, flag: str = "", place: str = "") -> list[str]:
    """A command line with good places, but for one."""
    good = {"--logs": "logs", "--lake": "lake", "--run-dir": "run", "--input": "input", "--config": "c.toml"}
    good |= {"--plan": "file", "--runs": "run", "--registry": "input", "--token-file": "file", "--compare": "run"}
    words = list(WORDS[job])
    for name in parser_of(job).places:
        where = str(world / good.get(name, f"out/{job}{name}"))
        words.append(f"{name}={place if name == flag else where}")
    return words


def refusal(job: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a job that refuses its arguments."""
    assert run_job(lambda argv: entry(job)(argv) and None, words) == 2, capsys.readouterr().err[-2000:]
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert len(error) < 700, error
    return error


def is_read(job: str, flag: str) -> bool:
    return parser_of(job).places[flag][0] in READ


def test_every_option_is_declared_as_a_place_or_known_to_be_none() -> None:
    assert set(WORDS) == set(JOBS), "a new job needs its words here"
    for job in JOBS:
        parser = parser_of(job)
        options = {action.option_strings[-1]: action for action in parser._actions}
        strange = set(options) - set(parser.places) - NO_PLACES
        assert not strange, f"{job}: {strange} must be add_place's, or be named in NO_PLACES"
        paths = {name for name, a in options.items() if a.type is Path or a.metavar in ("DIR", "FILE", "URI")}
        assert paths <= set(parser.places), f"{job}: {paths - set(parser.places)} must be add_place's"


@pytest.fixture
def nobody() -> Iterator[None]:
    """This process as a user whom permissions bind, which root is not."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


BAD: dict[str, str] = {
    "": r"is empty; name a place",
    "~/x": "no shell has replaced the ~",
    "s3:/bucket/x": "would be taken for an address",
    "a`b": "a path must hold no backtick",
    "a\nb": "a path must hold no backtick",
    "${HOME}/x": "a path must hold no backtick",
    "\udcff": "nothing that is not UTF-8",
    "s3://user:secret@shop/x": "an address must hold no key",
}
"""Text of any place -> what is said of it."""


@pytest.mark.parametrize(("job", "flag"), PLACES)
def test_text_that_is_no_place(job: str, flag: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in BAD.items():
        line = refusal(job, words_of(job, world, flag, text), capsys)
        assert message in line, text
        assert flag in line
        assert "secret" not in line


@pytest.mark.parametrize(("job", "flag"), [p for p in PLACES if parser_of(p[0]).places[p[1]][1] is Path])
def test_an_address_where_a_path_is_wanted_is_no_folder_called_s3(
    job: str, flag: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world / "out")
    line = refusal(job, words_of(job, world, flag, "s3://shop/x"), capsys)
    assert f"{flag} s3://shop/x: must be a place in a file system, not an address; mount the store" in line
    assert not list((world / "out").iterdir())


@pytest.mark.parametrize(("job", "flag"), [p for p in PLACES if is_read(*p)])
def test_a_place_to_read_that_is_not_there_or_not_readable(
    job: str, flag: str, world: Path, nobody: None, capsys: pytest.CaptureFixture[str]
) -> None:
    is_file = parser_of(job).places[flag][0] is check_file
    closed = world / f"closed-{job}{flag}"
    with as_root():
        (closed.touch if is_file else closed.mkdir)(mode=0o000)
    wrong = world / ("logs" if is_file else "file")
    for place in ("absent", "absent/deeper", "file/below", closed.name, wrong.name):
        line = refusal(job, words_of(job, world, flag, str(world / place)), capsys)
        assert f"{flag} {world / place}: " in line


@pytest.mark.parametrize(("job", "flag"), [p for p in PLACES if not is_read(*p)])
def test_a_place_to_write_that_cannot_be_written(
    job: str, flag: str, world: Path, nobody: None, capsys: pytest.CaptureFixture[str]
) -> None:
    option = next(a for a in parser_of(job)._actions if flag in a.option_strings)
    kind = "folder" if option.metavar == "FILE" else "file"
    name = f"{job}{flag}"
    with as_root():
        (world / f"readonly-{name}").mkdir(mode=0o555)
        (world / f"partly-{name}").mkdir(mode=0o777)
        (world / f"partly-{name}").chmod(0o777)
        (world / f"partly-{name}" / "_delta_log").mkdir(mode=0o755)
        (world / f"dangling-{name}").symlink_to(world / "nowhere" / "x")
        (world / f"loop-{name}").symlink_to(world / f"loop-{name}")
    wrong = "logs" if kind == "folder" else "file"
    places = [f"readonly-{name}/new", f"dangling-{name}", f"loop-{name}", "file/below", wrong]
    places += ["x" * 201, "/".join("yy" * 800)]
    places += [] if kind == "folder" else [f"readonly-{name}", f"partly-{name}"]
    for place in [*(str(world / p) for p in places), "/proc/usr-ray", "/sys/usr-ray"]:
        line = refusal(job, words_of(job, world, flag, place), capsys)
        assert flag in line
        assert f"{flag} {place[:40]}" in line
    assert not list(world.glob("*/new"))


@pytest.mark.parametrize(("job", "flag"), [p for p in PLACES if not is_read(*p)])
def test_outputs_do_not_go_into_tables_or_over_the_files_of_a_run(
    job: str, flag: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """VACUUM would delete them, or a run would be lost: both without a word."""
    (world / "table" / "_delta_log").mkdir(parents=True, exist_ok=True)
    line = refusal(job, words_of(job, world, flag, str(world / "table" / "new")), capsys)
    assert f"{flag} {world}/table/new: lies in the table {world}/table, where VACUUM deletes" in line
    if parser_of(job).places[flag][0] is check_output:
        assert "lies in the table" in refusal(job, words_of(job, world, flag, str(world / "table")), capsys)
    if job in ("evaluate", "report") and flag == "--output":
        span = "2026-01-01_2026-01-02"
        of_another = ("evaluation-2026-01-03_2026-01-04.json", f"predictions-{span}.parquet")
        for name in ("config.json", "metrics.json", "manifest-eval.json", *of_another):
            (world / "run" / "metrics.json").touch()
            line = refusal(job, words_of(job, world, flag, str(world / "run" / name)), capsys)
            assert f"run/{name}: is a file that the run of {world}/run needs; name another file" in line
        (world / "run" / "metrics.json").unlink()


@pytest.mark.parametrize("job", ["evaluate", "report", "log-mlflow"])
def test_a_run_directory_that_takes_the_output_by_default(
    job: str, world: Path, nobody: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world / f"default-{job}"
    with as_root():
        (folder / "run").mkdir(parents=True)
        (folder / "run" / "config.json").write_text("{}")
    words = [word for word in words_of(job, world, "--run-dir", str(folder / "run")) if "--output" not in word]
    words = [word for word in words if "--tracking-uri" not in word]
    assert f"{folder}" in (line := refusal(job, words, capsys))
    assert "cannot be written" in line


@pytest.mark.parametrize(("job", "flag"), PLACES)
def test_names_with_odd_signs_are_taken_and_those_that_tables_cannot_have_are_refused(
    job: str, flag: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What happens in such places is tested by tests/unit/test_odd_names.py and, with Spark and Ray, by their lanes."""
    check = parser_of(job).places[flag][0]
    plain = JobParser.parse_args

    def parse_args(self: JobParser, *arguments: list[str]) -> None:
        plain(self, *arguments)
        raise ParsedError

    odd = world / f"odd-{job}{flag}"
    for name in ODD:
        place = odd / name
        place.parent.mkdir(exist_ok=True)
        if is_read(job, flag):
            shutil.rmtree(place, ignore_errors=True)
            place.unlink(missing_ok=True) if place.is_file() else None
            place.write_text("[]") if check is check_file else place.mkdir()
        words = words_of(job, world, flag, str(place))
        with monkeypatch.context() as patch:
            patch.setattr(JobParser, "parse_args", parse_args)
            with pytest.raises(ParsedError):
                entry(job)(words)
    if check in (check_logs, check_new_lake):
        (odd / "10:15" / "{a}").mkdir(parents=True, exist_ok=True)
        line = refusal(job, words_of(job, world, flag, str(odd / "10:15" / "{a}")), capsys)
        assert "10:15/{a}: the whole path must not hold both a colon and '{', a sign of a glob" in line
    if check in (check_lake, check_new_lake, check_output_table):
        for name, sign in {"a[1]": "[", "%41": "%41", "a|b": "|", "a^b": "^", "a\\b": "\\"}.items():
            line = refusal(job, words_of(job, world, flag, str(world / name)), capsys)
            assert f"the path of a Delta table must not hold {sign!r}" in line


def test_a_process_whose_own_places_are_gone(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "gone").mkdir()
    monkeypatch.chdir(world / "gone")
    (world / "gone").rmdir()
    assert "the current folder is gone" in refusal("report", [], capsys)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    assert "TMPDIR: no folder for temporary files can be written" in refusal("report", [], capsys)


def test_a_user_without_a_name_is_refused_before_java_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    spark_submit()
    monkeypatch.setattr(os, "geteuid", lambda: 54_321_987)
    with pytest.raises(UserError, match="the user of number 54321987 has no name here, and Java needs one; run as"):
        spark_submit()


class JavaError(Exception):
    """As py4j reports an exception of Java's."""

    __module__ = "py4j.protocol"


def _java(text: str) -> None:
    raise JavaError(f"An error occurred while calling o1.save.\n: {text}\n\tat org.apache.hadoop.fs.Raw.run(Raw.java)")


FAILURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "delta": (lambda folder: write_deltalake(str(folder / "t"), pa.table({"a": [1]})), "readonly/t"),
    "arrow": (lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "t"), "readonly/t"),
    "python": (lambda folder: (folder / "t").write_text(""), "readonly/t"),
    "full": (lambda folder: pq.write_table(pa.table({"a": list(range(10**5))}), "/dev/full"), "No space left"),
    "java": (lambda folder: _java("java.io.IOException: Mkdirs failed to create file:/a/b"), "create file:/a/b)"),
    "java 2": (lambda folder: _java("java.io.FileNotFoundException: /a/b (Permission denied)"), "/a/b (Permission"),
}
"""Writes that fail on the way, by the library that says so."""


@pytest.mark.parametrize("layer", FAILURES)
def test_storage_that_fails_under_the_work_is_one_line_too(
    layer: str, world: Path, nobody: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with as_root():
        (world / "readonly").mkdir(mode=0o555, exist_ok=True)
    write, words = FAILURES[layer]
    assert run_job(lambda argv: write(world / "readonly") and None, []) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be read or written (" in error
    assert words in error


@contextlib.contextmanager
def as_root() -> Iterator[None]:
    user = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    yield
    os.seteuid(user)
