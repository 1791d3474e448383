"""What jobs/serve.py refuses before, and makes of, Ray Serve; a few lines stand in for Ray."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from jobs import serve as job
from usr_ray.cli import run_job
from usr_ray.config import UserError
from usr_ray.serving import app
from usr_ray.serving.service import Settings
from usr_ray.serving.versions import FORMAT, Pointer

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[3]


class RayError(Exception):
    """As ray.exceptions has it."""


class Cluster:
    """Stands in for the modules ray and ray.serve; notes what is called."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.actors: list[dict[str, str]] = []
        self.resources: dict[str, float] = {"CPU": 4.0}
        self.fails: Exception | None = None
        self.applications: list[str] = []

    def run(self, target: Any, *, name: str, route_prefix: str) -> None:
        del target, route_prefix
        self.called.append("run")
        self.applications.append(name)
        if self.fails is not None:
            raise self.fails

    def modules(self) -> dict[str, ModuleType]:
        ray, util = ModuleType("ray"), ModuleType("ray.util")
        note = self.called.append
        ray.init = lambda **_: None  # type: ignore[attr-defined]
        ray.shutdown = lambda: note("ray.shutdown")  # type: ignore[attr-defined]
        ray.cluster_resources = lambda: self.resources  # type: ignore[attr-defined]
        ray.exceptions = SimpleNamespace(RayError=RayError)  # type: ignore[attr-defined]
        ray.util = util  # type: ignore[attr-defined]
        util.list_named_actors = lambda all_namespaces: self.actors  # type: ignore[attr-defined]
        ray.serve = SimpleNamespace(  # type: ignore[attr-defined]
            start=lambda **_: note("start"), run=self.run, shutdown=lambda: note("serve.shutdown")
        )
        return {"ray": ray, "ray.util": util}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    for name, module in found.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(app, "deployment", lambda *_, **__: object())
    return found


def served(*, device: str = "cpu", num_replicas: int = 1) -> list[str]:
    """Addresses that `wait` was told."""
    told: list[str] = []
    app.serve_on_ray(
        Settings(Path("R"), device=device),
        None,
        host="127.0.0.1",
        port=8000,
        grpc_port=None,
        num_replicas=num_replicas,
        own_cluster=False,
        wait=told.append,
    )
    return told


def test_the_application_has_the_name_of_the_file_for_serve_deploy(cluster: Cluster) -> None:
    assert served() == ["http://127.0.0.1:8000"]
    assert cluster.called == ["start", "run", "serve.shutdown", "ray.shutdown"]
    assert cluster.applications == ["usr-ray"]
    assert "  - name: usr-ray\n" in (ROOT / "cluster" / "serve" / "usr_ray.yaml").read_text(encoding="utf-8")


def test_a_cluster_on_which_serve_runs_is_left_as_it_is(cluster: Cluster) -> None:
    """It may listen on 0.0.0.0, and would hand requests to an application without a token."""
    cluster.actors = [{"namespace": "x", "name": "y"}, {"namespace": "serve", "name": "SERVE_CONTROLLER_ACTOR"}]
    with pytest.raises(UserError, match=r"^RAY_ADDRESS: Ray Serve runs on this cluster already, .* use `serve deploy`"):
        served()
    assert cluster.called == ["ray.shutdown"]


@pytest.mark.parametrize(
    ("device", "num_replicas", "message"),
    [
        ("cuda", 1, "--replicas 1: needs 1 GPU of Ray, which has 0; take fewer, or a machine or cluster that has them"),
        ("cpu", 3, "--replicas 3: needs 6 CPU of Ray, which has 4; take fewer, or a machine or cluster that has them"),
    ],
)
def test_replicas_that_ray_would_never_place_are_refused(
    cluster: Cluster, device: str, num_replicas: int, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        served(device=device, num_replicas=num_replicas)
    assert str(refused.value) == message
    assert cluster.called == ["ray.shutdown"]
    cluster.resources = {"CPU": 6.0, "GPU": 1.0}
    assert served(device=device, num_replicas=num_replicas) == ["http://127.0.0.1:8000"]


@pytest.mark.parametrize("kind", [RuntimeError, RayError, TimeoutError])
def test_what_ray_serve_raises_is_one_line_with_its_cause(cluster: Cluster, kind: type[Exception]) -> None:
    cluster.fails = kind("Deploying application usr-ray failed:\n  Traceback\n  File x\nUserError: no model.onnx.\n")
    with pytest.raises(UserError) as refused:
        served()
    assert str(refused.value) == (
        "Ray Serve: the service does not start (Deploying application usr-ray failed: ... UserError: no model.onnx); "
        "see that the ports are free and the registry can be read on every node, or try --alone, which says more"
    )
    assert cluster.called == ["start", "run", "serve.shutdown", "ray.shutdown"]


def registry_of(folder: Path, version_format: int) -> Path:
    version = folder / "versions" / "one"
    (version / "model").mkdir(parents=True)
    (version / "version.json").write_text(json.dumps({"format": version_format}))
    (version / "model" / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    Pointer("one").write(folder)
    return folder


def test_what_each_replica_would_refuse_is_said_before_ray_starts(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    old, good = registry_of(tmp_path / "old", FORMAT - 1), registry_of(tmp_path / "good", FORMAT)
    for registry, device, message in (
        (empty, "cpu", "holds no readable current.json; publish one with jobs/publish.py"),
        (old, "cpu", "format 2, this version reads 3; publish one with jobs/publish.py"),
        (good, "cuda", "holds no model.onnx; publish the run with jobs/publish.py --for-gpu"),
    ):
        with pytest.raises(UserError) as refused:
            job.check_registry(registry, device)
        assert str(refused.value).endswith(message)
    job.check_registry(good, "cpu")


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_port_that_is_taken_is_one_line_on_ray_too(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("abc")
    registry = registry_of(tmp_path / "registry", FORMAT)
    monkeypatch.setattr(job, "prepare_environment", lambda **_: job.OWN)
    monkeypatch.setattr(app, "serve_on_ray", lambda *_, **__: pytest.fail("Ray was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        port, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        words = {"--registry": registry, "--token-file": token, "--port": free, "--grpc-port": free} | {flag: port}
        assert run_job(job.main, [f"{name}={value}" for name, value in words.items()]) == 2
    host = "127.0.0.1" if flag == "--port" else "0.0.0.0"
    assert capsys.readouterr().err == (
        f"error: {flag} {port}: cannot be listened on at {host} (Address already in use); name another\n"
    )
