"""The scripts for plain machines: what they refuse, what they keep to themselves, and how a process is found again."""

from __future__ import annotations

import datetime as dt
import os
import stat
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from cluster import local_ray, ray_nodes
from cluster.daemons import Daemon, check_private
from cluster.spark import standalone
from usr_ray.cli import job_dates, run_job
from usr_ray.config import ConfigError, UserError
from usr_ray.launch.environment import private_file

pytestmark = pytest.mark.unit

SLEEP = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.integration
def test_a_daemon_is_found_again_and_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.daemons.STOP_TIMEOUT_S", 0.2)  # the child does not end by itself
    script = f"import subprocess, sys; subprocess.run({SLEEP!r})"
    daemon = Daemon(tmp_path / "state", "worker-1")
    process = daemon.start([sys.executable, "-c", script], dict(os.environ), port=7)
    daemon.wait(process, lambda: "ready" in daemon.log_file.read_text(), timeout_s=20)
    note = Daemon(tmp_path / "state", "worker-1").running()
    assert note is not None
    assert (note["pid"], note["port"]) == (process.pid, 7)
    with pytest.raises(UserError, match="worker-1: runs already"):
        daemon.start(SLEEP, os.environ)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert daemon.stop()
    assert process.wait(5) != 0
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not daemon.stop(), "nothing left to end"


@pytest.mark.parametrize(
    ("script", "flag", "wrong"),
    [
        (ray_nodes, "--port", "0"),
        (ray_nodes, "--dashboard-port", "65536"),
        (ray_nodes, "--metrics-port", "http"),
        (ray_nodes, "--num-cpus", "-1"),
        (ray_nodes, "--num-gpus", "1.5"),
        (ray_nodes, "--object-store-gb", "0.01"),
        (local_ray, "--dashboard-port", "70000"),
        (local_ray, "--nodes", "0"),
        (local_ray, "--object-store-gb", "nan"),
        (standalone, "--port", "-7"),
        (standalone, "--ui-port", "99999"),
        (standalone, "--workers", "-1"),
        (standalone, "--cores", "0"),
    ],
)
def test_a_number_that_no_machine_has_is_one_line(
    script: ModuleType, flag: str, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(script.main, ["status", "--state-dir", str(tmp_path), f"{flag}={wrong}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument {flag}: must be in [" in line
    assert f"got '{wrong}'" in line


@pytest.mark.integration
def test_a_pid_that_another_process_has_by_now_is_not_ours(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "head")
    process = daemon.start(SLEEP, os.environ)
    try:
        note = daemon.note_file.read_text()
        assert daemon.running()
        daemon.note_file.write_text(note.replace('"started": ', '"started": 1'))
        assert daemon.running() is None
    finally:
        daemon.note_file.write_text(note)
        daemon.stop()
        process.wait(5)


@pytest.mark.integration
def test_a_daemon_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "master")
    process = daemon.start([sys.executable, "-c", "raise SystemExit('no such port')"], os.environ)
    with pytest.raises(RuntimeError, match=r"(?s)master did not come up; the end of its log:.*no such port"):
        daemon.wait(process, lambda: False, timeout_s=20)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.5", "192.168.1.9", "fd00::5"])
def test_loopback_and_private_addresses_are_taken(host: str) -> None:
    check_private(host)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("8.8.8.8", "--host 8.8.8.8: is not an address of a private network"),
        ("0.0.0.0", "--host 0.0.0.0: is not an address of a private network"),
        ("head.example", "--host head.example: not an IP address"),
    ],
)
def test_addresses_that_all_the_world_may_reach_are_refused(
    host: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, arguments in ((ray_nodes.main, ["head"]), (standalone.main, ["master"])):
        assert run_job(main, [*arguments, "--host", host, "--state-dir", str(tmp_path / "state")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_a_worker_without_the_clusters_secret_says_where_to_copy_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "auth_token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    state = ["--state-dir", str(tmp_path)]
    assert run_job(ray_nodes.main, ["worker", "--host", "10.0.0.6", "--head", "10.0.0.5:6379", *state]) == 2
    assert f"no token in {tmp_path / 'auth_token'}; copy the head's" in capsys.readouterr().err
    assert run_job(standalone.main, ["worker", "--host", "10.0.0.6", "--master", "spark://10.0.0.5:7077", *state]) == 2
    assert f"no secret in {tmp_path / 'secret'}; copy the master's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "no secret of its own is made, which no master would know"


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (ray_nodes.main, ["head"], "head: --host is missing"),
        (ray_nodes.main, ["worker", "--host", "10.0.0.6"], "worker: --head is missing"),
        (ray_nodes.main, ["status"], "no Ray node of .* runs here"),
        (standalone.main, ["worker", "--master", "10.0.0.5"], "--master '10.0.0.5': write it as spark://10.0.0.5:7077"),
        (standalone.main, ["status"], "no Spark daemon of .* runs here"),
    ],
)
def test_wrong_command_lines_are_one_line(
    main: object, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert run_job(main, [*argv, "--state-dir", str(tmp_path / "state")]) == 2  # type: ignore[arg-type]
    assert re.search(message, capsys.readouterr().err)


def test_secrets_are_in_files_of_their_owner_and_in_no_command_line(tmp_path: Path) -> None:
    secret = private_file(tmp_path / "secret")
    assert len(secret) == 64
    assert mode(tmp_path / "secret") == 0o600
    (tmp_path / "secret").chmod(0o644)
    assert private_file(tmp_path / "secret") == secret, "made once"
    assert mode(tmp_path / "secret") == 0o600, "and never left open"
    daemon, submit = standalone.settings(tmp_path, cores=2, memory="3g")
    assert f"spark.authenticate.secret {secret}\n" in daemon
    assert "spark.master.rest.enabled false\n" in daemon, "the REST server takes applications without the secret"
    assert submit.rindex("spark.executor.memory 3g") > submit.index("spark.executor.memory   "), "the last line counts"
    arguments = Namespace(
        action="head",
        host="10.0.0.5",
        port=6379,
        dashboard_port=8265,
        metrics_port=8080,
        object_store_gb=0.5,
        num_cpus=3,
        num_gpus=None,
        head="",
    )
    command = ray_nodes.start_command(arguments)
    assert command[command.index("--dashboard-host") + 1] == "127.0.0.1"
    assert command[command.index("--num-cpus") + 1] == "3"
    assert "--num-gpus" not in command
    assert ray_nodes.node_environment("127.0.0.1")["RAY_AUTH_MODE"] == "token"


TODAY = dt.date(2026, 3, 1)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("2026-01-01:2026-01-07", dt.date(2026, 1, 1), dt.date(2026, 1, 7)),
        ("today-2:today-1", dt.date(2026, 2, 27), dt.date(2026, 2, 28)),
        ("today-1", dt.date(2026, 2, 28), dt.date(2026, 2, 28)),
        ("2026-02-01:today", dt.date(2026, 2, 1), TODAY),
    ],
)
def test_a_scheduled_job_may_count_days_back(text: str, first: dt.date, last: dt.date) -> None:
    assert job_dates(text, where="--dates", today=TODAY) == (first, last)


@pytest.mark.parametrize("text", ["today+1", "yesterday", "today-1:today-2", "today-x"])
def test_other_words_for_dates_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--dates: "):
        job_dates(text, where="--dates", today=TODAY)


def test_gloo_is_told_the_device_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's /etc/hosts gives the machine's name a loopback address, at which other machines find nobody."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert ray_nodes.node_environment("127.0.0.1")["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in ray_nodes.node_environment("198.51.100.7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert ray_nodes.node_environment("127.0.0.1")["GLOO_SOCKET_IFNAME"] == "ib0"
