"""The frame of every job and the demo's own messages: one line on stderr, exit code 2, nothing made."""

from __future__ import annotations

import configparser
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
import threading
import time
import urllib.error
from email.message import Message
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from jobs.__main__ import ON_SPARK
from usr_ray.cli import job_config, job_parser, limit_threads, own_threads_apart, run_job, usable_cores
from usr_ray.config import UserError, load_config

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def load_job(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_user_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise UserError("logs: 'clicks' is missing;\n  give one")

    assert run_job(main, []) == 2
    assert capsys.readouterr().err == "error: logs: 'clicks' is missing; give one\n"


def test_a_failure_is_exit_code_1_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise RuntimeError("broken")

    assert run_job(main, []) == 1
    assert "RuntimeError: broken" in capsys.readouterr().err


@pytest.mark.integration
def test_a_job_s_process_collects_no_garbage_at_its_end() -> None:
    program = """
import atexit, gc, sys
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 1000))
from usr_ray.cli import run_job
def ends(argv): sys.exit(3)
for main in (print, ends):
    code = run_job(main, [])
    print(code, gc.get_freeze_count())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.stdout.splitlines(), ended.returncode) == (["[]", "0 0", "frozen True"], 3), ended.stderr


def test_an_unknown_flag_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(lambda argv: job_parser("x").parse_args(argv) and None, ["--confg", "a"]) == 2
    assert "unrecognized arguments: --confg a; did you mean --config?; see --help" in capsys.readouterr().err


def test_several_keys_behind_one_set_are_told_to_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--set", "train.seed=1", "train.num_epochs=2"]
    assert run_job(lambda argv: job_parser("x").parse_args(argv) and None, argv) == 2
    assert "--set takes one key, so repeat it: --set train.num_epochs=2" in capsys.readouterr().err


def test_set_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[train]\nnum_epochs = 2\nlearning_rate = 0.5\n")
    arguments = job_parser("x").parse_args(["--config", str(file), "--set", "train.num_epochs=3"])
    config = job_config(arguments)
    assert (config.train.num_epochs, config.train.learning_rate) == (3, 0.5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--work", "W"], "the demo needs data.train_dates and data.eval_dates"),
        (["--work", "W", "--source", "kuairand", "--config", "C"], "--source kuairand: --input is missing"),
        (["--work", "FULL", "--config", "C"], "is not empty and no earlier demo's"),
    ],
)
def test_the_demo_refuses_before_it_makes_anything(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    config = tmp_path / "c.toml"
    config.write_text('[data]\ntrain_dates = "2026-01-01"\neval_dates = "2026-01-02"\n')
    names = {"W": tmp_path / "work", "C": config, "FULL": tmp_path / "full"}
    assert run_job(load_job("demo").main, [str(names.get(a, a)) for a in argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


def test_the_demo_keeps_java_s_one_line_to_itself_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    said = ["WARNING: Using incubator modules: jdk.incubator.vector\n", "12:00:00 WARN Utils: disk\n", "error: no"]
    load_job("demo").pass_on(said)
    assert capsys.readouterr().err == "12:00:00 WARN Utils: disk\nerror: no"


def test_the_demo_reads_a_jvm_s_pipe_to_its_end_though_nobody_reads_the_demo_s(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    lines = iter([f"{n}\n" for n in range(1000)])
    monkeypatch.setattr(sys, "stderr", Closed())
    load_job("demo").pass_on(lines)
    assert list(lines) == []  # a pipe that fills up would stop the JVM


@pytest.fixture
def said_by_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """jobs/demo.py with a build that says what is no UTF-8, and a last word when it is ended."""
    program = tmp_path / "spark-submit"
    program.write_text(
        "#!/bin/sh\ntrap 'echo the end >&2; exit 1' TERM\nprintf '\\377\\n' >&2\ntouch ready\n"
        "for _ in $(seq 200); do test -e done && exit 0; sleep 0.05; done\n"
    )
    program.chmod(0o755)
    demo = load_job("demo")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "spark_submit", lambda: str(program))
    return demo


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} does not come")


@pytest.mark.integration
def test_the_demo_passes_on_what_is_no_utf_8(
    said_by_a_build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said_by_a_build.build(meanwhile=(tmp_path / "done").touch)
    assert capsys.readouterr().err == "\ufffd\n"


@pytest.mark.integration
def test_the_demo_reads_what_a_build_says_that_it_ends(
    said_by_a_build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()

    def interrupted() -> None:
        wait_for(tmp_path / "ready")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        said_by_a_build.build(meanwhile=interrupted)
    assert capsys.readouterr().err == "\ufffd\nthe end\n"
    assert threading.active_count() == before


def test_the_demo_says_in_one_line_that_its_service_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = tmp_path / "versions" / "one"
    version.mkdir(parents=True)
    (version / "golden.json").write_text('[{"request": {"candidates": ["a"]}}]')
    (tmp_path / "current.json").write_text('{"stable": "one"}')
    demo = load_job("demo")

    def urlopen(address: str, body: bytes | None = None, **_: object) -> io.BytesIO:
        if body is None:
            return io.BytesIO()
        raise urllib.error.HTTPError(address, 429, "Too Many Requests", Message(), None)

    monkeypatch.setattr(demo.urllib.request, "urlopen", urlopen)
    with pytest.raises(SystemExit) as ended:
        demo.ask("http://127.0.0.1:8000", tmp_path, SimpleNamespace(poll=lambda: None))
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "demo: stopped, the service does not answer http://127.0.0.1:8000/v1/rank (HTTP Error 429: Too Many Requests)\n"
    )


def test_the_demo_looks_for_all_that_serving_needs() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    serve = set(setup["options.extras_require"]["serve"].split())
    assert set(load_job("demo").SERVE_PACKAGES) == (serve - {"ray[serve]"}) | {"fastapi", "uvicorn"}


def test_a_query_scenario_that_is_no_scenario_is_refused() -> None:
    with pytest.raises(UserError, match="query_scenarios names serach, not among scenarios: search, recommendation"):
        load_config(None, ["query_scenarios=['serach']"])


def test_a_job_may_write_its_error_line_elsewhere() -> None:
    lines: list[str] = []

    def main(argv: list[str]) -> None:
        raise UserError("no")

    assert run_job(main, [], report=lines.append) == 2
    assert lines == ["error: no"]


@pytest.mark.parametrize("flag", [["--tolerance", "nan"], ["--tolerance=-1"], ["--restate-days=-1"]])
def test_a_number_on_the_command_line_that_makes_no_sense_is_one_line(
    flag: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_job(load_job("daily").main, ["--work", str(tmp_path), "--status", *flag]) == 2
    assert "must be in [0, " in capsys.readouterr().err


def test_two_ways_of_restating_at_once_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    places = ["--logs", str(tmp_path), "--lake", str(tmp_path / "lake"), "--dates", "2026-01-01:2026-01-02"]
    assert run_job(load_job("build_samples").main, [*places, "--restate-built", "--restate"]) == 2
    assert "--restate-built: restates and builds, --restate restates alone" in capsys.readouterr().err


@pytest.mark.parametrize("job", [*sorted(ON_SPARK), "ingest_logs"])
def test_jobs_under_spark_submit_write_their_error_to_its_standard_error(
    job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which spark-submit joins to the standard output: etl.jvm.print_error knows another way."""
    lines: list[str] = []
    monkeypatch.setattr("etl.jvm.print_error", lines.append)
    monkeypatch.setattr(sys, "argv", [job, "--nope"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


@pytest.mark.integration
def test_every_job_outside_of_its_environment_says_so_in_one_line(tmp_path: Path) -> None:
    """Under a Python without packages, as a shell has it whose environment is not activated."""
    jobs = [path for path in sorted((ROOT / "jobs").glob("*.py")) if not path.stem.startswith("_")]

    def run(path: Path, *words: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-S", str(path), *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    helped = {path.stem: run(path, "--help") for path in jobs}
    asked = ("--run-dir", str(tmp_path), "--lake", str(tmp_path), "--dates", "2026-01-01")
    started = {
        "evaluate": run(ROOT / "jobs" / "evaluate.py", *asked),
        "train": run(ROOT / "jobs" / "train.py", "--lake", str(tmp_path), "--run-dir", str(tmp_path / "run")),
    }
    for name, process in helped.items():
        error = process.communicate()[1]
        assert process.returncode == 0 or error.count("\n") == 1, (name, error)
    for name, process in started.items():
        error = process.communicate()[1]
        assert process.returncode == 2, (name, error)
        line = r"error: the package \w+ is not installed for .*source .venv/bin/activate.*\n"
        assert re.fullmatch(line, error), (name, error)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 16),
        ({"cpu.max": "nonsense"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu/cpu.cfs_quota_us": "800000", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_a_container_has_as_many_cores_as_its_quota(
    files: dict[str, str], wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert usable_cores(tmp_path) == wanted


def test_libraries_begin_with_the_threads_of_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes the affinity, which knows no quota, and OMP_NUM_THREADS as it is loaded: so it is set before."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    given: dict[str, str] = {"OMP_NUM_THREADS": "7"}
    unset: dict[str, str] = {}
    limit_threads(unset, tmp_path)
    assert unset == {}, "no quota, so the machine's own"
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    for environment in (given, unset):
        limit_threads(environment, tmp_path)
    assert (given["OMP_NUM_THREADS"], unset["OMP_NUM_THREADS"]) == ("7", "4")
    with own_threads_apart(given), own_threads_apart(unset):
        assert (given, unset) == ({"OMP_NUM_THREADS": "7"}, {}), "a Ray that starts here divides the cores itself"
    assert (given["OMP_NUM_THREADS"], unset["OMP_NUM_THREADS"]) == ("7", "4")
    started = dict(unset)
    limit_threads(started, tmp_path)
    with own_threads_apart(started):
        assert started == {}, "also of a job that a job has started"
    found = []
    monkeypatch.setattr("usr_ray.cli.usable_cores", lambda *_: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("USR_RAY_THREADS", "")
    monkeypatch.delenv("USR_RAY_THREADS")
    assert run_job(lambda _: found.append(os.environ["OMP_NUM_THREADS"]), []) == 0
    assert found == ["4"]
