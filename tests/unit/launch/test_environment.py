"""What a training sets before Ray starts: where Ray's own actors ask, and that nothing given is overwritten."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from usr_ray.launch.environment import ADDRESS, API_SERVER, LOOPBACK, OWN, free_port, prepare_environment

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
