"""What a training sets before Ray starts: where Ray's own actors ask, and that nothing given is overwritten."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from usr_ray.config import UserError
from usr_ray.launch.environment import (
    ADDRESS,
    API_SERVER,
    LOOPBACK,
    OWN,
    ensure_token,
    free_port,
    prepare_environment,
    reserve_port,
)

pytestmark = pytest.mark.unit


def test_a_port_in_use_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) == port + 1 or free_port(port) > port


def test_a_ray_of_our_own_is_asked_itself_and_not_the_last_one_started_here(tmp_path: Path) -> None:
    environment = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert prepare_environment(environment) == OWN
    address, _, port = environment[API_SERVER].rpartition(":")
    assert address == f"http://{LOOPBACK}"
    assert int(port) >= 8265


def test_without_a_dashboard_there_is_nobody_to_ask(tmp_path: Path) -> None:
    environment = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    prepare_environment(environment, dashboard=False)
    assert API_SERVER not in environment
    assert environment["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "0"


def test_a_cluster_that_is_named_keeps_its_own_settings() -> None:
    environment = {"RAY_ADDRESS": "10.0.0.1:6379", "MIMALLOC_PURGE_DELAY": "5"}
    assert prepare_environment(environment) == ADDRESS
    assert API_SERVER not in environment
    assert environment["MIMALLOC_PURGE_DELAY"] == "5"


@pytest.mark.integration
def test_two_trainings_begun_at_once_choose_two_ports() -> None:
    """Neither listens yet: Ray's dashboard does so seconds later."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        first = probe.getsockname()[1]
    code = f"from usr_ray.launch.environment import reserve_port; print(reserve_port({first})); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = int(other.stdout.readline())
        assert reserve_port(first) != theirs
        other.communicate("\n")


def test_without_a_home_a_ray_of_our_own_gets_a_token_for_its_life(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file" / "token")}
    with pytest.raises(UserError, match=r"Ray's token: cannot be read or written .* set HOME"):
        ensure_token(environment)
    assert prepare_environment(environment, dashboard=False) == OWN
    assert len(environment["RAY_AUTH_TOKEN"]) == 64


def test_nobody_s_home_is_refused_and_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "HOME": ""}
    prepare_environment(environment, dashboard=False)
    assert "HOME" not in environment
    monkeypatch.setattr("os.geteuid", lambda: 54_321_987)
    with pytest.raises(UserError, match="HOME: is not set, and the user of number 54321987 has no home here"):
        prepare_environment({}, dashboard=False)
    environment["HOME"] = str(tmp_path)
    assert prepare_environment(environment, dashboard=False) == OWN


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("/tmp/" + "x" * 35, "has 40 bytes, and for Ray's sockets below it 39 are the most; set RAY_TMPDIR"),
        ("/proc/x", "cannot be written"),
    ],
)
@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_in_which_ray_cannot_have_its_sessions(name: str, folder: str, message: str, tmp_path: Path) -> None:
    environment = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "TMPDIR": "/tmp", name: folder}
    with pytest.raises(UserError, match=f"^{name} {folder}: .*{message}"):
        prepare_environment(environment, dashboard=False)
    assert prepare_environment(environment | {"RAY_ADDRESS": "10.0.0.1:6379"}) == ADDRESS, "not ours to start"


@pytest.mark.parametrize(("terminal", "colours"), [(True, None), (False, "0")])
def test_rays_colours_are_for_terminals(
    terminal: bool, colours: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    environment = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "x"}
    prepare_environment(environment, dashboard=False)
    assert environment.get("RAY_COLOR_PREFIX") == colours


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("kept", [False, True])
def test_a_training_keeps_the_memory_that_a_step_frees(kept: bool) -> None:
    """Steps of forty blocks of 1 MB: page faults of the last of five."""
    program = f"""
import resource
from usr_ray.launch.environment import keep_freed_memory
if {kept}: keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(1 << 20) for _ in range(40)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert (int(found.stdout) < 100) == kept, found.stdout
